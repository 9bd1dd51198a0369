//! A dump is done by two processes, so that the death of either harms nothing.
//!
//! The process that the caller knows, the *watcher*, forks a *worker*, which does all the work, and waits for it.
//!
//! - The watcher is killed: the worker, to which the kernel signals that the watcher's end of a pipe is closed (fcntl(2),
//!   `F_SETSIG`), gives up. All is undone in order, by ordinary error handling.
//! - The worker is killed: the watcher undoes what the worker has noted in memory that both share
//!   ([`ferry_engine::journal`]). The kernel has let go of the tasks by then.
//! - A signal asks the watcher to end (SIGTERM, SIGINT, SIGHUP): it passes it on, and the worker gives up. A worker that does not get to its
//!   end within [`GRACE`] is killed, which is the case before.
//!
//! - Both are killed at once: a third process does what the watcher would have done ([`crate::guardian`]).
//!
//! The worker has a session of its own, so that a signal to ferry's process group, as of a terminal, meets the watcher alone. Both
//! are single-threaded at the fork. What the worker prints and how it exits is what the command prints and how it exits.
#![allow(unsafe_code, reason = "fork(2) and signal handlers; each use says why it is sound")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ferry_engine::cancel::Cancel;
use ferry_engine::dump::DumpOptions;
use ferry_engine::journal::{Journal, Repaired};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::ending;
use crate::failure::{Failure, Outcome};
use crate::guardian::{self, Hold};

/// How long a worker that was asked to give up may take for it.
const GRACE: Duration = Duration::from_secs(10);
/// The same when nobody watches it any more; then the kernel ends it.
const GRACE_ALONE: u32 = 15;

/// What tells the worker that its watcher is gone.
const ALONE: Signal = Signal::SIGUSR1;

/// What the worker gives to the engine.
#[derive(Debug)]
pub struct Worker {
    /// Ends the work early.
    pub cancel: Cancel,
    /// Where it notes what the watcher is to undo.
    pub journal: Journal,
    /// Its end of the pipe.
    _watched: OwnedFd,
    _hold: Hold,
}

impl Worker {
    /// Has a dump be ended early and noted.
    pub fn oversee(&self, options: &mut DumpOptions) {
        options.cancel = self.cancel.clone();
        options.journal = Some(self.journal.clone());
    }
}

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Side {
    /// The one that does the work, and exits with its outcome.
    Worker(Worker),
    /// The one that the caller knows; the worker is gone.
    Watcher(End),
}

/// How the worker ended.
#[derive(Debug)]
pub enum End {
    /// By itself, with this status; it has told what there is to tell.
    Exited(u8),
    /// By a signal, and what it had made was undone.
    Killed(Signal, Repaired),
}

impl End {
    /// What the command ends with.
    ///
    /// # Errors
    /// When the worker was killed, a sentence for people.
    pub fn outcome(self) -> Outcome {
        let (signal, repaired) = match self {
            Self::Exited(status) => return Ok(ExitCode::from(status)),
            Self::Killed(signal, repaired) => (signal, repaired),
        };
        let what = format!("ferry's own process that did the work was ended by {signal}");
        Err(Failure::new(match (repaired.ended, repaired.left.as_slice()) {
            (0, []) => format!("{what}; the processes run on as before"),
            (0, left) => format!("{what}; the processes run on, but this could not be undone: {}", left.join("; ")),
            (_, []) => format!("{what} when the images were complete; the processes have been ended"),
            (_, left) => format!(
                "{what} when the images were complete; the processes have been ended, but this remains: {}",
                left.join("; ")
            ),
        }))
    }
}

/// Does the work in a process of its own, watched by this one.
///
/// # Errors
/// When there can be no such process, the work's own, and that it was killed.
pub fn run(work: impl FnOnce(&Worker) -> Outcome) -> Outcome {
    match split()? {
        Side::Worker(worker) => work(&worker),
        Side::Watcher(end) => end.outcome(),
    }
}

/// Becomes two processes, and returns in both: at once in the worker, and in the watcher when the worker is gone.
///
/// # Errors
/// When there can be no second process.
pub fn split() -> Result<Side, Failure> {
    let context = |error: io::Error| Failure::from(error).context("cannot watch over the work");
    let journal = Journal::new().map_err(|errno| context(errno.into()))?;
    let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| context(errno.into()))?;
    let pipe = guardian::Pipe::new().map_err(|errno| context(errno.into()))?;
    let watched = Watched::block().map_err(|errno| context(errno.into()))?;
    // SAFETY: this process has no other thread yet, so the child may do whatever this process may.
    match unsafe { fork() }.map_err(|errno| context(errno.into()))? {
        ForkResult::Child => {
            drop(ours);
            // Before the handlers that tell it are installed.
            let cancel = ending::cancel();
            become_worker(&theirs, &watched).map_err(|errno| context(errno.into()))?;
            let _hold = pipe.hold(journal.clone());
            Ok(Side::Worker(Worker { cancel, journal, _watched: theirs, _hold }))
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            // The guardian must not keep this end open: the worker gives up when it is closed.
            let mut ours = Some(ours);
            let guardian = pipe.start(journal.clone(), &mut || drop(ours.take()));
            let ended = watched.wait_for(child).map_err(|errno| context(errno.into()))?;
            drop(ours);
            let end = match ended {
                WaitStatus::Signaled(_, signal, _) => End::Killed(signal, journal.repair()),
                WaitStatus::Exited(_, status) => End::Exited(u8::try_from(status).unwrap_or(u8::MAX)),
                _ => End::Exited(u8::MAX),
            };
            guardian.dismiss();
            Ok(Side::Watcher(end))
        }
    }
}

/// The signals that the watcher waits for, blocked; given back when dropped.
struct Watched {
    before: SigSet,
    /// Those that ask this command to end.
    ending: Vec<Signal>,
    signals: SignalFd,
}

impl Watched {
    fn block() -> nix::Result<Self> {
        // Somebody who ignores the end of children would have the kernel reap the worker unseen.
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: no handler of ours is installed or replaced.
        unsafe { sigaction(Signal::SIGCHLD, &default) }?;
        let ending: Vec<Signal> = ending::not_ignored();
        let set: SigSet = ending.iter().copied().chain([Signal::SIGCHLD]).collect();
        let mut before = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut before))?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { before, ending, signals })
    }

    /// Waits for the end of the worker, and has it give up when this process is asked to end.
    fn wait_for(&self, worker: Pid) -> nix::Result<WaitStatus> {
        let mut killed_at: Option<Instant> = None;
        loop {
            let status = waitpid(worker, Some(WaitPidFlag::WNOHANG))?;
            if matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..)) {
                return Ok(status);
            }
            let left = killed_at.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                nix::sys::signal::kill(worker, Signal::SIGKILL)?;
                killed_at = None;
            }
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.signals, PollFlags::IN)], timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Errno::from_raw(errno.raw_os_error())),
            }
            while let Some(found) = self.signals.read_signal()? {
                let Ok(signal) = Signal::try_from(found.ssi_signo as i32) else { continue };
                if signal != Signal::SIGCHLD {
                    nix::sys::signal::kill(worker, signal)?;
                    killed_at.get_or_insert(Instant::now() + GRACE);
                }
            }
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // What came until now asked the worker to end, and it has ended.
        while let Ok(Some(_)) = self.signals.read_signal() {}
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.before), None);
    }
}

/// Makes this process one that gives up when it is told to, or when `watched` is closed at its other end.
fn become_worker(watched: &OwnedFd, signals: &Watched) -> nix::Result<()> {
    nix::unistd::setsid()?;
    let handler = |act| SigAction::new(SigHandler::Handler(act), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handlers do nothing but what a handler may do: an atomic store, and alarm(2) (signal-safety(7)).
    unsafe {
        for signal in &signals.ending {
            sigaction(*signal, &handler(ending::note))?;
        }
        sigaction(ALONE, &handler(left_alone))?;
    }
    let control = |command: i32, value: i32| {
        // SAFETY: these commands take an integer, and the descriptor is open.
        let result = unsafe { libc::fcntl(watched.as_raw_fd(), command, value) };
        Errno::result(result)
    };
    control(libc::F_SETOWN, Pid::this().as_raw())?;
    control(F_SETSIG, ALONE as i32)?;
    control(libc::F_SETFL, libc::O_ASYNC)?;
    // It may have been killed before the kernel was told to tell us.
    let mut end = [PollFd::from_borrowed_fd(watched.as_fd(), PollFlags::IN)];
    if poll(&mut end, Some(&Timespec::default())).is_ok_and(|ready| ready > 0) {
        left_alone(ALONE as i32);
    }
    Ok(())
}

/// Which signal a descriptor sends (fcntl(2)); the libc crate has no name for it on this target.
const F_SETSIG: i32 = 10;

extern "C" fn left_alone(_: i32) {
    ending::note_caller_gone();
    // The default action of the alarm is the end of this process, should it not come to one.
    // SAFETY: takes a number.
    unsafe { libc::alarm(GRACE_ALONE) };
}
