//! The TCP echo service: one thread for all connections, so that a small guest can hold many thousands.
use crate::epoll::{Epoll, Interest};
use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::thread;

struct Connection {
    socket: TcpStream,
    /// Read and not written back yet. While there is any, nothing more is read.
    owed: Vec<u8>,
}

/// Binds these ports on all addresses, IPv4 and IPv6, and starts the service.
pub fn start(ports: &[u16]) -> io::Result<()> {
    let mut epoll = Epoll::new()?;
    let mut listeners = Vec::new();
    for (id, port) in (0..).zip(ports) {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port))?;
        listener.set_nonblocking(true)?;
        epoll.add(&listener, id, Interest::Read)?;
        listeners.push(listener);
    }
    let serve = move || {
        let mut connections = HashMap::new();
        let mut next = listeners.len() as u64;
        loop {
            match epoll.wait() {
                Ok(ready) => {
                    for id in ready {
                        match listeners.get(id as usize) {
                            Some(listener) => accept(listener, &epoll, &mut connections, &mut next),
                            None => serve(id, &epoll, &mut connections),
                        }
                    }
                }
                Err(e) => return println!("ferry-guest: echo: {e}"),
            }
        }
    };
    thread::Builder::new().stack_size(256 << 10).spawn(serve).map(drop)
}

fn accept(listener: &TcpListener, epoll: &Epoll, connections: &mut HashMap<u64, Connection>, next: &mut u64) {
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                let id = *next;
                *next += 1;
                if let Err(e) = socket.set_nonblocking(true).and_then(|()| epoll.add(&socket, id, Interest::Read)) {
                    println!("ferry-guest: echo: {e}");
                    continue;
                }
                connections.insert(id, Connection { socket, owed: Vec::new() });
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => return,
            Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
            // Out of memory or descriptors; whoever connects will notice.
            Err(e) => return println!("ferry-guest: echo: accept: {e}"),
        }
    }
}

fn serve(id: u64, epoll: &Epoll, connections: &mut HashMap<u64, Connection>) {
    if let Some(connection) = connections.get_mut(&id)
        && connection.exchange(id, epoll).is_err()
    {
        connections.remove(&id);
    }
}

impl Connection {
    /// Writes what is owed, else reads once and writes that back. An error is the connection's end.
    fn exchange(&mut self, id: u64, epoll: &Epoll) -> io::Result<()> {
        let owing = !self.owed.is_empty();
        if !owing {
            let mut buf = [0; 4096];
            match self.socket.read(&mut buf) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.owed.extend_from_slice(&buf[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        match self.socket.write(&self.owed) {
            Ok(n) => drop(self.owed.drain(..n)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        match (owing, self.owed.is_empty()) {
            (false, false) => epoll.change(&self.socket, id, Interest::Write),
            (true, true) => epoll.change(&self.socket, id, Interest::Read),
            _ => Ok(()),
        }?;
        if self.owed.is_empty() {
            // Thousands of buffers that are rarely used would add up.
            self.owed = Vec::new();
        }
        Ok(())
    }
}
