//! Resource limits of a process (getrlimit(2)).
//!
//! Facts relied on: a process may always ask for its own limits, while prlimit(2) on another user's process needs
//! `CAP_SYS_RESOURCE`; so does raising a hard limit above the present one. Setting a limit to what it is always succeeds.

use super::{Checks, TaskError};
use crate::agent::{Answers, Batch, Call, Out};
use crate::images::core::{RlimitEntry, TaskRlimitsEntry};

/// `RLIM_NLIMITS`.
const LIMITS: u64 = 16;
const NAMES: [&str; LIMITS as usize] = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];

/// The questions for all limits.
pub struct Questions(Vec<(Call, Out)>);

impl Questions {
    /// Appends one prlimit(2) for each limit.
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        let ask = |resource| {
            let out = batch.space(16);
            (batch.call(libc::SYS_prlimit64, &[0, resource, 0, out.addr.0]), out)
        };
        Self((0..LIMITS).map(ask).collect())
    }

    /// The limits, in the order of their numbers.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answers(&self, answers: &Answers<'_>) -> Result<TaskRlimitsEntry, TaskError> {
        let limit = |(call, out): &(Call, Out)| {
            answers.value(*call)?;
            Ok(RlimitEntry { cur: answers.u64_at(*out, 0), max: answers.u64_at(*out, 8) })
        };
        Ok(TaskRlimitsEntry { rlimits: self.0.iter().map(limit).collect::<Result<_, TaskError>>()? })
    }
}

/// Appends the calls that set all limits of the runner's process.
///
/// Must come after everything that a low limit could hinder, and before credentials are given up.
pub fn restore_limits(batch: &mut Batch<'_>, limits: Option<&TaskRlimitsEntry>, checks: &mut Checks) {
    for (resource, limit) in limits.iter().flat_map(|limits| &limits.rlimits).take(NAMES.len()).enumerate() {
        let new = batch.bytes([limit.cur, limit.max].map(u64::to_ne_bytes).as_flattened()).0;
        let name = NAMES[resource];
        let what = format!(
            "{name} limit ({} soft, {} hard): a hard limit can be raised with CAP_SYS_RESOURCE only; start ferry with \
             at least this one",
            words(limit.cur),
            words(limit.max)
        );
        checks.call(batch, what, libc::SYS_prlimit64, &[0, resource as u64, new, 0]);
    }
}

fn words(limit: u64) -> String {
    if limit == u64::MAX { "unlimited".into() } else { limit.to_string() }
}
