//! Control messages from a hostile peer: one after the other to both machines.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A panic is how a fuzzer learns of a bug.
use std::sync::Arc;

use ferry_dataplane::conntrack::{ConnMap, Connection, Imported, Key};

use crate::batch::{Batch, Item};
use crate::destination::{self, Destination, DestinationLimits};
use crate::message::{Abilities, List, Message, Name, Offer, WhenLate, decode, encode};
use crate::source::{self, Source, SourceIdentity, SourceLimits};
use crate::table::TargetTable;

/// One message: what can be decoded encodes to the same bytes. Returns whether it could.
pub fn message(data: &[u8]) -> bool {
    let Ok(message) = decode(data) else { return false };
    assert_eq!(encode(&message).unwrap(), data);
    assert!(!message.name().is_empty());
    true
}

/// A table that accepts everything and keeps nothing.
#[derive(Clone)]
struct Sink;

impl TargetTable for Sink {
    fn accepts(&self, _: &Connection) -> bool {
        true
    }

    fn import(&self, _: &Connection, _: u64) -> Imported {
        Imported::Added
    }

    fn delete(&self, _: &Key, _: u32) -> bool {
        true
    }

    fn has(&self, _: &Key) -> bool {
        false
    }

    fn clear(&self) {}

    fn len(&self) -> usize {
        0
    }

    fn capacity(&self) -> u32 {
        16
    }
}

/// A conversation: `data` is a sequence of steps, each a byte that says what and how long, and its bytes. Both machines hear it. Returns how
/// many messages could be decoded.
pub fn conversation(mut data: &[u8]) -> usize {
    let name = |text: &str| Name::new(text).expect("short");
    let mut destination = Destination::new(DestinationLimits::default(), name("b"), Abilities::default(), false);
    let vm = Offer { vm: name("vm"), nics: List::default(), capacity: 0, entries: 0, when_late: WhenLate::FailOpen };
    let identity = SourceIdentity { host: name("a"), abilities: Abilities::default(), vm };
    let table = Arc::new(ConnMap::new(16, [1, 2]).expect("small"));
    let limits = SourceLimits::default();
    let mut source = Source::new(limits, identity, table);
    let (mut now_ms, mut decoded, mut sequence) = (0, 0, 0);
    let (mut to_source, mut to_destination) = (Vec::new(), Vec::new());
    destination.handle(destination::Event::Connected { peer: name("a") }, 0, &mut to_destination);
    for event in [source::Event::LogOn, source::Event::Connected] {
        source.handle(event, 0, &mut to_source);
    }
    while let Some((&step, rest)) = data.split_first() {
        now_ms += u64::from(step >> 4);
        let bytes = rest.split_first().map_or(0, |(&len, _)| usize::from(len)).min(rest.len().saturating_sub(1));
        data = rest.get(1..).unwrap_or_default();
        let (body, rest) = data.split_at_checked(bytes).unwrap_or((data, &[]));
        let (here, there) = match step & 7 {
            0..=3 => {
                data = rest;
                let Ok(message) = decode(body) else { continue };
                decoded += 1;
                (source::Event::Message(message.clone()), destination::Event::Message(message))
            }
            4 => {
                let key = ferry_dataplane::conntrack::Key::new(
                    ferry_dataplane::conntrack::Toward::Ingress,
                    0,
                    ferry_dataplane::packet::IpProto::UDP,
                    (std::net::Ipv4Addr::LOCALHOST.into(), u16::from(step)),
                    (std::net::Ipv4Addr::LOCALHOST.into(), 1),
                );
                let items = vec![Item::Tombstone { key, version: u32::from(step) }];
                let batch = Batch { round: u32::from(step >> 6), sequence, clear: step & 8 != 0, items };
                sequence += u64::from(step & 16 == 0);
                (source::Event::MemoryRound, destination::Event::Batch(batch))
            }
            5 => (source::Event::Stopped, destination::Event::Tick),
            6 => (source::Event::Kick, destination::Event::Connected { peer: name("a") }),
            _ => {
                now_ms += 100;
                (source::Event::Tick { room_bytes: 5000 }, destination::Event::Tick)
            }
        };
        source.handle(here, now_ms, &mut to_source);
        destination.handle(there, now_ms, &mut to_destination);
        if to_destination.iter().any(|action| matches!(action, destination::Action::Judge { .. })) {
            sequence = 0;
            let admitted = destination::Event::Admitted { table: Sink, when_late: WhenLate::FailOpen };
            to_destination.clear();
            destination.handle(admitted, now_ms, &mut to_destination);
        }
        if to_source.iter().any(|action| matches!(action, source::Action::Track(true))) {
            source.handle(source::Event::Tracking, now_ms, &mut to_source);
        }
        for message in to_source.iter().filter_map(|action| match action {
            source::Action::Send(message) => Some(message),
            _ => None,
        }) {
            assert!(encode(message).is_ok());
        }
        to_source.clear();
        to_destination.clear();
        assert!(source.memory_bytes() < 1 << 20 && destination.memory_bytes() < 1 << 20);
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Ack, HelloReply, MAGIC, Mark};

    struct XorShift(u64);

    impl XorShift {
        fn below(&mut self, n: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % n.max(1) as u64) as usize
        }
    }

    /// Real messages in a random order with a few changes.
    #[test]
    fn conversations_with_damage() {
        let digest = crate::batch::Digest::default().value();
        let mark = |round| Mark { round, batches: 0, items: 0, digest };
        let ack = |round| Ack { round, digest, entries: 0, refused: 0, dropped: 0 };
        let offer = Offer {
            vm: Name::default(),
            nics: List::default(),
            capacity: 1,
            entries: 1,
            when_late: WhenLate::FailClosed,
        };
        let messages: Vec<Vec<u8>> = [
            Message::Hello(Abilities::default().hello(Name::default())),
            Message::Offer(offer),
            Message::HelloReply(HelloReply { magic: MAGIC, version: 1, capabilities: 7, host: Name::default() }),
            Message::Accept { capacity: 1 },
            Message::RoundBegin { round: 0 },
            Message::RoundEnd(mark(0)),
            Message::RoundAck(ack(0)),
            Message::FinalBegin { round: 1 },
            Message::FinalEnd { mark: mark(1), lagging: 0 },
            Message::FinalAck(ack(1)),
            Message::Resume,
            Message::Ping { nonce: 9 },
            Message::Pong { nonce: 9 },
            Message::Bye,
        ]
        .iter()
        .map(|message| encode(message).unwrap())
        .collect();
        let mut rng = XorShift(0x5eed_0002_beef_cafe);
        let mut decoded = 0;
        for run in 0..4000 {
            let mut data = Vec::new();
            for step in 0..rng.below(30) {
                // In the order of a migration, or in any.
                let number = if run % 2 == 0 { step % messages.len() } else { rng.below(messages.len()) };
                let mut bytes = messages[number].clone();
                if rng.below(10) == 0 {
                    let at = rng.below(bytes.len());
                    bytes[at] = rng.below(256) as u8;
                }
                message(&bytes);
                data.extend([(rng.below(4) | rng.below(3) << 4) as u8, bytes.len() as u8]);
                data.extend(bytes);
                if rng.below(4) == 0 {
                    data.extend([rng.below(256) as u8, 0]);
                }
            }
            decoded += conversation(&data);
        }
        assert!(decoded > 20_000, "{decoded}");
    }
}
