//! Connections to an echo service that are kept open, many at a time.
use ferry_guest::protocol::Reply;
use ferry_guest::stream::Stream;
use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Connections are opened by so many threads at once: less than the shortest queue of half-open connections.
const OPENERS: usize = 16;
/// Connections that are exercised at once; more would overrun the rings and cost retransmissions.
const WINDOW: usize = 256;

struct Kept {
    socket: TcpStream,
    /// Sent, and its echo has not come back.
    owed: Vec<u8>,
    exercises: u64,
}

/// Each handle's connections have a lock of their own: exercising many takes a while.
type Handles = HashMap<u64, Arc<Mutex<Vec<Kept>>>>;
static CONNECTIONS: LazyLock<Mutex<Handles>> = LazyLock::new(Mutex::default);

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens and keeps connections.
pub fn open(to: SocketAddr, count: u32, timeout: Duration) -> Result<u64, String> {
    let connect = || TcpStream::connect_timeout(&to, timeout).map_err(|e| format!("connect to {to}: {e}"));
    let count = count as usize;
    let share = |opener: usize| count / OPENERS + usize::from(opener < count % OPENERS);
    let opened: Result<Vec<Vec<TcpStream>>, String> = thread::scope(|scope| {
        let openers: Vec<_> = (0..OPENERS.min(count))
            .map(|opener| {
                thread::Builder::new()
                    .stack_size(256 << 10)
                    .spawn_scoped(scope, move || (0..share(opener)).map(|_| connect()).collect())
                    .map_err(|e| e.to_string())
            })
            .collect();
        openers.into_iter().map(|o| o?.join().unwrap_or_else(|_| Err("opener failed".into()))).collect()
    });
    let kept = opened?.into_iter().flatten().map(|socket| Kept { socket, owed: Vec::new(), exercises: 0 }).collect();
    let handle = crate::workload::new_handle();
    lock(&CONNECTIONS).insert(handle, Arc::new(Mutex::new(kept)));
    Ok(handle)
}

/// Echoes a payload over every connection. `timeout` is that of a whole window of connections.
pub fn exercise(handle: u64, payload_bytes: usize, timeout: Duration) -> Result<Reply, String> {
    let kept = lock(&CONNECTIONS).get(&handle).cloned().ok_or("no such connections")?;
    let mut kept = lock(&kept);
    let (mut ok, mut failed, mut error) = (0, 0, None);
    let (mut done, mut window) = (0, WINDOW);
    while done < kept.len() {
        let end = kept.len().min(done + window);
        let deadline = Instant::now() + timeout;
        let sent: Vec<_> = (done..end).map(|i| kept[i].send(i as u64 ^ handle << 32, payload_bytes, timeout)).collect();
        let before = ok;
        for (i, sent) in (done..end).zip(sent) {
            match sent.and_then(|()| kept[i].receive(deadline)) {
                Ok(()) => ok += 1,
                Err(e) => {
                    failed += 1;
                    error.get_or_insert_with(|| format!("connection {i}: {e}"));
                }
            }
        }
        if ok == before {
            // They hang, and nothing can be overrun.
            window *= 2;
        }
        done = end;
    }
    Ok(Reply::Connections { ok, failed, error })
}

/// Closes kept connections.
pub fn close(handle: u64) -> Result<(), String> {
    lock(&CONNECTIONS).remove(&handle).map(drop).ok_or_else(|| "no such connections".into())
}

impl Kept {
    fn send(&mut self, seed: u64, payload_bytes: usize, timeout: Duration) -> io::Result<()> {
        self.exercises += 1;
        let mut payload = vec![0; payload_bytes];
        Stream::new(seed ^ self.exercises << 48).fill(&mut payload);
        self.socket.set_nonblocking(false)?;
        self.socket.set_write_timeout(Some(timeout))?;
        self.socket.write_all(&payload)?;
        self.owed.extend_from_slice(&payload);
        Ok(())
    }

    /// Waits for the echo of all that was ever sent, so that a connection which comes to life again counts as alive.
    fn receive(&mut self, deadline: Instant) -> io::Result<()> {
        let mut buf = [0; 4096];
        while !self.owed.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            // Once the time is over, only what has come already counts: waiting a little for each of many would add up.
            self.socket.set_nonblocking(left.is_zero())?;
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let room = buf.len().min(self.owed.len());
            match self.socket.read(&mut buf[..room])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n if self.owed.starts_with(&buf[..n]) => drop(self.owed.drain(..n)),
                _ => return Err(io::Error::other("wrong echo")),
            }
        }
        self.owed = Vec::new();
        Ok(())
    }
}
