//! The command line of ferryd.
use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(ferry_control::cli::main())
}
