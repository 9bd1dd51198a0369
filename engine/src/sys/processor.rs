//! On which processor a thread of ferry runs (sched_setaffinity(2)).
//!
//! Facts relied on: a thread is moved at once when it may not stay where it is, and stays then for as long as it runs; one that is
//! woken is put on the processor where it ran last, or on the waking thread's.

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

/// Moves the calling thread to a processor, if it may run there. It is free to leave again.
///
/// # Errors
/// Those of sched_setaffinity(2); the thread may run where it could before.
pub fn go_to(processor: usize) -> nix::Result<()> {
    let mut only = CpuSet::new();
    only.set(processor)?;
    pass_through(|allowed| if allowed.is_set(processor) == Ok(true) { only } else { allowed })
}

/// Moves the calling thread away from a processor, if it may run on any other. It is free to return.
///
/// # Errors
/// As [`go_to`].
pub fn leave(processor: usize) -> nix::Result<()> {
    pass_through(|allowed| {
        let mut others = allowed;
        if others.unset(processor).is_ok() && others != CpuSet::new() { others } else { allowed }
    })
}

/// Allows the calling thread nothing but what `choose` makes of its mask, then its mask again.
fn pass_through(choose: impl FnOnce(CpuSet) -> CpuSet) -> nix::Result<()> {
    let myself = Pid::from_raw(0);
    let allowed = sched_getaffinity(myself)?;
    let chosen = choose(allowed);
    if sched_getcpu().is_ok_and(|here| chosen.is_set(here) == Ok(true)) {
        return Ok(());
    }
    sched_setaffinity(myself, &chosen)?;
    sched_setaffinity(myself, &allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_run_where_it_could_before() {
        let before = sched_getaffinity(Pid::from_raw(0)).unwrap();
        for processor in [0, 1, CpuSet::count() - 1, CpuSet::count()] {
            let _ = go_to(processor);
            let _ = leave(processor);
            assert_eq!(sched_getaffinity(Pid::from_raw(0)).unwrap(), before);
        }
    }
}
