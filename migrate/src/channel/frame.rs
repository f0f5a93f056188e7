//! Framing: how messages are told apart on a connection.
//!
//! ```text
//!  0       4      5            8
//! +--------+------+------------+---------------- - -
//! | length | kind | 0    0   0 | payload (length bytes)
//! +--------+------+------------+---------------- - -
//! ```
//! `length`: of the payload, little endian. TLS below protects against change, so there is no checksum here.

/// Bytes before each payload.
pub const HEADER_BYTES: usize = 8;

/// Memory for a payload grows in steps of this many bytes as they arrive: a peer that only announces a long one costs nothing.
const STEP_BYTES: usize = 64 * 1024;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// A message of the layer above.
    Data,
    /// "I am still here"; empty.
    KeepAlive,
    /// The sender has said everything; empty. A connection that ends without it was cut.
    Close,
    /// First frame of the dialler.
    Open,
    /// First frame of the listener.
    OpenReply,
}

impl FrameKind {
    fn to_byte(self) -> u8 {
        match self {
            Self::Data => 1,
            Self::KeepAlive => 2,
            Self::Close => 3,
            Self::Open => 4,
            Self::OpenReply => 5,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Data,
            2 => Self::KeepAlive,
            3 => Self::Close,
            4 => Self::Open,
            5 => Self::OpenReply,
            _ => return None,
        })
    }
}

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than allowed here.
    #[error("frame of {bytes} bytes; at most {limit} are allowed")]
    TooLong {
        /// As it claims.
        bytes: u32,
        /// What is allowed.
        limit: usize,
    },
    /// A kind that this version does not know.
    #[error("unknown kind of frame {0}")]
    Kind(u8),
    /// The three reserved bytes must be 0.
    #[error("reserved bytes of a frame are not zero")]
    Reserved,
    /// A kind that has no payload has one.
    #[error("a keep-alive or close frame has a payload")]
    Payload,
    /// The bytes end within a frame.
    #[error("ends within a frame, {missing} bytes before its end")]
    Cut {
        /// How many are missing at least.
        missing: usize,
    },
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What it is for.
    pub kind: FrameKind,
    /// Length of the payload, bytes.
    pub len: usize,
}

impl FrameHeader {
    /// Checks a header; `limit`: longest payload allowed, bytes.
    ///
    /// # Errors
    /// See [`FrameError`].
    pub fn parse(bytes: [u8; HEADER_BYTES], limit: usize) -> Result<Self, FrameError> {
        let [l0, l1, l2, l3, kind, r0, r1, r2] = bytes;
        let claimed = u32::from_le_bytes([l0, l1, l2, l3]);
        let kind = FrameKind::from_byte(kind).ok_or(FrameError::Kind(kind))?;
        if [r0, r1, r2] != [0; 3] {
            return Err(FrameError::Reserved);
        }
        let len = usize::try_from(claimed).unwrap_or(usize::MAX);
        if matches!(kind, FrameKind::KeepAlive | FrameKind::Close) && len > 0 {
            return Err(FrameError::Payload);
        }
        if len > limit {
            return Err(FrameError::TooLong { bytes: claimed, limit });
        }
        Ok(Self { kind, len })
    }

    /// The header as bytes. None: the payload is too long for any header.
    pub fn to_bytes(self) -> Option<[u8; HEADER_BYTES]> {
        let [l0, l1, l2, l3] = u32::try_from(self.len).ok()?.to_le_bytes();
        Some([l0, l1, l2, l3, self.kind.to_byte(), 0, 0, 0])
    }
}

/// A whole frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is for.
    pub kind: FrameKind,
    /// The message.
    pub payload: Vec<u8>,
}

impl Frame {
    /// The frame as bytes. None: the payload is too long for any header.
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        let header = FrameHeader { kind: self.kind, len: self.payload.len() }.to_bytes()?;
        Some([&header, self.payload.as_slice()].concat())
    }
}

/// Takes frames out of a stream of bytes, however it is cut into pieces. Holds at most one frame. After an error it must not be used further.
#[derive(Debug)]
pub struct FrameDecoder {
    limit: usize,
    header: [u8; HEADER_BYTES],
    header_len: usize,
    /// Once the header is complete.
    body: Option<(FrameHeader, Vec<u8>)>,
}

impl FrameDecoder {
    /// `limit`: longest payload allowed, bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, header: [0; HEADER_BYTES], header_len: 0, body: None }
    }

    /// Takes bytes from the front of `input`: up to the end of a frame, which is returned, or all of them.
    ///
    /// # Errors
    /// See [`FrameError`]; the connection cannot be used further.
    pub fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        if self.body.is_none() {
            for to in self.header.iter_mut().skip(self.header_len) {
                let Some((byte, rest)) = input.split_first() else { return Ok(None) };
                *to = *byte;
                *input = rest;
                self.header_len += 1;
            }
            let header = FrameHeader::parse(self.header, self.limit)?;
            self.body = Some((header, Vec::with_capacity(header.len.min(STEP_BYTES))));
        }
        let Some((header, mut payload)) = self.body.take() else { return Ok(None) };
        let missing = header.len.saturating_sub(payload.len());
        let (taken, rest) = input.split_at_checked(missing).unwrap_or((input, &[]));
        if payload.capacity() - payload.len() < taken.len() {
            // Not doubled: never more than one step beyond what has arrived.
            payload.reserve_exact(taken.len().max(STEP_BYTES.min(missing)));
        }
        payload.extend_from_slice(taken);
        *input = rest;
        if payload.len() < header.len {
            self.body = Some((header, payload));
            return Ok(None);
        }
        self.header_len = 0;
        Ok(Some(Frame { kind: header.kind, payload }))
    }

    /// Within a frame: how long its payload is at most (as far as is known). None: between frames.
    pub fn inside(&self) -> Option<usize> {
        match &self.body {
            Some((header, _)) => Some(header.len),
            None => (self.header_len > 0).then_some(self.limit),
        }
    }

    /// The stream has ended.
    ///
    /// # Errors
    /// [`FrameError::Cut`] within a frame.
    pub fn finish(&self) -> Result<(), FrameError> {
        match &self.body {
            Some((header, payload)) => Err(FrameError::Cut { missing: header.len.saturating_sub(payload.len()) }),
            None if self.header_len > 0 => Err(FrameError::Cut { missing: HEADER_BYTES - self.header_len }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 300;

    fn frames() -> Vec<Frame> {
        let data = |len: usize| Frame { kind: FrameKind::Data, payload: (0..len).map(|i| i as u8).collect() };
        let empty = |kind| Frame { kind, payload: vec![] };
        vec![data(1), empty(FrameKind::KeepAlive), data(0), data(LIMIT), empty(FrameKind::Close)]
    }

    fn bytes(frames: &[Frame]) -> Vec<u8> {
        frames.iter().flat_map(|f| f.to_bytes().unwrap()).collect()
    }

    #[test]
    fn cut_at_every_byte() {
        let all = bytes(&frames());
        let mut ends = vec![0];
        for frame in frames() {
            ends.push(ends.last().unwrap() + HEADER_BYTES + frame.payload.len());
        }
        for at in 0..=all.len() {
            let mut decoder = FrameDecoder::new(LIMIT);
            let mut input = &all[..at];
            let mut got = vec![];
            while let Some(frame) = decoder.feed(&mut input).unwrap() {
                got.push(frame);
            }
            let whole = ends.iter().filter(|e| **e <= at).count() - 1;
            assert_eq!(got, frames()[..whole], "{at}");
            assert_eq!(decoder.finish().is_ok(), ends.contains(&at), "{at}");
            assert_eq!(decoder.inside().is_none(), ends.contains(&at), "{at}");
            // The rest completes it.
            let mut input = &all[at..];
            while let Some(frame) = decoder.feed(&mut input).unwrap() {
                got.push(frame);
            }
            assert_eq!(got, frames(), "{at}");
        }
    }

    #[test]
    fn hostile_headers() {
        let parse = |bytes| FrameHeader::parse(bytes, LIMIT);
        assert_eq!(parse([45, 1, 0, 0, 1, 0, 0, 0]), Err(FrameError::TooLong { bytes: 301, limit: LIMIT }));
        assert_eq!(
            parse([0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]),
            Err(FrameError::TooLong { bytes: u32::MAX, limit: LIMIT })
        );
        assert_eq!(parse([0, 0, 0, 0, 0, 0, 0, 0]), Err(FrameError::Kind(0)));
        assert_eq!(parse([0, 0, 0, 0, 6, 0, 0, 0]), Err(FrameError::Kind(6)));
        assert_eq!(parse([0, 0, 0, 0, 1, 0, 1, 0]), Err(FrameError::Reserved));
        assert_eq!(parse([1, 0, 0, 0, 2, 0, 0, 0]), Err(FrameError::Payload));
        assert_eq!(parse([44, 1, 0, 0, 1, 0, 0, 0]), Ok(FrameHeader { kind: FrameKind::Data, len: LIMIT }));
    }

    #[test]
    fn an_announced_length_alone_takes_no_memory() {
        let mut decoder = FrameDecoder::new(1 << 30);
        let mut input: &[u8] = &[0, 0, 0, 0x40, 1, 0, 0, 0, 1, 2, 3];
        assert_eq!(decoder.feed(&mut input), Ok(None));
        assert!(decoder.body.as_ref().unwrap().1.capacity() <= 2 * STEP_BYTES);
        let step = vec![0; 100_000];
        for _ in 0..20 {
            decoder.feed(&mut step.as_slice()).unwrap();
            let payload = &decoder.body.as_ref().unwrap().1;
            assert!(payload.capacity() <= payload.len() + 2 * STEP_BYTES);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn pieces_of_any_size_make_the_same_frames(sizes in proptest::collection::vec(1usize..400, 1..40)) {
            let all = bytes(&frames());
            let mut decoder = FrameDecoder::new(LIMIT);
            let (mut at, mut got) = (0, vec![]);
            for size in sizes.iter().cycle() {
                let end = (at + size).min(all.len());
                let mut input = &all[at..end];
                while let Some(frame) = decoder.feed(&mut input).unwrap() {
                    got.push(frame);
                }
                prop_assert!(input.is_empty());
                at = end;
                if at == all.len() {
                    break;
                }
            }
            prop_assert_eq!(got, frames());
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(noise in proptest::collection::vec(any::<u8>(), 0..600), plausible in any::<bool>()) {
            let mut noise = noise;
            if plausible && noise.len() >= HEADER_BYTES {
                noise[1..4].fill(0);
                noise[4] %= 7;
                noise[5..8].fill(0);
            }
            let mut decoder = FrameDecoder::new(LIMIT);
            let mut input = noise.as_slice();
            let mut got = vec![];
            let refused = loop {
                match decoder.feed(&mut input) {
                    Ok(Some(frame)) => {
                        prop_assert!(frame.payload.len() <= LIMIT);
                        got.push(frame);
                    }
                    Ok(None) => break false,
                    Err(_) => break true,
                }
            };
            // What was accepted is exactly what was sent.
            let again = bytes(&got);
            prop_assert_eq!(&again[..], &noise[..again.len()]);
            prop_assert!(refused || input.is_empty());
        }
    }
}
