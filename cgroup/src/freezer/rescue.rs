//! A process that gives the cgroup back when ferry is killed while it is frozen.
//!
//! SIGKILL runs no destructor, and nothing in the kernel thaws a cgroup because the one that froze it is gone. So before the
//! freeze a small process is forked off that waits on a pipe. A byte means that ferry has given the cgroup back itself. The
//! end of the file means that ferry is gone, and then the process does the writes that ferry would have done.
//!
//! It is ferry's grandchild, so that nobody who waits for children meets it, in a session of its own, so that no
//! terminal signals it, and it holds open nothing but the pipe and the control files. It cannot help when it is killed too.
//!
//! Unsafe code is needed for fork(2) and for what only a forked child may do. Between fork and exit the child calls nothing but
//! system calls: the process may have other threads, whose locks the child would find held for ever (signal-safety(7)).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{ForkResult, fork};
use rustix::pipe::{PipeFlags, pipe_with};

use super::guard::UndoWrite;

/// The end of the pipe whose closing sets the process off.
#[derive(Debug)]
pub(super) struct Rescue {
    pipe: OwnedFd,
}

impl Rescue {
    /// Starts the process.
    pub(super) fn arm(writes: Vec<UndoWrite>) -> io::Result<Rescue> {
        let (wait_end, pipe) = pipe_with(PipeFlags::CLOEXEC)?;
        let wait_end = File::from(wait_end);
        let mut kept: Vec<RawFd> =
            writes.iter().map(|write| write.file.as_raw_fd()).chain([wait_end.as_raw_fd()]).collect();
        kept.sort_unstable();
        // SAFETY: the child calls `become_orphan` alone, which makes only system calls and does not return.
        match unsafe { fork() }? {
            ForkResult::Child => become_orphan(&wait_end, &writes, &kept),
            ForkResult::Parent { child } => {
                // It ends at once. Where children are reaped elsewhere there is nothing to wait for.
                let _ = nix::sys::wait::waitpid(child, None);
                Ok(Rescue { pipe })
            }
        }
    }

    /// Ends the process without its doing anything.
    pub(super) fn dismiss(self) {
        // If it is gone already there is nobody to tell.
        let _ = rustix::io::write(&self.pipe, &[0]);
    }
}

/// The child: forks once more and ends, so that the grandchild belongs to nobody here.
fn become_orphan(wait_end: &File, writes: &[UndoWrite], kept: &[RawFd]) -> ! {
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
    let _ = nix::unistd::setsid();
    close_all_but(kept);
    // SAFETY: the grandchild makes only system calls, in `wait_and_write`, and then exits.
    if let Ok(ForkResult::Child) = unsafe { fork() } {
        wait_and_write(wait_end, writes);
    }
    // SAFETY: ends the process without running anything that it shares with its parent.
    unsafe { libc::_exit(0) }
}

fn wait_and_write(wait_end: &File, writes: &[UndoWrite]) {
    let mut byte = [0];
    loop {
        match rustix::io::read(wait_end, &mut byte) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => break,
            _ => return,
        }
    }
    for write in writes {
        let _ = rustix::io::write(&write.file, write.text.as_bytes());
    }
}

/// Closes every descriptor but these, which are sorted (close_range(2), Linux 5.9): the pipe's other end above all.
fn close_all_but(kept: &[RawFd]) {
    let mut first = 0;
    for fd in kept.iter().map(|fd| libc::c_uint::try_from(*fd).unwrap_or_default()) {
        if fd > first {
            close_range(first, fd - 1);
        }
        first = fd + 1;
    }
    close_range(first, libc::c_uint::MAX);
}

fn close_range(first: libc::c_uint, last: libc::c_uint) {
    // SAFETY: the process is a fresh fork that uses no other descriptors and ends without dropping any.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}
