//! The binaries as a user and a service manager see them, with real vhost-user ports (no guest needed).
mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{eventually, write_config};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

const FERRY: &str = env!("CARGO_BIN_EXE_ferry");
const FERRYD: &str = env!("CARGO_BIN_EXE_ferryd");

const CONFIG: &str = r#"
[[bridge]]
name = "br0"
[[port]]
name = "vm1"
type = "vhost-user"
bridge = "br0"
socket = "DIR/vm1.sock"
[[port]]
name = "vm2"
type = "vhost-user"
bridge = "br0"
socket = "DIR/vm2.sock"
socket_mode = "0600"
"#;

struct Ferryd {
    child: Child,
    dir: TempDir,
    manager: UnixDatagram,
}

impl Ferryd {
    fn start(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_config(&dir.path().join("ferry.toml"), dir.path(), config);
        Self::start_in(dir)
    }

    fn start_in(dir: TempDir) -> Self {
        let address = dir.path().join("notify");
        let _ = std::fs::remove_file(&address);
        let manager = UnixDatagram::bind(&address).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.path().join("log")).unwrap();
        let child = Command::new(FERRYD)
            .args(["--config", "ferry.toml"])
            .current_dir(dir.path())
            .env("NOTIFY_SOCKET", &address)
            .stderr(log)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let daemon = Self { child, dir, manager };
        let ready = daemon.notification();
        assert!(ready.starts_with("READY=1\nSTATUS="), "{ready}");
        daemon
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn notification(&self) -> String {
        let mut buf = [0; 512];
        match self.manager.recv(&mut buf) {
            Ok(n) => String::from_utf8_lossy(&buf[..n]).into_owned(),
            Err(e) => panic!("no notification: {e}\n{}", self.log()),
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    fn write(&self, config: &str) {
        write_config(&self.path("ferry.toml"), self.dir.path(), config);
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn ferry(&self, args: &[&str]) -> Output {
        ferry(&self.path("api.sock"), args)
    }

    /// Standard output of a command that succeeds.
    fn ok(&self, args: &[&str]) -> String {
        let out = self.ferry(args);
        assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
        assert_eq!(text(&out.stderr), "", "{args:?}");
        text(&out.stdout)
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[args, &["--json"]].concat())).unwrap()
    }
}

impl Drop for Ferryd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ferry(socket: &Path, args: &[&str]) -> Output {
    Command::new(FERRY).arg("--socket").arg(socket).args(args).env_remove("FERRY_SOCKET").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_life_under_a_service_manager() {
    let mut d = Ferryd::start(CONFIG);
    let mode = |name: &str| std::fs::metadata(d.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("api.sock"), mode("vm1.sock"), mode("vm2.sock")), (0o660, 0o660, 0o600));

    // SIGHUP applies what changed.
    d.write(&CONFIG.replace("socket_mode = \"0600\"", "admin_up = false"));
    d.signal(Signal::SIGHUP);
    assert!(d.notification().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert!(d.notification().starts_with("READY=1"));
    assert_eq!(d.json(&["port", "show", "vm2"])["state"], "disabled");

    // A broken file is refused, the daemon goes on as it was.
    d.write("nonsense");
    d.signal(Signal::SIGHUP);
    assert!(d.notification().starts_with("RELOADING=1"));
    assert!(d.notification().starts_with("READY=1"));
    assert!(d.log().contains("reload refused, nothing was changed"), "{}", d.log());
    assert!(d.log().contains("ferry.toml:2:"), "{}", d.log());
    assert_eq!(d.json(&["port", "show", "vm2"])["state"], "disabled");

    d.signal(Signal::SIGTERM);
    assert_eq!(d.notification(), "STOPPING=1\n");
    assert!(d.child.wait().unwrap().success());
    for name in ["api.sock", "vm1.sock", "vm2.sock"] {
        assert!(!d.path(name).exists(), "{name} is left");
    }
    assert!(d.log().contains("ferryd has stopped"));
}

#[test]
fn a_second_daemon_is_refused_and_a_dead_ones_sockets_are_replaced() {
    let mut d = Ferryd::start(CONFIG);
    let inode = |d: &Ferryd, name: &str| std::fs::metadata(d.path(name)).unwrap().ino();
    let (api, vm1) = (inode(&d, "api.sock"), inode(&d, "vm1.sock"));
    let second = Command::new(FERRYD).arg("--config").arg(d.path("ferry.toml")).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = text(&second.stderr);
    let expected = format!("another ferryd (pid {}) serves {}", d.child.id(), d.path("api.sock").display());
    assert!(said.contains(&expected) && said.contains("api.socket"), "{said}");
    assert_eq!((inode(&d, "api.sock"), inode(&d, "vm1.sock")), (api, vm1), "nothing was touched");
    d.ok(&["status"]);

    d.signal(Signal::SIGKILL);
    d.child.wait().unwrap();
    assert!(d.path("api.sock").exists() && d.path("vm1.sock").exists());
    let out = d.ferry(&["status"]);
    assert_eq!(out.status.code(), Some(3));
    let dir = std::mem::replace(&mut d.dir, tempfile::tempdir().unwrap());
    let d = Ferryd::start_in(dir);
    assert!(d.ok(&["status"]).contains("2 port(s) (2 waiting)"));
}

#[test]
fn what_is_in_the_way_of_the_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    write_config(&dir.path().join("ferry.toml"), dir.path(), CONFIG);
    std::fs::write(dir.path().join("api.sock"), "precious").unwrap();
    let out = Command::new(FERRYD).arg("--config").arg(dir.path().join("ferry.toml")).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("exists and is not a socket"), "{}", text(&out.stderr));
    assert_eq!(std::fs::read_to_string(dir.path().join("api.sock")).unwrap(), "precious");
}

#[test]
fn a_port_that_cannot_be_opened_ends_the_start_and_undoes_a_change() {
    let broken = CONFIG.replace("DIR/vm2.sock", "DIR/missing/vm2.sock");
    let dir = tempfile::tempdir().unwrap();
    write_config(&dir.path().join("ferry.toml"), dir.path(), &broken);
    let out = Command::new(FERRYD).arg("--config").arg(dir.path().join("ferry.toml")).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let said = text(&out.stderr);
    assert!(said.contains("could not add port vm2") && said.contains("missing"), "{said}");
    assert!(!dir.path().join("api.sock").exists() && !dir.path().join("vm1.sock").exists());

    let d = Ferryd::start(CONFIG);
    let before = d.json(&["config", "show"]);
    d.write(&(broken.replace("name = \"br0\"", "name = \"br0\"\nfdb_ageing_s = 7") + "mtu = 9000\n"));
    let out = d.ferry(&["reload"]);
    assert_eq!(out.status.code(), Some(1));
    let said = text(&out.stderr);
    assert!(said.starts_with("error: could not add port vm2: port vm2: ") && said.contains("\nhint: "), "{said}");
    assert_eq!(d.json(&["config", "show"]), before);
    assert!(UnixStream::connect(d.path("vm2.sock")).is_ok(), "vm2 is back");
    assert_eq!(d.json(&["status"])["damage"], "");
}

#[test]
fn ports_and_bridges_from_the_command_line() {
    let d = Ferryd::start(CONFIG);
    // With the time of creation: numbers are used again.
    let inode = |name: &str| {
        let m = std::fs::metadata(d.path(name)).unwrap();
        (m.ino(), m.ctime(), m.ctime_nsec())
    };
    let (vm1, vm2) = (inode("vm1.sock"), inode("vm2.sock"));
    let vm3 = d.path("vm3.sock");
    let added = d.ok(&[
        "port",
        "add",
        "vm3",
        "--bridge",
        "br0",
        "--vhost-user",
        vm3.to_str().unwrap(),
        "--access",
        "5",
        "queue_pairs=2",
    ]);
    assert_eq!(added, "port vm3 added\n");
    assert!(vm3.exists());
    assert_eq!(
        d.ok(&["port", "set", "vm1", "--trunk", "10-20,30", "--native", "5"]),
        "port vm1 changed (vlan.mode: \"trunk\" -> \"native-untagged\", vlan.tag: (unset) -> 5, vlan.trunks: (unset) -> [\"10-20\",30])\n"
    );
    assert_eq!(d.ok(&["port", "set", "vm1", "fdb_limit=12", "admin_up=false"]).lines().count(), 1);
    assert_eq!(
        d.ok(&["port", "set", "vm2", "mtu=9000"]),
        "port vm2 changed (mtu: 1500 -> 9000)\nport vm2 was restarted\n"
    );
    assert_eq!(inode("vm1.sock"), vm1, "vm1 was not disturbed");
    assert_ne!(inode("vm2.sock"), vm2, "vm2 was made anew");
    let list = d.ok(&["port", "list"]);
    let lines: Vec<Vec<&str>> = list.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["PORT", "BRIDGE", "TYPE", "STATE", "VLAN", "MTU", "PMD", "FROM", "WHERE"]);
    assert_eq!(lines[1][..4], ["vm1", "br0", "vhost-user", "disabled"]);
    assert!(list.contains("trunk 10-20,30 native 5") && list.contains("access 5"), "{list}");
    assert!(!list.contains('\x1b'), "no colours in a pipe");
    assert!(d.ok(&["port", "show", "vm3"]).contains("port vm3 (vhost-user) in bridge br0: waiting"));
    let status = d.ok(&["status"]);
    assert!(status.contains("not in the file") && status.contains("  port vm3 added\n"), "{status}");

    assert_eq!(d.ok(&["bridge", "add", "br1", "fdb_capacity=1024"]), "bridge br1 added\n");
    assert_eq!(d.ok(&["bridge", "set", "br1", "fdb_ageing_s=10"]), "bridge br1 changed (fdb_ageing_s: 300 -> 10)\n");
    assert_eq!(d.ok(&["port", "set", "vm3", "bridge=br1"]), "port vm3 changed (bridge: \"br0\" -> \"br1\")\n");
    assert_eq!(d.json(&["bridge", "list"])["bridges"][1]["ports"], json!(["vm3"]));
    assert!(d.ok(&["port", "remove", "vm3", "--dry-run"]).starts_with("would change:\n  port vm3 removed\n"));
    assert_eq!(d.ok(&["port", "remove", "vm3"]), "port vm3 removed\n");
    assert!(!vm3.exists());
    assert_eq!(d.ok(&["bridge", "remove", "br1"]), "bridge br1 removed\n");
    assert_eq!(d.ok(&["pmd", "assign", "vm1", "0", "0"]).lines().count(), 1);
    assert!(d.ok(&["pmd", "show"]).contains("vm1/0"));
    assert_eq!(d.ok(&["fdb", "show"]), "BRIDGE  VLAN  ADDRESS  PORT  AGE\n");
    assert_eq!(d.ok(&["fdb", "flush", "br0"]), "0 address(es) forgotten\n");
    assert!(d.ok(&["stats", "--check"]).ends_with("received = forwarded + held + dropped: 0 = 0 + 0 + 0  OK\n"));
    assert_eq!(d.ok(&["log", "debug"]), "log changed (level: \"info\" -> \"debug\")\n");
    assert!(!d.log().contains("DEBUG"), "{}", d.log());
    d.ok(&["port", "set", "vm1", "fdb_limit=13"]);
    assert!(d.log().contains("DEBUG ferry_control::core: change port vm1"), "{}", d.log());
    d.ok(&["reload", "--discard-runtime"]);
    assert_eq!(d.json(&["status"])["not_in_file"], json!([]));
    // What is shown can be a configuration file.
    let shown = d.ok(&["config", "show"]);
    std::fs::write(d.path("shown.toml"), &shown).unwrap();
    assert!(
        d.ok(&["config", "check", d.path("shown.toml").to_str().unwrap()]).ends_with("OK: 1 bridge(s), 2 port(s)\n")
    );
}

#[test]
fn watching_shows_rates() {
    let d = Ferryd::start(CONFIG);
    let mut child = Command::new(FERRY)
        .arg("--socket")
        .arg(d.path("api.sock"))
        .args(["stats", "--watch", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let found = lines.map_while(Result::ok).take(40).any(|l| l.contains("RX/s"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(found);
}

#[test]
fn exit_statuses_and_hints() {
    let out = ferry(Path::new("/nonexistent/ferry.sock"), &["status"]);
    assert_eq!(out.status.code(), Some(3));
    assert_eq!(
        text(&out.stderr),
        "error: cannot reach ferryd on /nonexistent/ferry.sock: No such file or directory (os error 2)\n\
         hint: is it running? Another socket is named with --socket PATH or FERRY_SOCKET\n"
    );
    assert_eq!(ferry(Path::new("/x"), &["prot", "list"]).status.code(), Some(2));
    let d = Ferryd::start(CONFIG);
    let out = d.ferry(&["port", "show", "vm9"]);
    assert_eq!(out.status.code(), Some(4));
    assert_eq!(text(&out.stderr), "error: there is no port vm9\nhint: `ferry port list` shows those that exist\n");
    let out = d.ferry(&["port", "set", "vm1", "mtu=100000"]);
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(
        text(&out.stderr),
        "error: port vm1: mtu: must be 68 to 9000, is 100000\nhint: give a number from 68 to 9000\n"
    );
    assert_eq!(d.ferry(&["port", "set", "vm1"]).status.code(), Some(2));
    assert_eq!(d.ferry(&["port", "set", "vm1", "mtu"]).status.code(), Some(2));
}

#[test]
fn config_check_names_line_column_and_fix() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.toml");
    std::fs::write(&file, "[switch]\nidle_latncy_us = 0\n").unwrap();
    let out = ferry(Path::new("/x"), &["config", "check", file.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(2));
    let expected = format!(
        "{}:2:1: error: switch.idle_latncy_us: unknown key `idle_latncy_us`\n    2 | idle_latncy_us = 0\n      | ^^^^^^^^^^^^^^\n  fix: did you mean `idle_latency_us`?\n",
        file.display()
    );
    assert_eq!(text(&out.stderr), expected);
    let daemon = Command::new(FERRYD).arg("--check").arg("--config").arg(&file).output().unwrap();
    assert_eq!((daemon.status.code(), text(&daemon.stderr)), (Some(2), expected));
    let out = ferry(Path::new("/x"), &["config", "check", "--json", file.to_str().unwrap()]);
    let v: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(v["problems"][0]["line"], 2);
    assert_eq!(v["problems"][0]["fix"], "did you mean `idle_latency_us`?");
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../etc/ferry.toml.example");
    let ok = Command::new(FERRYD).args(["--check", "--config", example]).output().unwrap();
    assert!(ok.status.success(), "{}", text(&ok.stderr));
}

#[test]
fn completions_and_man_pages() {
    for shell in ["bash", "zsh", "fish"] {
        let out = ferry(Path::new("/x"), &["completions", shell]);
        assert!(out.status.success() && text(&out.stdout).contains("ferry"), "{shell}");
    }
    let dir = tempfile::tempdir().unwrap();
    let out = ferry(Path::new("/x"), &["man", "--out", dir.path().to_str().unwrap()]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    for page in ["ferryd.8", "ferry.1", "ferry-port.1", "ferry-port-add.1", "ferry-stats.1"] {
        let page = std::fs::read_to_string(dir.path().join(page)).unwrap_or_else(|e| panic!("{page}: {e}"));
        assert!(page.contains(".SH NAME") && page.contains(".SH SYNOPSIS"));
    }
    assert!(std::fs::read_to_string(dir.path().join("ferry.1")).unwrap().contains("cannot be reached"));
    for (page, example) in [
        ("ferry-pki.1", "ferry pki issue /root/ferry"),
        ("ferry-pki-rotate.1", "a new generation of the authority"),
        ("ferry-migrate-watch.1", "virsh migrate"),
        ("ferry-migrate-check.1", "ferry migrate check web1"),
        ("ferry-migrate-audit.1", "ferry migrate audit"),
    ] {
        let text = std::fs::read_to_string(dir.path().join(page)).unwrap_or_else(|e| panic!("{page}: {e}"));
        assert!(text.replace('\\', "").contains(example), "{page}: {text}");
    }
}

#[test]
fn logs_are_json_where_asked_and_name_who_changed_what() {
    let d = Ferryd::start(&format!("[log]\nformat = \"json\"\n{CONFIG}"));
    d.ok(&["port", "remove", "vm2"]);
    let lines: Vec<Value> =
        d.log().lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect();
    let change = lines.iter().find(|l| l["message"] == "API change").unwrap();
    assert_eq!(change["method"], "DELETE");
    assert_eq!(change["uid"], nix::unistd::getuid().as_raw());
    assert!(change["pid"].as_u64().unwrap() > 0);
    assert!(lines.iter().any(|l| l["message"] == "port vm2 removed"));
}

/// One vhost-user message (vhost-user specification, "Header").
fn message(code: u32, payload: &[u8]) -> Vec<u8> {
    let mut m = Vec::new();
    m.extend(code.to_le_bytes());
    m.extend(1u32.to_le_bytes());
    m.extend((payload.len() as u32).to_le_bytes());
    m.extend(payload);
    m
}

#[test]
fn send_rarp_on_the_real_socket_is_announced() {
    const GET_FEATURES: u32 = 1;
    const SET_OWNER: u32 = 3;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    const SET_PROTOCOL_FEATURES: u32 = 16;
    const SEND_RARP: u32 = 19;
    const PROTOCOL_F_RARP: u64 = 1 << 2;
    let d = Ferryd::start(CONFIG);
    let mut s = UnixStream::connect(d.path("vm1.sock")).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut ask = |code: u32| {
        s.write_all(&message(code, &[])).unwrap();
        let mut reply = [0; 20];
        s.read_exact(&mut reply).unwrap();
        u64::from_le_bytes(reply[12..].try_into().unwrap())
    };
    assert_ne!(ask(GET_FEATURES) & (1 << 30), 0, "VHOST_USER_F_PROTOCOL_FEATURES");
    let offered = ask(GET_PROTOCOL_FEATURES);
    assert_ne!(offered & PROTOCOL_F_RARP, 0);
    s.write_all(&message(SET_PROTOCOL_FEATURES, &PROTOCOL_F_RARP.to_le_bytes())).unwrap();
    s.write_all(&message(SET_OWNER, &[])).unwrap();
    s.write_all(&message(SEND_RARP, &[0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0])).unwrap();
    eventually("announced", || d.json(&["stats"])["originated"]["frames"] == 1);
    let fdb = d.json(&["fdb", "show", "br0"]);
    assert_eq!((&fdb[0]["fdb"][0]["mac"], &fdb[0]["fdb"][0]["port"]), (&json!("52:54:00:12:34:56"), &json!("vm1")));
    assert!(d.log().contains("VM announced"));
    assert_eq!(d.json(&["port", "show", "vm1"])["state"], "connected");
}

#[test]
fn an_idle_switch_with_many_ports_costs_next_to_nothing() {
    let ports: String = (0..20)
        .map(|i| {
            format!("[[port]]\nname = \"p{i}\"\ntype = \"vhost-user\"\nbridge = \"b\"\nsocket = \"DIR/p{i}.sock\"\n")
        })
        .collect();
    let d = Ferryd::start(&format!("[[bridge]]\nname = \"b\"\n{ports}"));
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", d.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    std::thread::sleep(Duration::from_millis(500));
    let before = ticks();
    std::thread::sleep(Duration::from_secs(3));
    let used = ticks() - before;
    // 100 ticks per second: 2 % of 3 s are 6.
    assert!(used <= 6, "{used} ticks of CPU time in 3 s");
}
