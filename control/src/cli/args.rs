//! What can be typed.
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueHint};
use clap_complete::Shell;

use super::migrate_args::{MigrateCommand, PkiCommand};
use crate::config::{DEFAULT_CONFIG, DEFAULT_SOCKET};
use crate::firewall::filter::FilterText;

/// Poll-mode virtual switch for QEMU guests over vhost-user, with DPDK uplinks.
///
/// Signals: SIGHUP reads the configuration again and applies what changed, wholly or not at all; SIGTERM and SIGINT stop in order.
/// Readiness is reported to systemd (Type=notify). Exit status: 0 stopped in order, 1 could not start, 2 invalid configuration.
#[derive(Debug, Parser)]
#[command(name = "ferryd", version)]
pub struct DaemonArgs {
    /// Configuration file.
    #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG, value_hint = ValueHint::FilePath)]
    pub config: PathBuf,
    /// Only check the configuration.
    #[arg(long)]
    pub check: bool,
}

/// Shows and changes what the virtual switch ferryd does.
///
/// Exit status: 0 done; 1 ferryd refused or failed, or a migration, check or audit log was found wanting; 2 wrong usage or invalid configuration; 3 ferryd cannot be reached;
/// 4 no such port, bridge, queue, VM, group or migration; 5 `stats --check` found counters that do not add up.
#[derive(Debug, Parser)]
#[command(name = "ferry", version, propagate_version = true, max_term_width = 110)]
pub struct Cli {
    /// The API's socket.
    #[arg(long, global = true, value_name = "PATH", env = "FERRY_SOCKET", default_value = DEFAULT_SOCKET, value_hint = ValueHint::FilePath)]
    pub socket: PathBuf,
    /// Prints the API's answer as JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Shows how the daemon is doing, and what differs from the configuration file.
    Status,
    /// Ports.
    #[command(subcommand)]
    Port(PortCommand),
    /// Bridges.
    #[command(subcommand)]
    Bridge(BridgeCommand),
    /// Learned addresses.
    #[command(subcommand)]
    Fdb(FdbCommand),
    /// Shows counters and checks that every received frame was forwarded, held (a fragment) or dropped for a named reason.
    Stats(StatsArgs),
    /// PMD threads.
    #[command(subcommand)]
    Pmd(PmdCommand),
    /// Connections that the VMs' firewalls track.
    #[command(subcommand)]
    Conntrack(ConntrackCommand),
    /// Security groups, address sets, and what ports make of them.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Walks one packet through every stage of the switch, without any effect: names the rule, the connection and the output that decide.
    #[command(after_long_help = PACKET_HELP, after_help = "`ferry trace --help` describes packets.")]
    Trace {
        /// The VM, or a port.
        vm: String,
        /// The packet in words, in quotes, such as "tcp 10.0.0.1:40000 > 10.0.0.2:22 syn".
        packet: String,
        /// Which of the VM's ports; found by the packet's addresses without.
        #[arg(long)]
        port: Option<String>,
    },
    /// What the firewall denied.
    #[command(subcommand)]
    Fw(FwCommand),
    /// Migration of VMs' connections along with the VMs.
    #[command(subcommand)]
    Migrate(MigrateCommand),
    /// Keys and certificates of the hosts between which VMs migrate. Needs no daemon.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Applies what changed in the configuration file, wholly or not at all. Changes made at run time stay where the file did not change.
    Reload {
        /// Drops changes made at run time.
        #[arg(long)]
        discard_runtime: bool,
        /// Only shows what would be done.
        #[arg(long)]
        dry_run: bool,
    },
    /// Configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Sets the least severity that is logged (or a filter) until the next start.
    Log {
        /// "error", "warn", "info", "debug", "trace", or a filter such as "info,ferry_vhost=debug".
        level: String,
    },
    /// Prints a completion script.
    Completions {
        /// For this shell.
        shell: Shell,
        /// For ferryd instead of ferry.
        #[arg(long)]
        daemon: bool,
    },
    /// Writes the man pages of ferry and ferryd.
    Man {
        /// Into this directory.
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        out: PathBuf,
    },
}

/// Settings as `KEY=VALUE`.
#[derive(Debug, Args)]
pub struct Settings {
    /// Settings, named as in the configuration file, such as `mtu=9000`, `features.packed=false`, `rxq_affinity=[0,1]`. An empty value restores the default.
    #[arg(value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Only shows what would be done.
    #[arg(long)]
    pub dry_run: bool,
}

/// VLAN membership.
#[derive(Debug, Args)]
pub struct VlanArgs {
    /// Untagged frames, all of this VLAN.
    #[arg(long, value_name = "VLAN", conflicts_with_all = ["trunk", "native"])]
    pub access: Option<u16>,
    /// Tagged frames of these VLANs, such as `100-199,300`; `all` for every VLAN.
    #[arg(long, value_name = "VLANS")]
    pub trunk: Option<String>,
    /// VLAN of untagged frames on a trunk.
    #[arg(long, value_name = "VLAN")]
    pub native: Option<u16>,
    /// Sends the native VLAN tagged.
    #[arg(long, requires = "native")]
    pub native_tagged: bool,
}

/// `ferry port`
#[derive(Debug, Subcommand)]
pub enum PortCommand {
    /// Lists the ports.
    List,
    /// Shows a port with everything known about it.
    Show {
        /// The port.
        name: String,
    },
    /// Adds a port until the next start. Give --vhost-user or --dpdk.
    Add {
        /// Its name.
        name: String,
        /// The bridge it belongs to.
        #[arg(long)]
        bridge: String,
        /// A guest's NIC: path of the vhost-user socket.
        #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, required_unless_present = "dpdk", conflicts_with = "dpdk")]
        vhost_user: Option<String>,
        /// Connects to the socket, on which QEMU listens, instead of listening.
        #[arg(long, requires = "vhost_user")]
        client: bool,
        /// A DPDK device: PCI address, or virtual device with its arguments.
        #[arg(long, value_name = "DEVICE")]
        dpdk: Option<String>,
        #[command(flatten)]
        vlan: VlanArgs,
        #[command(flatten)]
        settings: Settings,
    },
    /// Changes a port. Bridge, VLANs, admin_up, fdb_limit and rxq_affinity change without disturbing it.
    Set {
        /// The port.
        name: String,
        #[command(flatten)]
        vlan: VlanArgs,
        #[command(flatten)]
        settings: Settings,
    },
    /// Removes a port.
    Remove {
        /// The port.
        name: String,
        /// Only shows what would be done.
        #[arg(long)]
        dry_run: bool,
    },
}

/// `ferry bridge`
#[derive(Debug, Subcommand)]
pub enum BridgeCommand {
    /// Lists the bridges.
    List,
    /// Adds a bridge until the next start.
    Add {
        /// Its name.
        name: String,
        #[command(flatten)]
        settings: Settings,
    },
    /// Changes a bridge.
    Set {
        /// The bridge.
        name: String,
        #[command(flatten)]
        settings: Settings,
    },
    /// Removes a bridge that has no ports.
    Remove {
        /// The bridge.
        name: String,
        /// Only shows what would be done.
        #[arg(long)]
        dry_run: bool,
    },
}

/// `ferry fdb`
#[derive(Debug, Subcommand)]
pub enum FdbCommand {
    /// Shows learned addresses.
    Show {
        /// Of this bridge; all bridges without.
        bridge: Option<String>,
        /// Only behind this port.
        #[arg(long)]
        port: Option<String>,
    },
    /// Forgets learned addresses.
    Flush {
        /// Of this bridge.
        bridge: String,
        /// Only behind this port.
        #[arg(long)]
        port: Option<String>,
    },
}

/// `ferry stats`
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// Only this port.
    #[arg(long)]
    pub port: Option<String>,
    /// Shows them again and again, with rates; every so many seconds.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub watch: Option<u64>,
    /// Fails (status 5) unless received = forwarded + held + dropped on every queue, which holds whenever no burst is under way.
    #[arg(long, conflicts_with = "watch")]
    pub check: bool,
}

/// `ferry pmd`
#[derive(Debug, Subcommand)]
pub enum PmdCommand {
    /// Shows PMD threads, their load and their queues.
    Show,
    /// Shows what a frame costs each PMD thread, in cycles by stage.
    Perf,
    /// Gives a port's receive queue to another PMD thread.
    Assign {
        /// The port.
        port: String,
        /// The queue, from 0.
        queue: u32,
        /// The PMD thread, from 0.
        pmd: u32,
    },
}

/// How packets are described.
const PACKET_HELP: &str = "\
A packet in words:
  tcp SOURCE:PORT > DESTINATION:PORT    syn ack fin rst psh urg ece cwr (none: syn), seq N, ackno N, win N
  udp|sctp SOURCE:PORT > DESTINATION:PORT
  icmp|icmpv6 SOURCE > DESTINATION      echo-request (default), echo-reply, type N, code N, id N, seq N
  icmpv6 SOURCE > DESTINATION           neighbour-solicitation, neighbour-advertisement, target ADDRESS
  gre|esp|ah|proto N SOURCE > DESTINATION
  arp who-has ADDRESS tell ADDRESS
  arp ADDRESS is-at MAC
  hex:...                               a whole Ethernet frame
Anywhere: in (towards the VM) or out, vlan N, smac MAC, dmac MAC, ttl N, len N (bytes of payload).
IPv6 addresses with a port stand in brackets: udp [fd00::1]:53 > [fd00::2]:5353
The direction is found by the VM's addresses where it can be, MAC addresses by those of the ports.";

/// `ferry conntrack`
#[derive(Debug, Subcommand)]
pub enum ConntrackCommand {
    /// Lists connections, one line each as `conntrack -L` prints them, with vm=NAME at the end. With --json: one array.
    List {
        /// Of this VM; all VMs without.
        vm: Option<String>,
        #[command(flatten)]
        filter: FilterText,
        /// At most so many.
        #[arg(long, value_name = "COUNT")]
        limit: Option<u64>,
    },
    /// Forgets connections. Their next packets are judged anew.
    Flush {
        /// Of this VM; all VMs without.
        vm: Option<String>,
        #[command(flatten)]
        filter: FilterText,
        /// Allows to forget all connections of all VMs.
        #[arg(long)]
        all: bool,
    },
    /// Shows connection tables and limits, and what was denied and why.
    Stats {
        /// Of this VM, in detail; all VMs without.
        vm: Option<String>,
    },
}

/// `ferry policy`
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Shows groups, address sets and ports; one of them in detail.
    Show {
        /// A port, a security group or an address set.
        name: Option<String>,
    },
    /// Checks a file that holds a configuration, or groups and sets alone, and compiles every port's rules. Needs no daemon.
    Check {
        /// The file.
        #[arg(value_hint = ValueHint::FilePath, default_value = DEFAULT_CONFIG)]
        file: PathBuf,
    },
    /// Says which rule decides about a packet that begins a connection, and why.
    #[command(after_long_help = PACKET_HELP, after_help = "`ferry policy explain --help` describes packets.")]
    Explain {
        /// The port.
        port: String,
        /// The packet in words, in quotes, such as "tcp 10.0.0.1:40000 > 10.0.0.2:22 syn".
        packet: String,
        /// Asks this configuration file instead of the daemon.
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: Option<PathBuf>,
    },
}

/// `ferry fw`
#[derive(Debug, Subcommand)]
pub enum FwCommand {
    /// Shows what was denied lately and why: the latest first, attempts that differ in nothing but their source port in one line.
    Drops {
        /// In this VM; all VMs without.
        vm: Option<String>,
        /// At most so many lines.
        #[arg(long, value_name = "COUNT", default_value_t = 40)]
        limit: u64,
        /// Shows them again and again; every so many seconds.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = clap::value_parser!(u64).range(1..=3600))]
        watch: Option<u64>,
    },
}

/// `ferry config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Checks a configuration file: names line, column and the fix. Needs no daemon.
    Check {
        /// The file.
        #[arg(value_hint = ValueHint::FilePath, default_value = DEFAULT_CONFIG)]
        file: PathBuf,
    },
    /// Prints the configuration in effect, as TOML that a file could hold.
    Show,
    /// Prints the reference of all keys. Needs no daemon.
    Reference,
}
