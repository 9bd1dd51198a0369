//! Why a restore failed.

use nix::errno::Errno;

use crate::agent::AgentError;
use crate::fault::Interrupted;
use crate::files::RestoreFilesError;
use crate::images::SourceError;
use crate::memory::fill::FillError;
use crate::memory::images::PageImagesError;
use crate::namespaces::{PlanNamespacesError, RestoreNamespacesError};
use crate::sys::{HostPid, NsPid};
use crate::task::TaskError;

/// Why a restore failed. Nothing of it is left then, but for what a failed undo names.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum RestoreError {
    /// The images are missing, damaged or not accepted.
    #[error(transparent)]
    Images(#[from] SourceError),
    /// An image that must be there is not.
    #[error("image {name} is missing: the set is incomplete, or not an image set at all")]
    Missing { name: String },
    /// The images hold memory only.
    #[error("the images are of a pre-dump, and hold memory only: restore those of the dump that was made after it")]
    PreDump,
    /// An image contradicts itself or another.
    #[error("image {name}: {problem}")]
    Inconsistent { name: String, problem: String },
    /// Things stand in the way; found before anything was made.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Obstacles(Vec<Obstacle>),
    /// A pid was taken between the check and the clone, or cannot be had.
    #[error("cannot create a task with pid {pid}: {}", pid_problem(*.errno))]
    Clone { pid: NsPid, errno: Errno },
    /// An agent failed.
    #[error("pid {pid} ({comm}): {source}")]
    Agent { pid: NsPid, comm: String, source: AgentError },
    /// A task refused a step.
    #[error("pid {pid} ({comm}): {object}: cannot {step}: {errno}")]
    Step { pid: NsPid, comm: String, object: String, step: &'static str, errno: Errno },
    /// Part of a task's state could not be set.
    #[error("pid {pid} ({comm}): {source}")]
    Task { pid: NsPid, comm: String, source: TaskError },
    /// Memory could not be filled.
    #[error("pid {pid} ({comm}): {source}")]
    Fill { pid: NsPid, comm: String, source: FillError },
    /// Descriptors or files.
    #[error(transparent)]
    Files(#[from] RestoreFilesError),
    /// Images of namespaces.
    #[error(transparent)]
    NamespaceImages(#[from] PlanNamespacesError),
    /// Namespaces or what is in them.
    #[error(transparent)]
    Namespaces(#[from] RestoreNamespacesError),
    /// Cgroups could not be made, or tasks not be put into them.
    #[error(transparent)]
    Cgroups(#[from] ferry_cgroup::RestoreError),
    /// ptrace(2) refused.
    #[error("pid {pid}: cannot {step}: {errno}")]
    Trace { pid: HostPid, step: &'static str, errno: Errno },
    /// Ferry itself could not do something.
    #[error("cannot {step}: {errno}")]
    Own { step: &'static str, errno: Errno },
    /// The daemon that brings pages.
    #[error(
        "the daemon that brings lazy pages ({}) is gone: {problem}; start one with `lazy-pages` for these images",
        crate::lazy::handshake::SOCKET
    )]
    Lazy { problem: String },
    /// It was given up.
    #[error("the restore was given up: {0}; nothing of it is left")]
    Interrupted(Interrupted),
    /// The caller's own work failed.
    #[error("{what}: {problem}")]
    Caller { what: &'static str, problem: String },
}

impl From<PageImagesError> for RestoreError {
    fn from(error: PageImagesError) -> Self {
        match error {
            PageImagesError::Images(source) => Self::Images(source),
            PageImagesError::Inconsistent { name, problem } => Self::Inconsistent { name, problem },
        }
    }
}

impl RestoreError {
    /// Memory of a task that could not be filled, unless nobody wants it any more.
    pub(super) fn fill(pid: NsPid, comm: &str, source: FillError) -> Self {
        match source {
            FillError::Cancelled(cancelled) => Self::Interrupted(cancelled.into()),
            source => Self::Fill { pid, comm: comm.to_owned(), source },
        }
    }

    /// Whether what failed is that another task has a pid of the tree.
    pub fn is_pid_taken(&self) -> bool {
        match self {
            Self::Clone { errno, .. } => *errno == Errno::EEXIST,
            Self::Obstacles(obstacles) => obstacles.iter().any(|obstacle| obstacle.pid_taken),
            _ => false,
        }
    }
}

fn pid_problem(errno: Errno) -> String {
    match errno {
        Errno::EEXIST => "a task, group or session of this machine has that number; restore when it is gone, \
                          or into a pid namespace"
            .into(),
        Errno::EPERM => "permission denied; choosing pids needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN".into(),
        other => other.to_string(),
    }
}

/// One thing that stands in a restore's way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// The process, as the images number it.
    pub pid: NsPid,
    /// Its name.
    pub comm: String,
    /// What is wrong, and what to do.
    pub problem: String,
    /// Whether it is that another task has the pid.
    pub pid_taken: bool,
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pid {} ({}): {}", self.pid, self.comm, self.problem)
    }
}
