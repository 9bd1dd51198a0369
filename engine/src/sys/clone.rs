//! clone3(2) of a task that starts in an agent's runner.
#![allow(unsafe_code)]

use std::os::fd::RawFd;

use nix::errno::Errno;

use super::{HostPid, RemoteAddr};
use crate::agent::arch;

/// Start the child in the cgroup2 directory given (Linux 5.7).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Start the child with the default actions of signals that have a handler here (Linux 5.5).
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// `struct clone_args` of clone3(2), as Linux 5.7 has it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
pub struct CloneArguments {
    /// `CLONE_*` flags.
    pub flags: u64,
    /// Where to put a descriptor of the child (`CLONE_PIDFD`).
    pub pidfd: u64,
    /// Where to put the child's id in its own memory.
    pub child_tid: u64,
    /// Where to put the child's id in the parent's memory.
    pub parent_tid: u64,
    /// What the parent is sent when the child ends; 0 for threads.
    pub exit_signal: u64,
    /// Lowest byte of the child's stack.
    pub stack: u64,
    /// Size of the child's stack.
    pub stack_size: u64,
    /// The child's TLS pointer.
    pub tls: u64,
    /// Address of the ids wanted, innermost namespace first (`CAP_CHECKPOINT_RESTORE`).
    pub set_tid: u64,
    /// How many ids.
    pub set_tid_size: u64,
    /// A cgroup2 directory to start in (`CLONE_INTO_CGROUP`).
    pub cgroup: u64,
}

impl CloneArguments {
    /// The structure as a task reads it from its memory.
    pub fn to_bytes(self) -> Vec<u8> {
        let words = [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
            self.cgroup,
        ];
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }
}

/// What the first task of a tree is cloned with.
#[derive(Clone, Copy, Debug, Default)]
pub struct FirstTask<'a> {
    /// `CLONE_NEW*` and `CLONE_PARENT`; never `CLONE_VM` nor `CLONE_FILES`.
    pub flags: u64,
    /// The ids wanted, innermost namespace first; empty to let the kernel choose.
    pub set_tid: &'a [i32],
    /// A cgroup2 directory to start in.
    pub cgroup: Option<RawFd>,
}

/// Clones this process into a task that runs nothing but the runner, at `code`, with its slot at
/// `slot`.
///
/// The area of both must be mapped shared at the address that they name, so that the child inherits it.
pub fn clone_into_runner(task: FirstTask<'_>, code: RemoteAddr, slot: RemoteAddr) -> nix::Result<HostPid> {
    let forbidden = (libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_THREAD) as u64;
    if task.flags & forbidden != 0 {
        return Err(Errno::EINVAL);
    }
    let arguments = CloneArguments {
        flags: task.flags | CLONE_CLEAR_SIGHAND | if task.cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 },
        // A child of our parent inherits our own exit signal (clone3(2), CLONE_PARENT).
        exit_signal: if task.flags & libc::CLONE_PARENT as u64 == 0 { libc::SIGCHLD as u64 } else { 0 },
        set_tid: if task.set_tid.is_empty() { 0 } else { task.set_tid.as_ptr() as u64 },
        set_tid_size: task.set_tid.len() as u64,
        cgroup: task.cgroup.unwrap_or(0) as u64,
        ..CloneArguments::default()
    };
    // SAFETY: without CLONE_VM the child has a copy of our memory and never returns here: it enters the runner,
    // which uses no stack and only the shared slot.
    let result = unsafe { arch::clone_into_runner(&raw const arguments, code.0, slot.0) };
    if result < 0 { Err(Errno::from_raw(-result as i32)) } else { Ok(HostPid(result as i32)) }
}
