//! The switch's firewall as the control side sees it: VMs, their ports' rules, and what the PMD threads report.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::{Inner, PortOptions, Switch, SwitchError, free_number};
use crate::bridge::fdb::PortId;
use crate::enforce::events::EventRing;
use crate::enforce::port::FirewallLedger;
use crate::enforce::{
    FirewallEvent, MAX_VM_PORTS, PortFirewall, PortFirewallStats, PortRules, VmFirewall, VmId, VmOptions, VmStatus,
};
use crate::firewall::explain::RuleLine;
use crate::firewall::policy::{PolicyDocument, PortPolicy};
use crate::firewall::reject::Rejector;
use crate::firewall::spoof::{SpoofConfig, SpoofTable};
use crate::firewall::{AddressBook, AddressIndex, Cidr, CompileOptions, CompiledPolicy, SetKey, compile};
use crate::pmd::{Kinds, PmdId};
use crate::qsbr::MAX_THREADS;

/// Most VMs of one switch.
pub const MAX_VMS: usize = 4096;

/// Connections that one call of [`Switch::tend_tables`] looks at.
const TEND_ENTRIES: usize = 65_536;

/// A port's firewall as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirewallOptions {
    /// The VM it belongs to.
    pub vm: VmId,
    /// What it lets pass. [`PortPolicy::limits`] is not used here: limits are the VM's ([`VmOptions::limits`]).
    pub policy: PortPolicy,
}

/// A port's firewall with what it was made of.
pub(super) struct PortRecord {
    pub firewall: PortFirewall,
    document: Arc<PolicyDocument>,
    policy: PortPolicy,
}

pub(super) struct VmRecord {
    options: VmOptions,
    pub firewall: Arc<VmFirewall>,
}

/// Everything about firewalls that is not a port's alone.
pub(super) struct State {
    pub vms: BTreeMap<VmId, VmRecord>,
    pub ports: BTreeMap<PortId, PortRecord>,
    document: Arc<PolicyDocument>,
    book: AddressBook,
    index: Arc<AddressIndex>,
    /// Secret: nobody outside can choose what collides.
    seed: [u64; 2],
    pub events: BTreeMap<PmdId, Arc<EventRing>>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            vms: BTreeMap::new(),
            ports: BTreeMap::new(),
            document: Arc::default(),
            book: AddressBook::new(),
            index: Arc::default(),
            seed: random_seed(),
            events: BTreeMap::new(),
        }
    }
}

/// 128 bits that a guest cannot know: the standard library seeds its hash maps from the operating system's source.
fn random_seed() -> [u64; 2] {
    use std::hash::{BuildHasher, RandomState};
    let state = RandomState::new();
    [state.hash_one(0x6665_7272_7931u64), state.hash_one(0x6665_7272_7932u64)]
}

/// A change of rules, worked out but not yet in force.
pub(super) struct Change {
    document: Arc<PolicyDocument>,
    book: AddressBook,
    index: Arc<AddressIndex>,
    ports: BTreeMap<PortId, PortRecord>,
}

impl State {
    /// What the firewalls of `ports` come to under `document`. Rules that stay the same keep their generation, so that
    /// their connections are not judged again.
    pub(super) fn plan<'a>(
        &self,
        document: Arc<PolicyDocument>,
        ports: impl Iterator<Item = (PortId, &'a PortOptions)>,
    ) -> Result<Change, SwitchError> {
        document.validate().map_err(SwitchError::Policy)?;
        let mut book = self.book.clone();
        book.load_document(&document).map_err(|e| SwitchError::TooManyAddresses(e.0.to_string()))?;
        let wanted: Vec<_> =
            ports.filter_map(|(id, options)| Some((id, options.name.as_str(), options.firewall.as_ref()?))).collect();
        load_members(&mut book, &document, wanted.iter().map(|(_, _, f)| &f.policy))?;
        let mut records = BTreeMap::new();
        let mut taken: BTreeMap<VmId, u16> = BTreeMap::new();
        for (id, record) in &self.ports {
            if wanted.iter().any(|(wanted, _, f)| wanted == id && f.vm == record.firewall.vm.id()) {
                *taken.entry(record.firewall.vm.id()).or_default() |= 1 << record.firewall.index;
            }
        }
        // Numbers of sets are given while compiling; the index is made afterwards, of the members they then have.
        let mut compiled = Vec::new();
        for (id, name, options) in wanted {
            let old = self.ports.get(&id).filter(|old| old.firewall.vm.id() == options.vm);
            let vm = self.vms.get(&options.vm).ok_or(SwitchError::NoVm(options.vm))?;
            let index = match old {
                Some(old) => old.firewall.index,
                None => {
                    let taken = taken.entry(options.vm).or_default();
                    let index = (0..MAX_VM_PORTS).find(|i| *taken >> i & 1 == 0);
                    let index =
                        index.ok_or(SwitchError::TooMany { what: "ports of one VM", limit: MAX_VM_PORTS.into() })?;
                    *taken |= 1 << index;
                    index
                }
            };
            let kept = old.filter(|old| same_rules(old, &document, &options.policy));
            let policy = match kept {
                Some(old) => Arc::clone(&old.firewall.rules.policy),
                None => {
                    let [seed, _] = self.seed;
                    let compile_options = CompileOptions { generation: 0, seed };
                    Arc::new(
                        compile(&document, &options.policy, name, &mut book, compile_options)
                            .map_err(SwitchError::Policy)?,
                    )
                }
            };
            compiled.push((id, options, vm, index, old, kept.is_some(), policy));
        }
        let same_sets = book.version() == self.index.version();
        let index = if same_sets { Arc::clone(&self.index) } else { Arc::new(book.snapshot(self.seed[1])) };
        for (id, options, vm, number, old, kept, policy) in compiled {
            let same = kept && (same_sets || !policy.names_sets());
            let generation = match old {
                // 0 marks connections that no policy has judged.
                Some(old) if !same => old.firewall.rules.generation.wrapping_add(1).max(1),
                Some(old) => old.firewall.rules.generation,
                None => 1,
            };
            let spoof = &options.policy.anti_spoofing;
            let spoof = match old.filter(|old| old.policy.anti_spoofing == *spoof) {
                Some(old) => Arc::clone(&old.firewall.rules.spoof),
                None => Arc::new(SpoofTable::new(spoof, self.seed[0])),
            };
            let rules = PortRules {
                generation,
                stateless: policy.any_stateless(),
                policy,
                sets: Arc::clone(&index),
                spoof,
                track: vm.options.track,
                reject: options.policy.reject,
            };
            let firewall = PortFirewall {
                vm: Arc::clone(&vm.firewall),
                index: number,
                rules: Arc::new(rules),
                ledgers: match old {
                    Some(old) => Arc::clone(&old.firewall.ledgers),
                    None => Arc::new(core::array::from_fn::<_, MAX_THREADS, _>(|_| FirewallLedger::default())),
                },
                rejector: old.map_or_else(|| Arc::new(Rejector::default()), |old| Arc::clone(&old.firewall.rejector)),
            };
            let policy = options.policy.clone();
            records.insert(id, PortRecord { firewall, document: Arc::clone(&document), policy });
        }
        Ok(Change { document, book, index, ports: records })
    }

    /// Puts a change in force for those who look here; the PMD threads see it with the next picture.
    pub(super) fn commit(&mut self, change: Change) {
        let Change { document, book, index, ports } = change;
        (self.document, self.book, self.index, self.ports) = (document, book, index, ports);
    }

    fn has_ports(&self, vm: VmId) -> usize {
        self.ports.values().filter(|p| p.firewall.vm.id() == vm).count()
    }
}

/// The rules of a port would compile to the same.
fn same_rules(old: &PortRecord, document: &Arc<PolicyDocument>, policy: &PortPolicy) -> bool {
    let compiled_from = |p: &PortPolicy| PortPolicy {
        anti_spoofing: SpoofConfig::default(),
        limits: Default::default(),
        reject: Default::default(),
        ..p.clone()
    };
    let same_group = |name: &String| old.document.security_groups.get(name) == document.security_groups.get(name);
    compiled_from(&old.policy) == compiled_from(policy)
        && (Arc::ptr_eq(&old.document, document) || policy.security_groups.iter().all(same_group))
}

/// The members of every group are the addresses of the ports that are in it.
fn load_members<'a>(
    book: &mut AddressBook,
    document: &PolicyDocument,
    ports: impl Iterator<Item = &'a PortPolicy>,
) -> Result<(), SwitchError> {
    let mut members: BTreeMap<&str, BTreeSet<Cidr>> =
        document.security_groups.keys().map(|name| (name.as_str(), BTreeSet::new())).collect();
    for policy in ports {
        let spoof = &policy.anti_spoofing;
        let pairs = spoof.allowed_address_pairs.iter().map(|pair| pair.address);
        for group in &policy.security_groups {
            members.entry(group).or_default().extend(spoof.addresses.iter().copied().chain(pairs.clone()));
        }
    }
    for (name, addresses) in members {
        let addresses: Vec<_> = addresses.into_iter().collect();
        book.set_members(&SetKey::Group(name.to_owned()), &addresses)
            .map_err(|e| SwitchError::TooManyAddresses(e.0.to_string()))?;
    }
    Ok(())
}

impl<K: Kinds> Switch<K> {
    /// Adds a VM with an empty connection table.
    ///
    /// # Errors
    /// The name is taken, there are too many, or no memory.
    pub fn add_vm(&self, options: VmOptions) -> Result<VmId, SwitchError> {
        let mut inner = self.lock();
        let vms = &inner.firewall.vms;
        if vms.values().any(|vm| vm.options.name == options.name) {
            return Err(SwitchError::NameTaken(options.name));
        }
        let id = free_number(vms, MAX_VMS).ok_or(SwitchError::TooMany { what: "VMs", limit: MAX_VMS })?;
        let firewall = VmFirewall::new(id, &options, random_seed()).map_err(|e| SwitchError::Table(e.to_string()))?;
        inner.firewall.vms.insert(id, VmRecord { options, firewall: Arc::new(firewall) });
        self.publish(&inner);
        Ok(id)
    }

    /// Changes a VM's settings; its connections stay. With another capacity they move to a table of that size while traffic goes on;
    /// where they no longer all fit, the ones that would be evicted are lost.
    ///
    /// # Errors
    /// No such VM, a renamed one still has ports, the name is taken, or no memory.
    pub fn update_vm(&self, id: VmId, options: VmOptions) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        let state = &inner.firewall;
        let record = state.vms.get(&id).ok_or(SwitchError::NoVm(id))?;
        if state.vms.iter().any(|(other, vm)| *other != id && vm.options.name == options.name) {
            return Err(SwitchError::NameTaken(options.name));
        }
        let renamed = record.options.name != options.name;
        let ports = state.has_ports(id);
        if renamed && ports > 0 {
            return Err(SwitchError::VmInUse { name: record.options.name.clone(), ports });
        }
        let old = Arc::clone(&record.firewall);
        let firewall = if renamed || record.options.capacity != options.capacity {
            let new = VmFirewall::new(id, &options, random_seed()).map_err(|e| SwitchError::Table(e.to_string()))?;
            Arc::new(new)
        } else {
            old.reconfigure(&options);
            Arc::clone(&old)
        };
        let moves = !Arc::ptr_eq(&old, &firewall);
        let now_ms = self.clock.now_ns() / 1_000_000;
        if moves {
            firewall.pick_up_until(old.pick_up().until_ms());
            old.map().set_tracking(true);
            // From here on every thread notes what it changes.
            self.domain.synchronize();
            firewall.adopt_all(&old, now_ms);
        }
        inner.firewall.vms.insert(id, VmRecord { options, firewall: Arc::clone(&firewall) });
        inner.replan()?;
        self.publish(&inner);
        if moves {
            // Nobody uses the old table any more: what changed since it was copied is final.
            firewall.adopt_changes(&old, now_ms);
        }
        Ok(())
    }

    /// An empty firewall with a VM's settings, for connections that come from elsewhere: it is filled ([`VmFirewall::import`]) while
    /// the VM's own goes on, and takes its place by [`Self::activate_vm`], or is dropped.
    ///
    /// # Errors
    /// No such VM, or no memory.
    pub fn stage_vm(&self, id: VmId) -> Result<Arc<VmFirewall>, SwitchError> {
        let options = self.lock().firewall.vms.get(&id).ok_or(SwitchError::NoVm(id))?.options.clone();
        let staged = VmFirewall::new(id, &options, random_seed()).map_err(|e| SwitchError::Table(e.to_string()))?;
        Ok(Arc::new(staged))
    }

    /// Puts a staged firewall in the place of the VM's own, which is dropped with its connections. When it returns every PMD thread
    /// uses the new one.
    ///
    /// # Errors
    /// No such VM.
    pub fn activate_vm(&self, id: VmId, staged: Arc<VmFirewall>) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        let record = inner.firewall.vms.get_mut(&id).ok_or(SwitchError::NoVm(id))?;
        // The settings may have changed since it was staged.
        staged.reconfigure(&record.options);
        record.firewall = staged;
        inner.replan()?;
        self.publish(&inner);
        Ok(())
    }

    /// Waits until every PMD thread has seen what was changed before: so that, with [`crate::conntrack::ConnMap::set_tracking`] on,
    /// no change goes unnoticed from now on.
    pub fn synchronize(&self) {
        self.domain.synchronize();
    }

    /// Removes a VM that has no ports, with its connections.
    ///
    /// # Errors
    /// It has ports, or is not there.
    pub fn remove_vm(&self, id: VmId) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        let record = inner.firewall.vms.get(&id).ok_or(SwitchError::NoVm(id))?;
        let ports = inner.firewall.has_ports(id);
        if ports > 0 {
            return Err(SwitchError::VmInUse { name: record.options.name.clone(), ports });
        }
        inner.firewall.vms.remove(&id);
        self.publish(&inner);
        Ok(())
    }

    /// A VM's firewall: its connections can be listed and flushed while traffic goes on.
    pub fn vm(&self, id: VmId) -> Option<Arc<VmFirewall>> {
        self.lock().firewall.vms.get(&id).map(|vm| Arc::clone(&vm.firewall))
    }

    /// All VMs, by number.
    pub fn vms(&self) -> Vec<Arc<VmFirewall>> {
        self.lock().firewall.vms.values().map(|vm| Arc::clone(&vm.firewall)).collect()
    }

    /// How a VM's firewall is.
    pub fn vm_status(&self, id: VmId) -> Option<VmStatus> {
        Some(self.vm(id)?.status(self.clock.now_ns()))
    }

    /// Puts security groups and address sets in force, on all ports at once. Connections that the new rules do not allow are cut
    /// on their next packet; those of ports whose rules do not change are not even looked at.
    ///
    /// # Errors
    /// The document, or a port's use of it, is invalid; nothing is changed then.
    pub fn set_policy(&self, document: PolicyDocument) -> Result<(), SwitchError> {
        let mut inner = self.lock();
        let ports = inner.ports.iter().map(|(&id, p)| (id, &p.options));
        let change = inner.firewall.plan(Arc::new(document), ports)?;
        inner.firewall.commit(change);
        self.publish(&inner);
        Ok(())
    }

    /// The security groups and address sets in force.
    pub fn policy(&self) -> Arc<PolicyDocument> {
        Arc::clone(&self.lock().firewall.document)
    }

    /// A port's firewall, if it has one.
    pub fn port_firewall(&self, port: PortId) -> Option<PortFirewall> {
        self.lock().firewall.ports.get(&port).map(|record| record.firewall.clone())
    }

    /// Every port's firewall counters.
    pub fn firewall_stats(&self) -> BTreeMap<PortId, PortFirewallStats> {
        self.lock().firewall.ports.iter().map(|(&id, record)| (id, record.firewall.stats())).collect()
    }

    /// Moves what the PMD threads reported since the last call to `out`. Returns how many reports were lost since the switch
    /// began: they come faster than they are taken, or a VM causes too many.
    pub fn take_firewall_events(&self, out: &mut Vec<FirewallEvent>) -> u64 {
        let rings: Vec<_> = self.lock().firewall.events.values().cloned().collect();
        rings.iter().for_each(|ring| ring.drain(out));
        rings.iter().map(|ring| ring.lost()).sum()
    }

    /// The rule that an event names, while the port's rules are still those.
    pub fn event_rule(&self, event: &FirewallEvent) -> Option<RuleLine> {
        let inner = self.lock();
        let rules = &inner.firewall.ports.get(&event.port)?.firewall.rules;
        if rules.generation != event.generation {
            return None;
        }
        RuleLine::of(&rules.policy, event.rule?)
    }

    /// Gets the memory of VMs' tables ready before traffic needs it. To be called some thirty times a second, not by a PMD thread, and again
    /// within one when it returns true: some table grows fast.
    pub fn provide_tables(&self) -> bool {
        self.vms().iter().fold(false, |any, vm| vm.map().populate_ahead() | any)
    }

    /// Deletes some expired connections: PMD threads that sleep do so only rarely. To be called about ten times a second, not by a PMD
    /// thread; takes less than a millisecond.
    pub fn tend_tables(&self) {
        let vms = self.vms();
        let now_ms = self.clock.now_ns() / 1_000_000;
        let mut budget = TEND_ENTRIES;
        let first = self.tended.fetch_add(1, Relaxed);
        for n in 0..vms.len() {
            let Some(vm) = vms.get(first.wrapping_add(n) % vms.len()) else { continue };
            if budget > 0 && !vm.map().is_empty() {
                let entries = budget.min(TEND_ENTRIES / 4);
                vm.sweep(now_ms, entries);
                budget -= entries;
            }
        }
    }
}

impl<K: Kinds> Inner<K> {
    /// Works the rules of all ports out again.
    pub(super) fn replan(&mut self) -> Result<(), SwitchError> {
        let ports = self.ports.iter().map(|(&id, p)| (id, &p.options));
        let change = self.firewall.plan(Arc::clone(&self.firewall.document), ports)?;
        self.firewall.commit(change);
        Ok(())
    }

    /// What a port with these settings would make of the firewalls.
    pub(super) fn plan_port(&self, id: PortId, options: &PortOptions) -> Result<Option<Change>, SwitchError> {
        if options.firewall.is_none() && !self.firewall.ports.contains_key(&id) {
            return Ok(None);
        }
        let others = self.ports.iter().filter(|(other, _)| **other != id).map(|(&id, p)| (id, &p.options));
        self.firewall.plan(Arc::clone(&self.firewall.document), others.chain([(id, options)])).map(Some)
    }
}

impl CompiledPolicy {
    /// Rules name groups or address sets.
    pub(crate) fn names_sets(&self) -> bool {
        !self.sets.is_empty()
    }
}
