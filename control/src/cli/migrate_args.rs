//! What can be typed after `ferry pki` and `ferry migrate`.
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Subcommand, ValueHint};
use ferry_migrate::pki::{CA_DAYS, HOST_DAYS, MAX_DAYS, OVERLAP_DAYS};

use crate::config::DEFAULT_CONFIG;

const PKI_HELP: &str = "\
Example: two hosts.
  ferry pki init /root/ferry-pki
  ferry pki issue /root/ferry-pki host-a
  ferry pki issue /root/ferry-pki host-b
  ferry pki show /root/ferry-pki
Each command says which file goes where. On the hosts all of them go to the directory that `migration.pki` names.
The directory with the authority's key belongs on a machine that is none of the hosts.";

const ROTATE_HELP: &str = "\
Examples:
  ferry pki rotate /root/ferry-pki --host host-a     a new key and certificate for host-a
  ferry pki rotate /root/ferry-pki                   a new generation of the authority
After a rotation of the authority first give every host the new trust.pem, then rotate every host's certificate, one by one,
before the overlap ends. `ferry pki show` says what is left to do.";

const MIGRATE_HELP: &str = "\
Connections migrate by themselves when QEMU migrates a VM: libvirt and Nova need no change. Around it:
  ferry migrate check web1 --to host-b       before: would it work? If not, what to do about it?
  ferry migrate expect web1 --from host-a    at the destination, where its configuration says `expect = false`
  ferry migrate watch web1                   during: rounds as they end
  ferry migrate list web1                    afterwards: what each migration took
  ferry migrate audit                        at any time: is the audit log as it was written?";

const WATCH_HELP: &str = "\
Waits for a migration to begin if none is under way. Ends when it ends: status 0 when the VM's connections have migrated, else 1.
Example, in one terminal and in another:
  ferry migrate watch web1
  virsh migrate --live web1 qemu+ssh://host-b/system";

const CHECK_HELP: &str = "\
Asks this host and the other one: reachability, certificates, rules, versions, capacity, policy, ports. Changes nothing.
Exit status: 0 nothing would fail (there may be warnings), 1 something would.
Example:
  ferry migrate check web1 --to host-b && virsh migrate --live web1 qemu+ssh://host-b/system";

const EXPECT_HELP: &str = "\
Said at the destination. The rules must allow the migration besides.
Examples:
  ferry migrate expect web1 --from host-a --for 30m
  ferry migrate expect web1 --withdraw";

const AUDIT_HELP: &str = "\
Checks signatures, numbers and links of every line, needs no daemon, and can be done on any machine that has a copy of the log.
Exit status: 0 the log is as it was written, 1 it is not.
Whoever checks a log should not take the key from the host that wrote it: `ferry pki show DIR --json` tells the hosts' keys, and the key
that signed the log's first line is the one to give. Later ones are announced by lines that the former key signed.
Examples:
  ferry migrate audit
  ferry migrate audit --file host-a-audit.log --key /root/ferry-pki/hosts/host-a.pem";

fn days() -> impl clap::builder::TypedValueParser<Value = u32> {
    clap::value_parser!(u32).range(1..=i64::from(MAX_DAYS))
}

/// `ferry pki`
#[derive(Debug, Subcommand)]
#[command(after_long_help = PKI_HELP)]
pub enum PkiCommand {
    /// Makes a private certificate authority in a directory.
    Init {
        /// The directory; made if it is not there. Only its owner can enter it.
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
        /// The authority's name, shown in its certificates.
        #[arg(long, default_value = "Ferry")]
        name: String,
        /// How long it is valid, days.
        #[arg(long, default_value_t = CA_DAYS, value_parser = days())]
        days: u32,
    },
    /// Makes the key and certificate of a host.
    #[command(after_long_help = PKI_HELP)]
    Issue {
        /// The authority's directory.
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
        /// The host's name: what peers and rules call it, and its identity.
        host: String,
        /// An address that is named in the certificate besides; may be given several times. It identifies nobody.
        #[arg(long, value_name = "IP")]
        address: Vec<IpAddr>,
        /// How long it is valid, days; not longer than the authority.
        #[arg(long, default_value_t = HOST_DAYS, value_parser = days())]
        days: u32,
    },
    /// Replaces a host's key and certificate, or, without --host, the authority's. Both are valid for a while.
    #[command(after_long_help = ROTATE_HELP)]
    Rotate {
        /// The authority's directory.
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
        /// The host.
        #[arg(long)]
        host: Option<String>,
        /// How long the new one is valid, days. Default: 397 for a host, 3650 for the authority.
        #[arg(long, value_parser = days())]
        days: Option<u32>,
        /// How long the old one stays valid, days. For a host 0 is possible: revoked at once.
        #[arg(long, default_value_t = OVERLAP_DAYS, value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_DAYS)))]
        overlap_days: u32,
    },
    /// Revokes a host's certificate at once and removes its key. Takes effect where the new revoked.pem is installed.
    Revoke {
        /// The authority's directory.
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
        /// The host.
        host: String,
    },
    /// Shows the authority and all hosts' certificates, and what should be done about them.
    Show {
        /// The authority's directory.
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
}

/// `ferry migrate`
#[derive(Debug, Subcommand)]
#[command(after_long_help = MIGRATE_HELP)]
pub enum MigrateCommand {
    /// Shows this host's part in migrations and the latest migration of each VM; of one VM in detail.
    Status {
        /// The VM.
        vm: Option<String>,
    },
    /// Lists past migrations, oldest first, one line each. With --json: all figures of every round.
    List {
        /// Of this VM; all VMs without.
        vm: Option<String>,
        /// At most so many, the latest.
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
        limit: Option<u64>,
    },
    /// Follows a migration live: progress, and a line per round as it ends. With --json: one object per line whenever something changes.
    #[command(after_long_help = WATCH_HELP)]
    Watch {
        /// Of this VM. Without: all that are under way, until none is any more.
        vm: Option<String>,
        /// Shows it once as it is now: status 1 if it has ended otherwise than by migrating.
        #[arg(long)]
        once: bool,
    },
    /// Says whether a migration would work, what would fail, and how to fix it.
    #[command(after_long_help = CHECK_HELP)]
    Check {
        /// The VM.
        vm: String,
        /// The host it is to go to, as [[migration.peer]] names it.
        #[arg(long, value_name = "HOST")]
        to: String,
    },
    /// Announces that a VM will come to this host, so that it may.
    #[command(after_long_help = EXPECT_HELP)]
    Expect {
        /// The VM.
        vm: String,
        /// The only host it may come from; any that the rules allow without.
        #[arg(long, value_name = "HOST", conflicts_with = "withdraw")]
        from: Option<String>,
        /// For how long, such as 90s, 10m or 2h.
        #[arg(long = "for", value_name = "TIME", default_value = "10m", value_parser = time, conflicts_with = "withdraw")]
        for_time: Duration,
        /// Takes the announcement back.
        #[arg(long)]
        withdraw: bool,
    },
    /// Ends the migration of a VM's connections that is under way. QEMU's own goes on: cancel that first (virsh domjobabort).
    Cancel {
        /// The VM.
        vm: String,
    },
    /// Verifies an audit log: that no line was changed, inserted, removed or cut off.
    #[command(after_long_help = AUDIT_HELP)]
    Audit {
        /// The log. Absent: `migration.audit_log` of the configuration.
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: Option<PathBuf>,
        /// A host's public key: 64 hexadecimal digits, or a file with its certificate; may be given several times. Absent: that of
        /// this host's certificate, by the configuration.
        #[arg(long, value_name = "KEY")]
        key: Vec<String>,
        /// The configuration that says what is absent.
        #[arg(long, value_name = "FILE", default_value = DEFAULT_CONFIG, value_hint = ValueHint::FilePath)]
        config: PathBuf,
    },
}

/// Longest time that a VM can be announced for.
const MAX_EXPECT: Duration = Duration::from_secs(7 * 86_400);

/// A time such as `90s`, `10m` or `2h`; a number alone counts seconds.
fn time(text: &str) -> Result<Duration, String> {
    let (number, unit_s) = match text.strip_suffix(['s', 'm', 'h', 'd']) {
        Some(number) if text.ends_with('d') => (number, 86_400),
        Some(number) if text.ends_with('h') => (number, 3600),
        Some(number) if text.ends_with('m') => (number, 60),
        Some(number) => (number, 1),
        None => (text, 1),
    };
    let seconds = number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit_s));
    let time = seconds.map(Duration::from_secs).ok_or("write a time such as 90s, 10m or 2h")?;
    if time.is_zero() || time > MAX_EXPECT {
        return Err("must be 1s to 7d".to_owned());
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("7d", 604_800)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "m", "-1s", "1w", "1.5h", "0", "8d", "99999999999999999999h", "18446744073709551615h"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
