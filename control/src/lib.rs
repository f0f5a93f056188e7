//! ferryd and ferry: configuration, local API, metrics.

pub mod config;
pub mod core;
pub mod engine;
pub mod plan;
pub mod threads;
