//! What every agent offers to the others, from the start: the stream, tick and echo services.
use crate::echo;
use crate::workload::{self, StreamHeader, TickPeer};
use ferry_guest::protocol::{Direction, SECOND_ECHO_PORT, STREAM_PORT, TCP_ECHO_PORT, TICK_PORT, UDP_ECHO_PORT};
use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

/// A stalled transfer is given up after this long.
const STREAM_TIMEOUT: Duration = Duration::from_secs(120);
static UDP_ECHOED: AtomicU64 = AtomicU64::new(0);

/// Datagrams that the echo service has seen.
pub fn udp_echoed() -> u64 {
    UDP_ECHOED.load(Relaxed)
}

/// Binds all services on all addresses, IPv4 and IPv6, and starts their threads.
pub fn start() -> io::Result<()> {
    accept(STREAM_PORT, |s| drop(serve_stream(s)))?;
    accept(TICK_PORT, |s| drop(serve_ticks(s)))?;
    echo::start(&[TCP_ECHO_PORT, SECOND_ECHO_PORT])?;
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, UDP_ECHO_PORT))?;
    spawn(move || {
        let mut buf = vec![0; 65536];
        loop {
            // Errors here are ICMP messages about earlier answers: not the end.
            if let Ok((n, from)) = socket.recv_from(&mut buf) {
                UDP_ECHOED.fetch_add(1, Relaxed);
                let _ = socket.send_to(&buf[..n], from);
            }
        }
    })
}

fn spawn(f: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().stack_size(256 << 10).spawn(f).map(drop)
}

fn accept(port: u16, serve: fn(TcpStream)) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    spawn(move || {
        for stream in listener.incoming().flatten() {
            if let Err(e) = spawn(move || serve(stream)) {
                println!("ferry-guest: port {port}: {e}");
            }
        }
    })
}

fn serve_stream(mut socket: TcpStream) -> io::Result<()> {
    socket.set_read_timeout(Some(STREAM_TIMEOUT))?;
    socket.set_write_timeout(Some(STREAM_TIMEOUT))?;
    let header = StreamHeader::read(&mut socket)?;
    match header.direction {
        // The client sends, so we receive and tell the digest.
        Direction::Send => {
            let got = workload::receive(&mut socket, header.bytes)?;
            socket.write_all(&got.bytes.to_le_bytes())?;
            socket.write_all(&got.digest)
        }
        Direction::Receive => workload::send(&mut socket, header.seed, header.bytes, header.pace_mb_per_s).map(drop),
    }
}

fn serve_ticks(mut socket: TcpStream) -> io::Result<()> {
    let mut interval = [0; 8];
    socket.read_exact(&mut interval)?;
    let interval = Duration::from_millis(u64::from_le_bytes(interval).clamp(1, 60_000));
    let peer = Arc::new(TickPeer::default());
    workload::tick_run(socket, interval, peer)
}
