//! A third process, for the case that both the watcher and the worker of a dump ([`crate::guard`]) are killed at once, as by a SIGKILL to
//! every process of a session's tools, or by somebody who kills whatever is called ferry.
//!
//! It has a session of its own, blocks every signal, and sleeps on a pipe whose other end is open in the watcher and in the worker
//! alone. When both are gone and neither has closed the journal, it undoes what is noted there, as the watcher would have.
#![allow(unsafe_code, reason = "fork(2); its use says why it is sound")]

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ferry_engine::journal::Journal;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use rustix::pipe::{PipeFlags, pipe_with};

/// What the guardian sleeps on, before there is one.
#[derive(Debug)]
pub struct Pipe {
    theirs: OwnedFd,
    ours: OwnedFd,
}

/// Keeps the guardian asleep. Dropped, the journal is closed: this process has undone, or finished, what there was.
#[derive(Debug)]
pub struct Hold {
    journal: Journal,
    _end: OwnedFd,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.journal.close();
    }
}

/// The guardian, as its parent has it.
#[derive(Debug)]
pub struct Guardian {
    hold: Hold,
    process: Option<Pid>,
}

impl Pipe {
    /// A pipe, to be made before the worker.
    ///
    /// # Errors
    /// Those of pipe(2).
    pub fn new() -> nix::Result<Self> {
        let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
        Ok(Self { theirs, ours })
    }

    /// What the worker holds.
    pub fn hold(self, journal: Journal) -> Hold {
        Hold { journal, _end: self.ours }
    }

    /// Starts the guardian. `others` are descriptors that it must not keep open. Without one, where there can be no more processes, the dump
    /// is watched by this process alone.
    pub fn start(self, journal: Journal, others: &mut dyn FnMut()) -> Guardian {
        let Self { theirs, ours } = self;
        // SAFETY: this process has no other thread, so the child may do whatever this process may.
        let process = match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                drop(ours);
                others();
                // Whatever happens in it, it does not go on as its parent.
                let _ = catch_unwind(AssertUnwindSafe(|| guard(&theirs, &journal)));
                // SAFETY: takes a number.
                unsafe { libc::_exit(0) }
            }
            Ok(ForkResult::Parent { child }) => Some(child),
            Err(errno) => {
                tracing::debug!(%errno, "no guardian");
                None
            }
        };
        Guardian { hold: Hold { journal, _end: ours }, process }
    }
}

impl Guardian {
    /// All is in order: it ends.
    pub fn dismiss(self) {
        drop(self.hold);
        if let Some(process) = self.process {
            // It may have been killed, and waited for by whoever waits for all.
            let _ = waitpid(process, None);
        }
    }
}

/// What the guardian does.
fn guard(pipe: &OwnedFd, journal: &Journal) {
    let _ = nix::unistd::setsid();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
    let _ = rustix::thread::set_name(c"ferry-guardian");
    while rustix::io::read(pipe, &mut [0; 1]) == Err(rustix::io::Errno::INTR) {}
    if !journal.is_closed() {
        let repaired = journal.repair();
        tracing::warn!(
            ?repaired,
            "ferry was killed, with the process that did the work: what it had changed was undone"
        );
        journal.close();
    }
}
