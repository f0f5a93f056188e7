//! Keys and certificates of the hosts between which VMs migrate.
//!
//! A host is identified by the first DNS name in its certificate's subject alternative name ([`host_name`] says what such a name
//! looks like). [`Authority`] is a private certificate authority in a directory; [`Credentials`] is what a host loads, whoever issued it.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]

mod authority;
mod certificate;
mod credentials;
mod error;
mod files;
mod pem;
#[cfg(test)]
mod tests;

pub use authority::{Authority, CA_DAYS, HOST_DAYS, Issued, MAX_DAYS, OVERLAP_DAYS, Role, Shown, host_name};
pub use certificate::{CertificateInfo, MAX_NAMES, Utc};
pub(crate) use credentials::host_identity;
pub use credentials::{CredentialFiles, Credentials};
pub use error::PkiError;
pub use files::MAX_FILE_BYTES;

/// The certificates in a file in PEM form, at least one.
///
/// # Errors
/// When it cannot be read, others than its owner may write it, or it holds no certificate.
pub fn read_certificates(path: &std::path::Path) -> Result<Vec<CertificateInfo>, PkiError> {
    let text = files::read(path, files::Secrecy::Public, "name a file with a certificate")?;
    let certificates = pem::certificates(path, &text)?;
    let info = |der: rustls::pki_types::CertificateDer<'_>| {
        CertificateInfo::from_der(&der).map_err(|problem| PkiError::content(path, problem))
    };
    certificates.into_iter().map(info).collect()
}
