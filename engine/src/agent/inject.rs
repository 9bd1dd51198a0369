//! Bringing the runner into a stopped task, and out again.
//!
//! At each instant of this ferry may be killed, and the kernel then lets the thread run on with the registers that it has. Those
//! are its own; or the runner's, which returns to its own; or they make it *park*: call pause(2) with all signals blocked,
//! until the watcher of the dump ([`crate::journal`]) puts it right. While mmap(2) or munmap(2) are in the place of that call, they
//! make it circle ([`super::landing`]), where the program has code for that: see `docs/freezing.md`, "If ferry dies".
//!
//! One injected mmap(2) makes the shared area; it goes through a `syscall` instruction that the task has already, so
//! not a byte of its memory is changed. `/proc/PID/map_files` (`CAP_CHECKPOINT_RESTORE`, Linux 5.9) gives ferry the
//! same memory.
//!
//! Stops at the entry and exit of the call are used, not single steps: a step ends in a SIGTRAP, which would reset
//! the task's own action for that signal if it were blocked or ignored.

use std::cell::Cell;
use std::fs::File;
use std::slice;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::arch::{self, Registers};
use super::landing::Foothold;
use super::{AgentError, Area, Runner, watch};
use crate::fault::{DumpStep, Interrupted};
use crate::journal::{Changed, Journal, Place};
use crate::sys::robust::RobustList;
use crate::sys::shared::SharedMemory;
use crate::sys::{HostPid, PAGE_SIZE, RemoteAddr, process_vm, ptrace};
use crate::task::signals::signal_of;

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
}

/// Who looks on while agents go in and out.
#[derive(Clone, Copy)]
pub struct Overseer<'a> {
    /// Where what is in tasks is noted.
    pub journal: Option<&'a Journal>,
    /// Passed between steps, and may give up.
    pub pass: &'a dyn Fn(DumpStep) -> Result<(), Interrupted>,
}

impl Default for Overseer<'_> {
    /// Nobody.
    fn default() -> Self {
        Self { journal: None, pass: &|_| Ok(()) }
    }
}

/// A thread that is, or may be, other than itself.
struct Taken {
    tid: HostPid,
    context: Context,
    note: Option<Place>,
}

impl Taken {
    fn take(tid: HostPid, context: &Context, overseer: &Overseer<'_>) -> Self {
        let note = overseer.journal.and_then(|journal| journal.thread(tid, &context.registers, context.mask));
        Self { tid, context: context.clone(), note }
    }

    /// Parks the thread, which is in a ptrace stop.
    fn park(&self, at: RemoteAddr, overseer: &Overseer<'_>) -> Result<(), AgentError> {
        self.noted(overseer, |journal, note| journal.changed(note, Changed::Mask));
        park(self.tid, &self.context.registers, at)?;
        self.noted(overseer, |journal, note| journal.changed(note, Changed::Registers));
        Ok(())
    }

    /// Puts the general registers and the signal mask back; the runner never touches the extended state.
    ///
    /// A thread whose registers are the runner's gets its mask first, so that it is safe in between; a parked thread must keep
    /// its signals blocked until it has its registers.
    fn put_back(&self, parked: bool, overseer: &Overseer<'_>) -> Result<(), AgentError> {
        let tid = self.tid;
        let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
        let mask = || ptrace::set_signal_mask(tid, self.context.mask).map_err(failed("put back its signal mask"));
        let registers =
            || ptrace::set_registers(tid, &self.context.registers).map_err(failed("put back its registers"));
        if parked {
            self.noted(overseer, |journal, note| journal.changed(note, Changed::Mask));
            registers()?;
            mask()?;
        } else {
            mask()?;
            registers()?;
        }
        self.noted(overseer, Journal::forget);
        Ok(())
    }

    fn noted(&self, overseer: &Overseer<'_>, tell: impl FnOnce(&Journal, Place)) {
        if let Some((journal, note)) = overseer.journal.zip(self.note) {
            tell(journal, note);
        }
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

/// Makes a thread in a ptrace stop call pause(2) with all signals blocked, should it go on.
pub(crate) fn park(tid: HostPid, base: &Registers, syscall_at: RemoteAddr) -> Result<(), AgentError> {
    let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
    ptrace::set_signal_mask(tid, u64::MAX).map_err(failed("block its signals"))?;
    ptrace::set_registers(tid, &arch::parked_registers(base, syscall_at)).map_err(failed("set its registers"))
}

/// Executes one system call in a parked thread in a ptrace stop, and leaves it so.
///
/// It is the entry of pause(2) that becomes the call, and at its exit the thread is parked again. `entered` is called between the two,
/// and `done` with what the call returned, unless that is an error,
/// before the thread is parked.
fn call_parked(
    tid: HostPid,
    foothold: Foothold,
    (number, arguments): (i64, [u64; 6]),
    withheld: &Withheld,
    entered: impl FnOnce(),
    done: impl FnOnce(u64),
) -> Result<u64, AgentError> {
    let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
    to_next_edge(tid, withheld).map_err(failed("run a system call in it"))?;
    let entry = ptrace::registers(tid).map_err(failed("read its registers"))?;
    ptrace::set_registers(tid, &arch::call_registers(&entry, number, arguments, foothold.landing))
        .map_err(failed("set its registers"))?;
    entered();
    to_next_edge(tid, withheld).map_err(failed("run a system call in it"))?;
    let after = ptrace::registers(tid).map_err(failed("read a system call's result"))?;
    let result = arch::call_result(&after);
    if result >= 0 {
        done(after.rax);
    }
    ptrace::set_registers(tid, &arch::parked_registers(&after, foothold.syscall_at))
        .map_err(failed("set its registers"))?;
    match result {
        error @ -4095..0 => Err(AgentError::Call { tid, number, index: 0, errno: Errno::from_raw(-error as i32) }),
        value => Ok(value as u64),
    }
}

/// Whether a SIGSTOP was taken off a queue, which no mask holds back. It must not stop the process now, and not be lost either.
#[derive(Default)]
struct Withheld(Cell<bool>);

impl Withheld {
    /// Sends it to the process of `leader` again, once for all: they say no more than one does.
    fn give_back(&self, leader: HostPid) -> nix::Result<()> {
        if self.0.take() { kill(Pid::from_raw(leader.0), Signal::SIGSTOP) } else { Ok(()) }
    }
}

/// Lets a thread run to the entry or the exit of its system call.
fn to_next_edge(tid: HostPid, withheld: &Withheld) -> nix::Result<()> {
    loop {
        ptrace::continue_to_syscall(tid)?;
        match ptrace::wait_stop(tid)? {
            ptrace::Stop::Syscall => return Ok(()),
            ptrace::Stop::Signal(libc::SIGSTOP) => withheld.0.set(true),
            // A task that SIGSTOP had stopped owes us one more stop, for our interrupt, before it gets to the call.
            _ => {}
        }
    }
}

/// Executes one system call in a thread that is in a ptrace stop, and leaves it in one, parked.
///
/// General registers and signal mask are the caller's to put back. All signals stay blocked meanwhile.
pub fn call_once(
    tid: HostPid,
    base: &Registers,
    syscall_at: RemoteAddr,
    number: i64,
    arguments: [u64; 6],
) -> Result<u64, AgentError> {
    let withheld = Withheld::default();
    park(tid, base, syscall_at)?;
    let result = call_parked(tid, syscall_at.into(), (number, arguments), &withheld, || (), |_| ());
    withheld.give_back(tid).map_err(|errno| AgentError::Inject { tid, step: "give back its SIGSTOP", errno })?;
    result
}

/// The agents of one process: the leader's, and those of other threads where they were needed.
pub struct Injected<'a> {
    overseer: Overseer<'a>,
    foothold: Foothold,
    /// The first is the leader, which is parked until its runner starts.
    taken: Vec<Taken>,
    runners: Vec<Runner>,
    /// What is mapped, whether or not ferry has it too.
    mapped: Option<std::ops::Range<u64>>,
    area: Option<Area>,
    note: Option<Place>,
    withheld: Withheld,
}

impl<'a> Injected<'a> {
    /// Makes the shared area in the process of `leader`, which is in a ptrace stop with `context`, and starts the
    /// runner there. `threads` more may [`Self::enter`] later.
    ///
    /// On an error the thread is in its stop with its context put back, or dead.
    pub fn new(
        leader: HostPid,
        context: &Context,
        foothold: impl Into<Foothold>,
        threads: usize,
        list: &mut RobustList,
        overseer: Overseer<'a>,
    ) -> Result<Self, AgentError> {
        let len = (PAGE_SIZE as usize + LEADER_SLOT + threads * THREAD_SLOT) as u64;
        let foothold = foothold.into();
        let note = overseer.journal.and_then(|journal| journal.area(leader, len, foothold));
        let taken = vec![Taken::take(leader, context, &overseer)];
        let mut injected = Self {
            overseer,
            foothold,
            taken,
            runners: Vec::new(),
            mapped: None,
            area: None,
            note,
            withheld: Withheld::default(),
        };
        match injected.set_up(len, list) {
            Ok(()) => Ok(injected),
            Err(error) => {
                // The first error is the one to tell.
                let _ = injected.leave();
                Err(error)
            }
        }
    }

    fn set_up(&mut self, len: u64, list: &mut RobustList) -> Result<(), AgentError> {
        let leader = &self.taken[0];
        leader.park(self.foothold.syscall_at, &self.overseer)?;
        (self.overseer.pass)(DumpStep::Call)?;
        let protection = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
        let arguments = [0, len, protection, flags, u64::MAX, 0];
        let tid = leader.tid;
        let mut passed = Ok(());
        let entered = || passed = (self.overseer.pass)(DumpStep::Mapping);
        let noted = |start| {
            if let Some((journal, note)) = self.overseer.journal.zip(self.note) {
                journal.mapped(note, start);
            }
        };
        let called = call_parked(tid, self.foothold, (libc::SYS_mmap, arguments), &self.withheld, entered, noted);
        let start = called.map_err(|error| match error {
            AgentError::Call { errno: Errno::EACCES | Errno::EPERM, .. } => AgentError::MemoryDenied { tid },
            error => error,
        })?;
        self.mapped = Some(start..start + len);
        passed?;
        (self.overseer.pass)(DumpStep::Area)?;
        self.area = Some(Self::open_area(leader.tid, start, len)?);
        self.start(0, LEADER_SLOT, list)
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

    /// Starts the runner in the taken thread `index`.
    fn start(&mut self, index: usize, slot_len: usize, list: &mut RobustList) -> Result<(), AgentError> {
        let Taken { tid, context, .. } = &self.taken[index];
        let tid = *tid;
        let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
        let area = self.area.as_mut().ok_or(AgentError::Full { tid })?;
        let mut slot = area.slot(slot_len).ok_or(AgentError::Full { tid })?;
        slot.set_death_frame(arch::signal_frame_size(&context.xstate), |at| {
            // rt_sigreturn restarts nothing: an interrupted call has to be set up to be made again.
            let mut registers = context.registers;
            arch::restart_interrupted_call(&mut registers);
            arch::signal_frame(at, &registers, context.mask, &context.xstate)
        });
        watch(list, &slot);
        let registers = arch::runner_registers(&context.registers, area.code(), slot.remote());
        // In this order: with the runner's registers a thread is safe, whatever its mask.
        ptrace::set_registers(tid, &registers).map_err(failed("set its registers"))?;
        ptrace::set_signal_mask(tid, u64::MAX).map_err(failed("block its signals"))?;
        // No mask holds back a SIGSTOP that waits for this thread alone: its stop would keep the runner from its work. The runner's
        // first call is the one that waits for work.
        let queue = ptrace::pending_signals(tid, false).map_err(failed("read its pending signals"))?;
        if queue.iter().any(|info| signal_of(info) == libc::SIGSTOP) {
            to_next_edge(tid, &self.withheld).map_err(failed("start the agent in it"))?;
        }
        ptrace::cont(tid).map_err(failed("start the agent in it"))?;
        self.runners.push(Runner::new(tid, slot));
        Ok(())
    }

    /// Starts a runner in another thread of the process, which is in a ptrace stop with `context`.
    pub fn enter(&mut self, tid: HostPid, context: &Context, list: &mut RobustList) -> Result<&Runner, AgentError> {
        self.taken.push(Taken::take(tid, context, &self.overseer));
        self.start(self.taken.len() - 1, THREAD_SLOT, list)?;
        Ok(&self.runners[self.runners.len() - 1])
    }

    /// The leader's runner.
    pub fn leader(&self) -> &Runner {
        &self.runners[0]
    }

    /// Notes the number that a userfaultfd will have which the leader is to make, or that it is closed again.
    pub fn note_userfaultfd(&self, number: Option<u32>) {
        if let Some((journal, note)) = self.overseer.journal.zip(self.note) {
            journal.userfaultfd(note, number);
        }
    }

    /// All runners, the leader's first.
    pub fn runners(&self) -> impl Iterator<Item = &Runner> {
        self.runners.iter()
    }

    /// Where the process sees the shared area, which is no memory of its own.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.mapped.clone().unwrap_or_default()
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
        for runner in &self.runners {
            let tid = runner.tid();
            let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
            note(ptrace::interrupt(tid).map_err(failed("stop the agent in it")));
        }
        let mut alive = vec![true; self.taken.len()];
        for (alive, runner) in alive.iter_mut().zip(&self.runners) {
            let tid = runner.tid();
            let failed = |step| move |errno| AgentError::Inject { tid, step, errno };
            let stopped = ptrace::wait_stop(tid).map_err(failed("await the agent's stop")).map(drop);
            *alive = stopped.is_ok();
            note(stopped);
        }
        note((self.overseer.pass)(DumpStep::Leave).map_err(Into::into));
        // The leader last, so that whatever a thread has not got back yet is in the area until then.
        for (_, thread) in alive.iter().zip(&self.taken).skip(1).filter(|(alive, _)| **alive) {
            note(thread.put_back(false, &self.overseer));
        }
        let leader = &self.taken[0];
        if alive[0] {
            note(self.take_out(leader));
            note(leader.put_back(true, &self.overseer));
        }
        if let Some((journal, area)) = self.overseer.journal.zip(self.note) {
            journal.forget(area);
        }
        let tid = leader.tid;
        let given = self.withheld.give_back(tid);
        note(given.map_err(|errno| AgentError::Inject { tid, step: "give back its SIGSTOP", errno }));
        first
    }

    /// Parks the leader and has it unmap the area, if there is one.
    fn take_out(&self, leader: &Taken) -> Result<(), AgentError> {
        leader.park(self.foothold.syscall_at, &self.overseer)?;
        let Some(range) = &self.mapped else { return Ok(()) };
        let mut passed = (self.overseer.pass)(DumpStep::Unmap);
        let arguments = [range.start, range.end - range.start, 0, 0, 0, 0];
        let entered = || passed = passed.and((self.overseer.pass)(DumpStep::Unmapping));
        call_parked(leader.tid, self.foothold, (libc::SYS_munmap, arguments), &self.withheld, entered, |_| ())?;
        Ok(passed?)
    }
}
