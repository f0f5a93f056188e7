//! What a host needs to prove who it is and to judge who its peer is, loaded from files: Ferry's own authority's or an operator's.
use std::path::PathBuf;
use std::sync::Arc;

use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use super::authority::host_name;
use super::files::{self, Secrecy};
use super::{CertificateInfo, PkiError, pem};

/// Where a host's credentials are. Certificate and key may be the same file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialFiles {
    /// Certificates of the authorities that peers' certificates must come from (PEM).
    pub trust: PathBuf,
    /// This host's certificate, then those between it and the authority, if any (PEM).
    pub certificate: PathBuf,
    /// Its private key: PKCS#8, SEC1 or PKCS#1, not encrypted (PEM, 0600).
    pub key: PathBuf,
    /// Revocation lists (RFC 5280, 5), one per authority (PEM).
    pub revocations: Option<PathBuf>,
}

impl CredentialFiles {
    /// The files as [`super::Authority`] names them, once they are copied to one directory of the host.
    pub fn in_directory(directory: &std::path::Path, host: &str) -> Self {
        let own = directory.join(format!("{host}.pem"));
        Self {
            trust: directory.join("trust.pem"),
            certificate: own.clone(),
            key: own,
            revocations: Some(directory.join("revoked.pem")),
        }
    }
}

/// An entry of a revocation list.
#[derive(Clone, Debug)]
struct Revocation {
    issuer_der: Vec<u8>,
    serial: Vec<u8>,
    from_s: i64,
}

/// A host's credentials, checked as a whole.
pub struct Credentials {
    pub(crate) trust: Vec<(CertificateDer<'static>, CertificateInfo)>,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    info: CertificateInfo,
    host: String,
    revocations: Vec<Revocation>,
    audit: Option<Arc<Ed25519KeyPair>>,
}

impl std::fmt::Debug for Credentials {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("host", &self.host).field("certificate", &self.info).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Loads and checks all of it at `now_s` seconds since 1970: permissions, form, times, that the key belongs to the certificate,
    /// that the certificate comes from a trusted authority and may be used both as client and as server, and that revocation lists are signed by one.
    ///
    /// # Errors
    /// The first thing that is wrong, with the file and what to do.
    pub fn load(files: &CredentialFiles, now_s: i64) -> Result<Self, PkiError> {
        let text = files::read(&files.trust, Secrecy::Public, "copy it from the authority's directory")?;
        let mut trust = Vec::new();
        for der in pem::certificates(&files.trust, &text)? {
            let info = CertificateInfo::from_der(&der).map_err(|p| PkiError::content(&files.trust, p))?;
            if !info.is_ca {
                let problem = format!("the certificate of {} is no authority's", info.subject);
                return Err(PkiError::content(&files.trust, problem));
            }
            trust.push((der, info));
        }
        let valid = trust.iter().any(|(_, info)| info.validity_problem(now_s).is_none());
        if let Some((_, info)) = trust.iter().max_by_key(|(_, info)| info.not_after_s).filter(|_| !valid)
            && let Some(problem) = info.validity_problem(now_s)
        {
            return Err(PkiError::Validity {
                path: files.trust.clone(),
                subject: info.subject.clone(),
                problem,
                remedy: "make a new generation (ferry pki rotate DIR) and copy its trust.pem here".into(),
            });
        }

        let remedy = "make it with ferry pki issue and copy it here";
        // One file for both holds a secret.
        let secrecy = if files.certificate == files.key { Secrecy::Private } else { Secrecy::Public };
        let text = files::read(&files.certificate, secrecy, remedy)?;
        let chain = pem::certificates(&files.certificate, &text)?;
        let text = files::read(&files.key, Secrecy::Private, remedy)?;
        let key = pem::private_key(&files.key, &text)?;

        let own = chain.first().map(|der| CertificateInfo::from_der(der)).unwrap_or_else(|| Err("is empty".into()));
        let info = own.map_err(|problem| PkiError::content(&files.certificate, problem))?;
        if let Some(problem) = info.validity_problem(now_s) {
            return Err(PkiError::Validity {
                path: files.certificate.clone(),
                subject: info.subject,
                problem,
                remedy: "renew it (ferry pki rotate DIR --host HOST) or correct the clock".into(),
            });
        }
        let host = host_identity(&info).map_err(|problem| PkiError::content(&files.certificate, problem))?;
        check_key(files, &chain, &key)?;
        let audit = Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.secret_der()).ok().map(Arc::new);
        let mut credentials = Self { trust, chain, key, info, host, revocations: Vec::new(), audit };
        if let Some(path) = &files.revocations {
            credentials.revocations = credentials.load_revocations(path)?;
        }
        credentials.check_own_chain(files, now_s)?;
        Ok(credentials)
    }

    /// This host's identity: the first DNS name of its certificate.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// This host's certificate.
    pub fn certificate(&self) -> &CertificateInfo {
        &self.info
    }

    /// The authorities that are trusted.
    pub fn authorities(&self) -> impl Iterator<Item = &CertificateInfo> {
        self.trust.iter().map(|(_, info)| info)
    }

    /// The host's key for signing the audit log, if it is an Ed25519 key. Otherwise the log needs a key of its own.
    pub fn audit_key(&self) -> Option<Arc<Ed25519KeyPair>> {
        self.audit.clone()
    }

    /// Public half of [`Self::audit_key`].
    pub fn audit_public_key(&self) -> Option<[u8; 32]> {
        self.audit.as_ref().and_then(|key| key.public_key().as_ref().try_into().ok())
    }

    /// True when `certificate` is revoked at `now_s`.
    pub(crate) fn is_revoked(&self, certificate: &CertificateInfo, now_s: i64) -> bool {
        self.revocations.iter().any(|r| {
            r.from_s <= now_s
                && r.issuer_der == certificate.issuer_der
                && crate::text::hex(&r.serial) == certificate.serial
        })
    }

    /// Authorities that are within their time at `now_s`, and until when that set stays the same.
    pub(crate) fn roots(&self, now_s: i64) -> (RootCertStore, i64) {
        let mut roots = RootCertStore::empty();
        let mut until_s = i64::MAX;
        for (der, info) in &self.trust {
            if now_s < info.not_before_s {
                until_s = until_s.min(info.not_before_s);
            } else if now_s <= info.not_after_s {
                until_s = until_s.min(info.not_after_s.saturating_add(1));
                // One that cannot be used as anchor is no anchor.
                let _ = roots.add(der.clone());
            }
        }
        (roots, until_s)
    }

    fn load_revocations(&self, path: &std::path::Path) -> Result<Vec<Revocation>, PkiError> {
        let text = files::read(path, Secrecy::Public, "copy it from the authority's directory, or configure none")?;
        let mut all = Vec::new();
        for der in pem::revocation_lists(path, &text)? {
            let (_, list) = CertificateRevocationList::from_der(&der)
                .map_err(|e| PkiError::content(path, format!("holds an unreadable revocation list: {e}")))?;
            let issuer_der = list.issuer().as_raw();
            let signed = self.trust.iter().filter(|(_, ca)| ca.subject_der == issuer_der).any(|(ca, _)| {
                X509Certificate::from_der(ca).is_ok_and(|(_, ca)| list.verify_signature(ca.public_key()).is_ok())
            });
            if !signed {
                // A list of a generation that is trusted no more says nothing about anybody; a forged one must not pass.
                if self.trust.iter().any(|(_, ca)| ca.subject_der == issuer_der) {
                    let problem = format!("the revocation list of {} has a wrong signature", list.issuer());
                    return Err(PkiError::content(path, problem));
                }
                continue;
            }
            all.extend(list.iter_revoked_certificates().map(|entry| Revocation {
                issuer_der: issuer_der.to_vec(),
                serial: entry.raw_serial().to_vec(),
                from_s: entry.revocation_date.timestamp(),
            }));
        }
        Ok(all)
    }

    /// What any peer will check, checked here first: the error then names files instead of an alert.
    fn check_own_chain(&self, files: &CredentialFiles, now_s: i64) -> Result<(), PkiError> {
        let content = |problem: String| PkiError::content(&files.certificate, problem);
        if self.is_revoked(&self.info, now_s) {
            return Err(content(format!("the certificate of {} is revoked; make a new one", self.host)));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (roots, _) = self.roots(now_s);
        let roots = Arc::new(roots);
        let not_trusted = |e: &dyn std::fmt::Display| {
            content(format!("does not lead to an authority in {}: {e}", files.trust.display()))
        };
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| not_trusted(&e))?;
        let name = ServerName::try_from(self.host.clone()).map_err(|e| content(e.to_string()))?;
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now_s.max(0).unsigned_abs()));
        let (own, between) = self.chain.split_first().ok_or_else(|| content("is empty".into()))?;
        verifier.verify_server_cert(own, between, &name, &[], now).map_err(|e| not_trusted(&e))?;
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots, provider)
            .build()
            .map_err(|e| not_trusted(&e))?;
        verifier.verify_client_cert(own, between, now).map_err(|e| not_trusted(&e))?;
        Ok(())
    }
}

fn check_key(
    files: &CredentialFiles,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<(), PkiError> {
    let signing = rustls::crypto::ring::sign::any_supported_type(key)
        .map_err(|e| PkiError::content(&files.key, format!("holds an unusable private key: {e}")))?;
    match rustls::sign::CertifiedKey::new(chain.to_vec(), signing).keys_match() {
        Ok(()) => Ok(()),
        Err(_) => Err(PkiError::content(
            &files.key,
            format!("does not belong to the certificate in {}", files.certificate.display()),
        )),
    }
}

/// Who a certificate's holder is: its first DNS name.
pub(crate) fn host_identity(info: &CertificateInfo) -> Result<String, String> {
    let name =
        info.names.first().ok_or("the certificate names no host: it needs a DNS name (subject alternative name)")?;
    host_name(name).map_err(|e| format!("the certificate's first DNS name identifies no host: {e}"))
}
