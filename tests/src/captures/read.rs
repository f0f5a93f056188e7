//! Capture files (pcap, pcapng) as frames for a switch.
use anyhow::{Context, Result};
use flate2::read::GzDecoder;
use pcap_parser::traits::PcapNGPacketBlock;
use pcap_parser::{Block, PcapBlockOwned, PcapError, create_reader};
use std::io::{Cursor, Read};
use std::net::IpAddr;
use std::path::Path;

/// Link types (<https://www.tcpdump.org/linktypes.html>) that carry IP packets behind so many bytes, where no EtherType tells what
/// it is.
const IP_BEHIND: [(i32, usize); 6] = [(0, 4), (108, 4), (101, 0), (12, 0), (228, 0), (229, 0)];
const ETHERNET: i32 = 1;
const LINUX_SLL: i32 = 113;
const LINUX_SLL2: i32 = 276;

/// A station's MAC address in frames that had none.
const STATION: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// One captured frame.
#[derive(Clone, Debug)]
pub struct Frame {
    /// From the capture's beginning, milliseconds; never goes back.
    pub at_ms: u64,
    /// The bytes captured, as an Ethernet frame.
    pub bytes: Vec<u8>,
}

/// One capture file.
#[derive(Clone, Debug)]
pub struct Capture {
    /// Its name.
    pub name: String,
    /// Frames in their order, as many as could be read.
    pub frames: Vec<Frame>,
}

/// Whose firewall it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// The VM is the station that sent the first IP packet.
    First,
    /// The VM is everyone else.
    Others,
    /// As [`Self::First`], but neither addresses nor checksums are looked at: many captures were taken where a NIC was yet to compute
    /// them.
    Trusted,
}

impl View {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::First, Self::Others, Self::Trusted];

    /// Its name in the list of totals.
    pub const fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Others => "others",
            Self::Trusted => "trusted",
        }
    }
}

/// All captures of a `.tar.gz`, by name.
///
/// # Errors
/// When the archive cannot be read. Captures that are cut short or broken give the frames before that.
pub fn archive(path: &Path) -> Result<Vec<Capture>> {
    let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let mut archive = tar::Archive::new(GzDecoder::new(file));
    let mut captures = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.display().to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        captures.push(Capture { frames: read(bytes), name });
    }
    captures.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(captures)
}

fn read(bytes: Vec<u8>) -> Vec<Frame> {
    let mut frames: Vec<Frame> = Vec::new();
    let mut begin_ms = None;
    let mut first_source = None;
    let mut push = |link: i32, at_ms: u64, data: &[u8]| {
        let begin = *begin_ms.get_or_insert(at_ms);
        let last = frames.last().map_or(0, |f| f.at_ms);
        let at_ms = at_ms.saturating_sub(begin).max(last);
        frames.push(Frame { at_ms, bytes: as_ethernet(link, data, &mut first_source) });
    };
    // Larger than any block, so that nothing is ever incomplete but at the end.
    let capacity = bytes.len().max(1 << 16);
    let Ok(mut reader) = create_reader(capacity, Cursor::new(bytes)) else { return frames };
    let mut link = ETHERNET;
    let mut interfaces: Vec<(i32, u64, i64)> = Vec::new();
    let mut refilled = false;
    loop {
        match reader.next() {
            Ok((used, block)) => {
                match block {
                    PcapBlockOwned::LegacyHeader(header) => link = header.network.0,
                    PcapBlockOwned::Legacy(packet) => push(link, u64::from(packet.ts_sec) * 1000, packet.data),
                    PcapBlockOwned::NG(Block::SectionHeader(_)) => interfaces.clear(),
                    PcapBlockOwned::NG(Block::InterfaceDescription(i)) => {
                        interfaces.push((i.linktype.0, i.ts_resolution().unwrap_or(1_000_000), i.ts_offset()));
                    }
                    PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                        let interface = interfaces.get(packet.if_id as usize).copied();
                        let (link, resolution, offset) = interface.unwrap_or((ETHERNET, 1_000_000, 0));
                        let seconds = packet.decode_ts_f64(offset.cast_unsigned(), resolution);
                        push(link, (seconds * 1000.0) as u64, packet.packet_data());
                    }
                    PcapBlockOwned::NG(Block::SimplePacket(packet)) => {
                        push(interfaces.first().map_or(ETHERNET, |i| i.0), 0, packet.packet_data());
                    }
                    PcapBlockOwned::NG(_) => {}
                }
                reader.consume(used);
                refilled = false;
            }
            // Not in the buffer yet, or cut short.
            Err(PcapError::Incomplete(_)) if !refilled => {
                refilled = true;
                if reader.refill().is_err() {
                    return frames;
                }
            }
            // The end, or what cannot be read any further.
            Err(_) => return frames,
        }
    }
}

/// The packet as an Ethernet frame. What is neither Ethernet nor IP is taken as it is, for a frame that it is not: the firewall must
/// bear that too.
fn as_ethernet(link: i32, data: &[u8], first_source: &mut Option<IpAddr>) -> Vec<u8> {
    let ip_at = IP_BEHIND.iter().find(|(number, _)| *number == link).map(|(_, at)| *at);
    let ip_at = ip_at.or(match link {
        LINUX_SLL if matches!(data.get(14..16), Some([8, 0] | [0x86, 0xdd])) => Some(16),
        LINUX_SLL2 if matches!(data.get(0..2), Some([8, 0] | [0x86, 0xdd])) => Some(20),
        _ => None,
    });
    let Some(packet) = ip_at.and_then(|at| data.get(at..)) else { return data.to_vec() };
    let ethertype: [u8; 2] = match packet.first().map(|b| b >> 4) {
        Some(4) => [8, 0],
        Some(6) => [0x86, 0xdd],
        _ => return data.to_vec(),
    };
    let source = ip_source(ethertype, packet);
    *first_source = first_source.or(source);
    let is_first = source.is_some() && source == *first_source;
    let (dst, src) = if is_first { (PEER, STATION) } else { (STATION, PEER) };
    [&dst[..], &src, &ethertype, packet].concat()
}

fn ip_source(ethertype: [u8; 2], packet: &[u8]) -> Option<IpAddr> {
    match ethertype {
        [8, 0] => Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?)),
        [0x86, 0xdd] => Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(8..24)?).ok()?)),
        _ => None,
    }
}

impl Capture {
    /// The station that sends the first IP packet (else the first frame), with all addresses that it uses there.
    pub fn station(&self) -> Option<([u8; 6], Vec<IpAddr>)> {
        let source = |f: &Frame| {
            let mac = <[u8; 6]>::try_from(f.bytes.get(6..12)?).ok()?;
            let ethertype = <[u8; 2]>::try_from(f.bytes.get(12..14)?).ok()?;
            Some((mac, f.bytes.get(14..).and_then(|packet| ip_source(ethertype, packet))))
        };
        let sources: Vec<_> = self.frames.iter().filter_map(source).collect();
        let (mac, _) = sources.iter().find(|(_, ip)| ip.is_some()).or(sources.first())?;
        let first = sources.iter().find(|(m, ip)| m == mac && ip.is_some()).and_then(|(_, ip)| *ip);
        Some((*mac, first.into_iter().collect()))
    }
}
