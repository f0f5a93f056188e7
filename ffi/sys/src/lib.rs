//! Raw bindings to Debian libdpdk.
