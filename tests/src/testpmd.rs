//! testpmd.
