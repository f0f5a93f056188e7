//! What migrations need of the switch. Independent of the daemon's lock, which a change of configuration may hold while it waits for
//! a port whose frontend waits for a migration.
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use ferry_dataplane::bridge::fdb::PortId;
use ferry_dataplane::clock::Clock;
use ferry_dataplane::divert::Divert;
use ferry_dataplane::enforce::{VmFirewall, VmId};
use ferry_dataplane::firewall::spoof::SpoofTable;
use ferry_dataplane::pmd::Kinds;
use ferry_dataplane::switch::{Switch, SwitchError};

/// A port of a VM.
#[derive(Clone)]
pub struct VmPort {
    /// Its name.
    pub name: String,
    /// Its number within the VM: part of its connections' zones.
    pub index: u8,
    /// Addresses that the VM may use there.
    pub spoof: Arc<SpoofTable>,
}

/// The switch as migrations see it. Calls may block for a grace period.
pub trait VmSwitch: Send + Sync {
    /// The clock by which connections expire, milliseconds.
    fn now_ms(&self) -> u64;
    /// A VM's firewall.
    fn vm(&self, vm: &str) -> Option<Arc<VmFirewall>>;
    /// An empty firewall with the VM's settings, that no packet sees.
    fn stage(&self, vm: &str) -> Result<Arc<VmFirewall>, SwitchError>;
    /// Puts it in the place of the VM's.
    fn activate(&self, vm: &str, staged: Arc<VmFirewall>) -> Result<(), SwitchError>;
    /// Waits until every PMD thread has seen what was changed before.
    fn synchronize(&self);
    /// A VM's ports, by number.
    fn ports(&self, vm: &str) -> Vec<VmPort>;
    /// Has a port's frames taken by `divert`, or no longer.
    fn set_divert(&self, port: &str, divert: Option<Arc<Divert>>) -> Result<(), SwitchError>;
    /// Sends a frame to a port's guest.
    fn deliver(&self, port: &str, frame: Vec<u8>) -> Result<(), SwitchError>;
    /// Sends a frame of the switch's own as if it had come in from the port.
    fn inject(&self, port: &str, frame: &[u8]) -> Result<(), SwitchError>;
}

/// Numbers of what the configuration names.
#[derive(Debug, Default)]
pub struct Names {
    /// VMs.
    pub vms: BTreeMap<String, VmId>,
    /// Ports, with their VM.
    pub ports: BTreeMap<String, (PortId, Option<String>)>,
}

/// Names shared by the engine, which writes them, and migrations.
pub type SharedNames = Arc<RwLock<Names>>;

/// See [`VmSwitch`].
pub struct NamedSwitch<K: Kinds> {
    switch: Arc<Switch<K>>,
    clock: Clock,
    names: SharedNames,
}

impl<K: Kinds> NamedSwitch<K> {
    /// `clock` is the switch's.
    pub fn new(switch: Arc<Switch<K>>, clock: Clock, names: SharedNames) -> Self {
        Self { switch, clock, names }
    }

    fn vm_id(&self, vm: &str) -> Option<VmId> {
        self.names.read().unwrap_or_else(PoisonError::into_inner).vms.get(vm).copied()
    }

    /// A port that has gone meanwhile is one that never was.
    fn port_id(&self, port: &str) -> PortId {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        names.ports.get(port).map_or(PortId::MAX, |(id, _)| *id)
    }
}

impl<K: Kinds> VmSwitch for NamedSwitch<K> {
    fn now_ms(&self) -> u64 {
        self.clock.now_ns() / 1_000_000
    }

    fn vm(&self, vm: &str) -> Option<Arc<VmFirewall>> {
        self.switch.vm(self.vm_id(vm)?)
    }

    fn stage(&self, vm: &str) -> Result<Arc<VmFirewall>, SwitchError> {
        self.switch.stage_vm(self.vm_id(vm).unwrap_or(VmId::MAX))
    }

    fn activate(&self, vm: &str, staged: Arc<VmFirewall>) -> Result<(), SwitchError> {
        self.switch.activate_vm(self.vm_id(vm).unwrap_or(VmId::MAX), staged)
    }

    fn synchronize(&self) {
        self.switch.synchronize();
    }

    fn ports(&self, vm: &str) -> Vec<VmPort> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let ids: Vec<(String, PortId)> = names
            .ports
            .iter()
            .filter(|(_, (_, of))| of.as_deref() == Some(vm))
            .map(|(name, (id, _))| (name.clone(), *id))
            .collect();
        drop(names);
        let mut ports: Vec<VmPort> = ids
            .into_iter()
            .filter_map(|(name, id)| {
                let firewall = self.switch.port_firewall(id)?;
                Some(VmPort { name, index: firewall.index, spoof: Arc::clone(&firewall.rules.spoof) })
            })
            .collect();
        ports.sort_by_key(|p| p.index);
        ports
    }

    fn set_divert(&self, port: &str, divert: Option<Arc<Divert>>) -> Result<(), SwitchError> {
        self.switch.set_divert(self.port_id(port), divert)
    }

    fn deliver(&self, port: &str, frame: Vec<u8>) -> Result<(), SwitchError> {
        self.switch.deliver(self.port_id(port), frame)
    }

    fn inject(&self, port: &str, frame: &[u8]) -> Result<(), SwitchError> {
        self.switch.inject(self.port_id(port), frame)
    }
}
