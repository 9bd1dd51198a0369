//! On which processor a thread of ferry runs, and how long it may keep that when others wait (sched_setaffinity(2),
//! sched_setattr(2)).
//!
//! Facts relied on: a thread is moved at once when it may not stay where it is, and stays then for as long as it runs; one that is
//! woken is put on the processor where it ran last, or on the waking thread's. Since Linux 6.12 `sched_runtime` of an ordinary thread is the length of its slice, from 0.1 to 100 ms; before that
//! it has no effect. The thread's share of the processor stays the same.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::time::Duration;

use nix::errno::Errno;
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

/// Gives the calling thread slices of this length, if its policy has any.
///
/// # Errors
/// Those of sched_setattr(2).
pub fn set_slice(length: Duration) -> nix::Result<()> {
    const SIZE: libc::c_uint = size_of::<libc::sched_attr>() as libc::c_uint;
    let mut attributes = MaybeUninit::<libc::sched_attr>::zeroed();
    let pointer = attributes.as_mut_ptr();
    // SAFETY: `pointer` is valid for writes of the length that is passed.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, pointer, SIZE, 0) })?;
    // SAFETY: integers, all zero before the kernel filled them in.
    let mut attributes = unsafe { attributes.assume_init() };
    if ![libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&(attributes.sched_policy as libc::c_int)) {
        return Ok(());
    }
    attributes.size = SIZE;
    attributes.sched_runtime = length.as_nanos() as u64;
    // SAFETY: the structure is valid for the length that it names, and only read.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) }).map(drop)
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

    #[test]
    fn the_thread_keeps_its_nice_value_and_policy() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        set_slice(Duration::from_micros(200)).unwrap();
        assert_eq!(nice(), before);
    }
}
