//! Frames past the network stack: what a hostile guest can send.
use crate::system;
use ferry_guest::protocol::Vary;
use std::io;

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Sends all frames, `rounds` times.
pub fn send(interface: &str, frames: &[String], rounds: u32, vary: Option<Vary>) -> Result<u64, String> {
    let mut frames = frames.iter().map(|f| bytes(f)).collect::<Result<Vec<_>, _>>()?;
    let socket = system::packet_socket(interface).map_err(text)?;
    let mut sent = 0;
    for _ in 0..rounds {
        for frame in &frames {
            let mut tries = 0;
            // A full queue is not an error: the switch takes its time.
            while let Err(e) = system::send(&socket, frame) {
                let full = matches!(e.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN));
                if !full || tries == 1000 {
                    return Err(e.to_string());
                }
                tries += 1;
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            sent += 1;
        }
        if let Some(vary) = vary {
            for frame in &mut frames {
                count_up(frame, vary).ok_or_else(|| text(io::Error::from(io::ErrorKind::InvalidInput)))?;
            }
        }
    }
    Ok(sent)
}

fn bytes(hex: &str) -> Result<Vec<u8>, String> {
    let digits = hex.as_bytes().chunks(2);
    digits
        .map(|pair| {
            let pair = std::str::from_utf8(pair).map_err(text)?;
            u8::from_str_radix(pair, 16).map_err(text)
        })
        .collect()
}

/// Adds one to the number, and mends the checksum (RFC 1624).
fn count_up(frame: &mut [u8], vary: Vary) -> Option<()> {
    let old = number(frame, vary.at)?;
    let new = old.wrapping_add(1);
    let mut sum = u32::from(!number(frame, vary.checksum_at)?) + u32::from(!old) + u32::from(new);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    put(frame, vary.at, new)?;
    put(frame, vary.checksum_at, !(sum as u16))
}

fn number(frame: &[u8], at: usize) -> Option<u16> {
    frame.get(at..)?.first_chunk::<2>().map(|b| u16::from_be_bytes(*b))
}

fn put(frame: &mut [u8], at: usize, value: u16) -> Option<()> {
    *frame.get_mut(at..)?.first_chunk_mut::<2>()? = value.to_be_bytes();
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_follows_the_number() {
        // A word that counts from 0xfffe, a constant one, and their checksum.
        let mut frame = vec![0xff, 0xfe, 0x12, 0x34, 0, 0];
        let check = |f: &[u8]| {
            let mut sum: u32 = f.chunks(2).map(|p| u32::from(u16::from_be_bytes([p[0], p[1]]))).sum();
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            sum
        };
        let c = !(check(&frame) as u16);
        frame[4..].copy_from_slice(&c.to_be_bytes());
        for expected in [0xffffu16, 0, 1, 2] {
            count_up(&mut frame, Vary { at: 0, checksum_at: 4 }).unwrap();
            assert_eq!(number(&frame, 0), Some(expected));
            assert_eq!(check(&frame), 0xffff);
        }
        assert_eq!(count_up(&mut frame, Vary { at: 5, checksum_at: 4 }), None);
    }
}
