//! The firewall as operators see it: connections and filters on them, packets in words, explanations, what was denied lately.
pub mod connection;
pub mod explain;
pub mod filter;
pub mod flow_log;
pub mod history;
pub mod observer;
pub mod packet_text;
pub mod record;
