//! A private certificate authority in a directory: enough for the hosts between which VMs migrate, by one command each.
//!
//! # Files
//! | file | mode | what | who needs it |
//! |---|---|---|---|
//! | `ca.pem` | 0600 | the authority's key and certificate | stays here |
//! | `ca.old.pem` | 0600 | the same of the generation before, while its overlap runs | stays here |
//! | `trust.pem` | 0644 | certificates of both generations | every host |
//! | `revoked.pem` | 0644 | revocation lists (RFC 5280, 5), one per generation | every host |
//! | `hosts/HOST.pem` | 0600 | the key and certificate of one host | that host |
//!
//! A key and its certificate share one file, so that replacing them can never be half done. Keys are Ed25519 (RFC 8410).
//!
//! # Time
//! Every method takes the present as an argument, seconds since 1970 UTC.
//!
//! # Rotation
//! [`Authority::rotate_host`] gives a host a new key and certificate and revokes the old one *from the end of the overlap on*: revocation
//! dates may lie in the future, and Ferry's hosts heed them to the second. [`Authority::rotate`] makes a new generation of the authority;
//! the old one's certificate is signed anew with the overlap's end as its expiry. First give every host the new
//! `trust.pem`, then new certificates.
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ED25519, RevokedCertParams, SanType, SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::CertificateDer;
use serde::Serialize;
use time::OffsetDateTime;
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use super::certificate::{DAY_S, Utc};
use super::files::{self, Secrecy};
use super::{CertificateInfo, PkiError, pem};

/// How long an authority's certificate is valid unless told otherwise, days.
pub const CA_DAYS: u32 = 3650;
/// How long a host's certificate is valid unless told otherwise, days.
pub const HOST_DAYS: u32 = 397;
/// How long the old key stays valid beside the new one unless told otherwise, days.
pub const OVERLAP_DAYS: u32 = 14;
/// Longest time of validity and overlap, days.
pub const MAX_DAYS: u32 = 36_500;

/// Certificates are valid from this long before they are made: hosts' clocks differ.
const CLOCK_SKEW_S: i64 = 600;

/// A private certificate authority in a directory that only its owner can enter (0700).
#[derive(Debug)]
pub struct Authority {
    directory: PathBuf,
}

/// What a command made.
#[derive(Clone, Debug, Serialize)]
pub struct Issued {
    /// The certificate.
    pub certificate: CertificateInfo,
    /// Files that have changed and where they are needed, as `(file, who needs it)`.
    pub files: Vec<(PathBuf, &'static str)>,
}

/// One line of [`Authority::show`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// Where it is.
    pub file: PathBuf,
    /// What it is for.
    pub role: Role,
    /// The certificate.
    pub certificate: CertificateInfo,
    /// Whole days until it expires; negative when it has.
    pub days_left: i64,
    /// What should be done about it, if anything.
    pub advice: Option<String>,
}

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The authority that signs now.
    Authority,
    /// The generation before, still trusted.
    PreviousAuthority,
    /// A host.
    Host,
}

/// A generation of the authority: key and certificate.
struct Generation {
    key: KeyPair,
    der: CertificateDer<'static>,
    info: CertificateInfo,
}

impl Authority {
    /// Makes a new authority. `name` is shown in its certificates (1 to 48 printable ASCII characters); `days`: its validity.
    ///
    /// # Errors
    /// When the directory holds one already, is open to others, or cannot be written.
    pub fn init(directory: &Path, name: &str, days: u32, now_s: i64) -> Result<(Self, Issued), PkiError> {
        if name.is_empty() || name.len() > 48 || !name.chars().all(|c| c.is_ascii_graphic() || c == ' ') {
            return Err(PkiError::Argument("the authority's name must be 1 to 48 printable ASCII characters".into()));
        }
        check_days(days)?;
        files::make_directory(directory)?;
        let authority = Self { directory: directory.to_owned() };
        let _lock = files::lock_directory(directory)?;
        let path = authority.ca();
        if path.exists() {
            return Err(PkiError::Exists {
                path,
                remedy: "issue certificates with it, rotate it, or choose another directory".into(),
            });
        }
        files::make_directory(&authority.hosts())?;
        // Two authorities of the same name must not be taken for each other: peers find issuers by name.
        let tag = crate::text::hex(random::<4>()?.as_slice());
        let generation = Generation::new(&format!("{name} {tag} G1"), now_s, days)?;
        // The key comes last: without it the directory does not count as an authority, and init can be run again.
        authority.write_trust(&generation, None)?;
        files::write(&authority.revoked(), Secrecy::Public, &empty_list(&generation, now_s)?)?;
        generation.store(&path)?;
        let files = vec![
            (authority.trust(), "every host"),
            (authority.revoked(), "every host"),
            (path, "stays here: the authority's private key"),
        ];
        Ok((authority, Issued { certificate: generation.info, files }))
    }

    /// Opens the authority in a directory.
    ///
    /// # Errors
    /// When there is none, or when others have access to it.
    pub fn open(directory: &Path) -> Result<Self, PkiError> {
        files::check_directory(directory, INIT)?;
        let authority = Self { directory: directory.to_owned() };
        Generation::load(&authority.ca())?;
        Ok(authority)
    }

    /// Makes the key and certificate of a host.
    ///
    /// `host` becomes the DNS name that is the host's identity; `addresses` are named in the certificate too (others may
    /// connect by them, but they identify nobody). `days` is shortened to the authority's own validity.
    ///
    /// # Errors
    /// When the host has one already (rotate it), when the name cannot be a host name, or when the authority has expired.
    pub fn issue(&self, host: &str, addresses: &[IpAddr], days: u32, now_s: i64) -> Result<Issued, PkiError> {
        let host = host_name(host)?;
        check_days(days)?;
        if addresses.len() >= super::certificate::MAX_NAMES {
            return Err(PkiError::Argument(format!(
                "at most {} addresses per host",
                super::certificate::MAX_NAMES - 1
            )));
        }
        let _lock = files::lock_directory(&self.directory)?;
        let path = self.host(&host);
        if path.exists() {
            return Err(PkiError::Exists { path, remedy: format!("run: {}", self.rotate_command(Some(&host))) });
        }
        self.make_host(&host, addresses, days, now_s)
    }

    /// Gives a host a new key and certificate with the same names. The old one stays valid for `overlap_days` (0: it is revoked at once).
    ///
    /// # Errors
    /// When the host has none, or as [`Self::issue`].
    pub fn rotate_host(&self, host: &str, days: u32, overlap_days: u32, now_s: i64) -> Result<Issued, PkiError> {
        let host = host_name(host)?;
        check_days(days)?;
        check_overlap(overlap_days)?;
        let _lock = files::lock_directory(&self.directory)?;
        let old = self.load_host(&host)?;
        // Revocation first: should the next step fail, the worst is a certificate that ends early and can be rotated again.
        self.add_revocation(&old, now_s + i64::from(overlap_days) * DAY_S, now_s)?;
        let mut issued = self.make_host(&host, &old.addresses, days, now_s)?;
        issued.files.push((self.revoked(), "every host"));
        Ok(issued)
    }

    /// Revokes a host's certificate at once and removes its key from here. Takes effect where the new `revoked.pem` is installed.
    ///
    /// # Errors
    /// When the host has no certificate.
    pub fn revoke(&self, host: &str, now_s: i64) -> Result<Issued, PkiError> {
        let host = host_name(host)?;
        let _lock = files::lock_directory(&self.directory)?;
        let certificate = self.load_host(&host)?;
        self.add_revocation(&certificate, now_s, now_s)?;
        let path = self.host(&host);
        std::fs::remove_file(&path).map_err(|e| PkiError::io(&path, "remove", e))?;
        Ok(Issued { certificate, files: vec![(self.revoked(), "every host")] })
    }

    /// Makes a new generation of the authority. The old one is trusted for `overlap_days` more (at least one).
    ///
    /// # Errors
    /// When the overlap of the rotation before still runs: a third generation would cut it short.
    pub fn rotate(&self, days: u32, overlap_days: u32, now_s: i64) -> Result<Issued, PkiError> {
        check_days(days)?;
        check_overlap(overlap_days)?;
        if overlap_days == 0 {
            return Err(PkiError::Argument(
                "hosts need time to get the new authority: an overlap of at least 1 day".into(),
            ));
        }
        let _lock = files::lock_directory(&self.directory)?;
        let old = Generation::load(&self.ca())?;
        if let Some(previous) = self.previous()?
            && previous.info.not_after_s >= now_s
            && previous.info.subject_der != old.info.subject_der
        {
            return Err(PkiError::Argument(format!(
                "{}: the generation before is trusted until {}; rotate after that",
                self.previous_path().display(),
                Utc(previous.info.not_after_s)
            )));
        }
        let (name, generation) = old.name_and_number(&self.ca())?;
        let end_s = old.info.not_after_s.min(now_s + i64::from(overlap_days) * DAY_S);
        let shortened = Generation::sign(old.key, &format!("{name} G{generation}"), old.info.not_before_s, end_s)?;
        let new = Generation::new(&format!("{name} G{}", generation + 1), now_s, days)?;
        // The new generation's list must be there before any host can be asked for it.
        let lists = self.lists_except(&new)? + &empty_list(&new, now_s)?;
        shortened.store(&self.previous_path())?;
        files::write(&self.revoked(), Secrecy::Public, &lists)?;
        new.store(&self.ca())?;
        self.write_trust(&new, Some(&shortened))?;
        Ok(Issued {
            certificate: new.info,
            files: vec![
                (self.trust(), "every host, before any host's certificate is rotated"),
                (self.revoked(), "every host"),
                (self.ca(), "stays here: the authority's private key"),
                (self.previous_path(), "stays here: the previous private key"),
            ],
        })
    }

    /// The authority's generations and all hosts, with what should be done about each.
    ///
    /// # Errors
    /// When a file cannot be read or is open to others.
    pub fn show(&self, now_s: i64) -> Result<Vec<Shown>, PkiError> {
        let current = Generation::load(&self.ca())?;
        let mut all = vec![shown(self.ca(), Role::Authority, current.info.clone(), now_s, &self.rotate_command(None))];
        if let Some(previous) = self.previous()? {
            let mut line = shown(self.previous_path(), Role::PreviousAuthority, previous.info, now_s, "");
            line.advice =
                (line.certificate.not_after_s < now_s).then(|| "its overlap has ended: remove the file".into());
            all.push(line);
        }
        let directory = self.hosts();
        let entries = std::fs::read_dir(&directory).map_err(|e| PkiError::io(&directory, "read", e))?;
        let mut hosts = Vec::new();
        for entry in entries {
            let name = entry.map_err(|e| PkiError::io(&directory, "read", e))?.file_name();
            if let Some(host) = name.to_str().and_then(|n| n.strip_suffix(".pem")) {
                hosts.push(host.to_owned());
            }
        }
        hosts.sort();
        for host in hosts {
            let certificate = self.load_host(&host)?;
            let old = certificate.issuer_der != current.info.subject_der;
            let command = self.rotate_command(Some(&host));
            let mut line = shown(self.host(&host), Role::Host, certificate, now_s, &command);
            if old && line.advice.is_none() {
                line.advice = Some(format!("signed by the previous authority: run {command}"));
            }
            all.push(line);
        }
        Ok(all)
    }

    /// `trust.pem`: what every host needs to know its peers by.
    pub fn trust(&self) -> PathBuf {
        self.directory.join("trust.pem")
    }

    /// `revoked.pem`: which certificates have lost or will lose their validity early.
    pub fn revoked(&self) -> PathBuf {
        self.directory.join("revoked.pem")
    }

    /// `hosts/HOST.pem`: a host's key and certificate.
    pub fn host(&self, host: &str) -> PathBuf {
        self.hosts().join(format!("{host}.pem"))
    }

    /// The command that renews a host's certificate, or the authority.
    fn rotate_command(&self, host: Option<&str>) -> String {
        let host = host.map(|host| format!(" --host {host}")).unwrap_or_default();
        format!("ferry pki rotate {}{host}", self.directory.display())
    }

    fn ca(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    fn previous_path(&self) -> PathBuf {
        self.directory.join("ca.old.pem")
    }

    fn hosts(&self) -> PathBuf {
        self.directory.join("hosts")
    }

    fn previous(&self) -> Result<Option<Generation>, PkiError> {
        match Generation::load(&self.previous_path()) {
            Ok(generation) => Ok(Some(generation)),
            Err(PkiError::Missing { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Replaces `trust.pem` if it is not what it should be: a crash may have come between it and `ca.pem`, or an overlap has ended.
    fn refresh_trust(&self, current: &Generation, now_s: i64) -> Result<(), PkiError> {
        let previous = self.previous()?.filter(|p| p.info.not_after_s >= now_s);
        let known = files::read(&self.trust(), Secrecy::Public, INIT);
        if known.is_ok_and(|known| known == trust_text(current, previous.as_ref())) {
            return Ok(());
        }
        self.write_trust(current, previous.as_ref())
    }

    fn write_trust(&self, current: &Generation, previous: Option<&Generation>) -> Result<(), PkiError> {
        files::write(&self.trust(), Secrecy::Public, &trust_text(current, previous))
    }

    fn load_host(&self, host: &str) -> Result<CertificateInfo, PkiError> {
        let path = self.host(host);
        let text =
            files::read(&path, Secrecy::Private, &format!("run: ferry pki issue {} {host}", self.directory.display()))?;
        let der = pem::certificates(&path, &text)?.swap_remove(0);
        CertificateInfo::from_der(&der).map_err(|problem| PkiError::content(&path, problem))
    }

    fn make_host(&self, host: &str, addresses: &[IpAddr], days: u32, now_s: i64) -> Result<Issued, PkiError> {
        let ca = Generation::load(&self.ca())?;
        if let Some(problem) = ca.info.validity_problem(now_s) {
            return Err(PkiError::Validity {
                path: self.ca(),
                subject: ca.info.subject,
                problem,
                remedy: format!("run: {}", self.rotate_command(None)),
            });
        }
        self.refresh_trust(&ca, now_s)?;
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(PkiError::crypto("make a key"))?;
        let end_s = ca.info.not_after_s.min(now_s + i64::from(days) * DAY_S);
        let mut params = parameters(host, now_s - CLOCK_SKEW_S, end_s)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let dns = host.try_into().map_err(PkiError::crypto("encode the host name"))?;
        params.subject_alt_names.push(SanType::DnsName(dns));
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        let issuer = ca.issuer()?;
        let certificate = params.signed_by(&key, &issuer).map_err(PkiError::crypto("sign the certificate"))?;
        let path = self.host(host);
        let text = pem::block("PRIVATE KEY", key.serialized_der()) + &pem::block("CERTIFICATE", certificate.der());
        files::write(&path, Secrecy::Private, &text)?;
        let certificate =
            CertificateInfo::from_der(certificate.der()).map_err(|problem| PkiError::content(&path, problem))?;
        Ok(Issued { certificate, files: vec![(path, "that host"), (self.trust(), "every host")] })
    }

    /// The lists of `revoked.pem` but that of `generation`, as PEM text.
    fn lists_except(&self, generation: &Generation) -> Result<String, PkiError> {
        let path = self.revoked();
        let text = files::read(&path, Secrecy::Public, INIT)?;
        let mut others = String::new();
        for der in pem::revocation_lists(&path, &text)? {
            if parse_list(&path, &der)?.issuer().as_raw() != generation.info.subject_der {
                others += &pem::block("X509 CRL", &der);
            }
        }
        Ok(others)
    }

    fn add_revocation(&self, certificate: &CertificateInfo, from_s: i64, now_s: i64) -> Result<(), PkiError> {
        let current = Generation::load(&self.ca())?;
        let generation = if current.info.subject_der == certificate.issuer_der {
            current
        } else {
            match self.previous()? {
                Some(previous) if previous.info.subject_der == certificate.issuer_der => previous,
                // Signed by an authority that is trusted no more: nothing to revoke.
                _ => return Ok(()),
            }
        };
        let path = self.revoked();
        let text = files::read(&path, Secrecy::Public, INIT)?;
        let mut revoked = Vec::new();
        let mut number = 0u64;
        for der in pem::revocation_lists(&path, &text)? {
            let list = parse_list(&path, &der)?;
            if list.issuer().as_raw() != generation.info.subject_der {
                continue;
            }
            number = list.crl_number().and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
            for entry in list.iter_revoked_certificates() {
                let at = moment(entry.revocation_date.timestamp())?;
                // Revoked before: the earlier date holds, and a date never moves to later.
                let serial = SerialNumber::from_slice(entry.raw_serial());
                revoked.push(revocation(serial, at));
            }
        }
        let serial =
            from_hex(&certificate.serial).ok_or_else(|| PkiError::content(&path, "has an unreadable serial number"))?;
        let from = moment(from_s)?;
        match revoked.iter_mut().find(|r| r.serial_number.as_ref() == serial) {
            Some(known) => known.revocation_time = known.revocation_time.min(from),
            None => revoked.push(revocation(SerialNumber::from_slice(&serial), from)),
        }
        let list = sign_list(&generation, revoked, number + 1, now_s)?;
        files::write(&path, Secrecy::Public, &(self.lists_except(&generation)? + &list))
    }
}

fn trust_text(current: &Generation, previous: Option<&Generation>) -> String {
    let previous = previous.map_or(String::new(), |previous| pem::block("CERTIFICATE", &previous.der));
    pem::block("CERTIFICATE", &current.der) + &previous
}

const INIT: &str = "run: ferry pki init DIR";

impl Generation {
    fn new(common_name: &str, now_s: i64, days: u32) -> Result<Self, PkiError> {
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(PkiError::crypto("make a key"))?;
        Self::sign(key, common_name, now_s - CLOCK_SKEW_S, now_s + i64::from(days) * DAY_S)
    }

    fn sign(key: KeyPair, common_name: &str, from_s: i64, end_s: i64) -> Result<Self, PkiError> {
        let mut params = parameters(common_name, from_s, end_s)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(PkiError::crypto("sign the authority's certificate"))?;
        let der = certificate.der().clone();
        let info = CertificateInfo::from_der(&der)
            .map_err(|reason| PkiError::Crypto { action: "read back the certificate", reason })?;
        Ok(Self { key, der, info })
    }

    fn load(path: &Path) -> Result<Self, PkiError> {
        let text = files::read(path, Secrecy::Private, INIT)?;
        let der = pem::certificates(path, &text)?.swap_remove(0);
        let info = CertificateInfo::from_der(&der).map_err(|problem| PkiError::content(path, problem))?;
        let key = KeyPair::try_from(&pem::private_key(path, &text)?)
            .map_err(|e| PkiError::content(path, format!("holds an unusable private key: {e}")))?;
        Ok(Self { key, der, info })
    }

    fn store(&self, path: &Path) -> Result<(), PkiError> {
        let text = pem::block("PRIVATE KEY", self.key.serialized_der()) + &pem::block("CERTIFICATE", &self.der);
        files::write(path, Secrecy::Private, &text)
    }

    fn issuer(&self) -> Result<Issuer<'static, &KeyPair>, PkiError> {
        Issuer::from_ca_cert_der(&self.der, &self.key).map_err(PkiError::crypto("use the authority's certificate"))
    }

    /// "Ferry 1a2b3c4d G3" is the third generation of "Ferry 1a2b3c4d".
    fn name_and_number(&self, path: &Path) -> Result<(String, u64), PkiError> {
        let name = self.info.subject.strip_prefix("CN=").and_then(|name| name.rsplit_once(" G"));
        name.and_then(|(name, number)| Some((name.to_owned(), number.parse().ok()?)))
            .ok_or_else(|| PkiError::content(path, format!("was not made here: its subject is {}", self.info.subject)))
    }
}

fn parameters(common_name: &str, from_s: i64, end_s: i64) -> Result<CertificateParams, PkiError> {
    let mut serial = random::<16>()?;
    // Positive and without leading zero, so that its encoding has one form (RFC 5280, 4.1.2.2).
    serial[0] = (serial[0] & 0x7f) | 0x40;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = moment(from_s)?;
    params.not_after = moment(end_s)?;
    Ok(params)
}

fn random<const N: usize>() -> Result<[u8; N], PkiError> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| PkiError::Crypto { action: "make a random number", reason: "the system has none".into() })?;
    Ok(bytes)
}

fn moment(at_s: i64) -> Result<OffsetDateTime, PkiError> {
    OffsetDateTime::from_unix_timestamp(at_s).map_err(|_| PkiError::Argument(format!("{at_s} s after 1970 is no date")))
}

fn revocation(serial_number: SerialNumber, revocation_time: OffsetDateTime) -> RevokedCertParams {
    RevokedCertParams { serial_number, revocation_time, reason_code: None, invalidity_date: None }
}

fn empty_list(generation: &Generation, now_s: i64) -> Result<String, PkiError> {
    sign_list(generation, Vec::new(), 1, now_s)
}

fn sign_list(
    generation: &Generation,
    revoked_certs: Vec<RevokedCertParams>,
    number: u64,
    now_s: i64,
) -> Result<String, PkiError> {
    let list = CertificateRevocationListParams {
        this_update: moment(now_s)?,
        // Nothing fetches lists by itself here; a list holds until another takes its place.
        next_update: moment(generation.info.not_after_s.max(now_s + DAY_S))?,
        crl_number: SerialNumber::from_slice(&number.to_be_bytes()),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let list = list.signed_by(&generation.issuer()?).map_err(PkiError::crypto("sign the revocation list"))?;
    Ok(pem::block("X509 CRL", list.der()))
}

fn parse_list<'a>(path: &Path, der: &'a [u8]) -> Result<CertificateRevocationList<'a>, PkiError> {
    CertificateRevocationList::from_der(der)
        .map(|(_, list)| list)
        .map_err(|e| PkiError::content(path, format!("holds an unreadable revocation list: {e}")))
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok()).collect()
}

fn shown(file: PathBuf, role: Role, certificate: CertificateInfo, now_s: i64, renew: &str) -> Shown {
    let days_left = certificate.days_left(now_s);
    let advice = match certificate.validity_problem(now_s) {
        Some(problem) => Some(format!("{problem}: run {renew}")),
        None if days_left < 30 => Some(format!("expires in {days_left} days: run {renew}")),
        None => None,
    };
    Shown { file, role, certificate, days_left, advice }
}

fn check_days(days: u32) -> Result<(), PkiError> {
    match days {
        1..=MAX_DAYS => Ok(()),
        _ => Err(PkiError::Argument(format!("validity must be 1 to {MAX_DAYS} days, not {days}"))),
    }
}

fn check_overlap(days: u32) -> Result<(), PkiError> {
    match days {
        0..=MAX_DAYS => Ok(()),
        _ => Err(PkiError::Argument(format!("overlap must be at most {MAX_DAYS} days, not {days}"))),
    }
}

/// A host's name as it is compared everywhere: a DNS name (RFC 1123, 2.1) in lower case, no address, no wildcard.
///
/// # Errors
/// When it cannot be one.
pub fn host_name(name: &str) -> Result<String, PkiError> {
    let lower = name.to_ascii_lowercase();
    let problem = if lower.is_empty() || lower.len() > 253 {
        Some("must have 1 to 253 characters")
    } else if lower.parse::<IpAddr>().is_ok() {
        Some("is an address; a host is identified by a name")
    } else if lower.split('.').any(|label| label.is_empty() || label.len() > 63) {
        Some("each part between dots must have 1 to 63 characters")
    } else if lower.split('.').any(|label| label.starts_with('-') || label.ends_with('-')) {
        Some("no part may begin or end with a hyphen")
    } else if !lower.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.') {
        Some("only letters, digits, hyphens and dots are allowed")
    } else if lower.rsplit('.').next().is_some_and(|label| label.bytes().all(|b| b.is_ascii_digit())) {
        Some("the last part must not be a number")
    } else {
        None
    };
    match problem {
        Some(problem) => Err(PkiError::HostName { name: name.to_owned(), problem }),
        None => Ok(lower),
    }
}
