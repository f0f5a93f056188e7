//! A daemon within the test's process, on a real Unix socket, whose ports are wires in memory.
#![allow(dead_code)] // Each test file uses its part.
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ferry_control::cli::{CliError, Client};
use ferry_control::config::{self, DpdkConfig, PortConfig};
use ferry_control::daemon::Daemon;
use ferry_control::engine::{EngineError, Opened, Opener, PortHandle, PortState};
use ferry_control::events::{Event, EventSender};
use ferry_dataplane::qsbr::Domain;
use ferry_dataplane::testing::{MemKinds, Wire};
use hyper::Method;
use serde_json::Value;
use tempfile::TempDir;

/// The wires of the open ports, by port.
#[derive(Clone, Default)]
pub struct Wires(Arc<Mutex<HashMap<String, Arc<Wire>>>>);

impl Wires {
    pub fn get(&self, port: &str) -> Arc<Wire> {
        Arc::clone(self.0.lock().unwrap().get(port).unwrap_or_else(|| panic!("port {port} is not open")))
    }
    pub fn is_open(&self, port: &str) -> bool {
        self.0.lock().unwrap().contains_key(port)
    }
}

struct WireOpener {
    wires: Wires,
}

struct WireHandle {
    name: String,
    wires: Wires,
}

impl PortHandle for WireHandle {
    fn state(&self) -> PortState {
        PortState { state: "up".into(), ..PortState::default() }
    }
    fn update(&mut self, _: &PortConfig) -> Result<(), EngineError> {
        Ok(())
    }
    fn close(self: Box<Self>) {
        self.wires.0.lock().unwrap().remove(&self.name);
    }
}

impl Opener for WireOpener {
    type K = MemKinds;
    fn open(&mut self, port: &PortConfig, _: &Arc<Domain>) -> Result<Opened<MemKinds>, EngineError> {
        if port.resource().contains("refuse") {
            return Err(EngineError::new("the device refuses", "use another"));
        }
        let wire = Wire::new();
        let rx = (0..port.rx_queues()).map(|_| wire.rx()).collect();
        assert!(self.wires.0.lock().unwrap().insert(port.name.clone(), Arc::clone(&wire)).is_none());
        let handle = Box::new(WireHandle { name: port.name.clone(), wires: self.wires.clone() });
        Ok(Opened { tx: wire.tx(), rx, handle })
    }
    fn set_dpdk(&mut self, _: &DpdkConfig) -> Result<(), EngineError> {
        Ok(())
    }
    fn dpdk_started(&self) -> bool {
        false
    }
}

pub struct TestDaemon {
    runtime: Option<tokio::runtime::Runtime>,
    daemon: Option<Daemon>,
    events: EventSender,
    pub wires: Wires,
    pub dir: TempDir,
    pub client: Client,
}

impl TestDaemon {
    /// Starts with `text` as configuration file; `DIR` in it stands for a directory of the test's own.
    pub fn start(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ferry.toml");
        let wires = Wires::default();
        let (sender, receiver) = std::sync::mpsc::channel();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let opener_wires = wires.clone();
        write_config(&file, dir.path(), text);
        let config = config::load(&file).unwrap_or_else(|e| panic!("{e}"));
        let make = move |events: EventSender| {
            sender.send(events).unwrap();
            WireOpener { wires: opener_wires }
        };
        let daemon = runtime.block_on(Daemon::start(config, Some(file), make, Box::new(|_| Ok(())))).unwrap();
        let client = Client::new(&dir.path().join("api.sock")).unwrap();
        let events = receiver.recv().unwrap();
        Self { runtime: Some(runtime), daemon: Some(daemon), events, wires, dir, client }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// Replaces the configuration file.
    pub fn write(&self, text: &str) {
        write_config(&self.dir.path().join("ferry.toml"), self.dir.path(), text);
    }

    pub fn metrics_address(&self) -> std::net::SocketAddr {
        self.daemon.as_ref().unwrap().metrics_address().unwrap()
    }

    pub fn event(&self, port: &str, event: Event) {
        self.events.send(&port.into(), event);
    }

    pub fn get(&self, path: &str) -> Value {
        self.client.get(path).unwrap_or_else(|e| panic!("GET {path}: {e}"))
    }

    pub fn send(&self, method: &str, path: &str, body: Value) -> Result<Value, CliError> {
        self.client.send(Method::from_bytes(method.as_bytes()).unwrap(), path, Some(&body))
    }

    pub fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        self.send(method, path, body).unwrap_or_else(|e| panic!("{method} {path}: {e}"))
    }

    /// `(status, code, message, hint)` of a refusal.
    pub fn refused(&self, method: &str, path: &str, body: Value) -> (u16, String, String, String) {
        match self.send(method, path, body) {
            Err(CliError::Refused { status, detail }) => (status, detail.code, detail.message, detail.hint),
            other => panic!("{method} {path}: {other:?}"),
        }
    }

    pub fn stop(&mut self) {
        if let (Some(runtime), Some(daemon)) = (self.runtime.take(), self.daemon.take()) {
            runtime.block_on(daemon.stop());
        }
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        self.stop();
    }
}

pub fn write_config(file: &Path, dir: &Path, text: &str) {
    let text = format!("api.socket = \"DIR/api.sock\"\n{text}").replace("DIR", dir.to_str().unwrap());
    std::fs::write(file, text).unwrap();
}

/// Waits until `what` holds, for at most ten seconds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
