//! A hostile guest on a real socket of the real daemon, while honest guests carry traffic: every class of malformed ring and
//! message that vhost back ends have fallen to. The switch counts it, stops at most that port with a status that says why,
//! and the others go on.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#[path = "../../vhost/tests/session_support/mod.rs"]
mod frontend;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use ferry_tests::{Ferryd, FerrydBuilder, Outcome, Port, Scratch, TestpmdBuilder, VirtioUser, wait};
use frontend::{
    GET_INFLIGHT_FD, GUEST_BASE, LOG_ALL, MEMORY_BYTES, PROTOCOL, Peer, RING_STRIDE, SET_FEATURES, SET_LOG_BASE,
    SET_VRING_NUM, VERSION_1, memfd, state, words,
};

const CSUM: u64 = 1;
const INDIRECT: u64 = 1 << 28;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE: u16 = 4;
/// Where buffers begin, bytes from the start of guest memory.
const BUFFERS: u64 = 0x10_0000;
const PATIENCE: Duration = Duration::from_secs(20);

/// What the switch must make of it.
enum Expect {
    /// The frame is dropped under this name; the port goes on.
    Drop(&'static str),
    /// The port stops, and its status holds these words.
    Fault(&'static str),
    /// The frame is fine, however odd.
    Pass,
}
use Expect::{Drop, Fault, Pass};

/// Writes descriptor `slot` of the table at `table`, bytes from the start of guest memory.
fn descriptor(memory: &File, table: u64, slot: u64, addr: u64, len: u32, flags: u16, next: u16) {
    let bytes = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
    memory.write_all_at(&bytes, table + slot * 16).unwrap();
}

/// A descriptor of the guest's transmit ring, over buffer bytes.
fn tx(memory: &File, slot: u64, offset: u64, len: u32, flags: u16, next: u16) {
    descriptor(memory, RING_STRIDE, slot, GUEST_BASE + BUFFERS + offset, len, flags, next);
}

/// Makes `heads` available in ring `index` and sets its index to `to`.
fn offer(memory: &File, index: u64, heads: &[u16], to: u16) {
    let at = index * RING_STRIDE + 0x4000;
    for (i, head) in heads.iter().enumerate() {
        memory.write_all_at(&head.to_le_bytes(), at + 4 + 2 * i as u64).unwrap();
    }
    memory.write_all_at(&to.to_le_bytes(), at + 2).unwrap();
}

/// A broadcast frame behind an empty virtio-net header, at the start of the buffers.
fn frame(memory: &File, header: [u8; 12]) {
    let mut bytes = header.to_vec();
    bytes.extend([0xff; 6]);
    bytes.extend([0x02, 0, 0, 0, 0, 0x66, 0x88, 0xb5]);
    bytes.resize(12 + 60, 0);
    memory.write_all_at(&bytes, BUFFERS).unwrap();
}

type Prepare = fn(&File);

/// Name, features beyond the basic ones, what the guest does, what must follow.
fn ring_cases() -> Vec<(&'static str, u64, Prepare, Expect)> {
    vec![
        ("unmapped address", 0, |m| descriptor(m, RING_STRIDE, 0, 1 << 40, 72, 0, 0), Drop("rx_bad_descriptor")),
        ("wrapping address", 0, |m| descriptor(m, RING_STRIDE, 0, u64::MAX - 10, 72, 0, 0), Drop("rx_bad_descriptor")),
        ("past the end of memory", 0, |m| tx(m, 0, MEMORY_BYTES - BUFFERS - 8, 72, 0, 0), Drop("rx_bad_descriptor")),
        ("zero length", 0, |m| tx(m, 0, 0, 0, 0, 0), Drop("rx_bad_descriptor")),
        ("header cut short", 0, |m| tx(m, 0, 0, 5, 0, 0), Drop("rx_bad_descriptor")),
        ("buffer for the device to write", 0, |m| tx(m, 0, 0, 72, WRITE, 0), Drop("rx_bad_descriptor")),
        (
            "descriptor loop",
            0,
            |m| {
                tx(m, 0, 0, 40, NEXT, 1);
                tx(m, 1, 40, 32, NEXT, 0);
            },
            Fault("loops"),
        ),
        ("next outside the table", 0, |m| tx(m, 0, 0, 40, NEXT, 300), Fault("outside its table")),
        (
            "indirect in indirect",
            INDIRECT,
            |m| {
                tx(m, 0, 0x1000, 32, TABLE, 0);
                descriptor(m, BUFFERS + 0x1000, 0, GUEST_BASE + BUFFERS, 72, TABLE, 0);
            },
            Fault("indirect"),
        ),
        ("head outside the table", 0, |m| offer(m, 1, &[999], 1), Fault("outside the table")),
        ("available index jumps", 0, |m| offer(m, 1, &[0], 5000), Fault("jumped")),
        (
            "header spanning descriptors",
            0,
            |m| {
                frame(m, [0; 12]);
                tx(m, 0, 0, 5, NEXT, 1);
                tx(m, 1, 5, 9, NEXT, 2);
                tx(m, 2, 14, 58, 0, 0);
            },
            Pass,
        ),
        (
            "csum_start beyond the packet",
            CSUM,
            |m| {
                frame(m, [1, 0, 0, 0, 0, 0, 0x88, 0x13, 16, 0, 0, 0]);
                tx(m, 0, 0, 72, 0, 0);
            },
            Drop("rx_bad_offload"),
        ),
        (
            "segmentation without checksum",
            CSUM,
            |m| {
                frame(m, [0, 1, 54, 0, 100, 0, 0, 0, 0, 0, 0, 0]);
                tx(m, 0, 0, 72, 0, 0);
            },
            Drop("rx_bad_offload"),
        ),
    ]
}

struct Scene {
    ferryd: Ferryd,
    scratch: Scratch,
}

impl Scene {
    fn attach(&self, features: u64, memory: &File) -> Peer {
        let socket = self.scratch.join("evil.sock");
        let mut peer = Peer::connect(&socket);
        peer.start(PROTOCOL | VERSION_1 | features, memory, 1);
        peer
    }

    fn detail(&self) -> String {
        self.ferryd.json(&["port", "show", "evil"]).map_or_else(|e| format!("{e:#}"), |v| v.to_string())
    }

    fn drops(&self, reason: &str) -> u64 {
        let stats = self.ferryd.stats().unwrap();
        stats.port("evil").received().dropped.get(reason).copied().unwrap_or(0)
    }

    /// Frames of the hostile port that were found sound (whether or not the flooded outputs had room for them).
    fn sound(&self) -> u64 {
        let rx = self.ferryd.stats().unwrap().port("evil").received();
        let unsound = rx.dropped.iter().filter(|(reason, _)| reason.starts_with("rx_")).map(|(_, n)| n);
        rx.frames - unsound.sum::<u64>()
    }

    /// The honest ports exchange frames, right now.
    fn others_go_on(&self, case: &str) -> Outcome {
        let sent = || self.ferryd.stats().map(|s| s.port("a").tx.frames.min(s.port("b").tx.frames)).unwrap_or(0);
        let before = sent();
        wait::until(&format!("traffic of others after: {case}"), PATIENCE, || sent() > before + 1000)?;
        Ok(())
    }

    /// The port takes a well-behaved guest again.
    fn serves_again(&self, case: &str) -> Outcome {
        let memory = memfd(MEMORY_BYTES);
        let _peer = self.attach(0, &memory);
        self.ferryd.wait_state(&["evil"], "up")?;
        let before = self.sound();
        frame(&memory, [0; 12]);
        tx(&memory, 0, 0, 72, 0, 0);
        offer(&memory, 1, &[0], 1);
        wait::until(&format!("an honest frame after: {case}"), PATIENCE, || self.sound() == before + 1)?;
        Ok(())
    }
}

#[test]
fn every_class_of_hostile_guest_harms_only_itself() -> Outcome {
    let scratch = Scratch::new()?;
    let sockets = ["a", "b", "evil"].map(|n| (n, scratch.join(format!("{n}.sock"))));
    let mut builder = FerrydBuilder::new();
    for (name, socket) in &sockets {
        builder = builder.port(Port::vhost(name, socket));
    }
    let ferryd = builder.start()?;
    let client = |socket: &Path, n| VirtioUser::new(socket, n);
    let mut honest = TestpmdBuilder::new()
        .port(&client(&sockets[0].1, 1))
        .port(&client(&sockets[1].1, 2))
        .arg("--forward-mode=flowgen")
        .start(scratch.path())?;
    ferryd.wait_state(&["a", "b"], "up")?;
    honest.start()?;
    let scene = Scene { ferryd, scratch };
    scene.others_go_on("start")?;

    for (case, features, prepare, expect) in ring_cases() {
        eprintln!("{case}");
        let memory = memfd(MEMORY_BYTES);
        frame(&memory, [0; 12]);
        let reason = if let Drop(reason) = expect { reason } else { "" };
        let (dropped, sound) = (scene.drops(reason), scene.sound());
        let peer = scene.attach(features, &memory);
        scene.ferryd.wait_state(&["evil"], "up")?;
        // Some cases offer by themselves; the others offer descriptor 0.
        prepare(&memory);
        let mut index = [0; 2];
        memory.read_exact_at(&mut index, RING_STRIDE + 0x4000 + 2).unwrap();
        if index == [0; 2] {
            offer(&memory, 1, &[0], 1);
        }
        match expect {
            Drop(reason) => wait::until(&format!("{case} counted"), PATIENCE, || scene.drops(reason) == dropped + 1)?,
            Pass => wait::until(&format!("{case} taken"), PATIENCE, || scene.sound() == sound + 1)?,
            Fault(text) => {
                scene.ferryd.wait_state(&["evil"], "fault")?;
                let detail = scene.detail();
                assert!(detail.contains(text), "{case}: {detail}");
            }
        }
        scene.others_go_on(case)?;
        drop(peer);
        scene.serves_again(case)?;
    }

    buffers_that_cannot_be_written(&scene)?;
    rewritten_while_read(&scene)?;
    truncated(&scene)?;
    messages(&scene)?;
    honest.stop()?;
    scene.ferryd.check_ledger()?;
    Ok(())
}

/// Receive buffers that are not for the device: what others send is refused by this port, and counted.
fn buffers_that_cannot_be_written(scene: &Scene) -> Outcome {
    let memory = memfd(MEMORY_BYTES);
    let _peer = scene.attach(0, &memory);
    scene.ferryd.wait_state(&["evil"], "up")?;
    let refused = || {
        let stats = scene.ferryd.stats().unwrap();
        stats.port("evil").tx.refused.get("tx_bad_descriptor").copied().unwrap_or(0)
    };
    let before = refused();
    descriptor(&memory, 0, 0, GUEST_BASE + BUFFERS, 2048, 0, 0);
    offer(&memory, 0, &[0; 64], 64);
    wait::until("read-only receive buffers refused", PATIENCE, || refused() > before)?;
    scene.others_go_on("read-only receive buffers")
}

/// Rings and descriptors change at random under the switch for a second.
fn rewritten_while_read(scene: &Scene) -> Outcome {
    let memory = memfd(MEMORY_BYTES);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..4 {
        let peer = scene.attach(INDIRECT, &memory);
        let end = Instant::now() + Duration::from_millis(250);
        while Instant::now() < end {
            let mut noise = [0u8; 64];
            for b in &mut noise {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                *b = (seed >> 32) as u8;
            }
            memory.write_all_at(&noise, seed % (2 * RING_STRIDE)).unwrap();
        }
        drop(peer);
        memory.write_all_at(&vec![0; 2 * RING_STRIDE as usize], 0).unwrap();
        scene.serves_again("rings rewritten at random")?;
    }
    scene.others_go_on("rings rewritten at random")
}

/// The memory file shrinks after it was mapped: SIGBUS in the switch, caught.
fn truncated(scene: &Scene) -> Outcome {
    let memory = memfd(MEMORY_BYTES);
    let peer = scene.attach(0, &memory);
    scene.ferryd.wait_state(&["evil"], "up")?;
    memory.set_len(0).unwrap();
    scene.ferryd.wait_state(&["evil"], "fault")?;
    let detail = scene.detail();
    assert!(detail.contains("truncated"), "{detail}");
    scene.others_go_on("memory truncated")?;
    drop(peer);
    scene.serves_again("memory truncated")
}

/// Messages that lie: each is refused or ends the session, and the next one is served.
fn messages(scene: &Scene) -> Outcome {
    let socket = scene.scratch.join("evil.sock");
    let memory = memfd(MEMORY_BYTES);
    let small = memfd(4096);
    // A log that is smaller than the memory needs, one whose offset overflows, and one that the file does not hold.
    for (case, log) in [
        ("small log", words(&[1, 0])),
        ("log offset overflows", words(&[4096, u64::MAX - 4095])),
        ("log file too short", words(&[1 << 30, 0])),
    ] {
        let mut peer = scene.attach(LOG_ALL, &memory);
        peer.send_fds(SET_LOG_BASE, 0, &log, &[small.as_raw_fd()]);
        let answer = peer.receive();
        assert!(peer.is_closed() || answer.is_ok_and(|r| !r.payload.is_empty()), "{case}");
        drop(peer);
        scene.serves_again(case)?;
        scene.others_go_on(case)?;
    }
    // Ring sizes that cannot be, again and again.
    let mut peer = Peer::connect(&socket);
    peer.greet();
    peer.send(SET_FEATURES, &words(&[PROTOCOL | VERSION_1]));
    for n in 0..500u32 {
        assert_ne!(peer.ack(SET_VRING_NUM, &state(n % 4, if n % 2 == 0 { 0 } else { 0x10000 + n })), 0);
    }
    drop(peer);
    // In-flight buffers are not offered: asking for them, often, gains nothing.
    for _ in 0..20 {
        let mut peer = Peer::connect(&socket);
        peer.greet();
        peer.send(GET_INFLIGHT_FD, &words(&[1 << 40, 0, 0]));
        let _ = peer.receive();
    }
    // More descriptors than any message carries.
    let many = vec![small.as_raw_fd(); 200];
    for _ in 0..20 {
        let mut peer = Peer::connect(&socket);
        let _ = peer.raw(&frontend::encode(1, 1, &[]), &many);
        let _ = peer.receive();
    }
    scene.serves_again("floods of messages")?;
    scene.others_go_on("floods of messages")
}
