//! ptrace(2) requests on a seized task.
//!
//! Facts relied on: `PTRACE_SEIZE` and `PTRACE_INTERRUPT` (Linux 3.4) stop a task without a signal;
//! a task that is stopped by them and whose tracer dies is detached and runs on (ptrace(2),
//! "Death under ptrace"); `PTRACE_GET_RSEQ_CONFIGURATION` needs Linux 5.13.
#![allow(unsafe_code)] // ptrace takes untyped pointers; each request's layout is fixed here.

use std::mem::{self, MaybeUninit};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::HostPid;

/// Kill the tracee when the tracer dies (ptrace(2), Linux 3.8).
pub const OPTION_EXITKILL: usize = libc::PTRACE_O_EXITKILL as usize;
/// Switch the tracee's seccomp filters off while it is traced (Linux 4.3, CAP_SYS_ADMIN).
pub const OPTION_SUSPEND_SECCOMP: usize = 1 << 21;

const MARK_SYSCALLS: usize = libc::PTRACE_O_TRACESYSGOOD as usize;

const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;
const GETSIGMASK: libc::c_uint = 0x420a;
const SETSIGMASK: libc::c_uint = 0x420b;
const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
const SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const SECCOMP_GET_METADATA: libc::c_uint = 0x420d;
const PEEKSIGINFO: libc::c_uint = 0x4209;
const PEEKSIGINFO_SHARED: u32 = 1;

/// The largest xsave area that any x86 processor reports today is near 11 KiB (AMX).
const MAX_XSAVE: usize = 16 << 10;

/// How a task was found when it reached its stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Stopped by our `PTRACE_INTERRUPT`; it ran or slept before.
    Interrupted,
    /// In a job-control stop, by this signal, before we came.
    Group(i32),
    /// About to take this signal, which has been taken off its queue.
    Signal(i32),
    /// At the entry or exit of a system call, as [`continue_to_syscall`] asked for.
    Syscall,
}

/// The rseq registration of a thread (rseq(2)).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RseqConfiguration {
    /// Address of the thread's `struct rseq`, 0 if none is registered.
    pub pointer: u64,
    /// Its size in bytes.
    pub size: u32,
    /// The signature that precedes abort handlers.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    pad: u32,
}

fn request(op: libc::c_uint, pid: HostPid, addr: usize, data: usize) -> nix::Result<i64> {
    Errno::clear();
    // SAFETY: every caller in this module passes, for `data`, either a number or a pointer to memory that is as large as
    // the request's layout says and outlives the call.
    let result = unsafe { libc::ptrace(op as _, pid.0, addr, data) };
    if result == -1 { Err(Errno::last()) } else { Ok(result) }
}

/// Attaches to one thread without stopping it.
///
/// Stops at system calls are marked (`PTRACE_O_TRACESYSGOOD`). Without that the kernel sends a thread SIGTRAP whose tracer dies when
/// it stands in such a stop that was not waited for yet (kernel/ptrace.c, exit_ptrace leaves the stop's code; ptrace_report_syscall
/// takes it for a signal, and the mark makes it none).
pub fn seize(tid: HostPid, options: usize) -> nix::Result<()> {
    request(libc::PTRACE_SEIZE as _, tid, 0, options | MARK_SYSCALLS).map(drop)
}

/// Changes the options given to [`seize`].
pub fn set_options(tid: HostPid, options: usize) -> nix::Result<()> {
    request(libc::PTRACE_SETOPTIONS as _, tid, 0, options | MARK_SYSCALLS).map(drop)
}

/// Asks a seized thread to stop; [`wait_stop`] awaits it.
pub fn interrupt(tid: HostPid) -> nix::Result<()> {
    request(libc::PTRACE_INTERRUPT as _, tid, 0, 0).map(drop)
}

/// Lets a stopped thread go on, still traced.
pub fn cont(tid: HostPid) -> nix::Result<()> {
    request(libc::PTRACE_CONT as _, tid, 0, 0).map(drop)
}

/// Lets a stopped thread go on to the next entry or exit of a system call.
pub fn continue_to_syscall(tid: HostPid) -> nix::Result<()> {
    request(libc::PTRACE_SYSCALL as _, tid, 0, 0).map(drop)
}

/// Lets a stopped thread go, delivering `signal` (0 for none).
pub fn detach(tid: HostPid, signal: i32) -> nix::Result<()> {
    request(libc::PTRACE_DETACH as _, tid, 0, signal as usize).map(drop)
}

/// Waits until an interrupted thread has stopped.
///
/// # Errors
/// `ESRCH` when the thread died instead.
pub fn wait_stop(tid: HostPid) -> nix::Result<Stop> {
    stop_of(waitpid(Pid::from_raw(tid.0), Some(WaitPidFlag::__WALL))?)
}

fn stop_of(status: WaitStatus) -> nix::Result<Stop> {
    match status {
        WaitStatus::PtraceEvent(_, signal, libc::PTRACE_EVENT_STOP) => Ok(match signal as i32 {
            libc::SIGTRAP => Stop::Interrupted,
            signal => Stop::Group(signal),
        }),
        WaitStatus::PtraceEvent(..) => Ok(Stop::Interrupted),
        WaitStatus::Stopped(_, signal) => Ok(Stop::Signal(signal as i32)),
        WaitStatus::PtraceSyscall(_) => Ok(Stop::Syscall),
        _ => Err(Errno::ESRCH),
    }
}

/// Whether an interrupted thread stands in the stop that was asked for, without waiting for it; signals that come before it are
/// delivered.
///
/// # Errors
/// `ESRCH` or `ECHILD` when the thread died instead.
pub fn poll_interrupted(tid: HostPid) -> nix::Result<Option<Stop>> {
    loop {
        match waitpid(Pid::from_raw(tid.0), Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive => return Ok(None),
            status => match stop_of(status)? {
                // The signal is off its queue: let the thread set up its handler, or take its action. The interrupt is
                // still pending and stops it before its next instruction.
                Stop::Signal(signal) => request(libc::PTRACE_CONT as _, tid, 0, signal as usize)?,
                stop => return Ok(Some(stop)),
            },
        };
    }
}

/// As [`poll_interrupted`], waiting for the stop until `deadline`.
///
/// # Errors
/// `ESRCH` or `ECHILD` when the thread died instead, `ETIMEDOUT` when it did not stop in time.
pub fn wait_interrupted_until(tid: HostPid, deadline: Instant) -> nix::Result<Stop> {
    loop {
        match poll_interrupted(tid)? {
            Some(stop) => return Ok(stop),
            None if Instant::now() > deadline => return Err(Errno::ETIMEDOUT),
            None => std::thread::sleep(Duration::from_micros(50)),
        }
    }
}

/// Waits until every one of these traced threads, which have been killed, has ended.
///
/// In no order, since they wait for each other: a leader's end is told when its other threads have been waited for, and the last
/// thread of a pid namespace's first process, whichever that is, ends when every other id of the namespace is free, those of
/// traced zombies included (kernel/pid_namespace.c, zap_pid_ns_processes).
pub fn reap(mut tids: Vec<HostPid>) {
    while !tids.is_empty() {
        let before = tids.len();
        tids.retain(|tid| {
            let status = waitpid(Pid::from_raw(tid.0), Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
            !matches!(status, Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(_))
        });
        if tids.len() == before {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// The thread's general registers.
pub fn registers(tid: HostPid) -> nix::Result<libc::user_regs_struct> {
    let mut registers = MaybeUninit::<libc::user_regs_struct>::uninit();
    let mut vector = libc::iovec { iov_base: registers.as_mut_ptr().cast(), iov_len: mem::size_of_val(&registers) };
    request(libc::PTRACE_GETREGSET as _, tid, NT_PRSTATUS, &raw mut vector as usize)?;
    if vector.iov_len != mem::size_of::<libc::user_regs_struct>() {
        return Err(Errno::ENOTSUP); // a 32-bit task
    }
    // SAFETY: the kernel has filled the whole structure, as the returned length says.
    Ok(unsafe { registers.assume_init() })
}

/// Replaces the thread's general registers.
pub fn set_registers(tid: HostPid, registers: &libc::user_regs_struct) -> nix::Result<()> {
    let mut vector =
        libc::iovec { iov_base: (&raw const *registers).cast_mut().cast(), iov_len: mem::size_of_val(registers) };
    request(libc::PTRACE_SETREGSET as _, tid, NT_PRSTATUS, &raw mut vector as usize).map(drop)
}

/// The thread's extended state, in the processor's standard (uncompacted) xsave layout.
pub fn xstate(tid: HostPid) -> nix::Result<Vec<u8>> {
    let mut area = vec![0u8; MAX_XSAVE];
    let mut vector = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    request(libc::PTRACE_GETREGSET as _, tid, NT_X86_XSTATE, &raw mut vector as usize)?;
    area.truncate(vector.iov_len);
    Ok(area)
}

/// Replaces the thread's extended state; `area` is as [`xstate`] returned it on a processor of the same features.
pub fn set_xstate(tid: HostPid, area: &[u8]) -> nix::Result<()> {
    let mut vector = libc::iovec { iov_base: area.as_ptr().cast_mut().cast(), iov_len: area.len() };
    request(libc::PTRACE_SETREGSET as _, tid, NT_X86_XSTATE, &raw mut vector as usize).map(drop)
}

/// The thread's blocked signals, bit `n - 1` for signal `n`.
pub fn signal_mask(tid: HostPid) -> nix::Result<u64> {
    let mut mask = 0u64;
    request(GETSIGMASK, tid, mem::size_of::<u64>(), &raw mut mask as usize)?;
    Ok(mask)
}

/// Replaces the thread's blocked signals.
pub fn set_signal_mask(tid: HostPid, mask: u64) -> nix::Result<()> {
    request(SETSIGMASK, tid, mem::size_of::<u64>(), &raw const mask as usize).map(drop)
}

/// The thread's rseq registration.
pub fn rseq_configuration(tid: HostPid) -> nix::Result<RseqConfiguration> {
    let mut configuration = RseqConfiguration::default();
    request(GET_RSEQ_CONFIGURATION, tid, mem::size_of::<RseqConfiguration>(), &raw mut configuration as usize)?;
    Ok(configuration)
}

/// One queue of pending signals: the raw `siginfo_t` of each, oldest first.
///
/// `shared` asks for the process's queue instead of the thread's own.
pub fn pending_signals(tid: HostPid, shared: bool) -> nix::Result<Vec<[u8; 128]>> {
    #[repr(C)]
    struct Arguments {
        offset: u64,
        flags: u32,
        count: i32,
    }
    const AT_ONCE: usize = 32;
    let mut signals = Vec::new();
    loop {
        let mut arguments = Arguments {
            offset: signals.len() as u64,
            flags: if shared { PEEKSIGINFO_SHARED } else { 0 },
            count: AT_ONCE as i32,
        };
        let mut block = [[0u8; 128]; AT_ONCE];
        let got = request(PEEKSIGINFO, tid, &raw mut arguments as usize, block.as_mut_ptr() as usize)? as usize;
        signals.extend_from_slice(&block[..got.min(AT_ONCE)]);
        if got < AT_ONCE {
            return Ok(signals);
        }
    }
}

/// Whether the thread has its system calls dispatched to itself (`PR_SET_SYSCALL_USER_DISPATCH`; the request is of Linux 6.4).
pub fn syscall_user_dispatch(tid: HostPid) -> nix::Result<bool> {
    let mut configuration = [0u64; 4];
    let data = configuration.as_mut_ptr() as usize;
    request(GET_SYSCALL_USER_DISPATCH_CONFIG, tid, mem::size_of_val(&configuration), data)?;
    Ok(configuration[0] != 0)
}

/// The raw `siginfo_t` of the signal that the thread is about to take ([`Stop::Signal`]).
pub fn signal_info(tid: HostPid) -> nix::Result<[u8; 128]> {
    let mut info = [0u8; 128];
    request(libc::PTRACE_GETSIGINFO as _, tid, 0, info.as_mut_ptr() as usize)?;
    Ok(info)
}

/// The thread's seccomp filter number `index`, newest first, as raw BPF instructions.
///
/// # Errors
/// `ENOENT` past the last filter; `EINVAL` when the thread has no filter.
pub fn seccomp_filter(tid: HostPid, index: usize) -> nix::Result<Vec<libc::sock_filter>> {
    let length = request(SECCOMP_GET_FILTER, tid, index, 0)? as usize;
    let mut filter = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; length];
    request(SECCOMP_GET_FILTER, tid, index, filter.as_mut_ptr() as usize)?;
    Ok(filter)
}

/// The `SECCOMP_FILTER_FLAG_*` bits of filter number `index`.
pub fn seccomp_filter_flags(tid: HostPid, index: usize) -> nix::Result<u64> {
    let mut metadata = [index as u64, 0];
    request(SECCOMP_GET_METADATA, tid, mem::size_of_val(&metadata), metadata.as_mut_ptr() as usize)?;
    Ok(metadata[1])
}
