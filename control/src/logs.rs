//! Structured logs on standard error, with a filter that can be changed while the daemon runs.
use std::io::IsTerminal;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use crate::config::{LogConfig, LogFormat};
use crate::core::SetLogLevel;

/// Starts logging. Returns what changes the filter.
///
/// # Errors
/// The filter is not valid, or logging was started before.
pub fn init(config: &LogConfig) -> Result<SetLogLevel, String> {
    let (filter, handle) = reload::Layer::new(parse(&config.level)?);
    let format: Box<dyn Layer<Registry> + Send + Sync> = match config.format {
        LogFormat::Text => fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(std::io::stderr).boxed(),
    };
    tracing_subscriber::registry().with(format.with_filter(filter)).try_init().map_err(|e| e.to_string())?;
    Ok(Box::new(move |level| handle.reload(parse(level)?).map_err(|e| e.to_string())))
}

fn parse(level: &str) -> Result<Targets, String> {
    level.parse().map_err(|e| format!("\"{level}\" is not a log filter: {e}"))
}
