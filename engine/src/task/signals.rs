//! Signals: actions, alternate stacks, pending queues.
//!
//! Facts relied on: the kernel's own `struct sigaction` of rt_sigaction(2) on x86-64 is four words: handler, flags, restorer,
//! mask; its signal sets have 8 bytes. `PTRACE_PEEKSIGINFO` (Linux 3.10) copies a queue in delivery order without taking
//! from it. A task may queue any `siginfo_t` to itself with rt_sigqueueinfo(2) and rt_tgsigqueueinfo(2); a blocked signal
//! is queued even if its action is to ignore it. Setting an action to `SIG_IGN` empties that signal's queues.
//!
//! Invariant: all signals stay blocked in every thread from before queues are restored until its registers are final.

use std::time::Instant;

use super::{Checks, TaskError};
use crate::agent::{Answers, Batch, Call, Out, Runner};
use crate::images::core::{CoreEntry, ThreadSasEntry};
use crate::images::signal::{SaEntry, SiginfoEntry, SignalQueueEntry};
use crate::sys::{HostPid, ptrace};

const SIGNALS: u64 = 64;
const SET_SIZE: u64 = 8;
const ACTION_SIZE: usize = 32;
const STACK_SIZE: usize = 24;
/// A `siginfo_t`, whatever the signal.
const SIGINFO_SIZE: usize = 128;
/// Flags of an alternate stack that a program chooses; the kernel adds `SS_ONSTACK` when the stack is in use.
const STACK_FLAGS: u32 = libc::SS_DISABLE as u32 | 1 << 31;

/// Signals whose action can be set: all but SIGKILL and SIGSTOP.
fn with_action() -> impl Iterator<Item = u64> {
    (1..=SIGNALS).filter(|signal| *signal != libc::SIGKILL as u64 && *signal != libc::SIGSTOP as u64)
}

/// The question for all actions of a process.
pub struct ActionQuestions(Vec<(Call, Out)>);

impl ActionQuestions {
    /// Appends one rt_sigaction(2) for each signal.
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        let ask = |signal| {
            let out = batch.space(ACTION_SIZE);
            (batch.call(libc::SYS_rt_sigaction, &[signal, 0, out.addr.0, SET_SIZE]), out)
        };
        Self(with_action().map(ask).collect())
    }

    /// The actions, in the order of the signals' numbers.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answers(&self, answers: &Answers<'_>) -> Result<Vec<SaEntry>, TaskError> {
        let action = |(call, out): &(Call, Out)| {
            answers.value(*call)?;
            Ok(SaEntry {
                sigaction: answers.u64_at(*out, 0),
                flags: answers.u64_at(*out, 8),
                restorer: answers.u64_at(*out, 16),
                mask: answers.u64_at(*out, 24),
                compat_sigaction: Some(false),
                mask_extended: None,
            })
        };
        self.0.iter().map(action).collect()
    }
}

/// The question for a thread's alternate stack.
pub struct StackQuestion(Call, Out);

impl StackQuestion {
    /// Appends a sigaltstack(2).
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        let out = batch.space(STACK_SIZE);
        Self(batch.call(libc::SYS_sigaltstack, &[0, out.addr.0]), out)
    }

    /// The stack, in use or not.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answer(&self, answers: &Answers<'_>) -> Result<ThreadSasEntry, TaskError> {
        answers.value(self.0)?;
        Ok(ThreadSasEntry {
            ss_sp: answers.u64_at(self.1, 0),
            ss_size: answers.u64_at(self.1, 16),
            ss_flags: answers.u32_at(self.1, 8),
        })
    }
}

/// A queue of pending signals: the raw `siginfo_t` of each, oldest first.
pub type Pending = Vec<[u8; SIGINFO_SIZE]>;

/// All queues of a stopped process.
#[derive(Clone, Debug)]
pub struct Queues {
    /// The process's own.
    pub shared: Pending,
    /// One for each thread, in the order given.
    pub private: Vec<Pending>,
    /// When they had been read.
    pub(super) read: Instant,
}

impl Queues {
    /// Copies the queues of a process whose `threads`, the leader first, are in ptrace stops.
    ///
    /// To be read last, when no agent is in the process any more: what the kernel queued meanwhile, above all for timers that
    /// have expired, would be lost to the image otherwise.
    ///
    /// # Errors
    /// [`TaskError::Collect`].
    pub fn collect(threads: impl IntoIterator<Item = HostPid>) -> Result<Self, TaskError> {
        let collect = |tid, shared, what| {
            ptrace::pending_signals(tid, shared).map_err(|errno| TaskError::Collect { tid, what, errno })
        };
        let (mut shared, mut private) = (None, Vec::new());
        for tid in threads {
            if shared.is_none() {
                shared = Some(collect(tid, true, "process's pending signals")?);
            }
            private.push(collect(tid, false, "pending signals")?);
        }
        Ok(Self { shared: shared.unwrap_or_default(), private, read: Instant::now() })
    }

    /// Every pending signal.
    pub(super) fn all(&self) -> impl Iterator<Item = &[u8; SIGINFO_SIZE]> {
        self.shared.iter().chain(self.private.iter().flatten())
    }
}

/// One queue as an image holds it.
pub fn dump_queue<'a>(signals: impl IntoIterator<Item = &'a [u8; SIGINFO_SIZE]>) -> SignalQueueEntry {
    let signals = signals.into_iter().map(|info| SiginfoEntry { siginfo: info.to_vec() }).collect();
    SignalQueueEntry { signals }
}

/// The signal that a raw `siginfo_t` tells of.
pub fn signal_of(siginfo: &[u8]) -> i32 {
    siginfo.first_chunk().map_or(0, |number| i32::from_le_bytes(*number))
}

/// Sets all actions of a process.
///
/// Children that were made and ended while the tree was built have left SIGCHLD pending: it is emptied first.
///
/// # Errors
/// [`TaskError::Image`] when the image has not an action for each signal.
pub fn restore_actions(
    batch: &mut Batch<'_>,
    actions: &[SaEntry],
    tid: u32,
    checks: &mut Checks,
) -> Result<(), TaskError> {
    if actions.len() != with_action().count() {
        let what = format!("it has {} signal actions instead of {}", actions.len(), with_action().count());
        return Err(TaskError::Image { tid, what });
    }
    let mut set = |signal: u64, action: [u64; 4]| {
        let action = batch.bytes(action.map(u64::to_ne_bytes).as_flattened());
        let what = format!("action for signal {signal}");
        checks.call(batch, what, libc::SYS_rt_sigaction, &[signal, action.0, 0, SET_SIZE]);
    };
    set(libc::SIGCHLD as u64, [libc::SIG_IGN as u64, 0, 0, 0]);
    for (signal, action) in with_action().zip(actions) {
        set(signal, [action.sigaction, action.flags, action.restorer, action.mask]);
    }
    Ok(())
}

/// Sets a thread's alternate stack.
pub fn restore_stack(batch: &mut Batch<'_>, stack: Option<&ThreadSasEntry>, checks: &mut Checks) {
    let none = ThreadSasEntry { ss_flags: libc::SS_DISABLE as u32, ..ThreadSasEntry::default() };
    let stack = stack.unwrap_or(&none);
    let words = [stack.ss_sp, u64::from(stack.ss_flags & STACK_FLAGS), stack.ss_size];
    let addr = batch.bytes(words.map(u64::to_ne_bytes).as_flattened());
    checks.call(batch, "alternate signal stack", libc::SYS_sigaltstack, &[addr.0, 0]);
}

/// Queues the pending signals of a thread, and of its process if `core` is the leader's, in batches of its own.
///
/// Must run after [`restore_actions`], and before the limits and credentials are restored. Answers whether a SIGSTOP was
/// pending, which nobody can hold back: it must be sent when the thread is let go.
///
/// # Errors
/// [`TaskError::Image`] for what is no `siginfo_t`; [`TaskError::Restore`].
pub fn restore_queues(runner: &Runner, core: &CoreEntry, ids: QueueIds) -> Result<bool, TaskError> {
    let shared = core.tc.as_ref().and_then(|process| process.signals_s.as_ref());
    let private = core.thread_core.as_ref().and_then(|thread| thread.signals_p.as_ref());
    let all = |queue: Option<&SignalQueueEntry>| queue.map(|queue| queue.signals.clone()).unwrap_or_default();
    let signals: Vec<_> = all(shared).into_iter().map(|info| (true, info)).collect();
    let mut signals: Vec<_> = signals.into_iter().chain(all(private).into_iter().map(|info| (false, info))).collect();
    if let Some((_, bad)) = signals.iter().find(|(_, info)| {
        info.siginfo.len() != SIGINFO_SIZE || !(1..=SIGNALS as i32).contains(&signal_of(&info.siginfo))
    }) {
        let what = format!("a pending signal has {} bytes and number {}", bad.siginfo.len(), signal_of(&bad.siginfo));
        return Err(TaskError::Image { tid: ids.thread, what });
    }
    let before = signals.len();
    signals.retain(|(_, info)| signal_of(&info.siginfo) != libc::SIGSTOP);
    let stop = signals.len() < before;
    let mut rest = signals.as_slice();
    while !rest.is_empty() {
        let mut batch = runner.batch();
        let mut checks = Checks::default();
        let fit = (batch.room() / (Batch::CALL_BYTES + SIGINFO_SIZE + 16)).clamp(1, rest.len());
        for (shared, info) in &rest[..fit] {
            let signal = signal_of(&info.siginfo) as u64;
            let addr = batch.bytes(&info.siginfo).0;
            let (process, thread) = (u64::from(ids.process), u64::from(ids.thread));
            let what = format!("pending signal {signal}");
            if *shared {
                checks.call(&mut batch, what, libc::SYS_rt_sigqueueinfo, &[process, signal, addr]);
            } else {
                checks.call(&mut batch, what, libc::SYS_rt_tgsigqueueinfo, &[process, thread, signal, addr]);
            }
        }
        checks.verify(runner.tid(), &batch.run()?)?;
        rest = &rest[fit..];
    }
    Ok(stop)
}

/// Whom to queue to, as the task's own pid namespace numbers them.
#[derive(Clone, Copy, Debug)]
pub struct QueueIds {
    /// The process.
    pub process: u32,
    /// The thread, which is the runner's own.
    pub thread: u32,
}
