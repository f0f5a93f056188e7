//! The two machines face to face without a simulator: what a story does not show.
use std::sync::Arc;

use ferry_dataplane::conntrack::{Change, ConnMap, ConnTable, Connection, Imported, Key, newer, sample};
use ferry_migrate::batch::{Batch, Digest, Item};
use ferry_migrate::destination::{self, Destination, DestinationLimits};
use ferry_migrate::message::{
    Abilities, AbortReason, Ack, Began, HelloReply, List, MAGIC, Mark, Message, Name, Note, Offer, Refuse, RefuseCode,
    WhenLate,
};
use ferry_migrate::rounds::{RoundLimits, Rounds};
use ferry_migrate::source::{self, Release, Source, SourceIdentity, SourceLimits};
use ferry_migrate::table::TargetTable;
use proptest::prelude::*;

const CAPACITY: u32 = 4096;

fn map(entries: u32) -> Arc<ConnMap> {
    let map = ConnMap::new(CAPACITY, [1, 2]).unwrap();
    for n in 0..entries {
        map.handle(&(), 0).insert(&sample(n), 0).unwrap();
    }
    Arc::new(map)
}

fn touch(map: &ConnMap, n: u32, change: Change) {
    let mut handle = map.handle(&(), 0);
    let mut connection = handle.lookup(&sample(n).key, 0).unwrap();
    connection.refresh(0, 3_600_000);
    handle.update(&connection, change);
}

fn remove(map: &ConnMap, n: u32) {
    let mut handle = map.handle(&(), 0);
    let connection = handle.lookup(&sample(n).key, 0).unwrap();
    handle.remove(&connection);
}

/// Runs one round to its end.
fn round(rounds: &mut Rounds, map: &ConnMap, last: bool) -> Vec<Item> {
    round_at(0, rounds, map, last)
}

fn round_at(now_ms: u64, rounds: &mut Rounds, map: &ConnMap, last: bool) -> Vec<Item> {
    let mut items = Vec::new();
    rounds.begin(last, now_ms);
    while !rounds.is_done() {
        rounds.drain(map);
        while let Some(batch) = rounds.next_batch(map, 100, usize::MAX) {
            items.extend(batch.items);
        }
    }
    rounds.end();
    rounds.acknowledged(now_ms + 10);
    items
}

fn connections(items: &[Item]) -> Vec<Key> {
    let mut keys: Vec<Key> = items
        .iter()
        .filter_map(|item| match item {
            Item::Connection(c) => Some(c.key),
            Item::Tombstone { .. } | Item::Lapsed { .. } => None,
        })
        .collect();
    keys.sort_unstable();
    keys
}

fn keys(numbers: &[u32]) -> Vec<Key> {
    let mut keys: Vec<Key> = numbers.iter().map(|&n| sample(n).key).collect();
    keys.sort_unstable();
    keys
}

fn tracked(entries: u32, limits: RoundLimits) -> (Arc<ConnMap>, Rounds) {
    let map = map(entries);
    map.set_tracking(true);
    (map, Rounds::new(limits))
}

#[test]
fn what_changes_every_round_waits_for_the_last_or_for_its_rest() {
    let (map, mut rounds) = tracked(100, RoundLimits::default());
    assert_eq!(round(&mut rounds, &map, false).len(), 100);
    touch(&map, 1, Change::Semantic);
    touch(&map, 2, Change::Semantic);
    touch(&map, 3, Change::Semantic);
    assert_eq!(connections(&round(&mut rounds, &map, false)), keys(&[1, 2, 3]), "for the first time");
    touch(&map, 1, Change::Semantic);
    touch(&map, 2, Change::Semantic);
    assert_eq!(connections(&round(&mut rounds, &map, false)), [], "for the second time running");
    assert_eq!(rounds.estimate(&*map).final_entries, 2);
    touch(&map, 1, Change::Semantic);
    assert_eq!(connections(&round(&mut rounds, &map, false)), keys(&[2]), "the second has come to rest");
    // It goes and comes back while held back.
    remove(&map, 1);
    map.handle(&(), 0).insert(&sample(1), 0).unwrap();
    let items = round(&mut rounds, &map, false);
    let back = map.get(&sample(1).key).unwrap();
    assert!(items.contains(&Item::Connection(back)), "{items:?}");
    touch(&map, 4, Change::Semantic);
    round(&mut rounds, &map, false);
    touch(&map, 4, Change::Semantic);
    touch(&map, 5, Change::Semantic);
    assert_eq!(connections(&round(&mut rounds, &map, false)), keys(&[5]));
    touch(&map, 6, Change::Bookkeeping);
    remove(&map, 7);
    let last = round(&mut rounds, &map, true);
    assert_eq!(connections(&last), keys(&[4, 6]));
    assert_eq!(last.len(), 3, "and a tombstone");
    assert_eq!(rounds.estimate(&*map).final_entries, 0);
}

#[test]
fn entries_that_lag_all_the_time_are_sent_now_and_then_and_in_the_end() {
    let limits = RoundLimits { lagging_interval_ms: 1000, ..RoundLimits::default() };
    let (map, mut rounds) = tracked(2000, limits);
    assert_eq!(round_at(0, &mut rounds, &map, false).len(), 2000);
    let busy = |map: &ConnMap, entries: u32| (0..entries).for_each(|n| touch(map, n, Change::Bookkeeping));
    let mut sent = |now_ms: u64, last: bool| round_at(now_ms, &mut rounds, &map, last).len();
    busy(&map, 100);
    assert_eq!(sent(100, false), 100, "the first pass");
    for now_ms in [200, 300, 400] {
        busy(&map, 100);
        assert_eq!(sent(now_ms, false), 0, "they would lag again");
    }
    // Others lag, too, and may go on without traffic.
    busy(&map, 1000);
    assert_eq!(sent(500, false), 1000);
    busy(&map, 100);
    assert_eq!(sent(600, false), 0);
    busy(&map, 150);
    assert_eq!(sent(1400, false), 0);
    assert_eq!(sent(1500, false), 150, "too long ago");
    busy(&map, 100);
    assert_eq!(sent(1600, false), 0);
    busy(&map, 120);
    assert_eq!(sent(1700, true), 120, "all in the end");
    // A pass that does not fit into a round goes on in the next.
    let (map, mut rounds) = tracked(2000, RoundLimits { lagging_per_round: 100, batch_items: 64, ..limits });
    assert_eq!(round_at(0, &mut rounds, &map, false).len(), 2000);
    busy(&map, 500);
    let passes: usize = (1..=8).map(|n| round_at(n * 10, &mut rounds, &map, false).len()).sum();
    assert_eq!(passes, 500);
}

#[test]
fn lists_are_bounded_and_nothing_is_lost_by_it() {
    let limits = RoundLimits {
        hot_entries: 3,
        tombstones: 4,
        lagging_per_round: 2,
        batch_items: 7,
        hot_after: 1,
        ..RoundLimits::default()
    };
    let (map, mut rounds) = tracked(200, limits);
    assert_eq!(round(&mut rounds, &map, false).len(), 200);
    for n in 0..20 {
        touch(&map, n, Change::Semantic);
    }
    for n in 30..60 {
        remove(&map, n);
    }
    let mut items = round(&mut rounds, &map, false);
    assert!(rounds.memory_bytes() < 16 * 1024, "{}", rounds.memory_bytes());
    items.extend(round(&mut rounds, &map, true));
    let mut changed = connections(&items);
    changed.dedup();
    assert_eq!(changed, keys(&(0..20).collect::<Vec<_>>()));
    assert_eq!(items.iter().filter(|item| matches!(item, Item::Tombstone { .. })).count(), 30);
}

#[test]
fn lost_deletions_begin_everything_anew() {
    let (map, mut rounds) = tracked(1000, RoundLimits::default());
    round(&mut rounds, &map, false);
    // More than one per 64 connections of the capacity.
    for n in 0..500 {
        remove(&map, n);
    }
    rounds.drain(&*map);
    assert_eq!((rounds.restarts(), rounds.is_complete()), (1, false));
    rounds.begin(true, 0);
    let first = rounds.next_batch(&*map, 100, usize::MAX).unwrap();
    assert!(first.clear);
    let mut items = first.items.len();
    while let Some(batch) = rounds.next_batch(&*map, 10_000, usize::MAX) {
        assert!(!batch.clear);
        items += batch.items.len();
    }
    assert_eq!(items, 500);
    assert!(rounds.is_done());
}

// ---- the machines

#[derive(Clone)]
struct Table(Arc<ConnMap>);

impl TargetTable for Table {
    fn accepts(&self, connection: &Connection) -> bool {
        connection.key.remote_port < 2000
    }

    fn import(&self, connection: &Connection, now_ms: u64) -> Imported {
        self.0.import(connection, now_ms, &())
    }

    fn delete(&self, key: &Key, version: u32) -> bool {
        self.0.delete_matching(key, version, &())
    }

    fn has(&self, key: &Key) -> bool {
        self.0.get(key).is_some()
    }

    fn clear(&self) {
        let mut cursor = Default::default();
        while self.0.flush(&mut cursor, 4096, &(), &mut |_| true) {}
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn capacity(&self) -> u32 {
        self.0.capacity()
    }
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn offer(when_late: WhenLate) -> Offer {
    Offer { vm: name("vm"), nics: List::default(), capacity: CAPACITY, entries: 0, when_late }
}

fn new_source(limits: SourceLimits, map: &Arc<ConnMap>) -> Source<Arc<ConnMap>> {
    let identity = SourceIdentity { host: name("a"), abilities: Abilities::default(), vm: offer(WhenLate::FailOpen) };
    Source::new(limits, identity, Arc::clone(map))
}

/// Hands events to a source and says what it wants.
fn tell(source: &mut Source<Arc<ConnMap>>, now_ms: u64, events: Vec<source::Event>) -> Vec<source::Action> {
    let mut out = Vec::new();
    for event in events {
        source.handle(event, now_ms, &mut out);
    }
    out
}

fn copying(limits: SourceLimits, map: &Arc<ConnMap>) -> Source<Arc<ConnMap>> {
    let mut source = new_source(limits, map);
    let reply = HelloReply { magic: MAGIC, version: 1, capabilities: 7, host: name("b") };
    tell(
        &mut source,
        0,
        vec![
            source::Event::LogOn,
            source::Event::Connected,
            source::Event::Message(Message::HelloReply(reply)),
            source::Event::Message(Message::Accept { capacity: CAPACITY }),
        ],
    );
    map.set_tracking(true);
    tell(&mut source, 0, vec![source::Event::Tracking]);
    source
}

#[test]
fn the_rate_is_kept_while_the_vm_runs_and_no_longer() {
    let map = map(4000);
    let limits = SourceLimits { bytes_per_ms: 2000, ..SourceLimits::default() };
    let mut source = copying(limits, &map);
    let room_bytes = usize::MAX;
    let sent = |actions: &[source::Action]| -> usize {
        actions
            .iter()
            .map(|action| match action {
                source::Action::SendBatch(batch) => batch.wire_bytes(),
                _ => 0,
            })
            .sum()
    };
    let mut total = 0;
    for now_ms in 1..=100 {
        total += sent(&tell(&mut source, now_ms, vec![source::Event::Tick { room_bytes }]));
        assert!(total <= 2000 * now_ms as usize, "{total} bytes after {now_ms} ms");
    }
    assert!(total > 150_000, "{total}");
    let mut last = tell(&mut source, 101, vec![source::Event::Stopped]);
    while source.next_tick_ms(101) == Some(101) {
        last.extend(tell(&mut source, 101, vec![source::Event::Tick { room_bytes }]));
    }
    assert!(total + sent(&last) > 4000 * ferry_migrate::batch::CONNECTION_BYTES, "the rest at once");
    assert!(matches!(last.last(), Some(source::Action::Send(Message::FinalEnd { .. }))));
}

fn releases(actions: &[source::Action]) -> Vec<Release> {
    actions
        .iter()
        .filter_map(|action| match action {
            source::Action::Release(why) => Some(*why),
            _ => None,
        })
        .collect()
}

#[test]
fn a_reply_is_held_for_a_migration_alone_and_released_once() {
    let tick = || source::Event::Tick { room_bytes: usize::MAX };
    let map = map(10);
    let mut source = new_source(SourceLimits::default(), &map);
    let out = tell(&mut source, 0, vec![source::Event::Stopped, source::Event::ReplyHeld]);
    assert_eq!(releases(&out), [Release::Unrelated]);
    // The destination is silent.
    let mut source = copying(SourceLimits::default(), &map);
    assert!(releases(&tell(&mut source, 100, vec![source::Event::Stopped, source::Event::ReplyHeld])).is_empty());
    assert_eq!(source.state(), source::State::Frozen);
    assert!(releases(&tell(&mut source, 149, vec![tick()])).is_empty());
    assert_eq!(source.next_tick_ms(149), Some(150));
    assert_eq!(releases(&tell(&mut source, 150, vec![tick()])), [Release::Expired]);
    assert!(releases(&tell(&mut source, 200, vec![tick(), source::Event::Disconnected])).is_empty());
    // It breaks off while the reply is held.
    let mut source = copying(SourceLimits::default(), &map);
    tell(&mut source, 100, vec![source::Event::Stopped, source::Event::ReplyHeld]);
    assert_eq!(releases(&tell(&mut source, 101, vec![source::Event::Disconnected])), [Release::Failed]);
    // The same straight after the VM ran on: not before the fence.
    let mut source = copying(SourceLimits::default(), &map);
    tell(&mut source, 100, vec![source::Event::Stopped, source::Event::Kick, source::Event::Disconnected]);
    let out = tell(&mut source, 110, vec![source::Event::Stopped, source::Event::ReplyHeld]);
    assert!(releases(&out).is_empty());
    assert_eq!(source.next_tick_ms(110), Some(145));
    assert!(releases(&tell(&mut source, 144, vec![tick()])).is_empty());
    assert_eq!(releases(&tell(&mut source, 145, vec![tick()])), [Release::Failed]);
}

type Actions = Vec<destination::Action<Table>>;

fn hear(destination: &mut Destination<Table>, now_ms: u64, events: Vec<destination::Event<Table>>) -> Actions {
    let mut out = Vec::new();
    for event in events {
        destination.handle(event, now_ms, &mut out);
    }
    out
}

fn greet(peer: &str, when_late: WhenLate) -> Vec<destination::Event<Table>> {
    let hello = Abilities::default().hello(name(peer));
    vec![
        destination::Event::Connected { peer: name(peer) },
        destination::Event::Message(Message::Hello(hello)),
        destination::Event::Message(Message::Offer(offer(when_late))),
    ]
}

fn staging(limits: DestinationLimits) -> (Destination<Table>, Arc<ConnMap>) {
    let mut destination = Destination::new(limits, name("b"), Abilities::default(), false);
    let map = map(0);
    hear(&mut destination, 0, greet("a", WhenLate::FailOpen));
    let table = Table(Arc::clone(&map));
    hear(&mut destination, 0, vec![destination::Event::Admitted { table, when_late: WhenLate::FailOpen }]);
    assert_eq!(destination.state(), destination::State::Staging);
    (destination, map)
}

fn refusal(actions: &Actions) -> Option<RefuseCode> {
    actions.iter().find_map(|action| match action {
        destination::Action::Send(Message::Refuse(refuse)) => Some(refuse.code),
        _ => None,
    })
}

#[test]
fn who_may_not_send_is_refused_and_harms_nobody() {
    // Denied by configuration.
    let mut destination =
        Destination::<Table>::new(DestinationLimits::default(), name("b"), Abilities::default(), false);
    let out = hear(&mut destination, 0, greet("a", WhenLate::FailOpen));
    assert!(out.iter().any(|action| matches!(action, destination::Action::Judge { peer, .. } if peer.as_str() == "a")));
    let refuse = Refuse { code: RefuseCode::Unauthorized, note: Note::default() };
    let out = hear(&mut destination, 0, vec![destination::Event::Denied(refuse)]);
    assert_eq!(refusal(&out), Some(RefuseCode::Unauthorized));
    assert_eq!(destination.state(), destination::State::Empty);
    // Batches before anything was agreed on.
    let batch = Batch { round: 0, sequence: 0, clear: false, items: vec![Item::Connection(sample(1))] };
    hear(&mut destination, 0, vec![destination::Event::Connected { peer: name("x") }]);
    let out = hear(&mut destination, 0, vec![destination::Event::Batch(batch)]);
    assert!(out.iter().any(|action| matches!(action, destination::Action::Send(Message::Abort { .. }))));
    // Another host, while one's migration is under way: that goes on, for its own host.
    let (mut destination, _) = staging(DestinationLimits::default());
    let end = Mark { round: 0, batches: 0, items: 0, digest: Digest::default().value() };
    let first = [Message::RoundBegin { round: 0 }, Message::RoundEnd(end)].map(destination::Event::Message);
    hear(&mut destination, 0, first.into());
    hear(&mut destination, 1, vec![destination::Event::Disconnected]);
    assert_eq!(refusal(&hear(&mut destination, 2, greet("x", WhenLate::FailOpen))), Some(RefuseCode::Busy));
    assert_eq!(destination.staged(), Some((0, true)));
    assert_eq!(refusal(&hear(&mut destination, 3, greet("a", WhenLate::FailOpen))), None);
    // A VM that runs here.
    let mut destination =
        Destination::<Table>::new(DestinationLimits::default(), name("b"), Abilities::default(), true);
    assert_eq!(refusal(&hear(&mut destination, 0, greet("a", WhenLate::FailOpen))), Some(RefuseCode::Running));
}

#[test]
fn connections_of_others_are_counted_and_left_out() {
    let (mut destination, table) = staging(DestinationLimits::default());
    let items = [1, 2, 2000, 2001].map(|n| Item::Connection(sample(n))).to_vec();
    let batch = Batch { round: 0, sequence: 0, clear: false, items };
    let mut digest = Digest::default();
    digest.add(&batch);
    let mark = Mark { round: 0, batches: 1, items: 4, digest: digest.value() };
    let out = hear(
        &mut destination,
        1,
        vec![
            destination::Event::Message(Message::FinalBegin { round: 0 }),
            destination::Event::Message(Message::FinalEnd { mark, lagging: 0 }),
            destination::Event::Batch(batch),
        ],
    );
    let ack = Ack { round: 0, digest: mark.digest, entries: 2, refused: 2, dropped: 0 };
    assert!(out.iter().any(|action| matches!(action, destination::Action::Send(Message::FinalAck(a)) if *a == ack)));
    assert_eq!((table.len(), destination.counts().refused), (2, 2));
    assert_eq!(destination.state(), destination::State::Committed);
    // The VM comes: it has all; later than that without a word of the source: who knows.
    let out = hear(&mut destination, 20, vec![destination::Event::Kick]);
    let began = out.iter().find_map(|action| match action {
        destination::Action::Activate { began, liberal } => Some((*began, *liberal)),
        _ => None,
    });
    assert_eq!(began, Some((Began::Complete, false)));
}

#[test]
fn a_commit_that_nobody_confirms_is_told_as_such_and_forgotten_in_the_end() {
    let commit = || {
        let (mut destination, _) = staging(DestinationLimits::default());
        let mark = Mark { round: 0, batches: 0, items: 0, digest: Digest::default().value() };
        let messages = [Message::FinalBegin { round: 0 }, Message::FinalEnd { mark, lagging: 0 }];
        hear(&mut destination, 100, messages.map(destination::Event::Message).into());
        assert_eq!(destination.state(), destination::State::Committed);
        destination
    };
    let began = |out: &Actions| {
        out.iter().find_map(|action| match action {
            destination::Action::Activate { began, .. } => Some(*began),
            _ => None,
        })
    };
    // Asked, and answered.
    let mut destination = commit();
    assert_eq!(destination.next_tick_ms(), Some(105));
    let out = hear(&mut destination, 120, vec![destination::Event::Tick]);
    assert!(matches!(out.as_slice(), [destination::Action::Send(Message::Ping { nonce: 120 })]));
    hear(&mut destination, 130, vec![destination::Event::Message(Message::Pong { nonce: 120 })]);
    assert_eq!(began(&hear(&mut destination, 150, vec![destination::Event::Kick])), Some(Began::Complete));
    // An answer to what was not asked yet is none.
    let mut destination = commit();
    hear(&mut destination, 120, vec![destination::Event::Tick]);
    hear(&mut destination, 121, vec![destination::Event::Message(Message::Pong { nonce: 10_000 })]);
    assert_eq!(began(&hear(&mut destination, 150, vec![destination::Event::Kick])), Some(Began::Unconfirmed));
    // The channel is gone.
    let mut destination = commit();
    hear(&mut destination, 101, vec![destination::Event::Disconnected]);
    assert_eq!(began(&hear(&mut destination, 102, vec![destination::Event::Kick])), Some(Began::Unconfirmed));
    let mut destination = commit();
    hear(&mut destination, 101, vec![destination::Event::Disconnected]);
    hear(&mut destination, 60_100, vec![destination::Event::Tick]);
    assert_eq!(destination.state(), destination::State::Committed);
    let out = hear(&mut destination, 60_101, vec![destination::Event::Tick]);
    assert!(matches!(out.first(), Some(destination::Action::Withdraw)));
    assert_eq!(destination.state(), destination::State::Empty);
}

#[test]
fn a_batch_after_the_commit_is_faster_than_the_word_that_the_vm_runs_on() {
    let (mut destination, table) = staging(DestinationLimits::default());
    let mark = Mark { round: 0, batches: 0, items: 0, digest: Digest::default().value() };
    let messages = [Message::FinalBegin { round: 0 }, Message::FinalEnd { mark, lagging: 0 }];
    hear(&mut destination, 1, messages.map(destination::Event::Message).into());
    let batch = Batch { round: 1, sequence: 0, clear: false, items: vec![Item::Connection(sample(1))] };
    let mut digest = Digest::default();
    digest.add(&batch);
    let out = hear(&mut destination, 2, vec![destination::Event::Batch(batch)]);
    assert!(matches!(out.as_slice(), [destination::Action::Withdraw]), "no packet sees what is being changed");
    assert_eq!((destination.state(), table.len()), (destination::State::Staging, 1));
    let mark = Mark { round: 1, batches: 1, items: 1, digest: digest.value() };
    let messages = [Message::Resume, Message::RoundBegin { round: 1 }, Message::RoundEnd(mark)];
    let out = hear(&mut destination, 3, messages.map(destination::Event::Message).into());
    assert!(out.iter().any(|action| matches!(action, destination::Action::Send(Message::RoundAck(_)))));
}

#[test]
fn frames_that_wait_are_bounded() {
    let limits = DestinationLimits { waiting_bytes: 1000, waiting_frames: 5, frame_bytes: 400, ..Default::default() };
    let (mut destination, _) = staging(limits);
    let frame = |bytes: usize| destination::Event::LateFrame(vec![7; bytes]);
    hear(&mut destination, 1, vec![frame(0), frame(401), frame(400), frame(400), frame(201), frame(100)]);
    assert_eq!(destination.counts().dropped_frames, 3);
    assert!(destination.memory_bytes() <= 1000);
    let out = hear(&mut destination, 2, vec![destination::Event::Kick]);
    let delivered: Vec<usize> = out
        .iter()
        .filter_map(|action| match action {
            destination::Action::Deliver(frame) => Some(frame.len()),
            _ => None,
        })
        .collect();
    assert_eq!(delivered, [400, 400, 100]);
    assert_eq!(destination.memory_bytes(), 0);
}

#[test]
fn a_real_firewall_counts_what_arrives_and_judges_it_anew() {
    use ferry_dataplane::enforce::{VmFirewall, VmOptions};
    use ferry_migrate::table::Staging;
    let options = VmOptions { capacity: 100, ..VmOptions::named("vm") };
    let firewall = Arc::new(VmFirewall::new(1, &options, [5, 7]).unwrap());
    let staging = Staging::new(Arc::clone(&firewall), Arc::new(|c: &Connection| c.key.local_port == 53));
    let mut connection = sample(1);
    connection.version = 9;
    connection.policy_generation = 77;
    connection.decision = connection.decision.with_allowed();
    assert!(staging.accepts(&connection));
    assert_eq!(staging.import(&connection, 0), Imported::Added);
    assert_eq!(staging.import(&connection, 0), Imported::Older);
    let stored = firewall.map().get(&connection.key).unwrap();
    assert_eq!((stored.version, stored.policy_generation, stored.decision.allowed()), (9, 0, false));
    assert!(stored.decision.counts_half_open(), "a question without an answer");
    assert!(staging.has(&connection.key));
    assert!(!staging.delete(&connection.key, 8) && staging.delete(&connection.key, 9));
    staging.import(&connection, 0);
    staging.clear();
    assert!(staging.is_empty());
}

// ---- whatever the other says

fn marks() -> impl Strategy<Value = Mark> {
    let digest = prop_oneof![Just(Digest::default().value()), any::<u128>()];
    (0..4u32, 0..4u64, 0..8u64, digest).prop_map(|(round, batches, items, digest)| Mark {
        round,
        batches,
        items,
        digest,
    })
}

fn messages() -> impl Strategy<Value = Message> {
    let ack = (0..4u32, prop_oneof![Just(Digest::default().value()), any::<u128>()]).prop_map(|(round, digest)| Ack {
        round,
        digest,
        entries: 1,
        refused: 0,
        dropped: 0,
    });
    let reply = (0..3u16, 0..16u64).prop_map(|(version, capabilities)| HelloReply {
        magic: MAGIC,
        version,
        capabilities,
        host: Name::default(),
    });
    let refuse = Refuse { code: RefuseCode::Busy, note: Note::default() };
    prop_oneof![
        1 => Just(Message::Hello(Abilities::default().hello(Name::default()))),
        3 => reply.prop_map(Message::HelloReply),
        1 => Just(Message::Refuse(refuse)),
        2 => Just(Message::Offer(offer(WhenLate::FailOpen))),
        3 => Just(Message::Accept { capacity: 5 }),
        4 => (0..4u32).prop_map(|round| Message::RoundBegin { round }),
        4 => marks().prop_map(Message::RoundEnd),
        4 => ack.clone().prop_map(Message::RoundAck),
        4 => (0..4u32).prop_map(|round| Message::FinalBegin { round }),
        4 => (marks(), 0..3u32).prop_map(|(mark, lagging)| Message::FinalEnd { mark, lagging }),
        4 => ack.prop_map(Message::FinalAck),
        2 => Just(Message::Resume),
        1 => Just(Message::Abort { reason: AbortReason::Operator, note: Note::default() }),
        1 => Just(Message::Activated { began: Began::Empty }),
        1 => any::<u64>().prop_map(|nonce| Message::Ping { nonce }),
        1 => any::<u64>().prop_map(|nonce| Message::Pong { nonce }),
        1 => Just(Message::Bye),
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Say(Message),
    Batch {
        round: u32,
        sequence: u64,
        clear: bool,
        items: Vec<(u32, u32, bool)>,
    },
    Connect,
    Disconnect,
    Late(usize),
    Wait(u64),
    /// Whatever QEMU and the driver have to tell.
    Local(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let items = proptest::collection::vec((0..3000u32, 0..5u32, any::<bool>()), 0..20);
    let step = prop_oneof![
        12 => messages().prop_map(Step::Say),
        5 => (0..4u32, 0..5u64, prop::bool::weighted(0.1), items)
            .prop_map(|(round, sequence, clear, items)| Step::Batch { round, sequence, clear, items }),
        2 => Just(Step::Connect),
        1 => Just(Step::Disconnect),
        1 => (0..3000usize).prop_map(Step::Late),
        3 => (0..300u64).prop_map(Step::Wait),
        6 => (0..10u8).prop_map(Step::Local),
    ];
    proptest::collection::vec(step, 0..80)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    /// A destination whose peer says anything in any order: memory stays bounded, nothing is committed whose digest is wrong, and when the
    /// peer has gone nothing is left.
    #[test]
    fn a_destination_survives_any_source(steps in steps()) {
        let limits = DestinationLimits { waiting_bytes: 2000, frame_bytes: 1500, crowd: 10, ..Default::default() };
        let mut destination = Destination::<Table>::new(limits, name("b"), Abilities::default(), false);
        let mut now_ms = 0;
        let (mut digest, mut expected) = (Digest::default(), 0);
        let mut staged: Option<Arc<ConnMap>> = None;
        for step in steps {
            now_ms += 1;
            let event = match step {
                Step::Say(message) => destination::Event::Message(message),
                Step::Batch { round, sequence, clear, items } => {
                    let items = items
                        .into_iter()
                        .map(|(n, version, gone)| {
                            let mut connection = sample(n);
                            connection.version = version;
                            if gone { Item::Tombstone { key: connection.key, version } } else { Item::Connection(connection) }
                        })
                        .collect();
                    let batch = Batch { round, sequence, clear, items };
                    if sequence == expected {
                        digest.add(&batch);
                        expected += 1;
                    }
                    destination::Event::Batch(batch)
                }
                Step::Connect => destination::Event::Connected { peer: name("a") },
                Step::Disconnect => destination::Event::Disconnected,
                Step::Late(bytes) => destination::Event::LateFrame(vec![0; bytes]),
                Step::Wait(ms) => {
                    now_ms += ms;
                    destination::Event::Tick
                }
                Step::Local(0) => destination::Event::Kick,
                Step::Local(1) => destination::Event::QemuGone,
                Step::Local(2) => destination::Event::Cancel,
                Step::Local(_) => destination::Event::Tick,
            };
            let mut out = hear(&mut destination, now_ms, vec![event]);
            if out.iter().any(|action| matches!(action, destination::Action::Judge { .. })) {
                let table = map(0);
                staged = Some(Arc::clone(&table));
                (digest, expected) = (Digest::default(), 0);
                let admitted = destination::Event::Admitted { table: Table(table), when_late: WhenLate::FailOpen };
                out.extend(hear(&mut destination, now_ms, vec![admitted]));
            }
            for action in &out {
                if let destination::Action::Send(Message::FinalAck(ack)) = action {
                    prop_assert_eq!(ack.digest, digest.value());
                }
            }
            prop_assert!(destination.memory_bytes() <= 2000 + 10 * 200);
            if let Some(table) = &staged {
                let mut cursor = Default::default();
                let mut foreign = 0;
                while table.walk(&mut cursor, 10_000, &mut |c| foreign += u32::from(c.key.remote_port >= 2000)) {}
                prop_assert_eq!(foreign, 0);
            }
        }
        hear(&mut destination, now_ms, vec![destination::Event::Disconnected]);
        for _ in 0..10 {
            now_ms += 60_000;
            hear(&mut destination, now_ms, vec![destination::Event::Tick]);
        }
        prop_assert_eq!(destination.state(), destination::State::Empty);
        prop_assert_eq!(destination.memory_bytes(), 0);
        drop(destination);
        prop_assert!(staged.is_none_or(|table| Arc::strong_count(&table) == 1), "staged memory is freed");
    }

    /// A source whose peer says anything: its connections stay as they are, no reply is held for longer than the limit, and it comes to
    /// an end.
    #[test]
    fn a_source_survives_any_destination(steps in steps()) {
        let map = map(50);
        let limits = SourceLimits { attempts: 2, ..SourceLimits::default() };
        let mut source = new_source(limits, &map);
        let mut now_ms = 1000;
        let mut held_ms: Option<u64> = None;
        let mut gone = false;
        for step in steps {
            now_ms += 1;
            let events = match step {
                Step::Say(message) => vec![source::Event::Message(message)],
                Step::Batch { .. } | Step::Connect => vec![source::Event::Connected],
                Step::Disconnect => vec![source::Event::Disconnected],
                Step::Late(bytes) => vec![source::Event::LateFrame(vec![0; bytes])],
                Step::Wait(ms) => (0..ms).map(|_| source::Event::Tick { room_bytes: 10_000 }).collect(),
                Step::Local(0 | 1) => vec![source::Event::LogOn],
                Step::Local(2) => vec![source::Event::LogOff],
                Step::Local(3) => vec![source::Event::MemoryRound],
                Step::Local(4) if held_ms.is_none() => {
                    held_ms = Some(now_ms);
                    vec![source::Event::Stopped, source::Event::ReplyHeld]
                }
                Step::Local(5) if held_ms.is_none() => {
                    vec![source::Event::Kick]
                }
                Step::Local(6) if now_ms % 7 == 0 => {
                    held_ms = None;
                    gone = true;
                    vec![source::Event::QemuGone]
                }
                Step::Local(7) => vec![source::Event::Tracking],
                Step::Local(8) => vec![source::Event::Cancel],
                _ => vec![source::Event::Tick { room_bytes: 10_000 }],
            };
            for event in events {
                if matches!(event, source::Event::Tick { .. }) {
                    now_ms += 1;
                }
                let out = tell(&mut source, now_ms, vec![event]);
                for action in out {
                    match action {
                        source::Action::Track(on) => map.set_tracking(on),
                        source::Action::Release(_) => {
                            let since_ms = held_ms.take();
                            prop_assert!(since_ms.is_some_and(|ms| now_ms <= ms + limits.hold_limit_ms + 1));
                        }
                        source::Action::Forget => prop_assert!(gone),
                        _ => {}
                    }
                }
            }
            prop_assert_eq!(source.is_holding(), held_ms.is_some());
            // A driver ticks.
            if let Some(ms) = held_ms && now_ms >= ms + limits.hold_limit_ms {
                let out = tell(&mut source, now_ms, vec![source::Event::Tick { room_bytes: 0 }]);
                prop_assert_eq!(releases(&out).len(), 1);
                for action in out {
                    if let source::Action::Track(on) = action {
                        map.set_tracking(on);
                    }
                }
                held_ms = None;
            }
        }
        prop_assert_eq!(map.len(), 50);
        for n in 0..50 {
            let mut expected = sample(n);
            let found = map.get(&expected.key).unwrap();
            prop_assert!(newer(found.version, 0));
            expected.version = found.version;
            prop_assert_eq!(found, expected);
        }
        for _ in 0..100 {
            now_ms += 1000;
            for action in tell(&mut source, now_ms, vec![source::Event::Tick { room_bytes: 10_000 }]) {
                if let source::Action::Track(on) = action {
                    map.set_tracking(on);
                }
            }
        }
        prop_assert!(!source.is_migrating() && !source.is_holding());
        prop_assert!(!map.is_tracking());
    }
}
