//! ferryd and ferry: configuration, local API, metrics.

pub mod config;
