//! Frames of the channel: any bytes, in two pieces. What is accepted must be what was sent, and no longer than allowed.
#![no_main]

use ferry_migrate::channel::FrameDecoder;

const LIMIT: usize = 4096;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((cut, bytes)) = data.split_first() else { return };
    let (first, second) = bytes.split_at(usize::from(*cut).min(bytes.len()));
    let mut decoder = FrameDecoder::new(LIMIT);
    let mut again = Vec::new();
    for mut piece in [first, second] {
        loop {
            match decoder.feed(&mut piece) {
                Ok(Some(frame)) => {
                    assert!(frame.payload.len() <= LIMIT);
                    again.extend(frame.to_bytes().unwrap());
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(piece.is_empty());
    }
    assert_eq!(again, bytes[..again.len()]);
    assert_eq!(decoder.finish().is_ok(), again.len() == bytes.len());
});
