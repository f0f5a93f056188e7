//! Split virtqueues (virtio 1.3, 2.7): a descriptor table, and two rings of indexes into it.
#![allow(unsafe_code)] // Its job: atomic access to the rings in guest memory.
use core::sync::atomic::{AtomicU16, Ordering, fence};

use ferry_dataplane::counters::DropReason;

use super::chain::{self, INDIRECT, NEXT, Table, WRITE, Words};
use super::stage::{One, Stage};
use super::{Chain, Core, Fault, FaultKind, Format, Found, Sink};

/// Driver: no notifications, please (VIRTQ_AVAIL_F_NO_INTERRUPT).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Device: no notifications, please (VIRTQ_USED_F_NO_NOTIFY).
const USED_NO_NOTIFY: u16 = 1;

/// Offsets within the available ring (2.7.6) and the used ring (2.7.8), bytes.
const FLAGS: usize = 0;
const IDX: usize = 2;
const RING: usize = 4;

/// An index in a word of 32 bits. As a `u16` it would be stored in 16 bits, and loaded in 32 together with what lies beside it where the
/// compiler finds that shorter: such a load waits until the store has left the processor's buffer, which takes longer than a frame does.
#[derive(Clone, Copy)]
struct Number(u32);

impl Number {
    #[inline(always)]
    const fn new(value: u16) -> Self {
        Self(value as u32)
    }
    #[inline(always)]
    const fn get(self) -> u16 {
        self.0 as u16
    }
    #[inline(always)]
    const fn set(&mut self, value: u16) {
        self.0 = value as u32;
    }
}

/// Where the ring lies.
#[derive(Clone, Copy)]
struct Areas {
    desc: *const u8,
    avail: *const u8,
    used: *mut u8,
    size: Number,
}

pub(crate) struct Split {
    areas: Areas,
    /// Available index of the next chain to take.
    next_avail: Number,
    /// The driver's available index as last read: chains before it are known to be there.
    avail_seen: Number,
    /// Used index including entries that are written but not published. Chains that are held have such entries: nobody looks at them
    /// before the index says so, and a ring that is stopped goes on from the index.
    next_used: Number,
    /// Used index that the driver can see.
    published: Number,
    /// Chains from `next_avail` on.
    stage: Stage,
}

// SAFETY: the pointers belong to a mapping that the owning Ring keeps alive, and only its current owner uses them.
unsafe impl Send for Split {}

/// True when moving an index from `old` to `new` passed `event` (2.7.10: `vring_need_event`). All wrap at 2^16.
#[inline]
pub(super) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

impl Areas {
    /// Fills `places` with the chains from available index `at` on, as far as they are simple. Returns how many were filled.
    #[inline(always)]
    fn stage_simple<S: Sink>(self, core: &mut Core, at: u16, places: &mut [One]) -> usize {
        let direction = if S::WRITABLE { WRITE } else { 0 };
        let (mask, size) = (self.size.0 - 1, self.size.0);
        let first = u32::from(at);
        let mut at = first;
        let mut view = core.cursor.view();
        for place in places {
            let head = u32::from(self.head_in((at & mask) as usize));
            if head >= size {
                break;
            }
            // SAFETY: head < size, so the descriptor lies in the table.
            let (gpa, len, flags) = unsafe { chain::read_fields(self.desc.add(16 * head as usize)) };
            if flags & (NEXT | INDIRECT | WRITE) != direction {
                break;
            }
            let Some(addr) = chain::one::<S>(core, &mut view, gpa, len) else { break };
            *place = One { id: head, len, addr, gpa };
            at += 1;
        }
        (at - first) as usize
    }

    /// Fetches the beginnings of `count` chains' first buffers, those from available index `at` on.
    #[inline(never)]
    fn prefetch<S: Sink>(self, core: &mut Core, at: u16, count: u16) {
        for i in 0..count {
            let head = self.head(at.wrapping_add(i));
            if head < self.size.get() {
                // SAFETY: head < size, so the descriptor lies in the table.
                let words = unsafe { Words::read(self.desc_ptr(head)) };
                chain::prefetch_buffer::<S>(core, words.addr(), words.len());
            }
        }
    }

    #[inline(always)]
    fn avail_field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: offset lies in the available ring (callers use the constants, a masked slot, or the event field when
        // negotiated); 2-aligned; all accesses to it are atomic here, and the guest's are not Rust's.
        unsafe { AtomicU16::from_ptr(self.avail.add(offset).cast_mut().cast()) }
    }
    #[inline(always)]
    fn used_field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as `avail_field`, for the used ring.
        unsafe { AtomicU16::from_ptr(self.used.add(offset).cast()) }
    }
    /// Number of the head descriptor at available index `at`.
    #[inline(always)]
    fn head(&self, at: u16) -> u16 {
        self.head_in(usize::from(at & (self.size.get() - 1)))
    }
    /// The same, of a place below the ring's size.
    #[inline(always)]
    fn head_in(&self, slot: usize) -> u16 {
        u16::from_le(self.avail_field(RING + 2 * slot).load(Ordering::Relaxed))
    }

    /// Writes the used ring's entries for `chains` from used index `next` on. `WRITTEN`: [`One::len`] is what was written into each; otherwise
    /// nothing was.
    #[inline(always)]
    fn enter<const WRITTEN: bool>(self, next: u16, chains: &[One]) {
        let slot = usize::from(next & (self.size.get() - 1));
        let (before, behind) = chains.split_at(chains.len().min(usize::from(self.size.get()) - slot));
        for (slot, chains) in [(slot, before), (0, behind)] {
            let mut entry = self.used.wrapping_add(RING + 8 * slot).cast::<u64>();
            for one in chains {
                let len = if WRITTEN { u64::from(one.len) } else { 0 };
                // 2.7.8: the head's number, and above it the bytes written.
                // SAFETY: the entry, aligned to 4 bytes, lies in the used ring: chains that were taken and not returned are no more than it
                // has. The driver does not read it before the index says so.
                unsafe { entry.write_unaligned((u64::from(one.id) | len << 32).to_le()) };
                entry = entry.wrapping_add(1);
            }
        }
    }

    #[inline(always)]
    fn desc_ptr(&self, index: u16) -> *const u8 {
        // wrapping: only ever dereferenced for index < size; prefetch takes anything.
        self.desc.wrapping_add(16 * usize::from(index))
    }
}

impl Split {
    /// Starts where the used ring stands: a device that goes in order has returned every chain before it and none after.
    /// (A base that the frontend gives differs from it only after a crash in between; chains that were taken and never
    /// returned are then found again instead of being lost.)
    ///
    /// # Safety
    /// For a ring of `size` (a power of two), the areas are mapped as long as the value lives, and aligned: `desc` 16 bytes
    /// per descriptor, `avail` and `used` as in 2.7, with the event fields if event index is negotiated.
    pub(super) unsafe fn new(desc: *const u8, avail: *const u8, used: *mut u8, size: u16) -> Self {
        let (size, none) = (Number::new(size), Number::new(0));
        let mut q = Self {
            areas: Areas { desc, avail, used, size },
            next_avail: none,
            avail_seen: none,
            next_used: none,
            published: none,
            stage: Stage::new(),
        };
        let idx = Number::new(u16::from_le(q.used_idx().load(Ordering::Relaxed)));
        (q.next_avail, q.avail_seen, q.next_used, q.published) = (idx, idx, idx, idx);
        q
    }

    #[inline(always)]
    fn used_idx(&self) -> &AtomicU16 {
        self.areas.used_field(IDX)
    }
    /// The driver wants a notification when the used index passes this (2.7.10); follows the available ring's entries.
    #[inline(always)]
    fn used_event(&self) -> &AtomicU16 {
        self.areas.avail_field(RING + 2 * usize::from(self.areas.size.get()))
    }
    /// The driver notifies when the available index passes this; follows the used ring's entries.
    #[inline(always)]
    fn avail_event_offset(&self) -> usize {
        RING + 8 * usize::from(self.areas.size.get())
    }

    /// Takes staged chains and enters them into the used ring.
    #[inline(always)]
    fn enter_staged<const WRITTEN: bool>(&mut self, chains: u16) {
        let entered = self.stage.chains().get(..usize::from(chains)).unwrap_or_default();
        self.areas.enter::<WRITTEN>(self.next_used.get(), entered);
        self.next_used.set(self.next_used.get().wrapping_add(chains));
        self.stage.forget(chains);
        self.next_avail.set(self.next_avail.get().wrapping_add(chains));
    }

    /// Reads the driver's available index. 2.7.13.3: acquire, so that entries and descriptors behind it are read after.
    #[inline]
    fn refresh(&mut self) -> Result<(), Fault> {
        let idx = u16::from_le(self.areas.avail_field(IDX).load(Ordering::Acquire));
        // More outstanding than the ring has is impossible for a driver that waits for its descriptors (2.7.13.1).
        let outstanding = idx.wrapping_sub(self.published.get());
        if outstanding > self.areas.size.get() {
            return Err((FaultKind::AvailJump, u32::from(outstanding)));
        }
        // An index that moves backwards within the ring would make chains available twice.
        if idx.wrapping_sub(self.next_avail.get()) > self.areas.size.get() {
            return Err((FaultKind::AvailJump, u32::from(idx.wrapping_sub(self.next_avail.get()))));
        }
        self.avail_seen.set(idx);
        Ok(())
    }

    /// A chain of several descriptors or with an indirect table.
    #[inline(never)]
    fn walk<S: Sink>(
        &mut self,
        core: &mut Core,
        mut words: Words,
        sink: &mut S,
    ) -> Result<Result<(), DropReason>, Fault> {
        let mut followed = 1u32;
        loop {
            let flags = words.third();
            if flags & INDIRECT != 0 {
                // 2.7.5.3.1: not both flags; 2.7.5.3.2: ordinary descriptors may precede one indirect descriptor.
                if flags & NEXT != 0 {
                    return Ok(Err(S::BAD));
                }
                return chain::indirect(core, words.addr(), words.len(), Table::Split, sink);
            }
            if let Err(reason) = chain::buffer(core, words.addr(), words.len(), flags, sink) {
                return Ok(Err(reason));
            }
            if flags & NEXT == 0 {
                return Ok(Ok(()));
            }
            followed += 1;
            core.followed += 1;
            if followed > u32::from(core.chain_limit) {
                return Err((FaultKind::ChainTooLong, followed));
            }
            let next = words.fourth();
            if next >= self.areas.size.get() {
                return Err((FaultKind::NextOutOfRange, u32::from(next)));
            }
            // SAFETY: next < size, so the descriptor lies in the table.
            words = unsafe { Words::read(self.areas.desc_ptr(next)) };
        }
    }
}

impl Format for Split {
    type Position = u16;

    #[inline]
    fn position(&self) -> u16 {
        self.next_avail.get()
    }

    #[inline(always)]
    fn advance(&mut self, to: u16) {
        self.stage.forget(to.wrapping_sub(self.next_avail.get()));
        self.next_avail.set(to);
    }

    #[inline(always)]
    fn peek<S: Sink>(&mut self, core: &mut Core, at: &mut u16, sink: &mut S) -> Result<Option<Found>, Fault> {
        if *at == self.avail_seen.get() {
            self.refresh()?;
            if *at == self.avail_seen.get() {
                return Ok(None);
            }
        }
        let head = self.areas.head(*at);
        if head >= self.areas.size.get() {
            return Err((FaultKind::HeadOutOfRange, u32::from(head)));
        }
        // SAFETY: head < size, so the descriptor lies in the table.
        let words = unsafe { Words::read(self.areas.desc_ptr(head)) };
        let flags = words.third();
        let result = if flags & (NEXT | INDIRECT) == 0 {
            chain::buffer(core, words.addr(), words.len(), flags, sink)
        } else {
            self.walk(core, words, sink)?
        };
        *at = at.wrapping_add(1);
        Ok(Some((Chain { id: head, slots: 1 }, result)))
    }

    fn stage<S: Sink>(&mut self, core: &mut Core, count: u16, beyond: bool) -> bool {
        let have = self.stage.len();
        if have >= count {
            return false;
        }
        let next = self.next_avail.get();
        // A fault found here is found again, and reported, by the next peek.
        if self.avail_seen.get().wrapping_sub(next) < count && self.refresh().is_err() {
            return false;
        }
        let known = self.avail_seen.get().wrapping_sub(next);
        let wanted = known.min(count);
        let areas = self.areas;
        if core.log.is_some() {
            core.log_chains(self.stage.take_unlogged());
        }
        // Four descriptors to a cache line, which mostly come one after another.
        for i in (have..wanted).step_by(4) {
            chain::prefetch_read(areas.desc_ptr(areas.head(next.wrapping_add(i))));
        }
        let places = self.stage.room().get_mut(..usize::from(wanted.saturating_sub(have))).unwrap_or_default();
        let staged = areas.stage_simple::<S>(core, next.wrapping_add(have), places);
        self.stage.add(staged);
        let ready = have + staged as u16;
        if beyond && ready < wanted {
            // What comes behind one that is not simple has to wait, but the buffers may come already.
            areas.prefetch::<S>(core, next.wrapping_add(ready), wanted - ready);
        }
        ready == known
    }

    #[inline(always)]
    fn prefetch_used(&self, count: u16) {
        // Entries of 8 bytes: eight to a line.
        for i in (0..count.saturating_add(8)).step_by(8) {
            let slot = usize::from(self.next_used.get().wrapping_add(i) & (self.areas.size.get() - 1));
            chain::prefetch_write(self.areas.used.wrapping_add(RING + 8 * slot));
        }
    }

    #[inline(always)]
    fn staged(&mut self) -> &mut [One] {
        self.stage.chains_mut()
    }

    #[inline(always)]
    fn use_staged(&mut self, core: &mut Core, chains: u16) {
        if core.log.is_some() && chains > 0 {
            core.log_chains(self.stage.take_unlogged());
            self.stage.log_first(chains);
        }
        self.enter_staged::<true>(chains);
    }

    #[inline(always)]
    fn put_used(&mut self, _core: &mut Core, chain: Chain, len: u32) {
        let one = One { id: u32::from(chain.id), len, addr: core::ptr::null_mut(), gpa: 0 };
        self.areas.enter::<true>(self.next_used.get(), &[one]);
        self.next_used.set(self.next_used.get().wrapping_add(1));
    }

    #[inline(always)]
    fn room_to_hold(&self) -> usize {
        // Chains that are taken and not returned are at most as many as the ring has, and each has its entry in the used ring.
        usize::MAX
    }

    #[inline(always)]
    fn hold(&mut self, core: &mut Core, chain: Chain) {
        self.put_used(core, chain, 0);
    }

    #[inline(always)]
    fn hold_staged(&mut self, chains: u16) {
        self.enter_staged::<false>(chains);
    }

    #[inline(always)]
    fn held(&self) -> usize {
        usize::from(self.next_used.get().wrapping_sub(self.published.get()))
    }

    #[inline(always)]
    fn release(&mut self, core: &mut Core) -> bool {
        // The entries were written when the chains were received.
        self.publish(core)
    }

    fn publish(&mut self, core: &mut Core) -> bool {
        let (old, new) = (self.published.get(), self.next_used.get());
        if old == new {
            return false;
        }
        // 2.7.8.2, 2.7.14: the index becomes visible after the entries and after the data.
        self.used_idx().store(new.to_le(), Ordering::Release);
        self.published.set(new);
        // 2.7.7.2, 2.7.10: the driver's wish is read after the index is visible, or both sides could wait for each other.
        // The dirty log needs the same fence between the writes and its look at the bits.
        fence(Ordering::SeqCst);
        if core.log.is_some() {
            let count = new.wrapping_sub(old);
            let first = old & (self.areas.size.get() - 1);
            let until_wrap = count.min(self.areas.size.get() - first);
            core.log_device_fenced([
                (IDX as u64, 2),
                ((RING + 8 * usize::from(first)) as u64, 8 * u32::from(until_wrap)),
                (RING as u64, 8 * u32::from(count - until_wrap)),
            ]);
            core.log_commit_with(self.stage.take_unlogged());
        }
        if core.event_idx {
            need_event(u16::from_le(self.used_event().load(Ordering::Relaxed)), new, old)
        } else {
            u16::from_le(self.areas.avail_field(FLAGS).load(Ordering::Relaxed)) & AVAIL_NO_INTERRUPT == 0
        }
    }

    fn arm(&mut self, core: &mut Core) -> bool {
        if core.event_idx {
            // 2.7.10: a notification when the entry at avail_event is made available.
            let offset = self.avail_event_offset();
            self.areas.used_field(offset).store(self.next_avail.get().to_le(), Ordering::Relaxed);
            core.log_device(offset as u64, 2);
        } else {
            self.areas.used_field(FLAGS).store(0, Ordering::Relaxed);
            core.log_device(FLAGS as u64, 2);
        }
        // The wish is visible before the index is read, or a kick could be missed.
        fence(Ordering::SeqCst);
        core.log_commit();
        u16::from_le(self.areas.avail_field(IDX).load(Ordering::Acquire)) != self.next_avail.get()
    }

    fn disarm(&mut self, core: &mut Core) {
        // 2.7.10: with event index the flags are zero, and an avail_event that stays behind asks for nothing (but for one
        // kick each time the index comes round, after 2^16 chains).
        let flags = if core.event_idx { 0 } else { USED_NO_NOTIFY };
        let field = self.areas.used_field(FLAGS);
        if u16::from_le(field.load(Ordering::Relaxed)) != flags {
            field.store(flags.to_le(), Ordering::Relaxed);
            core.log_device(FLAGS as u64, 2);
            fence(Ordering::SeqCst);
            core.log_commit();
        }
    }

    fn base(&self) -> u32 {
        u32::from(self.published.get())
    }
}

#[cfg(test)]
mod tests {
    use super::need_event;

    #[test]
    fn event_is_between_old_and_new() {
        for (event, new, old, want) in [
            (5, 6, 5, true),
            (5, 5, 4, false),
            (4, 6, 5, false),
            (6, 6, 5, false),
            (0xffff, 0, 0xfff0, true),
            (1, 0, 0xffff, false),
        ] {
            assert_eq!(need_event(event, new, old), want, "event {event} {old}->{new}");
        }
    }
}
