//! Safe wrappers over DPDK: EAL, mempool, mbuf, ethdev; uplink ports.
