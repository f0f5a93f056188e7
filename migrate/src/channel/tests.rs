//! Real connections over loopback with real certificates, and peers of every bad kind.
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::connection::{read_opening, write_opening};
use super::open::{Open, OpenReply};
use super::*;
use crate::pki::{Authority, CA_DAYS, CredentialFiles, Credentials, HOST_DAYS};

const DAY_S: i64 = 86_400;
const ID: u128 = 0x1234_5678;

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

/// An authority and hosts whose credentials are installed beside it.
struct Site {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl Site {
    fn new(hosts: &[&str]) -> Self {
        Self::new_at(hosts, now_s())
    }

    fn new_at(hosts: &[&str], at_s: i64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (authority, _) = Authority::init(&dir.path().join("pki"), "Test", CA_DAYS, at_s).unwrap();
        for host in hosts {
            authority.issue(host, &[Ipv4Addr::LOCALHOST.into()], HOST_DAYS, at_s).unwrap();
        }
        Self { dir, authority }
    }

    fn files(&self, host: &str) -> CredentialFiles {
        let to: PathBuf = self.dir.path().join(host);
        fs::create_dir_all(&to).unwrap();
        for (from, mode) in
            [(self.authority.trust(), 0o644), (self.authority.revoked(), 0o644), (self.authority.host(host), 0o600)]
        {
            let target = to.join(from.file_name().unwrap());
            fs::copy(&from, &target).unwrap();
            fs::set_permissions(&target, fs::Permissions::from_mode(mode)).unwrap();
        }
        CredentialFiles::in_directory(&to, host)
    }

    fn credentials(&self, host: &str) -> Credentials {
        Credentials::load(&self.files(host), now_s()).unwrap()
    }

    fn tls(&self, host: &str) -> Arc<TlsContext> {
        Arc::new(TlsContext::new(self.credentials(host)).unwrap())
    }
}

/// Remembers what was refused; turns away hosts whose name begins with "stranger".
#[derive(Default)]
struct Doorman(Mutex<Vec<Refused>>);

impl Gate for Doorman {
    fn admit(&self, peer: &PeerIdentity) -> Result<(), String> {
        if peer.host.starts_with("stranger") { Err("no rule names you".into()) } else { Ok(()) }
    }

    fn refused(&self, refused: Refused) {
        self.0.lock().unwrap().push(refused);
    }
}

impl Doorman {
    async fn expect(&self, why: RefusedWhy) -> Refused {
        let find = || {
            let mut all = self.0.lock().unwrap();
            all.iter().position(|r| r.why == why).map(|at| all.remove(at))
        };
        let found = async {
            loop {
                if let Some(refused) = find() {
                    return refused;
                }
                sleep(Duration::from_millis(2)).await;
            }
        };
        match timeout(Duration::from_secs(10), found).await {
            Ok(refused) => refused,
            Err(_) => panic!("no {why:?} in {:?}", self.0.lock().unwrap()),
        }
    }
}

fn limits() -> ChannelLimits {
    ChannelLimits { handshake_ms: 3000, tie_ms: 3000, ..ChannelLimits::default() }
}

async fn listen(tls: Arc<TlsContext>, limits: ChannelLimits) -> (Listener, Arc<Doorman>) {
    let doorman = Arc::new(Doorman::default());
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    let listener = Listener::bind(address, tls, limits, Arc::new(Pace::new(None)), doorman.clone()).await.unwrap();
    (listener, doorman)
}

fn dialer(tls: Arc<TlsContext>) -> Dialer {
    Dialer::new(tls, limits(), Arc::new(Pace::new(None)), Some(Ipv4Addr::LOCALHOST.into())).unwrap()
}

async fn pair(limits: ChannelLimits, pace: Arc<Pace>) -> (Session, Session, Listener) {
    let site = Site::new(&["a", "b"]);
    let (mut listener, _) = listen(site.tls("b"), limits.clone()).await;
    let dialer = Dialer::new(site.tls("a"), limits, pace, None).unwrap();
    let (dialled, accepted) = tokio::join!(dialer.dial(listener.local_addr(), "b", ID), listener.accept());
    (dialled.unwrap(), accepted.unwrap(), listener)
}

/// A TLS connection without the channel's code on top, as a hostile peer with a certificate would have it.
async fn raw(tls: &TlsContext, address: SocketAddr) -> TlsStream<TcpStream> {
    let config = tls.configs().unwrap().client.clone();
    connect(config, address).await.unwrap()
}

async fn connect(config: Arc<ClientConfig>, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(address).await?;
    TlsConnector::from(config).connect(ServerName::try_from("b").unwrap(), tcp).await
}

async fn open(stream: &mut TlsStream<TcpStream>, open: Open) -> Result<OpenReply, ChannelError> {
    write_opening(stream, &Frame { kind: FrameKind::Open, payload: open.encode() }).await?;
    let reply = timeout(Duration::from_secs(10), read_opening(stream, 512)).await.unwrap()?;
    Ok(OpenReply::decode(&reply.payload).unwrap())
}

fn check() -> Open {
    Open { purpose: Purpose::Check, migration: ID, token: [0; 32] }
}

async fn works(listener: &mut Listener, tls: Arc<TlsContext>) {
    let dialer = dialer(tls);
    let (dialled, accepted) = tokio::join!(dialer.dial(listener.local_addr(), "b", ID + 1), listener.accept());
    let (dialled, mut accepted) = (dialled.unwrap(), accepted.unwrap());
    dialled.control.send(b"still".to_vec()).await.unwrap();
    assert_eq!(accepted.control.receive().await.unwrap().unwrap(), b"still");
}

#[tokio::test]
async fn a_session_carries_messages_both_ways_and_closes_in_order() {
    let site = Site::new(&["a", "b"]);
    let (mut listener, _) = listen(site.tls("b"), limits()).await;
    let dialer = dialer(site.tls("a"));
    let (a, b) = tokio::join!(dialer.dial(listener.local_addr(), "B", ID), listener.accept());
    let (mut a, mut b) = (a.unwrap(), b.unwrap());
    assert_eq!((a.peer.host.as_str(), b.peer.host.as_str(), a.migration, b.migration), ("b", "a", ID, ID));
    assert_eq!(b.peer.certificate.names, ["a"]);
    a.control.send(b"hello".to_vec()).await.unwrap();
    assert_eq!(b.control.receive().await.unwrap().unwrap(), b"hello");
    b.control.send(vec![]).await.unwrap();
    assert_eq!(a.control.receive().await.unwrap().unwrap(), b"");

    let (bulk_a, mut bulk_b) = (a.bulk.take().unwrap(), b.bulk.take().unwrap());
    let sizes = [0, 1, 16_375, 16_376, 16_377, 100_000, 1 << 20];
    let send = async {
        for (i, size) in sizes.into_iter().enumerate() {
            bulk_a.send(vec![i as u8; size]).await.unwrap();
        }
        // Control does not wait behind what the bulk receiver has not taken.
        a.control.send(b"past".to_vec()).await.unwrap();
        assert_eq!(b.control.receive().await.unwrap().unwrap(), b"past");
    };
    let receive = async {
        for (i, size) in sizes.into_iter().enumerate() {
            assert_eq!(bulk_b.receive().await.unwrap().unwrap(), vec![i as u8; size]);
        }
    };
    tokio::join!(send, receive);
    let stats = bulk_b.receiver.stats();
    assert_eq!((stats.received_messages, stats.received_bytes), (7, sizes.iter().sum::<usize>() as u64));

    for (x, mut y) in [(a.control, b.control), (bulk_b, bulk_a)] {
        let (sender, mut receiver) = (x.sender, x.receiver);
        sender.send(b"last".to_vec()).await.unwrap();
        let other = sender.clone();
        sender.close().await.unwrap();
        assert_eq!(other.send(vec![]).await, Err(ChannelError::Closed));
        assert_eq!(y.receive().await.unwrap().unwrap(), b"last");
        assert_eq!(y.receive().await, Ok(None));
        assert_eq!(y.receive().await, Ok(None));
        // The other direction is still open.
        y.send(b"answer".to_vec()).await.unwrap();
        assert_eq!(receiver.receive().await.unwrap().unwrap(), b"answer");
        y.sender.close().await.unwrap();
        assert_eq!(receiver.receive().await, Ok(None));
    }
    let stats = listener.stats();
    assert_eq!((stats.accepted, stats.sessions), (2, 1));
    assert!(stats.refused.iter().all(|(_, n)| *n == 0));
    drop((a.bulk, b.bulk));
    let freed = async {
        while listener.stats().open > 0 {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(Duration::from_secs(5), freed).await.expect("closed connections give their places back");
}

#[tokio::test]
async fn a_check_needs_no_bulk_connection() {
    let site = Site::new(&["a", "b"]);
    let (mut listener, _) = listen(site.tls("b"), limits()).await;
    let dialer = dialer(site.tls("a"));
    let (a, b) = tokio::join!(dialer.check(listener.local_addr(), "b", ID), listener.accept());
    let (a, mut b) = (a.unwrap(), b.unwrap());
    assert!(a.bulk.is_none() && b.bulk.is_none());
    a.control.send(b"?".to_vec()).await.unwrap();
    assert_eq!(b.control.receive().await.unwrap().unwrap(), b"?");
}

/// Loads credentials as they were when they were still good.
fn stale(site: &Site, host: &str, at_s: i64) -> Arc<TlsContext> {
    Arc::new(TlsContext::new(Credentials::load(&site.files(host), at_s).unwrap()).unwrap())
}

#[tokio::test]
async fn peers_with_wrong_certificates_are_told_apart_and_refused_by_both_sides() {
    let past_s = now_s() - 100 * DAY_S;
    let site = Site::new_at(&["a", "b", "c", "stranger"], past_s);
    let other = Site::new(&["a", "b"]);
    let tls_b = site.tls("b");
    let (mut listener, doorman) = listen(tls_b.clone(), limits()).await;
    let address = listener.local_addr();
    let says = |error: ChannelError, what: &str| assert!(error.to_string().contains(what), "{what}: {error}");

    // Client of another authority. The server sees it; the client does not trust the server either and sees that first.
    let error = dialer(other.tls("a")).check(address, "b", ID).await.unwrap_err();
    says(error, "no authority that is trusted here");
    says(ChannelError::Tls(doorman.expect(RefusedWhy::Handshake).await.detail), "does not trust the authority");

    // The same client, trusting everybody's authority: only the server objects.
    let mut files = other.files("a");
    let both = other.dir.path().join("both.pem");
    let text = fs::read_to_string(&files.trust).unwrap() + &fs::read_to_string(site.authority.trust()).unwrap();
    fs::write(&both, text).unwrap();
    files.trust = both;
    let trusting = Arc::new(TlsContext::new(Credentials::load(&files, now_s()).unwrap()).unwrap());
    let error = dialer(trusting).check(address, "b", ID).await.unwrap_err();
    says(error, "the peer does not trust the authority of this host's certificate");
    says(ChannelError::Tls(doorman.expect(RefusedWhy::Handshake).await.detail), "no authority that is trusted here");

    // A host that nobody lets in.
    let error = dialer(site.tls("stranger")).dial(address, "b", ID).await.unwrap_err();
    assert_eq!(error, ChannelError::Refused { code: RefusalCode::NotAdmitted, text: "no rule names you".into() });
    assert_eq!(doorman.expect(RefusedWhy::NotAdmitted).await.peer.unwrap().host, "stranger");

    // Another host than expected answers.
    let error = dialer(site.tls("a")).dial(address, "c", ID).await.unwrap_err();
    says(error, "not the host that was expected");
    doorman.expect(RefusedWhy::Handshake).await;

    // Expired: the client's, then the server's.
    site.authority.issue("old", &[], 1, past_s).unwrap();
    let old = stale(&site, "old", past_s);
    let error = dialer(old.clone()).check(address, "b", ID).await.unwrap_err();
    says(error, "this host's certificate has expired");
    says(ChannelError::Tls(doorman.expect(RefusedWhy::Handshake).await.detail), "certificate has expired");
    let (old_listener, old_doorman) = listen(old, limits()).await;
    let error = dialer(site.tls("a")).check(old_listener.local_addr(), "old", ID).await.unwrap_err();
    says(error, "the peer's certificate has expired");
    old_doorman.expect(RefusedWhy::Handshake).await;

    // Revoked while the switch runs: the connection that exists lives, the next one is refused, on either side.
    let tls_c = site.tls("c");
    let dialer_c = dialer(tls_c.clone());
    let (kept, taken) = tokio::join!(dialer_c.check(address, "b", ID), listener.accept());
    let (kept, mut taken) = (kept.unwrap(), taken.unwrap());
    let (c_listener, _) = listen(tls_c, limits()).await;
    site.authority.revoke("c", now_s()).unwrap();
    tls_b.replace(site.credentials("b")).unwrap();
    let error = dialer_c.check(address, "b", ID).await.unwrap_err();
    says(error, "is revoked, says the peer");
    says(ChannelError::Tls(doorman.expect(RefusedWhy::Handshake).await.detail), "is revoked");
    let error = dialer(tls_b).check(c_listener.local_addr(), "c", ID).await.unwrap_err();
    says(error, "the peer's certificate is revoked");
    kept.control.send(b"x".to_vec()).await.unwrap();
    assert_eq!(taken.control.receive().await.unwrap().unwrap(), b"x");

    works(&mut listener, site.tls("a")).await;
}

#[tokio::test]
async fn certificates_are_renewed_without_a_restart() {
    let site = Site::new(&["a", "b"]);
    let tls_b = site.tls("b");
    let (mut listener, _) = listen(tls_b.clone(), limits()).await;
    let dialer = dialer(site.tls("a"));
    let address = listener.local_addr();
    let (before, _first) = tokio::join!(dialer.check(address, "b", ID), listener.accept());
    site.authority.rotate_host("b", HOST_DAYS, 3, now_s()).unwrap();
    tls_b.replace(site.credentials("b")).unwrap();
    let (after, _second) = tokio::join!(dialer.check(address, "b", ID), listener.accept());
    let (before, after) = (before.unwrap(), after.unwrap());
    assert_ne!(before.peer.certificate.serial, after.peer.certificate.serial);
    assert_eq!(before.peer.host, after.peer.host);
    before.control.send(vec![1]).await.unwrap();
}

#[tokio::test]
async fn an_authority_is_trusted_until_its_overlap_ends_and_not_a_second_longer() {
    // Its overlap of a day has three seconds left.
    let then_s = now_s() - DAY_S + 3;
    let site = Site::new_at(&["a", "b"], then_s - DAY_S);
    site.authority.rotate(CA_DAYS, 1, then_s).unwrap();
    let old_a = site.tls("a");
    site.authority.rotate_host("b", HOST_DAYS, 1, then_s).unwrap();
    let (mut listener, doorman) = listen(site.tls("b"), limits()).await;
    let dialer = dialer(old_a);
    let address = listener.local_addr();
    let (session, _taken) = tokio::join!(dialer.check(address, "b", ID), listener.accept());
    session.unwrap();
    sleep(Duration::from_millis(4500)).await;
    let error = dialer.check(address, "b", ID).await.unwrap_err();
    assert!(error.to_string().contains("does not trust the authority"), "{error}");
    doorman.expect(RefusedWhy::Handshake).await;
}

/// Client configurations that a correct peer never has.
fn client(site: &Site, change: impl FnOnce(&mut ClientConfig)) -> Arc<ClientConfig> {
    let mut config = (*site.tls("a").configs().unwrap().client).clone();
    change(&mut config);
    Arc::new(config)
}

fn without_certificate(site: &Site, versions: &[&'static rustls::SupportedProtocolVersion]) -> Arc<ClientConfig> {
    let (roots, _) = site.credentials("a").roots(now_s());
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(config)
}

#[tokio::test]
async fn peers_that_speak_something_else_are_refused() {
    let site = Site::new(&["a", "b"]);
    let (mut listener, doorman) = listen(site.tls("b"), limits()).await;
    let address = listener.local_addr();

    // TLS 1.2 only.
    let error = connect(without_certificate(&site, &[&rustls::version::TLS12]), address).await.unwrap_err();
    assert!(ChannelError::from_handshake(&error).to_string().contains("TLS"), "{error}");
    let detail = doorman.expect(RefusedWhy::Handshake).await.detail;
    assert!(detail.contains("does not speak TLS 1.3"), "{detail}");

    // TLS 1.3 without a certificate: the client's side of the handshake succeeds, nothing after it does.
    let mut stream = connect(without_certificate(&site, &[&rustls::version::TLS13]), address).await.unwrap();
    let error = open(&mut stream, check()).await.err().unwrap();
    assert!(error.to_string().contains("refused this host's certificate"), "{error}");
    let detail = doorman.expect(RefusedWhy::Handshake).await.detail;
    assert!(detail.contains("the peer has no certificate"), "{detail}");

    // Another application protocol, and none.
    let error = connect(client(&site, |c| c.alpn_protocols = vec![b"h2".to_vec()]), address).await.unwrap_err();
    assert!(ChannelError::from_handshake(&error).to_string().contains("not this protocol"), "{error}");
    doorman.expect(RefusedWhy::Handshake).await;
    let mut stream = connect(client(&site, |c| c.alpn_protocols.clear()), address).await.unwrap();
    assert!(open(&mut stream, check()).await.is_err());
    doorman.expect(RefusedWhy::Handshake).await;

    // No TLS at all.
    for text in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 2000], vec![0xff; 2000], vec![0x16, 3, 1, 0xff, 0xff]] {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(&text).await.unwrap();
        tcp.shutdown().await.unwrap();
        doorman.expect(RefusedWhy::Handshake).await;
        let mut rest = vec![];
        let _ = timeout(Duration::from_secs(5), tcp.read_to_end(&mut rest)).await.expect("the listener hangs up");
    }

    // First frames that are none.
    for (kind, payload) in [
        (FrameKind::Data, check().encode()),
        (FrameKind::Open, vec![]),
        (FrameKind::Open, vec![0; 60]),
        (FrameKind::Open, vec![0; 513]),
        (FrameKind::Close, vec![]),
    ] {
        let mut stream = raw(&site.tls("a"), address).await;
        write_opening(&mut stream, &Frame { kind, payload }).await.unwrap();
        let reply = read_opening(&mut stream, 512).await.unwrap();
        assert!(matches!(OpenReply::decode(&reply.payload), Some(OpenReply::Refused(RefusalCode::Malformed, _))));
        doorman.expect(RefusedWhy::Malformed).await;
    }
    works(&mut listener, site.tls("a")).await;
}

#[tokio::test]
async fn slow_peers_lose_their_places_and_do_not_take_those_of_others() {
    let site = Site::new(&["a", "b"]);
    let limits = ChannelLimits { handshake_ms: 400, max_handshakes: 6, max_handshakes_per_address: 4, ..limits() };
    let (mut listener, doorman) = listen(site.tls("b"), limits).await;
    let address = listener.local_addr();
    // From an address of their own, all they may have.
    let mut slow = vec![];
    for i in 0..6u8 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, 99), 0).into()).unwrap();
        let mut tcp = socket.connect(address).await.unwrap();
        // Some of them begin a handshake.
        if i % 2 == 0 {
            tcp.write_all(&[0x16, 3, 1]).await.unwrap();
        }
        slow.push(tcp);
    }
    doorman.expect(RefusedWhy::TooManyFromAddress).await;
    doorman.expect(RefusedWhy::TooManyFromAddress).await;
    works(&mut listener, site.tls("a")).await;
    for _ in 0..4 {
        doorman.expect(RefusedWhy::TooSlow).await;
    }
    for tcp in &mut slow {
        let mut rest = vec![];
        let _ = timeout(Duration::from_secs(5), tcp.read_to_end(&mut rest)).await.expect("the listener hangs up");
    }
    // With a certificate and a handshake, then byte by byte.
    let mut stream = raw(&site.tls("a"), address).await;
    let frame = Frame { kind: FrameKind::Open, payload: check().encode() }.to_bytes().unwrap();
    let start = Instant::now();
    for byte in frame {
        if stream.write_all(&[byte]).await.is_err() || stream.flush().await.is_err() {
            break;
        }
        sleep(Duration::from_millis(20)).await;
    }
    let mut rest = vec![];
    let _ = timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await.expect("the listener hangs up");
    assert!(start.elapsed() < Duration::from_secs(3));
    doorman.expect(RefusedWhy::TooSlow).await;
    // From everywhere at once: bounded in all.
    let mut slow = vec![];
    for host in 1..=8u8 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 1, host), 0).into()).unwrap();
        slow.push(socket.connect(address).await.unwrap());
    }
    doorman.expect(RefusedWhy::TooManyHandshakes).await;
    for _ in 0..6 {
        doorman.expect(RefusedWhy::TooSlow).await;
    }
    works(&mut listener, site.tls("a")).await;
}

#[tokio::test]
async fn connections_are_bounded_and_given_back() {
    let site = Site::new(&["a", "b"]);
    let (mut listener, doorman) = listen(site.tls("b"), ChannelLimits { max_connections: 4, ..limits() }).await;
    let dialer = dialer(site.tls("a"));
    let mut held = vec![];
    for i in 0..2 {
        let (a, b) = tokio::join!(dialer.dial(listener.local_addr(), "b", i), listener.accept());
        held.push((a.unwrap(), b.unwrap()));
    }
    assert_eq!(listener.stats().open, 4);
    dialer.dial(listener.local_addr(), "b", 9).await.unwrap_err();
    doorman.expect(RefusedWhy::TooManyConnections).await;
    held.pop();
    let freed = async {
        while listener.stats().open > 2 {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(Duration::from_secs(5), freed).await.unwrap();
    works(&mut listener, site.tls("a")).await;
}

#[tokio::test]
async fn bulk_connections_are_tied_by_id_token_and_host() {
    let site = Site::new(&["a", "b", "c"]);
    let limits = ChannelLimits { tie_ms: 1500, max_half_open: 2, ..limits() };
    let (mut listener, doorman) = listen(site.tls("b"), limits).await;
    let address = listener.local_addr();
    let (a, c) = (site.tls("a"), site.tls("c"));
    let control = |migration| Open { purpose: Purpose::Control, migration, token: [0; 32] };
    let bulk = |migration, token| Open { purpose: Purpose::Bulk, migration, token };

    let mut first = raw(&a, address).await;
    let OpenReply::Accepted(token) = open(&mut first, control(ID)).await.unwrap() else { panic!() };
    assert_ne!(token, [0; 32]);
    let mut wrong = token;
    wrong[31] ^= 1;
    for (tls, request) in
        [(&a, bulk(ID, wrong)), (&a, bulk(ID + 1, token)), (&c, bulk(ID, token)), (&a, bulk(ID, [0; 32]))]
    {
        let mut stream = raw(tls, address).await;
        let reply = open(&mut stream, request).await.unwrap();
        assert!(matches!(reply, OpenReply::Refused(RefusalCode::UnknownSession, _)));
        doorman.expect(RefusedWhy::UnknownSession).await;
    }
    let mut again = raw(&c, address).await;
    assert!(matches!(open(&mut again, control(ID)).await.unwrap(), OpenReply::Refused(RefusalCode::Duplicate, _)));
    let mut second = raw(&a, address).await;
    assert!(matches!(open(&mut second, control(ID + 2)).await.unwrap(), OpenReply::Accepted(_)));
    let mut third = raw(&a, address).await;
    assert!(matches!(open(&mut third, control(ID + 3)).await.unwrap(), OpenReply::Refused(RefusalCode::Busy, _)));

    // None of that has hurt the first.
    let mut tied = raw(&a, address).await;
    assert!(matches!(open(&mut tied, bulk(ID, token)).await.unwrap(), OpenReply::Accepted(_)));
    let session = listener.accept().await.unwrap();
    assert_eq!((session.migration, session.peer.host.as_str()), (ID, "a"));
    // A token serves once.
    let mut stream = raw(&a, address).await;
    assert!(matches!(open(&mut stream, bulk(ID, token)).await.unwrap(), OpenReply::Refused(..)));
    // The second waits in vain, and its place is free again.
    doorman.expect(RefusedWhy::NoBulk).await;
    works(&mut listener, a).await;
}

#[tokio::test]
async fn sessions_that_nobody_accepts_are_bounded() {
    let site = Site::new(&["a", "b"]);
    let (mut listener, doorman) = listen(site.tls("b"), ChannelLimits { max_pending_sessions: 2, ..limits() }).await;
    let dialer = dialer(site.tls("a"));
    let _one = dialer.dial(listener.local_addr(), "b", 1).await.unwrap();
    let _two = dialer.check(listener.local_addr(), "b", 2).await.unwrap();
    let error = dialer.dial(listener.local_addr(), "b", 3).await.unwrap_err();
    assert!(matches!(error, ChannelError::Refused { code: RefusalCode::Busy, .. }), "{error}");
    doorman.expect(RefusedWhy::Busy).await;
    assert_eq!(listener.accept().await.unwrap().migration, 1);
    dialer.dial(listener.local_addr(), "b", 4).await.unwrap();
}

/// A raw peer with an accepted check connection, and the listener's end of it.
async fn hostile(limits: ChannelLimits) -> (TlsStream<TcpStream>, Connection, Listener) {
    let site = Site::new(&["a", "b"]);
    let (mut listener, _) = listen(site.tls("b"), limits).await;
    let mut stream = raw(&site.tls("a"), listener.local_addr()).await;
    assert!(matches!(open(&mut stream, check()).await.unwrap(), OpenReply::Accepted(_)));
    let session = listener.accept().await.unwrap();
    (stream, session.control, listener)
}

#[tokio::test]
async fn frames_that_are_none_end_the_connection_with_their_reason() {
    for (bytes, expected) in [
        (vec![1, 0, 1, 0, 1, 0, 0, 0], FrameError::TooLong { bytes: 65_537, limit: 65_536 }),
        (vec![0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0], FrameError::TooLong { bytes: u32::MAX, limit: 65_536 }),
        (vec![0, 0, 0, 0, 77, 0, 0, 0], FrameError::Kind(77)),
        (vec![0, 0, 0, 0, 1, 0, 0, 9], FrameError::Reserved),
        (vec![1, 0, 0, 0, 3, 0, 0, 0, 1], FrameError::Payload),
    ] {
        let (mut stream, mut connection, _listener) = hostile(limits()).await;
        let good = Frame { kind: FrameKind::Data, payload: b"good".to_vec() }.to_bytes().unwrap();
        stream.write_all(&[good, bytes].concat()).await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(connection.receive().await.unwrap().unwrap(), b"good");
        assert_eq!(connection.receive().await, Err(ChannelError::Frame(expected)));
        assert_eq!(connection.send(vec![]).await, Err(ChannelError::Frame(expected)));
        let mut rest = vec![];
        let _ = timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await.expect("hung up on");
    }
    let (mut stream, mut connection, _listener) = hostile(limits()).await;
    let again = Frame { kind: FrameKind::Open, payload: check().encode() };
    write_opening(&mut stream, &again).await.unwrap();
    assert_eq!(connection.receive().await, Err(ChannelError::OutOfPlace));
}

#[tokio::test]
async fn a_message_that_never_ends_and_a_peer_that_never_reads() {
    let short = ChannelLimits { frame_ms: 300, write_ms: 300, ..limits() };
    let (mut stream, mut connection, _listener) = hostile(short.clone()).await;
    stream.write_all(&[200, 0, 0, 0, 1, 0, 0, 0]).await.unwrap();
    let trickle = async {
        loop {
            if stream.write_all(&[1]).await.is_err() || stream.flush().await.is_err() {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let (_, end) = tokio::join!(timeout(Duration::from_secs(5), trickle), connection.receive());
    assert_eq!(end, Err(ChannelError::Timeout { what: "one message", limit_ms: 300 }));

    let (_stream, connection, _listener) = hostile(short).await;
    let start = Instant::now();
    let end = loop {
        if let Err(error) = connection.send(vec![0; 65_536]).await {
            break error;
        }
        assert!(start.elapsed() < Duration::from_secs(30));
    };
    assert_eq!(end, ChannelError::Stalled(300));
}

#[tokio::test]
async fn silence_ends_a_connection_and_keep_alive_prevents_it() {
    let quick = ChannelLimits { keep_alive_ms: 100, idle_ms: 500, ..limits() };
    let (mut a, mut b, _listener) = pair(quick.clone(), Arc::new(Pace::new(None))).await;
    sleep(Duration::from_millis(1500)).await;
    a.control.send(b"1".to_vec()).await.unwrap();
    assert_eq!(b.control.receive().await.unwrap().unwrap(), b"1");
    let (bulk_a, bulk_b) = (a.bulk.as_mut().unwrap(), b.bulk.as_mut().unwrap());
    bulk_a.send(b"2".to_vec()).await.unwrap();
    assert_eq!(bulk_b.receive().await.unwrap().unwrap(), b"2");
    // A user that does not receive for long is no reason either.
    for i in 0..20 {
        a.control.send(vec![i]).await.unwrap();
    }
    sleep(Duration::from_millis(1500)).await;
    for i in 0..20 {
        assert_eq!(b.control.receive().await.unwrap().unwrap(), [i]);
    }
    // A raw peer says nothing.
    let (_stream, mut connection, _listener) = hostile(quick).await;
    let start = Instant::now();
    assert_eq!(connection.receive().await, Err(ChannelError::Idle(500)));
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn messages_that_are_too_long_are_not_sent_and_cost_nothing_else() {
    let (a, mut b, _listener) = pair(limits(), Arc::new(Pace::new(None))).await;
    let limit = limits().max_control_bytes;
    assert_eq!(a.control.send(vec![0; limit + 1]).await, Err(ChannelError::TooLong { bytes: limit + 1, limit }));
    a.control.send(vec![1; limit]).await.unwrap();
    assert_eq!(b.control.receive().await.unwrap().unwrap().len(), limit);
    drop(a);
    assert_eq!(b.control.receive().await, Err(ChannelError::Cut));
}

#[tokio::test]
async fn the_cap_holds_for_bulk_until_it_is_lifted() {
    let pace = Arc::new(Pace::new(Some(1_000_000)));
    let (a, mut b, _listener) = pair(limits(), pace.clone()).await;
    let (bulk_a, bulk_b) = (a.bulk.as_ref().unwrap(), b.bulk.as_mut().unwrap());
    let start = Instant::now();
    bulk_a.send(vec![0; 500_000]).await.unwrap();
    let control = async {
        a.control.send(vec![7]).await.unwrap();
        assert_eq!(b.control.receive().await.unwrap().unwrap(), [7]);
        start.elapsed()
    };
    let (control, bulk) = tokio::join!(control, bulk_b.receive());
    assert_eq!(bulk.unwrap().unwrap().len(), 500_000);
    let took = start.elapsed();
    assert!(took > Duration::from_millis(430), "{took:?}");
    assert!(control < Duration::from_millis(300), "control waited for bulk: {control:?}");
    // What waits already goes at once.
    pace.set_rate(Some(MIN_RATE_BYTES_PER_S));
    let start = Instant::now();
    for _ in 0..4 {
        bulk_a.send(vec![0; 1 << 20]).await.unwrap();
    }
    sleep(Duration::from_millis(100)).await;
    bulk_a.sender.set_paced(false);
    for _ in 0..4 {
        bulk_b.receive().await.unwrap().unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

/// Passes a connection on until so many bytes have gone in one direction, then drops both sides of it at once. Returns how many went there.
async fn cutting_proxy(
    to: SocketAddr,
    client_to_server: bool,
    after: usize,
) -> (SocketAddr, tokio::task::JoinHandle<usize>) {
    /// True: the limit is reached. False: the end came before, and was passed on.
    async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, limit: usize, total: &AtomicUsize) -> bool {
        let mut buffer = vec![0; 4096];
        loop {
            let room = buffer.len().min(limit - total.load(Relaxed));
            if room == 0 {
                return true;
            }
            match from.read(&mut buffer[..room]).await {
                Ok(n) if n > 0 && to.write_all(&buffer[..n]).await.is_ok() => total.fetch_add(n, Relaxed),
                _ => {
                    let _ = to.shutdown().await;
                    return false;
                }
            };
        }
    }
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (client, _) = socket.accept().await.unwrap();
        let server = TcpStream::connect(to).await.unwrap();
        let (client_read, client_write) = client.into_split();
        let (server_read, server_write) = server.into_split();
        let (limited, free) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (up, down) = if client_to_server {
            ((after, &limited), (usize::MAX, &free))
        } else {
            ((usize::MAX, &free), (after, &limited))
        };
        let up = async {
            let cut = copy(client_read, server_write, up.0, up.1).await;
            if cut { Err(()) } else { Ok(()) }
        };
        let down = async {
            let cut = copy(server_read, client_write, down.0, down.1).await;
            if cut { Err(()) } else { Ok(()) }
        };
        let _ = tokio::try_join!(up, down);
        limited.load(Relaxed)
    });
    (address, task)
}

/// Three messages each way and a close; what each side got, and how it ended.
async fn exchange(
    listener: &mut Listener,
    dialer: &Dialer,
    address: SocketAddr,
) -> [(Vec<Vec<u8>>, Result<(), ChannelError>); 2] {
    async fn one_side(mut connection: Connection) -> (Vec<Vec<u8>>, Result<(), ChannelError>) {
        let mut got = vec![];
        for i in 0..3u8 {
            let _ = connection.send(vec![i; 5]).await;
        }
        let sender = connection.sender.clone();
        let close = sender.close();
        let receive = async {
            loop {
                match connection.receiver.receive().await {
                    Ok(Some(message)) => got.push(message),
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                }
            }
        };
        let (_, end) = tokio::join!(close, receive);
        (got, end)
    }
    // Of its own, so that a session which comes late is not taken for that of the next exchange.
    static NEXT_ID: AtomicU64 = AtomicU64::new(1);
    let id = u128::from(NEXT_ID.fetch_add(1, Relaxed));
    let (client_failed, failed) = oneshot::channel();
    let client = async {
        let result = match dialer.check(address, "b", id).await {
            Ok(session) => one_side(session.control).await,
            Err(error) => (vec![], Err(error)),
        };
        if result.1.is_err() {
            let _ = client_failed.send(());
        }
        result
    };
    let accept = async {
        loop {
            let session = listener.accept().await.unwrap();
            if session.migration == id {
                return session;
            }
        }
    };
    let server = async {
        let given_up = async {
            // A client that succeeds has talked to the server.
            if failed.await.is_err() {
                std::future::pending::<()>().await;
            }
            sleep(Duration::from_millis(60)).await;
        };
        tokio::select! {
            session = accept => one_side(session.control).await,
            // The cut came too early for a session.
            () = given_up => (vec![], Err(ChannelError::Cut)),
        }
    };
    let (client, server) = tokio::join!(client, server);
    [client, server]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_can_be_cut_at_every_byte() {
    /// Cuts are mostly waiting: many at a time.
    const LANES: usize = 8;
    let site = Site::new(&["a", "b"]);
    let (tls_a, tls_b) = (site.tls("a"), site.tls("b"));
    let mut lanes = tokio::task::JoinSet::new();
    for lane in 0..2 * LANES {
        lanes.spawn(cut_at_bytes(tls_a.clone(), tls_b.clone(), lane % 2 == 0, lane / 2, LANES));
    }
    while let Some(result) = lanes.join_next().await {
        result.unwrap();
    }
}

/// Every `of`th cut from `first` on.
async fn cut_at_bytes(tls_a: Arc<TlsContext>, tls_b: Arc<TlsContext>, client_to_server: bool, first: usize, of: usize) {
    let limits = ChannelLimits { close_ms: 500, ..limits() };
    let (mut listener, _) = listen(tls_b, limits.clone()).await;
    let dialer = Dialer::new(tls_a, limits, Arc::new(Pace::new(None)), None).unwrap();
    let (address, proxy) = cutting_proxy(listener.local_addr(), client_to_server, usize::MAX).await;
    for (got, end) in exchange(&mut listener, &dialer, address).await {
        assert_eq!((got.len(), end), (3, Ok(())), "uncut");
    }
    let total = timeout(Duration::from_secs(10), proxy).await.unwrap().unwrap();
    // Handshake: samples; from the first frame on (the last 450 bytes hold all frames in both directions): every byte.
    let frames = total.checked_sub(450).unwrap();
    for after in (0..frames).step_by(29).chain(frames..total).skip(first).step_by(of) {
        let (address, proxy) = cutting_proxy(listener.local_addr(), client_to_server, after).await;
        let sides = timeout(Duration::from_secs(20), exchange(&mut listener, &dialer, address)).await.expect("hangs");
        for (i, (got, _)) in sides.iter().enumerate() {
            for (n, message) in got.iter().enumerate() {
                assert_eq!(*message, vec![n as u8; 5], "{after}: side {i}");
            }
        }
        // Who was to receive what was cut knows that it has not everything.
        let (got, end) = &sides[usize::from(client_to_server)];
        if end.is_ok() {
            // Only TLS's own farewell (24 bytes) was cut: everything before had come.
            assert_eq!(got.len(), 3, "{client_to_server} {after}");
            assert!(after + 24 >= total, "{client_to_server} {after} of {total}");
        }
        proxy.abort();
    }
    let freed = async {
        while listener.stats().open > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), freed).await.expect("every connection was given up");
}

#[tokio::test]
async fn nobody_answers_and_nobody_listens() {
    let site = Site::new(&["a", "b"]);
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let limits = ChannelLimits { handshake_ms: 300, ..limits() };
    let dialer = Dialer::new(site.tls("a"), limits, Arc::new(Pace::new(None)), None).unwrap();
    let address = silent.local_addr().unwrap();
    let error = dialer.dial(address, "b", ID).await.unwrap_err();
    assert_eq!(error, ChannelError::Timeout { what: "the TLS handshake", limit_ms: 300 });
    drop(silent);
    let error = dialer.dial(address, "b", ID).await.unwrap_err();
    assert!(matches!(error, ChannelError::Connect { .. }), "{error}");
    assert!(matches!(dialer.dial(address, "10.0.0.1", ID).await, Err(ChannelError::Setup(_))));
    // A listener that is dropped is gone, with handshakes under way.
    let (listener, _) = listen(site.tls("b"), ChannelLimits::default()).await;
    let address = listener.local_addr();
    let mut tcp = TcpStream::connect(address).await.unwrap();
    sleep(Duration::from_millis(50)).await;
    drop(listener);
    let mut rest = vec![];
    let _ = timeout(Duration::from_secs(5), tcp.read_to_end(&mut rest)).await.expect("hung up on");
    assert!(TcpStream::connect(address).await.is_err());
}

#[test]
fn the_context_shows_no_secrets() {
    let site = Site::new(&["a"]);
    let text = format!("{:?}", site.tls("a"));
    assert!(text.contains("\"a\"") && !text.contains("key"), "{text}");
    assert!(Path::new(&site.files("a").key).exists());
}

/// A timer per piece would limit every connection to 16 KiB per millisecond: the best of three must be clearly faster, capped or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cap_that_is_not_reached_costs_no_time() {
    const MESSAGES: usize = 32;
    for cap in [None, Some(100_000_000_000)] {
        let (a, mut b, _listener) = pair(limits(), Arc::new(Pace::new(cap))).await;
        let (bulk_a, bulk_b) = (a.bulk.as_ref().unwrap(), b.bulk.as_mut().unwrap());
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let start = Instant::now();
            let send = async {
                for _ in 0..MESSAGES {
                    bulk_a.send(vec![3; 1 << 20]).await.unwrap();
                }
            };
            let receive = async {
                for _ in 0..MESSAGES {
                    assert_eq!(bulk_b.receive().await.unwrap().unwrap().len(), 1 << 20);
                }
            };
            tokio::join!(send, receive);
            best = best.min(start.elapsed());
        }
        assert!(best < Duration::from_millis(1400), "{cap:?}: {best:?}");
    }
}
