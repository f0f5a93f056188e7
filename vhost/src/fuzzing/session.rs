//! Arbitrary bytes through the message reader, the relay, the crate's request handler and the session, in-process.
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use ferry_dataplane::frame::RxBurst;
use ferry_dataplane::port::RxQueue;
use ferry_dataplane::qsbr::Domain;

use crate::eventfd;
use crate::fdio;
use crate::features::FeatureSwitches;
use crate::message::{self, Progress, Reader};
use crate::queue::PortQueues;
use crate::relay::{Relay, RelayCounters, lock};
use crate::session::{Session, SessionConfig};
use crate::signals::NoObserver;
use crate::status::VhostStatus;

/// Bytes of the memory file that fuzzed messages can attach.
const MEMORY_BYTES: u64 = 1 << 20;
/// Messages per run.
const MAX_MESSAGES: usize = 256;

/// Takes values off the front of the input; zeroes when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let n = N.min(self.0.len());
        let (head, tail) = self.0.split_at(n);
        for (to, from) in out.iter_mut().zip(head) {
            *to = *from;
        }
        self.0 = tail;
        out
    }
    fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }
    /// A number that is often an interesting one.
    fn word(&mut self) -> u64 {
        match self.byte() {
            n @ 0..=63 => u64::from(n),
            n @ 64..=127 => u64::from(n & 63) << 12,
            n @ 128..=159 => 1u64 << (n & 31),
            n @ 160..=175 => u64::MAX - u64::from(n & 15),
            176..=191 => 1 << 32 | 1 << 30 | u64::from(self.byte()) << 26,
            _ => u64::from_le_bytes(self.take()),
        }
    }
}

/// One session made of `data`: messages of known and unknown kinds, whole, cut and malformed, with memory files and
/// eventfds attached, while a PMD thread's work is done on the rings in between. Lack of descriptors or memory ends it early.
///
/// # Panics
/// Never, whatever the input: that is what it is for.
pub fn session(data: &[u8]) -> Reached {
    run(data).unwrap_or_default()
}

/// How far a run came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Messages handled.
    pub messages: usize,
    /// Times a ring was started.
    pub ring_starts: u64,
}

fn run(data: &[u8]) -> std::io::Result<Reached> {
    let mut input = Input(data);
    let domain = Domain::new();
    let queues = PortQueues::new(2, Arc::clone(&domain))?;
    for vring in 0..4 {
        queues.set_enabled(vring, true);
    }
    let mut rx = queues.rx(0);
    let mut burst = RxBurst::new();
    let switches = FeatureSwitches::default();
    let config = SessionConfig {
        queue_pairs: 2,
        mtu: 9000,
        features: switches.features(2, 9000),
        protocol_features: switches.protocol_features(),
        mirror: None,
    };
    let session = Arc::new(Mutex::new(Session::new(config, queues, Arc::new(NoObserver))));
    let mut relay = Relay::new(Arc::clone(&session))?;
    let mut counters = RelayCounters::default();
    let mut reader = Reader::default();
    let (frontend, backend) = UnixStream::pair()?;
    let memory = fdio::anonymous_file(MEMORY_BYTES)?;
    let event = eventfd::new()?;
    let mut messages = 0;

    'session: for _ in 0..MAX_MESSAGES {
        if input.0.is_empty() {
            break;
        }
        let (bytes, fds) = next_message(&mut input, memory.as_raw_fd(), event.as_raw_fd());
        match fdio::send(frontend.as_fd(), &bytes, &fds) {
            Ok(n) if n == bytes.len() => {}
            _ => break,
        }
        loop {
            match reader.read(backend.as_fd()) {
                Ok(Progress::Message(m)) => {
                    messages += 1;
                    if relay.handle(m, &mut counters).end.is_some() {
                        break 'session;
                    }
                }
                Ok(Progress::Pending) => break,
                Ok(Progress::Closed) | Err(_) => break 'session,
            }
        }
        // The PMD thread's turn. It is offline (its guard dropped) while the session thread waits for grace periods.
        if let (Some(rx), Some(guard)) = (&mut rx, domain.register()) {
            rx.receive(&guard, &mut burst);
            burst.take_snapshots();
            rx.release(&guard);
            burst.clear();
        }
        lock(&session).on_faults();
        lock(&session).on_deadline();
    }
    let mut status = VhostStatus::default();
    lock(&session).describe(&mut status);
    lock(&session).disconnect();
    Ok(Reached { messages, ring_starts: status.rings.iter().map(|r| r.starts).sum() })
}

/// The next message: mostly of a known code with the right length, sometimes anything.
fn next_message(input: &mut Input<'_>, memory: RawFd, event: RawFd) -> (Vec<u8>, Vec<RawFd>) {
    let shape = input.byte();
    let code = u32::from(input.byte() % 48);
    let flags = message::VERSION | if shape & 1 != 0 { message::NEED_REPLY } else { 0 };
    let state = |input: &mut Input<'_>| {
        let index = u32::from(input.byte() % 5);
        let number = input.word() as u32;
        [index.to_ne_bytes(), number.to_ne_bytes()].concat()
    };
    let region = |input: &mut Input<'_>| {
        let gpa = input.word();
        let (size, offset) = match input.byte() {
            0..=200 => (MEMORY_BYTES, 0),
            _ => (input.word(), input.word()),
        };
        [gpa, size, gpa.wrapping_add(0x7000_0000), offset].map(u64::to_ne_bytes).concat()
    };
    let mut fds = Vec::new();
    let mut payload = match code {
        5 => {
            let count = u64::from(input.byte() % 4);
            let mut p = count.to_ne_bytes().to_vec();
            for _ in 0..count {
                p.extend(region(input));
                fds.push(memory);
            }
            p
        }
        6 => {
            fds.push(memory);
            [input.word(), input.word()].map(u64::to_ne_bytes).concat()
        }
        8 | 10 | 11 | 18 => state(input),
        9 => {
            let mut p = state(input);
            // Areas inside the region that `region` makes at guest address 0, mostly.
            for _ in 0..3 {
                let at = 0x7000_0000u64.wrapping_add(input.word() << 4);
                p.extend(at.to_ne_bytes());
            }
            p.extend(input.word().to_ne_bytes());
            p
        }
        12..=14 => {
            let value = u64::from(input.byte() % 5) | if shape & 2 != 0 { 0x100 } else { 0 };
            if shape & 2 == 0 {
                fds.push(event);
            }
            value.to_ne_bytes().to_vec()
        }
        37 | 38 => {
            if code == 37 {
                fds.push(memory);
            }
            let mut p = vec![0; 8];
            p.extend(region(input));
            p
        }
        2 | 16 | 19 | 20 => input.word().to_ne_bytes().to_vec(),
        1 | 3 | 4 | 15 | 17 | 34 | 36 => Vec::new(),
        _ => input.take::<24>().to_vec(),
    };
    match shape >> 4 {
        0 => payload.truncate(usize::from(input.byte())),
        1 => payload.extend_from_slice(&input.take::<7>()),
        2 => fds.push(memory),
        3 => fds.clear(),
        _ => {}
    }
    let mut bytes = message::encode(if shape == 0xff { u32::from(input.byte()) << 8 } else { code }, flags, &payload);
    if shape == 0xfe {
        // The stream goes out of step from here on.
        bytes.truncate(usize::from(input.byte()));
        bytes.push(0);
    }
    (bytes, fds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// xorshift64*, the same inputs every time.
    fn bytes(seed: u64, len: usize) -> Vec<u8> {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..len)
            .map(|_| {
                x ^= x >> 12;
                x ^= x << 25;
                x ^= x >> 27;
                (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
            })
            .collect()
    }

    #[test]
    fn seeded_sessions_end_cleanly() {
        let start = Instant::now();
        let mut messages = 0;
        let mut runs = 0;
        for seed in 1..=300 {
            messages += session(&bytes(seed, 600)).messages;
            runs += 1;
            // Other tests share the processors.
            if start.elapsed() > Duration::from_secs(20) {
                break;
            }
        }
        assert!(runs >= 20 && messages > runs * 3, "{messages} messages in {runs} runs");
    }

    #[test]
    fn a_whole_session_can_be_reached_from_bytes() {
        // SET_FEATURES, memory, and a ring's messages, as the input language says them.
        let mut data = Vec::new();
        let plain = 0x40u8;
        data.extend([plain, 2, 176, 0]); // SET_FEATURES version_1 | protocol_features
        data.extend([plain, 5, 1, 0, 0]); // SET_MEM_TABLE, one region at 0
        data.extend([plain, 8, 1, 128 + 8]); // SET_VRING_NUM 1, 256
        data.extend([plain, 10, 1, 0]); // SET_VRING_BASE 1, 0
        // SET_VRING_ADDR 1: descriptors at 0x10000, used at 0x20000, available at 0x30000
        data.extend([plain, 9, 1, 0, 64 + 1, 64 + 2, 64 + 3, 0]);
        data.extend([plain, 18, 1, 1]); // SET_VRING_ENABLE
        data.extend([plain, 12, 1]); // SET_VRING_KICK
        assert_eq!(session(&data), Reached { messages: 7, ring_starts: 1 });
        assert_eq!(session(&[]), Reached::default());
    }
}
