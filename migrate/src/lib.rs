//! Flow-state migration: announcing a VM that has arrived.
