//! Flow migration needs nothing of libvirt: `virsh migrate --live` as it is.
use anyhow::Context;
use ferry_tests::libvirt::Libvirt;
use ferry_tests::two_hosts::experiment::{Connections, Family};
use ferry_tests::two_hosts::status::{Asker, now_ms};
use ferry_tests::two_hosts::{Host, Plan, Side, TwoHosts, VM, guest_address};
use ferry_tests::{Agent, Outcome, Scratch, guest, wait};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;

/// Connections of the guest.
const SOME: u32 = 200;
const PATIENCE: Duration = Duration::from_secs(60);
/// Not a multiple of 256 KiB; see the guests of the other tests.
const MEMORY: &str = "131080k";

/// The guest as libvirt describes it, on one of the hosts. Its memory is replaced by one of a size that libvirt does not know.
fn domain(image: &guest::Image, host: &Host, dir: &Path) -> String {
    let (kernel, initrd) = (image.kernel.display(), image.initrd.display());
    let (console, agent) = (dir.join("console.log"), agent_socket(dir));
    let (console, agent, nic) = (console.display(), agent.display(), host.sockets[0].display());
    format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{VM}</name>
  <uuid>6fd1cf0c-6d1b-4c8e-8d5f-2f6b9c0e1a01</uuid>
  <memory unit='MiB'>128</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check</cmdline>
  </os>
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='{console}' append='on'/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path='{agent}'/><target port='1'/></serial>
    <interface type='vhostuser'>
      <mac address='52:54:00:00:00:01'/>
      <source type='unix' path='{nic}' mode='client'><reconnect enabled='yes' timeout='1'/></source>
      <model type='virtio'/>
      <rom enabled='no'/>
      <alias name='ua-nic'/>
    </interface>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-object'/>
    <qemu:arg value='memory-backend-memfd,id=ram0,size={MEMORY},share=on'/>
    <qemu:arg value='-machine'/>
    <qemu:arg value='memory-backend=ram0'/>
    <qemu:arg value='-m'/>
    <qemu:arg value='size={MEMORY}'/>
  </qemu:commandline>
  <qemu:override>
    <qemu:device alias='ua-nic'>
      <qemu:frontend><qemu:property name='vectors' type='unsigned' value='0'/></qemu:frontend>
    </qemu:device>
  </qemu:override>
</domain>
"
    )
}

fn agent_socket(dir: &Path) -> PathBuf {
    dir.join("agent.sock")
}

#[test]
fn virsh_migrate_live() -> Outcome {
    let scratch = Scratch::new()?;
    let hosts = TwoHosts::new(&scratch, Plan { flow_migration: true, ..Plan::default() })?;
    let a = Libvirt::start(scratch.path(), "libvirt-a", "0f4f0001-93d5-4f5c-9c7e-000000000001")?;
    let b = Libvirt::start(scratch.path(), "libvirt-b", "0f4f0002-93d5-4f5c-9c7e-000000000002")?;
    let image = guest::image()?;
    let mut files = Vec::new();
    for side in [Side::A, Side::B] {
        let dir = scratch.join(format!("domain-{side:?}"));
        fs::create_dir(&dir)?;
        let file = dir.join("domain.xml");
        fs::write(&file, domain(&image, hosts.host(side), &dir))?;
        files.push((dir, file));
    }
    let [(dir_a, xml_a), (dir_b, xml_b)] = <[_; 2]>::try_from(files).unwrap();

    a.virsh(&["create", &xml_a.to_string_lossy()]).with_context(|| a.log())?;
    let agent = Agent::new(VM);
    let (sender, ready) = channel();
    let stream = wait::for_some("agent's socket", PATIENCE, || UnixStream::connect(agent_socket(&dir_a)).ok())?;
    agent.attach(stream.try_clone()?, Box::new(stream), Some(sender));
    let console = || fs::read_to_string(dir_a.join("console.log")).unwrap_or_default();
    ready.recv_timeout(PATIENCE).with_context(console)?;
    hosts.configure(&agent)?;
    let connections = Connections::open(&hosts, &agent, SOME, Family::V4)?;
    connections.check_all_alive(&hosts, &agent)?;
    let counter = hosts.peer.start_ticks(guest_address(1), Duration::from_millis(10))?;

    let since_ms = now_ms();
    let uri = format!("unix://{}", scratch.join("libvirt-migration.sock").display());
    let xml_b = xml_b.to_string_lossy();
    a.virsh(&["migrate", "--live", "--xml", &xml_b, VM, &b.uri(), "--migrateuri", &uri])
        .with_context(|| format!("{}\n{}", a.log(), b.log()))?;
    agent.detach();
    let stream = UnixStream::connect(agent_socket(&dir_b))?;
    agent.attach(stream.try_clone()?, Box::new(stream), None);
    hosts.wait_up(Side::B)?;
    connections.check_all_alive(&hosts, &agent)?;
    let ticks = hosts.peer.ticks(counter, true)?;
    assert!(ticks.error.is_none() && ticks.silent_ms < 1000, "{ticks:?}");
    let source = Asker::new(&hosts.a).ended(VM, since_ms)?;
    let destination = Asker::new(&hosts.b).ended(VM, since_ms)?;
    eprintln!("longest silence {} ms\n{source:?}", ticks.max_gap_ms);
    assert_eq!(
        (source.outcome.as_str(), destination.began.as_deref()),
        ("migrated", Some("complete")),
        "{destination:?}"
    );
    assert!(!a.virsh(&["list", "--name"])?.contains(VM), "it is still on host A");
    assert!(b.virsh(&["list", "--name"])?.contains(VM), "it is not on host B");
    hosts.a.ferryd.check_ledger()?;
    hosts.b.ferryd.check_ledger()?;
    Ok(())
}
