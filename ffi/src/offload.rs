//! From virtio's offload terms (virtio 1.3, 5.1.6: checksum from `csum_start`, segments of `gso_size`) to what DPDK
//! asks for (header lengths and flags; rte_mbuf_core.h, RTE_MBUF_F_TX_*), and back for received frames.
//!
//! Pure functions over private bytes. What a device cannot be told is finished in software here (checksums) or refused
//! (segmentation: the switch does that before, with one copy per segment. `rte_gso` was considered for
//! it and left out: it has no TCP over IPv6 in 22.11, and needs pools of indirect mbufs on top of the copy).
use ferry_dataplane::frame::{Gso, Offload};
use ferry_dpdk_sys as sys;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
/// Where TCP keeps its checksum (RFC 9293, 3.1).
const TCP_CSUM_OFFSET: u16 = 16;
/// Where UDP keeps its checksum (RFC 768).
const UDP_CSUM_OFFSET: u16 = 6;

/// What a device agreed to do, fixed when it was configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceOffloads {
    /// Finishes TCP and UDP checksums on transmit.
    pub tx_csum: bool,
    /// Segments TCP over IPv4.
    pub tso4: bool,
    /// Segments TCP over IPv6.
    pub tso6: bool,
    /// Computes IPv4 header checksums along with `tso4`. Where not (virtio), the frame's own stays.
    pub tso_ip_csum: bool,
    /// Verifies TCP and UDP checksums on receive, or says that they are still to be finished.
    pub rx_csum: bool,
    /// Takes frames in several mbufs.
    pub tx_multi_segment: bool,
    /// Delivers frames in several mbufs.
    pub rx_scatter: bool,
}

/// Headers of a TCP or UDP frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    l2_len: u16,
    l3_len: u16,
    ipv6: bool,
    tcp: bool,
}

/// What to do with a frame about to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Plan {
    /// Nothing is owed.
    None,
    /// The device does it.
    Device(sys::ferry_tx_offload),
    /// The checksum must be finished here: sum from `start` on, stored at `start + offset`.
    Software {
        /// Bytes from the frame's start.
        start: u16,
        /// Bytes from `start`.
        offset: u16,
    },
    /// It cannot be done.
    Impossible,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk::<2>().map(|b| u16::from_be_bytes(*b))
}

/// Finds IP and TCP or UDP behind Ethernet and up to two tags. `None` for anything else: other protocols, fragments, IPv6
/// with extension headers (whose pseudo-header a device would get wrong).
fn layout(bytes: &[u8]) -> Option<Layout> {
    let mut l2_len = 14usize;
    let mut ethertype = be16(bytes, 12)?;
    for _ in 0..2 {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_QINQ {
            break;
        }
        ethertype = be16(bytes, l2_len + 2)?;
        l2_len += 4;
    }
    let ip = bytes.get(l2_len..)?;
    let (l3_len, ipv6, protocol) = match ethertype {
        ETHERTYPE_IPV4 => {
            let header = ip.first_chunk::<20>()?;
            let [version_ihl, ..] = *header;
            let l3_len = usize::from(version_ihl & 0x0f) * 4;
            // RFC 791: a fragment (offset, or more to come) has no complete L4 payload.
            if version_ihl >> 4 != 4 || l3_len < 20 || be16(header, 6)? & 0x3fff != 0 {
                return None;
            }
            (l3_len, false, *header.get(9)?)
        }
        ETHERTYPE_IPV6 => {
            let header = ip.first_chunk::<40>()?;
            let [version, ..] = *header;
            if version >> 4 != 6 {
                return None;
            }
            (40, true, *header.get(6)?)
        }
        _ => return None,
    };
    let tcp = match protocol {
        IPPROTO_TCP => true,
        IPPROTO_UDP => false,
        _ => return None,
    };
    let l4_min = if tcp { 20 } else { 8 };
    ip.get(l3_len..l3_len + l4_min)?;
    Some(Layout { l2_len: l2_len as u16, l3_len: l3_len as u16, ipv6, tcp })
}

/// Decides for a frame whose first mbuf segment holds `first`, `frame_bytes` long in all.
/// `max_frame_bytes`: the longest frame the link takes; segments must fit too.
pub(crate) fn plan(
    first: &[u8],
    frame_bytes: u32,
    owed: &Offload,
    device: &DeviceOffloads,
    max_frame_bytes: u32,
) -> Plan {
    if owed.gso != Gso::None {
        return plan_segmentation(first, frame_bytes, owed, device, max_frame_bytes).unwrap_or(Plan::Impossible);
    }
    if !owed.needs_csum {
        return Plan::None;
    }
    let Some(end) = owed.csum_start.checked_add(owed.csum_offset).and_then(|at| at.checked_add(2)) else {
        return Plan::Impossible;
    };
    if usize::from(end) > first.len() {
        return Plan::Impossible;
    }
    if device.tx_csum
        && let Some(l) = layout(first)
        && owed.csum_start == l.l2_len + l.l3_len
        && owed.csum_offset == if l.tcp { TCP_CSUM_OFFSET } else { UDP_CSUM_OFFSET }
    {
        return Plan::Device(checksum_request(&l));
    }
    Plan::Software { start: owed.csum_start, offset: owed.csum_offset }
}

fn checksum_request(l: &Layout) -> sys::ferry_tx_offload {
    sys::ferry_tx_offload {
        ol_flags: if l.tcp { sys::FERRY_TX_TCP_CKSUM } else { sys::FERRY_TX_UDP_CKSUM }
            | if l.ipv6 { sys::FERRY_TX_IPV6 } else { sys::FERRY_TX_IPV4 },
        l2_len: l.l2_len,
        l3_len: l.l3_len,
        l4_len: 0,
        tso_segsz: 0,
    }
}

fn plan_segmentation(
    first: &[u8],
    frame_bytes: u32,
    owed: &Offload,
    device: &DeviceOffloads,
    max_frame_bytes: u32,
) -> Option<Plan> {
    let l = layout(first)?;
    let allowed = match owed.gso {
        Gso::TcpV4 => device.tso4 && !l.ipv6,
        Gso::TcpV6 => device.tso6 && l.ipv6,
        Gso::None => false,
    };
    if !allowed || !l.tcp || owed.gso_size == 0 {
        return None;
    }
    let l4_start = usize::from(l.l2_len + l.l3_len);
    let l4_len = u16::from(*first.get(l4_start + 12)? >> 4) * 4;
    let headers = l.l2_len + l.l3_len + l4_len;
    if l4_len < 20 || first.len() < usize::from(headers) {
        return None;
    }
    let payload = frame_bytes.checked_sub(u32::from(headers))?;
    let mut request = checksum_request(&l);
    request.l4_len = l4_len;
    if payload <= u32::from(owed.gso_size) {
        // One segment: only the checksum is left. Devices may choke on a request to cut what needs no cutting.
        return (frame_bytes <= max_frame_bytes).then_some(Plan::Device(request));
    }
    if u32::from(headers) + u32::from(owed.gso_size) > max_frame_bytes {
        return None;
    }
    request.ol_flags |= sys::FERRY_TX_TCP_SEG | if l.ipv6 || !device.tso_ip_csum { 0 } else { sys::FERRY_TX_IP_CKSUM };
    request.tso_segsz = owed.gso_size;
    Some(Plan::Device(request))
}

/// What a device's receive flags say about a frame that starts with `first` (private memory). `segment_bytes`: payload per
/// segment of a frame that is still to be segmented (mbuf's `tso_segsz` under RX_LRO).
pub(crate) fn received(ol_flags: u64, segment_bytes: u16, first: &[u8]) -> Offload {
    let mut offload = Offload::default();
    if ol_flags & sys::FERRY_RX_IP_CKSUM_MASK == sys::FERRY_RX_IP_CKSUM_BAD {
        return offload;
    }
    let l4 = ol_flags & sys::FERRY_RX_L4_CKSUM_MASK;
    if l4 == sys::FERRY_RX_L4_CKSUM_GOOD {
        offload.csum_valid = true;
    } else if l4 == sys::FERRY_RX_L4_CKSUM_NONE
        && let Some(l) = layout(first)
    {
        // "Not correct in the packet, but the integrity is verified": a virtio peer left the checksum to be finished.
        // Drivers also say so of UDP without a checksum (net_tap), where nothing is owed.
        let csum_start = l.l2_len + l.l3_len;
        let csum_offset = if l.tcp { TCP_CSUM_OFFSET } else { UDP_CSUM_OFFSET };
        let stored = be16(first, usize::from(csum_start + csum_offset));
        if l.tcp || stored.is_some_and(|sum| sum != 0) {
            offload = Offload { needs_csum: true, csum_start, csum_offset, ..Offload::default() };
        }
        // A virtio peer's TSO frame. (Hardware's coalesced frames have good checksums instead; they are never asked for.)
        if l.tcp && segment_bytes > 0 && ol_flags & sys::FERRY_RX_LRO != 0 {
            let tcp = usize::from(csum_start);
            offload.gso = if l.ipv6 { Gso::TcpV6 } else { Gso::TcpV4 };
            offload.gso_size = segment_bytes;
            offload.hdr_len = csum_start + first.get(tcp + 12).map_or(20, |b| u16::from(b >> 4) * 4);
            // CWR (RFC 3168, 6.1.2): only the first segment may carry it.
            offload.ecn = first.get(tcp + 13).is_some_and(|flags| flags & 0x80 != 0);
        }
    }
    offload
}

/// The Internet checksum (RFC 1071) over pieces of any length, in order.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    sum: u64,
    odd: bool,
}

impl Sum {
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if self.odd
            && let Some((&low, rest)) = bytes.split_first()
        {
            self.sum += u64::from(low);
            self.odd = false;
            bytes = rest;
        }
        let pairs = bytes.chunks_exact(2);
        let last = pairs.remainder();
        self.sum +=
            pairs.map(|p| if let [a, b] = p { u64::from(u16::from_be_bytes([*a, *b])) } else { 0 }).sum::<u64>();
        if let [high] = last {
            self.sum += u64::from(*high) << 8;
            self.odd = true;
        }
    }

    /// The folded sum, not complemented.
    pub(crate) fn folded(self) -> u16 {
        let mut sum = self.sum;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }
}

/// What goes into the checksum field: the complement; 0 is written as 0xffff, which means the same and is not
/// UDP's "no checksum" (RFC 768).
pub(crate) fn finish(sum: Sum) -> [u8; 2] {
    let value = !sum.folded();
    (if value == 0 { 0xffff } else { value }).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tags: usize, ipv6: bool, tcp: bool, payload: usize) -> Vec<u8> {
        let mut f = vec![2u8; 12];
        for _ in 0..tags {
            f.extend([0x81, 0, 0, 5]);
        }
        let l4_len = if tcp { 20 } else { 8 } + payload;
        if ipv6 {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            f.extend((l4_len as u16).to_be_bytes());
            f.extend([if tcp { 6 } else { 17 }, 64]);
            f.extend([0x20; 32]);
        } else {
            f.extend([8, 0, 0x45, 0]);
            f.extend((20 + l4_len as u16).to_be_bytes());
            f.extend([0, 1, 0, 0, 64, if tcp { 6 } else { 17 }, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        let mut l4 = vec![0u8; l4_len];
        if tcp {
            l4[12] = 5 << 4;
        }
        f.extend(l4);
        f
    }

    const ALL: DeviceOffloads = DeviceOffloads {
        tx_csum: true,
        tso4: true,
        tso6: true,
        tso_ip_csum: true,
        rx_csum: true,
        tx_multi_segment: true,
        rx_scatter: true,
    };

    fn csum(start: u16, offset: u16) -> Offload {
        Offload { needs_csum: true, csum_start: start, csum_offset: offset, ..Default::default() }
    }

    #[test]
    fn the_device_is_asked_where_the_headers_agree() {
        for tags in 0..3 {
            for (ipv6, tcp) in [(false, false), (false, true), (true, false), (true, true)] {
                let f = frame(tags, ipv6, tcp, 10);
                let start = (14 + 4 * tags + if ipv6 { 40 } else { 20 }) as u16;
                let owed = csum(start, if tcp { 16 } else { 6 });
                let Plan::Device(r) = plan(&f, f.len() as u32, &owed, &ALL, 1518) else {
                    panic!("{tags} {ipv6} {tcp}")
                };
                assert_eq!((r.l2_len, r.l2_len + r.l3_len), (14 + 4 * tags as u16, start));
                assert_eq!(r.ol_flags & sys::FERRY_TX_IPV6 != 0, ipv6);
                assert_eq!(r.ol_flags & sys::FERRY_TX_TCP_SEG, 0);
            }
        }
    }

    #[test]
    fn other_checksums_are_finished_in_software_and_bad_ones_refused() {
        let f = frame(0, false, true, 10);
        let len = f.len() as u32;
        assert!(matches!(plan(&f, len, &csum(34, 14), &ALL, 1518), Plan::Software { start: 34, offset: 14 }));
        let none = DeviceOffloads::default();
        assert!(matches!(plan(&f, len, &csum(34, 16), &none, 1518), Plan::Software { .. }));
        assert!(matches!(plan(&f, len, &csum(len as u16 - 1, 0), &ALL, 1518), Plan::Impossible));
        assert!(matches!(plan(&f, len, &csum(u16::MAX, u16::MAX), &ALL, 1518), Plan::Impossible));
        assert!(matches!(plan(&f, len, &Offload::default(), &ALL, 1518), Plan::None));
    }

    #[test]
    fn segmentation_needs_the_right_headers_and_the_device() {
        let f = frame(1, false, true, 3000);
        let len = f.len() as u32;
        let owed = Offload {
            needs_csum: true,
            gso: Gso::TcpV4,
            gso_size: 1400,
            csum_start: 38,
            csum_offset: 16,
            ..Default::default()
        };
        let Plan::Device(r) = plan(&f, len, &owed, &ALL, 1518) else { panic!() };
        assert_eq!((r.l4_len, r.tso_segsz), (20, 1400));
        assert_ne!(r.ol_flags & sys::FERRY_TX_TCP_SEG, 0);
        assert_ne!(r.ol_flags & sys::FERRY_TX_IP_CKSUM, 0);
        let refused = |owed: &Offload, device: &DeviceOffloads, bytes: &[u8]| {
            matches!(plan(bytes, bytes.len() as u32, owed, device, 1518), Plan::Impossible)
        };
        let Plan::Device(r) = plan(&f, len, &owed, &DeviceOffloads { tso_ip_csum: false, ..ALL }, 1518) else {
            panic!()
        };
        assert_eq!(r.ol_flags & sys::FERRY_TX_IP_CKSUM, 0, "the header's own checksum stays");
        assert!(refused(&Offload { gso: Gso::TcpV6, ..owed }, &ALL, &f), "kind does not match the header");
        assert!(refused(&owed, &DeviceOffloads { tso4: false, ..ALL }, &f), "device does not");
        assert!(refused(&Offload { gso_size: 0, ..owed }, &ALL, &f), "size 0");
        assert!(refused(&Offload { gso_size: 1500, ..owed }, &ALL, &f), "segments longer than the link takes");
        assert!(refused(&owed, &ALL, &f[..50]), "headers cut off");
        let small = frame(1, false, true, 100);
        let Plan::Device(r) = plan(&small, small.len() as u32, &owed, &ALL, 1518) else { panic!() };
        assert_eq!(r.ol_flags & sys::FERRY_TX_TCP_SEG, 0, "one segment is not segmented");
    }

    #[test]
    fn fragments_and_extension_headers_are_no_business_of_the_device() {
        let mut f = frame(0, false, true, 10);
        f[20] = 0x20; // more fragments
        assert_eq!(layout(&f), None);
        let mut f = frame(0, true, true, 10);
        f[20] = 0; // hop-by-hop options
        assert_eq!(layout(&f), None);
        for cut in 0..frame(2, true, true, 0).len() {
            assert_eq!(layout(&frame(2, true, true, 0)[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn receive_flags_become_virtio_terms() {
        let mut udp = frame(0, false, false, 4);
        assert!(received(sys::FERRY_RX_L4_CKSUM_GOOD, 0, &udp).csum_valid);
        assert_eq!(received(sys::FERRY_RX_L4_CKSUM_GOOD | sys::FERRY_RX_IP_CKSUM_BAD, 0, &udp), Offload::default());
        assert_eq!(received(0, 0, &udp), Offload::default());
        assert_eq!(received(sys::FERRY_RX_L4_CKSUM_NONE, 0, &udp), Offload::default(), "UDP without checksum");
        udp[40] = 1;
        assert_eq!(received(sys::FERRY_RX_L4_CKSUM_NONE, 0, &udp), csum(34, 6));
        assert_eq!(received(sys::FERRY_RX_L4_CKSUM_NONE, 0, &frame(1, true, true, 0)), csum(58, 16));
        let tso = received(sys::FERRY_RX_L4_CKSUM_NONE | sys::FERRY_RX_LRO, 1400, &frame(0, true, true, 5000));
        assert_eq!(tso, Offload { gso: Gso::TcpV6, gso_size: 1400, hdr_len: 74, ..csum(54, 16) });
        assert_eq!(
            received(sys::FERRY_RX_L4_CKSUM_GOOD | sys::FERRY_RX_LRO, 1400, &frame(0, true, true, 9)).gso,
            Gso::None
        );
    }

    #[test]
    fn sums_do_not_depend_on_how_the_bytes_are_cut() {
        let bytes: Vec<u8> = (0..=255u8).chain(0..=100).collect();
        let mut whole = Sum::default();
        whole.add(&bytes);
        for cut in 0..bytes.len() {
            let mut s = Sum::default();
            s.add(&bytes[..cut]);
            s.add(&bytes[cut..]);
            assert_eq!(s.folded(), whole.folded(), "{cut}");
        }
        // RFC 1071, section 3: 00 01 f2 03 f4 f5 f6 f7 sums to ddf2.
        let mut s = Sum::default();
        s.add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(s.folded(), 0xddf2);
        assert_eq!(finish(s), [0x22, 0x0d]);
    }
}
