//! The kernel: a Linux bridge in a network namespace of its own, alone or with connection tracking and nftables.
//!
//! A kernel that forwards for guests is reached through vhost-net. Where there is none, a process has to stand between
//! the vhost-user sockets and the bridge: testpmd, from each vhost port to an AF_PACKET ring on a veth pair (quicker than its
//! tap driver, which makes a system call per frame). Its thread, and with it the kernel's work for what it sends (softirqs run
//! on the core that raised them), is on the switch core. So the figure holds two copies and testpmd's work besides the
//! kernel's, and is what the kernel reaches through these sockets, not what it could reach with guests of its own.
use super::{Kind, Setup, System, socket_paths};
use crate::process::{self, Process};
use crate::settings::Setting;
use anyhow::{Context, Result, bail};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const MOST_CONNECTIONS: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
const BUCKETS: &str = "/sys/module/nf_conntrack/parameters/hashsize";

/// The bridge with what serves its sockets. Field order is drop order: limits are put back when the switch is gone.
pub struct Kernel {
    kind: Kind,
    shim: Process,
    sockets: Vec<PathBuf>,
    _limits: Vec<Setting>,
}

/// The rules for nft in this family: what is established passes, what is new passes by a rule, the rest does not.
/// `rules` that match nothing that is sent come before that one.
pub fn ruleset(family: &str, rules: usize) -> String {
    let mut t = format!(
        "table {family} ferry_perf {{\n chain forward {{\n  type filter hook forward priority 0; policy drop;\n  \
         ct state established,related accept\n"
    );
    for i in 0..rules {
        // Writing to a String cannot fail.
        let _ = writeln!(
            t,
            "  ct state new ip saddr 172.{}.{}.0/24 tcp dport {} accept",
            16 + i / 256 % 16,
            i % 256,
            1 + i % 4000
        );
    }
    t += "  ct state new meta l4proto { tcp, udp } accept\n }\n}\n";
    t
}

/// What the namespace's first process does before it becomes testpmd.
fn script(setup: &Setup, firewall: bool) -> String {
    let mut t = String::from(
        "set -e\nsysctl -q -w net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1\n\
         ip link add br0 type bridge stp_state 0 mcast_snooping 0\n",
    );
    for i in 0..setup.ports {
        // Writing to a String cannot fail.
        let _ = write!(
            t,
            "ip link add v{i} mtu {0} type veth peer name e{i} mtu {0}\nip link set v{i} master br0\nip link set v{i} up\n\
             ip link set e{i} up\n",
            setup.mtu
        );
    }
    t += "ip link set br0 up\n";
    if firewall {
        // Connection tracking in the bridge itself (nf_conntrack_bridge) where the kernel has it; else packets take the way
        // through IP's hooks (br_netfilter).
        t += "sysctl -q -w net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0 2>/dev/null || true\n\
              if nft -f bridge.nft 2>/dev/null; then echo 'conntrack: nf_conntrack_bridge'\n\
              else sysctl -q -w net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1\n\
              nft -f inet.nft; echo 'conntrack: br_netfilter'; fi\n";
    } else {
        t += "sysctl -q -w net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0 2>/dev/null || true\n";
    }
    t + "exec \"$@\"\n"
}

impl Kernel {
    /// Sets the bridge up and starts testpmd between it and the sockets.
    ///
    /// # Errors
    /// When something is missing, the connection table cannot be made large enough, or there are no huge pages.
    pub fn start(setup: &Setup, firewall: bool) -> Result<Self> {
        let kind = if firewall { Kind::KernelFirewall } else { Kind::KernelL2 };
        let folder = setup.folder(kind.name())?;
        if setup.mtu > 1504 {
            bail!("testpmd's AF_PACKET driver takes no frames longer than 1518 bytes");
        }
        let mut limits = Vec::new();
        if firewall {
            // Of all namespaces together: only the first one's can be raised.
            let wanted = u64::from(setup.connections) * 2 + 4096;
            let too_small = || format!("the kernel's connection table cannot be made to hold {wanted} connections");
            limits.extend(Setting::at_least(MOST_CONNECTIONS, wanted).with_context(too_small)?);
            limits.extend(Setting::at_least(BUCKETS, wanted.next_power_of_two() / 2).with_context(too_small)?);
        }
        for family in ["bridge", "inet"] {
            std::fs::write(folder.join(format!("{family}.nft")), ruleset(family, setup.rules))?;
        }
        let sockets = socket_paths(&folder, setup.ports);
        let mut c = Command::new("unshare");
        c.current_dir(&folder).args(["--net", "sh", "-c", &script(setup, firewall), "sh"]);
        c.args(["stdbuf", "-o0", "dpdk-testpmd"]);
        c.arg(format!("--lcores=0@{},1@{}", setup.generator_core, setup.switch_core));
        c.args(["--in-memory", "--no-pci", "--no-telemetry", "-m", "256"]);
        for (i, socket) in sockets.iter().enumerate() {
            c.arg(format!("--vdev=net_vhost{i},iface={},queues=1", socket.display()));
            c.arg(format!("--vdev=net_af_packet{i},iface=e{i},framesz=2048,blocksz=4096,framecnt=512,qdisc_bypass=1"));
        }
        c.args(["--", "-i", "--nb-cores=1", "--forward-mode=io", "--auto-start", "--no-mlockall", "--burst=32"]);
        c.args(["--total-num-mbufs=32768", "--no-lsc-interrupt"]);
        let mut shim = Process::start(c, &folder.join("log")).context("apt-get install dpdk-dev")?;
        shim.wait_for("prompt", Duration::from_secs(30), |p| p.log().contains("testpmd> "))?;
        let wanted = sockets.clone();
        shim.wait_for("sockets", Duration::from_secs(10), |_| wanted.iter().all(|s| s.exists()))?;
        if firewall && !shim.log().contains("conntrack: ") {
            bail!("no rules were set:\n{}", shim.log());
        }
        Ok(Self { kind, shim, sockets, _limits: limits })
    }

    /// Runs a program in the switch's network namespace.
    fn inside(&self, arguments: &[&str]) -> Result<String> {
        let namespace = format!("--net=/proc/{}/ns/net", self.shim.id());
        process::output(Command::new("nsenter").arg(namespace).args(arguments))
    }
}

impl System for Kernel {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    fn process(&mut self) -> &mut Process {
        &mut self.shim
    }

    fn connections(&mut self) -> Result<Option<u64>> {
        if self.kind == Kind::KernelL2 {
            return Ok(None);
        }
        let text = self.inside(&["cat", "/proc/sys/net/netfilter/nf_conntrack_count"])?;
        Ok(Some(text.trim().parse().with_context(|| format!("nf_conntrack_count: {text}"))?))
    }

    fn flush(&mut self) -> Result<()> {
        if self.kind == Kind::KernelFirewall {
            self.inside(&["conntrack", "--flush"])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_let_established_and_new_connections_pass_and_nothing_else() {
        let text = ruleset("bridge", 3);
        assert!(text.contains("policy drop") && text.contains("ct state established,related accept"));
        assert_eq!(text.matches("ip saddr 172.").count(), 3);
        assert_eq!(text.matches("ct state new").count(), 4);
    }
}
