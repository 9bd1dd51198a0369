//! Putting the tasks right whose ferry was killed while agents were in them.
//!
//! A runner whose ferry dies returns by itself to what its thread was doing; a parked thread ([`super::inject`]) waits in
//! pause(2) with its signals blocked, or circles where the call that it was in has left it ([`super::landing`]); and each leaves the
//! area mapped. Every thread is stopped once more: one that is not its own self yet gets its noted registers and mask back, as a dump
//! would have given them. Then one of them unmaps the area.
//!
//! Nothing waits without end: a thread that does not stop, because it is frozen or in uninterruptible sleep, is left to its
//! runner, which wakes with it. One that could run is waited for longer.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::arch;
use super::inject::call_once;
use crate::journal::{AreaNote, Changed, Place, ThreadNote};
use crate::procfs;
use crate::sys::HostPid;
use crate::sys::ptrace;

/// How often a thread that has only to get a processor is looked at.
const GLANCE: Duration = Duration::from_millis(100);
/// How long the threads of one process are waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same for a thread that has only to get a processor. Of a victim that kept all of them busy, one thread in some hundred needed
/// more than the above (Linux 6.18, whose scheduler lets a task starve for 12 s).
const FOR_A_PROCESSOR: Duration = Duration::from_secs(120);

/// What could not be put right.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub(crate) enum RecoverError {
    #[error("its threads cannot be listed: {0}")]
    List(std::io::Error),
    #[error("thread {tid} cannot be stopped: {errno}")]
    Stop { tid: HostPid, errno: Errno },
    #[error("thread {tid} cannot be given its registers back: {errno}")]
    Registers { tid: HostPid, errno: Errno },
    #[error("the userfaultfd {number} that ferry had it make cannot be closed: {source}")]
    Close { number: u32, source: super::AgentError },
    #[error("{} bytes of ferry's memory cannot be unmapped at {:x}: {source}", .range.end - .range.start, .range.start)]
    Unmap { range: std::ops::Range<u64>, source: super::AgentError },
}

/// Puts one process right. `done` is told each note of a thread that is its own self again, before the thread runs on: what it
/// changes from then on is not to be put back.
pub(crate) fn recover(area: &AreaNote, notes: &[ThreadNote], done: &dyn Fn(Place)) -> Result<(), RecoverError> {
    let mut stopped = Stopped(Vec::new());
    let deadline = Instant::now() + PATIENCE;
    for tid in procfs::threads(area.leader).map_err(RecoverError::List)? {
        match stop(tid, deadline) {
            Ok(()) => stopped.0.push(tid),
            // It has ended, or is ending.
            Err(Errno::ESRCH) => {}
            Err(errno) => return Err(RecoverError::Stop { tid, errno }),
        }
    }
    let mut area = area.clone();
    for note in notes.iter().filter(|note| stopped.0.contains(&note.tid)) {
        let failed = |errno| RecoverError::Registers { tid: note.tid, errno };
        put_right(&mut area, note).map_err(failed)?;
        done(note.place);
    }
    // A leader that has exited while its threads run on runs nothing any more.
    let Some(tid) = stopped.0.iter().find(|tid| !is_zombie(**tid)) else { return Ok(()) };
    if let Some(number) = area.userfaultfd.filter(|number| is_userfaultfd(area.leader, *number)) {
        call(*tid, &area, libc::SYS_close, [number.into(), 0, 0, 0, 0, 0])
            .map_err(|source| RecoverError::Close { number, source })?;
    }
    if is_mapped(&area) {
        let (start, len) = (area.range.start, area.range.end - area.range.start);
        call(*tid, &area, libc::SYS_munmap, [start, len, 0, 0, 0, 0])
            .map_err(|source| RecoverError::Unmap { range: area.range.clone(), source })?;
    }
    Ok(())
}

/// Whether the process has a userfaultfd by this number. It had no descriptor there before ferry's.
fn is_userfaultfd(pid: HostPid, number: u32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/fd/{number}"))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
}

fn stop(tid: HostPid, deadline: Instant) -> nix::Result<()> {
    loop {
        match ptrace::seize(tid, ptrace::OPTION_SUSPEND_SECCOMP) {
            // The kernel has not yet let go of it in the name of the process that was killed.
            Err(Errno::EPERM) if Instant::now() < deadline && !is_zombie(tid) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(Errno::EPERM) => return Err(if is_zombie(tid) { Errno::ESRCH } else { Errno::EPERM }),
            result => break result?,
        }
    }
    ptrace::interrupt(tid)?;
    let last = deadline + FOR_A_PROCESSOR;
    loop {
        match ptrace::wait_interrupted_until(tid, deadline.max(Instant::now() + GLANCE)) {
            Err(Errno::ETIMEDOUT) if could_run(tid) && Instant::now() < last => {}
            result => return result.map(drop),
        }
    }
}

/// Whether the thread waits for nothing but a processor.
fn could_run(tid: HostPid) -> bool {
    procfs::Stat::read(tid).is_ok_and(|stat| stat.state == 'R')
}

fn is_zombie(tid: HostPid) -> bool {
    procfs::Stat::read(tid).map_or(true, |stat| matches!(stat.state, 'Z' | 'X'))
}

/// Gives a thread back what it was noted with, if it is not its own self. One that has just mapped the area tells where it is.
fn put_right(area: &mut AreaNote, note: &ThreadNote) -> nix::Result<()> {
    let now = ptrace::registers(note.tid)?;
    let has_landed = area.foothold.landing.is_some_and(|landing| landing.at.0 == now.rip);
    if has_landed && area.range.start == 0 && arch::call_result(&now) > 0 {
        area.range = now.rax..now.rax.saturating_add(area.range.end);
    }
    if has_landed || area.range.contains(&now.rip) || arch::is_parked(&now, area.foothold.syscall_at) {
        ptrace::set_registers(note.tid, &note.registers)?;
    } else if note.changed == Changed::Registers {
        // Its runner has returned, with the mask.
        return Ok(());
    }
    ptrace::set_signal_mask(note.tid, note.mask)
}

/// Whether the area is there: the process may have called execve(2) since.
fn is_mapped(area: &AreaNote) -> bool {
    if area.range.start == 0 {
        return false;
    }
    let line = format!("{:08x}-{:08x} rwxs ", area.range.start, area.range.end);
    std::fs::read_to_string(format!("/proc/{}/maps", area.leader))
        .is_ok_and(|maps| maps.lines().any(|it| it.starts_with(&line)))
}

/// Has a thread, which is its own self, make a call.
fn call(tid: HostPid, area: &AreaNote, number: i64, arguments: [u64; 6]) -> Result<(), super::AgentError> {
    let failed = |step| move |errno| super::AgentError::Inject { tid, step, errno };
    let registers = ptrace::registers(tid).map_err(failed("read its registers"))?;
    let mask = ptrace::signal_mask(tid).map_err(failed("read its signal mask"))?;
    let at = area.foothold.syscall_at;
    let called = call_once(tid, &registers, at, number, arguments);
    let back = ptrace::set_registers(tid, &registers).and_then(|()| ptrace::set_signal_mask(tid, mask));
    called.map(drop)?;
    back.map_err(failed("put back its registers"))
}

/// Threads that are let go in any case.
struct Stopped(Vec<HostPid>);

impl Drop for Stopped {
    fn drop(&mut self) {
        for tid in &self.0 {
            // One that has ended meanwhile needs no detaching.
            let _ = ptrace::detach(*tid, 0);
        }
    }
}
