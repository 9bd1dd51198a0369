//! The tasks as they come to be, and what undoes them.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::error::RestoreError;
use super::plan::{LEADER_SLOT, THREAD_SLOT};
use super::script::{Object, Results, Script, ScriptError, run};
use crate::agent::{AgentError, Area, Runner, Slot, watch};
use crate::cancel::Cancel;
use crate::fault::{Faults, Point, RestoreStep};
use crate::procfs;
use crate::sys::robust::RobustList;
use crate::sys::{HostPid, NsPid, RemoteAddr, pidfd};

/// A thread that sits in its runner.
pub struct LiveThread {
    /// Its id in the images.
    pub tid: NsPid,
    /// Its id here.
    pub host: HostPid,
    /// Its runner.
    pub runner: Runner,
}

/// A process whose threads sit in runners.
pub struct LiveTask {
    /// Its id in the images.
    pub pid: NsPid,
    /// Its name, for messages.
    pub comm: String,
    /// Its id here.
    pub host: HostPid,
    /// Its leader's runner.
    pub runner: Runner,
    /// Its other threads.
    pub threads: Vec<LiveThread>,
    /// Where the vdso is now.
    pub vdso_at: u64,
    /// The member whose restored memory it has now, its own or an ancestor's; none for what ferry's clone has.
    pub space: Option<usize>,
    /// Whether it exists no more.
    pub ended: bool,
}

impl LiveTask {
    /// The process's threads, leader first.
    pub fn all_threads(&self) -> impl Iterator<Item = (NsPid, HostPid, &Runner)> {
        let leader = std::iter::once((self.pid, self.host, &self.runner));
        leader.chain(self.threads.iter().map(|thread| (thread.tid, thread.host, &thread.runner)))
    }

    /// An agent's error, with this task's name.
    pub fn agent(&self, source: AgentError) -> RestoreError {
        RestoreError::Agent { pid: self.pid, comm: self.comm.clone(), source }
    }

    /// A script's error, with this task's name.
    pub fn script(&self, error: ScriptError) -> RestoreError {
        match error {
            ScriptError::Agent(source) => self.agent(source),
            // The images and the machine disagree over a number.
            ScriptError::Step { object: Object::Task(pid), errno, .. } => RestoreError::Clone { pid, errno },
            ScriptError::Step { step, object, errno } => self.step(step, object.to_string(), errno),
        }
    }

    /// A failed step, with this task's name.
    pub fn step(&self, step: &'static str, object: impl Into<String>, errno: Errno) -> RestoreError {
        RestoreError::Step { pid: self.pid, comm: self.comm.clone(), object: object.into(), step, errno }
    }
}

/// All tasks made so far.
///
/// Dropped before [`Self::release`], it ends them all and waits until they are gone.
pub struct LiveTree {
    /// Ferry's death is the tasks' death. Before `area`, in which its nodes lie.
    list: RobustList,
    area: Area,
    /// Members, then helpers; none while not made.
    tasks: Vec<Option<LiveTask>>,
    /// In the order in which they were made.
    made: Vec<usize>,
    /// The slots of all leaders that were ever to be, also of those that have not been noted.
    slots: Vec<Slot>,
    /// Whether ferry traces all threads.
    traced: bool,
    released: bool,
    faults: Faults,
    cancel: Cancel,
}

impl LiveTree {
    /// For `count` members and helpers, whose runners live in `area`.
    pub fn new(list: RobustList, area: Area, count: usize, faults: Faults, cancel: Cancel) -> Self {
        let tasks = (0..count).map(|_| None).collect();
        let (made, slots) = (Vec::new(), Vec::new());
        Self { list, area, tasks, made, slots, traced: false, released: false, faults, cancel }
    }

    /// Passes a point within a phase, at which the restore may be made to fail, or be given up.
    pub fn step(&self, step: RestoreStep) -> Result<(), RestoreError> {
        super::pass(&self.faults, &self.cancel, Point::RestoreStep(step))
    }

    /// Passes the point after a thread was let go, when it is too late to fail.
    pub fn freed(&self) {
        let _ = self.faults.hit(Point::RestoreStep(RestoreStep::Freed));
    }

    /// Where tasks find the runner's code.
    pub fn code(&self) -> RemoteAddr {
        self.area.code()
    }

    /// A slot for the leader of a process to come. Ferry's death ends it from the first instant of its life.
    pub fn leader_slot(&mut self) -> Result<Slot, RestoreError> {
        let slot = self.slot(LEADER_SLOT)?;
        watch(&mut self.list, &slot);
        self.slots.push(slot.clone());
        Ok(slot)
    }

    /// A slot for another thread, which lives and ends with its process.
    pub fn thread_slot(&mut self) -> Result<Slot, RestoreError> {
        self.slot(THREAD_SLOT)
    }

    fn slot(&mut self, len: usize) -> Result<Slot, RestoreError> {
        let full = RestoreError::Own { step: "find room for another runner", errno: Errno::ENOSPC };
        self.area.slot(len).ok_or(full)
    }

    /// Notes a task that exists now.
    pub fn add(&mut self, place: usize, task: LiveTask) {
        self.tasks[place] = Some(task);
        self.made.push(place);
    }

    /// Notes that ferry has begun to trace threads: it must wait for their ends then.
    pub fn trace(&mut self) {
        self.traced = true;
    }

    /// The task at `place`, which has been made.
    pub fn task(&self, place: usize) -> &LiveTask {
        self.tasks[place].as_ref().expect("tasks are used after they are made")
    }

    /// As [`Self::task`], to change it.
    pub fn task_mut(&mut self, place: usize) -> &mut LiveTask {
        self.tasks[place].as_mut().expect("tasks are used after they are made")
    }

    /// All tasks that live, with their places, parents before children.
    pub fn living(&self) -> impl Iterator<Item = (usize, &LiveTask)> {
        self.made
            .iter()
            .filter_map(|&place| self.tasks[place].as_ref().map(|task| (place, task)))
            .filter(|(_, task)| !task.ended)
    }

    /// Runs scripts in the leaders of tasks, all at once.
    ///
    /// # Errors
    /// Of the first task that failed; when the restore is given up.
    pub fn run(&self, scripts: Vec<(usize, Script)>) -> Result<Vec<Results>, RestoreError> {
        self.step(RestoreStep::Batch)?;
        let places: Vec<usize> = scripts.iter().map(|(place, _)| *place).collect();
        let scripts: Vec<(&Runner, Script)> =
            scripts.into_iter().map(|(place, script)| (&self.task(place).runner, script)).collect();
        run(&scripts).map_err(|(index, error)| self.task(places[index]).script(error))
    }

    /// Lets go of the tasks: they run by themselves now.
    pub fn release(mut self) {
        self.released = true;
        self.list.clear();
    }

    /// Ends every task, the youngest first so that no number is free while it is still to be ended, and waits for all.
    fn end(&self) {
        // Orphans come to ferry and no zombies stay with a reaper that does not look.
        let subreaper = nix::sys::prctl::get_child_subreaper().unwrap_or(false);
        let _ = nix::sys::prctl::set_child_subreaper(true);
        let open = |pid: HostPid| Some((pid, pidfd::open(pid).ok()?));
        let noted = self.living().map(|(_, task)| task.host).collect();
        let tasks: Vec<(HostPid, OwnedFd)> = with_children(noted).into_iter().rev().filter_map(open).collect();
        // Whatever a task still clones, because its maker is in the middle of a batch, ends by itself.
        self.slots.iter().for_each(Slot::abandon);
        for (pid, task) in &tasks {
            if let Err(errno) = pidfd::send_signal(task.as_fd(), libc::SIGKILL) {
                tracing::warn!(%pid, %errno, "a task of the failed restore cannot be ended");
            }
        }
        if self.traced {
            // A traced thread stays until its tracer has seen its end.
            let threads = self.living().flat_map(|(_, task)| task.all_threads().map(|(_, tid, _)| tid));
            crate::sys::ptrace::reap(threads.collect());
        }
        for (pid, task) in &tasks {
            if let Err(errno) = pidfd::wait_gone(task.as_fd(), Duration::from_secs(10)) {
                tracing::warn!(%pid, %errno, "a task of the failed restore does not end");
            }
        }
        // Parents first: each leaves its children, those that had exited before too, to ferry.
        let ended = self.made.iter().map(|place| self.task(*place).host);
        for pid in ended.chain(tasks.iter().rev().map(|(pid, _)| *pid)) {
            let _ = waitpid(Pid::from_raw(pid.0), Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
        }
        let _ = nix::sys::prctl::set_child_subreaper(subreaper);
    }
}

/// Tasks and all below them: also those that were cloned but not noted, because their maker failed after that. A task in
/// a runner has no other children.
fn with_children(mut tasks: Vec<HostPid>) -> Vec<HostPid> {
    let mut known: HashSet<HostPid> = tasks.iter().copied().collect();
    let mut next = 0;
    while let Some(&pid) = tasks.get(next) {
        let threads = procfs::threads(pid).unwrap_or_default();
        let children = threads.iter().filter_map(|tid| procfs::children(pid, *tid).ok()).flatten();
        tasks.extend(children.filter(|child| known.insert(*child)));
        next += 1;
    }
    tasks
}

impl Drop for LiveTree {
    fn drop(&mut self) {
        if !self.released {
            self.end();
            self.list.clear();
        }
    }
}
