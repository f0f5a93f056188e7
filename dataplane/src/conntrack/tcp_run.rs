//! Ordinary segments of an open TCP connection, one after the other in one direction.
//!
//! What [`super::tcp::track`] does with a segment whose only significant flag is ACK, that fits into the windows and carries no options that
//! matter, on the few words that it changes. Anything else ends the run, and is for [`super::tcp`] to judge.
use super::config::TrackConfig;
use super::key::Way;
use super::plain::Particulars;
use super::tcp::{Kind, MAX_ACK_LAG, MAX_ACK_SET, Tcp, UNACKNOWLEDGED, after, before, open_timeout};

/// A connection's words, sorted by who sends the segments of the run and who receives them: end and upper bound of what was sent; largest
/// window and highest acknowledgement. Then flags and the last segment's end; its acknowledgement, window and length.
#[derive(Clone, Copy)]
pub(super) struct Words {
    pub sender: [u64; 2],
    pub receiver: [u64; 2],
    pub last: [u64; 2],
}

/// A run of segments.
pub(super) struct Run {
    is_reply: bool,
    end: u32,
    max_end: u32,
    max_window: u32,
    max_ack: u32,
    receiver_end: u32,
    receiver_max_end: u32,
    receiver_max_window: u32,
    receiver_max_ack: u32,
    scale: u8,
    bits: u32,
    last_end: u32,
    last_ack: u32,
    last: u32,
    retrans: u8,
}

impl Run {
    /// Of segments that go `way` on an established connection with these words. `None`: it has not seen both sides' windows.
    #[inline(always)]
    pub fn new(words: Words, retrans: u8, way: Way) -> Option<Self> {
        let (low, high) = (|word: u64| word as u32, |word: u64| (word >> 32) as u32);
        let Words { sender: [a, b], receiver: [c, d], last: [e, f] } = words;
        let is_reply = way == Way::Reply;
        let bits = low(e);
        let own = bits >> Tcp::shift_of(is_reply);
        if low(b) == 0 || low(d) == 0 || own & MAX_ACK_SET == 0 {
            return None;
        }
        Some(Self {
            is_reply,
            end: low(a),
            max_end: high(a),
            max_window: low(b),
            max_ack: high(b),
            receiver_end: low(c),
            receiver_max_end: high(c),
            receiver_max_window: low(d),
            receiver_max_ack: high(d),
            scale: Tcp::scale_of(own),
            bits,
            last_end: high(e),
            last_ack: low(f),
            last: high(f),
            retrans,
        })
    }

    /// Takes the next segment. False, and nothing was changed: it does not fit.
    #[inline(always)]
    pub fn take(&mut self, segment: &Particulars) -> bool {
        let (ack, len) = (segment.ack, u32::from(segment.payload_len));
        let end = segment.seq.wrapping_add(len);
        let ack_low = self.receiver_end.wrapping_sub(self.max_window.max(MAX_ACK_LAG)).wrapping_sub(1);
        let data_low = self.end.wrapping_sub(self.receiver_max_window).wrapping_sub(1);
        let fits = before(segment.seq, self.max_end.wrapping_add(1))
            & before(ack, self.receiver_end.wrapping_add(1))
            & after(end, data_low)
            & after(ack, ack_low);
        if !fits {
            return false;
        }
        let (own, other) = (Tcp::shift_of(self.is_reply), Tcp::shift_of(!self.is_reply));
        let window = u32::from(segment.window) << self.scale;
        self.max_window = self.max_window.max(window);
        if after(end, self.end) {
            self.end = end;
            self.bits |= UNACKNOWLEDGED << own;
        }
        if after(ack, self.max_ack) {
            self.max_ack = ack;
        }
        if after(end, self.max_end) {
            self.receiver_max_window = self.receiver_max_window.wrapping_add(end.wrapping_sub(self.max_end));
        }
        let allowed = ack.wrapping_add(window);
        if after(allowed, self.receiver_max_end.wrapping_sub(1)) {
            self.receiver_max_end = allowed.wrapping_add(u32::from(window == 0));
        }
        if ack == self.receiver_end {
            self.bits &= !(UNACKNOWLEDGED << other);
        }
        // The same one again. That it is as long and ends where the last one did says that it begins there, too.
        let last = u32::from(segment.window) | len << 16;
        let bits = Tcp::with_last(self.bits, Kind::Ack, self.is_reply);
        let again = (self.last_end ^ end) | (self.last_ack ^ ack) | (self.last ^ last) == 0
            && Tcp::last_is_reply(self.bits) == self.is_reply;
        self.retrans = if again { self.retrans.saturating_add(1) } else { 0 };
        (self.bits, self.last_end, self.last_ack, self.last) = (bits, end, ack, last);
        true
    }

    /// The words after the last segment, its retransmissions, and the connection's timeout in milliseconds.
    #[inline(always)]
    pub fn finish(self, config: &TrackConfig) -> (Words, u8, u32) {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let words = Words {
            sender: [pair(self.end, self.max_end), pair(self.max_window, self.max_ack)],
            receiver: [
                pair(self.receiver_end, self.receiver_max_end),
                pair(self.receiver_max_window, self.receiver_max_ack),
            ],
            last: [pair(self.bits, self.last_end), pair(self.last_ack, self.last)],
        };
        let unacknowledged =
            self.bits & (UNACKNOWLEDGED << Tcp::shift_of(false) | UNACKNOWLEDGED << Tcp::shift_of(true));
        let timeout_ms = open_timeout(self.retrans, unacknowledged != 0, self.last as u16 == 0, config);
        (words, self.retrans, timeout_ms)
    }
}
