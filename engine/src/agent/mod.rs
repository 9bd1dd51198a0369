//! Running system calls inside another task, without a program of ours in it.
//!
//! A *runner*, some 250 bytes of position-independent assembly, walks an array of operations in memory that it
//! shares with ferry, executes each as a system call and writes the result back. What a task shall do is thus
//! ordinary Rust in ferry: a [`Batch`] of calls, run in one round trip however many they are.
//!
//! A dump brings the runner into a stopped task ([`inject`]); a restore starts every task in it
//! ([`crate::sys::clone::clone_into_runner`], [`Batch::clone_call`]).
//!
//! A runner that waits sleeps on a futex that is in ferry's robust list ([`crate::sys::robust`]). When ferry dies, the
//! kernel wakes it, and it returns to the interrupted context (dump) or exits (restore).
#![allow(unsafe_code)] // see `arch` and the robust list's nodes; batches themselves are safe code.

pub mod arch;
mod batch;
pub mod inject;
pub mod landing;
pub(crate) mod recover;
mod slot;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

pub use batch::{Answers, Batch, Call, Out, Pending, Runner};
pub use slot::{NODE, Slot};

use crate::fault::Interrupted;
use crate::sys::robust::RobustList;
use crate::sys::shared::SharedMemory;
use crate::sys::{HostPid, PAGE_SIZE, RemoteAddr};

/// Why an agent could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A step of bringing the runner into a task, or out of it, failed.
    #[error("task {tid}: cannot {step}: {errno}")]
    Inject {
        /// The task.
        tid: HostPid,
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The task may not have memory that is writable and executable, which the runner lies in (Linux 6.3).
    #[error(
        "task {tid}: memory that is writable and executable is forbidden to it (PR_SET_MDWE, or a security module), and \
         ferry works in a task from such memory: start the program without that (in systemd, MemoryDenyWriteExecute=no)"
    )]
    MemoryDenied {
        /// The task.
        tid: HostPid,
    },
    /// The task has no executable memory with a `syscall` instruction.
    #[error("task {tid}: found no system call instruction in its executable memory, not even in the vdso")]
    NoSyscallInstruction {
        /// The task.
        tid: HostPid,
    },
    /// A call that had to succeed did not.
    #[error("task {tid}: {}(call {index} of a batch) failed: {errno}", call_name(*.number))]
    Call {
        /// The task.
        tid: HostPid,
        /// The system call's number.
        number: i64,
        /// Its place in the batch.
        index: usize,
        /// The kernel's answer.
        errno: Errno,
    },
    /// It was given up.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// The batch is larger than the slot.
    #[error("task {tid}: a batch of system calls does not fit its slot")]
    Full {
        /// The task.
        tid: HostPid,
    },
    /// The task died while it worked for ferry.
    #[error("task {tid} died while ferry worked in it")]
    Died {
        /// The task.
        tid: HostPid,
    },
    /// A signal stopped the task while it worked for ferry.
    #[error("task {tid} was stopped by a signal while ferry worked in it")]
    Stopped {
        /// The task.
        tid: HostPid,
    },
    /// The task did not finish a batch in time.
    #[error("task {tid} did not finish a batch of system calls within {after:?}")]
    Late {
        /// The task.
        tid: HostPid,
        /// The deadline.
        after: Duration,
    },
}

/// A name for the calls that people meet in messages; the number for others.
fn call_name(number: i64) -> String {
    macro_rules! names {
        ($($call:ident)*) => { match number { $(n if n == paste_number!($call) => stringify!($call).into(),)* n => format!("system call {n} ") } };
    }
    macro_rules! paste_number {
        (openat) => {
            libc::SYS_openat
        };
        (mmap) => {
            libc::SYS_mmap
        };
        (mremap) => {
            libc::SYS_mremap
        };
        (munmap) => {
            libc::SYS_munmap
        };
        (mprotect) => {
            libc::SYS_mprotect
        };
        (madvise) => {
            libc::SYS_madvise
        };
        (clone3) => {
            libc::SYS_clone3
        };
        (prctl) => {
            libc::SYS_prctl
        };
        (mount) => {
            libc::SYS_mount
        };
        (dup3) => {
            libc::SYS_dup3
        };
        (fcntl) => {
            libc::SYS_fcntl
        };
        (socket) => {
            libc::SYS_socket
        };
        (bind) => {
            libc::SYS_bind
        };
        (setsockopt) => {
            libc::SYS_setsockopt
        };
        (setsid) => {
            libc::SYS_setsid
        };
        (setpgid) => {
            libc::SYS_setpgid
        };
        (unshare) => {
            libc::SYS_unshare
        };
        (setns) => {
            libc::SYS_setns
        };
        (chdir) => {
            libc::SYS_chdir
        };
        (fchdir) => {
            libc::SYS_fchdir
        };
        (chroot) => {
            libc::SYS_chroot
        };
        (pivot_root) => {
            libc::SYS_pivot_root
        };
        (capset) => {
            libc::SYS_capset
        };
        (prlimit64) => {
            libc::SYS_prlimit64
        };
        (seccomp) => {
            libc::SYS_seccomp
        };
        (rt_sigaction) => {
            libc::SYS_rt_sigaction
        };
        (timer_create) => {
            libc::SYS_timer_create
        };
    }
    names!(openat mmap mremap munmap mprotect madvise clone3 prctl mount dup3 fcntl socket bind setsockopt setsid
        setpgid unshare setns chdir fchdir chroot pivot_root capset prlimit64 seccomp rt_sigaction timer_create)
}

/// Shared memory that holds the runner's code and the slots of one or more tasks.
pub struct Area {
    memory: Arc<SharedMemory>,
    remote: RemoteAddr,
    used: usize,
}

impl Area {
    /// Prepares `memory`, which its tasks see at `remote`: the runner's code takes the first page.
    pub fn new(memory: SharedMemory, remote: RemoteAddr) -> Self {
        memory.write(0, arch::runner_code());
        Self { memory: Arc::new(memory), remote, used: PAGE_SIZE as usize }
    }

    /// An area of `len` bytes of `file` at the same address, `at`, in ferry and in every task that it clones from now on.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn inherited(file: impl AsFd, len: usize, at: RemoteAddr) -> nix::Result<Self> {
        Ok(Self::new(SharedMemory::map(file, len, Some(at), true)?, at))
    }

    /// Where tasks see the runner's code.
    pub fn code(&self) -> RemoteAddr {
        self.remote
    }

    /// Where tasks see the area, and its size.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.remote.0..self.remote.0 + self.memory.len() as u64
    }

    /// Takes the next `len` bytes (a multiple of 64) as a slot; none when the area is full.
    pub fn slot(&mut self, len: usize) -> Option<Slot> {
        assert!(len.is_multiple_of(64));
        let offset = self.used;
        let end = offset.checked_add(len).filter(|end| *end <= self.memory.len())?;
        self.used = end;
        Some(Slot::new(self.memory.clone(), offset, len, self.remote.offset(offset as u64)))
    }
}

/// Has the kernel wake the runner of `slot` when this thread dies.
pub fn watch(list: &mut RobustList, slot: &Slot) {
    // SAFETY: the node lies in the slot's header, which only the robust list uses; whoever drops the area drops or
    // clears the list before (`inject::Injected` and the restore's tree own both).
    unsafe { list.add(slot.node()) }
}
