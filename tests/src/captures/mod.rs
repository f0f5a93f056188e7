//! Public captures through the packet parser and the firewall, each frame accounted for.
mod pipeline;
mod read;

pub use pipeline::{Account, Pipeline};
pub use read::{Capture, Frame, View, archive};
