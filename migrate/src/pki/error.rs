//! What can be wrong with keys and certificates, said so that an operator knows which file and what to do.
use std::io;
use std::path::{Path, PathBuf};

/// Why a key or certificate could not be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The file system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was being done, e.g. "read".
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// Others could read or replace what must be private.
    #[error("{}: {problem}; {remedy}", path.display())]
    Permissions {
        /// The file or directory.
        path: PathBuf,
        /// What is too open.
        problem: String,
        /// The command that corrects it.
        remedy: String,
    },
    /// Something that should be there is not.
    #[error("{}: not there; {remedy}", path.display())]
    Missing {
        /// The file or directory.
        path: PathBuf,
        /// How to make it.
        remedy: String,
    },
    /// Something that would be overwritten.
    #[error("{}: exists already; {remedy}", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
        /// What to do instead.
        remedy: String,
    },
    /// The content is not what it should be.
    #[error("{}: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, with the remedy where there is one.
        problem: String,
    },
    /// A certificate is outside its time of validity.
    #[error("{}: the certificate of {subject} {problem}; {remedy}", path.display())]
    Validity {
        /// The file.
        path: PathBuf,
        /// Whose certificate.
        subject: String,
        /// "expired on ..." or "is not valid before ...".
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A host name that cannot be one.
    #[error("host name {name:?}: {problem}")]
    HostName {
        /// As it was given.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An argument out of its range.
    #[error("{0}")]
    Argument(String),
    /// Another command works on the same directory.
    #[error("{}: another command is working here; wait for it to finish", path.display())]
    Busy {
        /// The lock file.
        path: PathBuf,
    },
    /// The cryptographic library refused.
    #[error("cannot {action}: {reason}")]
    Crypto {
        /// What was being done.
        action: &'static str,
        /// Its reason.
        reason: String,
    },
}

impl PkiError {
    pub(super) fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), action, source }
    }

    pub(super) fn content(path: &Path, problem: impl Into<String>) -> Self {
        Self::Content { path: path.to_owned(), problem: problem.into() }
    }

    pub(super) fn crypto(action: &'static str) -> impl Fn(rcgen::Error) -> Self {
        move |error| Self::Crypto { action, reason: error.to_string() }
    }
}
