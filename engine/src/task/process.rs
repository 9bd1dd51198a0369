//! One process: what its threads share, and the `core` entries of leaders and zombies.

use std::time::Instant;

use super::identity::{self, ProcessSettings};
use super::seccomp::FilterTable;
use super::signals::Queues;
use super::thread::{Thread, dump_thread};
use super::timers::{self, Listed};
use super::{Checks, TaskError, affinity, limits, signals};
use crate::agent::{Answers, Batch};
use crate::images::core::{CoreEntry, TaskCoreEntry, TaskRlimitsEntry, task_state};
use crate::images::core_x86::ThreadInfoX86;
use crate::images::signal::SaEntry;
use crate::images::timer::TaskTimersEntry;
use crate::procfs::Stat;
use crate::sys::ptrace::Stop;
use crate::sys::{HostPid, NsPid};

/// What `/proc` tells of a process.
#[derive(Clone, Debug)]
pub struct ProcessOutside {
    pub(super) timers: Vec<Listed>,
    oom_score_adj: i32,
    loginuid: Option<u32>,
    pub(super) cpuset: Option<Vec<u8>>,
}

impl ProcessOutside {
    /// Collects it.
    ///
    /// # Errors
    /// [`TaskError::Proc`].
    pub fn collect(pid: HostPid) -> Result<Self, TaskError> {
        Ok(Self {
            timers: timers::collect_timers(pid)?,
            oom_score_adj: identity::collect_oom_score_adj(pid)?,
            loginuid: identity::collect_loginuid(pid)?,
            cpuset: affinity::collect_cpuset(pid),
        })
    }
}

/// The questions for what the threads of a process share; the leader answers.
pub struct ProcessQuestions {
    settings: identity::ProcessQuestions,
    actions: signals::ActionQuestions,
    timers: timers::Questions,
    limits: limits::Questions,
    asked: Instant,
}

/// Its answers.
#[derive(Clone, Debug)]
pub struct ProcessAnswers {
    /// Personality and so on; two of them belong to the `mm` image.
    pub settings: ProcessSettings,
    /// Signal actions.
    pub actions: Vec<SaEntry>,
    /// Timers.
    pub timers: TaskTimersEntry,
    /// Limits.
    pub limits: TaskRlimitsEntry,
    /// When the questions were put, before any was answered.
    asked: Instant,
}

impl ProcessQuestions {
    /// Appends the questions to a batch of the leader's runner.
    pub fn ask(batch: &mut Batch<'_>, outside: &ProcessOutside) -> Self {
        Self {
            settings: identity::ProcessQuestions::ask(batch),
            actions: signals::ActionQuestions::ask(batch),
            timers: timers::Questions::ask(batch, &outside.timers),
            limits: limits::Questions::ask(batch),
            asked: Instant::now(),
        }
    }

    /// Reads the answers; `ns_tid` translates the ids of the process's threads.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answers(
        &self,
        answers: &Answers<'_>,
        ns_tid: impl Fn(HostPid) -> NsPid,
    ) -> Result<ProcessAnswers, TaskError> {
        Ok(ProcessAnswers {
            settings: self.settings.answers(answers)?,
            actions: self.actions.answers(answers)?,
            timers: self.timers.answers(answers, ns_tid)?,
            limits: self.limits.answers(answers)?,
            asked: self.asked,
        })
    }
}

/// A process that is to be dumped.
#[derive(Clone, Copy)]
pub struct Process<'a> {
    /// What `/proc` told.
    pub outside: &'a ProcessOutside,
    /// What its leader told.
    pub answers: &'a ProcessAnswers,
    /// Its pending signals, read after all others had been asked.
    pub queues: &'a Queues,
}

/// The `core` entry of a process's leader, but for the ids of what it shares and its cgroups.
///
/// `stop` is how the leader was found, `stat` is `/proc/PID/stat`.
pub fn dump_leader(
    thread: Thread<'_>,
    process: Process<'_>,
    stop: Stop,
    stat: &Stat,
    table: &mut FilterTable,
) -> CoreEntry {
    let Process { outside, answers, queues } = process;
    let mut core = dump_thread(thread, process, table);
    // A leader's mask is its process's field; the image's other threads have their own.
    if let Some(thread) = &mut core.thread_core {
        thread.blk_sigset = None;
    }
    let (state, stop_signal) = match stop {
        Stop::Group(signal) => (task_state::STOPPED, Some(signal as u32)),
        _ => (task_state::ALIVE, None),
    };
    let settings = &answers.settings;
    core.tc = Some(TaskCoreEntry {
        task_state: state,
        exit_code: 0,
        personality: settings.personality,
        flags: stat.flags as u32,
        blk_sigset: thread.context.mask,
        comm: thread.answers.settings.name.clone(),
        timers: Some(timers::settle(&answers.timers, queues, queues.read - answers.asked)),
        rlimits: Some(answers.limits.clone()),
        cg_set: None,
        signals_s: Some(signals::dump_queue(&queues.shared)),
        old_seccomp_mode: None,
        old_seccomp_filter: None,
        loginuid: outside.loginuid,
        oom_score_adj: Some(outside.oom_score_adj),
        sigactions: answers.actions.clone(),
        child_subreaper: Some(settings.subreaper),
        blk_sigset_extended: None,
        stop_signo: stop_signal,
        ferry: settings.dump_extension(),
        membarrier_registration_mask: (settings.membarrier != 0).then_some(settings.membarrier),
    });
    core
}

/// The `core` entry of a process that has exited and waits for its parent.
pub fn dump_zombie(stat: &Stat) -> CoreEntry {
    let process = TaskCoreEntry {
        task_state: task_state::DEAD,
        exit_code: stat.exit_code as u32,
        comm: stat.comm.clone().into_bytes(),
        ..TaskCoreEntry::default()
    };
    CoreEntry {
        mtype: crate::images::core::March::X86_64 as i32,
        thread_info: None::<ThreadInfoX86>,
        tc: Some(process),
        ..CoreEntry::default()
    }
}

fn shared(core: &CoreEntry, tid: u32) -> Result<&TaskCoreEntry, TaskError> {
    core.tc.as_ref().ok_or_else(|| TaskError::Image { tid, what: "it has no process state".into() })
}

/// Appends what the threads of a process share: signal actions and settings.
///
/// # Errors
/// [`TaskError::Image`].
pub fn restore_process(batch: &mut Batch<'_>, core: &CoreEntry, tid: u32) -> Result<Checks, TaskError> {
    let process = shared(core, tid)?;
    let mut checks = Checks::default();
    signals::restore_actions(batch, &process.sigactions, tid, &mut checks)?;
    identity::restore_process_settings(batch, process, &mut checks);
    Ok(checks)
}
