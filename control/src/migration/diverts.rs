//! Frames for a VM between two hosts: kept at its ports until somebody can take them.
use std::collections::BTreeSet;
use std::sync::Arc;

use ferry_dataplane::divert::Divert;

use super::switch::VmSwitch;

/// Frames kept per port.
const FRAMES: usize = 2048;
/// Ethernet header with two tags, and what little else there may be.
const OVERHEAD_BYTES: usize = 64;

/// The ports of one VM.
#[derive(Default)]
pub struct Diverts {
    ports: Vec<(String, u8, Arc<Divert>)>,
    on: bool,
}

impl Diverts {
    /// Takes the memory for these ports (name, number, MTU).
    pub fn prepare(&mut self, ports: impl Iterator<Item = (String, u8, u16)>) {
        if self.on {
            return;
        }
        let divert = |mtu: u16| Arc::new(Divert::new(FRAMES, usize::from(mtu) + OVERHEAD_BYTES));
        self.ports = ports.map(|(name, index, mtu)| (name, index, divert(mtu))).collect();
    }

    /// Frames are kept from now on.
    pub fn switch_on(&mut self, switch: &dyn VmSwitch) {
        if !std::mem::replace(&mut self.on, true) {
            for (port, _, divert) in &self.ports {
                // A port that has gone has no frames.
                let _ = switch.set_divert(port, Some(Arc::clone(divert)));
            }
        }
    }

    /// Frames reach the ports again. Those that were kept stay for [`Self::take`].
    pub fn switch_off(&mut self, switch: &dyn VmSwitch) {
        if std::mem::take(&mut self.on) {
            for (port, _, _) in &self.ports {
                let _ = switch.set_divert(port, None);
            }
        }
    }

    /// Frames are kept.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// At most `most` frames that have waited longest, each after its port's number.
    pub fn take(&mut self, most: usize) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        for (_, index, divert) in &self.ports {
            while out.len() < most
                && let Some(frame) = divert.pop()
            {
                let mut numbered = Vec::with_capacity(frame.len() + 1);
                numbered.push(*index);
                numbered.extend(frame);
                out.push(numbered);
            }
        }
        out
    }

    /// Frees the memory.
    pub fn drop_frames(&mut self) {
        if !self.on {
            self.ports.clear();
        }
    }
}

/// Hands those of the frames, each after its port's number, to the VM's ports that are for one of `up`; the others stay.
pub fn deliver(switch: &dyn VmSwitch, vm: &str, up: &BTreeSet<Arc<str>>, frames: &mut Vec<Vec<u8>>) {
    if frames.is_empty() {
        return;
    }
    let ports = switch.ports(vm);
    frames.retain_mut(|frame| {
        let port = frame.first().and_then(|index| ports.iter().find(|p| p.index == *index));
        match port {
            Some(port) if up.contains(port.name.as_str()) => {
                // Too short or too long for a frame: nothing is lost.
                let _ = switch.deliver(&port.name, frame.split_off(1));
                false
            }
            Some(_) => true,
            None => false,
        }
    });
}
