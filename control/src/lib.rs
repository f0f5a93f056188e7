//! ferryd and ferry: configuration, local API, metrics.

pub mod api;
pub mod cli;
pub mod config;
pub mod core;
pub mod daemon;
pub mod engine;
pub mod events;
pub mod firewall;
pub mod logs;
pub mod metrics;
pub mod migration;
pub mod notify;
pub mod plan;
pub mod ports;
pub mod qmp;
pub mod threads;
