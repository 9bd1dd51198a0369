//! The last steps: what a thread is, then its registers, then freedom.
//!
//! From [`Restore::seize`] on the kernel ends the tasks with ferry (`PTRACE_O_EXITKILL`) and holds their seccomp filters
//! back (`PTRACE_O_SUSPEND_SECCOMP`), so that runners may go on under filters that would forbid it. No thread executes an
//! instruction of its own before [`Restore::let_go`], and then all of them are ready.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Restore;
use super::checkpoint::TaskImages;
use super::error::RestoreError;
use super::live::LiveTask;
use crate::agent::inject::{Context, call_once, find_syscall_instruction};
use crate::agent::{Pending, Runner};
use crate::fault::RestoreStep;
use crate::images::core::CoreEntry;
use crate::images::seccomp::SeccompEntry;
use crate::images::{Kind, core};
use crate::sys::{HostPid, NsPid, RemoteAddr, ptrace};
use crate::task::{self, Checks, TaskError, identity, registers, seccomp, signals, timers};

/// A thread to be armed.
struct Armed<'a> {
    place: usize,
    tid: NsPid,
    host: HostPid,
    runner: &'a Runner,
    core: &'a CoreEntry,
    leads: bool,
}

impl Restore<'_> {
    /// All threads of all living members.
    fn threads(&self) -> Vec<Armed<'_>> {
        let mut threads = Vec::new();
        for (place, live) in self.live.living().filter(|(place, _)| *place < self.checkpoint.tasks.len()) {
            let images = &self.checkpoint.tasks[place];
            let cores = std::iter::once(&images.core).chain(images.threads.iter().map(|thread| &thread.core));
            for ((tid, host, runner), core) in live.all_threads().zip(cores) {
                threads.push(Armed { place, tid, host, runner, core, leads: tid == live.pid });
            }
        }
        threads
    }

    fn named(&self, place: usize, source: TaskError) -> RestoreError {
        let live = self.live.task(place);
        RestoreError::Task { pid: live.pid, comm: live.comm.clone(), source }
    }

    /// Attaches to every thread.
    pub(super) fn seize(&mut self) -> Result<(), RestoreError> {
        let filtered = |core: &CoreEntry| {
            let mode = core.thread_core.as_ref().and_then(|thread| thread.seccomp_mode);
            mode.is_some_and(|mode| mode != crate::images::seccomp::SeccompMode::Disabled as i32)
        };
        self.live.trace();
        for thread in self.threads() {
            let leader = &self.checkpoint.tasks[thread.place].core;
            let suspend = if filtered(thread.core) || filtered(leader) { ptrace::OPTION_SUSPEND_SECCOMP } else { 0 };
            let failed = |errno| RestoreError::Trace { pid: thread.host, step: "attach to it", errno };
            ptrace::seize(thread.host, ptrace::OPTION_EXITKILL | suspend).map_err(failed)?;
        }
        Ok(())
    }

    /// Gives threads and processes all that they set with system calls.
    pub(super) fn restore_identity(&mut self) -> Result<(), RestoreError> {
        let table = self.images.entry::<SeccompEntry>(Kind::Seccomp, &Kind::Seccomp.name())?.unwrap_or_default();
        let threads = self.threads();
        let mut running: Vec<(Pending<'_>, Vec<Checks>)> = Vec::with_capacity(threads.len());
        for thread in &threads {
            let mut batch = thread.runner.batch();
            let mut checks = Vec::new();
            let tid = thread.tid.0 as u32;
            let failed = |error| self.named(thread.place, error);
            if thread.leads {
                checks.push(task::process::restore_process(&mut batch, thread.core, tid).map_err(failed)?);
            }
            checks.push(task::thread::restore_thread(&mut batch, thread.core, tid).map_err(failed)?);
            running.push((batch.submit().map_err(|error| failed(error.into()))?, checks));
        }
        for (thread, (pending, checks)) in threads.iter().zip(running) {
            let failed = |error| self.named(thread.place, error);
            let answers = pending.wait().map_err(|error| failed(error.into()))?;
            checks.iter().try_for_each(|checks| checks.verify(thread.host, &answers)).map_err(failed)?;
        }
        let mut stops = Vec::new();
        let mut common = 0;
        for thread in &threads {
            self.live.step(RestoreStep::Batch)?;
            let failed = |error| self.named(thread.place, error);
            if thread.leads {
                common = self.common_filters(thread.place, &table).map_err(failed)?;
            }
            if self.one_by_one(thread, &table, common).map_err(failed)? {
                stops.push(thread.place);
            }
        }
        let mut running = Vec::with_capacity(threads.len());
        for thread in &threads {
            let mut batch = thread.runner.batch();
            let failed = |error| self.named(thread.place, error);
            let tid = thread.tid.0 as u32;
            let identity = task::thread::restore_identity(&mut batch, thread.core, tid).map_err(failed)?;
            running.push((batch.submit().map_err(|error| failed(error.into()))?, identity));
        }
        for (thread, (pending, identity)) in threads.iter().zip(running) {
            let failed = |error| self.named(thread.place, error);
            let answers = pending.wait().map_err(|error| failed(error.into()))?;
            identity.verify(thread.runner, &answers).map_err(failed)?;
        }
        for thread in threads.iter().filter(|thread| thread.leads) {
            self.last_settings(thread).map_err(|error| self.named(thread.place, error))?;
        }
        drop(threads);
        self.stops.extend(stops);
        Ok(())
    }

    /// What few threads have, in batches of its own. Answers whether a SIGSTOP was pending.
    fn one_by_one(&self, thread: &Armed<'_>, table: &SeccompEntry, common: usize) -> Result<bool, TaskError> {
        let images = &self.checkpoint.tasks[thread.place];
        let (leader, tid) = (images.pid.0 as u32, thread.tid.0 as u32);
        if let Some(timers) = &images.process().timers {
            timers::create_timers(thread.runner, timers, leader, tid)?;
        }
        let ids = signals::QueueIds { process: leader, thread: tid };
        let stop = signals::restore_queues(thread.runner, thread.core, ids)?;
        let wanted = seccomp::wanted(thread.core, &images.core, table, tid)?;
        seccomp::restore_seccomp(thread.runner, &wanted, seccomp::Share { common, leads: thread.leads })?;
        Ok(stop)
    }

    /// How many seccomp filters the threads of a process have in common.
    fn common_filters(&self, place: usize, table: &SeccompEntry) -> Result<usize, TaskError> {
        let images = &self.checkpoint.tasks[place];
        let tid = images.pid.0 as u32;
        let others = images.threads.iter().map(|thread| &thread.core);
        let wanted: Result<Vec<_>, _> = std::iter::once(&images.core)
            .chain(others)
            .map(|core| seccomp::wanted(core, &images.core, table, tid))
            .collect();
        Ok(seccomp::common(&wanted?))
    }

    fn last_settings(&self, thread: &Armed<'_>) -> Result<(), TaskError> {
        let images = &self.checkpoint.tasks[thread.place];
        let mut batch = thread.runner.batch();
        let mut checks = Checks::default();
        if let Some(memory) = &images.memory {
            let thp = memory.mm.thp_disabled.unwrap_or(false);
            identity::restore_memory_flags(&mut batch, memory.mm.dumpable, thp, &mut checks);
            if self.is_lazy() && !thp {
                batch.call(libc::SYS_prctl, &[libc::PR_SET_THP_DISABLE as u64, 0]);
            }
        }
        if !batch.is_empty() {
            checks.verify(thread.host, &batch.run()?)?;
        }
        identity::restore_oom_score_adj(thread.host, images.process().oom_score_adj)?;
        if let Some(timers) = &images.process().timers {
            timers::arm_timers(thread.runner, timers)?;
        }
        Ok(())
    }

    /// Stops every thread, takes the scaffold out of each process and sets all registers.
    pub(super) fn set_registers(&mut self) -> Result<(), RestoreError> {
        let threads = self.threads();
        for thread in &threads {
            self.live.step(RestoreStep::Batch)?;
            let failed = |errno| RestoreError::Trace { pid: thread.host, step: "stop it", errno };
            ptrace::interrupt(thread.host).map_err(failed)?;
        }
        for thread in &threads {
            let failed = |errno| RestoreError::Trace { pid: thread.host, step: "await its stop", errno };
            ptrace::wait_stop(thread.host).map_err(failed)?;
        }
        for thread in &threads {
            let failed = |step| move |errno| RestoreError::Trace { pid: thread.host, step, errno };
            if thread.leads {
                self.remove_scaffold(thread)?;
            }
            let xstate = ptrace::xstate(thread.host).map_err(failed("read its extended registers"))?;
            let context: Context = registers::final_registers(thread.core, thread.tid.0 as u32, &xstate)
                .and_then(|context| registers::set_final_registers(thread.host, &context).map(|()| context))
                .map_err(|error| self.named(thread.place, error))?;
            drop(context);
        }
        Ok(())
    }

    fn remove_scaffold(&self, thread: &Armed<'_>) -> Result<(), RestoreError> {
        let live = self.live.task(thread.place);
        let failed = |source| live.agent(source);
        let base = ptrace::registers(thread.host).map_err(|errno| RestoreError::Trace {
            pid: thread.host,
            step: "read its registers",
            errno,
        })?;
        let at = self.syscall_instruction(thread.place, live)?;
        let range = self.plan.scaffold();
        let arguments = [range.start, range.end - range.start, 0, 0, 0, 0];
        call_once(thread.host, &base, at, libc::SYS_munmap, arguments).map(drop).map_err(failed)
    }

    /// An instruction that stays when the scaffold goes: the vdso's, or one of the program's own.
    fn syscall_instruction(&self, place: usize, live: &LiveTask) -> Result<RemoteAddr, RestoreError> {
        if let Some(start) = self.plan.vdso_at[place] {
            return Ok(self.plan.vdso.syscall_instruction(start));
        }
        let mappings = self.memory(place).layout.mappings.iter();
        let executable = mappings.filter(|mapping| mapping.protection & libc::PROT_EXEC as u32 != 0);
        find_syscall_instruction(live.host, executable.map(|mapping| mapping.range.clone()))
            .map_err(|source| live.agent(source))
    }

    /// Sends stop signals to the tasks that are to be stopped.
    pub(super) fn stop_again(&self) -> Result<(), RestoreError> {
        for (place, live) in self.live.living() {
            let Some(signal) = self.stop_signal(place) else { continue };
            let failed = |errno: Errno| live.step("stop it", "the task", errno);
            // The kernel acts on it before the task's first instruction.
            kill(Pid::from_raw(live.host.0), signal).map_err(failed)?;
        }
        Ok(())
    }

    /// Sends the tree on its way, parents before children: a task that runs has running ancestors, by which it can be found.
    ///
    /// An error here comes from a task that was killed meanwhile; the others are on their way already, so it is logged.
    pub(super) fn let_go(&self) {
        for thread in self.threads() {
            if let Err(errno) = ptrace::detach(thread.host, 0) {
                tracing::warn!(pid = %thread.host, %errno, "a restored thread could not be let go: was it killed?");
            }
            self.live.freed();
        }
    }

    /// The signal that keeps a task stopped, if any.
    fn stop_signal(&self, place: usize) -> Option<Signal> {
        let images: &TaskImages = self.checkpoint.tasks.get(place)?;
        let stopped = images.process().task_state == core::task_state::STOPPED;
        if stopped {
            let recorded = images.process().stop_signo.and_then(|signal| Signal::try_from(signal as i32).ok());
            return Some(recorded.unwrap_or(Signal::SIGSTOP));
        }
        (self.options.leave_stopped || self.stops.contains(&place)).then_some(Signal::SIGSTOP)
    }
}
