//! One thread, put together from its parts: collecting, dumping, restoring.

use super::credentials;
use super::identity::{self, ThreadSettings};
use super::process::Process;
use super::processor::{self, Switches};
use super::scheduling::{self, Scheduling};
use super::seccomp::{self, Filter, FilterTable};
use super::signals::Pending;
use super::{Checks, TaskError, affinity, interrupted, registers, rseq, signals};
use crate::agent::inject::Context;
use crate::agent::{Answers, Batch, Runner};
use crate::images::core::{CoreEntry, March, RseqEntry, ThreadCoreEntry, ThreadSasEntry};
use crate::images::creds::CredsEntry;
use crate::images::extension::FerryThreadEntry;
use crate::images::seccomp::SeccompMode;
use crate::sys::HostPid;
use crate::sys::ptrace::{self, Stop};

/// What ptrace(2) tells of a stopped thread.
#[derive(Clone, Debug)]
pub struct ThreadOutside {
    rseq: RseqEntry,
    /// A signal that was about to be taken, and is in no queue any more.
    taken: Option<[u8; 128]>,
    filters: Vec<Filter>,
    /// Components of the extended state that no image can hold, by name; any is a reason to refuse.
    pub unsupported_state: Vec<String>,
    /// Whether its system calls are turned into signals (`PR_SET_SYSCALL_USER_DISPATCH`), which images cannot hold.
    pub dispatches_calls: bool,
}

impl ThreadOutside {
    /// Collects it from a thread in a ptrace stop, before an agent enters.
    ///
    /// A thread inside a restartable sequence is moved out of it: `context`, which is also what the thread goes on with,
    /// is changed as the kernel would change it. A signal that the thread was about to take, and that is in no queue any
    /// more, is the first of its own queue in the image.
    ///
    /// # Errors
    /// [`TaskError::Collect`].
    pub fn collect(tid: HostPid, stop: Stop, context: &mut Context) -> Result<Self, TaskError> {
        let unsupported = registers::unsupported_components(&context.xstate);
        let taken = match stop {
            Stop::Signal(_) => {
                let failed = |errno| TaskError::Collect { tid, what: "signal about to be taken", errno };
                Some(ptrace::signal_info(tid).map_err(failed)?)
            }
            _ => None,
        };
        Ok(Self {
            rseq: rseq::collect_rseq(tid, context)?,
            taken,
            filters: seccomp::collect_filters(tid)?,
            unsupported_state: unsupported.into_iter().map(registers::component_name).collect(),
            // The request is as old as Linux 6.4; the dispatch is older, but used by emulators only.
            dispatches_calls: ptrace::syscall_user_dispatch(tid).unwrap_or(false),
        })
    }
}

/// The questions that only the thread itself answers.
pub struct ThreadQuestions {
    settings: identity::ThreadQuestions,
    stack: signals::StackQuestion,
    scheduling: scheduling::Question,
    affinity: affinity::Question,
    switches: processor::Questions,
    credentials: credentials::Questions,
}

/// Its answers.
#[derive(Clone, Debug)]
pub struct ThreadAnswers {
    /// Name, tid address, robust list and so on.
    pub settings: ThreadSettings,
    /// Alternate signal stack.
    pub stack: ThreadSasEntry,
    /// Scheduling.
    pub scheduling: Scheduling,
    /// Processors it may run on.
    pub affinity: Vec<u8>,
    /// Switches of the processor.
    pub switches: Switches,
    /// Credentials.
    pub credentials: CredsEntry,
}

impl ThreadQuestions {
    /// Appends the questions to a batch of the thread's own runner.
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        Self {
            settings: identity::ThreadQuestions::ask(batch),
            stack: signals::StackQuestion::ask(batch),
            scheduling: scheduling::Question::ask(batch),
            affinity: affinity::Question::ask(batch),
            switches: processor::Questions::ask(batch),
            credentials: credentials::Questions::ask(batch),
        }
    }

    /// Reads the answers.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answers(&self, answers: &Answers<'_>) -> Result<FirstAnswers, TaskError> {
        Ok(FirstAnswers(ThreadAnswers {
            settings: self.settings.answers(answers)?,
            stack: self.stack.answer(answers)?,
            scheduling: self.scheduling.answer(answers)?,
            affinity: self.affinity.answer(answers)?,
            switches: self.switches.answers(answers),
            credentials: self.credentials.answers(answers)?,
        }))
    }
}

/// Answers of a thread, of which some may be worth asking more: [`Self::complete`] gives them all.
#[must_use]
pub struct FirstAnswers(ThreadAnswers);

impl FirstAnswers {
    /// Asks the rest, in a batch of its own if there is any: not while answers of another batch are unread.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn complete(mut self, runner: &Runner) -> Result<ThreadAnswers, TaskError> {
        credentials::complete(runner, &mut self.0.credentials)?;
        Ok(self.0)
    }
}

/// A thread that is to be dumped.
#[derive(Clone, Copy)]
pub struct Thread<'a> {
    /// Its place among its process's threads; the leader's is 0.
    pub place: usize,
    /// What it was about to do, out of restartable sequences.
    pub context: &'a Context,
    /// What ptrace(2) told.
    pub outside: &'a ThreadOutside,
    /// What it told itself.
    pub answers: &'a ThreadAnswers,
}

/// The `core` entry of a thread that is not its process's leader; [`super::process::dump_leader`] adds to it.
pub fn dump_thread(thread: Thread<'_>, process: Process<'_>, table: &mut FilterTable) -> CoreEntry {
    let Thread { context, outside, answers, .. } = thread;
    let settings = &answers.settings;
    let filter = table.add(&outside.filters);
    let own = process.queues.private.get(thread.place).map_or(&[][..], |queue| queue);
    let pending: Pending = outside.taken.iter().chain(own).copied().collect();
    let mut entry = ThreadCoreEntry {
        futex_rla: settings.robust_list.0,
        futex_rla_len: settings.robust_list.1,
        blk_sigset: Some(context.mask),
        sas: Some(answers.stack.clone()),
        pdeath_sig: (settings.death_signal != 0).then_some(settings.death_signal),
        signals_p: Some(signals::dump_queue(&pending)),
        creds: Some(answers.credentials.clone()),
        seccomp_mode: (settings.seccomp_mode != SeccompMode::Disabled as u32).then_some(settings.seccomp_mode as i32),
        seccomp_filter: filter,
        comm: Some(settings.name.clone()),
        rseq_entry: Some(outside.rseq.clone()),
        ..ThreadCoreEntry::default()
    };
    let mut more = FerryThreadEntry::default();
    answers.scheduling.dump(&mut entry, &mut more);
    affinity::dump_affinity(&answers.affinity, process.outside.cpuset.as_deref(), &mut more);
    answers.switches.dump(&mut more);
    entry.ferry = (more != FerryThreadEntry::default()).then_some(more);

    let mut context = context.clone();
    // A signal to the process goes to its leader if that does not block it.
    let none = Pending::new();
    let shared = if thread.place == 0 { &process.queues.shared } else { &none };
    if let Some(action) = interrupted::next_handler(&[&pending, shared], context.mask, &process.answers.actions) {
        interrupted::settle(&mut context.registers, action);
    }
    CoreEntry {
        mtype: March::X86_64 as i32,
        thread_info: Some(registers::dump_registers(&context, settings.tid_address)),
        thread_core: Some(entry),
        ..CoreEntry::default()
    }
}

fn parts(core: &CoreEntry, tid: u32) -> Result<(&ThreadCoreEntry, u64), TaskError> {
    let damaged = |what: &str| TaskError::Image { tid, what: what.into() };
    let thread = core.thread_core.as_ref().ok_or_else(|| damaged("it has no thread state"))?;
    let info = core.thread_info.as_ref().ok_or_else(|| damaged("it has no registers"))?;
    Ok((thread, info.clear_tid_addr))
}

/// Appends what a thread gets while it still has all privileges: name, futex and rseq registrations, stack, scheduling.
///
/// Its memory must be there, and the rseq registration of whatever started the runner taken back.
///
/// # Errors
/// [`TaskError::Image`].
pub fn restore_thread(batch: &mut Batch<'_>, core: &CoreEntry, tid: u32) -> Result<Checks, TaskError> {
    let (thread, tid_address) = parts(core, tid)?;
    let mut checks = Checks::default();
    let of_process = core.tc.as_ref().map(|process| &process.comm);
    let name = thread.comm.as_ref().or(of_process).map_or(&[][..], |name| name);
    identity::restore_thread_settings(batch, thread, name, tid_address, &mut checks);
    rseq::restore_rseq(batch, thread.rseq_entry.as_ref(), &mut checks);
    signals::restore_stack(batch, thread.sas.as_ref(), &mut checks);
    let none = FerryThreadEntry::default();
    let more = thread.ferry.as_ref().unwrap_or(&none);
    scheduling::restore_scheduling(batch, thread, more, &mut checks);
    affinity::restore_affinity(batch, more, tid)?;
    processor::restore_switches(batch, more, tid, &mut checks)?;
    Ok(checks)
}

/// What [`restore_identity`] did, to be verified.
pub struct RestoredIdentity {
    checks: Checks,
    credentials: credentials::Restored,
}

impl RestoredIdentity {
    /// Verifies that the thread has become what the image says. May run a batch: the last look at `answers`.
    ///
    /// # Errors
    /// [`TaskError::Restore`], [`TaskError::Differs`].
    pub fn verify(&self, runner: &Runner, answers: &Answers<'_>) -> Result<(), TaskError> {
        self.checks.verify(runner.tid(), answers)?;
        self.credentials.verify(runner, answers)
    }
}

/// Appends limits (for a leader), credentials and parent-death signal: the last of a thread's calls that need privileges.
///
/// Seccomp comes before ([`seccomp::restore_seccomp`]).
///
/// # Errors
/// [`TaskError::Image`].
pub fn restore_identity(batch: &mut Batch<'_>, core: &CoreEntry, tid: u32) -> Result<RestoredIdentity, TaskError> {
    let (thread, _) = parts(core, tid)?;
    let mut checks = Checks::default();
    if let Some(process) = &core.tc {
        identity::restore_memory_rules(batch, &process.ferry.unwrap_or_default(), &mut checks);
        super::limits::restore_limits(batch, process.rlimits.as_ref(), &mut checks);
    }
    let damaged = || TaskError::Image { tid, what: "it has no credentials".into() };
    let entry = thread.creds.as_ref().ok_or_else(damaged)?;
    let credentials = credentials::restore_credentials(batch, entry);
    identity::restore_death_signal(batch, thread.pdeath_sig.unwrap_or(0), &mut checks);
    Ok(RestoredIdentity { checks, credentials })
}
