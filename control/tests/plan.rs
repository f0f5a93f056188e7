//! Plans and their execution: whatever the two configurations, the steps can be carried out in their order, lead to the
//! target, and can be taken back from any point.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use ferry_control::config::*;
use ferry_control::core::{ChangeError, Core};
use ferry_control::engine::*;
use ferry_control::firewall::filter::Filter;
use ferry_control::firewall::packet_text::Described;
use ferry_control::firewall::record::FirewallRecord;
use ferry_control::migration::Migration;
use ferry_control::plan::{State, Step, describe, merge, plan};
use ferry_dataplane::firewall::limits::LimitsConfig;
use ferry_dataplane::firewall::{Direction, PolicyDocument, Rule, SecurityGroup};
use proptest::prelude::*;

/// What a switch must always hold to, checked at each call. Fails on demand.
#[derive(Debug, Default, Clone, PartialEq)]
struct Model {
    pmds: Vec<PmdSpec>,
    bridges: BTreeMap<String, BridgeConfig>,
    ports: BTreeMap<String, PortConfig>,
    queues: BTreeMap<(String, u32), usize>,
    vms: BTreeMap<String, VmSpec>,
    policy: PolicyDocument,
    dpdk: DpdkConfig,
}

#[derive(Clone, Default)]
struct ModelEngine {
    model: Arc<Mutex<Model>>,
    /// Which of the coming calls fail, counted from 0.
    failing: Arc<Mutex<(usize, BTreeSet<usize>)>>,
    /// Ports that were closed, in order.
    closed: Arc<Mutex<Vec<String>>>,
}

impl ModelEngine {
    fn step(&self, what: &str) -> Result<(), EngineError> {
        let mut failing = self.failing.lock().unwrap();
        let call = failing.0;
        failing.0 += 1;
        if failing.1.contains(&call) {
            return Err(EngineError::new(format!("{what} was made to fail"), "no remedy"));
        }
        Ok(())
    }

    fn fail_at<const N: usize>(&self, calls: [usize; N]) {
        *self.failing.lock().unwrap() = (0, calls.into());
    }
}

impl Model {
    /// What the switch would refuse: a port whose VM or groups are not there.
    fn check_port(&self, p: &PortConfig) {
        if let Some(vm) = p.vm_name() {
            assert!(self.vms.contains_key(vm), "no VM {vm}");
        }
        if let Some(f) = &p.firewall {
            self.policy.validate_port(&f.policy(), &p.name).unwrap_or_else(|e| panic!("{e:?}"));
        }
    }
}

impl Engine for ModelEngine {
    fn add_vm(&mut self, vm: &VmSpec) -> Result<(), EngineError> {
        self.step("add_vm")?;
        assert!(self.model.lock().unwrap().vms.insert(vm.name.clone(), vm.clone()).is_none());
        Ok(())
    }
    fn update_vm(&mut self, vm: &VmSpec) -> Result<(), EngineError> {
        self.step("update_vm")?;
        assert!(self.model.lock().unwrap().vms.insert(vm.name.clone(), vm.clone()).is_some_and(|old| old != *vm));
        Ok(())
    }
    fn remove_vm(&mut self, name: &str) -> Result<(), EngineError> {
        self.step("remove_vm")?;
        let mut m = self.model.lock().unwrap();
        assert!(m.ports.values().all(|p| p.vm_name() != Some(name)), "VM {name} has ports");
        assert!(m.vms.remove(name).is_some());
        Ok(())
    }
    fn set_policy(&mut self, policy: &PolicyDocument) -> Result<(), EngineError> {
        self.step("set_policy")?;
        policy.validate().unwrap_or_else(|e| panic!("{e:?}"));
        let mut m = self.model.lock().unwrap();
        assert_ne!(m.policy, *policy);
        m.policy = policy.clone();
        m.ports.values().for_each(|p| m.check_port(p));
        Ok(())
    }
    fn connections(&self, _: &str, _: &Filter, _: u64, _: usize) -> Result<Page, EngineError> {
        Ok(Page::default())
    }
    fn flush_connections(&mut self, _: &str, _: &Filter) -> Result<u64, EngineError> {
        Ok(0)
    }
    fn vm_stats(&self, _: &str) -> Result<VmStats, EngineError> {
        Ok(VmStats::default())
    }
    fn firewall_stats(&self) -> BTreeMap<String, FirewallStats> {
        BTreeMap::new()
    }
    fn housekeeper(&self) -> Box<dyn Fn() + Send> {
        Box::new(|| ())
    }
    fn provider(&self) -> Box<dyn Fn() -> bool + Send> {
        Box::new(|| false)
    }
    fn take_firewall_events(&mut self, _: &mut Vec<FirewallRecord>) -> u64 {
        0
    }
    fn trace(&self, _: &str, _: &Described) -> Result<Trace, EngineError> {
        Ok(Trace::default())
    }
    fn set_dpdk(&mut self, dpdk: &DpdkConfig) -> Result<(), EngineError> {
        self.step("set_dpdk")?;
        self.model.lock().unwrap().dpdk = dpdk.clone();
        Ok(())
    }
    fn dpdk_started(&self) -> bool {
        false
    }
    fn add_pmd(&mut self, index: usize, spec: &PmdSpec) -> Result<(), EngineError> {
        self.step("add_pmd")?;
        let mut m = self.model.lock().unwrap();
        assert_eq!(index, m.pmds.len());
        m.pmds.push(*spec);
        Ok(())
    }
    fn update_pmd(&mut self, index: usize, spec: &PmdSpec) -> Result<(), EngineError> {
        self.step("update_pmd")?;
        self.model.lock().unwrap().pmds[index] = *spec;
        Ok(())
    }
    fn remove_pmd(&mut self, index: usize) -> Result<(), EngineError> {
        self.step("remove_pmd")?;
        let mut m = self.model.lock().unwrap();
        assert_eq!(index + 1, m.pmds.len(), "the last one goes");
        assert!(m.queues.values().all(|p| *p != index), "it serves queues: {:?}", m.queues);
        m.pmds.pop();
        Ok(())
    }
    fn add_bridge(&mut self, b: &BridgeConfig) -> Result<(), EngineError> {
        self.step("add_bridge")?;
        assert!(self.model.lock().unwrap().bridges.insert(b.name.clone(), b.clone()).is_none());
        Ok(())
    }
    fn update_bridge(&mut self, b: &BridgeConfig) -> Result<(), EngineError> {
        self.step("update_bridge")?;
        assert!(self.model.lock().unwrap().bridges.insert(b.name.clone(), b.clone()).is_some());
        Ok(())
    }
    fn remove_bridge(&mut self, name: &str) -> Result<(), EngineError> {
        self.step("remove_bridge")?;
        let mut m = self.model.lock().unwrap();
        assert!(m.ports.values().all(|p| p.bridge != name), "bridge {name} has ports");
        assert!(m.bridges.remove(name).is_some());
        Ok(())
    }
    fn add_port(&mut self, p: &PortConfig, placed: &[usize]) -> Result<(), EngineError> {
        self.step("add_port")?;
        let mut m = self.model.lock().unwrap();
        assert!(m.bridges.contains_key(&p.bridge), "no bridge {}", p.bridge);
        assert!(m.ports.values().all(|o| o.resource() != p.resource()), "{} in use", p.resource());
        assert_eq!(placed.len(), p.rx_queues() as usize);
        m.check_port(p);
        for (q, pmd) in placed.iter().enumerate() {
            assert!(*pmd < m.pmds.len());
            m.queues.insert((p.name.clone(), q as u32), *pmd);
        }
        assert!(m.ports.insert(p.name.clone(), p.clone()).is_none());
        Ok(())
    }
    fn update_port(&mut self, p: &PortConfig) -> Result<(), EngineError> {
        self.step("update_port")?;
        let mut m = self.model.lock().unwrap();
        assert!(m.bridges.contains_key(&p.bridge));
        m.check_port(p);
        let old = m.ports.insert(p.name.clone(), p.clone()).unwrap();
        assert!(old.live_change(p), "{old:?} {p:?}");
        Ok(())
    }
    fn remove_port(&mut self, name: &str) -> Result<(), EngineError> {
        self.step("remove_port")?;
        let mut m = self.model.lock().unwrap();
        assert!(m.ports.remove(name).is_some());
        m.queues.retain(|(p, _), _| p != name);
        self.closed.lock().unwrap().push(name.to_owned());
        Ok(())
    }
    fn assign(&mut self, port: &str, queue: u32, pmd: usize) -> Result<(), EngineError> {
        self.step("assign")?;
        let mut m = self.model.lock().unwrap();
        assert!(pmd < m.pmds.len());
        assert!(m.queues.insert((port.to_owned(), queue), pmd).is_some_and(|old| old != pmd));
        Ok(())
    }
    fn inject(&mut self, _: &str, _: &[u8]) -> Result<(), EngineError> {
        Ok(())
    }
    fn fdb(&self, _: &str) -> Result<Vec<FdbEntry>, EngineError> {
        Ok(Vec::new())
    }
    fn fdb_flush(&mut self, _: &str, _: Option<&str>) -> Result<usize, EngineError> {
        Ok(0)
    }
    fn port_state(&self, _: &str) -> Result<PortState, EngineError> {
        Ok(PortState::default())
    }
    fn stats(&self) -> Stats {
        Stats::default()
    }
    fn shutdown(&mut self) {}
}

fn arb_port(i: usize, bridges: usize, pmds: usize) -> impl Strategy<Value = PortConfig> {
    let kind = prop_oneof![
        // Few sockets for many ports: they are taken over often.
        3 => (0..6u32, 1..3u32, any::<bool>()).prop_map(|(s, queue_pairs, packed)| {
            let v = serde_json::json!({"type": "vhost-user", "socket": format!("/run/s{s}"), "queue_pairs": queue_pairs, "features": {"packed": packed}});
            serde_json::from_value::<PortKind>(v).unwrap()
        }),
        1 => (0..2u32).prop_map(|d| {
            serde_json::from_value::<PortKind>(serde_json::json!({"type": "dpdk", "device": format!("net_null{d}")})).unwrap()
        }),
    ];
    let vlan = prop_oneof![
        Just(VlanConfig::default()),
        (1..5u16).prop_map(|t| VlanConfig { mode: VlanKind::Access, tag: Some(t), trunks: vec![] })
    ];
    (
        kind,
        0..bridges,
        vlan,
        any::<bool>(),
        prop_oneof![Just(1500u16), Just(9000)],
        proptest::collection::vec(0..pmds as u32, 0..3),
        arb_firewall(),
    )
        .prop_map(move |(kind, bridge, vlan, admin_up, mtu, rxq_affinity, (vm, firewall))| PortConfig {
            name: format!("p{i}"),
            kind,
            bridge: format!("b{bridge}"),
            vlan,
            admin_up,
            mtu,
            fdb_limit: 256,
            rxq_affinity,
            vm,
            firewall,
        })
}

/// No firewall; or one, in VM v0 or v1 or in none, with some of the groups g0 to g2.
fn arb_firewall() -> impl Strategy<Value = (Option<String>, Option<FirewallConfig>)> {
    let groups = proptest::sample::subsequence(vec!["g0", "g1", "g2"], 0..3);
    let own_limits = proptest::option::of(1..3u32);
    proptest::option::of((proptest::option::of(0..2u32), groups, own_limits)).prop_map(|port| {
        let Some((vm, groups, limits)) = port else { return (None, None) };
        let limits = limits.filter(|_| vm.is_none()).map(|n| LimitsConfig { max_half_open: n, ..Default::default() });
        let mut firewall = FirewallConfig { limits, ..FirewallConfig::default() };
        firewall.security_groups = groups.into_iter().map(str::to_owned).collect();
        firewall.anti_spoofing.enabled = false;
        (vm.map(|v| format!("v{v}")), Some(firewall))
    })
}

prop_compose! {
    fn arb_config()(bridges in 1..4usize, pmds in 0..4usize)(
        ports in (0..5usize).prop_map(Some).prop_flat_map(move |_| (0..5usize).map(|i| proptest::option::of(arb_port(i, bridges, pmds.max(1)))).collect::<Vec<_>>()),
        ageing in proptest::collection::vec(1..3u32, bridges),
        spins in proptest::collection::vec(0..2u32, pmds),
        level in prop_oneof![Just("info"), Just("debug")],
        vm_sizes in proptest::collection::vec(1..3u32, 2),
        // Rules of each group; a group without is not there unless a port is in it.
        rules in proptest::collection::vec(0..3usize, 3),
    ) -> Config {
        let mut used = BTreeSet::new();
        let port: Vec<_> = ports.into_iter().flatten().filter(|p| used.insert(p.resource())).collect();
        let mut c = Config { port, ..Config::default() };
        c.bridge = ageing.iter().enumerate().map(|(i, a)| BridgeConfig { name: format!("b{i}"), fdb_ageing_s: *a, ..Default::default() }).collect();
        c.switch.pmd = spins.iter().map(|s| PmdConfig { idle_spin_us: Some(*s), ..Default::default() }).collect();
        c.log.level = level.into();
        c.vm = vm_sizes.iter().enumerate().map(|(i, n)| VmConfig { name: format!("v{i}"), connections: n * 1024, ..Default::default() }).collect();
        c.vm.retain(|v| v.connections > 1024 || c.port.iter().any(|p| p.vm.as_ref() == Some(&v.name)));
        for (i, n) in rules.into_iter().enumerate() {
            let name = format!("g{i}");
            let used = c.port.iter().filter_map(|p| p.firewall.as_ref()).any(|f| f.security_groups.contains(&name));
            if n > 0 || used {
                let rules = vec![Rule::allow(Direction::Ingress); n];
                c.security_group.insert(name, SecurityGroup { rules, ..Default::default() });
            }
        }
        c
    }
}

fn started(config: &Config) -> (Core, ModelEngine) {
    let engine = ModelEngine::default();
    let core =
        Core::start(Box::new(engine.clone()), config.clone(), None, Box::new(|_| Ok(())), Migration::new()).unwrap();
    (core, engine)
}

fn matches(model: &Model, state: &State) {
    let c = &state.config;
    assert_eq!(model.pmds, c.pmds());
    assert_eq!(model.pmds, state.pmds);
    assert_eq!(model.bridges, c.bridge.iter().map(|b| (b.name.clone(), b.clone())).collect());
    assert_eq!(model.ports, c.port.iter().map(|p| (p.name.clone(), p.clone())).collect());
    assert_eq!(model.queues, state.placement);
    assert_eq!(model.vms, c.vm_specs());
    assert_eq!(model.policy, c.policy());
    assert_eq!(model.queues.len(), c.port.iter().map(|p| p.rx_queues() as usize).sum::<usize>());
    for p in c.port.iter().filter(|p| !p.rxq_affinity.is_empty()) {
        for q in 0..p.rx_queues() {
            let want = p.rxq_affinity[q as usize % p.rxq_affinity.len()] as usize;
            assert_eq!(model.queues[&(p.name.clone(), q)], want);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_configuration_is_reached_from_any_other(a in arb_config(), b in arb_config()) {
        config_is_valid(&a);
        let (mut core, engine) = started(&a);
        matches(&engine.model.lock().unwrap(), core.state());
        core.apply(&b, false).unwrap();
        matches(&engine.model.lock().unwrap(), core.state());
        prop_assert_eq!(core.config(), &b);
        // Nothing is left to do.
        prop_assert!(plan(core.state(), &b, false).steps.is_empty());
    }

    #[test]
    fn a_failed_step_leaves_the_former_state(a in arb_config(), b in arb_config(), at in 0..30usize) {
        let (mut core, engine) = started(&a);
        let (state, model) = (core.state().clone(), engine.model.lock().unwrap().clone());
        engine.fail_at([at]);
        match core.apply(&b, false) {
            Ok(_) => prop_assert_eq!(core.config(), &b),
            Err(ChangeError::Failed { damage, .. }) => {
                prop_assert_eq!(damage, "");
                prop_assert_eq!(core.state(), &state);
                prop_assert_eq!(&*engine.model.lock().unwrap(), &model);
            }
            Err(e) => panic!("{e}"),
        }
    }

    #[test]
    fn ports_that_need_no_restart_are_not_closed(a in arb_config(), b in arb_config()) {
        let (mut core, engine) = started(&a);
        let outcome = core.apply(&b, false).unwrap();
        let closed = engine.closed.lock().unwrap();
        for name in closed.iter() {
            let (old, new) = (a.port(name), b.port(name));
            prop_assert!(new.is_none_or(|n| !old.unwrap().live_change(n)), "{} was closed for nothing", name);
            prop_assert_eq!(new.is_some(), outcome.restarted_ports.contains(name));
        }
    }

    #[test]
    fn merging_keeps_runtime_changes_and_takes_the_files(a in arb_config(), b in arb_config(), r in arb_config()) {
        let back = |v: serde_json::Value| serde_json::from_value::<Config>(v).unwrap();
        // No change in the file: what runs stays. No change at run time: the file is taken.
        prop_assert!(describe(&back(merge(&a, &a, &r)), &r).is_empty());
        prop_assert!(describe(&back(merge(&a, &b, &a)), &b).is_empty());
        // What the file added or removed is so afterwards; ports it never knew stay as they run.
        let m = back(merge(&a, &b, &r));
        for p in &r.port {
            match (a.port(&p.name), b.port(&p.name)) {
                (None, None) => prop_assert_eq!(m.port(&p.name), Some(p)),
                (Some(_), None) => prop_assert_eq!(m.port(&p.name), None),
                _ => {}
            }
        }
        for p in b.port.iter().filter(|p| a.port(&p.name).is_none()) {
            prop_assert_eq!(m.port(&p.name), Some(p));
        }
    }

    #[test]
    fn every_step_undoes(a in arb_config(), b in arb_config()) {
        for step in plan(started(&a).0.state(), &b, false).steps {
            prop_assert_eq!(step.clone().undo().undo(), step);
        }
    }
}

fn config_is_valid(c: &Config) {
    assert_eq!(&from_tree(to_tree(c)).unwrap(), c);
}

fn sample() -> Config {
    parse(
        "f",
        "[[switch.pmd]]\ncore = 0\n[[switch.pmd]]\ncore = 1\n[[bridge]]\nname = \"b0\"\n[[bridge]]\nname = \"b1\"\n\
         [[port]]\nname = \"v\"\ntype = \"vhost-user\"\nbridge = \"b0\"\nsocket = \"/run/v\"\nqueue_pairs = 2\n",
    )
    .unwrap()
}

#[test]
fn moving_a_port_takes_one_step_and_no_restart() {
    let (core, _) = started(&sample());
    let mut to = sample();
    to.port[0].bridge = "b1".into();
    to.port[0].vlan = VlanConfig { mode: VlanKind::Access, tag: Some(7), trunks: vec![] };
    let p = plan(core.state(), &to, false);
    assert!(matches!(p.steps[..], [Step::UpdatePort { .. }]), "{:?}", p.steps);
    assert!(p.restarted_ports.is_empty());
}

#[test]
fn queues_spread_over_threads_and_stay_where_they_are() {
    let (mut core, _) = started(&sample());
    let of = |core: &Core| core.state().placement.values().copied().collect::<Vec<_>>();
    assert_eq!(of(&core), [0, 1]);
    let mut to = sample();
    to.port[0].rxq_affinity = vec![1];
    core.apply(&to, false).unwrap();
    assert_eq!(of(&core), [1, 1]);
    // Without affinity nothing forces them to move back.
    core.apply(&sample(), false).unwrap();
    assert_eq!(of(&core), [1, 1]);
}

#[test]
fn keys_of_the_services_wait_for_the_next_start() {
    let (mut core, _) = started(&sample());
    let mut to = sample();
    to.api.mode = FileMode(0o600);
    to.metrics.enabled = true;
    to.log.format = LogFormat::Json;
    let outcome = core.apply(&to, false).unwrap();
    assert_eq!(outcome.restart_required, ["api.mode", "metrics.enabled", "log.format"]);
    assert!(outcome.steps.is_empty());
    assert_eq!(core.config(), &sample());
}

#[test]
fn what_cannot_be_put_back_is_named_and_gone() {
    let (mut core, engine) = started(&sample());
    let mut to = sample();
    let PortKind::VhostUser(v) = &mut to.port[0].kind else { panic!() };
    v.queue_pairs = 1;
    // Closing works, opening anew fails, and so does the way back.
    engine.fail_at([1, 2]);
    let err = core.apply(&to, false).unwrap_err();
    let ChangeError::Failed { step, damage, .. } = &err else { panic!("{err}") };
    assert_eq!(step, "add port v");
    assert_eq!(damage, ", except: could not add port v: add_port was made to fail");
    assert_eq!(err.hint(), "no remedy");
    assert!(core.damage().contains("could not add port v"));
    assert!(core.config().port.is_empty());
    // It can be added again.
    engine.fail_at([]);
    core.apply(&sample(), false).unwrap();
    matches(&engine.model.lock().unwrap(), core.state());
}

#[test]
fn what_is_said_about_migrations_takes_effect_at_once() {
    let (mut core, _) = started(&sample());
    let migrating = |bandwidth: u32, when_late: &str| {
        let mut tree = to_tree(&sample());
        let keys = serde_json::json!({
            "enabled": false, "host": "a", "listen": "192.0.2.1:1", "bandwidth_mbps": bandwidth,
            "rule": [{ "vm": "*", "peer": "*", "roles": ["receive"] }],
        });
        for (key, value) in keys.as_object().unwrap() {
            tree["migration"][key] = value.clone();
        }
        tree["vm"] = serde_json::json!([{ "name": "x", "migration": { "when_late": when_late } }]);
        from_tree(tree).unwrap()
    };
    let first = migrating(0, "fail-open");
    core.apply(&first, false).unwrap();
    let second = migrating(1000, "fail-closed");
    let outcome = core.apply(&second, false).unwrap();
    assert!(outcome.restart_required.is_empty() && outcome.restarted_ports.is_empty());
    assert_eq!(core.config(), &second);
    let shown: Vec<String> = outcome.changes.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        [
            "migration changed (bandwidth_mbps: 0 -> 1000)",
            "vm x changed (migration.when_late: \"fail-open\" -> \"fail-closed\")"
        ]
    );
    // Where the file says something new, it wins; what it says nothing new about stays as it runs.
    let mut running = first.clone();
    running.migration.hold_limit_ms = 7;
    let merged = from_tree(merge(&first, &second, &running)).unwrap();
    assert_eq!((merged.migration.hold_limit_ms, merged.migration.bandwidth_mbps), (7, 1000));
    assert_eq!(merged.vm[0].migration.when_late, WhenLateConfig::FailClosed);
}
