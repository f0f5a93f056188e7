//! The command line: `ferry` talks to the daemon's API; `ferryd`'s own arguments are here too, so that man pages and completions
//! are made of one description.
mod args;
mod client;
mod conntrack;
mod firewall;
mod migrate;
mod migrate_args;
pub mod migrate_text;
mod pki;
mod policy;
mod run;
mod table;

pub use args::{Cli, DaemonArgs};
pub use client::{CliError, Client};
pub use run::main;
