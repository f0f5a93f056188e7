//! EAL with hugepages, in memory. Its own binary, since a process has one EAL. Reserves pages for the time of the test.
mod common;

use common::*;
use ferry_dataplane::frame::{BURST, Offload, RxBurst};
use ferry_dataplane::port::RxQueue;
use ferry_ffi::eal::{Eal, EalConfig, Memory};
use ferry_ffi::uplink::Uplink;

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Restores the number of reserved pages.
struct Pages(u64);

impl Pages {
    fn reserve(more: u64) -> Option<Self> {
        let before: u64 = std::fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse().ok()?;
        std::fs::write(NR_HUGEPAGES, (before + more).to_string()).ok()?;
        let pages = Self(before);
        let now: u64 = std::fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse().ok()?;
        (now >= before + more).then_some(pages)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let _ = std::fs::write(NR_HUGEPAGES, self.0.to_string());
    }
}

#[test]
fn hugepages_in_memory() {
    let Some(_pages) = Pages::reserve(80) else {
        eprintln!("skipped: the kernel grants no hugepages");
        return;
    };
    let config = EalConfig { memory: Memory::Auto, memory_mb: 128, pci: true, ..EalConfig::default() };
    let eal = Eal::start(&config).unwrap();
    assert_eq!(eal.memory(), Memory::Hugepages, "enough are free");
    let mut uplink = Uplink::open(&common::config(&unique("net_ring")), &eal).unwrap();
    let mut rx = uplink.take_rx_queues().remove(0);
    let (tx, guard, mut burst) = (uplink.tx(), guard(), RxBurst::new());
    let idle = uplink.status().mbufs.in_use;
    let f = [5u8; 1000];
    assert_eq!(send_lane(&tx, &guard, 0, &[(&f, Offload::default()); BURST]).accepted, u64::MAX);
    rx.receive(&guard, &mut burst);
    assert_eq!(burst.len(), BURST);
    rx.release(&guard);
    assert_eq!(uplink.status().mbufs.in_use, idle);
    drop((rx, tx));
    uplink.close().unwrap();

    // With PCI on, an address without a device is an error that says so, not a crash.
    let e = Uplink::open(&common::config("ffff:fe:00.0"), &eal).unwrap_err().to_string();
    assert!(e.contains("attaching") && e.contains("lspci"), "{e}");
}
