//! Frames that do more to their connection than what [`crate::enforce::quick`] deals with, but of which all that matters has been read: the
//! middle way, [`crate::enforce::middle`], at either end.
use super::super::stretch::Stretch;
use super::super::{Place, Source, heed};
use super::Passage;
use crate::bridge::fdb::PortId;
use crate::conntrack::{Particulars, Plain};
use crate::enforce::middle::Known;
use crate::enforce::quick::Train;
use crate::frame::RxBurst;
use crate::packet::MacAddr;
use crate::port::TxPort;

impl<'a, T: TxPort> Passage<'_, 'a, T> {
    /// Judges trains of one frame each, up to the first that is not for the middle way, or probably for the short one; plain ones have to
    /// move their connection on. Adds a bit for each frame that the source's firewall lets go. Returns how many trains were judged.
    #[inline(never)]
    pub(super) fn leave_known(&mut self, stretch: &Stretch, trains: &[Train], left: &mut u64) -> usize {
        for (t, train) in trains.iter().enumerate() {
            let i = train.first;
            if i + 1 != train.end {
                return t;
            }
            let Some(passes) = self.leaves_known(stretch, train, i.into(), train.is_plain) else { return t };
            *left |= u64::from(passes) << i;
        }
        trains.len()
    }

    /// The same of the firewall of the output, which was met last. `frames`: a bit for each that wants to enter.
    #[inline(never)]
    pub(super) fn arrive_known(
        &mut self,
        stretch: &Stretch,
        output: PortId,
        trains: &[Train],
        frames: u64,
        entered: &mut u64,
    ) -> usize {
        for (t, train) in trains.iter().enumerate() {
            let i = train.first;
            if i + 1 != train.end {
                return t;
            }
            if frames >> i & 1 != 0 {
                let passes = self.arrives_known(stretch, train, i.into(), output, train.is_plain);
                let Some(passes) = passes else { return t };
                *entered |= u64::from(passes) << i;
            }
        }
        trains.len()
    }

    /// Whether the source's firewall lets frame `i` go; `None`: it is to be looked at more closely. `moving`: only if it moves its
    /// connection on.
    #[inline(always)]
    pub(super) fn leaves_known(&mut self, stretch: &Stretch, train: &Train, i: usize, moving: bool) -> Option<bool> {
        let source: &Source<'a, T> = self.source;
        let (quick, facts) = (self.near.as_mut().filter(|_| train.is_named)?, self.router.facts.get(i)?);
        let Place { link, vlan, .. } = stretch.place;
        let known = known(train, link.src, facts, self.burst, i)?;
        let sure = || is_verified(stretch, train, self.burst, i);
        let end = || if moving { None } else { source.near_end(vlan) };
        let outcome = self.router.stage.judge_known(quick, known, vlan, &train.near, sure, end)?;
        Some(heed(outcome, i, self.sender))
    }

    /// The same of the firewall of the output, which was met last.
    #[inline(always)]
    pub(super) fn arrives_known(
        &mut self,
        stretch: &Stretch,
        train: &Train,
        i: usize,
        output: PortId,
        moving: bool,
    ) -> Option<bool> {
        let (source, vouched): (&Source<'a, T>, _) = (self.source, self.vouches());
        let far = self.far.as_mut().filter(|far| train.is_named && far.output == output)?;
        let Place { link, vlan, .. } = stretch.place;
        let known = known(train, link.dst, self.router.facts.get(i)?, self.burst, i)?;
        let sure = || vouched || is_verified(stretch, train, self.burst, i);
        let end = || if moving { None } else { source.far_end(source.forwarding.port(output)?, vlan) };
        let outcome = self.router.stage.judge_known(&mut far.quick, known, vlan, &train.far, sure, end)?;
        Some(heed(outcome, i, self.sender))
    }
}

#[inline(always)]
fn known<'k>(
    train: &'k Train,
    station: MacAddr,
    facts: &'k Particulars,
    burst: &'k RxBurst,
    i: usize,
) -> Option<Known<'k>> {
    let ((head, have), len) = (burst.head(i), burst.meta(i)?.len);
    Some(Known { station, packet: &train.plain, facts, is_plain: train.is_plain, head, have, len })
}

/// The checksum of frame `i` is right, or somebody vouches for it; as far as that can be told here.
#[inline(always)]
fn is_verified(stretch: &Stretch, train: &Train, burst: &RxBurst, i: usize) -> bool {
    if train.is_plain && stretch.verify {
        return true;
    }
    let Some(meta) = burst.meta(i) else { return false };
    // What is not plain is by itself, and so is what was read of it.
    meta.offload.needs_csum || meta.offload.csum_valid || !train.is_plain && checksum_ok(&train.plain, burst, i)
}

#[inline(never)]
fn checksum_ok(packet: &Plain, burst: &RxBurst, i: usize) -> bool {
    let (head, have) = burst.head(i);
    packet.checksum_ok(head, have, || burst.body(i, have as u32))
}
