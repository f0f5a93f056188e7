//! Open vSwitch with DPDK, as Debian ships it, with a database of its own in the suite's folder.
use super::{Kind, Setup, System};
use crate::frame::Station;
use crate::process::{self, Process};
use anyhow::{Context, Result, bail};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Debian's build with DPDK, which may be installed beside the one without.
const VSWITCHD: [&str; 2] = ["/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk", "/usr/sbin/ovs-vswitchd"];
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

/// What its flow tables do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// One flow, action NORMAL.
    Normal,
    /// All ports in one connection tracking zone; new connections may be opened by all.
    OneZone,
    /// Each packet is tracked in its sender's zone and in its receiver's.
    ZonePerPort,
}

/// A running OVS.
pub struct Ovs {
    kind: Kind,
    switch: Process,
    _database: Process,
    folder: PathBuf,
    sockets: Vec<PathBuf>,
}

/// The binary, if it is installed.
pub fn vswitchd() -> Option<&'static str> {
    VSWITCHD.into_iter().find(|p| Path::new(p).is_file())
}

fn command(folder: &Path, program: &str) -> Command {
    let mut c = Command::new(program);
    for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"] {
        c.env(variable, folder);
    }
    c
}

/// The flow tables as ovs-ofctl reads them. `mac` addresses stand for ports in the per-port job.
pub fn flows(job: Job, ports: usize, rules: usize) -> String {
    let mut t = String::new();
    let mut push = |line: String| {
        t += &line;
        t.push('\n');
    };
    match job {
        Job::Normal => push("table=0,priority=0,actions=NORMAL".into()),
        Job::OneZone => {
            push("table=0,priority=10,arp,actions=NORMAL".into());
            for ip in ["ip", "ipv6"] {
                push(format!("table=0,priority=20,{ip},ct_state=-trk,actions=ct(table=1,zone=1)"));
                push(format!("table=1,priority=30,{ip},ct_state=+trk+est-inv,actions=NORMAL"));
                push(format!("table=1,priority=30,{ip},ct_state=+trk+rel-inv,actions=NORMAL"));
            }
            push_rules(&mut push, rules, "table=1", "ct(commit,zone=1),NORMAL");
        }
        Job::ZonePerPort => {
            push("table=0,priority=10,arp,actions=NORMAL".into());
            for p in 1..=ports {
                for ip in ["ip", "ipv6"] {
                    push(format!("table=0,priority=20,in_port={p},{ip},actions=ct(table=1,zone={p})"));
                }
                // reg0 is where the packet goes: its receiver's zone comes next.
                let mac = Station::new(p as u8).mac_text();
                push(format!("table=2,priority=10,dl_dst={mac},actions=set_field:{p}->reg0,resubmit(,3)"));
                for ip in ["ip", "ipv6"] {
                    push(format!("table=3,priority=10,reg0={p},{ip},actions=ct(table=4,zone={p})"));
                }
                let out = format!("ct(commit,zone={p}),output:{p}");
                push_rules(&mut push, rules, &format!("table=4,reg0={p}"), &out);
                push(format!("table=4,priority=30,reg0={p},ct_state=+trk+est-inv,actions=output:{p}"));
                for ip in ["ip", "ipv6"] {
                    push(format!(
                        "table=1,priority=20,in_port={p},{ip},ct_state=+trk+new,\
                         actions=ct(commit,zone={p}),resubmit(,2)"
                    ));
                }
            }
            push("table=1,priority=30,ct_state=+trk+est-inv,actions=resubmit(,2)".into());
        }
    }
    t
}

/// New connections: rules that match nothing that is sent, then one that lets the rest be opened.
fn push_rules(push: &mut impl FnMut(String), rules: usize, place: &str, open: &str) {
    for i in 0..rules {
        push(format!(
            "{place},priority=25,tcp,ct_state=+trk+new,nw_src=172.{}.{}.0/24,tp_dst={},actions={open}",
            16 + i / 256 % 16,
            i % 256,
            1 + i % 4000
        ));
    }
    for ip in ["ip", "ipv6"] {
        push(format!("{place},priority=20,{ip},ct_state=+trk+new,actions={open}"));
    }
}

impl Ovs {
    /// Starts database and switch, adds the ports and the flows.
    ///
    /// # Errors
    /// When it is not installed, there are no huge pages, or it does not come up; with its log.
    pub fn start(setup: &Setup, kind: Kind, job: Job) -> Result<Self> {
        let tso = matches!(kind, Kind::OvsL2Tso | Kind::OvsCtTso);
        let Some(vswitchd) = vswitchd() else {
            bail!("OVS with DPDK is not installed: run `ferry-perf peers --install`")
        };
        let folder = setup.folder(kind.name())?;
        let core = setup.generator_core.to_string();
        let db = folder.join("conf.db");
        process::output(command(&folder, "ovsdb-tool").args(["create"]).arg(&db).arg(SCHEMA))?;
        let remote = format!("unix:{}/db.sock", folder.display());
        let mut c = command(&folder, "ovsdb-server");
        c.arg(&db).arg(format!("--remote=p{remote}"));
        let mut database = Process::start(c, &folder.join("ovsdb.log"))?;
        let socket = folder.join("db.sock");
        database.wait_for("database socket", Duration::from_secs(10), |_| socket.exists())?;
        let this = |arguments: &[&str]| -> Result<String> {
            process::output(
                command(&folder, "ovs-vsctl").arg(format!("--db={remote}")).arg("--timeout=30").args(arguments),
            )
        };
        let mask = |core: usize| format!("{:#x}", 1u64 << core);
        this(&[
            "--no-wait",
            "init",
            "--",
            "set",
            "Open_vSwitch",
            ".",
            "other_config:dpdk-init=true",
            &format!("other_config:userspace-tso-enable={tso}"),
            "other_config:dpdk-socket-mem=768",
            "other_config:dpdk-extra=--in-memory --no-pci --no-telemetry",
            &format!("other_config:dpdk-lcore-mask={}", mask(setup.generator_core)),
            &format!("other_config:pmd-cpu-mask={}", mask(setup.switch_core)),
            "other_config:n-revalidator-threads=1",
            "other_config:n-handler-threads=1",
        ])?;
        // Its bridge is a tap device: in a network namespace of its own it meets no other instance's.
        let mut c = command(&folder, "unshare");
        c.args(["--net", "taskset", "-c", &format!("{core},{}", setup.switch_core)]).arg(vswitchd).arg(&remote);
        c.arg(format!("--unixctl={}/ctl", folder.display()));
        let mut switch = Process::start(c, &folder.join("vswitchd.log"))?;
        let ctl = folder.join("ctl");
        switch.wait_for("control socket", Duration::from_secs(30), |_| UnixStream::connect(&ctl).is_ok())?;
        this(&[
            "add-br",
            "br0",
            "--",
            "set",
            "bridge",
            "br0",
            "datapath_type=netdev",
            "fail-mode=secure",
            "protocols=OpenFlow13,OpenFlow15",
        ])?;
        let mut sockets = Vec::new();
        for i in 0..setup.ports {
            let name = format!("p{i}");
            let request = format!("ofport_request={}", i + 1);
            let path = folder.join(&name);
            // The kind in which OVS listens; deprecated, but the one that all other systems here have as well. It cannot do
            // segmentation, the one in which OVS connects can.
            let kind = match tso {
                false => vec!["type=dpdkvhostuser".to_owned()],
                true => {
                    vec!["type=dpdkvhostuserclient".to_owned(), format!("options:vhost-server-path={}", path.display())]
                }
            };
            let mut arguments = vec!["add-port", "br0", &name, "--", "set", "Interface", &name, &request];
            arguments.extend(kind.iter().map(String::as_str));
            let mtu = format!("mtu_request={}", setup.mtu);
            if setup.mtu != 1500 {
                arguments.push(&mtu);
            }
            this(&arguments)?;
            sockets.push(path);
        }
        let file = folder.join("flows");
        std::fs::write(&file, flows(job, setup.ports, setup.rules))?;
        process::output(
            command(&folder, "ovs-ofctl")
                .args(["-O", "OpenFlow15", "replace-flows"])
                .arg(format!("unix:{}/br0.mgmt", folder.display()))
                .arg(&file),
        )?;
        let wanted = if tso { Vec::new() } else { sockets.clone() };
        switch.wait_for("port sockets", Duration::from_secs(20), |_| wanted.iter().all(|s| s.exists()))?;
        let ovs = Self { kind, switch, _database: database, folder, sockets };
        if setup.connections > 0 && job != Job::Normal {
            // Both zones' entries count.
            ovs.ctl(&["dpctl/ct-set-maxconns", &(setup.connections as u64 * 4).max(3_000_000).to_string()])?;
        }
        Ok(ovs)
    }

    fn ctl(&self, arguments: &[&str]) -> Result<String> {
        process::output(command(&self.folder, "ovs-appctl").arg("-t").arg(self.folder.join("ctl")).args(arguments))
    }
}

impl System for Ovs {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    fn dials(&self) -> bool {
        matches!(self.kind, Kind::OvsL2Tso | Kind::OvsCtTso)
    }

    fn process(&mut self) -> &mut Process {
        &mut self.switch
    }

    fn connections(&mut self) -> Result<Option<u64>> {
        if !self.kind.stateful() {
            return Ok(None);
        }
        let text = self.ctl(&["dpctl/ct-get-nconns"])?;
        Ok(Some(text.trim().parse().with_context(|| format!("dpctl/ct-get-nconns: {text}"))?))
    }

    fn flush(&mut self) -> Result<()> {
        if self.kind.stateful() {
            self.ctl(&["dpctl/flush-conntrack"])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn per_port_flows_name_each_zone() {
        let text = flows(Job::ZonePerPort, 2, 3);
        assert!(text.contains("zone=1)") && text.contains("zone=2)"));
        assert_eq!(text.matches("nw_src=172.").count(), 6);
        assert!(!flows(Job::Normal, 2, 3).contains("ct("));
    }
}
