//! Stopping a process tree, and letting it go again.
//!
//! Every thread is seized and interrupted (ptrace(2)), process by process from the root down. A process whose threads
//! are all stopped makes no more children, so its list of children is final, but for orphans that it may still adopt
//! from tasks that run; hence the walk is repeated until it finds nothing new.
//!
//! With a cgroup, that is frozen first, so that a tree that makes tasks faster than they can be stopped stands still: freeze,
//! seize and interrupt every task, thaw, await the stops (see [`ferry_cgroup::freezer`] for why in this order).
//!
//! Whatever happens, the tasks run on: dropping the tree detaches from every thread, and the kernel does the same if
//! ferry dies. A cgroup that was found frozen is frozen again before the detach, so that nothing in it runs meanwhile.
//!
//! | module | what it owns |
//! | --- | --- |
//! | `walk` | finding and stopping the tasks of a tree |
//! | `held` | what is seized and frozen at a time, and letting it go |
//! | `outsiders` | processes beside the tree that are in its cgroup or its pid namespace |

mod held;
mod outsiders;
mod walk;

use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::agent::AgentError;
use crate::agent::inject::Context;
use crate::dump::DumpOptions;
use crate::error::Refusals;
use crate::fault::Interrupted;
use crate::procfs::Stat;
use crate::sys::HostPid;
use crate::sys::ptrace::Stop;

use held::Held;
pub(crate) use outsiders::Surroundings;
pub use walk::Straggler;
use walk::Walk;

/// Why a tree could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// There is no such process.
    #[error("there is no process {pid}")]
    NoProcess {
        /// The root asked for.
        pid: HostPid,
    },
    /// The root has exited and waits to be reaped.
    #[error("process {pid} ({comm}) has exited already: it is a zombie")]
    RootIsZombie {
        /// The root asked for.
        pid: HostPid,
        /// Its name.
        comm: String,
    },
    /// A debugger or another dump has it.
    #[error("process {pid} ({comm}) is traced by process {tracer}: end that debugger or dump first")]
    Traced {
        /// The traced process.
        pid: HostPid,
        /// Its name.
        comm: String,
        /// The one that traces it.
        tracer: i32,
    },
    /// The kernel refuses to trace it.
    #[error("process {pid} ({comm}) cannot be traced: {errno}: run ferry as root, or with CAP_SYS_PTRACE")]
    NotPermitted {
        /// The process.
        pid: HostPid,
        /// Its name.
        comm: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// Some threads do not come to a stop.
    #[error("process {root} cannot be stopped: {}", walk::list(.stragglers))]
    Stuck {
        /// The root.
        root: HostPid,
        /// The threads.
        stragglers: Vec<Straggler>,
    },
    /// Processes that are not of the tree are in its cgroup or pid namespace, or it has a process that cannot be saved.
    #[error("{refusals}")]
    Refused {
        /// One for each.
        refusals: Refusals,
    },
    /// New tasks appear faster than they can be stopped.
    #[error("after {after:?}, process {root} still makes new tasks; {stopped} are stopped: give a cgroup to freeze")]
    Unstable {
        /// The root.
        root: HostPid,
        /// How long it was tried.
        after: Duration,
        /// How many processes were stopped.
        stopped: usize,
    },
    /// The cgroup could not be frozen or given back.
    #[error(transparent)]
    Cgroup(#[from] ferry_cgroup::FreezeError),
    /// It was given up.
    #[error("stopping the processes was given up: {0}; they run on as before")]
    Interrupted(#[from] Interrupted),
    /// A stopped thread did not give its registers.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// A thread in a ptrace stop.
pub struct StoppedThread {
    /// Its id.
    pub tid: HostPid,
    /// How it was found.
    pub stop: Stop,
    /// What it was about to do.
    pub context: Context,
}

/// A process of a stopped tree.
pub struct StoppedProcess {
    /// Its id.
    pub pid: HostPid,
    /// The parent's, as ferry numbers it; for the root it may lie outside the tree.
    pub parent: HostPid,
    /// `/proc/PID/stat`, read when it was stopped.
    pub stat: Stat,
    /// Its threads, the leader first; none for a zombie.
    pub threads: Vec<StoppedThread>,
}

impl StoppedProcess {
    /// Whether it has exited and waits for its parent.
    pub fn is_zombie(&self) -> bool {
        self.threads.is_empty()
    }
}

/// A tree whose every task is stopped; parents come before their children. Dropping it lets all go on.
pub struct StoppedTree {
    /// The processes, the root first.
    pub processes: Vec<StoppedProcess>,
    held: Held,
}

impl StoppedTree {
    /// Stops the tree below `root`, and `freezer`'s cgroup meanwhile if there is one. `surroundings` are what was seen
    /// before: processes beside the tree that have come since make it fail.
    ///
    /// On an error everything that was stopped runs on, and the cgroup is as it was found.
    pub(crate) fn stop(root: HostPid, options: &DumpOptions, surroundings: &Surroundings) -> Result<Self, FreezeError> {
        let (freezer, timeout) = (options.freezer.as_ref(), options.freeze_deadline);
        let held = Held::freeze(freezer, timeout)?;
        let deadline = Instant::now() + timeout;
        let mut walk = Walk::new(root, held, deadline, options);
        walk.begin()?;
        if walk.held.is_frozen() {
            while walk.pass()? {}
            // What the thaw would set running must all be seized.
            refuse(surroundings.newcomers(&walk.processes(), freezer))?;
            walk.thaw()?;
        }
        while walk.pass()? {
            if Instant::now() > deadline {
                return Err(FreezeError::Unstable { root, after: timeout, stopped: walk.processes().len() });
            }
        }
        refuse(surroundings.newcomers(&walk.processes(), freezer))?;
        let (processes, held) = walk.finish()?;
        Ok(Self { processes, held })
    }

    /// The root process.
    pub fn root(&self) -> &StoppedProcess {
        &self.processes[0]
    }

    /// The cgroup that was frozen, if one was given.
    pub fn frozen(&self) -> Option<&ferry_cgroup::Frozen> {
        self.held.cgroup()
    }

    /// Lets every thread go on; those in a job-control stop return to it.
    pub fn release(self) {
        drop(self);
    }

    /// To be called when every process has been killed and has ended: their cgroup is left thawed, even if it was found
    /// frozen, since what comes to live in it next shall run.
    pub(crate) fn ended(mut self) {
        self.held.ended();
    }
}

fn refuse(refusals: Vec<crate::error::Refusal>) -> Result<(), FreezeError> {
    if refusals.is_empty() { Ok(()) } else { Err(FreezeError::Refused { refusals: Refusals(refusals) }) }
}
