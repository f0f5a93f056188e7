//! A second real client: DPDK's virtio-user driver, in every ring flavour and both socket roles. Every frame that it says it
//! sent must be in the switch's ledger, and every frame that the switch says it delivered must have arrived.
use anyhow::Context;
use ferry_tests::{FerrydBuilder, Outcome, Port, Scratch, TestpmdBuilder, VirtioUser, wait};
use std::path::Path;
use std::time::Duration;

/// One flavour of the driver.
#[derive(Clone, Copy, Debug)]
struct Flavour {
    packed: u32,
    mergeable: u32,
    in_order: u32,
    queues: u16,
    /// testpmd listens, the switch connects.
    listens: bool,
}

/// Sender and receiver of the same flavour; the sender's frames go to the receiver's address.
fn stream(flavour: Flavour) -> Outcome {
    let scratch = Scratch::new()?;
    let (tx_socket, rx_socket) = (scratch.join("tx.sock"), scratch.join("rx.sock"));
    let port = |name: &str, socket: &Path| {
        let p = Port::vhost(name, socket).key("queue_pairs", &flavour.queues.to_string());
        if flavour.listens { p.connects() } else { p }
    };
    let client = |socket: &Path, number: u8| {
        let v = VirtioUser::new(socket, number)
            .queues(flavour.queues)
            .option("packed_vq", flavour.packed)
            .option("mrg_rxbuf", flavour.mergeable)
            .option("in_order", flavour.in_order);
        if flavour.listens { v.option("server", 1) } else { v }
    };
    let ferryd = FerrydBuilder::new().port(port("tx", &tx_socket)).port(port("rx", &rx_socket)).start()?;
    let mut receiver =
        TestpmdBuilder::new().port(&client(&rx_socket, 2)).arg("--forward-mode=rxonly").start(scratch.path())?;
    let mut sender = TestpmdBuilder::new()
        .port(&client(&tx_socket, 1))
        .arg("--forward-mode=txonly")
        .arg("--txonly-multi-flow")
        .arg("--eth-peer=0,52:54:00:00:01:02")
        .start(scratch.path())?;
    ferryd.wait_state(&["tx", "rx"], "up")?;
    receiver.start()?;
    for size in [64, 1500] {
        sender.command(&format!("set txpkts {size}"))?;
        sender.start()?;
        let before = ferryd.stats()?.port("rx").tx.frames;
        wait::until("frames", Duration::from_secs(20), || {
            ferryd.stats().is_ok_and(|s| s.port("rx").tx.frames > before + 20_000)
        })?;
        sender.stop()?;
    }
    let sent = sender.stats(0)?;
    // What lies in the ring when testpmd stops is still on its way.
    let stats = wait::for_some("all frames in the ledger", Duration::from_secs(10), || {
        let s = ferryd.check_ledger().ok()?;
        (s.port("tx").received().frames == sent.tx_packets).then_some(s)
    })
    .with_context(|| format!("sent {sent:?}, switch {:#?}", ferryd.stats()))?;
    let delivered = stats.port("rx").tx;
    let mut received = receiver.stats(0)?;
    wait::until("delivered frames", Duration::from_secs(10), || {
        received = receiver.stats(0).unwrap_or_default();
        received.rx_packets == delivered.frames
    })
    .with_context(|| format!("delivered {delivered:?}, received {received:?}"))?;
    assert!(received.rx_bytes == delivered.bytes, "bytes: delivered {delivered:?}, received {received:?}");
    assert!(stats.port("tx").received().forwarded <= delivered.frames, "{stats:#?}");
    if flavour.queues > 1 {
        let used = stats.port("tx").rx.iter().filter(|q| q.frames > 0).count();
        assert!(used == usize::from(flavour.queues), "all queues carried frames: {stats:#?}");
    }
    Ok(())
}

const SPLIT: Flavour = Flavour { packed: 0, mergeable: 1, in_order: 0, queues: 1, listens: false };

#[test]
fn split_rings() -> Outcome {
    stream(SPLIT)
}

#[test]
fn split_rings_in_order_without_mergeable_buffers_switch_connects() -> Outcome {
    stream(Flavour { mergeable: 0, in_order: 1, listens: true, ..SPLIT })
}

#[test]
fn split_rings_with_two_queue_pairs() -> Outcome {
    stream(Flavour { queues: 2, ..SPLIT })
}

#[test]
fn packed_rings() -> Outcome {
    stream(Flavour { packed: 1, ..SPLIT })
}

#[test]
fn packed_rings_in_order_without_mergeable_buffers_switch_connects() -> Outcome {
    stream(Flavour { packed: 1, mergeable: 0, in_order: 1, listens: true, ..SPLIT })
}

#[test]
fn packed_rings_with_two_queue_pairs_switch_connects() -> Outcome {
    stream(Flavour { packed: 1, queues: 2, listens: true, ..SPLIT })
}

#[test]
fn frames_reflected_between_two_clients_are_all_accounted_for() -> Outcome {
    let scratch = Scratch::new()?;
    let sockets = [scratch.join("a.sock"), scratch.join("b.sock")];
    let ferryd =
        FerrydBuilder::new().port(Port::vhost("a", &sockets[0])).port(Port::vhost("b", &sockets[1])).start()?;
    let mut reflector = TestpmdBuilder::new()
        .port(&VirtioUser::new(&sockets[1], 2).option("packed_vq", 1))
        .arg("--forward-mode=macswap")
        .start(scratch.path())?;
    let mut source = TestpmdBuilder::new()
        .port(&VirtioUser::new(&sockets[0], 1))
        .arg("--forward-mode=flowgen")
        .arg("--flowgen-flows=64")
        .arg("--eth-peer=0,52:54:00:00:01:02")
        .start(scratch.path())?;
    ferryd.wait_state(&["a", "b"], "up")?;
    reflector.start()?;
    source.start()?;
    wait::until("reflected frames", Duration::from_secs(20), || {
        ferryd.stats().is_ok_and(|s| s.port("a").tx.frames > 20_000)
    })?;
    source.stop()?;
    reflector.stop()?;
    let stats = ferryd.check_ledger()?;
    assert!(stats.port("b").received().forwarded > 20_000, "{stats:#?}");
    Ok(())
}
