//! The command loop: one thread per running command, answers remembered so that a repeated request is answered
//! again instead of being run again.
use crate::{connections, raw, shell, workload};
use ferry_guest::protocol::{Command, READY_ID, Reply, Request, Response};
use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Answers kept for repeated requests.
const REMEMBERED: usize = 256;

struct State {
    output: Box<dyn Write + Send>,
    /// Requests seen; `None` while running.
    answers: BTreeMap<u64, Option<Response>>,
}

/// Serves commands until the input ends.
pub fn serve(input: impl BufRead, output: Box<dyn Write + Send>) {
    let state = Arc::new(Mutex::new(State { output, answers: BTreeMap::new() }));
    answer(&state, Response { id: READY_ID, result: interfaces() });
    for line in input.lines() {
        let Ok(line) = line else { return };
        let request: Request = match serde_json::from_str(&line) {
            Ok(r) => r,
            Err(e) => {
                answer(&state, Response { id: READY_ID, result: Err(format!("bad request: {e}")) });
                continue;
            }
        };
        {
            let mut s = state.lock().unwrap_or_else(PoisonError::into_inner);
            match s.answers.get(&request.id).cloned() {
                Some(Some(known)) => {
                    write(&mut s, &known);
                    continue;
                }
                Some(None) => continue,
                None => {
                    s.answers.insert(request.id, None);
                }
            }
        }
        let state = state.clone();
        let started = thread::Builder::new().stack_size(256 << 10).spawn(move || {
            let response = Response { id: request.id, result: run(request.command) };
            answer(&state, response);
        });
        if started.is_err() {
            println!("ferry-guest: no thread to be had");
        }
    }
}

fn write(state: &mut State, response: &Response) {
    if let Ok(mut text) = serde_json::to_string(response) {
        text.push('\n');
        let _ = state.output.write_all(text.as_bytes()).and_then(|()| state.output.flush());
    }
}

fn answer(state: &Mutex<State>, response: Response) {
    let mut s = state.lock().unwrap_or_else(PoisonError::into_inner);
    write(&mut s, &response);
    if response.id != READY_ID {
        s.answers.insert(response.id, Some(response));
        while s.answers.len() > REMEMBERED {
            s.answers.pop_first();
        }
    }
}

fn interfaces() -> Result<Reply, String> {
    let mut interfaces: Vec<String> = std::fs::read_dir("/sys/class/net")
        .map_err(|e| e.to_string())?
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| n != "lo")
        .collect();
    interfaces.sort();
    Ok(Reply::Ready { interfaces })
}

fn run(command: Command) -> Result<Reply, String> {
    match command {
        Command::Ping => Ok(Reply::Done),
        Command::Shell { command, timeout_ms } => {
            shell::run(&command, Duration::from_millis(timeout_ms)).map(Reply::Shell)
        }
        Command::Transfer { to, direction, seed, bytes, pace_mb_per_s, timeout_ms } => {
            workload::transfer(to, direction, seed, bytes, pace_mb_per_s, Duration::from_millis(timeout_ms))
                .map(Reply::Transfer)
        }
        Command::UdpProbe { to, count, payload_bytes, interval_us, linger_ms } => workload::udp_probe(
            to,
            count,
            payload_bytes,
            Duration::from_micros(interval_us),
            Duration::from_millis(linger_ms),
            &AtomicBool::new(false),
        )
        .map(Reply::Udp),
        Command::UdpProbeBegin { to, payload_bytes, interval_us } => {
            workload::udp_probe_begin(to, payload_bytes, Duration::from_micros(interval_us)).map(Reply::Handle)
        }
        Command::UdpProbeEnd { handle } => workload::udp_probe_end(handle).map(Reply::Udp),
        Command::UdpSend { to, count, payload_bytes, interval_us, seed } => {
            workload::udp_send(to, count, payload_bytes, Duration::from_micros(interval_us), seed).map(Reply::Udp)
        }
        Command::UdpHold { port } => workload::udp_hold(port).map(|()| Reply::Done),
        Command::UdpDrain { port, seed } => workload::udp_drain(port, seed).map(Reply::Udp),
        Command::UdpEchoed => Ok(Reply::Count(crate::services::udp_echoed())),
        Command::TickStart { to, interval_ms } => {
            workload::tick_start(to, Duration::from_millis(interval_ms)).map(Reply::Handle)
        }
        Command::TickReport { handle, stop } => workload::tick_report(handle, stop).map(Reply::Tick),
        Command::ConnectionsOpen { to, count, timeout_ms } => {
            connections::open(to, count, Duration::from_millis(timeout_ms)).map(Reply::Handle)
        }
        Command::ConnectionsExercise { handle, payload_bytes, timeout_ms } => {
            connections::exercise(handle, payload_bytes, Duration::from_millis(timeout_ms))
        }
        Command::ConnectionsClose { handle } => connections::close(handle).map(|()| Reply::Done),
        Command::SendFrames { interface, frames, rounds, vary } => {
            raw::send(&interface, &frames, rounds, vary).map(Reply::Count)
        }
        Command::DirtyStart { size_mb, mb_per_s } => Ok(Reply::Handle(workload::dirty_start(size_mb, mb_per_s))),
        Command::DirtyStop { handle } => workload::dirty_stop(handle).map(|()| Reply::Done),
    }
}
