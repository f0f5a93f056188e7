//! HTTP over the API's socket.
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::api::{ErrorBody, ErrorDetail};

/// How long an answer may take: a little longer than the daemon allows itself.
const TIMEOUT: Duration = Duration::from_secs(70);
/// Largest answer, bytes.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// Why a command failed; decides the exit status.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Wrong usage.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do.
        hint: String,
    },
    /// A configuration file is not valid: already formatted.
    #[error("{0}")]
    Config(String),
    /// No daemon there.
    #[error("cannot reach ferryd on {}: {message}", socket.display())]
    Unreachable {
        /// Where it should be.
        socket: PathBuf,
        /// Why.
        message: String,
        /// What to do.
        hint: String,
    },
    /// The daemon said no.
    #[error("{}", detail.message)]
    Refused {
        /// HTTP status.
        status: u16,
        /// What it said.
        detail: ErrorDetail,
    },
    /// Counters do not add up.
    #[error("{0}")]
    Unbalanced(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl CliError {
    /// The exit status.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. } | Self::Config(_) => 2,
            Self::Unreachable { .. } => 3,
            Self::Refused { detail, .. } if detail.code == "not_found" => 4,
            Self::Unbalanced(_) => 5,
            Self::Refused { .. } | Self::Other(_) => 1,
        }
    }

    /// What to do; may be empty.
    pub fn hint(&self) -> &str {
        match self {
            Self::Usage { hint, .. } | Self::Unreachable { hint, .. } => hint,
            Self::Refused { detail, .. } => &detail.hint,
            _ => "",
        }
    }
}

/// A client of one daemon.
pub struct Client {
    socket: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// A client of the daemon at `socket`. Nothing is connected yet.
    ///
    /// # Errors
    /// The runtime cannot be made.
    pub fn new(socket: &Path) -> Result<Self, CliError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| CliError::Other(e.to_string()))?;
        Ok(Self { socket: socket.to_owned(), runtime })
    }

    /// GET a path.
    ///
    /// # Errors
    /// No daemon, or it refuses.
    pub fn get(&self, path: &str) -> Result<Value, CliError> {
        self.send(Method::GET, path, None)
    }

    /// Any request; the answer as JSON.
    ///
    /// # Errors
    /// No daemon, or it refuses.
    pub fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, CliError> {
        let text = self.text(method, path, body)?;
        serde_json::from_slice(&text).map_err(|e| CliError::Other(format!("ferryd's answer is not JSON: {e}")))
    }

    /// Any request; the answer as it is.
    ///
    /// # Errors
    /// No daemon, or it refuses.
    pub fn text(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Bytes, CliError> {
        let request = self.exchange(method, path, body);
        let timed = async { tokio::time::timeout(TIMEOUT, request).await };
        match self.runtime.block_on(timed) {
            Ok(answer) => answer,
            Err(_) => Err(CliError::Other(format!("no answer from ferryd within {} s", TIMEOUT.as_secs()))),
        }
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Bytes, CliError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| {
            let hint = match e.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "you may not use its API: see api.mode and api.group in the configuration"
                }
                _ => "is it running? Another socket is named with --socket PATH or FERRY_SOCKET",
            };
            CliError::Unreachable { socket: self.socket.clone(), message: e.to_string(), hint: hint.into() }
        })?;
        let other = |e: hyper::Error| CliError::Other(format!("the connection to ferryd broke: {e}"));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(other)?;
        // Ends with the exchange; errors show up there.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        let bytes = body.map(|b| b.to_string()).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(bytes)))
            .map_err(|e| CliError::Other(e.to_string()))?;
        let answer = sender.send_request(request).await.map_err(other)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES)
            .collect()
            .await
            .map_err(|e| CliError::Other(format!("the connection to ferryd broke: {e}")))?
            .to_bytes();
        if status.is_success() { Ok(body) } else { Err(refusal(status, &body)) }
    }
}

fn refusal(status: StatusCode, body: &[u8]) -> CliError {
    let detail = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(b) => b.error,
        Err(_) => ErrorDetail {
            code: "internal".into(),
            message: format!("ferryd answered {status}: {}", String::from_utf8_lossy(body)),
            ..ErrorDetail::default()
        },
    };
    CliError::Refused { status: status.as_u16(), detail }
}
