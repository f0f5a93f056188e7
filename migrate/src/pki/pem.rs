//! PEM files as keys and certificates.
use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use super::PkiError;

/// Most certificates or lists in one file.
const MAX_ITEMS: usize = 64;

/// The certificates of a PEM text, at least one.
pub(super) fn certificates(path: &Path, text: &str) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let certificates = items::<CertificateDer<'static>>(path, text)?;
    if certificates.is_empty() {
        return Err(PkiError::content(path, "holds no certificate (a block \"BEGIN CERTIFICATE\")"));
    }
    Ok(certificates)
}

/// The revocation lists of a PEM text, maybe none.
pub(super) fn revocation_lists(
    path: &Path,
    text: &str,
) -> Result<Vec<CertificateRevocationListDer<'static>>, PkiError> {
    items(path, text)
}

/// The first private key of a PEM text.
pub(super) fn private_key(path: &Path, text: &str) -> Result<PrivateKeyDer<'static>, PkiError> {
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|e| match e {
        rustls::pki_types::pem::Error::NoItemsFound if text.contains("BEGIN ENCRYPTED PRIVATE KEY") => {
            PkiError::content(path, "holds an encrypted private key; the switch cannot ask for a password: decrypt it")
        }
        rustls::pki_types::pem::Error::NoItemsFound => {
            PkiError::content(path, "holds no private key (a block \"BEGIN PRIVATE KEY\")")
        }
        e => PkiError::content(path, format!("is not in PEM form: {e}")),
    })
}

fn items<T: PemObject>(path: &Path, text: &str) -> Result<Vec<T>, PkiError> {
    let mut items = Vec::new();
    for item in T::pem_slice_iter(text.as_bytes()) {
        if items.len() == MAX_ITEMS {
            return Err(PkiError::content(path, format!("holds more than {MAX_ITEMS} items")));
        }
        items.push(item.map_err(|e| PkiError::content(path, format!("is not in PEM form: {e}")))?);
    }
    Ok(items)
}

/// One block in PEM form (RFC 7468).
pub(super) fn block(label: &str, der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut base64 = String::with_capacity(der.len().div_ceil(3) * 4);
    for chunk in der.chunks(3) {
        let mut bytes = [0u8; 4];
        for (to, from) in bytes[1..].iter_mut().zip(chunk) {
            *to = *from;
        }
        let bits = u32::from_be_bytes(bytes);
        for position in 0..4u32 {
            let digit = (bits >> (18 - 6 * position)) & 63;
            let known = position as usize <= chunk.len();
            let digit = DIGITS.get(digit as usize).filter(|_| known).map_or('=', |d| char::from(*d));
            base64.push(digit);
        }
    }
    let mut text = format!("-----BEGIN {label}-----\n");
    for (i, c) in base64.chars().enumerate() {
        text.push(c);
        if i % 64 == 63 {
            text.push('\n');
        }
    }
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_read_back_at_every_length() {
        for len in 0..200usize {
            let der: Vec<u8> = (0..len).map(|i| (i * 37 + len) as u8).collect();
            let text = block("CERTIFICATE", &der);
            assert!(text.lines().all(|l| l.len() <= 64));
            let read: Vec<_> = CertificateDer::pem_slice_iter(text.as_bytes()).map(Result::unwrap).collect();
            assert_eq!(read, [CertificateDer::from(der)], "{text}");
        }
    }
}
