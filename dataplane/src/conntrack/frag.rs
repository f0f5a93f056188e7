//! Fragments: held until their datagram is complete, judged as the whole packet they make, then forwarded as they came.
//!
//! Holding is what makes the judgement right: checksum, ports, TCP length and overlaps are known only of the whole. Overlapping
//! fragments spoil their datagram (RFC 5722, and so Linux for IPv4); an exact repetition is forgotten. Memory is bounded, taken once
//! when the VM's first fragment comes, and shared by all of the VM's unfinished datagrams; when it is used up, further fragments
//! are refused until others have been completed or have timed out.
use core::net::IpAddr;

use hashbrown::HashMap;
use serde::Serialize;

use super::config::TrackConfig;
use super::dissect::{FragmentFacts, Packet};
use super::key::Toward;
use crate::packet::chunk_mut;
use crate::packet::ipv4::Ipv4Mut;

const BLOCK_BYTES: usize = 256;
const NONE: u32 = u32::MAX;
/// ECN codepoint "not ECN-capable transport".
const NOT_ECT: u8 = 0;
/// Pieces of one datagram: enough for 64 KiB in the smallest IPv4 MTU's (68) common multiples, few enough to insert into a list.
const MAX_PIECES: usize = 1024;
/// Longest datagram put together: headers and payload.
const MAX_PACKET_BYTES: u32 = 65_535;

/// What fragments have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DatagramId {
    src: IpAddr,
    dst: IpAddr,
    zone: u16,
    proto: u8,
    toward: Toward,
    identification: u32,
}

/// A complete datagram whose fragments wait for the verdict: to be given to [`FragmentQueue::release`] or
/// [`FragmentQueue::discard`] before the next fragment comes.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Datagram(u32);

/// Why a fragment was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum FragmentRefusal {
    /// Overlaps another one; the whole datagram is forgotten.
    #[error("overlapping fragments")]
    Overlap,
    /// Has been received already.
    #[error("fragment repeated")]
    Repeated,
    /// Empty, beyond the datagram's end or 64 KiB, or of another ECN kind; the whole datagram is forgotten.
    #[error("fragment does not fit its datagram")]
    Misfit,
    /// IPv6: not a multiple of 8 bytes although more follow; the whole datagram is forgotten.
    #[error("IPv6 fragment length not a multiple of 8")]
    Unaligned,
    /// No memory left for fragments.
    #[error("fragment memory exhausted")]
    Full,
}

/// What became of a fragment.
#[derive(Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Kept until the rest is there.
    Held,
    /// Refused.
    Refused(FragmentRefusal),
    /// The last one missing: the datagram is complete.
    Complete(Datagram),
}

/// Counters of a [`FragmentQueue`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FragmentStats {
    /// Fragments held at some time.
    pub held: u64,
    /// Datagrams completed.
    pub completed: u64,
    /// Datagrams given up because their time was over.
    pub timed_out: u64,
    /// Fragments refused: overlapping or misfitting.
    pub refused: u64,
    /// Fragments refused for lack of memory.
    pub exhausted: u64,
}

#[derive(Clone, Copy)]
struct Piece {
    offset: u32,
    end: u32,
    frame_len: u32,
    data_offset: u16,
    /// IPv4: odd bytes at the end were not judged and must not be forwarded; where the network header begins.
    cut_behind: Option<u16>,
    first_block: u32,
}

/// A stretch of pieces that came one after the other. Stretches that touch are not joined unless the later piece came last;
/// only a fragment that lies within one stretch is a repetition.
#[derive(Clone, Copy)]
struct Run {
    start: u32,
    end: u32,
}

struct Unfinished {
    id: DatagramId,
    deadline_ms: u64,
    /// The end of the last fragment, or the highest end seen so far.
    len: u32,
    have_last: bool,
    received: u32,
    /// Which ECN codepoints its fragments have, a bit each.
    ecn: u8,
    l3_offset: u16,
    announced_at: u16,
    pieces: Vec<Piece>,
    runs: Vec<Run>,
    in_use: bool,
}

/// One VM's unfinished datagrams.
pub struct FragmentQueue {
    index: HashMap<DatagramId, u32>,
    slots: Vec<Unfinished>,
    free_slots: Vec<u32>,
    blocks: Vec<[u8; BLOCK_BYTES]>,
    next_block: Vec<u32>,
    free_block: u32,
    free_blocks: u32,
    /// A datagram that was completed and not yet released.
    complete: Option<u32>,
    sweep: usize,
    scratch: Vec<u8>,
    stats: FragmentStats,
}

impl Default for FragmentQueue {
    fn default() -> Self {
        Self::new()
    }
}

impl FragmentQueue {
    /// An empty queue; takes no memory until the first fragment comes.
    pub fn new() -> Self {
        Self {
            index: HashMap::new(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            blocks: Vec::new(),
            next_block: Vec::new(),
            free_block: NONE,
            free_blocks: 0,
            complete: None,
            sweep: 0,
            scratch: Vec::new(),
            stats: FragmentStats::default(),
        }
    }

    /// Counters.
    pub fn stats(&self) -> FragmentStats {
        self.stats
    }

    /// Datagrams of which something is held.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Nothing is held.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Bytes of held frames, rounded up to blocks.
    pub fn bytes_held(&self) -> usize {
        (self.blocks.len() - self.free_blocks as usize) * BLOCK_BYTES
    }

    /// Takes the memory. A change of its size applies from the next VM start on.
    #[cold]
    fn reserve(&mut self, config: &TrackConfig) {
        let blocks = (config.fragment_bytes as usize / BLOCK_BYTES).clamp(8, 1 << 20);
        self.blocks = vec![[0; BLOCK_BYTES]; blocks];
        self.next_block = (1..=blocks as u32).map(|n| if n == blocks as u32 { NONE } else { n }).collect();
        self.free_block = 0;
        self.free_blocks = blocks as u32;
        self.scratch.reserve(MAX_PACKET_BYTES as usize + BLOCK_BYTES);
    }

    /// Takes a fragment in.
    pub fn accept(&mut self, f: &FragmentFacts, packet: &Packet<'_>, config: &TrackConfig, now_ms: u64) -> Accepted {
        if let Some(slot) = self.complete.take() {
            self.drop_slot(slot);
        }
        if self.blocks.is_empty() {
            self.reserve(config);
        }
        // A few steps of every call keep the memory free of what is overdue.
        self.expire(now_ms, 4);
        let id = DatagramId {
            src: f.src,
            dst: f.dst,
            zone: f.zone,
            proto: f.proto,
            toward: packet.toward,
            identification: f.identification,
        };
        let mut known = self.index.get(&id).copied();
        if let Some(slot) = known
            && self.slots.get(slot as usize).is_some_and(|u| u.deadline_ms <= now_ms)
        {
            self.stats.timed_out += 1;
            self.drop_slot(slot);
            known = None;
        }
        let needed = packet.len().div_ceil(BLOCK_BYTES) as u32;
        let slot = match known {
            Some(slot) => slot,
            None => match self.new_slot(id, f, config, now_ms) {
                Some(slot) => slot,
                None => return self.refuse(None, FragmentRefusal::Full),
            },
        };
        let Some(unfinished) = self.slots.get_mut(slot as usize) else {
            return self.refuse(None, FragmentRefusal::Full);
        };
        let (offset, end) = match fit(unfinished, f) {
            Ok(range) => range,
            Err(why) => return self.refuse(Some(slot), why),
        };
        if let Err(why) = insert_run(&mut unfinished.runs, offset, end) {
            return self.refuse(Some(slot), why);
        }
        if needed > self.free_blocks || unfinished.pieces.len() >= MAX_PIECES {
            return self.refuse(Some(slot), FragmentRefusal::Full);
        }
        let first_block = self.keep(packet);
        let Some(unfinished) = self.slots.get_mut(slot as usize) else {
            return self.refuse(None, FragmentRefusal::Full);
        };
        let piece = Piece {
            offset,
            end,
            frame_len: packet.len() as u32,
            data_offset: f.data_offset,
            cut_behind: (end != f.offset + f.data_len).then_some(f.l3_offset),
            first_block,
        };
        let at = unfinished.pieces.partition_point(|p| p.offset < offset);
        unfinished.pieces.insert(at, piece);
        unfinished.received += end - offset;
        unfinished.ecn |= 1 << ecn(f, packet);
        if offset == 0 {
            unfinished.l3_offset = f.l3_offset;
            unfinished.announced_at = f.announced_at;
        }
        self.stats.held += 1;
        let whole = unfinished.have_last && unfinished.received == unfinished.len;
        if !whole {
            return Accepted::Held;
        }
        let headers = unfinished.pieces.first().map_or(0, |p| u32::from(p.data_offset - unfinished.l3_offset));
        // RFC 3168, 5.3: a datagram cannot be ECN-capable in part.
        let mixed = unfinished.ecn & 1 << NOT_ECT != 0 && unfinished.ecn != 1 << NOT_ECT;
        if mixed || unfinished.len + headers > MAX_PACKET_BYTES {
            return self.refuse(Some(slot), FragmentRefusal::Misfit);
        }
        let id = unfinished.id;
        self.index.remove(&id);
        self.complete = Some(slot);
        self.stats.completed += 1;
        Accepted::Complete(Datagram(slot))
    }

    /// Counts a refusal; forgets the datagram when it is spoilt (and one that was begun for nothing).
    fn refuse(&mut self, slot: Option<u32>, why: FragmentRefusal) -> Accepted {
        match why {
            FragmentRefusal::Full => self.stats.exhausted += 1,
            FragmentRefusal::Repeated => {}
            FragmentRefusal::Overlap | FragmentRefusal::Misfit | FragmentRefusal::Unaligned => self.stats.refused += 1,
        }
        if let Some(slot) = slot {
            let empty = self.slots.get(slot as usize).is_none_or(|u| u.pieces.is_empty());
            let spoilt = why != FragmentRefusal::Repeated;
            if empty || spoilt {
                self.drop_slot(slot);
            }
        }
        Accepted::Refused(why)
    }

    fn new_slot(&mut self, id: DatagramId, f: &FragmentFacts, config: &TrackConfig, now_ms: u64) -> Option<u32> {
        // A datagram has at least one block, so there are never more datagrams than blocks.
        if self.free_blocks == 0 {
            return None;
        }
        let t = &config.timeouts;
        let timeout_ms = if f.src.is_ipv6() { t.fragment_v6_ms } else { t.fragment_v4_ms };
        let slot = match self.free_slots.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(Unfinished {
                    id,
                    deadline_ms: 0,
                    len: 0,
                    have_last: false,
                    received: 0,
                    ecn: 0,
                    l3_offset: 0,
                    announced_at: 0,
                    pieces: Vec::new(),
                    runs: Vec::new(),
                    in_use: false,
                });
                (self.slots.len() - 1) as u32
            }
        };
        let u = self.slots.get_mut(slot as usize)?;
        u.id = id;
        u.deadline_ms = now_ms + u64::from(timeout_ms);
        u.len = 0;
        u.have_last = false;
        u.received = 0;
        u.ecn = 0;
        u.in_use = true;
        self.index.insert(id, slot);
        Some(slot)
    }

    fn drop_slot(&mut self, slot: u32) {
        let Some(u) = self.slots.get_mut(slot as usize).filter(|u| u.in_use) else { return };
        u.in_use = false;
        u.runs.clear();
        let id = u.id;
        let mut pieces = core::mem::take(&mut u.pieces);
        for piece in pieces.drain(..) {
            self.free(piece.first_block);
        }
        if let Some(u) = self.slots.get_mut(slot as usize) {
            // Keeps its capacity for the next datagram, within reason.
            if pieces.capacity() <= 64 {
                u.pieces = pieces;
            }
        }
        if self.index.get(&id) == Some(&slot) {
            self.index.remove(&id);
        }
        self.free_slots.push(slot);
    }

    /// Copies a frame into blocks; there are enough.
    fn keep(&mut self, packet: &Packet<'_>) -> u32 {
        let mut first = NONE;
        let mut last = NONE;
        let mut at = 0;
        while at < packet.len() {
            let block = self.free_block;
            let Some(bytes) = self.blocks.get_mut(block as usize) else { break };
            let n = BLOCK_BYTES.min(packet.len() - at);
            let (to, _) = bytes.split_at_mut(n);
            packet.copy(at, to);
            at += n;
            self.free_blocks -= 1;
            let next = self.next_block.get_mut(block as usize).map_or(NONE, |n| core::mem::replace(n, NONE));
            self.free_block = next;
            if first == NONE {
                first = block;
            } else if let Some(n) = self.next_block.get_mut(last as usize) {
                *n = block;
            }
            last = block;
        }
        first
    }

    fn free(&mut self, first: u32) {
        let mut block = first;
        while let Some(next) = self.next_block.get_mut(block as usize) {
            let following = core::mem::replace(next, self.free_block);
            self.free_block = block;
            self.free_blocks += 1;
            block = following;
        }
    }

    /// Appends `skip..` of a piece's frame to the scratch buffer.
    fn gather(
        scratch: &mut Vec<u8>,
        blocks: &[[u8; BLOCK_BYTES]],
        next: &[u32],
        piece: &Piece,
        skip: usize,
        len: usize,
    ) {
        let mut block = piece.first_block;
        let mut at = 0;
        while let Some(bytes) = blocks.get(block as usize) {
            let from = skip.saturating_sub(at).min(BLOCK_BYTES);
            let to = (skip + len).saturating_sub(at).min(BLOCK_BYTES);
            scratch.extend_from_slice(bytes.get(from..to).unwrap_or_default());
            at += BLOCK_BYTES;
            if at >= skip + len {
                break;
            }
            block = next.get(block as usize).copied().unwrap_or(NONE);
        }
    }

    /// The packet that a complete datagram's fragments make, as a frame: the first fragment's headers with the fragmentation
    /// taken out, and all data.
    pub fn assemble(&mut self, datagram: &Datagram) -> &[u8] {
        self.scratch.clear();
        let Some(u) = self.slots.get(datagram.0 as usize).filter(|u| u.in_use) else { return &[] };
        for (n, piece) in u.pieces.iter().enumerate() {
            let data_offset = usize::from(piece.data_offset);
            let data_len = (piece.end - piece.offset) as usize;
            let (skip, len) = if n == 0 { (0, data_offset + data_len) } else { (data_offset, data_len) };
            Self::gather(&mut self.scratch, &self.blocks, &self.next_block, piece, skip, len);
        }
        let l3 = usize::from(u.l3_offset);
        let headers = u.pieces.first().map_or(0, |p| usize::from(p.data_offset)).saturating_sub(l3);
        if u.id.src.is_ipv4() {
            let Some(bytes) = self.scratch.get_mut(l3..) else { return &[] };
            if let Some(fragment_field) = chunk_mut::<2>(bytes, 6) {
                *fragment_field = [0, 0];
            }
            if let Ok(mut ip) = Ipv4Mut::new(bytes) {
                ip.set_total_len((headers as u32 + u.len) as u16);
                ip.fill_checksum();
            }
        } else {
            // Without the fragment header; what announced it announces what it announced.
            let fragment_header = l3 + headers - 8;
            let Some(next) = self.scratch.get(fragment_header).copied() else { return &[] };
            self.scratch.drain(fragment_header..fragment_header + 8);
            if let Some(announcer) = self.scratch.get_mut(usize::from(u.announced_at)) {
                *announcer = next;
            }
            if let Some(payload_len) = chunk_mut::<2>(&mut self.scratch, l3 + 4) {
                *payload_len = ((headers as u32 - 48 + u.len) as u16).to_be_bytes();
            }
        }
        &self.scratch
    }

    /// Hands out a complete datagram's fragments, as they came, in the order of their offsets; then forgets them. Only the odd bytes
    /// at the end of an IPv4 fragment that more follow (RFC 791, 3.1: there are none) are cut off: a receiver that does not do
    /// so itself would see them where the next fragment's bytes were judged.
    pub fn release(&mut self, datagram: Datagram, mut output: impl FnMut(&[u8])) {
        if let Some(u) = self.slots.get(datagram.0 as usize).filter(|u| u.in_use) {
            for piece in &u.pieces {
                self.scratch.clear();
                Self::gather(&mut self.scratch, &self.blocks, &self.next_block, piece, 0, piece.frame_len as usize);
                if let Some(l3) = piece.cut_behind {
                    cut(&mut self.scratch, usize::from(l3), piece);
                }
                output(&self.scratch);
            }
        }
        self.discard(datagram);
    }

    /// Forgets a complete datagram.
    pub fn discard(&mut self, datagram: Datagram) {
        if self.complete == Some(datagram.0) {
            self.complete = None;
            self.drop_slot(datagram.0);
        }
    }

    /// Gives up datagrams whose time is over, looking at `budget` slots. Returns how many went.
    pub fn expire(&mut self, now_ms: u64, budget: usize) -> usize {
        let mut gone = 0;
        for _ in 0..budget.min(self.slots.len()) {
            self.sweep = if self.sweep + 1 >= self.slots.len() { 0 } else { self.sweep + 1 };
            let overdue = self.slots.get(self.sweep).is_some_and(|u| u.in_use && u.deadline_ms <= now_ms);
            if overdue && self.complete != Some(self.sweep as u32) {
                self.drop_slot(self.sweep as u32);
                self.stats.timed_out += 1;
                gone += 1;
            }
        }
        gone
    }
}

/// A fragment's ECN codepoint (RFC 3168, 5).
fn ecn(f: &FragmentFacts, packet: &Packet<'_>) -> u8 {
    let byte = packet.head.get(usize::from(f.l3_offset) + 1).copied().unwrap_or(NOT_ECT);
    if f.src.is_ipv4() { byte & 3 } else { byte >> 4 & 3 }
}

/// Cuts an IPv4 fragment's frame behind the bytes that were judged.
#[cold]
fn cut(frame: &mut Vec<u8>, l3: usize, piece: &Piece) {
    frame.truncate(usize::from(piece.data_offset) + (piece.end - piece.offset) as usize);
    let total_len = frame.len().saturating_sub(l3) as u16;
    if let Ok(mut ip) = Ipv4Mut::new(frame.get_mut(l3..).unwrap_or_default()) {
        ip.set_total_len(total_len);
        ip.fill_checksum();
    }
}

/// Where the fragment belongs, when it can belong to this datagram.
fn fit(u: &mut Unfinished, f: &FragmentFacts) -> Result<(u32, u32), FragmentRefusal> {
    let mut end = f.offset + f.data_len;
    if f.more {
        if end & 7 != 0 {
            // RFC 8200, 4.5: an error. RFC 791, 3.1: the odd bytes cannot be meant; see `cut`.
            if f.src.is_ipv6() {
                return Err(FragmentRefusal::Unaligned);
            }
            end &= !7;
        }
        if end > u.len {
            if u.have_last {
                return Err(FragmentRefusal::Misfit);
            }
            u.len = end;
        }
    } else {
        if end < u.len || (u.have_last && end != u.len) {
            return Err(FragmentRefusal::Misfit);
        }
        u.have_last = true;
        u.len = end;
    }
    if end <= f.offset || end > MAX_PACKET_BYTES {
        return Err(FragmentRefusal::Misfit);
    }
    Ok((f.offset, end))
}

fn insert_run(runs: &mut Vec<Run>, start: u32, end: u32) -> Result<(), FragmentRefusal> {
    let at = runs.partition_point(|r| r.end <= start);
    if let Some(run) = runs.get(at)
        && run.start < end
    {
        let within = start >= run.start && end <= run.end;
        return Err(if within { FragmentRefusal::Repeated } else { FragmentRefusal::Overlap });
    }
    match runs.last_mut() {
        Some(last) if last.end == start => last.end = end,
        _ => runs.insert(at, Run { start, end }),
    }
    Ok(())
}
