//! The way of a frame through the firewall of one VM, with header copies as the switch takes them.
#![allow(unsafe_code)] // Lends private buffers to a burst, as a port would.
use super::read::{Capture, Frame, View};
use crate::live::own::{Policy, flow_key};
use ferry_dataplane::conntrack::{
    Checksum, CtState, Judgement, ModelTable, Packet, Toward, TrackConfig, Tracked, Tracker,
};
use ferry_dataplane::firewall::spoof::{SpoofConfig, SpoofTable};
use ferry_dataplane::firewall::{Cidr, Direction, FlowKey};
use ferry_dataplane::frame::{MAX_FRAME_BYTES, Offload, RxBurst};
use ferry_dataplane::packet::{Fragment, Headers, MacAddr, ParseError, parse};
use std::collections::BTreeMap;

/// What became of frames: how many, under which headings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Frames that came in.
    pub frames: u64,
    /// Connections that were opened.
    pub connections: u64,
    /// Frames by heading. Each frame is under exactly one.
    pub headings: BTreeMap<String, u64>,
}

impl Account {
    /// Sum over all headings.
    pub fn sum(&self) -> u64 {
        self.headings.values().sum()
    }
}

/// One VM's firewall.
pub struct Pipeline<'p> {
    tracker: Tracker<ModelTable>,
    policy: &'p Policy,
    spoof: SpoofTable,
    station: [u8; 6],
    view: View,
    burst: RxBurst,
    now_ms: u64,
    account: Account,
}

impl<'p> Pipeline<'p> {
    /// The firewall of `capture`'s station, or of everyone else in it.
    pub fn new(capture: &Capture, view: View, policy: &'p Policy) -> Self {
        let (station, addresses) = capture.station().unwrap_or_default();
        let spoof = SpoofConfig {
            // Everyone else has too many addresses to be checked.
            enabled: view == View::First,
            mac: Some(MacAddr::new(station)),
            addresses: addresses.into_iter().map(Cidr::host).collect(),
            ..SpoofConfig::default()
        };
        Self {
            tracker: Tracker::new(ModelTable::new(10_000), TrackConfig::default()),
            policy,
            spoof: SpoofTable::new(&spoof, 1),
            station,
            view,
            burst: RxBurst::new(),
            now_ms: 0,
            account: Account::default(),
        }
    }

    /// What became of the frames so far.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// Bytes of fragments still held when all their time is over.
    pub fn fragment_bytes_in_the_end(mut self) -> usize {
        self.tracker.fragments().expire(self.now_ms + 3_600_000, 1 << 20);
        self.tracker.fragments().bytes_held()
    }

    /// Takes a frame in.
    pub fn frame(&mut self, frame: &Frame) {
        self.now_ms = frame.at_ms;
        self.account.frames += 1;
        let heading = self.judge(&frame.bytes);
        *self.account.headings.entry(heading).or_default() += 1;
    }

    /// The heading that a frame comes under.
    fn judge(&mut self, bytes: &[u8]) -> String {
        if bytes.len() < 14 || bytes.len() > MAX_FRAME_BYTES as usize {
            return "no-frame".into();
        }
        let from_station = bytes.get(6..12) == Some(&self.station[..]);
        let toward = if from_station == (self.view != View::Others) { Toward::Egress } else { Toward::Ingress };
        self.burst.clear();
        // In pieces, as from a guest.
        for piece in bytes.chunks(61.max(bytes.len() / 8)) {
            // SAFETY: `bytes` outlives the burst's use of it: the burst is cleared before the next frame.
            unsafe { self.burst.push_segment(piece.as_ptr(), piece.len() as u32) };
        }
        if !self.burst.finish_frame(0, Offload::default()) {
            return "no-room".into();
        }
        self.burst.take_snapshots();
        let headers = match self.parse(bytes.len() as u32) {
            Ok(headers) => headers,
            Err(heading) => return heading,
        };
        if toward == Toward::Egress
            && let Err(reason) = self.spoof.check(self.burst.snapshot(0), &headers)
        {
            return format!("spoofed:{}", reason.name());
        }
        let mut judgement = self.track(toward);
        if matches!(judgement, Judgement::NeedMore { .. }) {
            self.burst.extend_snapshot(0);
            judgement = self.track(toward);
        }
        match judgement {
            Judgement::NotIp(ethertype) => {
                format!("not-ip:{}", if self.policy.passes_ethertype(ethertype) { "passed" } else { "dropped" })
            }
            Judgement::NeedMore { .. } => "too-deep".into(),
            Judgement::Malformed(why) => format!("malformed:{why:?}"),
            Judgement::Held => "held".into(),
            Judgement::Refused(why) => format!("refused:{why:?}"),
            Judgement::Tracked(tracked) => self.tracked(tracked, &headers, toward),
        }
    }

    /// The headers, in the eager copy or in the whole one.
    fn parse(&mut self, frame_len: u32) -> Result<Headers, String> {
        let mut result = parse(self.burst.snapshot(0), frame_len);
        if matches!(result, Err(ParseError::NeedMore { .. })) {
            self.burst.extend_snapshot(0);
            result = parse(self.burst.snapshot(0), frame_len);
        }
        result.map_err(|error| match error {
            ParseError::NeedMore { .. } => "too-deep".into(),
            other => format!("unparsed:{other:?}"),
        })
    }

    fn track(&mut self, toward: Toward) -> Judgement {
        let head = self.burst.snapshot(0);
        let body = self.burst.body(0, head.len() as u32);
        let checksum = if self.view == View::Trusted { Checksum::Vouched } else { Checksum::Verify };
        self.tracker.track(&Packet { head, body, toward, checksum, zone: None }, self.now_ms)
    }

    fn tracked(&mut self, tracked: Tracked, headers: &Headers, toward: Toward) -> String {
        let allowed = self.policy.allows(&tracked);
        let stored = !allowed || self.tracker.confirm(&tracked, self.now_ms).is_ok();
        if allowed && stored && tracked.fresh {
            self.account.connections += 1;
        }
        let state = match tracked.state {
            CtState::New => "new",
            CtState::Established => "established",
            CtState::Related => "related",
            CtState::Invalid => "invalid",
            CtState::Untracked => "untracked",
        };
        if tracked.state != CtState::Invalid && tracked.datagram.is_none() && headers.fragment == Fragment::None {
            self.assert_same_key(&tracked, headers, toward);
        }
        if let Some(datagram) = tracked.datagram {
            if allowed && stored {
                let mut released = 0;
                self.tracker.fragments().release(datagram, |_| released += 1);
                assert!(released > 0, "a whole datagram has fragments");
            } else {
                self.tracker.fragments().discard(datagram);
            }
        }
        match (tracked.invalid, allowed, stored) {
            (Some(why), false, _) => format!("invalid:{why:?}"),
            (_, false, _) => format!("{state}:denied"),
            (_, true, true) => format!("{state}:allowed"),
            (_, true, false) => format!("{state}:full"),
        }
    }

    /// Stateless rules look at what the parser found, all others at what tracking found: it must be the same.
    fn assert_same_key(&self, tracked: &Tracked, headers: &Headers, toward: Toward) {
        let Some(flow) = &tracked.flow else { return };
        let direction = if toward == Toward::Ingress { Direction::Ingress } else { Direction::Egress };
        let parsed = FlowKey::of(self.burst.snapshot(0), headers, direction);
        let (tracked_direction, key) = flow_key(flow);
        assert_eq!(direction, tracked_direction);
        // Tracking does not look for ports where it does not track by them.
        assert_eq!(
            parsed.map(|p| (p.remote, p.protocol, p.l4.filter(|_| key.l4.is_some()))),
            Some((key.remote, key.protocol, key.l4)),
            "frame {:02x?}",
            self.burst.snapshot(0)
        );
    }
}
