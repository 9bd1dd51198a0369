//! One tree that is busy in every way at once, and notices whatever is done to it: the victim of the tests that kill ferry.
//!
//! It counts what it does and compares what it gets, all the time: registers, pipes, timers, sleeps, memory. So a fault
//! that lasts for a moment is found by the next check, however long after.

use crate::Workload;
use crate::memory::{PAGE, PRIVATE, READ_WRITE, fill, holds, map};
use crate::room::{Check, Child, Room};
use crate::seccomp::kill_on;
use crate::sys::{Fault, Verdict, ensure, pattern, raw, same, status_field, sys, text, wait_for, zeroed};
use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Workloads of the tests of faults alone: the general ones would take too long with them.
pub const FOR_FAULTS: &[Workload] = &[Workload { name: "vast", setup: vast, missing: || None }];

/// How often each kind of work was done, in the order of [`KINDS`].
static DONE: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];
/// How often something was found wrong, likewise.
static WRONG: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];
const KINDS: [&str; 6] = ["registers", "pipe", "sleep", "interval timer", "posix timer", "memory"];
const REGISTERS: usize = 0;
const PIPE: usize = 1;
const SLEEP: usize = 2;
const INTERVAL: usize = 3;
const POSIX: usize = 4;
const MEMORY: usize = 5;

fn done(kind: usize) {
    DONE[kind].fetch_add(1, Ordering::Relaxed);
}

fn wrong(kind: usize) {
    WRONG[kind].fetch_add(1, Ordering::Relaxed);
}

fn nothing_wrong() -> Verdict {
    let found = || KINDS.iter().zip(&WRONG).map(|(kind, count)| (*kind, count.load(Ordering::Relaxed)));
    let wrong: Vec<_> = found().filter(|(_, count)| *count > 0).collect();
    ensure!(wrong.is_empty(), "found wrong: {wrong:?}");
    Ok(())
}

/// Holds values in registers for some hundred microseconds; tells whether they are still there.
fn registers_hold(seed: u64) -> bool {
    let mut sum = 0u64;
    // SAFETY: registers alone are used, and all of them are declared.
    unsafe {
        asm!(
            "mov r8, {seed}", "lea r9, [{seed} + 1]", "lea r10, [{seed} + 2]", "lea r12, [{seed} + 3]",
            "lea r13, [{seed} + 4]", "lea r14, [{seed} + 5]", "lea r15, [{seed} + 6]", "movq xmm0, {seed}", "movq xmm7, {seed}",
            "2: dec {count}", "jnz 2b",
            "sub r9, 1", "sub r10, 2", "sub r12, 3", "sub r13, 4", "sub r14, 5", "sub r15, 6",
            "xor r8, {seed}", "xor r9, {seed}", "xor r10, {seed}", "xor r12, {seed}", "xor r13, {seed}", "xor r14, {seed}",
            "xor r15, {seed}", "or r8, r9", "or r8, r10", "or r8, r12", "or r8, r13", "or r8, r14", "or r8, r15",
            "movq r9, xmm0", "xor r9, {seed}", "or r8, r9", "movq r9, xmm7", "xor r9, {seed}", "or r8, r9", "mov {sum}, r8",
            seed = in(reg) seed, count = inout(reg) 200_000u64 => _, sum = inout(reg) sum,
            out("r8") _, out("r9") _, out("r10") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            out("xmm0") _, out("xmm7") _, options(nomem, nostack),
        );
    }
    sum == 0
}

/// Starts a thread, and returns when it runs: until then it has a signal mask and mappings of libc's.
fn thread(body: impl FnMut() + Send + 'static) -> Verdict {
    let mut body = body;
    let (runs, running) = mpsc::channel();
    let forever = move || {
        let _ = runs.send(());
        drop(runs);
        loop {
            body();
        }
    };
    std::thread::Builder::new().stack_size(64 << 10).spawn(forever).map_err(|error| error.to_string())?;
    running.recv().map_err(|error| error.to_string())
}

extern "C" fn tick_interval(_: i32) {
    done(INTERVAL);
}

extern "C" fn tick_posix(_: i32) {
    done(POSIX);
}

fn handle(signal: i32, handler: extern "C" fn(i32)) -> Verdict {
    let mut action = zeroed::<libc::sigaction>();
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
    sys!(sigaction(signal, &action, std::ptr::null_mut())).map(drop)
}

fn timers() -> Verdict {
    handle(libc::SIGALRM, tick_interval)?;
    handle(libc::SIGUSR1, tick_posix)?;
    let tick = libc::timeval { tv_sec: 0, tv_usec: 7000 };
    let set = libc::itimerval { it_interval: tick, it_value: tick };
    sys!(setitimer(libc::ITIMER_REAL, &set, std::ptr::null_mut()))?;
    let mut event = zeroed::<libc::sigevent>();
    event.sigev_notify = libc::SIGEV_SIGNAL;
    event.sigev_signo = libc::SIGUSR1;
    let mut timer = 0i32;
    raw!(SYS_timer_create, libc::CLOCK_MONOTONIC, &mut event, &mut timer)?;
    let nanos = |nanos| libc::timespec { tv_sec: 0, tv_nsec: nanos };
    let set = libc::itimerspec { it_interval: nanos(9_000_000), it_value: nanos(9_000_000) };
    raw!(SYS_timer_settime, timer, 0, &set, std::ptr::null::<u8>()).map(drop)
}

/// A child that sends back each number that it is sent, plus one; and a thread that talks with it all the time.
fn pipes(room: &Room) -> Result<Child, Fault> {
    let (mut to, mut from) = ([0i32; 2], [0i32; 2]);
    sys!(pipe2(to.as_mut_ptr(), 0))?;
    sys!(pipe2(from.as_mut_ptr(), 0))?;
    let echo = room.child("echo", move |_| {
        thread(move || {
            let mut number = 0u64;
            if sys!(read(to[0], (&raw mut number).cast(), 8)) == Ok(8) {
                number += 1;
                let _ = sys!(write(from[1], (&raw const number).cast(), 8));
            }
        })?;
        Ok(Box::new(|| Ok(())))
    })?;
    let mut next = 0u64;
    thread(move || {
        let mut answer = 0u64;
        let sent = sys!(write(to[1], (&raw const next).cast(), 8));
        let got = sys!(read(from[0], (&raw mut answer).cast(), 8));
        if (sent, got, answer) != (Ok(8), Ok(8), next + 1) {
            wrong(PIPE);
        }
        next += 1;
        done(PIPE);
        std::thread::sleep(Duration::from_micros(300));
    })?;
    Ok(echo)
}

/// A tree that is busy.
pub fn survivor(room: &Room) -> Result<Check, Fault> {
    let echo = pipes(room)?;
    let is_stopped = |pid: i32| text(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") T "));
    let stopped = room.child("stopped", |_| Ok(Box::new(|| Ok(())) as Check))?;
    sys!(kill(stopped.pid, libc::SIGSTOP))?;
    wait_for("the child to stop", || is_stopped(stopped.pid))?;
    // It dies of calls that ferry makes in it, should its filter ever see them.
    let filtered = room.child("filtered", |_| {
        sys!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        kill_on(&[libc::SYS_getitimer, libc::SYS_sigaltstack, libc::SYS_timer_gettime])?;
        Ok(Box::new(|| {
            same!("Seccomp", status_field("self", "Seccomp")?, "2");
            Ok(())
        }))
    })?;
    // In threads, as the first thread's registers and mask are looked at too: it takes the timers' signals.
    for seed in [0x1234_5678_9abc_def0, 77] {
        thread(move || {
            if !registers_hold(seed) {
                wrong(REGISTERS);
            }
            done(REGISTERS);
        })?;
    }
    thread(|| {
        let start = Instant::now();
        std::thread::sleep(Duration::from_millis(1));
        if start.elapsed() < Duration::from_millis(1) {
            wrong(SLEEP);
        }
        done(SLEEP);
    })?;
    let (mut memory, mut round) = (pattern(5, 1 << 20), 0usize);
    let kept = memory.clone();
    thread(move || {
        if memory != kept {
            wrong(MEMORY);
        }
        // Changed and put back, so that pages are dirtied.
        for at in (round % 4096..memory.len()).step_by(4096) {
            memory[at] = memory[at].wrapping_add(1);
        }
        for at in (round % 4096..memory.len()).step_by(4096) {
            memory[at] = memory[at].wrapping_sub(1);
        }
        round += 1;
        done(MEMORY);
        std::thread::sleep(Duration::from_millis(1));
    })?;
    let filter = 1u64 << (libc::SIGUSR2 - 1);
    raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, &filter, std::ptr::null::<u64>(), 8)?;
    let mask = status_field("self", "SigBlk")?;
    timers()?;
    Ok(Box::new(move || {
        let before = DONE.each_ref().map(|count| count.load(Ordering::Relaxed));
        for (kind, before) in before.into_iter().enumerate() {
            wait_for(KINDS[kind], || DONE[kind].load(Ordering::Relaxed) > before + 2)?;
        }
        nothing_wrong()?;
        same!("the signal mask", status_field("self", "SigBlk")?, mask);
        // One that was restored has to get a processor to stop, and does nothing else with it.
        wait_for("the stopped child to be stopped", || is_stopped(stopped.pid))?;
        echo.ask()?;
        filtered.ask()
    }))
}

/// Much memory: a number in each page.
fn vast(_: &Room) -> Result<Check, Fault> {
    const LENGTH: usize = 1 << 30;
    let memory = map(LENGTH, READ_WRITE, PRIVATE)?;
    let number = |at: usize| (at as u64 ^ 0x5a5a).to_ne_bytes();
    for at in (0..LENGTH).step_by(PAGE) {
        fill(memory + at, &number(at));
    }
    Ok(Box::new(move || (0..LENGTH).step_by(PAGE).try_for_each(|at| holds("a page", memory + at, &number(at)))))
}

/// Threads that are born and end all the time.
pub fn churn(_: &Room) -> Result<Check, Fault> {
    thread(|| {
        let _ = std::thread::spawn(|| done(SLEEP)).join();
    })?;
    Ok(Box::new(|| {
        let before = DONE[SLEEP].load(Ordering::Relaxed);
        wait_for("threads to come and go", || DONE[SLEEP].load(Ordering::Relaxed) > before + 2)
    }))
}
