//! The audit log, written by a thread of its own: a line waits for the disk, and a stopped VM must not.
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use ferry_migrate::audit::{AuditConfig, AuditError, AuditLog, AuditStatus, Event, OnFailure};
use ferry_migrate::pki::Credentials;

use crate::config::{AuditOnFailure, MigrationConfig};

/// Lines that wait for the disk.
const WAITING: usize = 1024;
/// Refused connections written per second; the rest is counted by the listener.
const REFUSALS_PER_SECOND: u32 = 10;

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// This host's audit log.
pub struct Auditor {
    log: Arc<Mutex<AuditLog>>,
    queue: SyncSender<(u64, Event)>,
    refusals: Mutex<(Instant, u32)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Auditor {
    /// Opens or begins the log.
    ///
    /// # Errors
    /// It cannot be used, or the host's key is not of the kind that signs it.
    pub fn open(config: &MigrationConfig, credentials: &Credentials) -> Result<Self, String> {
        let Some(key) = credentials.audit_key() else {
            return Err("the host's key is no Ed25519 key, which the audit log is signed with".into());
        };
        let mut settings = AuditConfig::new(&config.audit_log);
        settings.on_failure = match config.audit_on_failure {
            AuditOnFailure::Refuse => OnFailure::Refuse,
            AuditOnFailure::Allow => OnFailure::Allow,
        };
        if let Some(directory) = config.audit_log.parent() {
            std::fs::create_dir_all(directory).map_err(|e| format!("{}: {e}", directory.display()))?;
        }
        let (log, opened) = AuditLog::open(settings, credentials.host(), key, unix_ms()).map_err(|e| e.to_string())?;
        if opened.torn_bytes > 0 || opened.missing_lines > 0 {
            tracing::warn!(
                torn_bytes = opened.torn_bytes,
                missing_lines = opened.missing_lines,
                "the audit log {} lacks its end",
                config.audit_log.display()
            );
        }
        let log = Arc::new(Mutex::new(log));
        let (queue, waiting) = sync_channel::<(u64, Event)>(WAITING);
        let writer = Arc::clone(&log);
        std::thread::Builder::new()
            .name("ferry-audit".into())
            .spawn(move || {
                while let Ok((now_ms, event)) = waiting.recv() {
                    // Counted by the log, and shown in its status.
                    let _ = lock(&writer).append(now_ms, &event);
                }
            })
            .map_err(|e| e.to_string())?;
        Ok(Self { log, queue, refusals: Mutex::new((Instant::now(), 0)) })
    }

    /// Writes that a migration is to begin. Waits for the disk.
    ///
    /// # Errors
    /// It could not be written, and then no migration may begin.
    pub fn begin(&self, event: &Event) -> Result<(), AuditError> {
        lock(&self.log).begin(unix_ms(), event)
    }

    /// Has a line written soon.
    pub fn note(&self, event: Event) {
        if let Err(TrySendError::Full((now_ms, event))) = self.queue.try_send((unix_ms(), event)) {
            // Rather late than not at all.
            let _ = lock(&self.log).append(now_ms, &event);
        }
    }

    /// As [`Self::note`], but only so many per second: strangers can cause any number.
    pub fn note_refusal(&self, event: Event) {
        let mut refusals = lock(&self.refusals);
        if refusals.0.elapsed().as_secs() >= 1 {
            *refusals = (Instant::now(), 0);
        }
        refusals.1 += 1;
        if refusals.1 <= REFUSALS_PER_SECOND {
            let _ = self.queue.try_send((unix_ms(), event));
        }
    }

    /// Signs with the key of these credentials from now on.
    ///
    /// # Errors
    /// They have none, or the line that says so could not be written.
    pub fn change_key(&self, credentials: &Credentials) -> Result<(), String> {
        let key = credentials.audit_key().ok_or("the new key is no Ed25519 key")?;
        lock(&self.log).change_key(unix_ms(), key).map_err(|e| e.to_string())
    }

    /// How the log is.
    pub fn status(&self) -> AuditStatus {
        lock(&self.log).status()
    }
}
