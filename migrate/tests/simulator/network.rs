//! A channel between two hosts: two connections, each in order, with no order between them; hostile as the seed says.
use std::collections::VecDeque;

use ferry_migrate::batch::Batch;
use ferry_migrate::compress::Compressor;
use ferry_migrate::message::{self, Message};
use ferry_migrate::wire::{BatchDecoder, BatchEncoder};

use crate::rng::Rng;
use crate::traffic;

/// How often what goes wrong, per million frames.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hostility {
    pub truncate: u64,
    pub duplicate: u64,
    pub lose: u64,
    pub cut: u64,
}

/// What travels.
#[derive(Clone, Debug)]
pub enum Frame {
    /// A control message's bytes.
    Control(Vec<u8>),
    /// A batch's bytes.
    Batch(Vec<u8>),
    Late(Vec<u8>),
    /// The other end was closed.
    End,
}

/// Bytes that the bulk connection takes before it says that it is full.
const WINDOW_BYTES: usize = 96 * 1024;

struct Pipe {
    frames: VecDeque<(u64, Frame, usize)>,
    last_ms: u64,
    busy_until_us: u64,
    in_flight: usize,
}

impl Pipe {
    fn new() -> Self {
        Self { frames: VecDeque::new(), last_ms: 0, busy_until_us: 0, in_flight: 0 }
    }
}

/// From `ends[0]`, who dialled, to `ends[1]`.
pub struct Channel {
    pub ends: [usize; 2],
    /// Control from each end, then bulk from the first.
    pipes: [Pipe; 3],
    /// The side does not look at it any more.
    pub closed: [bool; 2],
    /// Nothing arrives any more.
    cut: bool,
    /// Each side is told then.
    pub notice_ms: [Option<u64>; 2],
    latency_ms: (u64, u64),
    bytes_per_ms: usize,
    hostility: Hostility,
    encoder: BatchEncoder,
    decoder: BatchDecoder,
}

/// What the sender's side finds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    Fine,
    Cut,
}

impl Channel {
    pub fn new(id: usize, ends: [usize; 2], hostility: Hostility, bytes_per_ms: usize, rng: &mut Rng) -> Self {
        let low = rng.range(0, 2);
        Self {
            ends,
            pipes: [Pipe::new(), Pipe::new(), Pipe::new()],
            closed: [false; 2],
            cut: false,
            notice_ms: [None; 2],
            latency_ms: (low, low + rng.range(0, 4)),
            bytes_per_ms,
            hostility,
            encoder: BatchEncoder::new(id as u128, Compressor::off()),
            decoder: BatchDecoder::new(id as u128, traffic::config().timeouts),
        }
    }

    pub fn room_bytes(&self) -> usize {
        WINDOW_BYTES.saturating_sub(self.pipes[2].in_flight)
    }

    fn push(&mut self, pipe: usize, frame: Frame, bytes: usize, now_ms: u64, rng: &mut Rng) {
        if self.cut {
            return;
        }
        let latency_ms = rng.range(self.latency_ms.0, self.latency_ms.1);
        let pipe = &mut self.pipes[pipe];
        // One frame after the other at the link's rate, in microseconds.
        pipe.busy_until_us = pipe.busy_until_us.max(now_ms * 1000) + (bytes * 1000 / self.bytes_per_ms) as u64;
        pipe.last_ms = pipe.last_ms.max(pipe.busy_until_us / 1000 + latency_ms);
        pipe.in_flight += bytes;
        pipe.frames.push_back((pipe.last_ms, frame, bytes));
    }

    pub fn send(&mut self, side: usize, message: &Message, now_ms: u64, rng: &mut Rng) -> Sent {
        let mut bytes = message::encode(message).expect("fits");
        if rng.chance(self.hostility.cut) {
            return Sent::Cut;
        }
        if rng.chance(self.hostility.truncate) {
            bytes.truncate(rng.next() as usize % bytes.len());
        }
        if !rng.chance(self.hostility.lose) {
            let len = bytes.len();
            if rng.chance(self.hostility.duplicate) {
                self.push(side, Frame::Control(bytes.clone()), len, now_ms, rng);
            }
            self.push(side, Frame::Control(bytes), len, now_ms, rng);
        }
        Sent::Fine
    }

    /// `clock_ms`: the sender's.
    pub fn send_batch(&mut self, batch: &Batch, clock_ms: u64, now_ms: u64, rng: &mut Rng) -> Sent {
        let mut bytes = Vec::new();
        self.encoder.encode(batch, clock_ms, &mut bytes);
        if rng.chance(self.hostility.cut) {
            return Sent::Cut;
        }
        if rng.chance(self.hostility.truncate) {
            bytes.truncate(rng.next() as usize % bytes.len());
        }
        if !rng.chance(self.hostility.lose) {
            let len = bytes.len();
            if rng.chance(self.hostility.duplicate) {
                self.push(2, Frame::Batch(bytes.clone()), len, now_ms, rng);
            }
            self.push(2, Frame::Batch(bytes), len, now_ms, rng);
        }
        Sent::Fine
    }

    /// `clock_ms`: the receiver's.
    pub fn decode(&mut self, bytes: &[u8], clock_ms: u64) -> Option<Batch> {
        self.decoder.decode(bytes, clock_ms).ok()
    }

    pub fn send_late(&mut self, frame: Vec<u8>, now_ms: u64, rng: &mut Rng) {
        let bytes = frame.len();
        self.push(2, Frame::Late(frame), bytes, now_ms, rng);
    }

    /// One side closes: what it has sent still arrives.
    pub fn close(&mut self, side: usize, now_ms: u64, rng: &mut Rng) {
        if !std::mem::replace(&mut self.closed[side], true) {
            self.push(side, Frame::End, 0, now_ms, rng);
        }
    }

    /// It breaks: of what is under way an arbitrary part arrives, perhaps less than a whole frame, which is none. Each side learns of it
    /// at once, later, or only by the silence.
    pub fn break_off(&mut self, now_ms: u64, rng: &mut Rng) {
        if std::mem::replace(&mut self.cut, true) {
            return;
        }
        for pipe in &mut self.pipes {
            let keep = rng.next() as usize % (pipe.frames.len() + 1);
            pipe.frames.truncate(keep);
        }
        for notice in &mut self.notice_ms {
            *notice = (!rng.chance(300_000)).then(|| now_ms + rng.range(0, 60));
        }
    }

    /// The next frame that has arrived at a side.
    pub fn receive(&mut self, side: usize, now_ms: u64, rng: &mut Rng) -> Option<Frame> {
        // Which connection is looked at first is chance.
        let pipes: &[usize] = if side == 0 {
            &[1]
        } else if rng.chance(500_000) {
            &[0, 2]
        } else {
            &[2, 0]
        };
        for &pipe in pipes {
            let pipe = &mut self.pipes[pipe];
            if pipe.frames.front().is_some_and(|(at_ms, ..)| *at_ms <= now_ms)
                && let Some((_, frame, bytes)) = pipe.frames.pop_front()
            {
                pipe.in_flight -= bytes;
                return Some(frame);
            }
        }
        None
    }

    pub fn is_over(&self) -> bool {
        self.closed == [true; 2] && (self.cut || self.pipes.iter().all(|pipe| pipe.frames.is_empty()))
    }
}
