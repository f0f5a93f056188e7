//! The two connections of one migration, for a task that must never wait for its peer.
use ferry_migrate::channel::{ChannelError, Connection, Session};
use ferry_migrate::message::{self, Message};
use ferry_migrate::wire::BulkKind;

/// Room that is left for late frames and what else is small, messages.
const RESERVED: usize = 8;
/// Longest batch on the wire, bytes: how much a free place of the queue is worth.
const BATCH_BYTES: usize = 128 * 1024;

/// What has come.
pub enum Received {
    /// On the control connection.
    Control(Vec<u8>),
    /// On the bulk connection.
    Bulk(Vec<u8>),
    /// Nothing more will come: why.
    Lost(String),
}

/// A migration's connections.
pub struct Link {
    /// The migration's id.
    pub id: u128,
    /// The peer, by its certificate.
    pub peer: String,
    /// SHA-256 of its certificate.
    pub certificate: String,
    control: Connection,
    bulk: Connection,
    bulk_closed: bool,
}

impl Link {
    /// `None`: a session without a bulk connection, which is no migration's.
    pub fn new(session: Session) -> Option<Self> {
        Some(Self {
            id: session.migration,
            peer: session.peer.host,
            certificate: session.peer.certificate.fingerprint,
            control: session.control,
            bulk: session.bulk?,
            bulk_closed: false,
        })
    }

    /// What comes next. Safe to cancel.
    pub async fn next(&mut self) -> Received {
        loop {
            let Self { control, bulk, bulk_closed, .. } = self;
            tokio::select! {
                biased;
                received = control.receive() => return match received {
                    Ok(Some(bytes)) => Received::Control(bytes),
                    Ok(None) => Received::Lost("closed by the peer".into()),
                    Err(error) => Received::Lost(error.to_string()),
                },
                received = bulk.receive(), if !*bulk_closed => match received {
                    Ok(Some(bytes)) => return Received::Bulk(bytes),
                    // What the peer has to say about that comes on the control connection.
                    Ok(None) => *bulk_closed = true,
                    Err(error) => return Received::Lost(error.to_string()),
                },
            }
        }
    }

    /// Sends on the control connection.
    ///
    /// # Errors
    /// The connection is lost, or the peer does not read.
    pub fn send(&self, message: &Message) -> Result<(), String> {
        match message {
            // A stopped VM waits: no cap holds.
            Message::FinalBegin { .. } => self.bulk.sender.set_paced(false),
            Message::Resume => self.bulk.sender.set_paced(true),
            _ => {}
        }
        let bytes = message::encode(message).map_err(|e| e.to_string())?;
        self.control.sender.try_send(bytes).map_err(|e| e.to_string())
    }

    /// Sends on the bulk connection a message of this kind, whose bytes begin with a place for it.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_bulk(&self, kind: BulkKind, mut bytes: Vec<u8>) -> Result<(), ChannelError> {
        if let Some(first) = bytes.first_mut() {
            *first = kind.byte();
        }
        self.bulk.sender.try_send(bytes)
    }

    /// Bytes of batches that the bulk connection takes now without waiting.
    pub fn room_bytes(&self) -> usize {
        self.bulk.sender.room().saturating_sub(RESERVED) * BATCH_BYTES
    }

    /// Closes both when what was sent has gone out.
    pub fn close(self, runtime: &tokio::runtime::Handle) {
        let Self { control, bulk, .. } = self;
        runtime.spawn(async move {
            // Reported already, or of no interest.
            let (_, _) = tokio::join!(control.sender.close(), bulk.sender.close());
            drop((control.receiver, bulk.receiver));
        });
    }
}
