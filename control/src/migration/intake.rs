//! Hosts that come with a VM: greets them, learns which VM, and hands them to its task. Checks are answered here.
use std::sync::Arc;
use std::time::Duration;

use ferry_migrate::audit::{self, Kind};
use ferry_migrate::authz::Role;
use ferry_migrate::channel::{Gate, PeerIdentity, Refused, Session};
use ferry_migrate::message::{self, Hello, HelloReply, MAGIC, Message, Note, Offer, Refuse, RefuseCode};
use tokio::time::timeout;

use super::Hub;
use super::actor::Input;
use super::judge::{Judgement, Situation, judge};
use super::link::Link;
use super::source_side::abilities;

/// How long a peer may take for each of its first messages.
const STEP: Duration = Duration::from_secs(10);

/// The listener's doorman.
pub struct Doorman(pub std::sync::Weak<Hub>);

impl Gate for Doorman {
    fn admit(&self, peer: &PeerIdentity) -> Result<(), String> {
        let Some(hub) = self.0.upgrade() else { return Err("ferryd stops".into()) };
        match hub.settings().authorization.knows(&peer.host, Role::Receive) {
            true => Ok(()),
            false => Err(format!("no rule lets {} send VMs to this host", peer.host)),
        }
    }

    fn refused(&self, refused: Refused) {
        let Some(hub) = self.0.upgrade() else { return };
        tracing::debug!(?refused, "migration connection refused");
        let event = audit::Event {
            peer: refused.peer.as_ref().map(|p| p.host.clone()),
            certificate: refused.peer.map(|p| p.certificate.fingerprint),
            address: refused.address,
            reason: Some(format!("{}: {}", refused.why.name(), refused.detail)),
            ..audit::Event::new(Kind::ConnectionRefused)
        };
        hub.note_refusal(event);
    }
}

/// Serves one session until it is a VM's, or over.
pub async fn serve(hub: Arc<Hub>, mut session: Session) {
    // A host that was restarted hears whoever waited for it once the VMs' ports are there. The sender lives as long as the hub.
    let _ = hub.ready.subscribe().wait_for(|ready| *ready).await;
    let Some(Message::Hello(hello)) = receive(&mut session).await else { return };
    let greeting = match abilities(&hub).negotiate(&hello) {
        Ok(agreed) => Message::HelloReply(HelloReply {
            magic: MAGIC,
            version: agreed.version,
            capabilities: agreed.capabilities,
            host: hub.settings().host.clone(),
        }),
        Err(mismatch) => {
            let note = Note::lossy(&mismatch.to_string());
            return end(session, Message::Refuse(Refuse { code: RefuseCode::Version, note })).await;
        }
    };
    if send(&session, &greeting).await.is_none() {
        return;
    }
    let Some(Message::Offer(offer)) = receive(&mut session).await else { return };
    let peer = session.peer.host.clone();
    if session.bulk.is_none() {
        let (judgement, running) = look(&hub, &peer, &offer);
        hub.note(audit::Event {
            vm: Some(offer.vm.to_string()),
            peer: Some(peer),
            role: Some(Role::Receive),
            reason: judgement.refusal().map(|r| r.note.to_string()),
            ..audit::Event::new(Kind::Check)
        });
        tracing::debug!(running, "answered a check");
        let findings = Message::Findings { findings: judgement.to_findings(), capacity: judgement.capacity };
        return end(session, findings).await;
    }
    hand_over(&hub, session, &peer, hello, offer).await;
}

async fn hand_over(hub: &Arc<Hub>, session: Session, peer: &str, hello: Hello, offer: Offer) {
    let Some(guest) = hub.guest(offer.vm.as_str()) else {
        let (judgement, _) = look(hub, peer, &offer);
        hub.note(audit::Event::decision(&judgement.decision));
        let unknown = Refuse { code: RefuseCode::UnknownVm, note: Note::lossy("no such VM at the destination") };
        return end(session, Message::Refuse(judgement.refusal().unwrap_or(unknown))).await;
    };
    if let Some(link) = Link::new(session) {
        guest.send(Input::Offered(Box::new((link, hello, offer))));
    }
}

/// What would be said to this offer.
fn look(hub: &Hub, peer: &str, offer: &Offer) -> (Judgement, bool) {
    let vm = offer.vm.as_str();
    let running = hub.guest(vm).is_some_and(|g| g.runs());
    let ports = hub.switch().map(|s| s.ports(vm)).unwrap_or_default();
    let stopped = hub.audit_problem();
    let situation = Situation { peer, running, expected: hub.is_expected(vm, peer), ports: &ports, stopped };
    (judge(&hub.settings(), offer, &situation), running)
}

async fn receive(session: &mut Session) -> Option<Message> {
    let bytes = timeout(STEP, session.control.receive()).await.ok()?.ok()??;
    message::decode(&bytes).ok()
}

async fn send(session: &Session, message: &Message) -> Option<()> {
    let bytes = message::encode(message).ok()?;
    timeout(STEP, session.control.send(bytes)).await.ok()?.ok()
}

/// The last word.
async fn end(session: Session, message: Message) {
    if send(&session, &message).await.is_some() {
        // It may have gone already.
        let _ = session.control.sender.close().await;
    }
}
