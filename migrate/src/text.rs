//! Small helpers for texts.

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The beginning of a text: at most `max_bytes`, whole characters.
pub(crate) fn cut(text: &str, max_bytes: usize) -> &str {
    let end = (0..=max_bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        for (max, expected) in [(0, ""), (1, "a"), (2, "a"), (3, "aä"), (4, "aä"), (5, "aä"), (6, "aä€"), (99, "aä€")]
        {
            assert_eq!(cut("aä€", max), expected);
        }
        assert_eq!(hex(&[0, 0x1f, 0xff]), "001fff");
    }
}
