//! The local API: HTTP/1 with JSON bodies over a Unix socket. Documented in docs/API.md.
mod error;
mod firewall;
mod migration;
mod routes;
mod server;
mod socket;
pub mod views;

pub use error::{ApiError, ErrorBody, ErrorDetail};
pub use routes::{AppState, router};
pub use server::{MAX_CONNECTIONS, Peer, serve};
pub use socket::{ApiSocket, resolve_group, resolve_user};

/// Version of the API: the first part of every path.
pub const VERSION: &str = "v1";
/// Largest request body, bytes: as large as a configuration file, since a security group may fill one.
pub const MAX_BODY_BYTES: usize = crate::config::MAX_FILE_BYTES as usize;
