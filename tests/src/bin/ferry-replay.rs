//! `ferry-replay IN.json[.gz] OUT.json`: replays recorded conversations through Ferry's connection tracking on a virtual clock.
//!
//! The output is the same document with Ferry's own `verdict`, `out`, `ct_state`, `rule` and `ct` per step and `"engine": "ferry"`. With one
//! argument, differences to what the document records are listed instead, and any makes the exit status 1.
use std::path::Path;
use std::process::ExitCode;

use ferry_dataplane::testing::replay::{ReplayError, compare, read, replay_document};

fn run(args: &[String]) -> Result<ExitCode, ReplayError> {
    match args {
        [input, output] => {
            let result = replay_document(&read(Path::new(input))?)?;
            std::fs::write(output, serde_json::to_vec(&result)?)?;
            Ok(ExitCode::SUCCESS)
        }
        [input] => {
            let differences = compare(&read(Path::new(input))?)?;
            for d in &differences {
                println!("{} {} \"{}\" step {}: {}: {}", d.id, d.category, d.name, d.step, d.what, d.detail);
            }
            Ok(if differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        _ => {
            eprintln!("usage: ferry-replay IN.json[.gz] [OUT.json]");
            Ok(ExitCode::from(2))
        }
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    run(&args).unwrap_or_else(|error| {
        eprintln!("ferry-replay: {error}");
        ExitCode::from(2)
    })
}
