//! What a channel's peers may use up, and how long things may take.

/// Limits of a channel. [`ChannelLimits::default`] suits a local network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelLimits {
    /// TCP connection, milliseconds.
    pub connect_ms: u64,
    /// TLS handshake, and after it the first frame, milliseconds each.
    pub handshake_ms: u64,
    /// From a control connection's acceptance to its bulk connection's, milliseconds.
    pub tie_ms: u64,
    /// A frame is sent at least this often, milliseconds. At most a third of `idle_ms`.
    pub keep_alive_ms: u64,
    /// Silence after which a peer counts as gone, milliseconds.
    pub idle_ms: u64,
    /// A frame, once begun, takes no longer than this and its length at 16 KiB/s, milliseconds.
    pub frame_ms: u64,
    /// The peer takes 16 KiB at least this often, milliseconds.
    pub write_ms: u64,
    /// For a close to reach the system's buffers, milliseconds.
    pub close_ms: u64,
    /// Longest control message, bytes.
    pub max_control_bytes: usize,
    /// Longest bulk message, bytes.
    pub max_bulk_bytes: usize,
    /// Messages waiting per connection and direction. Their memory is bounded by this times the longest message.
    pub queue_messages: usize,
    /// Connections that a listener holds, whatever their state.
    pub max_connections: usize,
    /// Handshakes at a time.
    pub max_handshakes: usize,
    /// Handshakes at a time per IPv4 address or IPv6 /64.
    pub max_handshakes_per_address: usize,
    /// Control connections that wait for their bulk connection.
    pub max_half_open: usize,
    /// Whole sessions that wait to be accepted by the layer above.
    pub max_pending_sessions: usize,
}

impl Default for ChannelLimits {
    fn default() -> Self {
        Self {
            connect_ms: 3_000,
            handshake_ms: 5_000,
            tie_ms: 5_000,
            keep_alive_ms: 2_000,
            idle_ms: 10_000,
            frame_ms: 20_000,
            write_ms: 10_000,
            close_ms: 2_000,
            max_control_bytes: 64 << 10,
            max_bulk_bytes: 1 << 20,
            queue_messages: 8,
            max_connections: 64,
            max_handshakes: 32,
            max_handshakes_per_address: 8,
            max_half_open: 16,
            max_pending_sessions: 16,
        }
    }
}

impl ChannelLimits {
    /// Checks that the limits make sense together.
    ///
    /// # Errors
    /// Names the field.
    pub fn check(&self) -> Result<(), String> {
        const MAX_MS: u64 = 3_600_000;
        let times = [
            ("connect_ms", self.connect_ms),
            ("handshake_ms", self.handshake_ms),
            ("tie_ms", self.tie_ms),
            ("keep_alive_ms", self.keep_alive_ms),
            ("idle_ms", self.idle_ms),
            ("frame_ms", self.frame_ms),
            ("write_ms", self.write_ms),
            ("close_ms", self.close_ms),
        ];
        if let Some((name, value)) = times.iter().find(|(_, value)| !(1..=MAX_MS).contains(value)) {
            return Err(format!("{name} must be 1 to {MAX_MS}, not {value}"));
        }
        let counts = [
            ("max_control_bytes", self.max_control_bytes, 64 << 20),
            ("max_bulk_bytes", self.max_bulk_bytes, 64 << 20),
            ("queue_messages", self.queue_messages, 1024),
            ("max_connections", self.max_connections, 65_536),
            ("max_handshakes", self.max_handshakes, 65_536),
            ("max_handshakes_per_address", self.max_handshakes_per_address, 65_536),
            ("max_half_open", self.max_half_open, 65_536),
            ("max_pending_sessions", self.max_pending_sessions, 65_536),
        ];
        if let Some((name, value, max)) = counts.iter().find(|(_, value, max)| !(1..=*max).contains(value)) {
            return Err(format!("{name} must be 1 to {max}, not {value}"));
        }
        if self.keep_alive_ms > self.idle_ms / 3 {
            return Err(format!("keep_alive_ms must be at most a third of idle_ms, {}", self.idle_ms / 3));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_contradict_each_other_are_refused() {
        let good = ChannelLimits::default();
        good.check().unwrap();
        for (bad, field) in [
            (ChannelLimits { keep_alive_ms: 4_000, ..good.clone() }, "keep_alive_ms"),
            (ChannelLimits { idle_ms: 0, ..good.clone() }, "idle_ms"),
            (ChannelLimits { max_bulk_bytes: usize::MAX, ..good.clone() }, "max_bulk_bytes"),
            (ChannelLimits { max_connections: 0, ..good.clone() }, "max_connections"),
        ] {
            assert!(bad.check().unwrap_err().starts_with(field));
        }
    }
}
