//! Finding the tasks of a tree, and stopping each.
//!
//! A thread that waits for a child of vfork(2) sleeps where no stop is reached until that child has executed a program or
//! ended (kernel/fork.c, wait_for_vfork_done: killable only). So the child must not be stopped before its parent is: it is let
//! go for that long, and found again afterwards. Where that is not allowed, because the container was found frozen, the
//! dump fails with both named. Both freezers count such a parent as frozen.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::FreezeError;
use super::held::{Held, Progress};
use super::{StoppedProcess, StoppedThread};
use crate::agent::inject::Context;
use crate::dump::{DumpOptions, relations};
use crate::error::Refusal;
use crate::fault::{DumpStep, Interrupted};
use crate::procfs::{self, Ids, Stat};
use crate::sys::{HostPid, kcmp};
use crate::tree::TaskRef;

/// How long a thread may take to its stop before it is asked whether it waits for a child.
const PATIENCE: Duration = Duration::from_millis(10);
/// How often a stop is looked for at once, before the looks are spaced.
const EAGER_LOOKS: u32 = 64;
/// The pause between two looks then.
const PAUSE: Duration = Duration::from_micros(50);
/// How many stragglers a message names.
const NAMED: usize = 8;

/// A thread that does not come to a stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Straggler {
    /// Its id.
    pub tid: HostPid,
    /// Its name.
    pub comm: String,
    /// Its state letter of proc_pid_stat(5).
    pub state: char,
    /// The kernel function it sleeps in; empty when the kernel does not tell.
    pub wchan: String,
    /// The child that it waits for in vfork(2).
    pub vfork_child: Option<HostPid>,
}

impl fmt::Display for Straggler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {} ({}) does not stop, ", self.tid, self.comm)?;
        match self.vfork_child {
            Some(child) => {
                write!(f, "it waits in vfork(2) for its child {child}, which has neither executed a program nor ended")
            }
            None if self.wchan.is_empty() => write!(f, "its state is {}", self.state),
            None => write!(f, "its state is {} in the kernel's {}", self.state, self.wchan),
        }
    }
}

/// The stragglers, for a message.
pub(super) fn list(stragglers: &[Straggler]) -> String {
    let mut text: Vec<String> = stragglers.iter().take(NAMED).map(ToString::to_string).collect();
    if stragglers.len() > NAMED {
        text.push(format!("and {} more", stragglers.len() - NAMED));
    }
    text.join("; ")
}

struct Found {
    parent: HostPid,
    threads: Vec<HostPid>,
    zombie: Option<Stat>,
}

/// A tree as far as it is known and stopped.
pub(super) struct Walk<'a> {
    root: HostPid,
    pub held: Held,
    deadline: Instant,
    options: &'a DumpOptions,
    found: HashMap<HostPid, Found>,
    /// In the order of finding.
    order: Vec<HostPid>,
}

impl<'a> Walk<'a> {
    pub fn new(root: HostPid, held: Held, deadline: Instant, options: &'a DumpOptions) -> Self {
        Self { root, held, deadline, options, found: HashMap::new(), order: Vec::new() }
    }

    /// Stops the root.
    pub fn begin(&mut self) -> Result<(), FreezeError> {
        let root = self.root;
        let stat = Stat::read(root).map_err(|_| FreezeError::NoProcess { pid: root })?;
        if stat.state == 'Z' && !procfs::has_living_threads(root) {
            return Err(FreezeError::RootIsZombie { pid: root, comm: stat.comm });
        }
        self.stop_process(root, HostPid(stat.parent))?;
        if self.order.is_empty() { Err(FreezeError::NoProcess { pid: root }) } else { Ok(()) }
    }

    /// The processes found so far.
    pub fn processes(&self) -> HashSet<HostPid> {
        self.found.keys().copied().collect()
    }

    /// Looks at every process found so far for new threads and children; tells whether there were any.
    pub fn pass(&mut self) -> Result<bool, FreezeError> {
        let mut news = false;
        let mut index = 0;
        while let Some(&pid) = self.order.get(index) {
            index += 1;
            if self.found[&pid].zombie.is_some() {
                continue;
            }
            news |= self.stop_threads(pid)?;
            // Its threads may all have ended meanwhile.
            let Some(found) = self.found.get(&pid) else { continue };
            let out_of_reach =
                if found.threads.is_empty() { procfs::threads(pid).unwrap_or_default() } else { Vec::new() };
            let mut children = Vec::new();
            for tid in found.threads.iter().chain(&out_of_reach) {
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

    /// Thaws the cgroup and awaits the stops of all threads seized so far.
    pub fn thaw(&mut self) -> Result<(), FreezeError> {
        self.held.thaw()?;
        for pid in self.order.clone() {
            let threads = self.found.get_mut(&pid).map(|found| std::mem::take(&mut found.threads)).unwrap_or_default();
            if threads.is_empty() {
                // The next pass sees to it.
                continue;
            }
            let stopped = self.await_each(pid, threads)?;
            if let Some(found) = self.found.get_mut(&pid) {
                found.threads = stopped;
            }
            self.note_exit(pid);
        }
        Ok(())
    }

    fn stop_process(&mut self, pid: HostPid, parent: HostPid) -> Result<(), FreezeError> {
        let Ok(stat) = Stat::read(pid) else { return Ok(()) };
        // Of a process that lives on without its first thread, that thread alone is a zombie.
        let alive = stat.state != 'Z' || procfs::has_living_threads(pid);
        let zombie = (stat.state == 'Z').then_some(stat);
        self.found.insert(pid, Found { parent, threads: Vec::new(), zombie });
        self.order.push(pid);
        if alive {
            self.stop_threads(pid)?;
        }
        Ok(self.options.step(DumpStep::Stopped)?)
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
                // All its threads are in a job-control stop.
                Ok(_) if self.held.is_frozen() => {}
                _ => self.forget(pid),
            }
        }
    }

    fn forget(&mut self, pid: HostPid) {
        self.found.remove(&pid);
        self.order.retain(|other| *other != pid);
    }

    fn stop_new(&mut self, pid: HostPid, new: &[HostPid]) -> Result<Vec<HostPid>, FreezeError> {
        let mut seized = Vec::with_capacity(new.len());
        for &tid in new {
            if self.held.is_out_of_reach(tid) {
                continue;
            }
            match self.held.seize(tid) {
                Ok(()) => seized.push(tid),
                Err(Errno::ESRCH) => {}
                Err(errno) => {
                    if let Some(error) = explain_refusal(pid, tid, errno) {
                        return Err(error);
                    }
                }
            }
        }
        if self.held.is_frozen() {
            return Ok(seized);
        }
        self.await_each(pid, seized)
    }

    /// Awaits the stops of threads of `pid`; returns those that did not die instead.
    fn await_each(&mut self, pid: HostPid, seized: Vec<HostPid>) -> Result<Vec<HostPid>, FreezeError> {
        let mut stopped = Vec::with_capacity(seized.len());
        for &tid in &seized {
            let start = Instant::now();
            let mut looks = 0;
            loop {
                match self.held.look(tid) {
                    Progress::Stopped => break stopped.push(tid),
                    Progress::Dead => break,
                    Progress::Running => {}
                }
                looks += 1;
                if looks < EAGER_LOOKS {
                    std::thread::yield_now();
                    continue;
                }
                self.options.cancel.check().map_err(Interrupted::from)?;
                let now = Instant::now();
                if now > start + PATIENCE && !self.let_vfork_child_go(pid, tid) && now > self.deadline {
                    return Err(self.stuck(pid, &seized));
                }
                std::thread::sleep(PAUSE);
            }
        }
        Ok(stopped)
    }

    /// If `tid` waits in vfork(2) for a child that is stopped here, lets that go on; tells whether it did.
    fn let_vfork_child_go(&mut self, pid: HostPid, tid: HostPid) -> bool {
        if self.held.found_frozen() {
            return false;
        }
        let Some(child) = self.vfork_child(pid, tid).filter(|child| self.found.contains_key(child)) else {
            return false;
        };
        let threads = self.found.get_mut(&child).map(|found| std::mem::take(&mut found.threads)).unwrap_or_default();
        for tid in threads {
            while self.held.look(tid) == Progress::Running && Instant::now() < self.deadline {
                std::thread::sleep(PAUSE);
            }
            self.held.release(tid);
        }
        self.forget(child);
        true
    }

    /// The child that `tid` waits for in vfork(2): it alone uses its parent's memory.
    fn vfork_child(&self, pid: HostPid, tid: HostPid) -> Option<HostPid> {
        let children = procfs::children(pid, tid).unwrap_or_default();
        let shares =
            |child: &HostPid| kcmp::compare(kcmp::Kind::Vm, (pid, 0), (*child, 0)).is_ok_and(|order| order.is_eq());
        children.into_iter().find(|child| Stat::read(tid).is_ok_and(|stat| stat.state == 'D') && shares(child))
    }

    fn stuck(&mut self, pid: HostPid, threads: &[HostPid]) -> FreezeError {
        let mut stragglers = Vec::new();
        for &tid in threads {
            if self.held.look(tid) != Progress::Running {
                continue;
            }
            let Ok(stat) = Stat::read(tid) else { continue };
            let wchan = std::fs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
            stragglers.push(Straggler {
                tid,
                comm: stat.comm,
                state: stat.state,
                wchan: if wchan == "0" { String::new() } else { wchan },
                vfork_child: self.vfork_child(pid, tid),
            });
        }
        FreezeError::Stuck { root: self.root, stragglers }
    }

    /// The stopped tree, parents before their children.
    pub fn finish(mut self) -> Result<(Vec<StoppedProcess>, Held), FreezeError> {
        self.sort();
        let mut processes = Vec::with_capacity(self.order.len());
        let mut without_leader = Vec::new();
        for &pid in &self.order {
            let Some(found) = self.found.remove(&pid) else { continue };
            if found.zombie.is_some() && !found.threads.is_empty() {
                without_leader.extend(refuse_without_leader(pid));
            }
            let Some(stat) = found.zombie.or_else(|| Stat::read(pid).ok()) else { continue };
            let mut threads = Vec::with_capacity(found.threads.len());
            for tid in found.threads {
                threads.push(StoppedThread { tid, stop: self.held.stop_of(tid), context: Context::collect(tid)? });
            }
            threads.sort_by_key(|thread| thread.tid != pid);
            processes.push(StoppedProcess { pid, parent: found.parent, stat, threads });
        }
        super::refuse(without_leader)?;
        Ok((processes, self.held))
    }

    /// Puts parents before their children, as they are unless a child of vfork(2) was found again.
    fn sort(&mut self) {
        let mut sorted = Vec::with_capacity(self.order.len());
        let mut placed = HashSet::with_capacity(self.order.len());
        while sorted.len() < self.order.len() {
            let before = sorted.len();
            for &pid in &self.order {
                let parent = self.found[&pid].parent;
                if !placed.contains(&pid) && (placed.contains(&parent) || !self.found.contains_key(&parent)) {
                    placed.insert(pid);
                    sorted.push(pid);
                }
            }
            if sorted.len() == before {
                break;
            }
        }
        self.order = sorted;
    }
}

/// The refusal of a process whose first thread has ended while others stand in their stops.
fn refuse_without_leader(pid: HostPid) -> Option<Refusal> {
    let task = TaskRef::open(pid, Ids::read(pid).ok()?.innermost(), Stat::read(pid).ok()?.comm).ok()?;
    Some(relations::without_leader(&task))
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
