//! What the generator could do if the switch cost nothing: on the switch's core a thread hands transmit buffers back and calls
//! as many receive buffers filled, and moves no byte. No switch can be measured to be quicker than that.
#![allow(unsafe_code)] // Its job: the device's side of rings in shared memory.
use crate::affinity::{self, Urgency};
use crate::generator::{Generator, Tally};
use crate::guest::memory::Area;
use crate::guest::packed::PackedRing;
use crate::guest::ring::{DriverRing, NET_HEADER, RingFormat};
use crate::guest::split::SplitRing;
use crate::guest::{Guest, GuestSpec};
use crate::regime::{self, Placement};
use crate::results::{Figure, Metric};
use crate::system::Kind;
use crate::workload::Workload;
use anyhow::{Context, Result};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Most buffers handed back at a time.
const BURST: u16 = 64;
/// Looks at less than half a burst before it is handed back all the same.
const PATIENCE: u8 = 16;
const DESC_WRITE: u16 = 2;
const USED: u16 = 1 << 7 | 1 << 15;

/// The device's side of one ring whose buffers are of one descriptor.
struct Device {
    areas: [Area; 3],
    size: u16,
    packed: bool,
    /// Split: free-running. Packed: descriptor.
    position: u16,
    wrap: bool,
}

// SAFETY: the guest's memory outlives the thread (it is scoped), and rings are made to be used by two threads at once.
unsafe impl Send for Device {}

impl Device {
    fn new<R: DriverRing>(ring: &R, packed: bool) -> Self {
        let areas = ring.areas();
        Self { size: (areas[0].len / 16) as u16, areas, packed, position: 0, wrap: true }
    }

    fn at(&self, area: usize, offset: usize) -> *mut u8 {
        debug_assert!(offset + 2 <= self.areas[area].len);
        // SAFETY: callers stay inside the area, whose length follows from the ring's size.
        unsafe { self.areas[area].start.as_ptr().add(offset) }
    }

    fn index(&self, area: usize) -> &AtomicU16 {
        // SAFETY: the index of the available or used ring: aligned, inside, accessed by atomics only.
        unsafe { AtomicU16::from_ptr(self.at(area, 2).cast()) }
    }

    /// Id and flags (low and high half) of a packed descriptor.
    fn state(&self, slot: u16) -> &AtomicU64 {
        // SAFETY: the second half of a 16-byte descriptor: aligned, inside, accessed by atomics only.
        unsafe { AtomicU64::from_ptr(self.at(0, 16 * usize::from(slot) + 8).cast()) }
    }

    fn slot(&self, i: u16) -> (u16, bool) {
        let next = self.position + i;
        if next >= self.size { (next - self.size, !self.wrap) } else { (next, self.wrap) }
    }

    /// Buffers that the driver has made available, at most `most`.
    #[inline]
    fn available(&self, most: u16) -> u16 {
        if !self.packed {
            return self.index(1).load(Ordering::Acquire).wrapping_sub(self.position).min(most);
        }
        (0..most).take_while(|&i| self.published(i)).count() as u16
    }

    /// Packed: whether the driver has made the descriptor `i` after the next one available.
    #[inline]
    fn published(&self, i: u16) -> bool {
        let (slot, wrap) = self.slot(i);
        let flags = (self.state(slot).load(Ordering::Acquire) >> 48) as u16;
        (flags & 1 << 7 != 0) == wrap && (flags & 1 << 15 != 0) != wrap
    }

    /// Whether at least `count` buffers are available, at the cost of one look.
    #[inline]
    fn ready(&self, count: u16) -> bool {
        if self.packed { self.published(count - 1) } else { self.available(count) == count }
    }

    /// Gives the next `count` buffers back, each with `len` bytes written.
    #[inline]
    fn hand_back(&mut self, count: u16, len: u32) {
        if self.packed { self.hand_back_packed(count, len) } else { self.hand_back_split(count, len) }
    }

    /// From the last back to the first, so that the driver finds all of them or none.
    #[inline]
    fn hand_back_packed(&mut self, count: u16, len: u32) {
        for i in (0..count).rev() {
            let (slot, wrap) = self.slot(i);
            let state = self.state(slot);
            let id = (state.load(Ordering::Relaxed) >> 32) & 0xffff;
            let flags = if wrap { USED | DESC_WRITE } else { DESC_WRITE };
            state.store(u64::from(len) | id << 32 | u64::from(flags) << 48, Ordering::Release);
        }
        (self.position, self.wrap) = self.slot(count);
    }

    #[inline]
    fn hand_back_split(&mut self, count: u16, len: u32) {
        for i in 0..count {
            let place = usize::from(self.position.wrapping_add(i) & (self.size - 1));
            // SAFETY: entries of the available ring (2 bytes from 4 on) and of the used ring (8 bytes from 4 on): inside,
            // aligned, accessed by atomics only.
            unsafe {
                let head = AtomicU16::from_ptr(self.at(1, 4 + 2 * place).cast()).load(Ordering::Relaxed);
                let entry = self.at(2, 4 + 8 * place).cast::<u32>();
                AtomicU32::from_ptr(entry).store(u32::from(head), Ordering::Relaxed);
                AtomicU32::from_ptr(entry.add(1)).store(len, Ordering::Relaxed);
            }
        }
        self.position = self.position.wrapping_add(count);
        self.index(2).store(self.position, Ordering::Release);
    }
}

/// From one guest's transmit ring to another's receive ring.
struct Way {
    from: Device,
    to: Device,
    len: u32,
    waited: u8,
}

impl Way {
    #[inline]
    fn turn(&mut self) -> bool {
        // Handing back a few at a time would send the rings' cache lines to and fro more often than any switch does.
        if !(self.from.ready(BURST / 2) && self.to.ready(BURST / 2)) && self.waited < PATIENCE {
            self.waited += 1;
            return false;
        }
        self.waited = 0;
        let count = self.to.available(self.from.available(BURST));
        if count > 0 {
            self.from.hand_back(count, 0);
            self.to.hand_back(count, self.len);
        }
        count > 0
    }
}

/// Hands buffers of both ways back until it is told to stop.
fn turn_around(ways: &mut [Way], stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut work = false;
        for way in &mut *ways {
            work |= way.turn();
        }
        if !work {
            std::hint::spin_loop();
        }
    }
}

/// One generator over two guests without a switch.
struct Loop<R> {
    generator: Generator<R>,
    ways: Vec<Way>,
}

impl<R: DriverRing> Loop<R> {
    fn new(format: RingFormat, frame_bytes: usize) -> Result<Self> {
        let spec = GuestSpec::new(frame_bytes).format(format);
        let guests = [Guest::<R>::detached(&spec)?, Guest::detached(&spec)?];
        let packed = format == RingFormat::Packed;
        let ways = [(0, 1), (1, 0)].map(|(from, to): (usize, usize)| Way {
            from: Device::new(&guests[from].tx, packed),
            to: Device::new(&guests[to].rx, packed),
            len: (NET_HEADER + frame_bytes) as u32,
            waited: 0,
        });
        // Nothing is moved, so there is nothing to look into.
        let mut generator = Generator::of(guests.into()).sample(u32::MAX);
        generator.streams(Workload::l2(frame_bytes).streams());
        Ok(Self { generator, ways: ways.into() })
    }

    /// One window. `core` is where buffers are handed back; without cores nothing is pinned.
    fn window(&mut self, both: bool, duration: Duration, core: Option<usize>) -> Result<Tally> {
        let (stop, ready) = (AtomicBool::new(false), Barrier::new(2));
        let (generator, ways) = (&mut self.generator, &mut self.ways);
        std::thread::scope(|s| {
            let consumer = s.spawn(|| {
                let placed = core.map_or(Ok(()), affinity::pin_self);
                if core.is_some() {
                    affinity::set_urgency(0, Urgency::Measured);
                }
                ready.wait();
                placed?;
                turn_around(ways, &stop);
                anyhow::Ok(())
            });
            // It begins on this thread's core, and would never leave it if this thread were urgent already.
            ready.wait();
            if core.is_some() {
                affinity::set_urgency(0, Urgency::Measured);
            }
            let tally = (|| {
                generator.start(both)?;
                generator.run(duration / 8)?;
                let tally = generator.run(duration)?;
                generator.stop()?;
                anyhow::Ok(tally)
            })();
            affinity::set_urgency(0, Urgency::Ordinary);
            stop.store(true, Ordering::Relaxed);
            consumer.join().ok().context("the consumer panicked")??;
            tally
        })
    }
}

/// Measures frames of 64 bytes, split and packed rings, one and both directions: `rounds` windows each.
///
/// # Errors
/// When there are no such cores, or no memory.
pub fn ceiling(generator_core: usize, switch_core: usize, rounds: usize, window: Duration) -> Result<Vec<Metric>> {
    // A thread of its own: its core and priority must not be inherited by what is started later.
    let thread = std::thread::spawn(move || {
        affinity::pin_self(generator_core)?;
        let mut split = Loop::<SplitRing>::new(RingFormat::Split, 64)?;
        let mut packed = Loop::<PackedRing>::new(RingFormat::Packed, 64)?;
        let jobs = [
            (RingFormat::Split, true),
            (RingFormat::Split, false),
            (RingFormat::Packed, true),
            (RingFormat::Packed, false),
        ];
        let mut values: [Vec<(Option<Placement>, Tally)>; 4] = Default::default();
        for _ in 0..rounds {
            for ((format, both), values) in jobs.into_iter().zip(&mut values) {
                let before = regime::round_trip_ns(generator_core, switch_core)?;
                let tally = match format {
                    RingFormat::Split => split.window(both, window, Some(switch_core)),
                    RingFormat::Packed => packed.window(both, window, Some(switch_core)),
                };
                let after = regime::round_trip_ns(generator_core, switch_core)?;
                let [before, after] = [before, after].map(Placement::of);
                values.push(((before == after).then_some(before), tally?));
            }
        }
        let metrics = jobs.iter().zip(&values).flat_map(|((format, both), values)| {
            let near = values.iter().any(|v| v.0 == Some(Placement::Near));
            let placement = near.then_some(Placement::Near);
            let of = |value: fn(&Tally) -> f64| {
                let counted = values.iter().filter(|v| !near || v.0 == placement).map(|v| value(&v.1));
                Figure::of(&counted.collect::<Vec<_>>())
            };
            let rings = if *format == RingFormat::Split { "split" } else { "packed" };
            let name = format!("generator's ceiling, {rings} rings, {}", if *both { "both ways" } else { "one way" });
            let metric = |name: String, unit: &str, higher_is_better, figure: Option<Figure>| {
                let system = Kind::Turnaround;
                figure.map(|figure| Metric { name, system, unit: unit.into(), higher_is_better, figure, placement })
            };
            // The share of turns without work tells whether the generator is the slower side.
            let idle = metric(format!("{name}, idle"), "%", false, of(|t| t.idle * 100.0));
            [metric(name, "Mpps", true, of(Tally::mpps)), idle].into_iter().flatten().collect::<Vec<_>>()
        });
        anyhow::Ok(metrics.collect())
    });
    thread.join().ok().context("the generator panicked")?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns<R: DriverRing>(format: RingFormat, both: bool) {
        let mut turned = Loop::<R>::new(format, 64).expect("guests");
        let mut frames = 0;
        // Many times round a ring of 256, however seldom the two threads get to run.
        while frames < 5000 {
            let tally = turned.window(both, Duration::from_millis(5), None).expect("window");
            assert!(tally.findings.sound() && tally.findings.bytes == tally.findings.frames * 64, "{tally:?}");
            frames += tally.findings.frames;
        }
    }

    #[test]
    fn every_buffer_comes_round_again() {
        for both in [true, false] {
            turns::<SplitRing>(RingFormat::Split, both);
            turns::<PackedRing>(RingFormat::Packed, both);
        }
    }
}
