//! What a certificate says, as far as Ferry or its operator need it.
use std::fmt;
use std::net::IpAddr;

use ring::digest;
use serde::Serialize;
use x509_parser::oid_registry::OID_SIG_ED25519;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::text::hex;

/// Most names and addresses that are taken from one certificate. More is an error, not a cut: a name that is ignored might be the one that is meant.
pub const MAX_NAMES: usize = 64;
/// Seconds per day.
pub(crate) const DAY_S: i64 = 86_400;

/// The facts of one X.509 certificate (RFC 5280).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CertificateInfo {
    /// Subject's distinguished name, as text.
    pub subject: String,
    /// Issuer's distinguished name, as text.
    pub issuer: String,
    /// DNS names of the subject alternative name, lower case, in their order. The first is the host's identity.
    pub names: Vec<String>,
    /// Addresses of the subject alternative name.
    pub addresses: Vec<IpAddr>,
    /// True for a certificate authority's.
    pub is_ca: bool,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Valid from, seconds since 1970 UTC.
    pub not_before_s: i64,
    /// Valid until, seconds since 1970 UTC.
    pub not_after_s: i64,
    /// SHA-256 of the whole certificate, hexadecimal.
    pub fingerprint: String,
    /// Its public key, if that is an Ed25519 key, hexadecimal: what the host's audit log is verified with.
    pub ed25519_public: Option<String>,
    /// Issuer's name as it is encoded: what revocations are matched with.
    #[serde(skip)]
    pub(crate) issuer_der: Vec<u8>,
    /// Subject's name as it is encoded.
    #[serde(skip)]
    pub(crate) subject_der: Vec<u8>,
}

impl CertificateInfo {
    /// Reads a certificate in DER form. The text says what is wrong with it otherwise.
    pub fn from_der(der: &[u8]) -> Result<Self, String> {
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|e| format!("not an X.509 certificate: {e}"))?;
        if !rest.is_empty() {
            return Err(format!("{} bytes after the end of the certificate", rest.len()));
        }
        let mut names = Vec::new();
        let mut addresses = Vec::new();
        let alternatives =
            certificate.subject_alternative_name().map_err(|e| format!("unreadable subject alternative name: {e}"))?;
        if let Some(alternatives) = alternatives {
            if alternatives.value.general_names.len() > MAX_NAMES {
                return Err(format!("more than {MAX_NAMES} names"));
            }
            for name in &alternatives.value.general_names {
                match name {
                    GeneralName::DNSName(name) => names.push(name.to_ascii_lowercase()),
                    GeneralName::IPAddress(bytes) => addresses.extend(address(bytes)),
                    _ => {}
                }
            }
        }
        let public = certificate.public_key();
        Ok(Self {
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            names,
            addresses,
            is_ca: certificate.is_ca(),
            serial: hex(certificate.raw_serial()),
            not_before_s: certificate.validity().not_before.timestamp(),
            not_after_s: certificate.validity().not_after.timestamp(),
            fingerprint: hex(digest::digest(&digest::SHA256, der).as_ref()),
            ed25519_public: (public.algorithm.algorithm == OID_SIG_ED25519)
                .then(|| hex(public.subject_public_key.data.as_ref())),
            issuer_der: certificate.issuer().as_raw().to_vec(),
            subject_der: certificate.subject().as_raw().to_vec(),
        })
    }

    /// Whole days until it expires, negative when it has, at `now_s` seconds since 1970.
    pub fn days_left(&self, now_s: i64) -> i64 {
        self.not_after_s.saturating_sub(now_s).div_euclid(DAY_S)
    }

    /// What is wrong with its time of validity at `now_s`, if anything.
    pub fn validity_problem(&self, now_s: i64) -> Option<String> {
        if now_s < self.not_before_s {
            Some(format!("is not valid before {}", Utc(self.not_before_s)))
        } else if now_s > self.not_after_s {
            Some(format!("expired on {}", Utc(self.not_after_s)))
        } else {
            None
        }
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// A moment as text, `2026-11-21 16:47:42 UTC`; seconds since 1970.
pub struct Utc(pub i64);

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match time::OffsetDateTime::from_unix_timestamp(self.0) {
            Ok(t) => write!(
                f,
                "{:04}-{:02}-{:02} {:02}:{:02}:{:02} UTC",
                t.year(),
                u8::from(t.month()),
                t.day(),
                t.hour(),
                t.minute(),
                t.second()
            ),
            Err(_) => write!(f, "{} s after 1970", self.0),
        }
    }
}
