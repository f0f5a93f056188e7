//! What has become of a stream on its way: losses, duplicates, reorderings, corruption.
//!
//! Every frame is counted; looking into frames costs more than forwarding them, so that is done on a sample of bursts. As
//! numbers are consecutive, a number seen after *n* counted frames tells how many are missing among them: losses and
//! duplicates are exact over the whole stream (a loss and a duplicate between two samples cancel out), order and contents
//! are checked on the sample.
//!
//! Frames that are to be segmented may arrive whole or in segments. There the bytes of the TCP stream are what is counted; a
//! "frame" received is as many bytes as one that was sent.
use crate::frame::NetHeader;
use crate::stream::Frames;
use serde::{Deserialize, Serialize};

/// Findings on one or more streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// Frames received.
    pub frames: u64,
    /// Bytes received, without virtio-net headers.
    pub bytes: u64,
    /// Frames looked into.
    pub sampled: u64,
    /// Frames that never came.
    pub lost: u64,
    /// Frames that came more than once.
    pub duplicated: u64,
    /// Frames that came after a later one.
    pub reordered: u64,
    /// Frames whose contents or length changed.
    pub corrupted: u64,
}

impl Findings {
    /// Adds another stream's.
    pub fn add(&mut self, other: &Findings) {
        self.frames += other.frames;
        self.bytes += other.bytes;
        self.sampled += other.sampled;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
        self.corrupted += other.corrupted;
    }

    /// Whether every frame that arrived was as it should be; losses are not counted.
    pub fn sound(&self) -> bool {
        self.duplicated == 0 && self.reordered == 0 && self.corrupted == 0
    }
}

/// Follows one stream at its receiver.
#[derive(Debug)]
pub struct Checker {
    expected: Frames,
    findings: Findings,
    /// Frames received since the beginning.
    total: u64,
    /// What of a stream is numbered: frames (1), or bytes of payload when frames are to be segmented (payload of one frame).
    unit: u64,
    /// The number that the next frame should carry, if nothing was lost since the last look.
    next: u64,
    /// Numbers counted since `next` was known.
    uncounted: u64,
    /// Units received that are no whole frame yet.
    rest: u64,
    scratch: Vec<u8>,
}

impl Checker {
    /// Expects the stream's frames from the next one on.
    pub fn new(expected: &Frames) -> Self {
        let unit = if expected.segmented() { expected.spec().kind.payload_bytes() as u64 } else { 1 };
        Self {
            expected: expected.clone(),
            findings: Findings::default(),
            total: 0,
            unit,
            next: u64::from(expected.next().seq) * unit,
            uncounted: 0,
            rest: 0,
            scratch: Vec::new(),
        }
    }

    /// Units that frames hold.
    #[inline]
    fn units(&self, frames: u64, bytes: u64) -> u64 {
        if self.unit == 1 { frames } else { bytes.saturating_sub(frames * self.headers()) }
    }

    fn headers(&self) -> u64 {
        self.expected.spec().kind.payload_at() as u64
    }

    #[inline]
    fn received(&mut self, units: u64, bytes: u64) {
        let (mut frames, mut rest) = (units, 0);
        if self.unit != 1 {
            (frames, rest) = ((self.rest + units) / self.unit, (self.rest + units) % self.unit);
        }
        self.rest = rest;
        self.findings.frames += frames;
        self.total += frames;
        self.findings.bytes += bytes;
    }

    /// Counts frames without looking into them.
    #[inline]
    pub fn count(&mut self, frames: u32, bytes: u64) {
        let units = self.units(u64::from(frames), bytes);
        self.received(units, bytes);
        self.uncounted += units;
    }

    /// Counts a frame and looks into it; into its payload only when `whole`.
    pub fn look(&mut self, frame: &[u8], whole: bool) {
        self.look_at(NetHeader::default(), frame, whole);
    }

    /// The same with the virtio-net header before the frame, which matters when frames are to be segmented. Those must be `whole`.
    pub fn look_at(&mut self, header: NetHeader, frame: &[u8], whole: bool) {
        let units = self.units(1, frame.len() as u64);
        self.received(units, frame.len() as u64);
        self.findings.sampled += 1;
        let expected = self.next + self.uncounted;
        // Numbers are 32 bits wide and go round; the one that is meant is the nearest to what is expected.
        let Some(ahead) = self.number(frame).map(|n| i64::from(n.wrapping_sub(self.wire(expected)).cast_signed()))
        else {
            self.findings.corrupted += 1;
            self.uncounted += units;
            return;
        };
        let number = expected.wrapping_add_signed(ahead);
        if !self.intact(header, frame, number, whole) {
            self.findings.corrupted += 1;
        }
        // In whole frames; a part of one counts as one.
        let frames = ahead.unsigned_abs().div_ceil(self.unit);
        let f = &mut self.findings;
        if ahead > 0 {
            f.lost += frames;
        } else if ahead < 0 {
            if self.uncounted > 0 {
                // More frames than numbers since the last look.
                f.duplicated += frames;
            } else if ahead.unsigned_abs() == units {
                // The one that was looked at last.
                f.duplicated += 1;
                return;
            } else {
                // It was counted as lost when a later one overtook it.
                f.reordered += 1;
                f.lost = f.lost.saturating_sub(1);
                return;
            }
        }
        self.next = number.wrapping_add(units);
        self.uncounted = 0;
    }

    /// The number that a frame carries.
    fn number(&self, frame: &[u8]) -> Option<u32> {
        if self.unit == 1 { self.expected.stamp(frame) } else { self.expected.number_of(frame) }
    }

    /// How a number stands in a frame.
    fn wire(&self, number: u64) -> u32 {
        if self.unit == 1 { number as u32 } else { Frames::number_at(number) }
    }

    fn intact(&mut self, header: NetHeader, frame: &[u8], number: u64, whole: bool) -> bool {
        if self.unit != 1 {
            return self.expected.segment_intact(header, frame, number);
        }
        let seq = number as u32;
        frame.len() == self.expected.bytes_of(seq) && (!whole || self.expected.intact(frame, seq, &mut self.scratch))
    }

    /// Sequence number of the frame after the last one seen.
    pub fn reached(&self) -> u32 {
        (self.next / self.unit) as u32
    }

    /// Lap of the last frame looked into: everything before that lap has arrived or is lost.
    pub fn lap(&self) -> u32 {
        self.reached() / self.expected.spec().connections
    }

    /// Findings so far.
    pub fn findings(&self) -> Findings {
        self.findings
    }

    /// Frames received since the beginning, whatever was taken.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Findings since the last call.
    pub fn take(&mut self) -> Findings {
        std::mem::take(&mut self.findings)
    }

    /// Bytes that the longest frame should have.
    pub fn frame_bytes(&self) -> usize {
        self.expected.bytes()
    }

    /// Whether some frame should have this many bytes.
    #[inline]
    pub fn has_length(&self, bytes: usize) -> bool {
        self.expected.has_length(bytes)
    }

    /// Whether frames have several lengths.
    #[inline]
    pub fn mixed(&self) -> bool {
        self.expected.mixed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{FrameKind, Shape, Station, Transport};
    use crate::stream::{Spread, Step, StreamSpec};

    fn stream(n: usize) -> (Checker, Vec<Vec<u8>>) {
        let kind = FrameKind { bytes: 64, transport: Transport::Udp, ipv6: false };
        let (from, to) = (Station::new(1), Station::new(2));
        let spec =
            StreamSpec { kind, from, to, opener: true, connections: 3, spread: Spread::Uniform, shape: Shape::Plain };
        let mut frames = Frames::new(&spec, Step::Data);
        let checker = Checker::new(&frames);
        let all = (0..n)
            .map(|_| {
                let mut f = frames.template().to_vec();
                #[expect(unsafe_code, reason = "the writer works in place")]
                // SAFETY: a whole frame.
                unsafe {
                    frames.write_next(f.as_mut_ptr());
                }
                f
            })
            .collect();
        (checker, all)
    }

    #[test]
    fn an_intact_stream_has_no_findings() {
        let (mut c, frames) = stream(50);
        for f in &frames {
            c.look(f, true);
        }
        let f = c.findings();
        assert_eq!(f, Findings { frames: 50, bytes: 50 * 64, sampled: 50, ..Findings::default() });
        assert_eq!(c.lap(), 16);
    }

    #[test]
    fn losses_between_samples_are_counted_exactly() {
        let (mut c, frames) = stream(100);
        c.look(&frames[0], true);
        c.count(40, 40 * 64); // 1..=40 without 7 and 8, so up to 42
        c.look(&frames[43], true);
        assert_eq!(c.findings().lost, 2);
        assert!(c.findings().sound());
    }

    #[test]
    fn duplicates_reorderings_and_corruption_are_told_apart() {
        let (mut c, frames) = stream(20);
        for i in [0, 1, 1, 2, 4, 3, 5] {
            c.look(&frames[i], true);
        }
        let f = c.findings();
        assert_eq!((f.lost, f.duplicated, f.reordered, f.corrupted), (0, 1, 1, 0));
        let mut bad = frames[6].clone();
        bad[63] ^= 1;
        c.look(&bad, true);
        let mut bad = frames[7].clone();
        bad[44] ^= 1; // the stamp itself
        c.look(&bad, true);
        c.look(&frames[8], true);
        let f = c.findings();
        assert_eq!((f.lost, f.duplicated, f.reordered, f.corrupted), (0, 1, 1, 2));
        c.look(&frames[9][..60], true);
        assert_eq!(c.findings().corrupted, 3);
        c.count(5, 0);
        c.look(&frames[12], true); // 10 and 11 in five frames
        assert_eq!(c.findings().duplicated, 1 + 3);
    }
}
