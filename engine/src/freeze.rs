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
//! ferry dies.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use ferry_cgroup::{Freezer, Frozen};
use nix::errno::Errno;

use crate::agent::AgentError;
use crate::agent::inject::Context;
use crate::fault::Interrupted;
use crate::procfs::{self, Stat};
use crate::sys::HostPid;
use crate::sys::ptrace::{self, Stop};

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
    /// The cgroup, if one was given; thawed while the tasks are in ptrace stops.
    frozen: Option<Frozen>,
    deadline: Duration,
}

impl StoppedTree {
    /// Stops the tree below `root`, and `freezer`'s cgroup meanwhile if there is one.
    ///
    /// On an error everything that was stopped runs on, and the cgroup is as it was found.
    ///
    /// `pass` is called when a process has been stopped, and may give up.
    pub fn stop(
        root: HostPid,
        freezer: Option<&Freezer>,
        deadline: Duration,
        pass: &dyn Fn() -> Result<(), Interrupted>,
    ) -> Result<Self, FreezeError> {
        let start = Instant::now();
        // Whatever else is in the cgroup is found out by the caller, who knows what to say of it.
        let mut frozen = freezer.map(|freezer| freezer.freeze(|_| true, deadline)).transpose()?;
        let mut walk = Walk {
            seized: Seized::default(),
            found: HashMap::new(),
            order: Vec::new(),
            frozen: frozen.is_some(),
            pass,
        };
        let stat = Stat::read(root).map_err(|_| FreezeError::NoProcess { pid: root })?;
        if stat.state == 'Z' {
            return Err(FreezeError::RootIsZombie { pid: root, comm: stat.comm });
        }
        walk.stop_process(root, HostPid(stat.parent))?;
        if walk.order.is_empty() {
            return Err(FreezeError::NoProcess { pid: root });
        }
        if let Some(frozen) = &mut frozen {
            while walk.pass()? {}
            frozen.thaw_for_ptrace()?;
            walk.frozen = false;
            walk.await_stops();
        }
        while walk.pass()? {
            if start.elapsed() > deadline {
                let stopped = walk.order.len();
                return Err(FreezeError::Unstable { root, after: deadline, stopped });
            }
        }
        let processes = walk.finish()?;
        Ok(Self { processes, frozen, deadline })
    }

    /// The root process.
    pub fn root(&self) -> &StoppedProcess {
        &self.processes[0]
    }

    /// The cgroup that was frozen, if one was given.
    pub fn frozen(&self) -> Option<&Frozen> {
        self.frozen.as_ref()
    }

    /// Lets every thread go on; those in a job-control stop return to it.
    pub fn release(self) {
        drop(self);
    }
}

impl Drop for StoppedTree {
    fn drop(&mut self) {
        // A tree that was found frozen must not run between the detach and the return of its cgroup's state.
        if let Some(frozen) = self.frozen.as_mut().filter(|frozen| frozen.was_frozen())
            && let Err(error) = frozen.refreeze(self.deadline)
        {
            tracing::warn!("the cgroup was found frozen, but runs for a moment: {error}");
        }
        for thread in self.processes.iter().flat_map(|process| &process.threads) {
            // A thread that died meanwhile needs no detaching.
            let _ = ptrace::detach(thread.tid, 0);
        }
    }
}

/// Threads that are seized, until a [`StoppedTree`] takes them over.
#[derive(Default)]
struct Seized {
    stops: HashMap<HostPid, Stop>,
    owned: bool,
}

impl Drop for Seized {
    fn drop(&mut self) {
        if !self.owned {
            for tid in self.stops.keys() {
                let _ = ptrace::detach(*tid, 0);
            }
        }
    }
}

struct Found {
    parent: HostPid,
    threads: Vec<HostPid>,
    zombie: Option<Stat>,
}

struct Walk<'a> {
    /// Called when a process has been stopped.
    pass: &'a dyn Fn() -> Result<(), Interrupted>,
    /// Whether the tasks are frozen, so that their stops must not be awaited yet.
    frozen: bool,
    seized: Seized,
    found: HashMap<HostPid, Found>,
    order: Vec<HostPid>,
}

impl Walk<'_> {
    /// Looks at every process found so far for new threads and children; tells whether there were any.
    fn pass(&mut self) -> Result<bool, FreezeError> {
        let mut news = false;
        let mut index = 0;
        while let Some(&pid) = self.order.get(index) {
            index += 1;
            if self.found[&pid].zombie.is_some() {
                continue;
            }
            news |= self.stop_threads(pid)?;
            let mut children = Vec::new();
            for tid in &self.found[&pid].threads {
                children.extend(procfs::children(pid, *tid).unwrap_or_default());
            }
            for child in children {
                if !self.found.contains_key(&child) {
                    self.stop_process(child, pid)?;
                    news |= self.found.contains_key(&child);
                }
            }
        }
        Ok(news)
    }

    fn stop_process(&mut self, pid: HostPid, parent: HostPid) -> Result<(), FreezeError> {
        let Ok(stat) = Stat::read(pid) else { return Ok(()) };
        let zombie = (stat.state == 'Z').then_some(stat);
        let alive = zombie.is_none();
        self.found.insert(pid, Found { parent, threads: Vec::new(), zombie });
        self.order.push(pid);
        if alive {
            self.stop_threads(pid)?;
        }
        Ok((self.pass)()?)
    }

    /// Stops threads of `pid` until no new one appears; tells whether there was any.
    fn stop_threads(&mut self, pid: HostPid) -> Result<bool, FreezeError> {
        let mut news = false;
        loop {
            let known: HashSet<HostPid> = self.found[&pid].threads.iter().copied().collect();
            let listed = procfs::threads(pid).unwrap_or_default();
            let new: Vec<HostPid> = listed.into_iter().filter(|tid| !known.contains(tid)).collect();
            if new.is_empty() {
                break;
            }
            let stopped = self.stop_new(pid, &new)?;
            if stopped.is_empty() {
                // Only threads that are exiting; and if even the leader is, the process has become a zombie.
                self.note_exit(pid);
                break;
            }
            news = true;
            if let Some(found) = self.found.get_mut(&pid) {
                found.threads.extend(stopped);
            }
        }
        Ok(news)
    }

    fn note_exit(&mut self, pid: HostPid) {
        let Some(found) = self.found.get_mut(&pid) else { return };
        if found.threads.is_empty() && found.zombie.is_none() {
            match Stat::read(pid) {
                Ok(stat) if stat.state == 'Z' => found.zombie = Some(stat),
                _ => {
                    self.found.remove(&pid);
                    self.order.retain(|other| *other != pid);
                }
            }
        }
    }

    fn stop_new(&mut self, pid: HostPid, new: &[HostPid]) -> Result<Vec<HostPid>, FreezeError> {
        let mut seized = Vec::with_capacity(new.len());
        for &tid in new {
            match seize(tid) {
                Ok(()) => {
                    // From here on the thread is detached on any error.
                    self.seized.stops.insert(tid, Stop::Interrupted);
                    ptrace::interrupt(tid).ok();
                    seized.push(tid);
                }
                Err(Errno::ESRCH) => {}
                Err(errno) => {
                    if let Some(error) = explain_refusal(pid, tid, errno) {
                        return Err(error);
                    }
                }
            }
        }
        if self.frozen {
            return Ok(seized);
        }
        Ok(self.await_each(seized))
    }

    /// Awaits the stops of all threads seized so far, and forgets those that died instead.
    fn await_stops(&mut self) {
        let pids = self.order.clone();
        for pid in pids {
            let threads = self.found.get_mut(&pid).map(|found| std::mem::take(&mut found.threads)).unwrap_or_default();
            let stopped = self.await_each(threads);
            if let Some(found) = self.found.get_mut(&pid) {
                found.threads = stopped;
            }
            self.note_exit(pid);
        }
    }

    fn await_each(&mut self, seized: Vec<HostPid>) -> Vec<HostPid> {
        let mut stopped = Vec::with_capacity(seized.len());
        for tid in seized {
            match ptrace::wait_interrupted(tid) {
                Ok(stop) => {
                    self.seized.stops.insert(tid, stop);
                    stopped.push(tid);
                }
                Err(_) => drop(self.seized.stops.remove(&tid)),
            }
        }
        stopped
    }

    fn finish(mut self) -> Result<Vec<StoppedProcess>, FreezeError> {
        let mut processes = Vec::with_capacity(self.order.len());
        for &pid in &self.order {
            let Some(found) = self.found.remove(&pid) else { continue };
            let Some(stat) = found.zombie.or_else(|| Stat::read(pid).ok()) else { continue };
            let mut threads = Vec::with_capacity(found.threads.len());
            for tid in found.threads {
                let stop = self.seized.stops.get(&tid).copied().unwrap_or(Stop::Interrupted);
                threads.push(StoppedThread { tid, stop, context: Context::collect(tid)? });
            }
            threads.sort_by_key(|thread| thread.tid != pid);
            processes.push(StoppedProcess { pid, parent: found.parent, stat, threads });
        }
        self.seized.owned = true;
        Ok(processes)
    }
}

fn seize(tid: HostPid) -> nix::Result<()> {
    // Filters must not see the agent's calls. Where ferry itself is filtered the option is refused: then try without.
    match ptrace::seize(tid, ptrace::OPTION_SUSPEND_SECCOMP) {
        Err(Errno::EPERM) => ptrace::seize(tid, 0),
        result => result,
    }
}

/// Why a thread could not be seized; none when it is merely on its way out.
fn explain_refusal(pid: HostPid, tid: HostPid, errno: Errno) -> Option<FreezeError> {
    let stat = Stat::read(tid).ok()?;
    if matches!(stat.state, 'Z' | 'X') {
        return None;
    }
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:\t")).and_then(|pid| pid.parse().ok());
    Some(match tracer {
        Some(tracer) if tracer != 0 => FreezeError::Traced { pid, comm: stat.comm, tracer },
        _ => FreezeError::NotPermitted { pid, comm: stat.comm, errno },
    })
}
