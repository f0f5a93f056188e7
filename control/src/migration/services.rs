//! What migrations of all VMs need: credentials, the audit log, the listener, the dialler.
use std::net::SocketAddr;
use std::sync::Arc;

use ferry_migrate::channel::{ChannelLimits, Dialer, Listener, ListenerStats, Pace, TlsContext};
use ferry_migrate::pki::Credentials;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::Hub;
use super::auditor::{Auditor, unix_ms};
use super::intake::{self, Doorman};
use super::view::HostView;
use crate::config::MigrationConfig;
use crate::engine::EngineError;

/// A stopped VM's final delta must find room: 64 messages are 8 MiB.
const QUEUE_MESSAGES: usize = 64;

fn limits() -> ChannelLimits {
    // Strangers behind a peer's address must not keep the peer out.
    ChannelLimits { queue_messages: QUEUE_MESSAGES, max_handshakes_per_address: 16, ..ChannelLimits::default() }
}

fn rate(config: &MigrationConfig) -> Option<u64> {
    (config.bandwidth_mbps != 0).then(|| u64::from(config.bandwidth_mbps) * 125_000)
}

/// The listener's task and what it tells.
struct Listening {
    asked: SocketAddr,
    address: SocketAddr,
    stats: Arc<dyn Fn() -> ListenerStats + Send + Sync>,
    task: AbortHandle,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// See the module.
pub struct Services {
    tls: Arc<TlsContext>,
    pace: Arc<Pace>,
    dialer: Dialer,
    auditor: Arc<Auditor>,
    audit_log: std::path::PathBuf,
    listening: Option<Listening>,
}

fn load(config: &MigrationConfig) -> Result<Credentials, EngineError> {
    let hint = "make them by `ferry pki issue`, or see [migration] of the configuration";
    let now_s = i64::try_from(unix_ms() / 1000).unwrap_or(i64::MAX);
    let credentials = Credentials::load(&config.credentials(), now_s)
        .map_err(|e| EngineError::new(format!("migration credentials: {e}"), hint))?;
    let name = config.host_name();
    if !credentials.host().eq_ignore_ascii_case(&name) {
        let message = format!("the certificate is of {}, this host is {name}", credentials.host());
        return Err(EngineError::new(message, "set migration.host, or use this host's certificate"));
    }
    Ok(credentials)
}

fn audit(config: &MigrationConfig, credentials: &Credentials) -> Result<Arc<Auditor>, EngineError> {
    let opened = Auditor::open(config, credentials);
    opened.map(Arc::new).map_err(|e| EngineError::new(e, "check migration.audit_log"))
}

fn dialer(config: &MigrationConfig, tls: &Arc<TlsContext>, pace: &Arc<Pace>) -> Result<Dialer, EngineError> {
    Dialer::new(Arc::clone(tls), limits(), Arc::clone(pace), config.bind)
        .map_err(|e| EngineError::new(e.to_string(), ""))
}

impl Services {
    /// Brings everything up.
    ///
    /// # Errors
    /// What cannot be used.
    pub fn start(config: &MigrationConfig, runtime: &Handle, hub: &Arc<Hub>) -> Result<Self, EngineError> {
        let credentials = load(config)?;
        let auditor = audit(config, &credentials)?;
        let tls = TlsContext::new(credentials).map_err(|e| EngineError::new(e.to_string(), "check the credentials"))?;
        let tls = Arc::new(tls);
        let pace = Arc::new(Pace::new(rate(config)));
        let dialer = dialer(config, &tls, &pace)?;
        let mut services = Self { tls, pace, dialer, auditor, audit_log: config.audit_log.clone(), listening: None };
        services.listen(config, runtime, hub)?;
        Ok(services)
    }

    /// Takes another configuration; on failure the former stays in force, as far as it was not the failure's.
    ///
    /// # Errors
    /// What cannot be used.
    pub fn reconfigure(
        &mut self,
        config: &MigrationConfig,
        runtime: &Handle,
        hub: &Arc<Hub>,
    ) -> Result<(), EngineError> {
        let credentials = load(config)?;
        let dialer = dialer(config, &self.tls, &self.pace)?;
        if self.audit_log == config.audit_log {
            self.auditor.change_key(&credentials).map_err(|e| EngineError::new(e, "check migration.audit_log"))?;
        } else {
            self.auditor = audit(config, &credentials)?;
            self.audit_log.clone_from(&config.audit_log);
        }
        self.tls.replace(credentials).map_err(|e| EngineError::new(e.to_string(), "check the credentials"))?;
        self.pace.set_rate(rate(config));
        self.dialer = dialer;
        self.listen(config, runtime, hub)
    }

    /// Loads certificates again.
    ///
    /// # Errors
    /// They cannot be used; the former ones stay.
    pub fn reload_credentials(&mut self, config: &MigrationConfig) -> Result<(), EngineError> {
        let credentials = load(config)?;
        if credentials.certificate() == self.tls.credentials().certificate() {
            // Trust and revocations may be others all the same.
            return self.tls.replace(credentials).map_err(|e| EngineError::new(e.to_string(), ""));
        }
        self.auditor.change_key(&credentials).map_err(|e| EngineError::new(e, "check migration.audit_log"))?;
        self.tls.replace(credentials).map_err(|e| EngineError::new(e.to_string(), ""))
    }

    fn listen(&mut self, config: &MigrationConfig, runtime: &Handle, hub: &Arc<Hub>) -> Result<(), EngineError> {
        if self.listening.as_ref().map(|l| l.asked) == config.listen {
            return Ok(());
        }
        let Some(asked) = config.listen else {
            self.listening = None;
            return Ok(());
        };
        let doorman = Arc::new(Doorman(Arc::downgrade(hub)));
        let bound =
            runtime.block_on(Listener::bind(asked, Arc::clone(&self.tls), limits(), Arc::clone(&self.pace), doorman));
        let mut listener =
            bound.map_err(|e| EngineError::new(format!("migration.listen: {e}"), "choose another address"))?;
        let address = listener.local_addr();
        let stats = listener.watch();
        let weak = Arc::downgrade(hub);
        let task = runtime.spawn(async move {
            while let Some(session) = listener.accept().await {
                let Some(hub) = weak.upgrade() else { return };
                tokio::spawn(intake::serve(hub, session));
            }
        });
        self.listening = Some(Listening { asked, address, stats, task: task.abort_handle() });
        Ok(())
    }

    /// For channels from here.
    pub fn dialer(&self) -> Dialer {
        self.dialer.clone()
    }

    /// The audit log.
    pub fn auditor(&self) -> Arc<Auditor> {
        Arc::clone(&self.auditor)
    }

    /// Days until the certificate expires.
    pub fn certificate_days_left(&self) -> i64 {
        let now_s = i64::try_from(unix_ms() / 1000).unwrap_or(i64::MAX);
        self.tls.credentials().certificate().days_left(now_s)
    }

    /// Adds what it knows.
    pub fn describe(&self, view: &mut HostView) {
        let days = self.certificate_days_left();
        view.certificate_days_left = Some(days);
        if days < 14 {
            view.problems.push(format!("the certificate expires in {days} days: ferry pki rotate"));
        }
        let audit = self.auditor.status();
        (view.audit_lines, view.audit_lost_lines) = (audit.sequence, audit.lost_lines);
        if let Some(why) = audit.failing {
            view.problems.push(format!("the audit log cannot be written: {why}"));
        }
        if let Some(listening) = &self.listening {
            view.listen = Some(listening.address.to_string());
            let stats = (listening.stats)();
            let refused = stats.refused.iter().filter(|(_, n)| *n > 0);
            view.refused = refused.map(|(why, n)| (why.name().to_owned(), *n)).collect();
        }
    }
}
