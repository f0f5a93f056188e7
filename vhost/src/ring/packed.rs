//! Packed virtqueues (virtio 1.3, 2.8): one ring of descriptors that the device overwrites with used ones.
#![allow(unsafe_code)] // Its job: atomic access to the ring in guest memory.
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use ferry_dataplane::counters::DropReason;
use ferry_dataplane::frame::BURST;

use super::chain::{self, INDIRECT, NEXT, Table, WRITE, Words};
use super::split::need_event;
use super::stage::{One, Stage};
use super::{Chain, Core, Fault, FaultKind, Format, Found, Sink};

/// VIRTQ_DESC_F_AVAIL and VIRTQ_DESC_F_USED (2.8.1).
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Event suppression flags (2.8.10): RING_EVENT_FLAGS_ENABLE, _DISABLE, _DESC.
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// Where length, id and flags are in a descriptor, bytes: a word of 64 bits.
const LEN: usize = 8;

/// A slot of the ring and the wrap counter that goes with it (2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    index: u16,
    wrap: bool,
}

impl Position {
    /// The available half of a vhost-user ring base.
    pub(super) fn from_base(base: u32) -> Self {
        Self { index: (base & 0x7fff) as u16, wrap: base & 0x8000 != 0 }
    }

    pub(super) fn is_inside(self, size: u16) -> bool {
        self.index < size
    }

    /// As the low half of a ring base, and as the event suppression structure has it (2.8.10).
    #[inline]
    fn to_bits(self) -> u16 {
        self.index | if self.wrap { 0x8000 } else { 0 }
    }

    /// How far it is from `former`, less than two rounds ago. A chain may fill the whole ring: then only the wrap counter has changed.
    #[inline(always)]
    fn slots_since(self, former: Self, size: u16) -> u16 {
        let round = if self.wrap == former.wrap { 0 } else { size };
        round.wrapping_add(self.index).wrapping_sub(former.index)
    }

    #[inline(always)]
    fn add(self, slots: u16, size: u16) -> Self {
        let index = u32::from(self.index) + u32::from(slots);
        if index >= u32::from(size) {
            Self { index: (index - u32::from(size)) as u16, wrap: !self.wrap }
        } else {
            Self { index: index as u16, wrap: self.wrap }
        }
    }
}

/// Where the descriptors lie.
#[derive(Clone, Copy)]
struct Descriptors {
    desc: *mut u8,
    size: u16,
}

pub(crate) struct Packed {
    ring: Descriptors,
    /// The driver's wish for notifications (2.8.4), written by the driver.
    driver_event: *const u8,
    /// The device's wish, written here.
    device_event: *mut u8,
    next_avail: Position,
    /// Next used descriptor goes here, including ones not yet published.
    next_used: Position,
    /// As far as the driver can see.
    published: Position,
    /// The first used descriptor of the batch, from its length on: written last, so that the driver sees all or nothing of it.
    first: u64,
    /// Chains from `next_avail` on, a slot each.
    stage: Stage,
    held: Held,
}

/// Chains received and not yet returned, oldest first: until then their descriptors stay as the driver wrote them, so that they are found
/// again after a stop. Several calls of receive may come before one release.
struct Held {
    /// Buffer id, and above it the slots that the chain occupies.
    chains: Box<[u32; Self::CAPACITY]>,
    len: usize,
}

impl Held {
    const CAPACITY: usize = 4 * BURST;

    fn new() -> Self {
        Self { chains: Box::new([0; Self::CAPACITY]), len: 0 }
    }
}

/// Writes used descriptors.
#[derive(Clone, Copy)]
pub(crate) struct Slots {
    ring: *mut u8,
    /// Where the next one goes, and behind the last of the ring, bytes.
    at: u32,
    end: u32,
    /// Flags in this round: AVAIL and USED as the wrap counter is.
    wrap: u16,
    /// None of the batch is written yet.
    is_first: bool,
    first: u64,
}

/// Flags of the next round, in which AVAIL and USED are what they were not. A call, so that a loop over descriptors has a branch that is hardly
/// ever taken, instead of work for each of them.
#[cold]
#[inline(never)]
fn other_round(flags: u16) -> u16 {
    flags ^ (AVAIL | USED)
}

impl Slots {
    /// Writes one for a chain that occupies `slots`.
    #[inline(always)]
    fn write(&mut self, id: u32, len: u32, written: bool, slots: u32) {
        // 2.8.1: both bits equal the wrap counter. 2.8.2: WRITE says that len counts.
        let flags = self.wrap | if written { WRITE } else { 0 };
        let word = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        if self.is_first {
            self.is_first = false;
            self.first = word;
        } else {
            // The driver stops at the first descriptor, whose flags are still to come. 2.8.22: flags not before the rest.
            // SAFETY: inside the ring and 8-aligned. The slot belongs to the device: its chain was taken, and at most as many slots are
            // written as were taken.
            unsafe { store(self.ring.add(self.at as usize), word) };
        }
        self.step(slots);
    }

    #[inline(always)]
    fn step(&mut self, slots: u32) {
        self.at += 16 * slots;
        if self.at >= self.end {
            self.at -= self.end;
            self.wrap = other_round(self.wrap);
        }
    }

    fn position(&self) -> Position {
        Position { index: (self.at / 16) as u16, wrap: self.wrap != 0 }
    }
}

/// Writes the used descriptor at `at` from its length on, in one piece.
///
/// # Safety
/// `at` is a descriptor of the ring.
#[inline(always)]
unsafe fn store(at: *mut u8, word: u64) {
    // SAFETY: mapped by contract and 8-aligned; the device's accesses are atomic, and the guest's are not Rust's.
    unsafe { AtomicU64::from_ptr(at.add(LEN).cast()) }.store(word.to_le(), Ordering::Release);
}

// SAFETY: the pointers belong to a mapping that the owning Ring keeps alive, and only its current owner uses them.
unsafe impl Send for Packed {}

impl Descriptors {
    #[inline(always)]
    fn desc_ptr(&self, index: usize) -> *mut u8 {
        debug_assert!(index < usize::from(self.size));
        // SAFETY: positions stay below size, so the descriptor lies in the ring.
        unsafe { self.desc.add(16 * index) }
    }

    /// The descriptor's address.
    #[inline(always)]
    fn first(&self, index: usize) -> u64 {
        // SAFETY: inside the ring and 16-aligned.
        u64::from_le(unsafe { AtomicU64::from_ptr(self.desc_ptr(index).cast()) }.load(Ordering::Relaxed))
    }

    /// Its length, id and flags, in one load; acquire: the address is read after them (2.8.21.2).
    #[inline(always)]
    fn second(&self, index: usize) -> u64 {
        // SAFETY: inside the ring and 16-aligned.
        u64::from_le(unsafe { AtomicU64::from_ptr(self.desc_ptr(index).add(LEN).cast()) }.load(Ordering::Acquire))
    }

    /// The descriptor at `at`, if it is available: 2.8.1: AVAIL equals the wrap counter and USED does not.
    #[inline(always)]
    fn available(&self, at: Position) -> Option<Words> {
        let index = usize::from(at.index);
        let second = self.second(index);
        let flags = (second >> 48) as u16;
        if (flags & AVAIL != 0) != at.wrap || (flags & USED != 0) == at.wrap {
            return None;
        }
        Some(Words(self.first(index), second))
    }

    /// Fetches the beginnings of the buffers of `count` descriptors, as far as they are available, from `at` on.
    #[inline(never)]
    fn prefetch<S: Sink>(self, core: &mut Core, mut at: Position, count: u16) {
        for _ in 0..count {
            let Some(words) = self.available(at) else { return };
            chain::prefetch_buffer::<S>(core, words.addr(), words.len());
            at = at.add(1, self.size);
        }
    }
}

impl Packed {
    /// # Safety
    /// The areas are mapped as long as the value lives, and aligned: `desc` 16 bytes for each of `size` descriptors, the
    /// two event suppression structures 4 bytes each. `position` is inside the ring.
    pub(super) unsafe fn new(
        desc: *mut u8,
        driver_event: *const u8,
        device_event: *mut u8,
        size: u16,
        position: Position,
    ) -> Self {
        Self {
            ring: Descriptors { desc, size },
            driver_event,
            device_event,
            next_avail: position,
            next_used: position,
            published: position,
            first: 0,
            stage: Stage::new(),
            held: Held::new(),
        }
    }

    #[inline(always)]
    fn take_staged(&mut self, chains: u16) {
        self.stage.forget(chains);
        self.next_avail = self.next_avail.add(chains, self.ring.size);
    }

    /// How many slots can be available from `at` on: those before it that are not returned yet are the device's. Without this, a driver that
    /// writes into them could make more of them available than the ring has.
    #[inline(always)]
    fn room_at(&self, at: Position) -> u16 {
        self.ring.size.saturating_sub(at.slots_since(self.published, self.ring.size))
    }

    /// To write used descriptors, from the next one on.
    #[inline(always)]
    fn slots(&self) -> Slots {
        Slots {
            ring: self.ring.desc,
            at: 16 * u32::from(self.next_used.index),
            end: 16 * u32::from(self.ring.size),
            wrap: if self.next_used.wrap { AVAIL | USED } else { 0 },
            is_first: self.next_used == self.published,
            first: self.first,
        }
    }

    #[inline(always)]
    fn used_up_to(&mut self, slots: Slots) {
        self.next_used = slots.position();
        self.first = slots.first;
    }

    /// Remembers that used descriptors were written from slot `first` on for so many chains of one slot, or for a longer one.
    #[cold]
    fn log_used(&self, core: &mut Core, first: u16, chains: u16) {
        let until_wrap = chains.min(self.ring.size - first);
        for (index, count) in [(first, until_wrap), (0, chains - until_wrap)] {
            if count > 0 {
                core.log_desc(16 * u64::from(index) + LEN as u64, 16 * u32::from(count) - LEN as u32);
            }
        }
    }

    /// Follows the rest of a chain: to the end even when a frame is refused on the way, because only the last descriptor
    /// has the id (2.8.6) and the next chain begins behind it.
    #[inline(never)]
    fn walk<S: Sink>(&mut self, core: &mut Core, at: Position, mut words: Words, sink: &mut S) -> Result<Found, Fault> {
        let mut place = at;
        let mut slots = 1u16;
        let mut result: Result<(), DropReason> = Ok(());
        loop {
            let flags = words.fourth();
            if result.is_ok() {
                result = if flags & INDIRECT == 0 {
                    chain::buffer(core, words.addr(), words.len(), flags, sink)
                } else if slots == 1 && flags & NEXT == 0 {
                    chain::indirect(core, words.addr(), words.len(), Table::Packed, sink)?
                } else {
                    // 2.8.7: an indirect descriptor is a chain of its own.
                    Err(S::BAD)
                };
            }
            if flags & NEXT == 0 {
                return Ok((Chain { id: words.third(), slots }, result));
            }
            if slots >= core.chain_limit {
                return Err((FaultKind::ChainTooLong, u32::from(slots) + 1));
            }
            slots += 1;
            core.followed += 1;
            place = place.add(1, self.ring.size);
            // 2.8.8: the driver writes the head's flags last, so that the whole chain is there.
            // SAFETY: place is inside the ring.
            words = unsafe { Words::read(self.ring.desc_ptr(usize::from(place.index))) };
        }
    }
}

impl Format for Packed {
    type Position = Position;

    #[inline]
    fn position(&self) -> Position {
        self.next_avail
    }

    #[inline(always)]
    fn advance(&mut self, to: Position) {
        let taken = to.slots_since(self.next_avail, self.ring.size);
        self.stage.forget(taken);
        self.next_avail = to;
    }

    #[inline(always)]
    fn peek<S: Sink>(&mut self, core: &mut Core, at: &mut Position, sink: &mut S) -> Result<Option<Found>, Fault> {
        if self.room_at(*at) == 0 {
            return Ok(None);
        }
        let Some(words) = self.ring.available(*at) else { return Ok(None) };
        let flags = words.fourth();
        let (chain, result) = if flags & (NEXT | INDIRECT) == 0 {
            let result = chain::buffer(core, words.addr(), words.len(), flags, sink);
            (Chain { id: words.third(), slots: 1 }, result)
        } else {
            self.walk(core, *at, words, sink)?
        };
        *at = at.add(chain.slots, self.ring.size);
        Ok(Some((chain, result)))
    }

    fn stage<S: Sink>(&mut self, core: &mut Core, count: u16, beyond: bool) -> bool {
        let have = self.stage.len();
        let count = count.min(self.room_at(self.next_avail));
        if have >= count {
            return false;
        }
        if core.log.is_some() {
            core.log_chains(self.stage.take_unlogged());
        }
        let ring = self.ring;
        let direction = if S::WRITABLE { WRITE } else { 0 };
        let mut view = core.cursor.view();
        let mut at = self.next_avail.add(have, ring.size);
        // What the flags of an available descriptor without company are in this round (2.8.1).
        let mut simple = direction | if at.wrap { AVAIL } else { USED };
        let (mut index, end) = (usize::from(at.index), usize::from(ring.size));
        let mut staged = 0;
        let mut stopped = false;
        let places = self.stage.room().get_mut(..usize::from(count - have)).unwrap_or_default();
        for place in places {
            let second = ring.second(index);
            if (second >> 48) as u16 & (AVAIL | USED | NEXT | INDIRECT | WRITE) != simple {
                stopped = true;
                break;
            }
            let (gpa, len) = (ring.first(index), second as u32);
            let Some(addr) = chain::one::<S>(core, &mut view, gpa, len) else {
                stopped = true;
                break;
            };
            *place = One { id: (second >> 32) as u32 & 0xffff, len, addr, gpa };
            staged += 1;
            index += 1;
            if index == end {
                index = 0;
                simple = other_round(simple);
            }
        }
        self.stage.add(staged);
        if !stopped {
            return false;
        }
        at = at.add(staged as u16, ring.size);
        if ring.available(at).is_none() {
            return true;
        }
        if beyond {
            // As in split rings; the descriptors of a longer chain alike.
            ring.prefetch::<S>(core, at, count - have - staged as u16);
        }
        false
    }

    #[inline(always)]
    fn prefetch_used(&self, _count: u16) {
        // Used descriptors take the place of those that were just read.
    }

    #[inline(always)]
    fn staged(&mut self) -> &mut [One] {
        self.stage.chains_mut()
    }

    #[inline(always)]
    fn use_staged(&mut self, core: &mut Core, chains: u16) {
        let first = self.next_used.index;
        let mut slots = self.slots();
        for one in self.stage.chains().iter().take(usize::from(chains)) {
            slots.write(one.id, one.len, true, 1);
        }
        self.used_up_to(slots);
        if core.log.is_some() && chains > 0 {
            core.log_chains(self.stage.take_unlogged());
            self.log_used(core, first, chains);
            self.stage.log_first(chains);
        }
        self.take_staged(chains);
    }

    #[inline(always)]
    fn put_used(&mut self, core: &mut Core, chain: Chain, len: u32) {
        let first = self.next_used.index;
        let mut slots = self.slots();
        slots.write(u32::from(chain.id), len, len > 0, u32::from(chain.slots));
        self.used_up_to(slots);
        if core.log.is_some() {
            self.log_used(core, first, 1);
        }
    }

    #[inline(always)]
    fn room_to_hold(&self) -> usize {
        Held::CAPACITY - self.held.len
    }

    #[inline(always)]
    fn hold(&mut self, _core: &mut Core, chain: Chain) {
        if let Some(place) = self.held.chains.get_mut(self.held.len) {
            *place = u32::from(chain.id) | u32::from(chain.slots) << 16;
            self.held.len += 1;
        }
    }

    #[inline(always)]
    fn hold_staged(&mut self, chains: u16) {
        let places = self.held.chains.get_mut(self.held.len..).unwrap_or_default();
        for (one, place) in self.stage.chains().iter().take(usize::from(chains)).zip(places) {
            *place = one.id | 1 << 16;
        }
        self.held.len = (self.held.len + usize::from(chains)).min(Held::CAPACITY);
        self.take_staged(chains);
    }

    #[inline(always)]
    fn held(&self) -> usize {
        self.held.len
    }

    fn release(&mut self, core: &mut Core) -> bool {
        let mut slots = self.slots();
        let mut logged = slots;
        let held = self.held.chains.get(..self.held.len).unwrap_or_default();
        for &chain in held {
            // Length 0: nothing was written into a device-readable buffer.
            slots.write(chain & 0xffff, 0, false, chain >> 16);
        }
        let chains = held.len() as u16;
        if core.log.is_some() {
            if slots.position() == self.next_used.add(chains, self.ring.size) {
                // A slot each, one behind the other.
                self.log_used(core, self.next_used.index, chains);
            } else {
                for &chain in held {
                    core.log_desc(u64::from(logged.at) + LEN as u64, 8);
                    logged.step(chain >> 16);
                }
            }
        }
        self.held.len = 0;
        self.used_up_to(slots);
        self.publish(core)
    }

    fn publish(&mut self, core: &mut Core) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        if let Some(mirror) = &core.base_mirror {
            mirror.store(old.to_bits(), new.to_bits());
        }
        // Everything else of the batch is visible before the first flags are (2.8.22).
        // SAFETY: positions stay below size, so the descriptor lies in the ring.
        unsafe { store(self.ring.desc_ptr(usize::from(old.index)), self.first) };
        // Marked before it was written, if there were so many writes that some were marked on the way.
        core.log_desc(16 * u64::from(old.index) + LEN as u64, 8);
        self.published = new;
        // 2.8.4: the driver's wish is read after the descriptors are visible; the dirty log needs the same fence.
        fence(Ordering::SeqCst);
        if core.log.is_some() {
            core.log_commit_with(self.stage.take_unlogged());
        }
        // SAFETY: mapped and 4-aligned by `new`'s contract; read in one piece.
        let event =
            u32::from_le(unsafe { AtomicU32::from_ptr(self.driver_event.cast_mut().cast()) }.load(Ordering::Relaxed));
        let (off_wrap, flags) = (event as u16, (event >> 16) as u16 & 3);
        match flags {
            EVENT_DISABLE => false,
            // 2.8.10: a certain descriptor, told by offset and wrap counter.
            EVENT_DESC if core.event_idx => {
                let mut off = off_wrap & 0x7fff;
                let mut before = old.index;
                if new.index <= before {
                    before = before.wrapping_sub(self.ring.size);
                }
                if (off_wrap & 0x8000 != 0) != new.wrap {
                    off = off.wrapping_sub(self.ring.size);
                }
                need_event(off, new.index, before)
            }
            EVENT_ENABLE => true,
            // Reserved, or DESC without the feature: too many notifications do less harm than too few.
            _ => true,
        }
    }

    fn arm(&mut self, core: &mut Core) -> bool {
        // SAFETY: mapped and 4-aligned by `new`'s contract.
        let event = unsafe { AtomicU32::from_ptr(self.device_event.cast()) };
        // One store for both halves: the driver never sees one without the other.
        let wish = if core.event_idx {
            u32::from(self.next_avail.to_bits()) | u32::from(EVENT_DESC) << 16
        } else {
            u32::from(EVENT_ENABLE) << 16
        };
        event.store(wish.to_le(), Ordering::Relaxed);
        core.log_device(0, 4);
        // The wish is visible before the ring is looked at, or a kick could be missed.
        fence(Ordering::SeqCst);
        core.log_commit();
        self.ring.available(self.next_avail).is_some()
    }

    fn disarm(&mut self, core: &mut Core) {
        // SAFETY: mapped and 4-aligned by `new`'s contract.
        let event = unsafe { AtomicU32::from_ptr(self.device_event.cast()) };
        let wish = (u32::from(EVENT_DISABLE) << 16).to_le();
        if event.load(Ordering::Relaxed) != wish {
            event.store(wish, Ordering::Relaxed);
            core.log_device(0, 4);
            fence(Ordering::SeqCst);
            core.log_commit();
        }
    }

    fn base(&self) -> u32 {
        let at = u32::from(self.published.to_bits());
        at | at << 16
    }
}

#[cfg(test)]
mod tests {
    use super::Position;

    #[test]
    fn distances_count_the_slots_of_up_to_two_rounds() {
        for size in [1u16, 2, 3, 200, 32768] {
            for index in [0, size / 2, size - 1] {
                for wrap in [false, true] {
                    let from = Position { index, wrap };
                    for slots in [0, 1, size / 2, size - 1, size] {
                        let to = from.add(slots.min(size), size);
                        assert_eq!(to.slots_since(from, size), slots.min(size), "{slots} from {from:?} of {size}");
                    }
                }
            }
        }
    }
}
