//! The first frames of a connection: what it is for, and to which migration it belongs.
//!
//! `Open`, 60 bytes: `"FERRYMIG"`, purpose (1 control, 2 bulk, 3 check), three zero bytes, migration id (16 bytes, big endian),
//! token (32 bytes; zero but for bulk).
//!
//! `OpenReply`, 38 bytes and more: code, three zero bytes, token (32 bytes; zero but in the acceptance of a control connection), length of the text (2 bytes,
//! little endian), text (UTF-8, for operators).
//!
//! The token is a secret that the listener makes for each control connection: who opens a bulk connection proves with it, besides
//! its certificate, that it belongs to the control connection.

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Control messages of a migration; a bulk connection follows.
    Control,
    /// Batches of records.
    Bulk,
    /// Control messages of a pre-flight check; no bulk connection follows.
    Check,
}

/// Why a connection was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCode {
    /// As many migrations as are allowed are under way; try later.
    Busy,
    /// A bulk connection belongs to no control connection of this host.
    UnknownSession,
    /// A control connection with this migration id waits already.
    Duplicate,
    /// This host may not migrate anything to or from here.
    NotAdmitted,
    /// The first frame was not understood.
    Malformed,
}

impl RefusalCode {
    fn to_byte(self) -> u8 {
        match self {
            Self::Busy => 1,
            Self::UnknownSession => 2,
            Self::Duplicate => 3,
            Self::NotAdmitted => 4,
            Self::Malformed => 5,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Busy,
            2 => Self::UnknownSession,
            3 => Self::Duplicate,
            4 => Self::NotAdmitted,
            5 => Self::Malformed,
            _ => return None,
        })
    }
}

/// A secret that ties connections together.
pub(crate) type Token = [u8; 32];

/// Longest payload of either frame, bytes.
pub(crate) const MAX_OPEN_BYTES: usize = 512;
/// Longest text of a reply, bytes.
const MAX_TEXT_BYTES: usize = 400;
const MAGIC: &[u8; 8] = b"FERRYMIG";
const ACCEPTED: u8 = 0;

/// The dialler's first frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Open {
    pub purpose: Purpose,
    pub migration: u128,
    pub token: Token,
}

impl Open {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let purpose = match self.purpose {
            Purpose::Control => 1,
            Purpose::Bulk => 2,
            Purpose::Check => 3,
        };
        [MAGIC.as_slice(), &[purpose, 0, 0, 0], &self.migration.to_be_bytes(), &self.token].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk::<8>()?;
        let ([purpose, zeros @ ..], rest) = rest.split_first_chunk::<4>()?;
        let (migration, rest) = rest.split_first_chunk::<16>()?;
        let token: Token = rest.try_into().ok()?;
        let purpose = match purpose {
            1 => Purpose::Control,
            2 => Purpose::Bulk,
            3 => Purpose::Check,
            _ => return None,
        };
        let valid = magic == MAGIC && *zeros == [0; 3] && (purpose == Purpose::Bulk || token == [0; 32]);
        valid.then(|| Self { purpose, migration: u128::from_be_bytes(*migration), token })
    }
}

/// The listener's first frame.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum OpenReply {
    Accepted(Token),
    Refused(RefusalCode, String),
}

impl OpenReply {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (code, token, text) = match self {
            Self::Accepted(token) => (ACCEPTED, *token, ""),
            Self::Refused(code, text) => {
                let text = crate::text::cut(text, MAX_TEXT_BYTES);
                (code.to_byte(), [0; 32], text)
            }
        };
        let len = u16::try_from(text.len()).unwrap_or(0).to_le_bytes();
        [&[code, 0, 0, 0], token.as_slice(), &len, text.as_bytes()].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let ([code, zeros @ ..], rest) = bytes.split_first_chunk::<4>()?;
        let (token, rest) = rest.split_first_chunk::<32>()?;
        let (len, text) = rest.split_first_chunk::<2>()?;
        if *zeros != [0; 3] || text.len() != usize::from(u16::from_le_bytes(*len)) || text.len() > MAX_TEXT_BYTES {
            return None;
        }
        if *code == ACCEPTED {
            return text.is_empty().then_some(Self::Accepted(*token));
        }
        // The text is shown to operators: nothing in it may steer a terminal.
        let text = std::str::from_utf8(text).ok()?.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        Some(Self::Refused(RefusalCode::from_byte(*code)?, text))
    }
}

/// Compares secrets in a time that does not tell where they differ.
pub(crate) fn same_token(a: &Token, b: &Token) -> bool {
    let difference = a.iter().zip(b).fold(0u8, |all, (a, b)| all | (a ^ b));
    std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_was_encoded_is_decoded() {
        for purpose in [Purpose::Control, Purpose::Bulk, Purpose::Check] {
            let token = if purpose == Purpose::Bulk { [9; 32] } else { [0; 32] };
            let open = Open { purpose, migration: 0x0102_0304, token };
            let bytes = open.encode();
            assert_eq!(bytes.len(), 60);
            assert!(Open::decode(&bytes) == Some(open));
            for len in 0..bytes.len() {
                assert!(Open::decode(&bytes[..len]).is_none());
            }
            assert!(Open::decode(&[bytes.as_slice(), &[0]].concat()).is_none());
            for at in 0..12 {
                let mut bad = bytes.clone();
                bad[at] ^= 0x80;
                assert!(Open::decode(&bad).is_none(), "{at}");
            }
        }
        let secret_in_control = Open { purpose: Purpose::Control, migration: 1, token: [1; 32] };
        assert!(Open::decode(&secret_in_control.encode()).is_none());
    }

    #[test]
    fn replies() {
        let accepted = OpenReply::Accepted([7; 32]);
        assert!(OpenReply::decode(&accepted.encode()) == Some(accepted.clone()));
        for code in 1..=5 {
            let code = RefusalCode::from_byte(code).unwrap();
            let refused = OpenReply::Refused(code, "busy: ä".into());
            let bytes = refused.encode();
            assert!(OpenReply::decode(&bytes) == Some(refused));
            for len in 0..bytes.len() {
                assert!(OpenReply::decode(&bytes[..len]).is_none());
            }
        }
        let long = OpenReply::Refused(RefusalCode::Busy, "ä".repeat(1000)).encode();
        assert!(long.len() <= MAX_OPEN_BYTES);
        let Some(OpenReply::Refused(_, text)) = OpenReply::decode(&long) else { panic!() };
        assert!(text.starts_with("ää"));
        let escape = OpenReply::Refused(RefusalCode::Busy, "\x1b[2J".into()).encode();
        assert!(OpenReply::decode(&escape) == Some(OpenReply::Refused(RefusalCode::Busy, "?[2J".into())));
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(open) = Open::decode(&bytes) {
                prop_assert_eq!(open.encode(), bytes.clone());
            }
            if let Some(OpenReply::Accepted(token)) = OpenReply::decode(&bytes) {
                prop_assert_eq!(OpenReply::Accepted(token).encode(), bytes);
            }
        }
    }
}
