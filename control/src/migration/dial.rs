//! From the source to a destination: who takes the VM, and the channel to it. Pre-flight checks go the same way.
use std::sync::Arc;
use std::time::Duration;

use ferry_migrate::authz::Role;
use ferry_migrate::channel::{ChannelError, Dialer, Session};
use ferry_migrate::message::{self, Abilities, Finding, Message, Mismatch, Name, Offer, Refuse};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Hub;
use super::link::Link;
use super::source_side::abilities;
use crate::config::PeerConfig;

/// How long a peer may take to answer a message of a check.
const ANSWER: Duration = Duration::from_secs(5);

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Migration is not configured, or its services are not up.
    #[error("{0}")]
    Off(String),
    /// No host may take the VM.
    #[error("no host may take the VM: {0}")]
    NoPeer(String),
    /// The channel.
    #[error("{host}: {error}")]
    Channel {
        /// To whom.
        host: String,
        /// What happened.
        error: ChannelError,
    },
    /// It does not answer as it should.
    #[error("{host}: {what}")]
    Answer {
        /// Who.
        host: String,
        /// What it did.
        what: String,
    },
    /// It refuses.
    #[error("{host} refuses: {}", refuse.note)]
    Refused {
        /// Who.
        host: String,
        /// Why.
        refuse: Refuse,
    },
    /// The two have no version in common.
    #[error("{host}: {mismatch}")]
    Mismatch {
        /// Who.
        host: String,
        /// How they differ.
        mismatch: Mismatch,
    },
}

/// An id for a migration or a check.
///
/// # Errors
/// The system gives no random numbers.
pub fn random_id() -> Result<u128, DialError> {
    let mut bytes = [0; 16];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| DialError::Off("the system gives no random numbers".into()))?;
    Ok(u128::from_be_bytes(bytes))
}

/// What a check found.
pub struct Checked {
    /// Everything that the peer looked at.
    pub findings: Vec<Finding>,
    /// Version of the protocol.
    pub version: u16,
}

impl Checked {
    fn refusal(&self) -> Option<String> {
        let refused = self.findings.iter().find(|f| f.refusal.is_some())?;
        Some(format!("{}: {}", refused.what, refused.found))
    }
}

/// Finds the host that takes the VM, and sets up the channel to it.
///
/// # Errors
/// [`DialError`].
pub async fn find_and_dial(hub: Arc<Hub>, vm: String, offer: Offer) -> Result<Link, DialError> {
    let dialer = hub.dialer()?;
    let settings = hub.settings();
    let mut why_not = Vec::new();
    let mut candidates: Vec<PeerConfig> = Vec::new();
    for peer in &settings.config.peer {
        let decision = settings.authorization.decide(&vm, &peer.host, Role::Send);
        if decision.allowed {
            candidates.push(peer.clone());
        } else {
            why_not.push(decision.to_string());
        }
    }
    if settings.config.peer.is_empty() {
        return Err(DialError::NoPeer("no [[migration.peer]] is configured".into()));
    }
    let peer = match candidates.len() {
        0 => return Err(DialError::NoPeer(why_not.join("; "))),
        1 => candidates.remove(0),
        // QEMU does not tell where the VM goes. The host that expects it says so.
        _ => who_takes_it(&dialer, abilities(&hub), &settings.host, candidates, &offer).await?,
    };
    let id = random_id()?;
    let host = peer.host.clone();
    let session = dialer.dial(peer.address, &peer.host, id).await;
    let session = session.map_err(|error| DialError::Channel { host: host.clone(), error })?;
    Link::new(session).ok_or(DialError::Answer { host, what: "no bulk connection".into() })
}

async fn who_takes_it(
    dialer: &Dialer,
    abilities: Abilities,
    host: &Name,
    candidates: Vec<PeerConfig>,
    offer: &Offer,
) -> Result<PeerConfig, DialError> {
    let mut asked = JoinSet::new();
    for peer in candidates {
        let (dialer, host, offer) = (dialer.clone(), host.clone(), offer.clone());
        asked.spawn(async move {
            let checked = check(&dialer, abilities, host, &peer, offer).await;
            (peer, checked)
        });
    }
    let mut why_not = Vec::new();
    while let Some(answer) = asked.join_next().await {
        match answer {
            Ok((peer, Ok(checked))) => match checked.refusal() {
                None => return Ok(peer),
                Some(why) => why_not.push(format!("{}: {why}", peer.host)),
            },
            Ok((_, Err(error))) => why_not.push(error.to_string()),
            Err(error) => why_not.push(error.to_string()),
        }
    }
    Err(DialError::NoPeer(why_not.join("; ")))
}

/// Asks a peer what it would say of the VM.
///
/// # Errors
/// [`DialError`].
pub async fn check(
    dialer: &Dialer,
    abilities: Abilities,
    host: Name,
    peer: &PeerConfig,
    offer: Offer,
) -> Result<Checked, DialError> {
    let to = &peer.host;
    let session = dialer.check(peer.address, to, random_id()?).await;
    let mut session = session.map_err(|error| DialError::Channel { host: to.clone(), error })?;
    let answer = ask(&mut session, to, Message::Hello(abilities.hello(host))).await?;
    let reply = match answer {
        Message::HelloReply(reply) => reply,
        Message::Refuse(refuse) => return Err(DialError::Refused { host: to.clone(), refuse }),
        other => return Err(unexpected(to, &other)),
    };
    let agreed =
        abilities.check_reply(&reply).map_err(|mismatch| DialError::Mismatch { host: to.clone(), mismatch })?;
    let answer = ask(&mut session, to, Message::Offer(offer)).await?;
    match answer {
        Message::Findings { findings, .. } => Ok(Checked { findings: findings.to_vec(), version: agreed.version }),
        Message::Refuse(refuse) => Err(DialError::Refused { host: to.clone(), refuse }),
        other => Err(unexpected(to, &other)),
    }
}

fn unexpected(host: &str, message: &Message) -> DialError {
    DialError::Answer { host: host.to_owned(), what: format!("it answered with {}", message.name()) }
}

async fn ask(session: &mut Session, host: &str, question: Message) -> Result<Message, DialError> {
    let answer = |what: String| DialError::Answer { host: host.to_owned(), what };
    let channel = |error| DialError::Channel { host: host.to_owned(), error };
    let bytes = message::encode(&question).map_err(|e| answer(e.to_string()))?;
    session.control.send(bytes).await.map_err(channel)?;
    match timeout(ANSWER, session.control.receive()).await {
        Ok(Ok(Some(bytes))) => message::decode(&bytes).map_err(|e| answer(e.to_string())),
        Ok(Ok(None)) => Err(answer("it closed the connection without an answer".into())),
        Ok(Err(error)) => Err(channel(error)),
        Err(_) => Err(answer(format!("no answer within {ANSWER:?}"))),
    }
}
