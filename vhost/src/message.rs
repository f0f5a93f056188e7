//! vhost-user messages on the wire: reading them whole and bounded, and building replies.
//!
//! A message is a 12-byte header (request code, flags, payload size; native byte order), the payload, and descriptors
//! attached to any of its bytes (vhost-user specification, "Message Specification").
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::fdio::{self, MAX_RECEIVED_FDS};

/// Header length, bytes.
pub const HEADER_BYTES: usize = 12;
/// Longest payload taken, bytes. The longest real one, SET_MEM_TABLE with 32 regions, has 1032.
pub const MAX_PAYLOAD_BYTES: usize = 4096;

/// Flags: protocol version, always 1.
pub const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
/// Flags: this is a reply.
pub const REPLY: u32 = 1 << 2;
/// Flags: the sender wants an acknowledgement (REPLY_ACK).
pub const NEED_REPLY: u32 = 1 << 3;

/// A whole message.
#[derive(Debug, Default)]
pub struct Message {
    /// Request code.
    pub code: u32,
    /// Flags.
    pub flags: u32,
    /// Payload.
    pub payload: Vec<u8>,
    /// Descriptors, in order.
    pub fds: Vec<OwnedFd>,
    /// More descriptors came than any message may have; they are closed, and `fds` is empty.
    pub fd_flood: bool,
}

impl Message {
    /// The `u32` at byte `at` of the payload.
    pub fn u32_at(&self, at: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(self.payload.get(at..)?.first_chunk().copied()?))
    }
    /// The `u64` at byte `at` of the payload.
    pub fn u64_at(&self, at: usize) -> Option<u64> {
        Some(u64::from_ne_bytes(self.payload.get(at..)?.first_chunk().copied()?))
    }
    /// Header and payload as they go over a socket.
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(self.code, self.flags, &self.payload)
    }
}

/// A message with its header.
pub fn encode(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&code.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_ne_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A reply to `code`.
pub fn reply(code: u32, payload: &[u8]) -> Vec<u8> {
    encode(code, VERSION | REPLY, payload)
}

/// What [`Reader::read`] found.
#[derive(Debug)]
pub enum Progress {
    /// A whole message.
    Message(Message),
    /// The socket has no more bytes now.
    Pending,
    /// The peer hung up between two messages.
    Closed,
}

/// Why the stream cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The version bits of the flags are not 1.
    #[error("message with protocol version {0}")]
    Version(u32),
    /// The payload is longer than [`MAX_PAYLOAD_BYTES`].
    #[error("message {code} claims {size} bytes of payload, more than {MAX_PAYLOAD_BYTES}")]
    Oversized {
        /// Request code.
        code: u32,
        /// Claimed size, bytes.
        size: u32,
    },
    /// The peer hung up inside a message.
    #[error("hung up inside a message")]
    Truncated,
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Puts messages together from whatever pieces the socket delivers. Never blocks, never reads past a message.
#[derive(Debug, Default)]
pub struct Reader {
    header: [u8; HEADER_BYTES],
    have: usize,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
    flood: bool,
}

impl Reader {
    /// Reads on.
    pub fn read(&mut self, socket: BorrowedFd<'_>) -> Result<Progress, ReadError> {
        loop {
            if self.have >= HEADER_BYTES && self.have == HEADER_BYTES + self.payload.len() {
                let mut message = Message {
                    code: self.header_word(0),
                    flags: self.header_word(4),
                    payload: std::mem::take(&mut self.payload),
                    fds: std::mem::take(&mut self.fds),
                    fd_flood: std::mem::take(&mut self.flood),
                };
                if message.fd_flood {
                    message.fds.clear();
                }
                self.have = 0;
                return Ok(Progress::Message(message));
            }
            let buffer = match self.have.checked_sub(HEADER_BYTES) {
                None => self.header.get_mut(self.have..),
                Some(done) => self.payload.get_mut(done..),
            };
            let got = match fdio::receive(socket, buffer.unwrap_or_default(), &mut self.fds) {
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Progress::Pending),
                Err(e) => return Err(e.into()),
            };
            if got.truncated || self.fds.len() > MAX_RECEIVED_FDS {
                // The message will be refused: none of its descriptors is needed.
                self.flood = true;
            }
            if self.flood {
                self.fds.clear();
            }
            if got.bytes == 0 {
                return if self.have == 0 { Ok(Progress::Closed) } else { Err(ReadError::Truncated) };
            }
            self.have += got.bytes;
            if self.have == HEADER_BYTES && self.payload.is_empty() {
                self.check_header()?;
            }
        }
    }

    fn check_header(&mut self) -> Result<(), ReadError> {
        let (code, flags, size) = (self.header_word(0), self.header_word(4), self.header_word(8));
        if flags & VERSION_MASK != VERSION {
            return Err(ReadError::Version(flags & VERSION_MASK));
        }
        if size as usize > MAX_PAYLOAD_BYTES {
            return Err(ReadError::Oversized { code, size });
        }
        self.payload.resize(size as usize, 0);
        Ok(())
    }

    fn header_word(&self, at: usize) -> u32 {
        self.header.get(at..).and_then(|h| h.first_chunk().copied()).map_or(0, u32::from_ne_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::{AsFd, AsRawFd};
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    #[test]
    fn single_bytes_make_a_message_and_the_next_one_is_not_touched() {
        let (mut a, b) = pair();
        let mut r = Reader::default();
        let bytes = encode(2, VERSION | NEED_REPLY, &7u64.to_ne_bytes());
        for (i, byte) in bytes.iter().enumerate() {
            assert!(matches!(r.read(b.as_fd()).unwrap(), Progress::Pending), "after {i} bytes");
            a.write_all(&[*byte]).unwrap();
        }
        a.write_all(&encode(1, VERSION, &[])).unwrap();
        let Progress::Message(m) = r.read(b.as_fd()).unwrap() else { panic!("no message") };
        assert_eq!((m.code, m.u64_at(0), m.u64_at(1), m.to_bytes()), (2, Some(7), None, bytes));
        assert_eq!(r.have, 0);
        let Progress::Message(m) = r.read(b.as_fd()).unwrap() else { panic!("no message") };
        assert_eq!((m.code, m.payload.len()), (1, 0));
        drop(a);
        assert!(matches!(r.read(b.as_fd()).unwrap(), Progress::Closed));
    }

    #[test]
    fn hostile_streams_end() {
        for (bytes, what) in [
            (encode(1, 2, &[]), "version"),
            (encode(1, 0, &[]), "version"),
            ([1u32, 1, 4097].map(u32::to_ne_bytes).concat(), "more than 4096"),
            ([1u32, 1, u32::MAX].map(u32::to_ne_bytes).concat(), "more than 4096"),
            (encode(1, 1, &[0; 8])[..15].to_vec(), "inside"),
            (encode(1, 1, &[])[..1].to_vec(), "inside"),
        ] {
            let (mut a, b) = pair();
            a.write_all(&bytes).unwrap();
            drop(a);
            let e = Reader::default().read(b.as_fd()).unwrap_err();
            assert!(e.to_string().contains(what), "{e}");
        }
    }

    #[test]
    fn descriptors_on_every_byte_are_bounded() {
        let (a, b) = pair();
        let (fd, _keep) = pair();
        let mut r = Reader::default();
        for byte in encode(9, 1, &[1; 40]) {
            fdio::send(a.as_fd(), &[byte], &[fd.as_raw_fd(); 8]).unwrap();
            match r.read(b.as_fd()).unwrap() {
                Progress::Message(m) => {
                    assert!(m.fd_flood && m.fds.is_empty());
                    return;
                }
                _ => assert!(r.fds.len() <= MAX_RECEIVED_FDS),
            }
        }
        panic!("no message");
    }
}
