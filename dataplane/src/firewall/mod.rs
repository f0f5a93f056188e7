//! The firewall's policy side: what a VM may send and receive, before and apart from connection tracking.
//!
//! Pure logic on packet views; time is passed in. Reading order:
//! - [`policy`]: security groups and a port's settings, as operators write them; [`validate`](mod@validate) finds their mistakes;
//! - [`address_sets`]: remote groups and named address sets, shared by all ports and changed without recompiling any;
//! - [`compile`](mod@compile) turns one port's rules into a [`CompiledPolicy`] whose look-up ([`matcher`]) does not grow with their
//!   number;
//! - [`spoof`]: which addresses a VM may use; [`limits`]: how many connections it may have; [`reject`]: telling senders;
//! - [`explain`]: the same decisions, told step by step.
pub mod address_sets;
mod cidr;
pub mod compile;
pub mod explain;
pub mod limits;
pub mod matcher;
pub mod policy;
mod prefix_index;
mod ranges;
pub mod reject;
pub mod spoof;
pub mod token_bucket;
pub mod validate;

pub use address_sets::{AddressBook, AddressIndex, SetId, SetKey};
pub use cidr::{Cidr, CidrError};
pub use compile::{CompileOptions, CompiledPolicy, compile};
pub use matcher::{RuleId, Verdict};
pub use policy::{Action, Direction, FlowKey, L4Key, PolicyDocument, PortPolicy, Rule, SecurityGroup};
pub use validate::PolicyError;
