//! May a VM come to this host? The same answer for a migration and for a check; a check is told everything.
use ferry_migrate::authz::{Decision, Role};
use ferry_migrate::message::{Finding, List, Note, Offer, Refuse, RefuseCode, Text};

use super::settings::{Settings, VmSettings};
use super::switch::VmPort;

/// What the judge looks at besides the configuration.
pub struct Situation<'a> {
    /// Who asks, by its certificate.
    pub peer: &'a str,
    /// The VM runs here.
    pub running: bool,
    /// `ferry migrate expect` was said for the VM, and for this peer.
    pub expected: bool,
    /// The VM's ports at this host.
    pub ports: &'a [VmPort],
    /// Why migrations may not begin now, if so (the audit log).
    pub stopped: Option<String>,
}

/// The answer.
pub struct Judgement {
    /// Everything that was looked at.
    pub findings: Vec<Finding>,
    /// What the rules say.
    pub decision: Decision,
    /// Connections that the VM's table here holds; 0: unknown VM.
    pub capacity: u32,
}

impl Judgement {
    /// The first reason to refuse.
    pub fn refusal(&self) -> Option<Refuse> {
        let refused = |f: &Finding| {
            let code = f.refusal?;
            let note = match f.fix.as_str() {
                "" => format!("{}: {}", f.what, f.found),
                fix => format!("{}: {} ({fix})", f.what, f.found),
            };
            Some(Refuse { code, note: Note::lossy(&note) })
        };
        self.findings.iter().find_map(refused)
    }

    /// As it is sent in answer to a check.
    pub fn to_findings<const MAX: usize>(&self) -> List<Finding, MAX> {
        List::new(self.findings.iter().take(MAX).cloned().collect()).unwrap_or_default()
    }
}

struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, what: &str, refusal: Option<RefuseCode>, found: &str, fix: &str) {
        let finding = Finding { refusal, what: Text::lossy(what), found: Note::lossy(found), fix: Note::lossy(fix) };
        self.0.push(finding);
    }
}

/// Judges an offer.
pub fn judge(settings: &Settings, offer: &Offer, situation: &Situation<'_>) -> Judgement {
    let vm = offer.vm.as_str();
    let mut out = Findings(Vec::new());
    let decision = settings.authorization.decide(vm, situation.peer, Role::Receive);
    let refusal = (!decision.allowed).then_some(RefuseCode::Unauthorized);
    let fix = "add a [[migration.rule]] with roles = [\"receive\"] at the destination";
    out.add("authorization at the destination", refusal, &decision.reason, if decision.allowed { "" } else { fix });
    if !decision.allowed {
        // Whoever may not send the VM learns nothing else of it.
        return Judgement { findings: out.0, decision, capacity: 0 };
    }
    if let Some(why) = &situation.stopped {
        out.add("audit log at the destination", Some(RefuseCode::Other), why, "see `ferry migrate status` there");
    }
    let Some(here) = settings.vms.get(vm) else {
        let fix = "add it to the destination's configuration, with its ports and their firewall";
        out.add("VM at the destination", Some(RefuseCode::UnknownVm), "not configured there", fix);
        return Judgement { findings: out.0, decision, capacity: 0 };
    };
    if here.migration.expect || situation.expected {
        out.add("VM at the destination", None, "configured and expected", "");
    } else {
        let fix = format!("say `ferry migrate expect {vm}` at the destination");
        out.add("VM at the destination", Some(RefuseCode::UnknownVm), "configured but not expected", &fix);
    }
    if situation.running {
        let fix = "is it another VM of the same name?";
        out.add("VM at the destination", Some(RefuseCode::Running), "it runs there", fix);
    }
    if offer.entries > here.capacity {
        let found = format!("{} connections, room for {}", offer.entries, here.capacity);
        out.add("table at the destination", Some(RefuseCode::Capacity), &found, "raise the VM's `connections` there");
    } else {
        let found = format!("room for {} connections, {} will come", here.capacity, offer.entries);
        out.add("table at the destination", None, &found, "");
    }
    nics(&mut out, here, offer, situation.ports);
    Judgement { findings: out.0, decision, capacity: here.capacity }
}

fn nics(out: &mut Findings, here: &VmSettings, offer: &Offer, ports: &[VmPort]) {
    for nic in offer.nics.iter() {
        let what = format!("port {}", nic.port);
        let mismatch = Some(RefuseCode::Mismatch);
        let Some(port) = ports.iter().find(|p| p.index == nic.index) else {
            let found = format!("the destination has no port number {} for this VM, with a firewall", nic.index);
            out.add(&what, mismatch, &found, "configure the VM's ports at both hosts in the same order");
            continue;
        };
        let Some(settings) = here.ports.get(&port.name) else { continue };
        let what = format!("port {} -> {}", nic.port, port.name);
        match settings.mac {
            Some(mac) if nic.mac != [0; 6] && mac != nic.mac => {
                let found = format!("the VM's MAC address is {} there", text(&mac));
                out.add(&what, mismatch, &found, "correct firewall.anti_spoofing.mac");
                continue;
            }
            _ => {}
        }
        if nic.mtu != 0 && settings.mtu < nic.mtu {
            let found = format!("MTU {} there, {} here", settings.mtu, nic.mtu);
            out.add(&what, mismatch, &found, "raise the port's mtu at the destination");
            continue;
        }
        let strangers: Vec<String> = nic
            .addresses
            .iter()
            .filter(|a| port.spoof.is_enabled() && !port.spoof.owns(**a))
            .map(ToString::to_string)
            .collect();
        if strangers.is_empty() {
            out.add(&what, None, "same MAC address, MTU and addresses", "");
        } else {
            let found =
                format!("the destination does not give it {}: connections of these stay behind", strangers.join(", "));
            out.add(&what, None, &found, "complete firewall.anti_spoofing.addresses at the destination");
        }
    }
    if ports.len() > offer.nics.len() {
        let found = format!("{} ports at the destination, {} here", ports.len(), offer.nics.len());
        out.add("ports", None, &found, "the VM will not use all of them");
    }
}

/// As it is written.
pub fn text(mac: &[u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;
    use ferry_dataplane::firewall::spoof::SpoofTable;
    use ferry_migrate::message::{Name, Nic, WhenLate};
    use std::sync::Arc;

    const CONFIG: &str = r#"
[[bridge]]
name = "br0"
[[vm]]
name = "web"
connections = 2000
[[port]]
name = "web-1"
type = "vhost-user"
socket = "/run/web-1"
bridge = "br0"
vm = "web"
firewall = { anti_spoofing = { mac = "52:54:00:00:00:01", addresses = ["10.0.0.1"] } }
[migration]
host = "b"
[[migration.rule]]
vm = "web"
peer = "a"
roles = ["receive"]
"#;

    fn offer() -> Offer {
        let nic = Nic {
            port: Name::lossy("p"),
            mac: [0x52, 0x54, 0, 0, 0, 1],
            index: 0,
            mtu: 1500,
            addresses: List::new(vec!["10.0.0.1".parse().unwrap()]).unwrap(),
        };
        let nics = List::new(vec![nic]).unwrap();
        Offer { vm: Name::lossy("web"), nics, capacity: 10, entries: 5, when_late: WhenLate::FailOpen }
    }

    fn refusal(change: impl FnOnce(&mut Settings, &mut Offer, &mut Situation<'_>)) -> Option<RefuseCode> {
        let config = parse("test", CONFIG).unwrap();
        let mut settings = Settings::new(&config).unwrap();
        let spoof = &config.port[0].firewall.as_ref().unwrap().anti_spoofing;
        let ports = [VmPort { name: "web-1".into(), index: 0, spoof: Arc::new(SpoofTable::new(spoof, 1)) }];
        let mut offer = offer();
        let mut situation = Situation { peer: "a", running: false, expected: false, ports: &ports, stopped: None };
        change(&mut settings, &mut offer, &mut situation);
        judge(&settings, &offer, &situation).refusal().map(|r| r.code)
    }

    fn nic(offer: &mut Offer, change: impl FnOnce(&mut Nic)) {
        let mut nics = offer.nics.to_vec();
        change(&mut nics[0]);
        offer.nics = List::new(nics).unwrap();
    }

    #[test]
    fn every_reason_is_found() {
        assert_eq!(refusal(|_, _, _| ()), None);
        assert_eq!(refusal(|_, _, s| s.peer = "c"), Some(RefuseCode::Unauthorized));
        assert_eq!(refusal(|_, _, s| s.running = true), Some(RefuseCode::Running));
        assert_eq!(refusal(|_, _, s| s.stopped = Some("disk full".into())), Some(RefuseCode::Other));
        assert_eq!(refusal(|s, _, _| s.vms.clear()), Some(RefuseCode::UnknownVm));
        let unexpected = |s: &mut Settings| s.vms.values_mut().for_each(|v| v.migration.expect = false);
        assert_eq!(refusal(|s, _, _| unexpected(s)), Some(RefuseCode::UnknownVm));
        let announced = refusal(|s, _, x| {
            unexpected(s);
            x.expected = true;
        });
        assert_eq!(announced, None);
        assert_eq!(refusal(|_, o, _| o.entries = 2001), Some(RefuseCode::Capacity));
        assert_eq!(refusal(|_, o, _| nic(o, |n| n.index = 1)), Some(RefuseCode::Mismatch));
        assert_eq!(refusal(|_, o, _| nic(o, |n| n.mac[5] = 9)), Some(RefuseCode::Mismatch));
        assert_eq!(refusal(|_, o, _| nic(o, |n| n.mtu = 9000)), Some(RefuseCode::Mismatch));
        let other = List::new(vec!["10.0.0.7".parse().unwrap()]).unwrap();
        assert_eq!(refusal(|_, o, _| nic(o, |n| n.addresses = other)), None);
    }

    #[test]
    fn whoever_may_not_send_a_vm_learns_nothing_of_it() {
        let settings = Settings::new(&parse("test", CONFIG).unwrap()).unwrap();
        let situation = Situation { peer: "c", running: true, expected: false, ports: &[], stopped: None };
        let judgement = judge(&settings, &offer(), &situation);
        assert_eq!((judgement.findings.len(), judgement.capacity), (1, 0));
    }
}
