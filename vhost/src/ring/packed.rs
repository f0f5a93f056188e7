//! Packed virtqueues (virtio 1.3, 2.8): one ring of descriptors that the device overwrites with used ones.
#![allow(unsafe_code)] // Its job: atomic access to the ring in guest memory.
use core::ptr::write_volatile;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use ferry_dataplane::counters::DropReason;

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

/// Offsets in a descriptor, bytes.
const LEN: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;

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
    /// Flags of the first used descriptor of the batch: written last, so that the driver sees all or nothing of it.
    first_flags: u16,
    /// Chains from `next_avail` on, a slot each.
    stage: Stage,
}

// SAFETY: the pointers belong to a mapping that the owning Ring keeps alive, and only its current owner uses them.
unsafe impl Send for Packed {}

impl Descriptors {
    #[inline(always)]
    fn desc_ptr(&self, index: u16) -> *mut u8 {
        debug_assert!(index < self.size);
        // SAFETY: positions stay below size, so the descriptor lies in the ring.
        unsafe { self.desc.add(16 * usize::from(index)) }
    }

    #[inline(always)]
    fn flags(&self, index: u16) -> &AtomicU16 {
        // SAFETY: inside the descriptor, 2-aligned; accessed atomically only.
        unsafe { AtomicU16::from_ptr(self.desc_ptr(index).add(FLAGS).cast()) }
    }

    /// The descriptor at `at`, if it is available: 2.8.1: AVAIL equals the wrap counter and USED does not. The flags come
    /// with the id and the length in one load; acquire: the address is read after them (2.8.21.2).
    #[inline(always)]
    fn available(&self, at: Position) -> Option<Words> {
        // SAFETY: inside the ring and 16-aligned.
        let word = |i| unsafe { AtomicU64::from_ptr(self.desc_ptr(at.index).cast::<u64>().add(i)) };
        let second = u64::from_le(word(1).load(Ordering::Acquire));
        let flags = (second >> 48) as u16;
        if (flags & AVAIL != 0) != at.wrap || (flags & USED != 0) == at.wrap {
            return None;
        }
        Some(Words(u64::from_le(word(0).load(Ordering::Relaxed)), second))
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
            first_flags: 0,
            stage: Stage::new(),
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
            words = unsafe { Words::read(self.ring.desc_ptr(place.index)) };
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
        let taken = if to.index >= self.next_avail.index {
            to.index - self.next_avail.index
        } else {
            self.ring.size - self.next_avail.index + to.index
        };
        self.stage.forget(taken);
        self.next_avail = to;
    }

    #[inline(always)]
    fn peek<S: Sink>(&mut self, core: &mut Core, at: &mut Position, sink: &mut S) -> Result<Option<Found>, Fault> {
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

    fn stage<S: Sink>(&mut self, core: &mut Core, count: u16) {
        let have = self.stage.len();
        let count = count.min(self.ring.size);
        let mut at = self.next_avail.add(have, self.ring.size);
        let ring = self.ring;
        let mut staged = 0;
        let mut places = self.stage.room().iter_mut();
        for i in have..count {
            let Some(words) = ring.available(at) else { break };
            let chain = Chain { id: words.third(), slots: 1 };
            match (chain::one::<S>(core, words, words.fourth(), chain), places.next()) {
                (Some(one), Some(place)) => {
                    *place = one;
                    staged += 1;
                }
                _ => {
                    // As in split rings; the descriptors of a longer chain alike.
                    ring.prefetch::<S>(core, at, count - i);
                    break;
                }
            }
            at = at.add(1, ring.size);
        }
        self.stage.add(staged);
    }

    #[inline(always)]
    fn prefetch_used(&self, _count: u16) {
        // Used descriptors take the place of those that were just read.
    }

    #[inline(always)]
    fn staged(&self) -> &[One] {
        self.stage.chains()
    }

    #[inline(always)]
    fn take_staged(&mut self, chains: u16) {
        self.stage.forget(chains);
        self.next_avail = self.next_avail.add(chains, self.ring.size);
    }

    #[inline(always)]
    fn put_used(&mut self, core: &mut Core, chain: Chain, len: u32) {
        let at = self.next_used;
        let p = self.ring.desc_ptr(at.index);
        // 2.8.1: both bits equal the wrap counter. 2.8.2: WRITE says that len counts.
        let wrap = if at.wrap { AVAIL | USED } else { 0 };
        let flags = wrap | if len > 0 { WRITE } else { 0 };
        // SAFETY: inside the descriptor and aligned. The slot belongs to the device: its chain was taken, and at most as
        // many slots are written as were taken.
        unsafe {
            write_volatile(p.add(LEN).cast::<u32>(), len.to_le());
            write_volatile(p.add(ID).cast::<u16>(), chain.id.to_le());
        }
        if at == self.published {
            self.first_flags = flags;
        } else {
            // 2.8.22: flags after the rest. The driver stops at the first descriptor, whose flags are still to come.
            self.ring.flags(at.index).store(flags.to_le(), Ordering::Release);
        }
        core.log_desc(16 * u64::from(at.index) + LEN as u64, 8);
        self.next_used = at.add(chain.slots, self.ring.size);
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
        self.ring.flags(old.index).store(self.first_flags.to_le(), Ordering::Release);
        self.published = new;
        // 2.8.4: the driver's wish is read after the descriptors are visible; the dirty log needs the same fence.
        fence(Ordering::SeqCst);
        core.log_commit();
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
