//! Names for the processes of a tree, as the rooms of the engine need them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::error::Refusal;
use crate::sys::{HostPid, NsPid, pidfd};

/// One process that is being looked at: running (preflight) or stopped.
pub struct TaskRef {
    /// Its id here.
    pub pid: HostPid,
    /// Its id in its own namespace, which messages and images use.
    pub ns_pid: NsPid,
    /// Its name.
    pub comm: String,
    pidfd: OwnedFd,
}

impl TaskRef {
    /// Opens the process.
    ///
    /// # Errors
    /// `ESRCH` when it is gone.
    pub fn open(pid: HostPid, ns_pid: NsPid, comm: String) -> nix::Result<Self> {
        Ok(Self { pid, ns_pid, comm, pidfd: pidfd::open(pid)? })
    }

    /// A descriptor of the process.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// A refusal that names this process.
    pub fn refuse(&self, object: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) -> Refusal {
        Refusal {
            pid: self.ns_pid,
            comm: self.comm.clone(),
            object: object.into(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }
}
