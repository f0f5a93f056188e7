//! The destination's side: takes connections, believes nobody, and hands over whole sessions.
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ring::rand::{SecureRandom, SystemRandom};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::connection::{Setup, read_opening, write_opening};
use super::open::{MAX_OPEN_BYTES, Open, OpenReply, Token, same_token};
use super::tls::peer_identity;
use super::{
    ChannelError, ChannelLimits, Connection, Frame, FrameKind, Pace, PeerIdentity, Purpose, RefusalCode, Session,
    TlsContext,
};

/// Pause after the system refused a connection (no descriptors left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a refused peer gets to read why.
const LINGER: Duration = Duration::from_millis(200);
/// How much of what it still sends is taken meanwhile, bytes.
const LINGER_BYTES: u64 = 64 * 1024;

/// Why a connection did not become part of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusedWhy {
    /// The system gave no connection.
    System,
    /// `max_connections` are open.
    TooManyConnections,
    /// `max_handshakes` are under way.
    TooManyHandshakes,
    /// `max_handshakes_per_address` are under way from there.
    TooManyFromAddress,
    /// TLS or the first frame took too long.
    TooSlow,
    /// TLS failed: certificate, version, or no TLS at all.
    Handshake,
    /// The first frame was not understood.
    Malformed,
    /// The layer above does not want this host.
    NotAdmitted,
    /// Too many sessions wait for their bulk connection or for the layer above.
    Busy,
    /// A control connection with the same migration id waits.
    Duplicate,
    /// A bulk connection with wrong id, token or host.
    UnknownSession,
    /// The bulk connection of a control connection did not come in time.
    NoBulk,
}

impl RefusedWhy {
    /// All of them, in the order of [`ListenerStats::refused`].
    pub const ALL: [Self; 12] = [
        Self::System,
        Self::TooManyConnections,
        Self::TooManyHandshakes,
        Self::TooManyFromAddress,
        Self::TooSlow,
        Self::Handshake,
        Self::Malformed,
        Self::NotAdmitted,
        Self::Busy,
        Self::Duplicate,
        Self::UnknownSession,
        Self::NoBulk,
    ];

    /// Name for metrics, e.g. `too_many_connections`.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::TooManyConnections => "too_many_connections",
            Self::TooManyHandshakes => "too_many_handshakes",
            Self::TooManyFromAddress => "too_many_from_address",
            Self::TooSlow => "too_slow",
            Self::Handshake => "handshake",
            Self::Malformed => "malformed",
            Self::NotAdmitted => "not_admitted",
            Self::Busy => "busy",
            Self::Duplicate => "duplicate",
            Self::UnknownSession => "unknown_session",
            Self::NoBulk => "no_bulk",
        }
    }
}

/// A connection that was refused, for the audit log.
#[derive(Clone, Debug)]
pub struct Refused {
    /// Where it came from; none when the system gave no connection.
    pub address: Option<SocketAddr>,
    /// Who it was, when that was proven.
    pub peer: Option<PeerIdentity>,
    /// Why.
    pub why: RefusedWhy,
    /// Particulars for operators.
    pub detail: String,
}

/// What a listener asks and tells the layer above. Both are called from its tasks and must not block.
pub trait Gate: Send + Sync + 'static {
    /// May this host open a session at all? The text tells it and the audit log why not. Called once per connection.
    ///
    /// # Errors
    /// Why not.
    fn admit(&self, peer: &PeerIdentity) -> Result<(), String>;

    /// A connection was refused. A hostile network can cause any number of these: whoever writes them down bounds the rate.
    fn refused(&self, refused: Refused);
}

/// Figures of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerStats {
    /// TCP connections taken from the system.
    pub accepted: u64,
    /// Sessions handed over.
    pub sessions: u64,
    /// Connections refused, by reason.
    pub refused: [(RefusedWhy, u64); RefusedWhy::ALL.len()],
    /// Connections open now, in whatever state.
    pub open: usize,
}

/// A listening socket. Dropping it ends it and all handshakes; sessions handed over live on.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    sessions: mpsc::Receiver<Session>,
    state: Arc<State>,
    task: AbortHandle,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listener {
    /// Listens on `address`; `pace`: the cap of all bulk connections together.
    ///
    /// # Errors
    /// When the address cannot be had or the limits make no sense.
    pub async fn bind(
        address: SocketAddr,
        tls: Arc<TlsContext>,
        limits: ChannelLimits,
        pace: Arc<Pace>,
        gate: Arc<dyn Gate>,
    ) -> Result<Self, ChannelError> {
        limits.check().map_err(ChannelError::Setup)?;
        let io = |e: std::io::Error| ChannelError::Setup(format!("cannot listen on {address}: {e}"));
        let socket = TcpListener::bind(address).await.map_err(io)?;
        let address = socket.local_addr().map_err(io)?;
        let (sender, sessions) = mpsc::channel(limits.max_pending_sessions);
        let state = Arc::new(State {
            connections: Arc::new(Semaphore::new(limits.max_connections)),
            handshakes: Arc::new(Semaphore::new(limits.max_handshakes)),
            by_address: Mutex::new(HashMap::new()),
            waiting: Mutex::new(HashMap::new()),
            accepted: AtomicU64::new(0),
            handed_over: AtomicU64::new(0),
            refused: Default::default(),
            tls,
            limits,
            pace,
            gate,
        });
        let task = tokio::spawn(accept_all(socket, state.clone(), sender)).abort_handle();
        Ok(Self { address, sessions, state, task })
    }

    /// Where it listens, with the port that the system chose if it was 0.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The next whole session. Safe to cancel.
    pub async fn accept(&mut self) -> Option<Session> {
        self.sessions.recv().await
    }

    /// Figures.
    pub fn stats(&self) -> ListenerStats {
        self.state.stats()
    }

    /// [`Self::stats`] for those who do not own the listener.
    pub fn watch(&self) -> Arc<dyn Fn() -> ListenerStats + Send + Sync> {
        let state = Arc::clone(&self.state);
        Arc::new(move || state.stats())
    }
}

/// A bulk connection on its way to its control connection.
struct Bulk {
    stream: TlsStream<TcpStream>,
    permit: OwnedSemaphorePermit,
}

/// A control connection that waits for its bulk connection.
struct Waiting {
    host: String,
    token: Token,
    bulk: oneshot::Sender<Bulk>,
}

struct State {
    tls: Arc<TlsContext>,
    limits: ChannelLimits,
    pace: Arc<Pace>,
    gate: Arc<dyn Gate>,
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    /// Handshakes per address; bounded by `max_handshakes`.
    by_address: Mutex<HashMap<IpAddr, usize>>,
    /// By migration id; bounded by `max_half_open`.
    waiting: Mutex<HashMap<u128, Waiting>>,
    accepted: AtomicU64,
    handed_over: AtomicU64,
    refused: [AtomicU64; RefusedWhy::ALL.len()],
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl State {
    fn stats(&self) -> ListenerStats {
        let mut refused = RefusedWhy::ALL.map(|why| (why, 0));
        for ((_, count), counter) in refused.iter_mut().zip(&self.refused) {
            *count = counter.load(Relaxed);
        }
        ListenerStats {
            accepted: self.accepted.load(Relaxed),
            sessions: self.handed_over.load(Relaxed),
            refused,
            open: self.limits.max_connections.saturating_sub(self.connections.available_permits()),
        }
    }

    fn refuse(&self, address: Option<SocketAddr>, peer: Option<PeerIdentity>, why: RefusedWhy, detail: String) {
        if let Some(at) = RefusedWhy::ALL.iter().position(|w| *w == why)
            && let Some(counter) = self.refused.get(at)
        {
            counter.fetch_add(1, Relaxed);
        }
        self.gate.refused(Refused { address, peer, why, detail });
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u128, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among the handshakes, in all and from one address.
struct HandshakePlace {
    state: Arc<State>,
    address: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl HandshakePlace {
    fn take(state: &Arc<State>, address: IpAddr) -> Result<Self, RefusedWhy> {
        let address = neighbourhood(address);
        let permit = state.handshakes.clone().try_acquire_owned().map_err(|_| RefusedWhy::TooManyHandshakes)?;
        let mut by_address = state.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let count = by_address.entry(address).or_default();
        if *count >= state.limits.max_handshakes_per_address {
            return Err(RefusedWhy::TooManyFromAddress);
        }
        *count += 1;
        drop(by_address);
        Ok(Self { state: state.clone(), address, _permit: permit })
    }
}

impl Drop for HandshakePlace {
    fn drop(&mut self) {
        let mut by_address = self.state.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

/// One host may use all of an IPv6 /64.
fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

async fn accept_all(socket: TcpListener, state: Arc<State>, sessions: mpsc::Sender<Session>) {
    // Ends with this task, and all of its own with it.
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            Some(_) = tasks.join_next() => continue,
        };
        let (tcp, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                state.refuse(None, None, RefusedWhy::System, error.to_string());
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        state.accepted.fetch_add(1, Relaxed);
        let Ok(permit) = state.connections.clone().try_acquire_owned() else {
            state.refuse(Some(address), None, RefusedWhy::TooManyConnections, String::new());
            continue;
        };
        match HandshakePlace::take(&state, address.ip()) {
            Ok(place) => {
                tasks.spawn(serve(tcp, address, permit, place, state.clone(), sessions.clone()));
            }
            Err(why) => state.refuse(Some(address), None, why, String::new()),
        }
    }
}

async fn serve(
    tcp: TcpStream,
    address: SocketAddr,
    permit: OwnedSemaphorePermit,
    place: HandshakePlace,
    state: Arc<State>,
    sessions: mpsc::Sender<Session>,
) {
    let limit_ms = state.limits.handshake_ms;
    let limit = Duration::from_millis(limit_ms);
    let Ok(configs) = state.tls.configs() else {
        state.refuse(Some(address), None, RefusedWhy::Handshake, "no trusted authority's certificate is valid".into());
        return;
    };
    let _ = tcp.set_nodelay(true);
    let handshake = TlsAcceptor::from(configs.server.clone()).accept(tcp).into_fallible();
    let mut stream = match timeout(limit, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err((error, tcp))) => {
            let detail = ChannelError::from_handshake(&error).to_string();
            state.refuse(Some(address), None, RefusedWhy::Handshake, detail);
            linger(tcp).await;
            return;
        }
        Err(_) => {
            let detail = format!("TLS handshake not over after {limit_ms} ms");
            state.refuse(Some(address), None, RefusedWhy::TooSlow, detail);
            return;
        }
    };
    let peer = match peer_identity(stream.get_ref().1, address) {
        Ok(peer) => peer,
        Err(error) => {
            state.refuse(Some(address), None, RefusedWhy::Handshake, error.to_string());
            return;
        }
    };
    let refuse = |why, detail: String| state.refuse(Some(address), Some(peer.clone()), why, detail);
    let open = match timeout(limit, read_opening(&mut stream, MAX_OPEN_BYTES)).await {
        Ok(Ok(frame)) if frame.kind == FrameKind::Open => Open::decode(&frame.payload),
        Ok(Ok(_) | Err(ChannelError::Frame(_))) => None,
        Ok(Err(error)) => {
            refuse(RefusedWhy::Malformed, error.to_string());
            return;
        }
        Err(_) => {
            refuse(RefusedWhy::TooSlow, format!("no first frame after {limit_ms} ms"));
            return;
        }
    };
    let reply = |stream, code, text: String| timeout(limit, reply_and_linger(stream, code, text));
    let Some(open) = open else {
        refuse(RefusedWhy::Malformed, "the first frame is not understood".into());
        let _ = reply(stream, RefusalCode::Malformed, "the first frame is not understood".into()).await;
        return;
    };
    if let Err(text) = state.gate.admit(&peer) {
        refuse(RefusedWhy::NotAdmitted, text.clone());
        let _ = reply(stream, RefusalCode::NotAdmitted, text).await;
        return;
    }
    let outcome = match open.purpose {
        Purpose::Bulk => take_bulk(&state, &peer, &open, stream, permit).await,
        Purpose::Control | Purpose::Check => take_control(&state, &peer, &open, stream, permit, place, sessions).await,
    };
    if let Err((why, code, stream)) = outcome {
        let text = match why {
            RefusedWhy::Busy => "too many migrations are being opened here; try later",
            RefusedWhy::Duplicate => "this migration id is being opened already",
            RefusedWhy::NoBulk => "the bulk connection did not come in time",
            _ => "no control connection of this host waits for this bulk connection",
        };
        refuse(why, text.into());
        if let (Some(code), Some(stream)) = (code, stream) {
            let _ = reply(stream, code, text.into()).await;
        }
    }
}

type Refusal = (RefusedWhy, Option<RefusalCode>, Option<TlsStream<TcpStream>>);

async fn take_bulk(
    state: &State,
    peer: &PeerIdentity,
    open: &Open,
    mut stream: TlsStream<TcpStream>,
    permit: OwnedSemaphorePermit,
) -> Result<(), Refusal> {
    let waiting = {
        let mut all = state.waiting();
        // A stranger who guesses an id must not push the right one out.
        match all.get(&open.migration) {
            Some(w) if w.host == peer.host && same_token(&w.token, &open.token) => all.remove(&open.migration),
            _ => None,
        }
    };
    let Some(waiting) = waiting else {
        return Err((RefusedWhy::UnknownSession, Some(RefusalCode::UnknownSession), Some(stream)));
    };
    let accepted = Frame { kind: FrameKind::OpenReply, payload: OpenReply::Accepted([0; 32]).encode() };
    let limit = Duration::from_millis(state.limits.handshake_ms);
    // When this fails or the other is gone, dropping the channel tells it.
    if let Ok(Ok(())) = timeout(limit, write_opening(&mut stream, &accepted)).await {
        let _ = waiting.bulk.send(Bulk { stream, permit });
    }
    Ok(())
}

async fn take_control(
    state: &Arc<State>,
    peer: &PeerIdentity,
    open: &Open,
    mut stream: TlsStream<TcpStream>,
    permit: OwnedSemaphorePermit,
    place: HandshakePlace,
    sessions: mpsc::Sender<Session>,
) -> Result<(), Refusal> {
    let busy = |stream| (RefusedWhy::Busy, Some(RefusalCode::Busy), Some(stream));
    // The place in the queue is taken before anything is promised.
    let Ok(slot) = sessions.try_reserve_owned() else { return Err(busy(stream)) };
    let mut token: Token = [0; 32];
    if SystemRandom::new().fill(&mut token).is_err() {
        return Err(busy(stream));
    }
    let mut half_open = None;
    if open.purpose == Purpose::Control {
        let (sender, receiver) = oneshot::channel();
        let mut all = state.waiting();
        if all.contains_key(&open.migration) {
            drop(all);
            return Err((RefusedWhy::Duplicate, Some(RefusalCode::Duplicate), Some(stream)));
        }
        if all.len() >= state.limits.max_half_open {
            drop(all);
            return Err(busy(stream));
        }
        all.insert(open.migration, Waiting { host: peer.host.clone(), token, bulk: sender });
        drop(all);
        half_open = Some((HalfOpen { state: state.clone(), migration: open.migration, token }, receiver));
    } else {
        token = [0; 32];
    }
    let accepted = Frame { kind: FrameKind::OpenReply, payload: OpenReply::Accepted(token).encode() };
    let limit = Duration::from_millis(state.limits.handshake_ms);
    match timeout(limit, write_opening(&mut stream, &accepted)).await {
        Ok(Ok(())) => {}
        _ => return Err((RefusedWhy::TooSlow, None, None)),
    }
    // Handshakes of others need not wait while this one does.
    drop(place);
    let bulk = match half_open {
        None => None,
        Some((entry, receiver)) => {
            let bulk = timeout(Duration::from_millis(state.limits.tie_ms), receiver).await;
            drop(entry);
            let Ok(Ok(bulk)) = bulk else { return Err((RefusedWhy::NoBulk, None, None)) };
            let setup =
                Setup { limit: state.limits.max_bulk_bytes, pace: Some(state.pace.clone()), permit: Some(bulk.permit) };
            Some(Connection::spawn(bulk.stream, setup, &state.limits))
        }
    };
    let setup = Setup { limit: state.limits.max_control_bytes, pace: None, permit: Some(permit) };
    let control = Connection::spawn(stream, setup, &state.limits);
    state.handed_over.fetch_add(1, Relaxed);
    slot.send(Session { peer: peer.clone(), migration: open.migration, control, bulk });
    Ok(())
}

/// Takes the entry away again, however the waiting ends.
struct HalfOpen {
    state: Arc<State>,
    migration: u128,
    token: Token,
}

impl Drop for HalfOpen {
    fn drop(&mut self) {
        let mut all = self.state.waiting();
        // After the bulk connection has taken it, another may have used the same id.
        if all.get(&self.migration).is_some_and(|w| same_token(&w.token, &self.token)) {
            all.remove(&self.migration);
        }
    }
}

async fn reply_and_linger(mut stream: TlsStream<TcpStream>, code: RefusalCode, text: String) {
    let reply = Frame { kind: FrameKind::OpenReply, payload: OpenReply::Refused(code, text).encode() };
    if write_opening(&mut stream, &reply).await.is_ok() {
        let _ = stream.shutdown().await;
        linger(stream.into_inner().0).await;
    }
}

/// Lets the peer read our last words: closing with unread data in the buffer would take them back (TCP reset).
async fn linger(mut tcp: TcpStream) {
    let drain = async {
        tcp.shutdown().await?;
        tokio::io::copy(&mut (&mut tcp).take(LINGER_BYTES), &mut tokio::io::sink()).await
    };
    let _ = timeout(LINGER, drain).await;
}
