//! A second process that holds the userfaultfds of a tree while pages are brought to it, and ends the tree if nobody brings them any more.
//!
//! When the last descriptor of a userfaultfd is closed, the kernel fills what is missing with zeros, and the program goes on with
//! them. This process has every descriptor too, so nothing goes on when the one that brings pages dies. Without a word from that one
//! (its end of the socket closes) it kills the processes that were restored and what descends from them, and only then closes.
//!
//! It has a session of its own and takes no signal but SIGKILL: what ends the daemon's process group does not meet it. A child that left
//! the tree (its parent ended) while it still missed pages is not found; it is not given zeros either: it waits, and so does this process.
#![allow(unsafe_code, reason = "fork(2); it says why it is sound")]

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use ferry_engine::lazy::serve::Holder;
use ferry_engine::memory::layout::ADDRESS_END;
use ferry_engine::sys::{HostPid, PAGE_SIZE, pidfd, userfaultfd};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, setsid};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::janitor::end_trees;

const HOLD: u8 = 0;
const RELEASE: u8 = 1;
const DONE: u8 = 2;
/// What is said, the number of a descriptor, and the pid of its process or 0.
const MESSAGE: usize = 13;

/// The daemon's side. Dropped without [`Self::dismiss`], the tree is ended.
#[derive(Debug)]
pub struct Watch {
    socket: OwnedFd,
    process: Pid,
}

impl Watch {
    /// Starts the process.
    ///
    /// # Errors
    /// There can be none.
    pub fn begin() -> io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // SAFETY: this command has one thread, so the child may do whatever this process may.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self { socket: ours, process: child }),
            ForkResult::Child => {
                drop(ours);
                let _ = setsid();
                let _ = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None);
                watch(&theirs);
                // SAFETY: ends this process without running what the other would run at its exit.
                unsafe { libc::_exit(0) }
            }
        }
    }

    /// All pages are there: nobody is to be ended.
    pub fn dismiss(self) {
        // If it is gone there is nothing to prevent.
        let _ = self.say(DONE, 0, None, &[]);
        drop(self.socket);
        let _ = waitpid(self.process, None);
    }

    fn say(&self, what: u8, number: u64, process: Option<HostPid>, with: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut message = [what; MESSAGE];
        message[1..9].copy_from_slice(&number.to_ne_bytes());
        message[9..].copy_from_slice(&process.map_or(0, |process| process.0).to_ne_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !with.is_empty() && !control.push(SendAncillaryMessage::ScmRights(with)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        sendmsg(&self.socket, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

impl Holder for Watch {
    fn hold(&mut self, number: u64, process: Option<HostPid>, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        match process.map(|pid| (pid, pidfd::open(pid))) {
            Some((pid, Ok(task))) => self.say(HOLD, number, Some(pid), &[descriptor, task.as_fd()]),
            _ => self.say(HOLD, number, None, &[descriptor]),
        }
    }

    fn release(&mut self, number: u64) -> io::Result<()> {
        self.say(RELEASE, number, None, &[])
    }
}

/// The life of the second process.
fn watch(socket: &OwnedFd) {
    let mut held: HashMap<u64, OwnedFd> = HashMap::new();
    let mut processes: Vec<(HostPid, OwnedFd)> = Vec::new();
    loop {
        let mut message = [0; MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(socket, &mut [IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC);
        match received {
            Ok(received) if received.bytes == MESSAGE => {}
            Err(rustix::io::Errno::INTR) => continue,
            _ => break,
        }
        let mut with = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let [what, numbers @ ..] = message;
        let (mut number, mut pid) = ([0; 8], [0; 4]);
        number.copy_from_slice(&numbers[..8]);
        pid.copy_from_slice(&numbers[8..]);
        let (number, pid) = (u64::from_ne_bytes(number), HostPid(i32::from_ne_bytes(pid)));
        match what {
            HOLD => {
                held.extend(with.next().map(|descriptor| (number, descriptor)));
                processes.extend(with.next().map(|task| (pid, task)));
            }
            RELEASE => drop(held.remove(&number)),
            _ => return,
        }
    }
    if held.is_empty() {
        return;
    }
    end_trees(processes);
    while held.values().any(is_used) {
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Whether a process still has the memory that a userfaultfd is of. At the top of the address space nobody has anything.
fn is_used(descriptor: &OwnedFd) -> bool {
    userfaultfd::place_zeros(descriptor, ADDRESS_END - PAGE_SIZE) != Err(Errno::ESRCH)
}
