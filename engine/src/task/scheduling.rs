//! Scheduling of a thread: policy, nice value, priority, budget, timer slack, I/O priority.
//!
//! Facts relied on: sched_getattr(2) (Linux 3.14) tells policy, priority, budget and flags; the kernel keeps the nice value
//! under every policy, and only getpriority(2) tells it under all of them. Without an I/O priority of its own a thread has
//! one that follows from its nice value (ioprio_set(2)). Raising priority needs `CAP_SYS_NICE`, so this comes before credentials.

use super::{Checks, TaskError};
use crate::agent::{Answers, Batch, Call, Out};
use crate::images::core::ThreadCoreEntry;
use crate::images::extension::{DeadlineEntry, FerryThreadEntry};

/// `struct sched_attr` as of Linux 3.14 (`SCHED_ATTR_SIZE_VER0`).
const ATTRIBUTES: usize = 48;
const FLAG_RESET_ON_FORK: u64 = 1;
/// Reclaiming and overrun notice of SCHED_DEADLINE.
const FLAGS_OF_DEADLINE: u64 = 0b110;
/// The bit of a policy number that says the same as [`FLAG_RESET_ON_FORK`] in sched_setscheduler(2).
const RESET_ON_FORK: u32 = libc::SCHED_RESET_ON_FORK as u32;
const DEFAULT_SLACK: u64 = 50_000;
const IOPRIO_WHO_PROCESS: u64 = 1;
const IOPRIO_CLASS_SHIFT: u32 = 13;
const PIDTYPE_PID: u64 = 0;

/// The questions for a thread's scheduling.
pub struct Question {
    attributes: (Call, Out),
    nice: Call,
    slack: Call,
    io_priority: Call,
    cookie: (Call, Out),
}

/// How a thread is scheduled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scheduling {
    /// `SCHED_*`, with `SCHED_RESET_ON_FORK` if set.
    pub policy: u32,
    /// Nice value.
    pub nice: i32,
    /// Priority under a real-time policy.
    pub priority: u32,
    deadline: DeadlineEntry,
    slack: u64,
    io_priority: u32,
    /// Whether it shares a processor core only with threads of the same cookie, which images cannot hold yet.
    pub core_cookie: bool,
}

impl Question {
    /// Appends the questions.
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        let out = batch.space(ATTRIBUTES);
        let cookie = batch.space(8);
        let ask_cookie = [libc::PR_SCHED_CORE as u64, libc::PR_SCHED_CORE_GET as u64, 0, PIDTYPE_PID, cookie.addr.0];
        Self {
            attributes: (batch.call(libc::SYS_sched_getattr, &[0, out.addr.0, ATTRIBUTES as u64, 0]), out),
            nice: batch.call(libc::SYS_getpriority, &[u64::from(libc::PRIO_PROCESS), 0]),
            slack: batch.call(libc::SYS_prctl, &[libc::PR_GET_TIMERSLACK as u64]),
            io_priority: batch.call(libc::SYS_ioprio_get, &[IOPRIO_WHO_PROCESS, 0]),
            cookie: (batch.call(libc::SYS_prctl, &ask_cookie), cookie),
        }
    }

    /// The answers.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answer(&self, answers: &Answers<'_>) -> Result<Scheduling, TaskError> {
        let (call, out) = self.attributes;
        answers.value(call)?;
        let flags = answers.u64_at(out, 8);
        let reset = if flags & FLAG_RESET_ON_FORK != 0 { RESET_ON_FORK } else { 0 };
        Ok(Scheduling {
            policy: answers.u32_at(out, 4) | reset,
            // The system call, unlike its library function, tells 20 - nice, so that no value looks like an error.
            nice: 20 - answers.value(self.nice)? as i32,
            priority: answers.u32_at(out, 20),
            deadline: DeadlineEntry {
                runtime: answers.u64_at(out, 24),
                deadline: answers.u64_at(out, 32),
                period: answers.u64_at(out, 40),
                flags: flags & FLAGS_OF_DEADLINE,
            },
            slack: answers.value(self.slack)?,
            // A kernel without block devices has no I/O priorities.
            io_priority: answers.result(self.io_priority).unwrap_or(0) as u32,
            // Nor has one without CONFIG_SCHED_CORE cookies.
            core_cookie: answers.result(self.cookie.0).is_ok() && answers.u64_at(self.cookie.1, 0) != 0,
        })
    }
}

impl Scheduling {
    fn is(self, policies: &[i32]) -> bool {
        policies.contains(&((self.policy & !RESET_ON_FORK) as i32))
    }

    /// Whether the I/O priority is the one that follows from policy and nice value (block/ioprio.c).
    fn has_default_io_priority(self) -> bool {
        let (class, level) = (self.io_priority >> IOPRIO_CLASS_SHIFT, self.io_priority & 7);
        let expected = if self.is(&[libc::SCHED_FIFO, libc::SCHED_RR, libc::SCHED_DEADLINE]) {
            1
        } else if self.is(&[libc::SCHED_IDLE]) {
            3
        } else {
            2
        };
        class == 0 || (class == expected && level as i32 == (self.nice + 20) / 5)
    }

    /// Fills the fields of a thread's entry and of its extension.
    pub fn dump(self, entry: &mut ThreadCoreEntry, more: &mut FerryThreadEntry) {
        entry.sched_policy = Some(self.policy);
        entry.sched_nice = Some(self.nice);
        entry.sched_prio = self.is(&[libc::SCHED_FIFO, libc::SCHED_RR]).then_some(self.priority);
        more.deadline = self.is(&[libc::SCHED_DEADLINE]).then_some(self.deadline);
        // The kernel ignores a real-time thread's slack and shows none; it falls back to the default.
        more.timer_slack = (![0, DEFAULT_SLACK].contains(&self.slack)).then_some(self.slack);
        more.io_priority = (!self.has_default_io_priority()).then_some(self.io_priority);
    }
}

/// Appends the calls that set how a thread is scheduled.
pub fn restore_scheduling(
    batch: &mut Batch<'_>,
    entry: &ThreadCoreEntry,
    more: &FerryThreadEntry,
    checks: &mut Checks,
) {
    let slack = more.timer_slack.unwrap_or(DEFAULT_SLACK);
    checks.call(batch, "timer slack", libc::SYS_prctl, &[libc::PR_SET_TIMERSLACK as u64, slack]);
    if let Some(nice) = entry.sched_nice {
        let which = u64::from(libc::PRIO_PROCESS);
        checks.call(batch, format!("nice value {nice}"), libc::SYS_setpriority, &[which, 0, nice as i64 as u64]);
    }
    if let Some(priority) = more.io_priority {
        let arguments = [IOPRIO_WHO_PROCESS, 0, u64::from(priority)];
        checks.call(batch, format!("I/O priority {priority:#x}"), libc::SYS_ioprio_set, &arguments);
    }
    let Some(policy) = entry.sched_policy else { return };
    if let Some(budget) = more.deadline {
        let reset = if policy & RESET_ON_FORK != 0 { FLAG_RESET_ON_FORK } else { 0 };
        let head = (ATTRIBUTES as u64) | u64::from(policy & !RESET_ON_FORK) << 32;
        let words = [head, budget.flags | reset, 0, budget.runtime, budget.deadline, budget.period];
        let attributes = batch.bytes(words.map(u64::to_ne_bytes).as_flattened()).0;
        checks.call(batch, "SCHED_DEADLINE budget", libc::SYS_sched_setattr, &[0, attributes, 0]);
    } else {
        let priority = batch.bytes(&entry.sched_prio.unwrap_or(0).to_ne_bytes()).0;
        let what = format!("scheduling policy {policy:#x}");
        checks.call(batch, what, libc::SYS_sched_setscheduler, &[0, u64::from(policy), priority]);
    }
}
