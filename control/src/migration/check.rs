//! `ferry migrate check`: what a migration would meet, on both hosts, before it begins.
use std::sync::Arc;

use ferry_migrate::authz::Role;
use ferry_migrate::message::Finding;
use tokio::runtime::Handle;

use super::actor::Place;
use super::dial::{self, DialError};
use super::guest::Guest;
use super::source_side::{abilities, offer};
use super::switch::VmSwitch;
use super::view::{CheckItem, CheckView};
use super::{Hub, Migration, lock};

/// Certificates that expire sooner are worth a warning, days.
const SOON_DAYS: i64 = 14;

/// Why nothing could be checked.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// There is no such VM.
    #[error("there is no VM {0}")]
    NoVm(String),
    /// Migration is switched off.
    #[error("migration is not switched on at this host")]
    Off,
}

struct Items(Vec<CheckItem>);

impl Items {
    fn add(&mut self, what: &str, verdict: &str, found: impl Into<String>, fix: impl Into<String>) {
        let (found, fix) = (found.into(), fix.into());
        self.0.push(CheckItem { what: what.to_owned(), verdict: verdict.to_owned(), found, fix });
    }

    fn judge(&mut self, what: &str, good: bool, found: impl Into<String>, fix: &str) -> bool {
        self.add(what, if good { "ok" } else { "failed" }, found, if good { "" } else { fix });
        good
    }
}

impl Migration {
    /// Checks what a migration of `vm` to the host `to` would meet. Nothing is changed by it.
    ///
    /// # Errors
    /// There is nothing to check.
    pub async fn check(&self, vm: &str, to: &str) -> Result<CheckView, CheckError> {
        let hub = &self.0;
        let settings = hub.settings();
        if !settings.config.enabled {
            return Err(CheckError::Off);
        }
        let (Some(known), Some(guest), Some(switch)) = (settings.vms.get(vm), hub.guest(vm), hub.switch()) else {
            return Err(CheckError::NoVm(vm.to_owned()));
        };
        let mut items = Items(Vec::new());
        for (name, port) in &known.ports {
            let fix = "set features.migration = true of the port, and restart the VM";
            items.judge(&format!("dirty log of {name}"), port.can_log, feature(port.can_log), fix);
        }
        let runs = guest.runs();
        let found = if runs { "runs here" } else { "does not run here" };
        items.judge("VM here", runs, found, "start it here, or check from the host where it runs");
        let days = lock(&hub.services).as_ref().map_or(0, |s| s.certificate_days_left());
        let verdict = if days < 0 {
            "failed"
        } else if days < SOON_DAYS {
            "warning"
        } else {
            "ok"
        };
        let fix = if days < SOON_DAYS { "ferry pki rotate" } else { "" };
        items.add("certificate of this host", verdict, format!("expires in {days} days"), fix);
        match hub.audit_problem() {
            Some(why) => items.add("audit log here", "failed", why, "make room, or correct migration.audit_log"),
            None => items.add("audit log here", "ok", "can be written", ""),
        }
        let decision = settings.authorization.decide(vm, to, Role::Send);
        let fix = "add a [[migration.rule]] with roles = [\"send\"]";
        items.judge("authorization here", decision.allowed, &decision.reason, fix);
        match settings.config.peer(to) {
            None => {
                items.judge("peer", false, format!("{to} is not configured"), "add it as [[migration.peer]]");
            }
            Some(peer) => {
                let context = Context { hub, switch: switch.as_ref(), guest: &guest };
                let checked = context.ask(vm, peer).await;
                report(&mut items, to, checked);
            }
        }
        let ok = items.0.iter().all(|i| i.verdict != "failed");
        Ok(CheckView { vm: vm.to_owned(), to: to.to_owned(), ok, items: items.0 })
    }
}

fn feature(on: bool) -> &'static str {
    if on { "offered to QEMU" } else { "not offered: QEMU refuses to migrate the VM" }
}

struct Context<'a> {
    hub: &'a Arc<Hub>,
    switch: &'a dyn VmSwitch,
    guest: &'a Arc<Guest>,
}

impl Context<'_> {
    async fn ask(&self, vm: &str, peer: &crate::config::PeerConfig) -> Result<dial::Checked, DialError> {
        let dialer = self.hub.dialer()?;
        let host = self.hub.settings().host.clone();
        let offer = {
            let runtime = Handle::current();
            let place = Place { hub: self.hub, vm, guest: self.guest, runtime: &runtime, switch: self.switch };
            offer(&place)
        };
        dial::check(&dialer, abilities(self.hub), host, peer, offer).await
    }
}

fn report(items: &mut Items, to: &str, checked: Result<dial::Checked, DialError>) {
    match checked {
        Ok(checked) => {
            items.add("channel", "ok", format!("{to} answers; protocol version {}", checked.version), "");
            for Finding { refusal, what, found, fix } in &checked.findings {
                let verdict = match (refusal, fix.as_str()) {
                    (Some(_), _) => "failed",
                    (None, "") => "ok",
                    (None, _) => "warning",
                };
                items.add(what.as_str(), verdict, found.as_str(), fix.as_str());
            }
        }
        Err(error) => {
            let fix = match &error {
                DialError::Channel { error: ferry_migrate::channel::ChannelError::Connect { .. }, .. } => {
                    "is ferryd running there with migration.listen, and is the way open?"
                }
                DialError::Channel { .. } => "compare the certificates and rules of both hosts: ferry pki show",
                DialError::Mismatch { .. } => "bring both hosts to versions that overlap",
                _ => "see the destination's log",
            };
            items.add("channel", "failed", error.to_string(), fix);
        }
    }
}
