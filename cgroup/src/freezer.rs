//! Freezing a container's cgroup, and giving it back as it was found.
//!
//! What the two freezers do (Linux 6.18, measured here; cgroups(7), Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst
//! and cgroup-v2.rst):
//!
//! | | v1 `freezer.state` | v2 `cgroup.freeze` (Linux 5.2) |
//! | --- | --- | --- |
//! | asked by writing | `FROZEN`, again while `FREEZING` | `1`, once |
//! | answered by | `freezer.state` reads `FROZEN`; nothing to poll(2) | `frozen 1` in `cgroup.events`; poll(2) wakes |
//! | asked for here / above | `freezer.self_freezing`, `freezer.parent_freezing` | `cgroup.freeze` here / in an ancestor |
//! | SIGKILL to a frozen task | waits until it is thawed | kills it |
//! | `PTRACE_SEIZE`, `PTRACE_INTERRUPT` of a frozen task | accepted, but the stop is reached only after the thaw | the stop is reached |
//! | system calls run inside a stopped tracee | only after the thaw | only after the thaw |
//! | freezing tasks already in a ptrace stop | they count as frozen | they count as frozen |
//!
//! The last lines make one order right for both: freeze, seize and interrupt every task, thaw, wait for the stops. Between
//! the thaw and the stop a task executes no instruction of its own, since both are left through the signal path.
//! And since a stopped tracee counts as frozen, [`Frozen::refreeze`] before the detach leaves no gap either.
//!
//! The freezers of the two designs are independent: a task runs only when no cgroup of either, and no ancestor of those,
//! is frozen. What was frozen before is therefore looked up in both, and put back.
//!
//! | module | what it owns |
//! | --- | --- |
//! | `control` | the control files: asking, waiting for the kernel's word |
//! | `choice` | which cgroup to freeze, and which must not be |
//! | `guard` | the frozen state as a value |
//! | `rescue` | a process that gives the cgroup back when ferry is killed |
//! | `blockers` | the tasks that keep a freeze from completing |

mod blockers;
mod choice;
mod control;
mod guard;
mod rescue;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use blockers::Blocker;
pub use choice::{Freezer, Unfit};
pub use control::State;
pub use guard::Frozen;

use crate::directory::Cgroup;
use crate::hierarchy::{HierarchyError, Version};

/// Why a cgroup was not frozen, thawed or given back.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The hierarchies could not be read.
    #[error(transparent)]
    Hierarchy(#[from] HierarchyError),
    /// The path is no cgroup with a freezer.
    #[error(
        "there is no cgroup {path} with a freezer: looked for {looked_for:?}; give the cgroup's directory, or its path in the \
         v1 freezer hierarchy or in cgroup v2"
    )]
    NotFound {
        /// The path as given.
        path: String,
        /// The directories that do not exist.
        looked_for: Vec<PathBuf>,
    },
    /// A path names a populated cgroup in both designs.
    #[error("the path {path} names cgroups with tasks in both designs: {candidates:?}; give one directory")]
    Ambiguous {
        /// The path as given.
        path: String,
        /// The directories.
        candidates: Vec<PathBuf>,
    },
    /// Freezing this cgroup would stop something else too.
    #[error("the cgroup {} cannot be frozen: {reason}", .cgroup.display())]
    Unfit {
        /// Its directory.
        cgroup: PathBuf,
        /// Why not.
        reason: Unfit,
    },
    /// No cgroup of the container is its own.
    #[error("none of the container's cgroups can be frozen: {}", list_unfit(.candidates))]
    NoneFits {
        /// Every candidate, and why not.
        candidates: Vec<(PathBuf, Unfit)>,
    },
    /// The kernel did not report the cgroup frozen in time. It was thawed again.
    #[error(
        "the cgroup {} did not freeze within {:.1} s (the kernel says {state:?}). Tasks that are not, or may not be, frozen: {}",
        .cgroup.display(), .timeout.as_secs_f64(), blockers::list(.blockers)
    )]
    Timeout {
        /// Its directory.
        cgroup: PathBuf,
        /// The time it was given.
        timeout: Duration,
        /// What the kernel last said.
        state: State,
        /// The tasks that keep it from freezing, surest first.
        blockers: Vec<Blocker>,
    },
    /// The tasks are held by a frozen cgroup that other tasks are in too, so it cannot be thawed for them alone.
    #[error(
        "the cgroup {} is frozen too and also holds processes that are not part of this container ({foreign:?}): thaw it first",
        .cgroup.display()
    )]
    HeldElsewhere {
        /// The frozen cgroup's directory.
        cgroup: PathBuf,
        /// The first of the other processes.
        foreign: Vec<i32>,
    },
    /// The process that would thaw the cgroup if this one is killed could not be started. Nothing was frozen.
    #[error("cannot start the process that thaws the cgroup {} if this one is killed", .cgroup.display())]
    Rescue {
        /// Its directory.
        cgroup: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A control file could not be read or written.
    #[error("cannot {action} {}", .file.display())]
    Control {
        /// `read`, `write "FROZEN" to` …
        action: String,
        /// The file or directory.
        file: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Whether a cgroup itself, not one above it, was asked to freeze.
pub(crate) fn is_asked_to_freeze(cgroup: &Cgroup) -> Result<bool, FreezeError> {
    control::asked_to_freeze(cgroup)
}

/// What is written to `freezer.state` or `cgroup.freeze`.
pub(crate) fn control_text(version: Version, freeze: bool) -> &'static str {
    control::wish_text(version, if freeze { control::Wish::Freeze } else { control::Wish::Thaw })
}

fn list_unfit(candidates: &[(PathBuf, Unfit)]) -> String {
    if candidates.is_empty() {
        return "it is in no hierarchy that can freeze".to_owned();
    }
    let lines: Vec<String> =
        candidates.iter().map(|(directory, reason)| format!("{}: {reason}", directory.display())).collect();
    lines.join("; ")
}
