//! Follows QEMU's own monitor, where one is configured, and tells the VM's task what it says.
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::actor::Input;
use super::guest::Guest;
use crate::qmp::{Qmp, QmpError, QmpEvent, QmpFigures};

/// Between two looks at QEMU's figures.
const LOOK: Duration = Duration::from_millis(500);

/// What the monitor told.
#[derive(Clone, Debug)]
pub enum Told {
    /// An event.
    Event(QmpEvent),
    /// Figures.
    Figures(Box<QmpFigures>),
    /// It is of no use.
    Problem(String),
}

/// Follows one migration until it ends.
pub async fn follow(path: PathBuf, guest: Arc<Guest>) {
    let tell = |told| guest.send(Input::Monitor(told));
    if let Err(error) = run(path, &tell).await {
        tell(Told::Problem(error.to_string()));
    }
}

async fn run(path: PathBuf, tell: &impl Fn(Told)) -> Result<(), QmpError> {
    let mut qmp = Qmp::connect(&path).await?;
    loop {
        let event = match timeout(LOOK, qmp.next_event()).await {
            Ok(event) => Some(event?),
            Err(_) => None,
        };
        let ended =
            matches!(&event, Some(QmpEvent::Status(s)) if matches!(s.as_str(), "completed" | "failed" | "cancelled"));
        let quiet = event.is_none();
        if let Some(event) = event {
            tell(Told::Event(event));
        }
        if quiet || ended {
            let figures = qmp.figures().await?;
            let over = matches!(figures.status.as_str(), "completed" | "failed" | "cancelled");
            tell(Told::Figures(Box::new(figures)));
            if ended || over {
                return Ok(());
            }
        }
    }
}
