//! What is held at a time: seized threads, and the frozen cgroup around them.
//!
//! A thread can be detached only while it stands in a ptrace stop (ptrace(2)). One that was interrupted while a v1 freezer held
//! it reaches that stop after the thaw; if it must not be thawed, the kernel detaches it when ferry ends, and takes back the
//! interrupt with that (kernel/ptrace.c, __ptrace_unlink).

use std::collections::HashMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ferry_cgroup::{Freezer, Frozen};

use super::FreezeError;
use crate::sys::HostPid;
use crate::sys::ptrace::{self, Stop};

/// How long letting go waits for a thread that was interrupted and has not stopped.
const GRACE: Duration = Duration::from_millis(200);

/// Seized threads and the cgroup. Dropped, it lets all go and gives the cgroup back as it was found.
pub(super) struct Held {
    /// By thread; none while it was interrupted and has not stopped yet.
    threads: HashMap<HostPid, Option<Stop>>,
    cgroup: Option<Frozen>,
    /// Whether the cgroup was thawed for the ptrace stops.
    thawed: bool,
    timeout: Duration,
}

impl Held {
    /// Freezes the cgroup, if there is one. Whatever else is in it is found out later, by the tree's walk.
    pub fn freeze(freezer: Option<&Freezer>, timeout: Duration) -> Result<Self, FreezeError> {
        let cgroup = freezer.map(|freezer| freezer.freeze(|_| true, timeout)).transpose()?;
        Ok(Self { threads: HashMap::new(), cgroup, thawed: false, timeout })
    }

    /// The cgroup.
    pub fn cgroup(&self) -> Option<&Frozen> {
        self.cgroup.as_ref()
    }

    /// Whether a cgroup holds the tasks now, so that their stops cannot be awaited.
    pub fn is_frozen(&self) -> bool {
        self.cgroup.is_some() && !self.thawed
    }

    /// Whether any of the tasks was frozen before ferry came, and must not run.
    pub fn found_frozen(&self) -> bool {
        self.cgroup.as_ref().is_some_and(Frozen::found_any_frozen)
    }

    /// Thaws the cgroup, so that the threads, all of them seized and interrupted, reach their stops.
    pub fn thaw(&mut self) -> Result<(), FreezeError> {
        if let Some(cgroup) = &mut self.cgroup {
            self.thawed = true;
            cgroup.thaw_for_ptrace()?;
        }
        Ok(())
    }

    /// Whether seizing the thread now would not return: `PTRACE_SEIZE` of a thread in a job-control stop waits until that has
    /// become a ptrace stop (kernel/ptrace.c, ptrace_attach, JOBCTL_TRAPPING), which it cannot while the v1 freezer holds it. Such
    /// a thread is to be seized after the thaw: it stays stopped.
    pub fn is_out_of_reach(&self, tid: HostPid) -> bool {
        let of_v1 = self.is_frozen() && self.cgroup.as_ref().is_some_and(Frozen::is_of_v1);
        // A task that v1 froze anywhere else does not wait there; the first function may be inlined in the second.
        let stopped = |wchan: &String| matches!(wchan.as_str(), "do_signal_stop" | "get_signal");
        of_v1 && std::fs::read_to_string(format!("/proc/{tid}/wchan")).is_ok_and(|wchan| stopped(&wchan))
    }

    /// Seizes and interrupts a thread.
    pub fn seize(&mut self, tid: HostPid) -> nix::Result<()> {
        // Filters must not see the agent's calls. Where ferry itself is filtered the option is refused: then try without.
        match ptrace::seize(tid, ptrace::OPTION_SUSPEND_SECCOMP) {
            Err(nix::errno::Errno::EPERM) => ptrace::seize(tid, 0)?,
            result => result?,
        }
        self.threads.insert(tid, None);
        // One that is ending cannot be interrupted; its end is told instead of its stop.
        ptrace::interrupt(tid).ok();
        Ok(())
    }

    /// Whether the thread has stopped, without waiting for it. One that has died is forgotten.
    pub fn look(&mut self, tid: HostPid) -> Progress {
        if let Some(Some(_)) = self.threads.get(&tid) {
            return Progress::Stopped;
        }
        match ptrace::poll_interrupted(tid) {
            Ok(None) => Progress::Running,
            Ok(Some(stop)) => {
                self.threads.insert(tid, Some(stop));
                Progress::Stopped
            }
            Err(_) => {
                self.threads.remove(&tid);
                Progress::Dead
            }
        }
    }

    /// How the thread was found.
    pub fn stop_of(&self, tid: HostPid) -> Stop {
        self.threads.get(&tid).copied().flatten().unwrap_or(Stop::Interrupted)
    }

    /// Lets a stopped thread go before the others.
    pub fn release(&mut self, tid: HostPid) {
        self.threads.remove(&tid);
        let _ = ptrace::detach(tid, 0);
    }

    /// The tasks have been killed: leaves the cgroup thawed, whatever it was before.
    pub fn ended(&mut self) {
        self.threads.clear();
        if let Some(Err(error)) = self.cgroup.take().map(Frozen::end) {
            tracing::warn!("the cgroup of the ended processes could not be left thawed: {error}");
        }
    }
}

/// What has become of an interrupted thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// It stands in its stop.
    Stopped,
    /// Not yet.
    Running,
    /// It has ended instead.
    Dead,
}

impl Drop for Held {
    fn drop(&mut self) {
        // What was found frozen must not run between the detach and the return of its cgroup's state.
        let found_frozen = self.found_frozen();
        if let Some(cgroup) = self.cgroup.as_mut().filter(|_| found_frozen && self.thawed)
            && let Err(error) = cgroup.refreeze(self.timeout)
        {
            tracing::warn!("the cgroup was found frozen, but runs for a moment: {error}");
        }
        // A thread that died meanwhile needs no detaching.
        let tids: Vec<HostPid> = self.threads.keys().copied().collect();
        let unstopped: Vec<HostPid> = tids.into_iter().filter(|tid| ptrace::detach(*tid, 0).is_err()).collect();
        let stays_frozen = self.cgroup.take().is_some_and(|cgroup| cgroup.was_frozen());
        if stays_frozen {
            return;
        }
        let deadline = Instant::now() + GRACE;
        for tid in unstopped {
            self.threads.insert(tid, None);
            loop {
                match self.look(tid) {
                    Progress::Running if Instant::now() < deadline => sleep(Duration::from_micros(50)),
                    Progress::Running | Progress::Dead => break,
                    Progress::Stopped => {
                        let _ = ptrace::detach(tid, 0);
                        break;
                    }
                }
            }
        }
    }
}
