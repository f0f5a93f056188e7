//! What can go wrong on a channel, said so that an operator knows on which host to look.
use std::io;
use std::net::SocketAddr;

use rustls::{AlertDescription, CertificateError};

use super::{FrameError, RefusalCode};

/// Why a channel was not opened or has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// No TCP connection.
    #[error("cannot connect to {address}: {reason}")]
    Connect {
        /// Where to.
        address: SocketAddr,
        /// The system's reason.
        reason: String,
    },
    /// Something took too long.
    #[error("{what} took longer than {limit_ms} ms")]
    Timeout {
        /// What.
        what: &'static str,
        /// What was allowed, milliseconds.
        limit_ms: u64,
    },
    /// No agreement with the peer about TLS or certificates.
    #[error("TLS: {0}")]
    Tls(String),
    /// The peer is somebody else than expected.
    #[error("expected host {expected:?} but the peer's certificate names {found:?} first")]
    Identity {
        /// Who should be there.
        expected: String,
        /// Who is.
        found: String,
    },
    /// The peer does not take the connection.
    #[error("the peer refused ({code:?}): {text}")]
    Refused {
        /// Why.
        code: RefusalCode,
        /// The peer's words.
        text: String,
    },
    /// Bytes that are no frame.
    #[error("the peer sent no valid frame: {0}")]
    Frame(#[from] FrameError),
    /// A frame that does not belong here.
    #[error("the peer sent a frame out of place")]
    OutOfPlace,
    /// The connection ended without a close: peer, network or switch died.
    #[error("the connection was cut")]
    Cut,
    /// Nothing was heard for too long.
    #[error("nothing was heard from the peer for {0} ms")]
    Idle(u64),
    /// The peer does not read.
    #[error("the peer took no data for {0} ms")]
    Stalled(u64),
    /// A message longer than this channel allows; nothing was sent.
    #[error("message of {bytes} bytes; at most {limit} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// What is allowed.
        limit: usize,
    },
    /// The queue is full; nothing was sent.
    #[error("the peer takes messages too slowly")]
    Full,
    /// This side has closed it.
    #[error("the connection is closed")]
    Closed,
    /// The system refused.
    #[error("{0}")]
    Io(String),
    /// Limits or credentials that cannot be used.
    #[error("{0}")]
    Setup(String),
}

impl ChannelError {
    /// Of reading or writing an established connection.
    pub(super) fn from_io(error: &io::Error) -> Self {
        match error.kind() {
            // rustls says UnexpectedEof when TCP ends without TLS's own farewell.
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected => Self::Cut,
            _ => match tls(error) {
                Some(text) => Self::Tls(text),
                None => Self::Io(error.to_string()),
            },
        }
    }

    /// Of a handshake.
    pub(super) fn from_handshake(error: &io::Error) -> Self {
        match (tls(error), Self::from_io(error)) {
            (Some(text), _) => Self::Tls(text),
            (None, Self::Cut) => Self::Tls("the peer ended the connection during the handshake".into()),
            (None, other) => other,
        }
    }
}

fn tls(error: &io::Error) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let hint = match error {
        rustls::Error::InvalidCertificate(problem) => match problem {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "the peer's certificate comes from no authority that is trusted here"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => "the peer's certificate has expired",
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "the peer's certificate is not valid yet: compare the hosts' clocks"
            }
            CertificateError::Revoked => "the peer's certificate is revoked",
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "the peer is not the host that was expected"
            }
            _ => "the peer's certificate cannot be used",
        },
        rustls::Error::NoCertificatesPresented => "the peer has no certificate",
        rustls::Error::AlertReceived(alert) => match alert {
            // Decrypt error: it trusts an authority of the same name but with another key.
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "the peer does not trust the authority of this host's certificate"
            }
            AlertDescription::CertificateExpired => "this host's certificate has expired, says the peer",
            AlertDescription::CertificateRevoked => "this host's certificate is revoked, says the peer",
            AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::AccessDenied => "the peer refused this host's certificate",
            AlertDescription::NoApplicationProtocol => "the peer speaks TLS but not this protocol",
            AlertDescription::ProtocolVersion => "the peer does not speak TLS 1.3",
            _ => "the peer ended the handshake",
        },
        rustls::Error::PeerIncompatible(_) => "the peer does not speak TLS 1.3 as it is needed here",
        rustls::Error::InvalidMessage(_) => "the peer does not speak TLS",
        _ => "failed",
    };
    Some(format!("{hint} ({error})"))
}
