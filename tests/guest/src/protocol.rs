//! The line protocol between harness and agent: one JSON object per line, answers carry the request's id and may come
//! out of order. A request whose id the agent has already seen is not run again: it gets the same answer (again), so
//! a harness that lost the connection (live migration) may simply repeat its question.
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// TCP port of the stream service (bulk transfers with a digest).
pub const STREAM_PORT: u16 = 7001;
/// UDP port of the echo service.
pub const UDP_ECHO_PORT: u16 = 7002;
/// TCP port of the tick service (counters both ways, gaps measured).
pub const TICK_PORT: u16 = 7003;
/// TCP port of the echo service (many connections kept open).
pub const TCP_ECHO_PORT: u16 = 7004;
/// The echo service's other TCP port, for rules that tell connections apart.
pub const SECOND_ECHO_PORT: u16 = 7005;
/// The id under which the agent reports by itself that it is ready.
pub const READY_ID: u64 = 0;
/// Longest output of a shell command that is returned, bytes; the rest is cut off.
pub const MAX_OUTPUT_BYTES: usize = 64 << 10;

/// One request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the harness, unique per agent, not [`READY_ID`].
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// One answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Response {
    /// The request's id, or [`READY_ID`].
    pub id: u64,
    /// The outcome; errors are for people.
    pub result: Result<Reply, String>,
}

/// Which way a bulk transfer goes, seen from the agent that is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// The agent that is asked sends.
    Send,
    /// The agent that is asked receives.
    Receive,
}

/// What an agent can be asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Command {
    /// Answers at once.
    Ping,
    /// Runs `sh -c command`; killed with all its children after `timeout_ms`.
    Shell {
        /// Shell text.
        command: String,
        /// Bound in milliseconds.
        timeout_ms: u64,
    },
    /// Transfers `bytes` of the stream `seed` to or from another agent's stream service.
    Transfer {
        /// Address of the other agent's [`STREAM_PORT`].
        to: SocketAddr,
        /// Which way.
        direction: Direction,
        /// Stream to send or expect.
        seed: u64,
        /// Length in bytes.
        bytes: u64,
        /// Sender's pace in MB/s; 0 = as fast as it goes.
        pace_mb_per_s: u32,
        /// Bound in milliseconds for every single read or write.
        timeout_ms: u64,
    },
    /// Sends `count` datagrams to another agent's UDP echo service and checks what comes back.
    UdpProbe {
        /// Address of the other agent's [`UDP_ECHO_PORT`].
        to: SocketAddr,
        /// Number of datagrams.
        count: u32,
        /// Datagram payload in bytes (at least 8).
        payload_bytes: usize,
        /// Time between datagrams in microseconds.
        interval_us: u64,
        /// How long to wait for the last echoes, milliseconds.
        linger_ms: u64,
    },
    /// Like [`Command::UdpProbe`], until [`Command::UdpProbeEnd`], or 100,000 datagrams. Answers with a handle.
    UdpProbeBegin {
        /// Address of the other agent's [`UDP_ECHO_PORT`].
        to: SocketAddr,
        /// Datagram payload in bytes (at least 8).
        payload_bytes: usize,
        /// Time between datagrams in microseconds.
        interval_us: u64,
    },
    /// Ends [`Command::UdpProbeBegin`] and answers with its counts.
    UdpProbeEnd {
        /// Handle.
        handle: u64,
    },
    /// Sends `count` datagrams one way; their content is the stream `seed + n` behind the number `n`.
    UdpSend {
        /// Where to.
        to: SocketAddr,
        /// Number of datagrams.
        count: u32,
        /// Datagram payload in bytes (at least 8).
        payload_bytes: usize,
        /// Time between datagrams in microseconds.
        interval_us: u64,
        /// Seed of the first datagram's content.
        seed: u64,
    },
    /// Opens a UDP socket on `port` and leaves whatever arrives unread, in the memory it was received into.
    UdpHold {
        /// Local port.
        port: u16,
    },
    /// Reads everything held by [`Command::UdpHold`] and checks the content against [`Command::UdpSend`]'s.
    UdpDrain {
        /// Local port.
        port: u16,
        /// Seed given to the sender.
        seed: u64,
    },
    /// How many datagrams the UDP echo service has seen.
    UdpEchoed,
    /// Opens a TCP connection over which both sides send a counter every `interval_ms`. Answers with a handle once it stands.
    TickStart {
        /// Address of the other agent's [`TICK_PORT`].
        to: SocketAddr,
        /// Interval in milliseconds.
        interval_ms: u64,
    },
    /// Reports on a tick connection.
    TickReport {
        /// Handle from [`Command::TickStart`].
        handle: u64,
        /// Close it, too.
        stop: bool,
    },
    /// Opens `count` TCP connections to another agent's echo service and keeps them. Answers with a handle.
    ConnectionsOpen {
        /// Address of the other agent's [`TCP_ECHO_PORT`] or [`SECOND_ECHO_PORT`].
        to: SocketAddr,
        /// Number of connections.
        count: u32,
        /// Bound per connection, milliseconds.
        timeout_ms: u64,
    },
    /// Sends `payload_bytes` over every kept connection and expects them back.
    ConnectionsExercise {
        /// Handle from [`Command::ConnectionsOpen`].
        handle: u64,
        /// Bytes per connection.
        payload_bytes: usize,
        /// Bound for each 256 connections, milliseconds.
        timeout_ms: u64,
    },
    /// Closes kept connections.
    ConnectionsClose {
        /// Handle from [`Command::ConnectionsOpen`].
        handle: u64,
    },
    /// Sends Ethernet frames as they are, past the network stack. Answers with the number sent.
    SendFrames {
        /// Interface.
        interface: String,
        /// The frames, in hexadecimal.
        frames: Vec<String>,
        /// How often all of them are sent.
        rounds: u32,
        /// Counts up in every frame from round to round.
        vary: Option<Vary>,
    },
    /// Rewrites `size_mb` of memory over and over at `mb_per_s`. Answers with a handle.
    DirtyStart {
        /// Size of the region, MB.
        size_mb: u32,
        /// Pace, MB/s.
        mb_per_s: u32,
    },
    /// Ends [`Command::DirtyStart`].
    DirtyStop {
        /// Handle.
        handle: u64,
    },
}

/// A big-endian 16-bit number in a frame that counts up, and the Internet checksum that covers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vary {
    /// Where the number is, bytes from the frame's start; even relative to what the checksum covers.
    pub at: usize,
    /// Where the checksum is, bytes from the frame's start.
    pub checksum_at: usize,
}

/// What an agent answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Done, nothing to report.
    Done,
    /// The agent is up; names of its network interfaces without `lo`.
    Ready {
        /// Interface names, sorted.
        interfaces: Vec<String>,
    },
    /// A shell command ended.
    Shell(ShellReport),
    /// A transfer ended.
    Transfer(TransferReport),
    /// Datagram counts.
    Udp(UdpReport),
    /// A tick connection's state.
    Tick(TickReport),
    /// Something was started.
    Handle(u64),
    /// A plain count.
    Count(u64),
    /// Outcome over a set of connections.
    Connections {
        /// Connections that echoed correctly.
        ok: u32,
        /// Connections that did not.
        failed: u32,
        /// The first failure.
        error: Option<String>,
    },
}

/// Result of a shell command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShellReport {
    /// Exit status; `None` when it was killed by the time-out or a signal.
    pub status: Option<i32>,
    /// Standard output and error, interleaved, at most [`MAX_OUTPUT_BYTES`].
    pub output: String,
}

/// Result of a transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferReport {
    /// Bytes that the receiver got.
    pub bytes: u64,
    /// SHA-256 over what the receiver got, hexadecimal.
    pub digest: String,
    /// Duration in milliseconds.
    pub elapsed_ms: u64,
    /// Longest time in which nothing moved, milliseconds.
    pub max_stall_ms: u64,
}

/// Result of UDP commands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Different datagrams received with correct content.
    pub received: u64,
    /// Received again.
    pub duplicates: u64,
    /// Received with wrong content.
    pub corrupted: u64,
    /// Longest time between two received datagrams, microseconds.
    pub max_gap_us: u64,
    /// Mean round-trip time of echoes, microseconds.
    pub mean_rtt_us: u64,
}

/// State of a tick connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TickReport {
    /// Ticks sent.
    pub sent: u64,
    /// Ticks received, all in order.
    pub received: u64,
    /// Longest time between two ticks received here, milliseconds.
    pub max_gap_ms: u64,
    /// The same at the other end, as of its last tick.
    pub peer_max_gap_ms: u64,
    /// Milliseconds since the last tick was received.
    pub silent_ms: u64,
    /// Why the connection ended, if it has.
    pub error: Option<String>,
}
