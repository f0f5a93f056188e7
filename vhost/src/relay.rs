//! The policy point between a frontend and the `vhost` crate.
//!
//! Every message passes here with its descriptors. What the crate does not know (SEND_RARP, NET_SET_MTU, unknown codes),
//! or does not check (indices, feature subsets, kinds of descriptors), or would end the session at (QEMU 7.2 sends
//! SET_VRING_ENABLE before SET_FEATURES; a refused message leaves no answer) is decided here; the rest is written into
//! one end of a socket pair, at whose other end the crate's request handler sits, and what it answers is handed back.
//! Strictly one message at a time, so that one thread does both ends.
//!
//! A message that is refused gets a negative acknowledgement where the frontend asked for one (REPLY_ACK, NEED_REPLY) and
//! is otherwise only counted. The session ends where going on would be worse: the frontend waits for an answer that
//! cannot be given, or believes that features are in force which are not.
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as CrateError, VhostUserBackendReqHandlerMut};

use crate::fdio;
use crate::features;
use crate::message::{self, Message, NEED_REPLY, REPLY};

/// What the relay needs to know of the session behind the crate, and does with it directly.
pub trait Backend: VhostUserBackendReqHandlerMut {
    /// Virtio features offered.
    fn offered_features(&self) -> u64;
    /// Protocol features offered.
    fn offered_protocol_features(&self) -> u64;
    /// Number of vrings; indices are below.
    fn vrings(&self) -> u32;
    /// Most memory regions taken (GET_MAX_MEM_SLOTS).
    fn memory_slots(&self) -> u64;
    /// SET_VRING_ENABLE that came before SET_FEATURES.
    fn enable_vring(&mut self, index: u32, enable: bool);
    /// GET_VRING_BASE: stops the ring. Cannot fail.
    fn stop_vring(&mut self, index: u32) -> u32;
    /// SEND_RARP.
    fn rarp(&mut self, mac: [u8; 6]);
    /// NET_SET_MTU; the error says why not.
    fn mtu(&mut self, mtu: u64) -> Result<(), String>;
}

/// What the relay has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RelayCounters {
    /// Messages by name; unknown codes together as `UNKNOWN`.
    pub messages: BTreeMap<&'static str, u64>,
    /// Messages with a code that vhost-user does not define, or that this back-end does not implement.
    pub unknown_codes: u64,
    /// SET_VRING_ENABLE before SET_FEATURES.
    pub early_enables: u64,
    /// Messages refused, whatever the reason.
    pub refused: u64,
    /// Messages that came with descriptors they may not have, or with too many.
    pub unexpected_fds: u64,
    /// SEND_RARP messages.
    pub rarps: u64,
}

/// What to do after a message.
#[derive(Debug, Default)]
pub struct Handled {
    /// Bytes and descriptors for the frontend.
    pub reply: Option<(Vec<u8>, Vec<OwnedFd>)>,
    /// The message was refused, in words.
    pub refused: Option<String>,
    /// The session must end, in words.
    pub end: Option<String>,
}

enum Verdict {
    /// The crate handles it.
    Forward,
    /// Done here; acknowledged if asked for.
    Done,
    /// Not done.
    Refuse(String),
    /// The message always has this reply.
    Reply(Vec<u8>),
    /// Cannot go on.
    End(String),
}

/// Lengths and descriptors a message must have.
struct Rule {
    payload: Length,
    fds: std::ops::RangeInclusive<usize>,
}

enum Length {
    Exactly(usize),
    /// Eight bytes, and 32 for each descriptor.
    MemoryTable,
}

fn rule(code: FrontendReq) -> Option<Rule> {
    use FrontendReq as F;
    let (payload, fds) = match code {
        F::GET_FEATURES
        | F::SET_OWNER
        | F::RESET_OWNER
        | F::GET_PROTOCOL_FEATURES
        | F::GET_QUEUE_NUM
        | F::RESET_DEVICE
        | F::GET_MAX_MEM_SLOTS => (0, 0..=0),
        F::SET_FEATURES
        | F::SET_PROTOCOL_FEATURES
        | F::SET_VRING_NUM
        | F::SET_VRING_BASE
        | F::GET_VRING_BASE
        | F::SET_VRING_ENABLE
        | F::SEND_RARP
        | F::NET_SET_MTU => (8, 0..=0),
        F::SET_VRING_ADDR => (40, 0..=0),
        F::SET_VRING_KICK | F::SET_VRING_CALL | F::SET_VRING_ERR => (8, 0..=1),
        F::SET_LOG_BASE => (16, 1..=1),
        F::ADD_MEM_REG => (40, 1..=1),
        // Older frontends attach a descriptor: the specification has it closed unused.
        F::REM_MEM_REG => (40, 0..=1),
        F::SET_MEM_TABLE => return Some(Rule { payload: Length::MemoryTable, fds: 1..=32 }),
        _ => return None,
    };
    Some(Rule { payload: Length::Exactly(payload), fds })
}

/// True for messages whose sender waits for a payload even without NEED_REPLY.
fn always_answered(code: FrontendReq) -> bool {
    use FrontendReq as F;
    matches!(
        code,
        F::GET_FEATURES
            | F::GET_PROTOCOL_FEATURES
            | F::GET_VRING_BASE
            | F::GET_QUEUE_NUM
            | F::GET_CONFIG
            | F::CREATE_CRYPTO_SESSION
            | F::POSTCOPY_ADVISE
            | F::POSTCOPY_END
            | F::GET_INFLIGHT_FD
            | F::GET_MAX_MEM_SLOTS
            | F::GET_STATUS
            | F::GET_SHARED_OBJECT
            | F::SET_DEVICE_STATE_FD
            | F::CHECK_DEVICE_STATE
            | F::GET_SHMEM_CONFIG
            | F::SET_LOG_BASE
    )
}

/// The name of a request code.
pub fn code_name(code: u32) -> &'static str {
    use FrontendReq as F;
    match F::try_from(code) {
        Ok(F::GET_FEATURES) => "GET_FEATURES",
        Ok(F::SET_FEATURES) => "SET_FEATURES",
        Ok(F::SET_OWNER) => "SET_OWNER",
        Ok(F::RESET_OWNER) => "RESET_OWNER",
        Ok(F::SET_MEM_TABLE) => "SET_MEM_TABLE",
        Ok(F::SET_LOG_BASE) => "SET_LOG_BASE",
        Ok(F::SET_LOG_FD) => "SET_LOG_FD",
        Ok(F::SET_VRING_NUM) => "SET_VRING_NUM",
        Ok(F::SET_VRING_ADDR) => "SET_VRING_ADDR",
        Ok(F::SET_VRING_BASE) => "SET_VRING_BASE",
        Ok(F::GET_VRING_BASE) => "GET_VRING_BASE",
        Ok(F::SET_VRING_KICK) => "SET_VRING_KICK",
        Ok(F::SET_VRING_CALL) => "SET_VRING_CALL",
        Ok(F::SET_VRING_ERR) => "SET_VRING_ERR",
        Ok(F::GET_PROTOCOL_FEATURES) => "GET_PROTOCOL_FEATURES",
        Ok(F::SET_PROTOCOL_FEATURES) => "SET_PROTOCOL_FEATURES",
        Ok(F::GET_QUEUE_NUM) => "GET_QUEUE_NUM",
        Ok(F::SET_VRING_ENABLE) => "SET_VRING_ENABLE",
        Ok(F::SEND_RARP) => "SEND_RARP",
        Ok(F::NET_SET_MTU) => "NET_SET_MTU",
        Ok(F::SET_BACKEND_REQ_FD) => "SET_BACKEND_REQ_FD",
        Ok(F::IOTLB_MSG) => "IOTLB_MSG",
        Ok(F::SET_VRING_ENDIAN) => "SET_VRING_ENDIAN",
        Ok(F::GET_CONFIG) => "GET_CONFIG",
        Ok(F::SET_CONFIG) => "SET_CONFIG",
        Ok(F::CREATE_CRYPTO_SESSION) => "CREATE_CRYPTO_SESSION",
        Ok(F::CLOSE_CRYPTO_SESSION) => "CLOSE_CRYPTO_SESSION",
        Ok(F::POSTCOPY_ADVISE) => "POSTCOPY_ADVISE",
        Ok(F::POSTCOPY_LISTEN) => "POSTCOPY_LISTEN",
        Ok(F::POSTCOPY_END) => "POSTCOPY_END",
        Ok(F::GET_INFLIGHT_FD) => "GET_INFLIGHT_FD",
        Ok(F::SET_INFLIGHT_FD) => "SET_INFLIGHT_FD",
        Ok(F::GPU_SET_SOCKET) => "GPU_SET_SOCKET",
        Ok(F::RESET_DEVICE) => "RESET_DEVICE",
        Ok(F::VRING_KICK) => "VRING_KICK",
        Ok(F::GET_MAX_MEM_SLOTS) => "GET_MAX_MEM_SLOTS",
        Ok(F::ADD_MEM_REG) => "ADD_MEM_REG",
        Ok(F::REM_MEM_REG) => "REM_MEM_REG",
        Ok(F::SET_STATUS) => "SET_STATUS",
        Ok(F::GET_STATUS) => "GET_STATUS",
        Ok(F::GET_SHARED_OBJECT) => "GET_SHARED_OBJECT",
        Ok(F::SET_DEVICE_STATE_FD) => "SET_DEVICE_STATE_FD",
        Ok(F::CHECK_DEVICE_STATE) => "CHECK_DEVICE_STATE",
        Ok(F::GET_SHMEM_CONFIG) => "GET_SHMEM_CONFIG",
        Err(_) => "UNKNOWN",
    }
}

/// Locks the session; a panic elsewhere does not make it unusable.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection's relay.
pub struct Relay<B: Backend> {
    /// Our end of the pair; closed when the relay goes.
    near: UnixStream,
    /// A second handle on the crate's end, to clear out what it left unread.
    far: UnixStream,
    handler: BackendReqHandler<Mutex<B>>,
    backend: Arc<Mutex<B>>,
    /// Virtio features in force, once SET_FEATURES came.
    features: Option<u64>,
    protocol_features: u64,
}

impl<B: Backend> Relay<B> {
    /// A relay in front of `backend` for a new connection.
    pub fn new(backend: Arc<Mutex<B>>) -> io::Result<Self> {
        let (near, far) = UnixStream::pair()?;
        let handler = BackendReqHandler::from_stream(far.try_clone()?, Arc::clone(&backend));
        Ok(Self { near, far, handler, backend, features: None, protocol_features: 0 })
    }

    /// Handles one message.
    pub fn handle(&mut self, mut message: Message, counters: &mut RelayCounters) -> Handled {
        let name = code_name(message.code);
        *counters.messages.entry(name).or_default() += 1;
        // NEED_REPLY means something only after REPLY_ACK was negotiated.
        let acknowledge = message.flags & NEED_REPLY != 0 && self.protocol_features & features::PROTOCOL_REPLY_ACK != 0;
        match self.judge(&mut message, acknowledge, counters) {
            Verdict::Forward => self.forward(&message, name, acknowledge, counters),
            Verdict::Done => Handled { reply: acknowledge.then(|| ack(message.code, true)), ..Handled::default() },
            Verdict::Reply(payload) => {
                Handled { reply: Some((message::reply(message.code, &payload), Vec::new())), ..Handled::default() }
            }
            Verdict::Refuse(why) => {
                counters.refused += 1;
                Handled {
                    reply: acknowledge.then(|| ack(message.code, false)),
                    refused: Some(format!("{name} refused: {why}")),
                    end: None,
                }
            }
            Verdict::End(why) => {
                counters.refused += 1;
                Handled { end: Some(format!("{name}: {why}")), ..Handled::default() }
            }
        }
    }

    fn judge(&mut self, message: &mut Message, acknowledge: bool, counters: &mut RelayCounters) -> Verdict {
        use FrontendReq as F;
        let Ok(code) = F::try_from(message.code) else {
            counters.unknown_codes += 1;
            counters.unexpected_fds += u64::from(message.fd_flood || !message.fds.is_empty());
            return Verdict::Refuse(format!("unknown request code {}", message.code));
        };
        let Some(rule) = rule(code) else {
            counters.unknown_codes += 1;
            counters.unexpected_fds += u64::from(message.fd_flood || !message.fds.is_empty());
            return match code {
                // "A zero-length payload indicates an error" (vhost-user, GET_CONFIG).
                F::GET_CONFIG => Verdict::Reply(Vec::new()),
                c if always_answered(c) => Verdict::End("not offered, and it has no negative answer".into()),
                _ => Verdict::Refuse("not offered".into()),
            };
        };
        if let Err(why) = check_form(message, &rule) {
            if message.fd_flood || !rule.fds.contains(&message.fds.len()) {
                counters.unexpected_fds += 1;
            }
            message.fds.clear();
            return if always_answered(code) { Verdict::End(why) } else { Verdict::Refuse(why) };
        }
        let value = message.u64_at(0).unwrap_or_default();
        let index = message.u32_at(0).unwrap_or_default();
        let number = message.u32_at(4).unwrap_or_default();
        let mut backend = lock(&self.backend);
        let vrings = backend.vrings();
        let no_such_ring = |index: u32| format!("vring {index} of {vrings}");
        match code {
            F::SET_FEATURES | F::SET_PROTOCOL_FEATURES => {
                let offered = if code == F::SET_FEATURES {
                    backend.offered_features()
                } else {
                    backend.offered_protocol_features()
                };
                let excess = value & !offered;
                if excess == 0 {
                    return Verdict::Forward;
                }
                let why = format!("feature bits {excess:#x} were not offered");
                // Without an answer the frontend goes on as if it had them.
                if acknowledge { Verdict::Refuse(why) } else { Verdict::End(why) }
            }
            F::SET_VRING_NUM | F::SET_VRING_ADDR | F::SET_VRING_BASE if index >= vrings => {
                Verdict::Refuse(no_such_ring(index))
            }
            F::SET_VRING_KICK | F::SET_VRING_CALL | F::SET_VRING_ERR => {
                let ring = (value & 0xff) as u32;
                if ring >= vrings {
                    return Verdict::Refuse(no_such_ring(ring));
                }
                match message.fds.first().map(|fd| fdio::prepare_event(fd.as_fd())) {
                    Some(Err(e)) => Verdict::Refuse(e.to_string()),
                    _ => Verdict::Forward,
                }
            }
            F::GET_VRING_BASE if index >= vrings => Verdict::Reply([index, 0].map(u32::to_ne_bytes).concat()),
            F::SET_VRING_ENABLE => {
                if index >= vrings {
                    return Verdict::Refuse(no_such_ring(index));
                }
                if number > 1 {
                    return Verdict::Refuse(format!("enable state {number}"));
                }
                if self.features.is_some_and(|f| f & features::PROTOCOL_FEATURES != 0) {
                    return Verdict::Forward;
                }
                // The crate ends the session at this. The flag means the same now as after SET_FEATURES, so it need not wait.
                counters.early_enables += 1;
                backend.enable_vring(index, number == 1);
                Verdict::Done
            }
            F::GET_QUEUE_NUM => Verdict::Reply(u64::from(vrings / 2).to_ne_bytes().to_vec()),
            F::GET_MAX_MEM_SLOTS => Verdict::Reply(backend.memory_slots().to_ne_bytes().to_vec()),
            F::ADD_MEM_REG | F::REM_MEM_REG if self.protocol_features & features::PROTOCOL_MEM_SLOTS == 0 => {
                Verdict::Refuse("CONFIGURE_MEM_SLOTS was not negotiated".into())
            }
            F::RESET_DEVICE if self.protocol_features & features::PROTOCOL_RESET_DEVICE == 0 => {
                Verdict::Refuse("RESET_DEVICE was not negotiated".into())
            }
            F::SET_LOG_BASE if self.protocol_features & features::PROTOCOL_LOG_SHMFD == 0 => {
                Verdict::Refuse("LOG_SHMFD was not negotiated".into())
            }
            F::SET_MEM_TABLE | F::ADD_MEM_REG | F::SET_LOG_BASE => {
                match message.fds.iter().find_map(|fd| fdio::check_pages_are_local(fd.as_fd()).err()) {
                    Some(e) if code == F::SET_LOG_BASE => Verdict::End(e.to_string()),
                    Some(e) => Verdict::Refuse(e.to_string()),
                    None => Verdict::Forward,
                }
            }
            F::SEND_RARP => {
                counters.rarps += 1;
                if let Some(mac) = message.payload.first_chunk() {
                    backend.rarp(*mac);
                }
                Verdict::Done
            }
            F::NET_SET_MTU => backend.mtu(value).map_or_else(Verdict::Refuse, |()| Verdict::Done),
            _ => Verdict::Forward,
        }
    }

    /// Lets the crate handle a message and collects its answer.
    fn forward(
        &mut self,
        message: &Message,
        name: &'static str,
        acknowledge: bool,
        counters: &mut RelayCounters,
    ) -> Handled {
        let raw: Vec<_> = message.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let bytes = message.to_bytes();
        match fdio::send(self.near.as_fd(), &bytes, &raw) {
            Ok(n) if n == bytes.len() => {}
            // Only when the kernel is out of memory or of descriptors in flight: nothing was delivered, or the rest cannot be.
            Ok(n) => return end(format!("{name}: {n} of {} bytes relayed", bytes.len())),
            Err(e) => return end(format!("{name}: relaying failed: {e}")),
        }
        let result = self.handler.handle_request();
        let mut reply = Vec::new();
        let mut reply_fds = Vec::new();
        if let Err(e) = drain(self.near.as_fd(), &mut reply, &mut reply_fds) {
            return end(format!("{name}: reading the answer failed: {e}"));
        }
        let mut handled = Handled::default();
        if !reply.is_empty() {
            handled.reply = Some((reply, reply_fds));
        }
        match result {
            Ok(()) => {
                self.note(message);
                if handled.reply.is_none() && acknowledge {
                    handled.reply = Some(ack(message.code, true));
                }
            }
            Err(CrateError::Disconnected | CrateError::SocketBroken(_)) => {
                return end(format!("{name}: the relay's inner socket is gone"));
            }
            Err(e) => {
                counters.refused += 1;
                // The crate may have stopped half-way through the message.
                if let Err(e) = drain(self.far.as_fd(), &mut Vec::new(), &mut Vec::new()) {
                    return end(format!("{name}: {e}"));
                }
                let why = reason(e);
                if handled.reply.is_none() {
                    match FrontendReq::try_from(message.code) {
                        Ok(FrontendReq::GET_VRING_BASE) => {
                            let index = message.u32_at(0).unwrap_or_default();
                            let base = lock(&self.backend).stop_vring(index);
                            let payload = [index, base].map(u32::to_ne_bytes).concat();
                            handled.reply = Some((message::reply(message.code, &payload), Vec::new()));
                        }
                        Ok(code) if always_answered(code) => return end(format!("{name}: {why}")),
                        _ if acknowledge => handled.reply = Some(ack(message.code, false)),
                        _ => {}
                    }
                }
                handled.refused = Some(format!("{name} refused: {why}"));
            }
        }
        handled
    }

    /// Remembers what an accepted message negotiated.
    fn note(&mut self, message: &Message) {
        match FrontendReq::try_from(message.code) {
            Ok(FrontendReq::SET_FEATURES) => self.features = message.u64_at(0),
            Ok(FrontendReq::SET_PROTOCOL_FEATURES) => {
                self.protocol_features = message.u64_at(0).unwrap_or_default();
            }
            _ => {}
        }
    }
}

fn end(why: String) -> Handled {
    Handled { end: Some(why), ..Handled::default() }
}

fn ack(code: u32, ok: bool) -> (Vec<u8>, Vec<OwnedFd>) {
    (message::reply(code, &u64::from(!ok).to_ne_bytes()), Vec::new())
}

/// The words of our own handlers where they are the cause, otherwise the crate's.
fn reason(e: CrateError) -> String {
    match e {
        CrateError::ReqHandlerError(e) => e.to_string(),
        e => e.to_string(),
    }
}

fn check_form(message: &Message, rule: &Rule) -> Result<(), String> {
    if message.flags & REPLY != 0 {
        return Err("it is marked as a reply".into());
    }
    if message.fd_flood {
        return Err("more file descriptors than any message has".into());
    }
    let fds = message.fds.len();
    if !rule.fds.contains(&fds) {
        return Err(format!("{fds} file descriptors"));
    }
    let expected = match rule.payload {
        Length::Exactly(n) => n,
        Length::MemoryTable => {
            let regions = message.u32_at(0).unwrap_or_default();
            if regions as usize != fds {
                return Err(format!("{regions} regions with {fds} file descriptors"));
            }
            8 + 32 * fds
        }
    };
    if message.payload.len() != expected {
        return Err(format!("{} bytes of payload instead of {expected}", message.payload.len()));
    }
    Ok(())
}

/// Reads whatever is there.
fn drain(socket: BorrowedFd<'_>, bytes: &mut Vec<u8>, fds: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut buffer = [0u8; 4096];
    loop {
        match fdio::receive(socket, &mut buffer, fds) {
            Ok(got) if got.bytes == 0 => return Ok(()),
            Ok(got) => bytes.extend_from_slice(buffer.get(..got.bytes).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}
