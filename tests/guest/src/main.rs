//! The test agent. As process 1 of a guest it brings the machine up and serves commands on the second serial port;
//! otherwise (inside a network namespace) it serves them on standard input and output.
mod agent;
mod connections;
mod echo;
mod epoll;
mod init;
mod raw;
mod services;
mod shell;
mod system;
mod workload;

use std::io::{self, BufReader};

/// Descriptors that this process may have: for many thousand connections.
const MAX_DESCRIPTORS: u64 = 100_000;

fn main() {
    if let Err(e) = system::allow_descriptors(MAX_DESCRIPTORS) {
        eprintln!("ferry-guest: descriptors: {e}");
    }
    if std::process::id() == 1 {
        // Never returns: a guest whose init ends panics.
        init::run();
    }
    if let Err(e) = services::start() {
        eprintln!("ferry-guest: services: {e}");
        std::process::exit(1);
    }
    let input = BufReader::new(io::stdin());
    agent::serve(input, Box::new(io::stdout()));
}
