//! Exchanges between two guests that answer each other: latency and the rate of new connections.
#![allow(unsafe_code)] // Its job: frames are written and read in guest memory.
use crate::frame::{STAMP, flags};
use crate::guest::ring::{DriverRing, NET_HEADER};
use crate::guest::{Guest, GuestSpec};
use crate::histogram::Histogram;
use crate::patience::Patience;
use crate::stream::{Frames, Step, StreamSpec};
use anyhow::{Context, Result, bail};
use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

/// Two guests, each on one port of a switch.
pub struct Pair<R> {
    guests: [Guest<R>; 2],
    streams: [StreamSpec; 2],
    began: Instant,
}

/// New connections, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Handshakes {
    /// Connections completed per second.
    pub per_second: f64,
    /// Connections that were not completed.
    pub failed: u64,
    /// Time from sending the SYN until the answerer has the ACK, nanoseconds.
    pub setup_ns: Histogram,
}

/// Most connections under way at a time: no ring may overflow.
pub const MOST_UNDER_WAY: u32 = 96;
/// Frames that the switch does not take in this much polling stay where they are.
const STUCK: Duration = Duration::from_secs(1);
/// Nothing has moved in this much polling: what is under way is lost.
const STALLED: Duration = Duration::from_millis(20);
/// The same for one frame of a ping-pong.
const LOST: Duration = Duration::from_millis(100);
/// The same for the last frames of a steady stream.
const LATE: Duration = Duration::from_millis(5);

impl<R: DriverRing> Pair<R> {
    /// Attaches both guests. `streams` are the opener's and the answerer's.
    ///
    /// # Errors
    /// As [`Guest::attach`].
    pub fn attach(sockets: [&Path; 2], spec: &GuestSpec, streams: [StreamSpec; 2]) -> Result<Self> {
        let guests = [Guest::attach(sockets[0], spec)?, Guest::attach(sockets[1], spec)?];
        Ok(Self { guests, streams, began: Instant::now() })
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    fn set_len(&mut self, bytes: usize) -> Result<()> {
        for g in &mut self.guests {
            let mut patience = Patience::new();
            while g.tx.free() < g.tx.buffers() {
                g.tx.collect(u16::MAX).context("nonsense in a ring")?;
                g.kick();
                if patience.waited() > STUCK {
                    bail!("the switch does not take what was sent");
                }
            }
            g.tx.set_len(NET_HEADER + bytes);
        }
        Ok(())
    }

    /// Sends one frame, if there is a buffer.
    #[inline]
    fn send(guest: &mut Guest<R>, write: impl FnOnce(*mut u8)) -> bool {
        if guest.tx.free() == 0 {
            return false;
        }
        let start = guest.tx.buffer(guest.tx.next_free(0));
        // SAFETY: the header lies inside the buffer, which is the driver's.
        unsafe {
            std::ptr::write_bytes(start, 0, NET_HEADER);
            write(start.add(NET_HEADER));
        }
        guest.tx.publish(1);
        true
    }

    /// One frame back and forth: round-trip times. The first ones, until both directions pass, are not counted.
    ///
    /// # Errors
    /// When frames stay out.
    pub fn ping_pong(&mut self, duration: Duration) -> Result<Histogram> {
        let mut frames = [Frames::new(&self.streams[0], Step::Data), Frames::new(&self.streams[1], Step::Data)];
        self.set_len(frames[0].bytes())?;
        let mut histogram = Histogram::default();
        let mut lost = 0;
        let end = Instant::now() + duration;
        while Instant::now() < end {
            let sent = self.now();
            let mut complete = true;
            for (from, to) in [(0, 1), (1, 0)] {
                let f = &mut frames[from];
                // SAFETY: set_len has made room for the frame.
                let sent = Self::send(&mut self.guests[from], |at| unsafe {
                    std::ptr::copy_nonoverlapping(f.template().as_ptr(), at, f.template().len());
                    f.write_next(at);
                });
                if !sent || !self.receive_one(from, to, &frames[from])? {
                    complete = false;
                    break;
                }
            }
            if complete {
                histogram.add(self.now() - sent);
            } else {
                lost += 1;
                if lost > 50 {
                    bail!("frames do not come back");
                }
            }
        }
        Ok(histogram)
    }

    /// Waits for one frame; `false` when it is lost.
    fn receive_one(&mut self, from: usize, to: usize, frames: &Frames) -> Result<bool> {
        let mut turns = 0u32;
        let mut patience = None;
        loop {
            self.guests[from].tx.collect(u16::MAX).context("nonsense in a ring")?;
            let n = self.guests[to].rx.collect(u16::MAX).context("nonsense in a ring")?;
            for i in 0..n {
                let done = self.guests[to].rx.collected(i);
                let ok = done.len as usize == frames.bytes() + NET_HEADER;
                if ok {
                    self.guests[to].rx.publish(self.guests[to].rx.free());
                    return Ok(true);
                }
            }
            if n > 0 {
                self.guests[to].rx.publish(self.guests[to].rx.free());
            }
            turns += 1;
            if turns.is_multiple_of(64) {
                self.guests[from].kick();
                self.guests[to].kick();
                if patience.get_or_insert_with(Patience::new).waited() > LOST {
                    return Ok(false);
                }
            }
            std::hint::spin_loop();
        }
    }

    /// One direction at a steady rate: the time each frame takes from being published to being found.
    ///
    /// # Errors
    /// When a ring makes no sense.
    pub fn steady(&mut self, frames_per_second: f64, duration: Duration) -> Result<(Histogram, u64)> {
        let mut frames = Frames::new(&self.streams[0], Step::Data);
        self.set_len(frames.bytes())?;
        let stamp_at = NET_HEADER + self.streams[0].kind.payload_at();
        const REMEMBERED: usize = 1 << 16;
        let mut sent_at = vec![0u64; REMEMBERED];
        let mut histogram = Histogram::default();
        let begin = self.now();
        let end = begin + duration.as_nanos() as u64;
        let (mut sent, mut received) = (0u64, 0u64);
        let mut turns = 0u32;
        let mut patience = None;
        loop {
            let now = self.now();
            let [a, b] = &mut self.guests;
            let n = b.rx.collect(u16::MAX).context("nonsense in a ring")?;
            for i in 0..n {
                let done = b.rx.collected(i);
                // SAFETY: the stamp lies inside every buffer.
                let bytes = unsafe { b.rx.buffer(done.buffer).add(stamp_at).cast::<[u8; STAMP]>().read_unaligned() };
                let seq = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                histogram.add(now.saturating_sub(sent_at[seq as usize % REMEMBERED]));
            }
            received += u64::from(n);
            if n > 0 {
                b.rx.publish(b.rx.free());
            }
            a.tx.collect(u16::MAX).context("nonsense in a ring")?;
            if now >= end {
                let all = n == 0 && received >= sent;
                if all || patience.get_or_insert_with(Patience::new).waited() > LATE {
                    break;
                }
            } else {
                let due = ((now - begin) as f64 * frames_per_second / 1e9) as u64;
                let n = due.saturating_sub(sent).min(u64::from(a.tx.free())).min(64) as u16;
                for i in 0..n {
                    sent_at[frames.next().seq as usize % REMEMBERED] = now;
                    // SAFETY: set_len has made room for the frame.
                    unsafe {
                        let start = a.tx.buffer(a.tx.next_free(i));
                        std::ptr::write_bytes(start, 0, NET_HEADER);
                        let at = start.add(NET_HEADER);
                        std::ptr::copy_nonoverlapping(frames.template().as_ptr(), at, frames.template().len());
                        frames.write_next(at);
                    }
                }
                if n > 0 {
                    a.tx.publish(n);
                }
                sent += u64::from(n);
            }
            turns += 1;
            if turns.is_multiple_of(64) {
                a.kick();
                b.kick();
            }
        }
        Ok((histogram, sent - received.min(sent)))
    }

    /// Opens TCP connections `first..first + count`, `under_way` (up to [`MOST_UNDER_WAY`]) at a time, and closes each at once
    /// if `close`. With one at a time the time of set-up is that of the switch alone, with many that of waiting in line.
    ///
    /// # Errors
    /// When a ring makes no sense or nothing gets through at all.
    pub fn handshakes(&mut self, first: u32, count: u32, under_way: u32, close: bool) -> Result<Handshakes> {
        let most = under_way.clamp(1, MOST_UNDER_WAY);
        let [opener, answerer] = [self.streams[0].clone(), self.streams[1].clone()];
        // All of these are 60 bytes long: Ethernet's minimum.
        let syn = Frames::new(&opener, Step::Syn);
        let replies = Replies {
            syn_ack: Frames::new(&answerer, Step::SynAck),
            ack: Frames::new(&opener, Step::Ack),
            fin: Frames::new(&opener, Step::Fin),
            fin_back: Frames::new(&answerer, Step::Fin),
            last_ack: Frames::new(&opener, Step::LastAck),
            transport_at: opener.kind.transport_at(),
            close,
        };
        let bytes = syn.bytes();
        self.set_len(bytes)?;
        let mut began = vec![0u64; count as usize];
        let mut waiting: [VecDeque<(Step, u32)>; 2] = Default::default();
        let (mut next, mut under_way, mut done) = (0u32, 0u32, 0u32);
        let mut result = Handshakes::default();
        let start = self.now();
        let mut moved = start;
        let mut patience = None;
        while done + (result.failed as u32) < count {
            let now = self.now();
            let mut work = false;
            while next < count && under_way < most && waiting[0].len() < 64 {
                began[next as usize] = now;
                waiting[0].push_back((Step::Syn, first + next));
                next += 1;
                under_way += 1;
                work = true;
            }
            for (guest, (out, other_end)) in self.guests.iter_mut().zip(waiting.iter_mut().zip([false, true])) {
                let n = guest.rx.collect(u16::MAX).context("nonsense in a ring")?;
                for i in 0..n {
                    let buffer = guest.rx.buffer(guest.rx.collected(i).buffer);
                    // SAFETY: the headers lie inside every buffer.
                    let header =
                        unsafe { buffer.add(NET_HEADER + replies.transport_at).cast::<[u8; 20]>().read_unaligned() };
                    let connection = Frames::connection_of(
                        u16::from_be_bytes([header[0], header[1]]),
                        u16::from_be_bytes([header[2], header[3]]),
                        other_end,
                    );
                    let index = connection.wrapping_sub(first);
                    if index >= count {
                        continue;
                    }
                    let seq = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                    match (other_end, header[13] & (flags::SYN | flags::FIN | flags::RST)) {
                        (true, flags::SYN) => out.push_back((Step::SynAck, connection)),
                        (false, flags::SYN) => {
                            out.push_back((Step::Ack, connection));
                            if close {
                                out.push_back((Step::Fin, connection));
                            }
                        }
                        (true, 0) => {
                            let last = seq == replies.last_seq();
                            if !last {
                                result.setup_ns.add(now - began[index as usize]);
                            }
                            if last == close {
                                done += 1;
                                under_way = under_way.saturating_sub(1);
                            }
                        }
                        (true, flags::FIN) => out.push_back((Step::Fin, connection)),
                        (false, flags::FIN) => out.push_back((Step::LastAck, connection)),
                        _ => {}
                    }
                }
                if n > 0 {
                    guest.rx.publish(guest.rx.free());
                    work = true;
                }
                guest.tx.collect(u16::MAX).context("nonsense in a ring")?;
                let n = (out.len() as u16).min(guest.tx.free());
                for i in 0..n {
                    let Some((step, connection)) = out.pop_front() else { break };
                    let frames = if step == Step::Syn { &syn } else { replies.frames(step, other_end) };
                    // SAFETY: set_len has made room for the frame; the buffer is the driver's.
                    unsafe {
                        let start = guest.tx.buffer(guest.tx.next_free(i));
                        std::ptr::write_bytes(start, 0, NET_HEADER);
                        frames.write_connection(start.add(NET_HEADER), connection);
                    }
                }
                if n > 0 {
                    guest.tx.publish(n);
                    work = true;
                }
            }
            if work {
                moved = now;
                patience = None;
            } else if patience.get_or_insert_with(Patience::new).waited() > STALLED {
                result.failed += u64::from(under_way);
                if done == 0 && result.failed > 4 * u64::from(MOST_UNDER_WAY) {
                    bail!("no connection is completed");
                }
                under_way = 0;
                moved = now;
                patience = None;
            } else {
                self.guests.iter().for_each(Guest::kick);
            }
        }
        result.per_second = f64::from(done) / ((moved - start) as f64 / 1e9);
        Ok(result)
    }
}

struct Replies {
    syn_ack: Frames,
    ack: Frames,
    fin: Frames,
    fin_back: Frames,
    last_ack: Frames,
    transport_at: usize,
    close: bool,
}

impl Replies {
    fn frames(&self, step: Step, answerer: bool) -> &Frames {
        match step {
            Step::SynAck => &self.syn_ack,
            Step::Fin if answerer => &self.fin_back,
            Step::Fin => &self.fin,
            Step::LastAck => &self.last_ack,
            _ => &self.ack,
        }
    }

    /// Sequence number by which the last ACK differs from the first.
    fn last_seq(&self) -> u32 {
        debug_assert!(self.close || self.last_ack.bytes() == self.ack.bytes());
        self.last_ack.sequence_number()
    }
}
