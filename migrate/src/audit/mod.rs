//! The audit log: every attempt, grant, refusal and outcome of a migration, on both hosts, so that what happened can be proven later.
//!
//! # Form
//! One JSON object per line, in a file that is only ever appended to:
//! ```json
//! {"seq":7,"time":"2026-11-21T16:47:42.123Z","prev":"<64 hex>","key":"<16 hex>","host":"host-a","event":"granted",...,"sig":"<128 hex>"}
//! ```
//! - `seq` counts from 1 without gaps, over all files.
//! - `prev` is the SHA-256 of the whole line before (without its newline); 64 zeros in the very first.
//! - `key`: the first 8 bytes of the SHA-256 of the public key that signs.
//! - `sig`, always last: Ed25519 (RFC 8032) over `"ferry audit 1\n"` and the line up to, not including, `,"sig"`.
//!
//! The key may be the host's TLS key: what TLS signs begins with 64 spaces (RFC 8446, 4.4.3), what is signed here with its own words.
//!
//! So an edited, inserted, removed or moved line breaks the chain, and nobody without the host's key can mend it. Lines cut off at the end break no
//! chain; therefore `PATH.head` holds the last line's number and hash, signed; and [`AuditLog::head`] can be given to the peer, whose
//! own log keeps it in `peer_head` (out of reach for whoever owns this host).
//!
//! # Files
//! A file that has grown to its limit is renamed to `PATH.<number of its first line, 20 digits>`; the chain goes on in a new `PATH`. When old files
//! are to be removed, a signed line says so first. `PATH.lock` keeps a second process away.
//!
//! # When the disk is full
//! A line that cannot be written leaves no trace in the file (a partial one is cut off), is counted, and the next line that can be written is
//! preceded by one that says how many are missing. Whether migrations may begin meanwhile is [`OnFailure`].
//!
//! Calls block for the time of a write (and an fsync): not for a thread that must not wait.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)
)]

mod line;
mod log;
#[cfg(test)]
mod tests;
mod verify;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Serialize;

pub use line::{Head, MAX_LINE_BYTES};
pub use log::{AuditConfig, AuditLog, AuditStatus, OnFailure, Opened, SyncPolicy};
pub use verify::{MAX_PROBLEMS, Problem, ProblemKind, Report, verify};

use crate::authz::Role;

/// Longest text of one field that is logged, bytes; the rest is cut off.
pub const MAX_TEXT_BYTES: usize = 512;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A peer's connection was refused before anything could be asked (TLS, limits, form).
    ConnectionRefused,
    /// A migration was asked for, here or by a peer.
    Attempt,
    /// A pre-flight check was asked for.
    Check,
    /// It was allowed; `rule` says by what.
    Granted,
    /// It was not; `reason` says why.
    Refused,
    /// The destination holds everything.
    Committed,
    /// The destination's VM runs with its connections.
    Completed,
    /// The source took the VM back after the commit.
    Revoked,
    /// It ended before the commit, as it should for the `reason` given (cancelled, QEMU gone).
    Aborted,
    /// It ended before the commit by an error.
    Failed,
    /// The time for the final delta ran out; `reason` says which way the VM's policy decided.
    HoldExceeded,
    /// Certificates or rules were changed.
    Configuration,
}

/// One event. Fields that do not apply stay empty and are left out.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// What happened.
    pub event: Kind,
    /// The migration's id, 32 hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "line::migration_id")]
    pub migration: Option<u128>,
    /// The VM.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "line::bounded")]
    pub vm: Option<String>,
    /// The peer as its certificate names it.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "line::bounded")]
    pub peer: Option<String>,
    /// The peer's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// SHA-256 of the peer's certificate, hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "line::bounded")]
    pub certificate: Option<String>,
    /// This host's part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// The rule that decided.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "line::bounded")]
    pub rule: Option<String>,
    /// Why, for operators.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "line::bounded")]
    pub reason: Option<String>,
    /// Connections that were moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
    /// Digest of the final delta as both sides agreed on it, hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "line::bounded")]
    pub digest: Option<String>,
    /// Where the peer's own log stood: its witness.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_head: Option<Head>,
}

impl Event {
    /// An event without particulars.
    pub fn new(event: Kind) -> Self {
        Self {
            event,
            migration: None,
            vm: None,
            peer: None,
            address: None,
            certificate: None,
            role: None,
            rule: None,
            reason: None,
            connections: None,
            digest: None,
            peer_head: None,
        }
    }

    /// Takes VM, peer, role, rule and reason from an authorization's decision; the kind becomes granted or refused.
    pub fn decision(decision: &crate::authz::Decision) -> Self {
        Self {
            vm: Some(decision.vm.clone()),
            peer: Some(decision.peer.clone()),
            role: Some(decision.role),
            rule: decision.rule.clone(),
            reason: Some(decision.reason.clone()),
            ..Self::new(if decision.allowed { Kind::Granted } else { Kind::Refused })
        }
    }
}

/// Why a log cannot be opened, written or read.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The file system refused.
    #[error("audit log {}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The file is there but cannot be continued.
    #[error("audit log {}: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Another process writes it.
    #[error("audit log {}: another process is writing it", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
}
