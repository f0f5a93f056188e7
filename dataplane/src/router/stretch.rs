//! Stretches: consecutive frames of a burst that have their link header in common, and so come from one station and go to one.
//!
//! What a link header means is found out once per stretch; that a frame belongs to it is seen by comparing the bytes.
use core::ops::Range;

use super::{Link, Place};
use crate::bridge::PortEntry;
use crate::bridge::fdb::PortId;
use crate::conntrack::Layout;
use crate::counters::DropReason;
use crate::frame::{BURST, RxBurst, SNAPSHOT_BYTES};
use crate::output::Sender;
use crate::packet::{self, ParseError};

/// Bytes of a link header without a tag, and with one.
const UNTAGGED: u16 = 14;
const TAGGED: u16 = 18;
/// Former stretches that are compared with a new one's first frame: a guest mostly talks to few stations at a time.
const SEARCHED: usize = 4;

/// What tells frames of a stretch: the bytes of their link header.
#[derive(Clone, Copy)]
struct Header {
    /// Bytes 0 to 7 and 6 to 13: both addresses, and the type behind them.
    first: u64,
    second: u64,
    /// The four bytes behind, where they are a tag and what it is on, and which of them count.
    tag: u32,
    tag_mask: u32,
    /// Bytes that must be at hand.
    need: u16,
}

impl Header {
    /// No frame's: its words do not agree about the bytes that they share.
    const NONE: Self = Self { first: 0, second: u64::MAX, tag: 0, tag_mask: 0, need: 0 };

    /// Of a frame at `place`, which begins with `head`.
    fn new(place: &Place, head: &[u8; SNAPSHOT_BYTES]) -> Self {
        let ([first, second], tag) = words(head);
        match (place.l3, place.tag) {
            (UNTAGGED, _) => Self { first, second, tag, tag_mask: 0, need: UNTAGGED },
            (TAGGED, Some(_)) => Self { first, second, tag, tag_mask: u32::MAX, need: TAGGED },
            // Behind two tags, each frame is a stretch of its own.
            _ => Self::NONE,
        }
    }

    #[inline(always)]
    fn begins(&self, head: &[u8; SNAPSHOT_BYTES], have: usize) -> bool {
        let ([first, second], tag) = words(head);
        let differs = (first ^ self.first) | (second ^ self.second) | u64::from((tag ^ self.tag) & self.tag_mask);
        differs == 0 && have >= usize::from(self.need)
    }
}

#[inline(always)]
fn words(head: &[u8; SNAPSHOT_BYTES]) -> ([u64; 2], u32) {
    let word = |at: usize| head.get(at..).and_then(|bytes| bytes.first_chunk::<8>()).copied().unwrap_or_default();
    let [first, second, behind] = [word(0), word(6), word(14)].map(u64::from_ne_bytes);
    ([first, second], behind as u32)
}

/// Consecutive trains of frames with the same link header.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    header: Header,
    pub place: Place,
    /// How plain packets lie in these frames, if any do.
    pub layout: Option<Layout>,
    /// Where the station that the frames are for was when the first of them was looked at.
    pub output: Option<PortId>,
    /// The same, if that port has a firewall.
    pub foretold: Option<PortId>,
    /// One of the firewalls that they will probably pass wants checksums verified.
    pub verify: bool,
    /// Its trains are those from here up to the next stretch's.
    first_train: u8,
}

impl Stretch {
    /// Of no frames.
    pub const NONE: Self = Self {
        header: Header::NONE,
        place: Place::NOWHERE,
        layout: None,
        output: None,
        foretold: None,
        verify: false,
        first_train: 0,
    };

    /// The frame that begins with `head`, of which the first `have` bytes are there, is one of these.
    #[inline(always)]
    pub fn carries(&self, head: &[u8; SNAPSHOT_BYTES], have: usize) -> bool {
        self.header.begins(head, have)
    }
}

/// The stretches of a burst, in order. By default there is room for none.
#[derive(Default)]
pub(super) struct Stretches {
    all: Box<[Stretch]>,
    len: usize,
}

impl Stretches {
    /// Room for a burst's.
    pub fn new() -> Self {
        Self { all: vec![Stretch::NONE; BURST].into_boxed_slice(), len: 0 }
    }

    /// Forgets those of the burst before. `first`: the one that this one begins with, if it is known.
    #[inline(always)]
    pub fn restart(&mut self, first: Option<&Stretch>) {
        self.len = 0;
        if let (Some(first), Some(place)) = (first, self.all.first_mut()) {
            *place = Stretch { first_train: 0, ..*first };
            self.len = 1;
        }
    }

    /// The first of them.
    pub fn first(&self) -> Option<&Stretch> {
        self.all().first()
    }

    fn all(&self) -> &[Stretch] {
        self.all.get(..self.len).unwrap_or_default()
    }

    /// All of them, with the numbers of their trains, of which there are `count`.
    pub fn with_trains(&self, count: usize) -> impl Iterator<Item = (&Stretch, Range<usize>)> {
        let first = |stretch: &Stretch| usize::from(stretch.first_train);
        let ends = self.all().iter().skip(1).map(first).chain([count]);
        self.all().iter().zip(ends).map(move |(stretch, end)| (stretch, first(stretch)..end))
    }

    /// Adds the stretch that begins with frame `i` and train `first_train`; what its frames will meet `foretell` says, unless a former
    /// one with the same header has shown it. `None`: the frame is dropped.
    pub fn begin<T>(
        &mut self,
        burst: &RxBurst,
        i: usize,
        port: &PortEntry<T>,
        sender: &mut Sender,
        first_train: usize,
        foretell: impl FnOnce(&mut Stretch),
    ) -> Option<Stretch> {
        let (head, have) = burst.head(i);
        let known = self.all().iter().rev().take(SEARCHED).find(|former| former.carries(head, have)).copied();
        let mut stretch = match known {
            Some(former) => former,
            None => {
                let place = place(burst, i, port, sender)?;
                let layout = Layout::new(place.l3, place.ethertype);
                let mut new = Stretch { header: Header::new(&place, head), place, layout, ..Stretch::NONE };
                foretell(&mut new);
                new
            }
        };
        stretch.first_train = first_train as u8;
        *self.all.get_mut(self.len)? = stretch;
        self.len += 1;
        Some(stretch)
    }
}

/// Reads frame `i`'s link header, and checks its VLAN. `None`: dropped.
pub(super) fn place<T>(burst: &RxBurst, i: usize, port: &PortEntry<T>, sender: &mut Sender) -> Option<Place> {
    let len = burst.meta(i).map_or(0, |meta| meta.len);
    let l2 = match packet::parse_l2(burst.snapshot(i), len) {
        Ok(l2) => l2,
        Err(ParseError::FrameTooShort) => {
            sender.fail(i, DropReason::RxTooShort);
            return None;
        }
        Err(_) => {
            sender.fail(i, DropReason::RxBadHeader);
            return None;
        }
    };
    let Some(vlan) = port.vlan.ingress(l2.vlan.map(|t| t.tci.vid().get())) else {
        sender.fail(i, DropReason::VlanNotAllowed);
        return None;
    };
    let link = Link { dst: l2.dst_mac, src: l2.src_mac };
    Some(Place { link, vlan, tag: l2.vlan, l3: l2.len, ethertype: l2.ethertype })
}
