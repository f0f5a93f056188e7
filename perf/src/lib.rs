//! Ferry's benchmark suite: generators, the switches that are measured side by side, and reports. `README.md` beside this
//! crate tells how it measures; `ferry-perf help` how it is used.
pub mod affinity;
pub mod ceiling;
pub mod check;
pub mod compare;
pub mod costs;
pub mod exchange;
pub mod frame;
pub mod generator;
pub mod guest;
pub mod histogram;
pub mod hugepages;
pub mod patience;
pub mod peers;
pub mod process;
pub mod regime;
pub mod report;
pub mod results;
pub mod run;
pub mod settings;
pub mod stream;
pub mod system;
pub mod targets;
pub mod virtio_user;
pub mod workload;
