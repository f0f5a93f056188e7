//! The source's side: opens the connections of a migration.
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::connection::{Setup, read_opening, write_opening};
use super::open::{MAX_OPEN_BYTES, Open, OpenReply, Token};
use super::tls::peer_identity;
use super::{
    ChannelError, ChannelLimits, Connection, Frame, FrameKind, Pace, PeerIdentity, Purpose, Session, TlsContext,
};

/// Opens sessions to other hosts.
#[derive(Clone, Debug)]
pub struct Dialer {
    tls: Arc<TlsContext>,
    limits: ChannelLimits,
    pace: Arc<Pace>,
    bind: Option<IpAddr>,
}

impl Dialer {
    /// `pace`: the cap of all bulk connections together; `bind`: the local address to connect from, e.g. of a network for migrations alone.
    ///
    /// # Errors
    /// When the limits make no sense.
    pub fn new(
        tls: Arc<TlsContext>,
        limits: ChannelLimits,
        pace: Arc<Pace>,
        bind: Option<IpAddr>,
    ) -> Result<Self, ChannelError> {
        limits.check().map_err(ChannelError::Setup)?;
        Ok(Self { tls, limits, pace, bind })
    }

    /// Opens the control and the bulk connection of a migration. `host` must be the identity in the peer's certificate; `migration`: random, never used before.
    ///
    /// # Errors
    /// What failed first; nothing stays open then. The whole takes at most 2 (`connect_ms` + 2 `handshake_ms`) of the limits.
    pub async fn dial(&self, address: SocketAddr, host: &str, migration: u128) -> Result<Session, ChannelError> {
        let open = Open { purpose: Purpose::Control, migration, token: [0; 32] };
        let (control, peer, token) = self.open(address, host, open).await?;
        // Read by tasks while the bulk connection is made, so that its end is noticed; what the peer says meanwhile waits in the queue.
        let control = self.spawn(control, self.limits.max_control_bytes, None);
        let open = Open { purpose: Purpose::Bulk, migration, token };
        let (bulk, bulk_peer, _) = self.open(address, host, open).await?;
        if bulk_peer.host != peer.host {
            return Err(ChannelError::Identity { expected: peer.host, found: bulk_peer.host });
        }
        let bulk = self.spawn(bulk, self.limits.max_bulk_bytes, Some(self.pace.clone()));
        Ok(Session { peer, migration, control, bulk: Some(bulk) })
    }

    /// Opens a control connection alone, for a pre-flight check.
    ///
    /// # Errors
    /// As [`Self::dial`].
    pub async fn check(&self, address: SocketAddr, host: &str, migration: u128) -> Result<Session, ChannelError> {
        let open = Open { purpose: Purpose::Check, migration, token: [0; 32] };
        let (control, peer, _) = self.open(address, host, open).await?;
        let control = self.spawn(control, self.limits.max_control_bytes, None);
        Ok(Session { peer, migration, control, bulk: None })
    }

    fn spawn(&self, stream: TlsStream<TcpStream>, limit: usize, pace: Option<Arc<Pace>>) -> Connection {
        Connection::spawn(stream, Setup { limit, pace, permit: None }, &self.limits)
    }

    async fn open(
        &self,
        address: SocketAddr,
        host: &str,
        open: Open,
    ) -> Result<(TlsStream<TcpStream>, PeerIdentity, Token), ChannelError> {
        let expected = crate::pki::host_name(host).map_err(|e| ChannelError::Setup(e.to_string()))?;
        let name = ServerName::try_from(expected.clone()).map_err(|e| ChannelError::Setup(e.to_string()))?;
        let tcp = self
            .within(self.limits.connect_ms, "connecting", async {
                self.connect(address).await.map_err(|e| ChannelError::Connect { address, reason: e.to_string() })
            })
            .await?;
        let config = self.tls.configs()?.client.clone();
        let mut stream = self
            .within(self.limits.handshake_ms, "the TLS handshake", async {
                TlsConnector::from(config).connect(name, tcp).await.map_err(|e| ChannelError::from_handshake(&e))
            })
            .await?;
        let peer = peer_identity(stream.get_ref().1, address)?;
        if peer.host != expected {
            return Err(ChannelError::Identity { expected, found: peer.host });
        }
        // In TLS 1.3 the peer judges our certificate after our side of the handshake is over: its refusal shows here.
        let reply = self
            .within(self.limits.handshake_ms, "the peer's first answer", async {
                write_opening(&mut stream, &Frame { kind: FrameKind::Open, payload: open.encode() }).await?;
                read_opening(&mut stream, MAX_OPEN_BYTES).await
            })
            .await?;
        if reply.kind != FrameKind::OpenReply {
            return Err(ChannelError::OutOfPlace);
        }
        match OpenReply::decode(&reply.payload).ok_or(ChannelError::OutOfPlace)? {
            OpenReply::Accepted(token) => Ok((stream, peer, token)),
            OpenReply::Refused(code, text) => Err(ChannelError::Refused { code, text }),
        }
    }

    async fn connect(&self, address: SocketAddr) -> std::io::Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(bind) = self.bind {
            socket.bind(SocketAddr::new(bind, 0))?;
        }
        let stream = socket.connect(address).await?;
        // A control message must not wait for more to send.
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn within<T>(
        &self,
        limit_ms: u64,
        what: &'static str,
        work: impl Future<Output = Result<T, ChannelError>>,
    ) -> Result<T, ChannelError> {
        match timeout(Duration::from_millis(limit_ms), work).await {
            Ok(result) => result,
            Err(_) => Err(ChannelError::Timeout { what, limit_ms }),
        }
    }
}
