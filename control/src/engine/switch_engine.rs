//! The engine over the dataplane's switch: names become numbers, settings become options, ports are opened and closed.
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLockWriteGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use ferry_dataplane::bridge::BridgeId;
use ferry_dataplane::bridge::fdb::PortId;
use ferry_dataplane::clock::Clock;
use ferry_dataplane::enforce::{VmFirewall, VmId, VmOptions};
use ferry_dataplane::firewall::{Direction, PolicyDocument};
use ferry_dataplane::pmd::{IdleTuning, Kinds, PmdId};
use ferry_dataplane::qsbr::Domain;
use ferry_dataplane::switch::trace::TraceFrom;
use ferry_dataplane::switch::{self, BridgeOptions, FirewallOptions, PmdOptions, PortOptions, Switch, SwitchError};

use super::sleeper::PollSleeper;
use super::{
    Engine, EngineError, FdbEntry, FirewallStats, Page, PmdStats, PortState, PortStats, RxStats, StageCycles, Stats,
    Trace, TxStats, VmStats, firewall_view,
};
use crate::config::{BridgeConfig, DpdkConfig, PmdSpec, PortConfig, VmSpec};
use crate::firewall::filter::Filter;
use crate::firewall::packet_text::Described;
use crate::firewall::record::FirewallRecord;
use crate::migration::switch::{NamedSwitch, Names, SharedNames, VmSwitch};
use crate::threads;

/// A port that is open: what keeps it so.
pub trait PortHandle: Send {
    /// How it is doing.
    fn state(&self) -> PortState;
    /// Takes settings that the port keeps itself and can change without a restart.
    fn update(&mut self, port: &PortConfig) -> Result<(), EngineError>;
    /// Closes it for good. The switch has let go of its queues.
    fn close(self: Box<Self>);
}

/// What opening a port yields.
pub struct Opened<K: Kinds> {
    /// Transmit side.
    pub tx: K::Tx,
    /// Receive queues, in order.
    pub rx: Vec<K::Rx>,
    /// The rest.
    pub handle: Box<dyn PortHandle>,
}

/// Opens ports of all types.
pub trait Opener: Send {
    /// The kinds of queue it makes.
    type K: Kinds;
    /// Opens a port for a switch of `domain`.
    fn open(&mut self, port: &PortConfig, domain: &Arc<Domain>) -> Result<Opened<Self::K>, EngineError>;
    /// Sets what DPDK will be started with.
    fn set_dpdk(&mut self, dpdk: &DpdkConfig) -> Result<(), EngineError>;
    /// True once DPDK runs.
    fn dpdk_started(&self) -> bool;
}

struct Port {
    id: PortId,
    bridge: String,
    /// The VM of its firewall.
    vm: Option<String>,
    handle: Box<dyn PortHandle>,
}

struct Pmd {
    id: PmdId,
    spec: PmdSpec,
    idle: Arc<IdleTuning>,
}

/// See [`Engine`].
pub struct SwitchEngine<O: Opener> {
    opener: O,
    switch: Arc<Switch<O::K>>,
    ports: BTreeMap<String, Port>,
    bridges: BTreeMap<String, BridgeId>,
    vms: BTreeMap<String, VmId>,
    /// What of these migrations need, without the daemon's lock.
    names: SharedNames,
    clock: Clock,
    /// Reports of the firewall that were lost, as last heard.
    lost_events: u64,
    /// By position in the configuration.
    pmds: Vec<Pmd>,
    /// Makes names of successive threads differ while one replaces the other.
    pmds_started: usize,
}

impl<O: Opener> SwitchEngine<O> {
    /// An engine over a new, empty switch.
    pub fn new(opener: O) -> Self {
        let clock = Clock::default();
        Self {
            opener,
            switch: Switch::new(Domain::new(), clock.clone()),
            ports: BTreeMap::new(),
            bridges: BTreeMap::new(),
            vms: BTreeMap::new(),
            names: SharedNames::default(),
            clock,
            lost_events: 0,
            pmds: Vec::new(),
            pmds_started: 0,
        }
    }

    fn start_pmd(&mut self, index: usize, spec: &PmdSpec) -> Result<Pmd, EngineError> {
        if let Some(core) = spec.core {
            threads::check_core(core).map_err(|m| EngineError::new(m, "change switch.pmd.core"))?;
        }
        let sleeper = PollSleeper::new()
            .map_err(|e| EngineError::new(format!("no eventfd for a PMD thread: {e}"), "raise LimitNOFILE"))?;
        let idle = Arc::new(IdleTuning::new(spec.idle_spin_us, spec.idle_latency_us));
        let core = spec.core;
        self.pmds_started += 1;
        let name = match core {
            Some(core) => format!("pmd{index}-c{core}-{}", self.pmds_started),
            None => format!("pmd{index}-{}", self.pmds_started),
        };
        let id = self
            .switch
            .add_pmd(PmdOptions {
                name,
                idle: Arc::clone(&idle),
                sleeper: Box::new(sleeper),
                on_start: Box::new(move || threads::enter_pmd(index, core)),
            })
            .map_err(plain)?;
        Ok(Pmd { id, spec: *spec, idle })
    }

    fn names(&self) -> RwLockWriteGuard<'_, Names> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn pmd(&self, index: usize) -> Result<&Pmd, EngineError> {
        self.pmds.get(index).ok_or_else(|| EngineError::new(format!("there is no PMD thread {index}"), ""))
    }

    fn port(&self, name: &str) -> Result<&Port, EngineError> {
        self.ports.get(name).ok_or_else(|| EngineError::new(format!("there is no port {name}"), ""))
    }

    fn bridge(&self, name: &str) -> Result<BridgeId, EngineError> {
        self.bridges.get(name).copied().ok_or_else(|| EngineError::new(format!("there is no bridge {name}"), ""))
    }

    fn vm(&self, name: &str) -> Result<VmId, EngineError> {
        self.vms.get(name).copied().ok_or_else(|| EngineError::new(format!("there is no VM {name}"), ""))
    }

    fn vm_firewall(&self, name: &str) -> Result<Arc<VmFirewall>, EngineError> {
        let found = self.switch.vm(self.vm(name)?);
        found.ok_or_else(|| EngineError::new(format!("there is no VM {name}"), ""))
    }

    /// Names of a VM's ports by their numbers within it, which are part of its connections' zones.
    fn port_numbers(&self, vm: &str) -> BTreeMap<u8, String> {
        let ports = self.ports.iter().filter(|(_, p)| p.vm.as_deref() == Some(vm));
        ports.filter_map(|(name, p)| Some((self.switch.port_firewall(p.id)?.index, name.clone()))).collect()
    }

    fn now_ms(&self) -> u64 {
        self.clock.now_ns() / 1_000_000
    }

    fn options(&self, port: &PortConfig) -> Result<PortOptions, EngineError> {
        let firewall = match (&port.firewall, port.vm_name()) {
            (Some(f), Some(vm)) => Some(FirewallOptions { vm: self.vm(vm)?, policy: f.policy() }),
            _ => None,
        };
        Ok(PortOptions {
            firewall,
            name: port.name.clone(),
            bridge: Some(self.bridge(&port.bridge)?),
            vlan: port.vlan.mode(),
            admin_up: port.admin_up,
            fdb_limit: port.fdb_limit,
            mtu: port.mtu,
        })
    }

    fn port_name(&self, id: PortId) -> String {
        let found = self.ports.iter().find(|(_, p)| p.id == id).map(|(name, _)| name.clone());
        found.unwrap_or_else(|| format!("#{id}"))
    }
}

fn vm_options(vm: &VmSpec) -> VmOptions {
    VmOptions {
        name: vm.name.clone(),
        capacity: vm.connections,
        track: vm.tracking,
        limits: vm.limits,
        log_new: vm.log_new,
    }
}

fn plain(e: SwitchError) -> EngineError {
    EngineError::new(e.to_string(), "")
}

fn mac_text(mac: u64) -> String {
    let [_, _, bytes @ ..] = mac.to_be_bytes();
    bytes.map(|b| format!("{b:02x}")).join(":")
}

fn bridge_options(b: &BridgeConfig) -> BridgeOptions {
    BridgeOptions { fdb_capacity: b.fdb_capacity, fdb_ageing_s: b.fdb_ageing_s }
}

fn rx_stats(queue: u32, pmd: Option<usize>, s: &switch::RxStats) -> RxStats {
    RxStats {
        queue,
        pmd,
        frames: s.frames,
        bytes: s.bytes,
        forwarded: s.forwarded,
        held: s.held,
        dropped: s.drops.iter().map(|(r, n)| ((*r).to_owned(), *n)).collect(),
    }
}

impl<O: Opener> Engine for SwitchEngine<O> {
    fn set_dpdk(&mut self, dpdk: &DpdkConfig) -> Result<(), EngineError> {
        self.opener.set_dpdk(dpdk)
    }

    fn dpdk_started(&self) -> bool {
        self.opener.dpdk_started()
    }

    fn add_pmd(&mut self, index: usize, spec: &PmdSpec) -> Result<(), EngineError> {
        let pmd = self.start_pmd(index, spec)?;
        self.pmds.push(pmd);
        Ok(())
    }

    fn update_pmd(&mut self, index: usize, spec: &PmdSpec) -> Result<(), EngineError> {
        let old = self.pmd(index)?;
        if old.spec.core == spec.core {
            old.idle.set(spec.idle_spin_us, spec.idle_latency_us);
            if let Some(pmd) = self.pmds.get_mut(index) {
                pmd.spec = *spec;
            }
            return Ok(());
        }
        let former = old.id;
        let new = self.start_pmd(index, spec)?;
        let queues = self.switch.rxq_assignments();
        for q in queues.iter().filter(|q| q.pmd == Some(former)) {
            self.switch.assign_rxq(q.port, q.queue, new.id).map_err(plain)?;
        }
        self.switch.remove_pmd(former).map_err(plain)?;
        if let Some(slot) = self.pmds.get_mut(index) {
            *slot = new;
        }
        Ok(())
    }

    fn remove_pmd(&mut self, index: usize) -> Result<(), EngineError> {
        let id = self.pmd(index)?.id;
        self.switch.remove_pmd(id).map_err(plain)?;
        self.pmds.remove(index);
        Ok(())
    }

    fn add_bridge(&mut self, bridge: &BridgeConfig) -> Result<(), EngineError> {
        let id = self.switch.add_bridge(&bridge.name, bridge_options(bridge)).map_err(plain)?;
        self.bridges.insert(bridge.name.clone(), id);
        Ok(())
    }

    fn update_bridge(&mut self, bridge: &BridgeConfig) -> Result<(), EngineError> {
        self.switch.update_bridge(self.bridge(&bridge.name)?, bridge_options(bridge)).map_err(plain)
    }

    fn remove_bridge(&mut self, name: &str) -> Result<(), EngineError> {
        self.switch.remove_bridge(self.bridge(name)?).map_err(plain)?;
        self.bridges.remove(name);
        Ok(())
    }

    fn add_vm(&mut self, vm: &VmSpec) -> Result<(), EngineError> {
        let id = self.switch.add_vm(vm_options(vm)).map_err(plain)?;
        self.vms.insert(vm.name.clone(), id);
        self.names().vms.insert(vm.name.clone(), id);
        Ok(())
    }

    fn update_vm(&mut self, vm: &VmSpec) -> Result<(), EngineError> {
        self.switch.update_vm(self.vm(&vm.name)?, vm_options(vm)).map_err(plain)
    }

    fn remove_vm(&mut self, name: &str) -> Result<(), EngineError> {
        self.switch.remove_vm(self.vm(name)?).map_err(plain)?;
        self.vms.remove(name);
        self.names().vms.remove(name);
        Ok(())
    }

    fn set_policy(&mut self, policy: &PolicyDocument) -> Result<(), EngineError> {
        self.switch.set_policy(policy.clone()).map_err(plain)
    }

    fn connections(&self, vm: &str, filter: &Filter, cursor: u64, limit: usize) -> Result<Page, EngineError> {
        let firewall = self.vm_firewall(vm)?;
        Ok(firewall_view::page(&firewall, filter, cursor, limit, &self.port_numbers(vm), self.now_ms()))
    }

    fn flush_connections(&mut self, vm: &str, filter: &Filter) -> Result<u64, EngineError> {
        Ok(self.vm_firewall(vm)?.flush(&|c| filter.matches(c)))
    }

    fn vm_stats(&self, vm: &str) -> Result<VmStats, EngineError> {
        let gone = || EngineError::new(format!("there is no VM {vm}"), "");
        let status = self.switch.vm_status(self.vm(vm)?).ok_or_else(gone)?;
        let ports = self.ports.values().filter(|p| p.vm.as_deref() == Some(vm));
        // Of this VM's ports alone: adding up the counters of all would cost too much for each VM.
        let stats: Vec<_> = ports.filter_map(|p| Some(self.switch.port_firewall(p.id)?.stats())).collect();
        Ok(firewall_view::vm_stats(&status, &stats))
    }

    fn firewall_stats(&self) -> BTreeMap<String, FirewallStats> {
        let stats = self.switch.firewall_stats();
        stats.iter().map(|(id, s)| (self.port_name(*id), firewall_view::port_stats(s))).collect()
    }

    fn take_firewall_events(&mut self, out: &mut Vec<FirewallRecord>) -> u64 {
        let mut events = Vec::new();
        let lost = self.switch.take_firewall_events(&mut events);
        let now_ns = self.clock.now_ns();
        let now_unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        for e in &events {
            let Some((port, record)) = self.ports.iter().find(|(_, p)| p.id == e.port) else { continue };
            let Some(vm) = &record.vm else { continue };
            let rule = self.switch.event_rule(e).map(|r| r.to_string());
            let ago_ms = now_ns.saturating_sub(e.time_ns) / 1_000_000;
            out.push(firewall_view::record(e, now_unix_ms.saturating_sub(ago_ms), vm, port, rule));
        }
        lost.saturating_sub(std::mem::replace(&mut self.lost_events, lost))
    }

    fn housekeeper(&self) -> Box<dyn Fn() + Send> {
        let switch = Arc::downgrade(&self.switch);
        Box::new(move || {
            if let Some(switch) = switch.upgrade() {
                switch.tend_tables();
            }
        })
    }

    fn provider(&self) -> Box<dyn Fn() -> bool + Send> {
        let switch = Arc::downgrade(&self.switch);
        Box::new(move || switch.upgrade().is_some_and(|switch| switch.provide_tables()))
    }

    fn trace(&self, port: &str, packet: &Described) -> Result<Trace, EngineError> {
        let id = self.port(port)?.id;
        let from = match packet.direction {
            Direction::Egress => TraceFrom::Port(id),
            Direction::Ingress => TraceFrom::Towards(id),
        };
        let trace = self.switch.trace(from, &packet.frame).map_err(plain)?;
        // Plain data: writing it as a value cannot fail.
        let report = serde_json::to_value(&trace).unwrap_or_default();
        Ok(Trace { report, text: trace.to_string() })
    }

    fn add_port(&mut self, port: &PortConfig, placed: &[usize]) -> Result<(), EngineError> {
        let options = self.options(port)?;
        let affinity = placed.iter().map(|i| Ok(self.pmd(*i)?.id)).collect::<Result<Vec<_>, EngineError>>()?;
        let opened = self
            .opener
            .open(port, self.switch.domain())
            .map_err(|e| EngineError { message: format!("port {}: {}", port.name, e.message), ..e })?;
        match self.switch.add_port(options, opened.tx, opened.rx, &affinity) {
            Ok(id) => {
                let vm = port.vm_name().map(str::to_owned);
                self.names().ports.insert(port.name.clone(), (id, vm.clone()));
                let record = Port { id, bridge: port.bridge.clone(), vm, handle: opened.handle };
                self.ports.insert(port.name.clone(), record);
                Ok(())
            }
            Err(e) => {
                opened.handle.close();
                Err(plain(e))
            }
        }
    }

    fn update_port(&mut self, port: &PortConfig) -> Result<(), EngineError> {
        let options = self.options(port)?;
        let record = self
            .ports
            .get_mut(&port.name)
            .ok_or_else(|| EngineError::new(format!("there is no port {}", port.name), ""))?;
        // What may fail first: the port's own part; the switch refuses only what was checked.
        record.handle.update(port)?;
        self.switch.update_port(record.id, options).map_err(plain)?;
        record.bridge.clone_from(&port.bridge);
        record.vm = port.vm_name().map(str::to_owned);
        let named = (record.id, record.vm.clone());
        self.names().ports.insert(port.name.clone(), named);
        Ok(())
    }

    fn remove_port(&mut self, name: &str) -> Result<(), EngineError> {
        self.switch.remove_port(self.port(name)?.id).map_err(plain)?;
        self.names().ports.remove(name);
        if let Some(port) = self.ports.remove(name) {
            port.handle.close();
        }
        Ok(())
    }

    fn assign(&mut self, port: &str, queue: u32, pmd: usize) -> Result<(), EngineError> {
        let queue = u16::try_from(queue).map_err(|_| EngineError::new(format!("there is no queue {queue}"), ""))?;
        self.switch.assign_rxq(self.port(port)?.id, queue, self.pmd(pmd)?.id).map_err(plain)
    }

    fn inject(&mut self, ingress: &str, frame: &[u8]) -> Result<(), EngineError> {
        self.switch.inject(self.port(ingress)?.id, frame).map_err(plain)
    }

    fn fdb(&self, bridge: &str) -> Result<Vec<FdbEntry>, EngineError> {
        let entries = self.switch.fdb(self.bridge(bridge)?).map_err(plain)?;
        let entry = |e: ferry_dataplane::bridge::fdb::FdbEntry| FdbEntry {
            vlan: e.vlan,
            mac: mac_text(e.mac.as_u64()),
            port: self.port_name(e.port),
            age_s: u64::from(e.age_s),
        };
        let mut out: Vec<FdbEntry> = entries.into_iter().map(entry).collect();
        out.sort_by(|a, b| (a.vlan, &a.mac).cmp(&(b.vlan, &b.mac)));
        Ok(out)
    }

    fn fdb_flush(&mut self, bridge: &str, port: Option<&str>) -> Result<usize, EngineError> {
        let port = port.map(|p| Ok::<_, EngineError>(self.port(p)?.id)).transpose()?;
        self.switch.fdb_flush(self.bridge(bridge)?, port).map(|n| n as usize).map_err(plain)
    }

    fn vm_switch(&self) -> Option<Arc<dyn VmSwitch>> {
        let switch = NamedSwitch::new(Arc::clone(&self.switch), self.clock.clone(), Arc::clone(&self.names));
        Some(Arc::new(switch))
    }

    fn port_state(&self, name: &str) -> Result<PortState, EngineError> {
        Ok(self.port(name)?.handle.state())
    }

    fn stats(&self) -> Stats {
        let s = self.switch.stats();
        let position = |id: PmdId| self.pmds.iter().position(|p| p.id == id);
        let assignments = self.switch.rxq_assignments();
        let pmd_of = |port: PortId, queue: usize| {
            let at = assignments.iter().find(|a| a.port == port && usize::from(a.queue) == queue);
            at.and_then(|a| a.pmd).and_then(position)
        };
        let port = |p: &switch::PortStats| PortStats {
            port: p.name.clone(),
            bridge: self.ports.get(&p.name).map(|r| r.bridge.clone()).unwrap_or_default(),
            rx: p.rx_queues.iter().enumerate().map(|(q, rx)| rx_stats(q as u32, pmd_of(p.id, q), rx)).collect(),
            tx: TxStats {
                frames: p.tx.frames,
                bytes: p.tx.bytes,
                refused: p.tx.refusals.iter().map(|(r, n)| ((*r).to_owned(), *n)).collect(),
            },
            fdb_entries: p.fdb_entries,
        };
        let pmd = |r: &switch::PmdReport| {
            let index = position(r.id)?;
            Some(PmdStats {
                pmd: index,
                core: self.pmds.get(index)?.spec.core,
                busy_cycles: r.stats.busy_cycles,
                idle_cycles: r.stats.idle_cycles,
                iterations: r.stats.iterations,
                frames: r.stats.frames,
                bursts: r.stats.bursts,
                flow_cache_hits: r.stats.flow_cache_hits,
                flow_cache_misses: r.stats.flow_cache_misses,
                stages: StageCycles {
                    frames: r.stats.stages.frames,
                    receive: r.stats.stages.receive,
                    route: r.stats.stages.route,
                    send: r.stats.stages.send,
                    release: r.stats.stages.release,
                    housekeeping: r.stats.stages.housekeeping,
                },
                sleeps: r.stats.sleeps,
                sleep_ns: r.stats.sleep_ns,
                queues: r.queues.iter().map(|q| format!("{}/{}", self.port_name(q.port), q.queue)).collect(),
            })
        };
        let mut ports: Vec<PortStats> = s.ports.iter().map(port).collect();
        ports.sort_by(|a, b| a.port.cmp(&b.port));
        let mut pmds: Vec<PmdStats> = s.pmds.iter().filter_map(pmd).collect();
        pmds.sort_by_key(|p| p.pmd);
        Stats { ports, originated: rx_stats(0, None, &s.originated), removed: rx_stats(0, None, &s.removed), pmds }
    }

    fn shutdown(&mut self) {
        let names: Vec<String> = self.ports.keys().cloned().collect();
        for name in names {
            if let Err(e) = self.remove_port(&name) {
                tracing::warn!(port = name, "closing the port failed: {e}");
            }
        }
        self.switch.shutdown();
        self.pmds.clear();
        self.bridges.clear();
        self.vms.clear();
    }
}
