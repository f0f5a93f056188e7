//! The light generator: guests on one core that do as little per frame as can be done, so that the switch is what is
//! measured. Per frame sent: one cache line written (numbers, ports, checksum of a frame that lies ready). Per frame
//! received: its ring entry; frames are looked into on a sample of bursts only.
#![allow(unsafe_code)] // Its job: frames are written and copied out in guest memory.
use crate::check::{Checker, Findings};
use crate::frame::NetHeader;
use crate::guest::ring::{DriverRing, NET_HEADER};
use crate::guest::{Guest, GuestSpec};
use crate::patience::Patience;
use crate::stream::{Frames, Position, Step, StreamSpec};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::time::{Duration, Instant};

/// Most frames given to a ring at a time.
const BURST: u16 = 64;
/// Fewer free transmit buffers than this wait for more, so that the switch finds bursts.
const TX_BATCH: u16 = 32;
/// How often a waiting rest of transmit buffers is looked at before it goes anyway.
const TX_PATIENCE: u32 = 16;
/// Pauses after a turn without work. Polling without a break would take the rings' cache lines from the switch all the time;
/// this is a fraction of what the buffers under way take.
const REST: u32 = 8;
/// One burst of this many is looked into while measuring.
pub const SAMPLE: u32 = 64;

/// One guest: what it sends, what it expects.
pub struct Lane<R> {
    guest: Guest<R>,
    out: Option<Outgoing>,
    expected: Option<Checker>,
    /// Frames received that no stream expects.
    stray: u64,
    rx_bursts: u32,
    /// Buffers of an incomplete frame still to come, and the frame's bytes so far.
    partial: (u16, usize),
    /// The virtio-net header of that frame.
    header: NetHeader,
    scratch: Vec<u8>,
    scratch_used: usize,
}

struct Outgoing {
    frames: Frames,
    /// Frames still to be sent in this phase.
    quota: u64,
    /// Frames given to the switch so far.
    published: u64,
    /// Frames that the switch has taken in this window.
    sent: u64,
    patience: u32,
}

/// What one window of a measurement has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Length of the window, seconds.
    pub seconds: f64,
    /// Frames that the switch has taken.
    pub sent: u64,
    /// What has arrived.
    pub findings: Findings,
    /// Share of turns over all guests in which there was nothing to do: near zero, the generator is what limits the figure.
    pub idle: f64,
}

impl Tally {
    /// Million frames delivered per second.
    pub fn mpps(&self) -> f64 {
        self.findings.frames as f64 / self.seconds / 1e6
    }
}

impl<R: DriverRing> Lane<R> {
    fn new(guest: Guest<R>) -> Self {
        let longest = 1 << 17;
        Self {
            guest,
            out: None,
            expected: None,
            stray: 0,
            rx_bursts: 0,
            partial: (0, 0),
            header: NetHeader::default(),
            scratch: vec![0; longest],
            scratch_used: 0,
        }
    }

    /// Takes a burst in. Returns how many buffers came.
    #[inline]
    fn receive(&mut self, sample: u32) -> Result<u16> {
        let Some(n) = self.guest.rx.collect(u16::MAX) else { bail!("the switch wrote nonsense into a receive ring") };
        if n == 0 {
            return Ok(0);
        }
        self.rx_bursts = self.rx_bursts.wrapping_add(1);
        let single = match &self.expected {
            Some(c) => c.frame_bytes() + NET_HEADER <= self.guest.rx.buffer_len(),
            None => true,
        };
        let look = self.rx_bursts.is_multiple_of(sample);
        if single && !look {
            self.count(n);
        } else if single {
            self.look(n);
        } else {
            self.receive_scattered(n, look)?;
        }
        self.guest.rx.publish(self.guest.rx.free());
        Ok(n)
    }

    #[inline]
    fn count(&mut self, n: u16) {
        let mut bytes = 0u64;
        let mut same = true;
        let first = self.guest.rx.collected(0).len;
        for i in 0..n {
            let len = self.guest.rx.collected(i).len;
            bytes += u64::from(len);
            same &= len == first;
        }
        let known = |c: &Checker, len: u32| (len as usize).checked_sub(NET_HEADER).is_some_and(|len| c.has_length(len));
        match &mut self.expected {
            Some(c) if same && known(c, first) => {
                c.count(u32::from(n), bytes - u64::from(n) * NET_HEADER as u64);
            }
            Some(c) if c.mixed() && (0..n).all(|i| known(c, self.guest.rx.collected(i).len)) => {
                c.count(u32::from(n), bytes - u64::from(n) * NET_HEADER as u64);
            }
            Some(_) => self.look(n),
            None => self.stray += u64::from(n),
        }
    }

    /// Copies the burst's frames out and looks into them: into the first to its end, into the others' stamps.
    #[cold]
    fn look(&mut self, n: u16) {
        for i in 0..n {
            let done = self.guest.rx.collected(i);
            let len = (done.len as usize).clamp(NET_HEADER, self.guest.rx.buffer_len()) - NET_HEADER;
            let Some(checker) = &mut self.expected else {
                self.stray += 1;
                continue;
            };
            let whole = i == 0 || len <= 128;
            let copied = if whole { len } else { len.min(128) };
            // SAFETY: a buffer is valid for buffer_len bytes, which bounds `len`; the scratch is longer than any buffer. The
            // switch has given the buffer back; if it writes all the same, the copy is garbage and fails its check.
            unsafe {
                let frame = self.guest.rx.buffer(done.buffer).add(NET_HEADER);
                std::ptr::copy_nonoverlapping(frame, self.scratch.as_mut_ptr(), copied);
            }
            // The rest of the scratch is left over from other frames: only the length of it matters.
            checker.look(&self.scratch[..len], whole);
        }
    }

    /// Frames that take several buffers each (mergeable receive buffers, section 5.1.6.4).
    fn receive_scattered(&mut self, n: u16, look: bool) -> Result<()> {
        let buffer_len = self.guest.rx.buffer_len();
        for i in 0..n {
            let done = self.guest.rx.collected(i);
            let start = self.guest.rx.buffer(done.buffer);
            let len = (done.len as usize).min(buffer_len);
            let (left, bytes) = self.partial;
            let (skip, left) = if left == 0 {
                // SAFETY: the header lies inside the buffer.
                let buffers = unsafe { start.add(NET_HEADER - 2).cast::<u16>().read_volatile() };
                if buffers == 0 || buffers > self.guest.rx.buffers() || len < NET_HEADER {
                    bail!("a received frame claims {buffers} buffers, {len} bytes in the first");
                }
                self.scratch_used = 0;
                // SAFETY: the header lies inside the buffer.
                self.header = NetHeader::from_bytes(&unsafe { start.cast::<[u8; NET_HEADER]>().read_unaligned() });
                (NET_HEADER, buffers)
            } else {
                (0, left)
            };
            let part = len - skip;
            if look && self.scratch_used + part <= self.scratch.len() {
                // SAFETY: the part lies inside the buffer, and fits into the scratch (checked).
                unsafe {
                    let to = self.scratch.as_mut_ptr().add(self.scratch_used);
                    std::ptr::copy_nonoverlapping(start.add(skip), to, part);
                }
                self.scratch_used += part;
            }
            let bytes = if skip > 0 { part } else { bytes + part };
            self.partial = (left - 1, bytes);
            if left == 1 {
                match &mut self.expected {
                    Some(c) if self.scratch_used == bytes => c.look_at(self.header, &self.scratch[..bytes], true),
                    Some(c) => c.count(1, bytes as u64),
                    None => self.stray += 1,
                }
            }
        }
        Ok(())
    }

    /// Gives the switch frames. Returns how many.
    #[inline]
    fn send(&mut self) -> Result<u16> {
        let Some(done) = self.guest.tx.collect(u16::MAX) else {
            bail!("the switch wrote nonsense into a transmit ring")
        };
        let Some(out) = &mut self.out else { return Ok(0) };
        out.sent += u64::from(done);
        // The receiver has as many buffers as the sender; what the switch holds inside comes on top, so a quarter stays back.
        let (all, free) = (self.guest.tx.buffers(), self.guest.tx.free());
        let room = free.saturating_sub(all / 4);
        let mut n = u64::from(room).min(out.quota).min(u64::from(BURST)) as u16;
        if n < TX_BATCH.min(all / 4) && u64::from(n) != out.quota {
            out.patience += 1;
            if out.patience < TX_PATIENCE {
                n = 0;
            }
        }
        if n == 0 {
            return Ok(0);
        }
        out.patience = 0;
        for i in 0..n {
            let ahead = self.guest.tx.buffer(self.guest.tx.next_free(i.wrapping_add(8).min(n - 1)));
            prefetch_for_write(ahead.wrapping_add(NET_HEADER));
            let buffer = self.guest.tx.buffer(self.guest.tx.next_free(i));
            // SAFETY: the buffer is the driver's and holds the template (prepare); set_len made it long enough.
            let bytes = unsafe { out.frames.write_next(buffer.add(NET_HEADER)) };
            if out.frames.mixed() {
                let buffer = self.guest.tx.next_free(i);
                self.guest.tx.set_buffer_len(buffer, NET_HEADER + bytes);
            }
        }
        out.quota -= u64::from(n);
        out.published += u64::from(n);
        self.guest.tx.publish(n);
        Ok(n)
    }

    /// Makes the guest send these frames; all transmit buffers must have come back.
    fn prepare(&mut self, frames: Frames, quota: u64) {
        self.guest.tx.set_len(NET_HEADER + frames.bytes());
        let header = frames.net_header().to_bytes();
        for b in 0..self.guest.tx.buffers() {
            let start = self.guest.tx.buffer(b);
            // SAFETY: set_len has checked that the buffer is that long; it is the driver's.
            unsafe {
                std::ptr::copy_nonoverlapping(header.as_ptr(), start, NET_HEADER);
                std::ptr::copy_nonoverlapping(
                    frames.template().as_ptr(),
                    start.add(NET_HEADER),
                    frames.template().len(),
                );
            }
        }
        self.out = Some(Outgoing { frames, quota, published: 0, sent: 0, patience: 0 });
    }

    fn idle(&self) -> bool {
        self.guest.tx.free() == self.guest.tx.buffers()
    }
}

#[inline]
fn prefetch_for_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch may name any address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Guests on one thread.
pub struct Generator<R> {
    lanes: Vec<Lane<R>>,
    /// Streams as (sender, receiver, description).
    pub(crate) streams: Vec<(usize, usize, StreamSpec)>,
    /// Where each stream goes on.
    next: Vec<Position>,
    sample: u32,
    /// The last turn found no work.
    rest: bool,
}

impl<R: DriverRing> Generator<R> {
    /// Attaches a guest to each socket.
    ///
    /// # Errors
    /// As [`Guest::attach`].
    pub fn attach(sockets: &[impl AsRef<Path>], spec: &GuestSpec) -> Result<Self> {
        let guests = sockets
            .iter()
            .map(|s| Guest::attach(s.as_ref(), spec).with_context(|| s.as_ref().display().to_string()))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self::of(guests))
    }

    /// Drives guests that are attached already, or whose rings are served otherwise.
    pub fn of(guests: Vec<Guest<R>>) -> Self {
        let lanes = guests.into_iter().map(Lane::new).collect();
        Self { lanes, streams: Vec::new(), next: Vec::new(), sample: SAMPLE, rest: false }
    }

    /// Looks into one burst of `bursts` (1: into all).
    pub fn sample(mut self, bursts: u32) -> Self {
        self.sample = bursts.max(1);
        self
    }

    /// Sets the streams: who sends to whom, by position of the sockets. Each guest sends at most one and receives at most one.
    pub fn streams(&mut self, streams: Vec<(usize, usize, StreamSpec)>) {
        self.next = vec![Position::default(); streams.len()];
        self.streams = streams;
    }

    /// The guests, in the order of their sockets.
    pub fn guests(&mut self) -> impl Iterator<Item = &mut Guest<R>> {
        self.lanes.iter_mut().map(|lane| &mut lane.guest)
    }

    /// Whether every session still stands.
    pub fn alive(&self) -> bool {
        self.lanes.iter().all(|l| l.guest.alive())
    }

    /// Whether all guests' memory consists of huge pages.
    pub fn huge_pages(&self) -> bool {
        self.lanes.iter().all(|l| l.guest.huge_pages())
    }

    /// One turn over all guests.
    #[inline]
    fn turn(&mut self) -> Result<bool> {
        if self.rest {
            for _ in 0..REST {
                std::hint::spin_loop();
            }
        }
        let mut work = false;
        for lane in &mut self.lanes {
            // Receive first: buffers must be there before what is sent next arrives.
            work |= lane.receive(self.sample)? != 0;
            work |= lane.send()? != 0;
        }
        self.rest = !work;
        Ok(work)
    }

    fn kick(&self) {
        for lane in &self.lanes {
            lane.guest.kick();
        }
    }

    /// TCP: what each direction acknowledges is what its sender has seen of the other.
    fn acknowledge(&mut self) {
        for lane in &mut self.lanes {
            if let (Some(out), Some(checker)) = (&mut lane.out, &lane.expected) {
                out.frames.acknowledged = checker.lap();
            }
        }
    }

    /// Frames that the streams have sent and that have not arrived.
    fn missing(&self) -> bool {
        self.streams.iter().any(|(from, to, _)| {
            let sent = self.lanes[*from].out.as_ref().map_or(0, |o| o.published);
            self.lanes[*to].expected.as_ref().is_some_and(|c| c.total() < sent)
        })
    }

    /// Stops sending and lets everything under way arrive. What has not arrived in 50 ms of polling after anything moved last
    /// is lost.
    /// Kicks, for a switch that sleeps.
    ///
    /// # Errors
    /// When a ring makes no sense.
    pub fn drain(&mut self) -> Result<()> {
        const LOST: Duration = Duration::from_millis(50);
        const STUCK: Duration = Duration::from_secs(1);
        for lane in &mut self.lanes {
            if let Some(out) = &mut lane.out {
                out.quota = 0;
            }
        }
        let mut patience = Patience::new();
        loop {
            let mut work = false;
            for lane in &mut self.lanes {
                work |= lane.receive(self.sample)? != 0;
                let before = lane.guest.tx.free();
                lane.send()?;
                work |= lane.guest.tx.free() != before;
            }
            let quiet = if self.lanes.iter().any(|l| !l.idle()) {
                STUCK
            } else if self.missing() {
                LOST
            } else {
                return Ok(());
            };
            if work {
                patience.restart();
            } else if patience.waited() > quiet {
                return Ok(());
            } else {
                self.kick();
                std::hint::spin_loop();
            }
        }
    }

    /// Sends `count` frames of one step on one stream and waits until as many have arrived.
    ///
    /// # Errors
    /// When nothing has arrived in `patience` spent polling.
    pub fn phase(&mut self, stream: usize, step: Step, count: u64, patience: Duration) -> Result<()> {
        let (from, to, spec) = self.streams[stream].clone();
        self.drain()?;
        if !self.lanes[from].idle() {
            bail!("the switch does not take what guest {from} has sent");
        }
        let frames = Frames::new(&spec, step);
        let bytes = frames.bytes();
        let frames = if step == Step::Data { frames.at(self.next[stream]) } else { frames };
        if step == Step::Data {
            self.lanes[to].expected = Some(Checker::new(&frames));
        } else {
            self.lanes[to].expected = None;
        }
        self.lanes[to].stray = 0;
        self.lanes[from].prepare(frames, 0);
        // Never more under way than the receiver has buffers, however long this thread is kept off its core: none may be lost.
        let receiver = &self.lanes[to].guest.rx;
        let per_frame = (bytes + NET_HEADER).div_ceil(receiver.buffer_len()) as u64;
        let most = (u64::from(receiver.buffers()) * 3 / 4 / per_frame).max(1);
        let arrived = |lane: &Lane<R>| lane.expected.as_ref().map_or(lane.stray, |c| c.findings().frames);
        // A frame that came twice has taken two buffers, but only one has left for it.
        let twice = |lane: &Lane<R>| lane.expected.as_ref().map_or(0, |c| c.findings().duplicated);
        let mut allowed = 0;
        let mut last = (0, Patience::new());
        loop {
            let now = arrived(&self.lanes[to]);
            if now >= count {
                break;
            }
            // Duplicates are found after they were counted: what is allowed already stays.
            let allow = count.min(now.saturating_sub(twice(&self.lanes[to])) + most).max(allowed);
            if let Some(out) = &mut self.lanes[from].out {
                out.quota += allow - allowed;
                allowed = allow;
            }
            for _ in 0..8 {
                self.turn()?;
            }
            self.kick();
            if now > last.0 {
                last = (now, Patience::new());
            } else if last.1.waited() > patience {
                bail!("{step:?}: of {count} frames of {bytes} bytes from guest {from} to guest {to}, {now} arrived");
            }
        }
        if step == Step::Data
            && let Some(out) = &self.lanes[from].out
        {
            self.next[stream] = out.frames.next();
        }
        Ok(())
    }

    /// Starts the streams' data, without bound: those of the openers, and of the answerers too if `both`.
    ///
    /// # Errors
    /// When a guest's buffers do not come back.
    pub fn start(&mut self, both: bool) -> Result<()> {
        self.drain()?;
        for lane in &mut self.lanes {
            lane.expected = None;
            lane.out = None;
        }
        for (i, (from, to, spec)) in self.streams.iter().enumerate() {
            if !spec.opener && !both {
                continue;
            }
            let frames = Frames::new(spec, Step::Data).at(self.next[i]);
            if !self.lanes[*from].idle() {
                bail!("the switch does not take what guest {from} has sent");
            }
            self.lanes[*to].expected = Some(Checker::new(&frames));
            self.lanes[*from].prepare(frames, u64::MAX);
        }
        // From the first frame on: an acknowledgement from long ago is no valid one.
        self.acknowledge();
        Ok(())
    }

    /// Stops all streams and lets them arrive. [`Self::start`] goes on where they were.
    ///
    /// # Errors
    /// When a ring makes no sense.
    pub fn stop(&mut self) -> Result<()> {
        self.drain()?;
        for (i, (from, _, _)) in self.streams.iter().enumerate() {
            // A guest sends at most one stream.
            if let Some(out) = &self.lanes[*from].out {
                self.next[i] = out.frames.next();
            }
        }
        Ok(())
    }

    /// Keeps the started streams going for `duration` and tells what happened meanwhile.
    ///
    /// # Errors
    /// When a ring makes no sense.
    pub fn run(&mut self, duration: Duration) -> Result<Tally> {
        for lane in &mut self.lanes {
            if let Some(c) = &mut lane.expected {
                c.take();
            }
            if let Some(o) = &mut lane.out {
                o.sent = 0;
            }
        }
        let begin = Instant::now();
        let mut seconds;
        let (mut turns, mut idle) = (0u64, 0u64);
        loop {
            for _ in 0..64 {
                idle += u64::from(!self.turn()?);
            }
            turns += 64;
            self.acknowledge();
            self.kick();
            seconds = begin.elapsed();
            if seconds >= duration {
                break;
            }
        }
        let mut tally = Tally { seconds: seconds.as_secs_f64(), idle: idle as f64 / turns as f64, ..Tally::default() };
        for lane in &mut self.lanes {
            if let Some(c) = &mut lane.expected {
                tally.findings.add(&c.take());
            }
            tally.sent += lane.out.as_ref().map_or(0, |o| o.sent);
        }
        Ok(tally)
    }

    /// What has arrived since the last [`Self::run`] began or ended.
    pub fn findings(&self) -> Findings {
        let mut f = Findings::default();
        for c in self.lanes.iter().filter_map(|l| l.expected.as_ref()) {
            f.add(&c.findings());
        }
        f
    }
}
