//! Staying with a container's process until it ends: its signals, its terminal, its exit status.

use std::process::ExitCode;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::console::Terminal;
use crate::failure::{Failure, Outcome};
use crate::signals::SignalNumber;

/// Proof that signals are blocked, so that they can be waited for. Taken before the program starts (its process has
/// been made and does not inherit the mask), so that none is lost.
#[derive(Debug)]
pub struct Signals(SigSet);

impl Signals {
    /// Blocks every signal that can be.
    ///
    /// # Errors
    /// What pthread_sigmask(3) says.
    pub fn block() -> Result<Self, Failure> {
        let all = SigSet::all();
        all.thread_block()?;
        Ok(Self(all))
    }
}

/// Makes ferry the parent of processes below it that lose theirs (PR_SET_CHILD_SUBREAPER), so that `wait` reaps them.
pub fn become_subreaper() {
    let this = rustix::process::getpid();
    if let Err(error) = rustix::process::set_child_subreaper(Some(this)) {
        tracing::warn!(%error, "cannot become a subreaper");
    }
}

/// Waits until the child `pid` ends, passing signals on to it, and returns its exit status, as a shell would:
/// 128 and the signal's number if a signal ended it.
///
/// # Errors
/// When `pid` is no child of this process.
pub fn wait(pid: i32, signals: Signals, terminal: Option<Terminal>) -> Outcome {
    let relay = terminal.map(Terminal::relay);
    let status = loop {
        if let Some(status) = reap(pid)? {
            break status;
        }
        match signals.0.wait() {
            Ok(Signal::SIGCHLD | Signal::SIGPIPE | Signal::SIGURG) => {}
            Ok(Signal::SIGWINCH) => {
                if let Some(relay) = &relay {
                    relay.resize();
                }
            }
            Ok(signal) => forward(signal, pid),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(Failure::from(error).context("cannot wait for signals")),
        }
    };
    if let Some(relay) = relay {
        relay.finish();
    }
    Ok(ExitCode::from(status))
}

fn forward(signal: Signal, pid: i32) {
    let sent = SignalNumber::from(signal).send_if_alive(pid);
    if let Err(error) = sent {
        tracing::warn!(%signal, pid, %error, "cannot pass the signal on");
    }
}

/// Reaps every child that has ended; the status of `pid` if it was among them.
fn reap(pid: i32) -> Result<Option<u8>, Failure> {
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return Ok(None),
            Ok(WaitStatus::Exited(child, code)) if child.as_raw() == pid => {
                return Ok(Some(u8::try_from(code & 0xff).unwrap_or(u8::MAX)));
            }
            Ok(WaitStatus::Signaled(child, signal, _)) if child.as_raw() == pid => {
                return Ok(Some(u8::try_from(128 + signal as i32).unwrap_or(u8::MAX)));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                return Err(Failure::from(error).context(format_args!("cannot wait for process {pid}")));
            }
        }
    }
}
