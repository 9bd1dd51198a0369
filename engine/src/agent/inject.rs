//! Bringing the runner into a stopped task, and out again.
//!
//! One injected mmap(2) makes the shared area; it goes through a `syscall` instruction that the task has already, so
//! not a byte of its memory is changed. `/proc/PID/map_files` (`CAP_CHECKPOINT_RESTORE`, Linux 5.9) gives ferry the
//! same memory.
//!
//! Stops at the entry and exit of the call are used, not single steps: a step ends in a SIGTRAP, which would reset
//! the task's own action for that signal if it were blocked or ignored.

use std::fs::File;
use std::slice;

use nix::errno::Errno;

use super::arch::{self, Registers};
use super::{AgentError, Area, Runner, watch};
use crate::sys::robust::RobustList;
use crate::sys::shared::SharedMemory;
use crate::sys::{HostPid, PAGE_SIZE, RemoteAddr, process_vm, ptrace};

/// A slot large enough for a leader's batches: thousands of calls and their data.
const LEADER_SLOT: usize = 256 << 10;
/// A slot for the few questions that only a thread itself can answer.
const THREAD_SLOT: usize = 32 << 10;

/// What a stopped thread was about to do.
#[derive(Clone)]
pub struct Context {
    /// General registers, as found.
    pub registers: Registers,
    /// Extended state (xsave layout).
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub mask: u64,
}

impl Context {
    /// Reads the context of a thread in a ptrace stop.
    pub fn collect(tid: HostPid) -> Result<Self, AgentError> {
        let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
        Ok(Self {
            registers: ptrace::registers(tid).map_err(failed("read its registers"))?,
            xstate: ptrace::xstate(tid).map_err(failed("read its extended registers"))?,
            mask: ptrace::signal_mask(tid).map_err(failed("read its signal mask"))?,
        })
    }

    /// Puts the general registers and the signal mask back; the runner never touches the extended state.
    fn put_back(&self, tid: HostPid) -> Result<(), AgentError> {
        let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
        ptrace::set_registers(tid, &self.registers).map_err(failed("put back its registers"))?;
        ptrace::set_signal_mask(tid, self.mask).map_err(failed("put back its signal mask"))
    }
}

/// Finds a `syscall` instruction in the executable ranges of a task, in the order given: the vdso should come first.
pub fn find_syscall_instruction(
    tid: HostPid,
    executable: impl IntoIterator<Item = std::ops::Range<u64>>,
) -> Result<RemoteAddr, AgentError> {
    const BLOCK: u64 = 64 << 10;
    let mut block = Vec::new();
    for range in executable {
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + BLOCK);
            block.resize((end - start) as usize, 0);
            let got = process_vm::read(tid, slice::from_ref(&(start..end)), &mut block).unwrap_or(0);
            let found = block[..got].windows(2).position(|bytes| bytes == arch::SYSCALL_INSTRUCTION);
            if let Some(at) = found {
                return Ok(RemoteAddr(start + at as u64));
            }
            start = end;
        }
    }
    Err(AgentError::NoSyscallInstruction { tid })
}

/// Executes one system call in a thread that is in a ptrace stop, and leaves it in one.
///
/// General registers and signal mask are the caller's to put back. All signals stay blocked meanwhile.
pub fn call_once(
    tid: HostPid,
    base: &Registers,
    syscall_at: RemoteAddr,
    number: i64,
    arguments: [u64; 6],
) -> Result<u64, AgentError> {
    let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
    ptrace::set_signal_mask(tid, u64::MAX).map_err(failed("block its signals"))?;
    ptrace::set_registers(tid, &arch::call_registers(base, syscall_at, number, arguments))
        .map_err(failed("set its registers"))?;
    let mut passed = 0;
    while passed < ["entry", "exit"].len() {
        ptrace::continue_to_syscall(tid).map_err(failed("run a system call in it"))?;
        // A task that SIGSTOP had stopped owes us one more stop, for our interrupt, before it gets to the call.
        let stop = ptrace::wait_stop(tid).map_err(failed("await a system call in it"))?;
        passed += usize::from(matches!(stop, ptrace::Stop::Signal(_)));
    }
    let after = ptrace::registers(tid).map_err(failed("read a system call's result"))?;
    match arch::call_result(&after) {
        error @ -4095..0 => Err(AgentError::Call { tid, number, index: 0, errno: Errno::from_raw(-error as i32) }),
        value => Ok(value as u64),
    }
}

/// The agents of one process: the leader's, and those of other threads where they were needed.
pub struct Injected {
    leader: HostPid,
    syscall_at: RemoteAddr,
    area: Area,
    runners: Vec<(Runner, Context)>,
}

impl Injected {
    /// Makes the shared area in the process of `leader`, which is in a ptrace stop with `context`, and starts the
    /// runner there. `threads` more may [`Self::enter`] later.
    ///
    /// On an error the thread is in its stop with its context put back, or dead.
    pub fn new(
        leader: HostPid,
        context: &Context,
        syscall_at: RemoteAddr,
        threads: usize,
        list: &mut RobustList,
    ) -> Result<Self, AgentError> {
        let len = (PAGE_SIZE as usize + LEADER_SLOT + threads * THREAD_SLOT) as u64;
        let protection = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
        let mapped =
            call_once(leader, &context.registers, syscall_at, libc::SYS_mmap, [0, len, protection, flags, u64::MAX, 0]);
        let start = mapped.inspect_err(|_| drop(context.put_back(leader)))?;
        let area = Self::open_area(leader, start, len).inspect_err(|_| {
            let _ = call_once(leader, &context.registers, syscall_at, libc::SYS_munmap, [start, len, 0, 0, 0, 0]);
            let _ = context.put_back(leader);
        })?;
        let mut injected = Self { leader, syscall_at, area, runners: Vec::with_capacity(threads + 1) };
        injected.start(leader, context, LEADER_SLOT, list)?;
        Ok(injected)
    }

    fn open_area(leader: HostPid, start: u64, len: u64) -> Result<Area, AgentError> {
        let path = format!("/proc/{leader}/map_files/{start:x}-{:x}", start + len);
        let failed = |step| move |errno| AgentError::Inject { tid: leader, step, errno };
        let file = File::options().read(true).write(true).open(&path).map_err(|error| AgentError::Inject {
            tid: leader,
            step: "open the memory shared with it (CAP_CHECKPOINT_RESTORE is needed)",
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        })?;
        let memory =
            SharedMemory::map(&file, len as usize, None, false).map_err(failed("map the memory shared with it"))?;
        Ok(Area::new(memory, RemoteAddr(start)))
    }

    fn start(
        &mut self,
        tid: HostPid,
        context: &Context,
        slot_len: usize,
        list: &mut RobustList,
    ) -> Result<(), AgentError> {
        let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
        let mut slot = self.area.slot(slot_len).ok_or(AgentError::Full { tid })?;
        slot.set_death_frame(arch::signal_frame_size(&context.xstate), |at| {
            // rt_sigreturn restarts nothing: an interrupted call has to be set up to be made again.
            let mut registers = context.registers;
            arch::restart_interrupted_call(&mut registers);
            arch::signal_frame(at, &registers, context.mask, &context.xstate)
        });
        watch(list, &slot);
        let registers = arch::runner_registers(&context.registers, self.area.code(), slot.remote());
        ptrace::set_signal_mask(tid, u64::MAX).map_err(failed("block its signals"))?;
        ptrace::set_registers(tid, &registers).map_err(failed("set its registers"))?;
        ptrace::cont(tid).map_err(failed("start the agent in it"))?;
        self.runners.push((Runner::new(tid, slot), context.clone()));
        Ok(())
    }

    /// Starts a runner in another thread of the process, which is in a ptrace stop with `context`.
    pub fn enter(&mut self, tid: HostPid, context: &Context, list: &mut RobustList) -> Result<&Runner, AgentError> {
        self.start(tid, context, THREAD_SLOT, list)?;
        Ok(&self.runners[self.runners.len() - 1].0)
    }

    /// The leader's runner.
    pub fn leader(&self) -> &Runner {
        &self.runners[0].0
    }

    /// All runners, the leader's first.
    pub fn runners(&self) -> impl Iterator<Item = &Runner> {
        self.runners.iter().map(|(runner, _)| runner)
    }

    /// Where the process sees the shared area, which is no memory of its own.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.area.range()
    }

    /// Stops every thread, takes the area out and puts every context back. The threads are left in ptrace stops.
    ///
    /// Goes on after an error, so that as much as possible is put right; returns the first.
    pub fn leave(self) -> Result<(), AgentError> {
        let mut first = Ok(());
        let mut note = |result: Result<(), AgentError>| {
            if first.is_ok() {
                first = result;
            }
        };
        for (runner, _) in &self.runners {
            let tid = runner.tid();
            let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
            note(ptrace::interrupt(tid).map_err(failed("stop the agent in it")));
        }
        for (runner, context) in self.runners.iter().rev() {
            let tid = runner.tid();
            let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
            let stopped = ptrace::wait_stop(tid).map_err(failed("await the agent's stop")).map(drop);
            let alive = stopped.is_ok();
            note(stopped);
            if !alive {
                continue;
            }
            if tid == self.leader {
                let range = self.area.range();
                let arguments = [range.start, range.end - range.start, 0, 0, 0, 0];
                note(call_once(tid, &context.registers, self.syscall_at, libc::SYS_munmap, arguments).map(drop));
            }
            note(context.put_back(tid));
        }
        first
    }
}
