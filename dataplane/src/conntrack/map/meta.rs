//! A slot's control word: what the slot is, which version of it, and when its entry expires, in one atomic word.

/// Versions have this many bits; they wrap.
pub const VERSION_BITS: u32 = 30;
/// The highest version; the next is 0.
pub const VERSION_MAX: u32 = (1 << VERSION_BITS) - 1;

/// `a` is newer than `b`, in the serial-number arithmetic of RFC 1982 over 30 bits: right as long as the two are less than 2^29 changes
/// apart.
#[inline]
pub const fn newer(a: u32, b: u32) -> bool {
    let distance = a.wrapping_sub(b) & VERSION_MAX;
    distance != 0 && distance < (1 << (VERSION_BITS - 1))
}

/// The version after this one.
#[inline]
pub(super) const fn next(version: u32) -> u32 {
    version.wrapping_add(1) & VERSION_MAX
}

/// The newer of two.
#[inline]
pub(super) const fn newest(a: u32, b: u32) -> u32 {
    if newer(b, a) { b } else { a }
}

/// What a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// No entry: free, or about to be.
    Free,
    /// An insertion that has not been decided yet; not to be found.
    Tentative,
    /// An entry.
    Live,
    /// An entry that one thread is changing.
    Writing,
}

/// `version << 34 | state << 32 | expires_ms`. Zero is a slot that was never used.
///
/// Within a slot the version only moves on, through free and tentative times too, so the word never takes the same value twice (until the
/// version wraps, or an import brings an old one): a thread that finds it unchanged knows that the whole slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meta(pub u64);

impl Meta {
    #[inline]
    pub const fn new(state: State, version: u32, expires_ms: u32) -> Self {
        let state = match state {
            State::Free => 0,
            State::Tentative => 1,
            State::Live => 2,
            State::Writing => 3,
        };
        Self(((version & VERSION_MAX) as u64) << 34 | state << 32 | expires_ms as u64)
    }

    #[inline]
    pub const fn state(self) -> State {
        match self.0 >> 32 & 3 {
            0 => State::Free,
            1 => State::Tentative,
            2 => State::Live,
            _ => State::Writing,
        }
    }

    #[inline]
    pub const fn version(self) -> u32 {
        (self.0 >> 34) as u32
    }

    #[inline]
    pub const fn expires_ms(self) -> u32 {
        self.0 as u32
    }

    /// The same with another state.
    #[inline]
    pub const fn with(self, state: State) -> Self {
        Self::new(state, self.version(), self.expires_ms())
    }

    /// From an entry's: that of the same entry while one thread changes it.
    #[inline(always)]
    pub const fn live_to_writing(self) -> Self {
        Self(self.0 | 1 << 32)
    }

    /// From an entry's: that of its next version.
    #[inline(always)]
    pub const fn live_to_next(self, expires_ms: u32) -> Self {
        Self((self.0 & !(u32::MAX as u64)).wrapping_add(1 << 34) | expires_ms as u64)
    }

    #[inline]
    pub const fn is_live(self) -> bool {
        matches!(self.state(), State::Live)
    }

    /// As [`super::super::Connection::is_expired`].
    #[inline]
    pub const fn is_expired(self, now_ms: u64) -> bool {
        self.expires_ms().wrapping_sub(now_ms as u32) as i32 <= 0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn serial_order_survives_the_wrap() {
        assert!(newer(1, 0) && !newer(0, 1) && !newer(7, 7));
        assert!(newer(0, VERSION_MAX) && !newer(VERSION_MAX, 0));
        assert_eq!(next(VERSION_MAX), 0);
        assert_eq!(newest(VERSION_MAX, 2), 2);
        assert_eq!(newest(5, 4), 5);
    }

    #[test]
    fn parts_come_back() {
        for state in [State::Free, State::Tentative, State::Live, State::Writing] {
            let m = Meta::new(state, VERSION_MAX, u32::MAX);
            assert_eq!((m.state(), m.version(), m.expires_ms()), (state, VERSION_MAX, u32::MAX));
        }
        for version in [0, 1, VERSION_MAX] {
            let live = Meta::new(State::Live, version, 77);
            assert_eq!(live.live_to_writing(), live.with(State::Writing));
            assert_eq!(live.live_to_next(99), Meta::new(State::Live, next(version), 99));
        }
        assert_eq!(Meta::new(State::Free, 0, 0), Meta(0));
        assert!(Meta::new(State::Live, 0, 5).is_expired(5) && !Meta::new(State::Live, 0, 5).is_expired(4));
        assert!(!Meta::new(State::Live, 0, 5).is_expired(u64::from(u32::MAX)));
    }
}
