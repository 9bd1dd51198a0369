//! Scheduling of a thread: policy, nice value, priority.
//!
//! Facts relied on: sched_getattr(2) (Linux 3.14) tells policy, priority and flags; the kernel keeps the nice value under
//! every policy, and only getpriority(2) tells it under all of them. Raising priority needs `CAP_SYS_NICE`, so this comes
//! before credentials.

use super::{Checks, TaskError};
use crate::agent::{Answers, Batch, Call, Out};
use crate::images::core::ThreadCoreEntry;

/// `struct sched_attr` as of Linux 3.14 (`SCHED_ATTR_SIZE_VER0`).
const ATTRIBUTES: usize = 48;
const FLAG_RESET_ON_FORK: u64 = 1;
/// The bit of a policy number that says the same in sched_setscheduler(2).
const RESET_ON_FORK: u32 = libc::SCHED_RESET_ON_FORK as u32;

/// The question for a thread's scheduling.
pub struct Question {
    attributes: (Call, Out),
    nice: Call,
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
}

impl Question {
    /// Appends sched_getattr(2) and getpriority(2).
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        let out = batch.space(ATTRIBUTES);
        Self {
            attributes: (batch.call(libc::SYS_sched_getattr, &[0, out.addr.0, ATTRIBUTES as u64, 0]), out),
            nice: batch.call(libc::SYS_getpriority, &[u64::from(libc::PRIO_PROCESS), 0]),
        }
    }

    /// The answer.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answer(&self, answers: &Answers<'_>) -> Result<Scheduling, TaskError> {
        let (call, out) = self.attributes;
        answers.value(call)?;
        let reset = if answers.u64_at(out, 8) & FLAG_RESET_ON_FORK != 0 { RESET_ON_FORK } else { 0 };
        Ok(Scheduling {
            policy: answers.u32_at(out, 4) | reset,
            // The system call, unlike its library function, tells 20 - nice, so that no value looks like an error.
            nice: 20 - answers.value(self.nice)? as i32,
            priority: answers.u32_at(out, 20),
        })
    }
}

impl Scheduling {
    /// Whether the policy is one that an image can hold: SCHED_DEADLINE's budget has no place there.
    pub fn is_supported(self) -> bool {
        self.policy & !RESET_ON_FORK != libc::SCHED_DEADLINE as u32
    }

    /// Whether the policy takes a priority.
    fn is_real_time(self) -> bool {
        matches!((self.policy & !RESET_ON_FORK) as i32, libc::SCHED_FIFO | libc::SCHED_RR)
    }

    /// Fills the fields of `entry`.
    pub fn dump(self, entry: &mut ThreadCoreEntry) {
        entry.sched_policy = Some(self.policy);
        entry.sched_nice = Some(self.nice);
        entry.sched_prio = self.is_real_time().then_some(self.priority);
    }
}

/// Appends the calls that set policy, nice value and priority of `entry`.
pub fn restore_scheduling(batch: &mut Batch<'_>, entry: &ThreadCoreEntry, checks: &mut Checks) {
    if let Some(nice) = entry.sched_nice {
        let which = u64::from(libc::PRIO_PROCESS);
        checks.call(batch, format!("nice value {nice}"), libc::SYS_setpriority, &[which, 0, nice as i64 as u64]);
    }
    if let Some(policy) = entry.sched_policy {
        let priority = batch.bytes(&entry.sched_prio.unwrap_or(0).to_ne_bytes()).0;
        let what = format!("scheduling policy {policy:#x}");
        checks.call(batch, what, libc::SYS_sched_setscheduler, &[0, u64::from(policy), priority]);
    }
}
