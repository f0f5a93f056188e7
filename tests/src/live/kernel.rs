//! Linux's own firewall on a bridge, in a network namespace that ends with the thread it belongs to.
use super::packet::{MAC_A, MAC_B};
use super::socket::{Nfnetlink, PacketSocket, own_network_namespace, stay_on_this_cpu};
use super::{Profile, Side, Step};
use crate::wait;
use anyhow::{Context, Result, anyhow, bail, ensure};
use ferry_dataplane::testing::replay::CtLine;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The policy of [`super::own`], in nftables' words, after one rule per state that only reports it.
const RULES: &str = "
table inet ferry {
 chain report {
  type filter hook forward priority -10; policy accept;
  ct state invalid log prefix \"inv\" group 7 queue-threshold 1
  ct state new log prefix \"new\" group 7 queue-threshold 1
  ct state established log prefix \"est\" group 7 queue-threshold 1
  ct state related log prefix \"rel\" group 7 queue-threshold 1
  ct state untracked log prefix \"untr\" group 7 queue-threshold 1
 }
 chain decide {
  type filter hook forward priority 0; policy drop;
  ct state invalid drop
  ct state established,related accept
  ct state untracked accept
  ether saddr 02:00:00:00:00:0a tcp dport 25 drop
  ether saddr 02:00:00:00:00:0a accept
  ether saddr 02:00:00:00:00:0b tcp dport {80,443} accept
  ether saddr 02:00:00:00:00:0b udp dport 53 accept
  ether saddr 02:00:00:00:00:0b icmp type echo-request accept
  ether saddr 02:00:00:00:00:0b icmpv6 type echo-request accept
 }
}";

/// The group that [`RULES`] log to.
const LOG_GROUP: u16 = 7;
/// IEEE 802 local experimental EtherType 1: nobody's protocol, so netfilter does not see it.
const SENTINEL_ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// What the kernel did with one frame.
#[derive(Clone, Debug)]
pub struct Observed {
    /// What the packet was to conntrack: `new`, `est`, `rel`, `inv`, `untr`; none when it was held or dropped before.
    pub ct_state: Option<String>,
    /// What came out at the other end.
    pub out: Vec<Vec<u8>>,
    /// The table afterwards, sorted.
    pub ct: Vec<CtLine>,
}

/// A namespace with two hosts' ends of a bridge that is filtered.
pub struct Kernel {
    a: PacketSocket,
    b: PacketSocket,
    netfilter: Nfnetlink,
    log: Nfnetlink,
    sentinels: u64,
}

/// A frame that passes whatever the firewall does.
fn sentinel(from: Side, number: u64) -> Vec<u8> {
    let (dst, src) = if from == Side::A { (MAC_B, MAC_A) } else { (MAC_A, MAC_B) };
    [&dst[..], &src, &SENTINEL_ETHERTYPE, &number.to_be_bytes(), &[0; 40]].concat()
}

fn set(path: &str, value: &str) -> Result<()> {
    std::fs::write(path, value).with_context(|| format!("{path}: the kernel lacks it, or this needs root"))
}

/// Runs a tool to its end. Started by this very thread, whose namespace it is to act in; they are of the kind that ends at once.
fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("{program} is needed: scripts/deps.sh installs it"))?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {args:?}: {}: {message}", output.status);
    Ok(())
}

impl Kernel {
    /// Calls `f` with a fresh kernel side, in a thread of its own.
    ///
    /// # Errors
    /// What `f` gives; when the kernel lacks something or this is not allowed.
    pub fn with<R: Send>(f: impl FnOnce(&mut Self) -> Result<R> + Send) -> Result<R> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| f(&mut Self::new()?));
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// In this thread.
    fn new() -> Result<Self> {
        own_network_namespace().context("a network namespace: needs root")?;
        stay_on_this_cpu()?;
        if !std::path::Path::new("/proc/sys/net/bridge").exists() {
            run("modprobe", &["br_netfilter"]).context("the kernel's br_netfilter is needed")?;
        }
        // No packets of the kernel's own.
        for scope in ["all", "default"] {
            set(&format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1")?;
        }
        for link in ["br0 type bridge mcast_snooping 0", "a0 type veth peer name a1", "b0 type veth peer name b1"] {
            run("ip", &[&["link", "add"][..], &link.split(' ').collect::<Vec<_>>()].concat())?;
        }
        for link in ["a1", "b1"] {
            run("ip", &["link", "set", link, "master", "br0"])?;
        }
        for link in ["br0", "a0", "a1", "b0", "b1"] {
            run("ip", &["link", "set", link, "up", "arp", "off"])?;
        }
        for link in ["a0", "a1", "b0", "b1"] {
            // Else veth vouches for every checksum.
            run("ethtool", &["-K", link, "rx", "off", "tx", "off", "gro", "off", "gso", "off", "tso", "off"])?;
        }
        for family in ["ip", "ip6"] {
            set(&format!("/proc/sys/net/bridge/bridge-nf-call-{family}tables"), "1")?;
        }
        run("nft", &[RULES])?;
        // Pieces of datagrams that are never completed pile up here; the conversations themselves never need much.
        set("/proc/sys/net/ipv4/ipfrag_high_thresh", "1000000000")?;
        set("/proc/sys/net/netfilter/nf_conntrack_frag6_high_thresh", "1000000000")?;
        let mut log = Nfnetlink::open()?;
        log.subscribe_log(LOG_GROUP)?;
        let mut kernel = Self {
            a: PacketSocket::open("a0")?,
            b: PacketSocket::open("b0")?,
            netfilter: Nfnetlink::open()?,
            log,
            sentinels: 0,
        };
        kernel.wait_for_path()?;
        kernel.prove()?;
        Ok(kernel)
    }

    /// A bridge port forwards a little after its link has come up.
    fn wait_for_path(&mut self) -> Result<()> {
        for from in [Side::A, Side::B] {
            let opened = wait::for_some("the path over the bridge", Duration::from_secs(20), || {
                self.sentinels += 1;
                let sentinel = sentinel(from, self.sentinels);
                let (near, far) = self.ends(from);
                near.send(&sentinel).ok()?;
                far.until(&sentinel, Duration::from_millis(20)).ok()
            });
            opened?;
        }
        Ok(())
    }

    /// The socket where a frame enters, and the one where it comes out.
    fn ends(&self, from: Side) -> (&PacketSocket, &PacketSocket) {
        match from {
            Side::A => (&self.a, &self.b),
            Side::B => (&self.b, &self.a),
        }
    }

    /// That what is observed is what is meant: nothing else would notice a filter that filters nothing.
    fn prove(&mut self) -> Result<()> {
        use super::packet::{Hosts, Segment, flag};
        self.begin(Profile::Default)?;
        for v4 in [true, false] {
            let mut hosts = Hosts::new(0x00ff_ffff, v4);
            let mut syn = |port| {
                let segment = Segment { seq: 1, flags: flag::SYN, window: 1000, ..Segment::default() };
                let ip = hosts.tcp(Side::B, (1024, port), &segment, false);
                Step { from: Side::B, frame: hosts.frame(Side::B, &ip) }
            };
            let (allowed, denied) = (syn(80), syn(22));
            for (step, passes) in [(denied, false), (allowed, true)] {
                let seen = self.step(&step)?;
                let out = if passes { vec![step.frame.clone()] } else { Vec::new() };
                ensure!(
                    seen.ct_state.as_deref() == Some("new") && seen.out == out && seen.ct.len() == usize::from(passes),
                    "the kernel does not filter bridged frames with nftables and conntrack as needed: {seen:?}"
                );
            }
            self.begin(Profile::Default)?;
        }
        Ok(())
    }

    /// Empties the table, and sets the switches.
    ///
    /// # Errors
    /// When the kernel lacks one.
    pub fn begin(&mut self, profile: Profile) -> Result<()> {
        for (name, on) in profile.switches() {
            set(&format!("/proc/sys/net/netfilter/{name}"), if on { "1" } else { "0" })?;
        }
        self.netfilter.flush_connections()
    }

    /// Sends a frame, and sees what comes of it.
    ///
    /// # Errors
    /// When the harness fails; never by what the firewall does.
    pub fn step(&mut self, step: &Step) -> Result<Observed> {
        self.sentinels += 1;
        let sentinel = sentinel(step.from, self.sentinels);
        let (near, far) = self.ends(step.from);
        near.send(&step.frame).with_context(|| format!("sending {} bytes", step.frame.len()))?;
        // Queues are first in, first out: once this has arrived, so has all that was to.
        near.send(&sentinel).context("sending a sentinel")?;
        let out = far.until(&sentinel, Duration::from_secs(10))?;
        if let Some(frame) = near.try_receive()? {
            bail!("a frame came back to its sender: {frame:02x?}");
        }
        let mut states = self.log.logged()?;
        ensure!(states.len() <= 1, "one packet was judged more than once: {states:?}");
        Ok(Observed { ct_state: states.pop(), out, ct: table()? })
    }
}

/// The namespace's connections.
fn table() -> Result<Vec<CtLine>> {
    const PATH: &str = "/proc/thread-self/net/nf_conntrack";
    let text = std::fs::read_to_string(PATH)
        .with_context(|| format!("{PATH}: the kernel needs CONFIG_NF_CONNTRACK_PROCFS"))?;
    let mut lines =
        text.lines().map(|line| parse(line).ok_or_else(|| anyhow!("{PATH}: {line}"))).collect::<Result<Vec<_>>>()?;
    lines.sort();
    Ok(lines)
}

/// `ipv4 2 tcp 6 431999 ESTABLISHED src=... dst=... sport=... dport=... src=... [ASSURED] mark=0 zone=0 use=2`
fn parse(line: &str) -> Option<CtLine> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, _, name, number, seconds, ..] = words.as_slice() else { return None };
    let sources: Vec<usize> = (0..words.len()).filter(|i| words[*i].starts_with("src=")).collect();
    let [first, second] = sources.as_slice() else { return None };
    let orig = words[*first..*second].iter().filter(|word| {
        let key = word.split('=').next().unwrap_or_default();
        matches!(key, "src" | "dst" | "sport" | "dport" | "type" | "code" | "id")
            // GRE's keys are not in our lines.
            && (*name != "gre" || matches!(key, "src" | "dst"))
    });
    let flags = ["UNREPLIED", "ASSURED"].into_iter().filter(|f| line.contains(&format!("[{f}]")));
    Some(CtLine {
        proto: if *name == "unknown" { *number } else { *name }.to_owned(),
        state: (*first == 6).then(|| words[5].to_owned()),
        flags: flags.map(str::to_owned).collect(),
        orig: orig.copied().collect::<Vec<_>>().join(" "),
        timeout_ms: seconds.parse::<u32>().ok()?.saturating_mul(1000),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_are_read() {
        let line = "ipv4     2 tcp      6 119 SYN_SENT src=10.0.0.1 dst=11.0.0.1 sport=5 dport=80 [UNREPLIED] \
                    src=11.0.0.1 dst=10.0.0.1 sport=80 dport=5 mark=0 zone=0 use=2";
        let entry = parse(line).unwrap();
        assert_eq!((entry.proto.as_str(), entry.state.as_deref()), ("tcp", Some("SYN_SENT")));
        assert_eq!((entry.orig.as_str(), entry.timeout_ms), ("src=10.0.0.1 dst=11.0.0.1 sport=5 dport=80", 119_000));
        assert_eq!(entry.flags, ["UNREPLIED"]);
        let line =
            "ipv4     2 unknown  50 599 src=10.0.0.1 dst=11.0.0.1 [UNREPLIED] src=11.0.0.1 dst=10.0.0.1 mark=0 use=2";
        let entry = parse(line).unwrap();
        assert_eq!((entry.proto.as_str(), entry.state, entry.orig.as_str()), ("50", None, "src=10.0.0.1 dst=11.0.0.1"));
        assert!(parse("ipv4 2 tcp").is_none());
    }
}
