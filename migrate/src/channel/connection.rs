//! An open connection: messages in both directions, keep-alive, time-outs, and one clear reason for its end.
//!
//! Two tasks per connection do the reading and the writing, so that neither direction waits for the other and a user of the connection that is
//! busy does not look dead to the peer. Dropping both halves cuts the connection.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::frame::HEADER_BYTES;
use super::{ChannelError, ChannelLimits, Frame, FrameDecoder, FrameHeader, FrameKind, Pace};

/// What is written at once; one TLS record.
const CHUNK_BYTES: usize = 16 * 1024;
/// What is read at once.
const READ_BYTES: usize = 64 * 1024;
/// Shorter waits are not worth it: a timer that has come due already takes up to a millisecond.
const MIN_WAIT: Duration = Duration::from_millis(2);
/// Slowest progress of a frame that is accepted.
const MIN_FRAME_BYTES_PER_S: u64 = 16 * 1024;

/// What a connection has carried.
#[derive(Debug, Default)]
struct Counters {
    sent_messages: AtomicU64,
    sent_bytes: AtomicU64,
    received_messages: AtomicU64,
    received_bytes: AtomicU64,
}

/// What a connection has carried: messages of the layer above and their bytes, without framing and TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionStats {
    /// Messages handed to the system.
    pub sent_messages: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Messages received whole.
    pub received_messages: u64,
    /// Their bytes.
    pub received_bytes: u64,
}

#[derive(Debug)]
struct Shared {
    limit: usize,
    counters: Counters,
    /// Why it ended; the first reason stays.
    end: Mutex<Option<ChannelError>>,
    /// The peer has said that nothing more comes.
    peer_closed: AtomicBool,
    stop: watch::Sender<bool>,
}

impl Shared {
    /// Keeps the reason if it is the first.
    fn note(&self, error: ChannelError) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn fail(&self, error: ChannelError) {
        self.note(error);
        self.stop.send_replace(true);
    }

    fn end(&self) -> Option<ChannelError> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn stats(&self) -> ConnectionStats {
        ConnectionStats {
            sent_messages: self.counters.sent_messages.load(Relaxed),
            sent_bytes: self.counters.sent_bytes.load(Relaxed),
            received_messages: self.counters.received_messages.load(Relaxed),
            received_bytes: self.counters.received_bytes.load(Relaxed),
        }
    }
}

/// Held by both halves; when the last is gone, so is the connection.
#[derive(Debug)]
struct Guard(Arc<Shared>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.fail(ChannelError::Closed);
    }
}

enum Outgoing {
    Message(Vec<u8>),
    Close(oneshot::Sender<()>),
}

/// The sending half; clones send over the same connection, in the order of their calls.
#[derive(Clone, Debug)]
pub struct Sender {
    queue: mpsc::Sender<Outgoing>,
    paced: Arc<watch::Sender<bool>>,
    shared: Arc<Shared>,
    close_ms: u64,
    _guard: Arc<Guard>,
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver {
    queue: mpsc::Receiver<Vec<u8>>,
    shared: Arc<Shared>,
    _guard: Arc<Guard>,
}

/// Both halves.
#[derive(Debug)]
pub struct Connection {
    /// For sending.
    pub sender: Sender,
    /// For receiving.
    pub receiver: Receiver,
}

impl Sender {
    /// Queues a message; waits while the queue is full. The message may still be lost: only an answer says that it has arrived. Safe to cancel: then nothing was queued.
    ///
    /// # Errors
    /// [`ChannelError::TooLong`], or why the connection has ended.
    pub async fn send(&self, message: Vec<u8>) -> Result<(), ChannelError> {
        if message.len() > self.shared.limit {
            return Err(ChannelError::TooLong { bytes: message.len(), limit: self.shared.limit });
        }
        self.queue.send(Outgoing::Message(message)).await.map_err(|_| self.reason())
    }

    /// Queues a message if there is room for it; never waits.
    ///
    /// # Errors
    /// [`ChannelError::TooLong`], [`ChannelError::Full`], or why the connection has ended.
    pub fn try_send(&self, message: Vec<u8>) -> Result<(), ChannelError> {
        if message.len() > self.shared.limit {
            return Err(ChannelError::TooLong { bytes: message.len(), limit: self.shared.limit });
        }
        self.queue.try_send(Outgoing::Message(message)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ChannelError::Full,
            mpsc::error::TrySendError::Closed(_) => self.reason(),
        })
    }

    /// Messages that [`Self::try_send`] takes now.
    pub fn room(&self) -> usize {
        self.queue.capacity()
    }

    /// Whether the bandwidth cap holds for what this connection sends, also for what is queued already. Switched off for the final delta, which a stopped VM waits for.
    pub fn set_paced(&self, paced: bool) {
        self.paced.send_replace(paced);
    }

    /// Sends what is queued, says that nothing more comes, and waits until the system has it. The peer can still send.
    ///
    /// # Errors
    /// When that did not happen in time; the connection is cut then.
    pub async fn close(self) -> Result<(), ChannelError> {
        let (done, closed) = oneshot::channel();
        let close = async {
            self.queue.send(Outgoing::Close(done)).await.map_err(|_| self.reason())?;
            closed.await.map_err(|_| self.reason())
        };
        match timeout(Duration::from_millis(self.close_ms), close).await {
            Ok(result) => result,
            Err(_) => {
                let error = ChannelError::Timeout { what: "closing the connection", limit_ms: self.close_ms };
                self.shared.fail(error.clone());
                Err(error)
            }
        }
    }

    /// What the connection has carried.
    pub fn stats(&self) -> ConnectionStats {
        self.shared.stats()
    }

    fn reason(&self) -> ChannelError {
        self.shared.end().unwrap_or(ChannelError::Closed)
    }
}

impl Receiver {
    /// The next message. None: the peer has closed, and everything before that was returned. Safe to cancel: no message is lost.
    ///
    /// # Errors
    /// Why the connection has ended, after all messages that arrived whole.
    pub async fn receive(&mut self) -> Result<Option<Vec<u8>>, ChannelError> {
        match self.queue.recv().await {
            Some(message) => Ok(Some(message)),
            None if self.shared.peer_closed.load(Relaxed) => Ok(None),
            None => Err(self.shared.end().unwrap_or(ChannelError::Closed)),
        }
    }

    /// What the connection has carried.
    pub fn stats(&self) -> ConnectionStats {
        self.shared.stats()
    }
}

/// What a connection is made with.
pub(super) struct Setup {
    /// Longest message, bytes.
    pub limit: usize,
    /// The cap; none for control.
    pub pace: Option<Arc<Pace>>,
    /// The connection's place in its listener's count.
    pub permit: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// Sends a message; see [`Sender::send`].
    ///
    /// # Errors
    /// See [`Sender::send`].
    pub async fn send(&self, message: Vec<u8>) -> Result<(), ChannelError> {
        self.sender.send(message).await
    }

    /// The next message; see [`Receiver::receive`].
    ///
    /// # Errors
    /// See [`Receiver::receive`].
    pub async fn receive(&mut self) -> Result<Option<Vec<u8>>, ChannelError> {
        self.receiver.receive().await
    }

    pub(super) fn spawn<S>(stream: S, setup: Setup, limits: &ChannelLimits) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read_half, write_half) = tokio::io::split(stream);
        let (out_tx, out_rx) = mpsc::channel(limits.queue_messages);
        let (in_tx, in_rx) = mpsc::channel(limits.queue_messages);
        let (paced_tx, paced_rx) = watch::channel(true);
        let (stop_tx, stop_rx) = watch::channel(false);
        let shared = Arc::new(Shared {
            limit: setup.limit,
            counters: Counters::default(),
            end: Mutex::new(None),
            peer_closed: AtomicBool::new(false),
            stop: stop_tx,
        });
        let permit = Arc::new(setup.permit);
        let reader = Reader {
            stream: read_half,
            queue: in_tx,
            shared: shared.clone(),
            limits: limits.clone(),
            _permit: permit.clone(),
        };
        let writer = Writer {
            stream: write_half,
            queue: out_rx,
            shared: shared.clone(),
            limits: limits.clone(),
            pace: setup.pace,
            paced: paced_rx,
            scratch: Vec::with_capacity(CHUNK_BYTES),
            _permit: permit,
        };
        tokio::spawn(reader.run(stop_rx.clone()));
        tokio::spawn(writer.run(stop_rx));
        let guard = Arc::new(Guard(shared.clone()));
        Self {
            sender: Sender {
                queue: out_tx,
                paced: Arc::new(paced_tx),
                shared: shared.clone(),
                close_ms: limits.close_ms,
                _guard: guard.clone(),
            },
            receiver: Receiver { queue: in_rx, shared, _guard: guard },
        }
    }
}

/// Until the connection is to end.
async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that nobody is left to stop it, which is a stop too.
    let _ = stop.wait_for(|stop| *stop).await;
}

struct Reader<S> {
    stream: ReadHalf<S>,
    queue: mpsc::Sender<Vec<u8>>,
    shared: Arc<Shared>,
    limits: ChannelLimits,
    _permit: Arc<Option<OwnedSemaphorePermit>>,
}

impl<S: AsyncRead + Send> Reader<S> {
    async fn run(mut self, stop: watch::Receiver<bool>) {
        tokio::select! {
            biased;
            () = stopped(stop) => {}
            result = self.read() => {
                if let Err(error) = result {
                    self.shared.fail(error);
                }
            }
        }
    }

    async fn read(&mut self) -> Result<(), ChannelError> {
        let mut decoder = FrameDecoder::new(self.shared.limit);
        let mut buffer = vec![0; READ_BYTES];
        // When the frame being received must be complete.
        let mut frame_end: Option<Instant> = None;
        loop {
            let idle_end = Instant::now() + Duration::from_millis(self.limits.idle_ms);
            let deadline = frame_end.map_or(idle_end, |end| end.min(idle_end));
            let read = tokio::select! {
                biased;
                read = self.stream.read(&mut buffer) => read.map_err(|e| ChannelError::from_io(&e))?,
                () = sleep_until(deadline) => {
                    return Err(match frame_end {
                        Some(end) if end <= idle_end => {
                            ChannelError::Timeout { what: "one message", limit_ms: self.limits.frame_ms }
                        }
                        _ => ChannelError::Idle(self.limits.idle_ms),
                    });
                }
            };
            if read == 0 {
                decoder.finish()?;
                // No close before: even between two frames that is a cut.
                return Err(ChannelError::Cut);
            }
            let mut input = buffer.get(..read).unwrap_or_default();
            while let Some(frame) = decoder.feed(&mut input)? {
                frame_end = None;
                if !self.take(frame).await? {
                    return Ok(());
                }
            }
            match decoder.inside() {
                None => frame_end = None,
                Some(len) if frame_end.is_none() => {
                    let len = u64::try_from(len).unwrap_or(u64::MAX);
                    let allowed_ms = self.limits.frame_ms + len.saturating_mul(1000) / MIN_FRAME_BYTES_PER_S;
                    frame_end = Some(Instant::now() + Duration::from_millis(allowed_ms));
                }
                Some(_) => {}
            }
        }
    }

    /// False: the peer has closed.
    async fn take(&mut self, frame: Frame) -> Result<bool, ChannelError> {
        match frame.kind {
            FrameKind::Data => {
                self.shared.counters.received_messages.fetch_add(1, Relaxed);
                self.shared.counters.received_bytes.fetch_add(frame.payload.len() as u64, Relaxed);
                // Nobody wants to receive: the sending half may still be in use.
                let _ = self.queue.send(frame.payload).await;
                Ok(true)
            }
            FrameKind::KeepAlive => Ok(true),
            FrameKind::Close => {
                // Before the queue's end, which is what the receiver sees first.
                self.shared.peer_closed.store(true, Relaxed);
                Ok(false)
            }
            FrameKind::Open | FrameKind::OpenReply => Err(ChannelError::OutOfPlace),
        }
    }
}

struct Writer<S> {
    stream: WriteHalf<S>,
    queue: mpsc::Receiver<Outgoing>,
    shared: Arc<Shared>,
    limits: ChannelLimits,
    pace: Option<Arc<Pace>>,
    paced: watch::Receiver<bool>,
    scratch: Vec<u8>,
    _permit: Arc<Option<OwnedSemaphorePermit>>,
}

impl<S: AsyncWrite + Send> Writer<S> {
    async fn run(mut self, stop: watch::Receiver<bool>) {
        tokio::select! {
            biased;
            () = stopped(stop) => {}
            result = self.write() => {
                match result {
                    // The reader finds the end itself, after everything that has arrived before it.
                    Err(ChannelError::Cut) => self.shared.note(ChannelError::Cut),
                    Err(error) => self.shared.fail(error),
                    Ok(()) => {}
                }
            }
        }
    }

    async fn write(&mut self) -> Result<(), ChannelError> {
        let keep_alive = Duration::from_millis(self.limits.keep_alive_ms);
        loop {
            match timeout(keep_alive, self.queue.recv()).await {
                Ok(Some(Outgoing::Message(message))) => {
                    self.frame(FrameKind::Data, &message).await?;
                    self.shared.counters.sent_messages.fetch_add(1, Relaxed);
                    self.shared.counters.sent_bytes.fetch_add(message.len() as u64, Relaxed);
                }
                Ok(Some(Outgoing::Close(done))) => {
                    self.queue.close();
                    self.frame(FrameKind::Close, &[]).await?;
                    self.stream.shutdown().await.map_err(|e| ChannelError::from_io(&e))?;
                    let _ = done.send(());
                    return Ok(());
                }
                // All senders are gone; the receiver still listens, and the peer must hear that we live.
                Ok(None) => {
                    tokio::time::sleep(keep_alive).await;
                    self.frame(FrameKind::KeepAlive, &[]).await?;
                }
                Err(_) => self.frame(FrameKind::KeepAlive, &[]).await?,
            }
        }
    }

    async fn frame(&mut self, kind: FrameKind, payload: &[u8]) -> Result<(), ChannelError> {
        let header = FrameHeader { kind, len: payload.len() }.to_bytes().ok_or(ChannelError::OutOfPlace)?;
        // Header and beginning go together: one record, one packet for a short message.
        let (first, rest) = payload.split_at_checked(CHUNK_BYTES - HEADER_BYTES).unwrap_or((payload, &[]));
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        scratch.extend_from_slice(&header);
        scratch.extend_from_slice(first);
        let written = self.chunk(&scratch).await;
        self.scratch = scratch;
        written?;
        for chunk in rest.chunks(CHUNK_BYTES) {
            self.chunk(chunk).await?;
        }
        let flush = self.stream.flush();
        match timeout(Duration::from_millis(self.limits.write_ms), flush).await {
            Ok(result) => result.map_err(|e| ChannelError::from_io(&e)),
            Err(_) => Err(ChannelError::Stalled(self.limits.write_ms)),
        }
    }

    async fn chunk(&mut self, bytes: &[u8]) -> Result<(), ChannelError> {
        if let Some(pace) = &self.pace
            && *self.paced.borrow_and_update()
        {
            let wait = pace.take(bytes.len());
            // The bucket remembers what is not waited for now.
            if wait >= MIN_WAIT {
                let end = Instant::now() + wait;
                tokio::select! {
                    () = sleep_until(end) => {}
                    _ = self.paced.wait_for(|paced| !paced) => {}
                }
            }
        }
        match timeout(Duration::from_millis(self.limits.write_ms), self.stream.write_all(bytes)).await {
            Ok(result) => result.map_err(|e| ChannelError::from_io(&e)),
            Err(_) => Err(ChannelError::Stalled(self.limits.write_ms)),
        }
    }
}

/// Reads one frame of the opening, and not a byte more.
pub(super) async fn read_opening<S: AsyncRead + Unpin>(stream: &mut S, limit: usize) -> Result<Frame, ChannelError> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.map_err(|e| ChannelError::from_io(&e))?;
    let header = FrameHeader::parse(header, limit)?;
    let mut payload = vec![0; header.len];
    stream.read_exact(&mut payload).await.map_err(|e| ChannelError::from_io(&e))?;
    Ok(Frame { kind: header.kind, payload })
}

/// Writes one frame of the opening.
pub(super) async fn write_opening<S: AsyncWrite + Unpin>(stream: &mut S, frame: &Frame) -> Result<(), ChannelError> {
    let bytes = frame.to_bytes().ok_or(ChannelError::OutOfPlace)?;
    stream.write_all(&bytes).await.map_err(|e| ChannelError::from_io(&e))?;
    stream.flush().await.map_err(|e| ChannelError::from_io(&e))
}
