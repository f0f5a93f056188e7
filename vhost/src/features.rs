//! Feature bits: which ones a port offers, and their names.
//!
//! QEMU 7.2 to 10 passes a virtio-net feature to the guest only if its `user_feature_bits` lists it and the back-end offers it, and
//! adds MAC, STATUS and the control-queue bits itself: the control queue never reaches the back-end, so CTRL_VQ is not offered here.
//! NOTIFY_ON_EMPTY is legacy and not offered.

/// VIRTIO_NET_F_CSUM: the device takes frames with unfinished checksums.
pub const NET_CSUM: u64 = 1 << 0;
/// VIRTIO_NET_F_GUEST_CSUM: the driver takes frames with unfinished checksums.
pub const NET_GUEST_CSUM: u64 = 1 << 1;
/// VIRTIO_NET_F_MTU: the device states its MTU.
pub const NET_MTU: u64 = 1 << 3;
/// VIRTIO_NET_F_GUEST_TSO4.
pub const NET_GUEST_TSO4: u64 = 1 << 7;
/// VIRTIO_NET_F_GUEST_TSO6.
pub const NET_GUEST_TSO6: u64 = 1 << 8;
/// VIRTIO_NET_F_GUEST_ECN.
pub const NET_GUEST_ECN: u64 = 1 << 9;
/// VIRTIO_NET_F_HOST_TSO4.
pub const NET_HOST_TSO4: u64 = 1 << 11;
/// VIRTIO_NET_F_HOST_TSO6.
pub const NET_HOST_TSO6: u64 = 1 << 12;
/// VIRTIO_NET_F_HOST_ECN.
pub const NET_HOST_ECN: u64 = 1 << 13;
/// VIRTIO_NET_F_MRG_RXBUF: mergeable receive buffers.
pub const NET_MRG_RXBUF: u64 = 1 << 15;
/// VIRTIO_NET_F_GUEST_ANNOUNCE: the guest announces itself after a migration; QEMU then sends no SEND_RARP.
pub const NET_GUEST_ANNOUNCE: u64 = 1 << 21;
/// VIRTIO_NET_F_MQ: several queue pairs.
pub const NET_MQ: u64 = 1 << 22;
/// VHOST_F_LOG_ALL: log every page written.
pub const LOG_ALL: u64 = 1 << 26;
/// VIRTIO_F_INDIRECT_DESC.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_PACKED.
pub const RING_PACKED: u64 = 1 << 34;
/// VIRTIO_F_IN_ORDER.
pub const IN_ORDER: u64 = 1 << 35;

/// VHOST_USER_PROTOCOL_F_MQ.
pub const PROTOCOL_MQ: u64 = 1 << 0;
/// VHOST_USER_PROTOCOL_F_LOG_SHMFD.
pub const PROTOCOL_LOG_SHMFD: u64 = 1 << 1;
/// VHOST_USER_PROTOCOL_F_RARP.
pub const PROTOCOL_RARP: u64 = 1 << 2;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK.
pub const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
/// VHOST_USER_PROTOCOL_F_MTU.
pub const PROTOCOL_MTU: u64 = 1 << 4;
/// VHOST_USER_PROTOCOL_F_RESET_DEVICE.
pub const PROTOCOL_RESET_DEVICE: u64 = 1 << 13;
/// VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS.
pub const PROTOCOL_MEM_SLOTS: u64 = 1 << 15;

const FEATURE_NAMES: &[(u64, &str)] = &[
    (NET_CSUM, "csum"),
    (NET_GUEST_CSUM, "guest_csum"),
    (NET_MTU, "mtu"),
    (NET_GUEST_TSO4, "guest_tso4"),
    (NET_GUEST_TSO6, "guest_tso6"),
    (NET_GUEST_ECN, "guest_ecn"),
    (NET_HOST_TSO4, "host_tso4"),
    (NET_HOST_TSO6, "host_tso6"),
    (NET_HOST_ECN, "host_ecn"),
    (NET_MRG_RXBUF, "mrg_rxbuf"),
    (NET_GUEST_ANNOUNCE, "guest_announce"),
    (NET_MQ, "mq"),
    (LOG_ALL, "log_all"),
    (RING_INDIRECT_DESC, "indirect_desc"),
    (RING_EVENT_IDX, "event_idx"),
    (PROTOCOL_FEATURES, "protocol_features"),
    (VERSION_1, "version_1"),
    (RING_PACKED, "ring_packed"),
    (IN_ORDER, "in_order"),
];

const PROTOCOL_NAMES: &[(u64, &str)] = &[
    (PROTOCOL_MQ, "mq"),
    (PROTOCOL_LOG_SHMFD, "log_shmfd"),
    (PROTOCOL_RARP, "rarp"),
    (PROTOCOL_REPLY_ACK, "reply_ack"),
    (PROTOCOL_MTU, "mtu"),
    (PROTOCOL_RESET_DEVICE, "reset_device"),
    (PROTOCOL_MEM_SLOTS, "configure_mem_slots"),
];

fn names(bits: u64, table: &[(u64, &'static str)]) -> Vec<&'static str> {
    table.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect()
}

/// Names of virtio feature bits, in the order of the bits; bits that no port offers have none.
pub fn feature_names(bits: u64) -> Vec<&'static str> {
    names(bits, FEATURE_NAMES)
}

/// Names of vhost-user protocol feature bits.
pub fn protocol_feature_names(bits: u64) -> Vec<&'static str> {
    names(bits, PROTOCOL_NAMES)
}

/// Which features a port offers. What is off is never negotiated, whatever the guest can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureSwitches {
    /// Mergeable receive buffers.
    pub mrg_rxbuf: bool,
    /// Indirect descriptors.
    pub indirect_desc: bool,
    /// Event index (finer notification suppression).
    pub event_idx: bool,
    /// Packed rings.
    pub packed: bool,
    /// In-order completion.
    pub in_order: bool,
    /// Checksum offload in both directions.
    pub csum: bool,
    /// TCP segmentation offload in both directions, with ECN. Needs `csum`.
    pub tso: bool,
    /// Let the guest announce itself after a migration.
    pub guest_announce: bool,
    /// Dirty-page logging (VHOST_F_LOG_ALL and LOG_SHMFD): without it QEMU refuses to migrate the guest.
    pub migration: bool,
    /// CONFIGURE_MEM_SLOTS: memory hot-plug region by region.
    pub mem_slots: bool,
}

impl Default for FeatureSwitches {
    /// Everything on.
    fn default() -> Self {
        Self {
            mrg_rxbuf: true,
            indirect_desc: true,
            event_idx: true,
            packed: true,
            in_order: true,
            csum: true,
            tso: true,
            guest_announce: true,
            migration: true,
            mem_slots: true,
        }
    }
}

impl FeatureSwitches {
    /// The answer to GET_FEATURES.
    pub fn features(&self, queue_pairs: u16, mtu: u16) -> u64 {
        let tso = self.tso && self.csum;
        [
            (true, VERSION_1 | PROTOCOL_FEATURES),
            (self.mrg_rxbuf, NET_MRG_RXBUF),
            (self.indirect_desc, RING_INDIRECT_DESC),
            (self.event_idx, RING_EVENT_IDX),
            (self.packed, RING_PACKED),
            (self.in_order, IN_ORDER),
            (self.csum, NET_CSUM | NET_GUEST_CSUM),
            (tso, NET_HOST_TSO4 | NET_HOST_TSO6 | NET_HOST_ECN | NET_GUEST_TSO4 | NET_GUEST_TSO6 | NET_GUEST_ECN),
            (self.guest_announce, NET_GUEST_ANNOUNCE),
            (self.migration, LOG_ALL),
            (queue_pairs > 1, NET_MQ),
            (mtu != 0, NET_MTU),
        ]
        .iter()
        .filter(|(on, _)| *on)
        .fold(0, |all, (_, bits)| all | bits)
    }

    /// The answer to GET_PROTOCOL_FEATURES.
    pub fn protocol_features(&self) -> u64 {
        PROTOCOL_MQ
            | PROTOCOL_RARP
            | PROTOCOL_REPLY_ACK
            | PROTOCOL_MTU
            | PROTOCOL_RESET_DEVICE
            | if self.migration { PROTOCOL_LOG_SHMFD } else { 0 }
            | if self.mem_slots { PROTOCOL_MEM_SLOTS } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_and_sizes_decide_the_offer() {
        let all = FeatureSwitches::default();
        assert_eq!(all.features(1, 0) & (NET_MQ | NET_MTU), 0);
        assert_eq!(all.features(2, 1500) & (NET_MQ | NET_MTU), NET_MQ | NET_MTU);
        let no_csum = FeatureSwitches { csum: false, ..all };
        assert_eq!(no_csum.features(1, 0) & (NET_HOST_TSO4 | NET_GUEST_TSO6 | NET_CSUM), 0);
        let fixed = FeatureSwitches { migration: false, packed: false, ..all };
        assert_eq!(fixed.features(1, 0) & (LOG_ALL | RING_PACKED), 0);
        assert_eq!(fixed.protocol_features() & PROTOCOL_LOG_SHMFD, 0);
    }

    #[test]
    fn every_offered_bit_has_a_name() {
        let all = FeatureSwitches::default();
        assert_eq!(feature_names(all.features(8, 9000)).len() as u32, all.features(8, 9000).count_ones());
        assert_eq!(protocol_feature_names(all.protocol_features()).len() as u32, all.protocol_features().count_ones());
    }
}
