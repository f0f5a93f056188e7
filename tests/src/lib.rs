//! End-to-end tests with real QEMU guests and DPDK clients.
