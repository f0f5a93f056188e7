//! TLS 1.3 with certificates on both sides, and who the peer turned out to be.
//!
//! Only TLS 1.3 (RFC 8446), with ring's cipher suites; no tickets, no resumption, no early data: each connection proves both
//! sides' keys anew, so that a revoked certificate is worth nothing from the next connection on. The application protocol
//! (RFC 7301) is [`ALPN`].
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};

use super::ChannelError;
use crate::pki::{CertificateInfo, Credentials, host_identity};

/// Names protocol and framing; another framing gets another name.
pub const ALPN: &[u8] = b"ferry-migrate/1";

/// Who is at the other end, as its certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The host: first DNS name of the certificate, lower case.
    pub host: String,
    /// Where it connected from, or was connected to.
    pub address: SocketAddr,
    /// The certificate.
    pub certificate: CertificateInfo,
}

/// This host's side of TLS. Credentials can be replaced while connections exist; these keep what they began with.
pub struct TlsContext {
    current: RwLock<Arc<Configs>>,
}

pub(super) struct Configs {
    credentials: Arc<Credentials>,
    pub(super) server: Arc<ServerConfig>,
    pub(super) client: Arc<ClientConfig>,
    /// When an authority begins or ceases to be trusted; seconds since 1970.
    until_s: i64,
}

impl fmt::Debug for TlsContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsContext").field("credentials", &self.read().credentials).finish()
    }
}

impl TlsContext {
    /// # Errors
    /// When TLS cannot use the credentials.
    pub fn new(credentials: Credentials) -> Result<Self, ChannelError> {
        Ok(Self { current: RwLock::new(Arc::new(Configs::new(Arc::new(credentials), now_s())?)) })
    }

    /// Replaces the credentials for all handshakes that begin from now on.
    ///
    /// # Errors
    /// When TLS cannot use them; the old ones stay.
    pub fn replace(&self, credentials: Credentials) -> Result<(), ChannelError> {
        let configs = Arc::new(Configs::new(Arc::new(credentials), now_s())?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = configs;
        Ok(())
    }

    /// The credentials in use.
    pub fn credentials(&self) -> Arc<Credentials> {
        self.read().credentials.clone()
    }

    fn read(&self) -> Arc<Configs> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// For one handshake. An authority whose time has ended is left out from then on (path validation itself does not look at anchors' times).
    pub(super) fn configs(&self) -> Result<Arc<Configs>, ChannelError> {
        let configs = self.read();
        let now_s = now_s();
        if now_s < configs.until_s {
            return Ok(configs);
        }
        let fresh = Arc::new(Configs::new(configs.credentials.clone(), now_s)?);
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        // Somebody may have replaced the credentials meanwhile.
        if Arc::ptr_eq(&current, &configs) {
            *current = fresh;
        }
        Ok(current.clone())
    }
}

impl Configs {
    fn new(credentials: Arc<Credentials>, now_s: i64) -> Result<Self, ChannelError> {
        let setup = |e: &dyn fmt::Display| ChannelError::Setup(format!("TLS cannot use the credentials: {e}"));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (roots, until_s) = credentials.roots(now_s);
        if roots.is_empty() {
            return Err(ChannelError::Setup("no trusted authority's certificate is valid now".into()));
        }
        let roots = Arc::new(roots);
        let peers = Arc::new(PeerVerifier {
            server: WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
                .build()
                .map_err(|e| setup(&e))?,
            client: WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
                .build()
                .map_err(|e| setup(&e))?,
            credentials: credentials.clone(),
        });
        let versions = [&rustls::version::TLS13];
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&versions)
            .map_err(|e| setup(&e))?
            .with_client_cert_verifier(peers.clone())
            .with_single_cert(credentials.chain.clone(), credentials.key.clone_key())
            .map_err(|e| setup(&e))?;
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![ALPN.to_vec()];
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(|e| setup(&e))?
            .dangerous()
            .with_custom_certificate_verifier(peers)
            .with_client_auth_cert(credentials.chain.clone(), credentials.key.clone_key())
            .map_err(|e| setup(&e))?;
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { credentials, server: Arc::new(server), client: Arc::new(client), until_s })
    }
}

/// WebPKI's verification and what Ferry adds: revocation with dates, and a name that identifies a host.
#[derive(Debug)]
struct PeerVerifier {
    server: Arc<WebPkiServerVerifier>,
    client: Arc<dyn ClientCertVerifier>,
    credentials: Arc<Credentials>,
}

impl PeerVerifier {
    fn check(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let now_s = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let read = |der: &CertificateDer<'_>| {
            CertificateInfo::from_der(der).map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))
        };
        let holder = read(own)?;
        let mut chain = between.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        if let Err(problem) = host_identity(&holder) {
            return Err(rustls::Error::General(problem));
        }
        chain.push(holder);
        if chain.iter().any(|certificate| self.credentials.is_revoked(certificate, now_s)) {
            return Err(CertificateError::Revoked.into());
        }
        Ok(())
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.server.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        self.check(end_entity, intermediates, now)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.server.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.server.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.server.supported_verify_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.client.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.client.verify_client_cert(end_entity, intermediates, now)?;
        self.check(end_entity, intermediates, now)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.client.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.client.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.client.supported_verify_schemes()
    }
}

/// Who the peer is, once the handshake is over, and that both sides mean this protocol.
pub(super) fn peer_identity(
    connection: &rustls::CommonState,
    address: SocketAddr,
) -> Result<PeerIdentity, ChannelError> {
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(ChannelError::Tls("the peer speaks TLS but not this protocol".into()));
    }
    let der = connection.peer_certificates().and_then(<[_]>::first);
    let certificate = CertificateInfo::from_der(der.ok_or_else(|| ChannelError::Tls("no certificate".into()))?)
        .map_err(ChannelError::Tls)?;
    let host = host_identity(&certificate).map_err(ChannelError::Tls)?;
    Ok(PeerIdentity { host, address, certificate })
}

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}
