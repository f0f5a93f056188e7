//! The daemon as a whole: brings up the switch, the API and the metrics, and takes them down in order.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::api::{self, ApiSocket, AppState};
use crate::config::Config;
use crate::core::{ChangeError, Core, Outcome, SetLogLevel, SharedCore};
use crate::engine::{Engine, Opener, SwitchEngine};
use crate::events::{self, EventSender};
use crate::firewall::observer;
use crate::metrics;
use crate::migration::Migration;

/// How long API and metrics get to finish what they are doing.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// A running daemon.
pub struct Daemon {
    core: SharedCore,
    socket: ApiSocket,
    metrics: Option<SocketAddr>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Daemon {
    /// Brings everything up. The API's socket comes first: it is the lock that keeps a second daemon from touching ports.
    ///
    /// # Errors
    /// Another daemon runs, or something could not be set up; nothing is left behind.
    pub async fn start<O, F>(
        config: Config,
        file: Option<PathBuf>,
        opener: F,
        set_log_level: SetLogLevel,
    ) -> anyhow::Result<Self>
    where
        O: Opener + 'static,
        F: FnOnce(EventSender) -> O + Send + 'static,
    {
        let socket = ApiSocket::bind(&config.api)?;
        let metrics = match config.metrics.enabled {
            true => {
                let listen = config.metrics.listen;
                Some(
                    metrics::bind(listen)
                        .await
                        .with_context(|| format!("metrics.listen: cannot listen on {listen}"))?,
                )
            }
            false => None,
        };
        let migration = Migration::new();
        let (sender, queue) = events::channel(migration.clone());
        let started = migration.clone();
        let core = tokio::task::spawn_blocking(move || {
            let engine: Box<dyn Engine> = Box::new(SwitchEngine::new(opener(sender)));
            Core::start(engine, config, file, set_log_level, started).map(SharedCore::new)
        })
        .await?
        .map_err(|e| {
            let hint = e.hint();
            if hint.is_empty() { anyhow::anyhow!("{e}") } else { anyhow::anyhow!("{e}\n  fix: {hint}") }
        })?;
        let weak = core.downgrade();
        std::thread::Builder::new().name("ferry-events".into()).spawn(move || events::run(queue, weak))?;
        let weak = core.downgrade();
        std::thread::Builder::new().name("ferry-firewall".into()).spawn(move || observer::run(&weak))?;

        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let metrics_address = metrics.as_ref().and_then(|l| l.local_addr().ok());
        if let Some(listener) = metrics {
            tasks.spawn(metrics::serve(listener, core.clone(), stopped.clone()));
        }
        let listener = UnixListener::from_std(socket.listener()?)?;
        tasks.spawn(api::serve(listener, api::router(AppState { core: core.clone(), migration }), stopped));
        Ok(Self { core, socket, metrics: metrics_address, stop, tasks })
    }

    /// The daemon's state.
    pub fn core(&self) -> &SharedCore {
        &self.core
    }

    /// Where metrics are served.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// One line for logs and the service manager.
    pub fn summary(&self) -> String {
        let core = self.core.lock();
        let (config, state) = (core.config(), core.state());
        format!(
            "{} bridge(s), {} port(s), {} PMD thread(s), API on {}",
            config.bridge.len(),
            config.port.len(),
            state.pmds.len(),
            self.socket.path().display()
        )
    }

    /// Reads the configuration file again.
    ///
    /// # Errors
    /// See [`Core::reload`].
    pub async fn reload(&self) -> Result<Outcome, ChangeError> {
        let core = self.core.clone();
        let done = tokio::task::spawn_blocking(move || core.lock().reload(false, false)).await;
        done.unwrap_or_else(|e| {
            Err(ChangeError::Conflict {
                message: format!("the reload broke off: {e}"),
                hint: "see ferryd's log".into(),
            })
        })
    }

    /// Stops in order: no more requests, then ports closed and their sockets removed, then threads, then the API's socket.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_TIMEOUT, ended).await.is_err() {
            tracing::warn!("some requests did not end in time");
            self.tasks.shutdown().await;
        }
        let core = self.core.clone();
        if let Err(e) = tokio::task::spawn_blocking(move || core.lock().shutdown()).await {
            tracing::error!("the switch did not stop in order: {e}");
        }
        drop(self.socket);
    }
}
