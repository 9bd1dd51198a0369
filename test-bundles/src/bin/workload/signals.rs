//! Signals: actions, masks, queues, the alternate stack (sigaction(2), rt_sigqueueinfo(2), sigaltstack(2)).

use crate::room::{Check, Room};
use crate::sys::{Fault, ensure, pattern, raw, same, sys, zeroed};
use std::sync::OnceLock;
use std::sync::mpsc::channel;

/// The kernel's own structure of rt_sigaction(2) on x86-64, with the restorer that the C library hides.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

const SA_RESTORER: u64 = 0x0400_0000;
const SIZE: usize = 8;

fn get_action(signal: i32) -> Result<KernelAction, Fault> {
    let mut action = zeroed::<KernelAction>();
    raw!(SYS_rt_sigaction, signal, std::ptr::null::<KernelAction>(), &mut action, SIZE)?;
    Ok(action)
}

/// Every signal with an action of its own: handlers, ignored, default; all flags; restorers and masks.
pub fn signal_actions(_: &Room) -> Result<Check, Fault> {
    let flags = [
        libc::SA_SIGINFO,
        libc::SA_ONSTACK,
        libc::SA_RESTART,
        libc::SA_NODEFER,
        libc::SA_RESETHAND,
        libc::SA_NOCLDSTOP,
        libc::SA_NOCLDWAIT,
        0x400, // SA_UNSUPPORTED's neighbour bits are cleared by the kernel; 0x800 is SA_EXPOSE_TAGBITS
        libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK | libc::SA_NODEFER,
    ];
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        let number = signal as usize;
        let action = KernelAction {
            // Never called: the addresses only have to come back. 0 is SIG_DFL, 1 is SIG_IGN.
            handler: if number.is_multiple_of(5) { number / 5 % 2 } else { 0x1000_0000 + number * 16 },
            flags: flags[number % flags.len()] as u64 | SA_RESTORER,
            restorer: 0x2000_0000 + number * 16,
            mask: 1u64.rotate_left(signal as u32 * 7) | 0x11 << (number % 30),
        };
        raw!(SYS_rt_sigaction, signal, &action, std::ptr::null_mut::<KernelAction>(), SIZE)?;
    }
    let before: Vec<KernelAction> = (1..=64).map(get_action).collect::<Result<_, _>>()?;
    Ok(Box::new(move || {
        for (signal, want) in (1..=64).zip(&before) {
            same!(format!("action of signal {signal}"), get_action(signal)?, *want);
        }
        Ok(())
    }))
}

fn get_mask() -> Result<u64, Fault> {
    let mut mask = 0u64;
    raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, std::ptr::null::<u64>(), &mut mask, SIZE)?;
    Ok(mask)
}

/// The mask of blocked signals.
pub fn signal_mask(_: &Room) -> Result<Check, Fault> {
    let mask = 0x8000_0042_1234_4A02u64;
    raw!(SYS_rt_sigprocmask, libc::SIG_SETMASK, &mask, std::ptr::null::<u64>(), SIZE)?;
    let before = get_mask()?;
    Ok(Box::new(move || {
        same!("signal mask", get_mask()?, before);
        Ok(())
    }))
}

/// What a queued signal carries, in the order of its arrival.
#[derive(Clone, Debug, PartialEq)]
struct Queued {
    signal: i32,
    code: i32,
    sender: i32,
    value: u64,
}

/// The start of siginfo_t as rt_sigqueueinfo(2) takes it: signal, errno, code, then pid, uid, value.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    signal: i32,
    errno: i32,
    code: i32,
    hole: i32,
    pid: i32,
    uid: u32,
    value: u64,
    rest: [u64; 12],
}

/// Sends each to the process, or to one of its threads.
fn queue(all: &[Queued], thread: Option<i64>) -> Result<(), Fault> {
    let pid = sys!(getpid())?;
    for entry in all {
        let mut info = zeroed::<Info>();
        (info.signal, info.code, info.pid, info.value) = (entry.signal, entry.code, entry.sender, entry.value);
        match thread {
            None => raw!(SYS_rt_sigqueueinfo, pid, entry.signal, &info)?,
            Some(thread) => raw!(SYS_rt_tgsigqueueinfo, pid, thread, entry.signal, &info)?,
        };
    }
    Ok(())
}

/// Takes every waiting signal of `set`.
fn drain(set: u64) -> Result<Vec<Queued>, Fault> {
    let mut all = Vec::new();
    loop {
        let mut info = zeroed::<Info>();
        match raw!(SYS_rt_sigtimedwait, &set, &mut info, &zeroed::<libc::timespec>(), SIZE) {
            Ok(_) => {
                all.push(Queued { signal: info.signal, code: info.code, sender: info.pid, value: info.value });
            }
            Err(_) if crate::sys::errno() == libc::EAGAIN => return Ok(all),
            Err(fault) => return Err(fault),
        }
    }
}

/// Two classic signals and two real-time signals, of which several wait at once in order of arrival.
fn some_signals(seed: u64) -> Vec<Queued> {
    let entry =
        |signal, value| Queued { signal, code: libc::SI_QUEUE, sender: 4000 + seed as i32, value: value + seed };
    let mut all = vec![entry(libc::SIGUSR1, 11), entry(libc::SIGUSR2, 12)];
    all.extend((0..5).map(|number| entry(40, 0xAAAA_0000_0000 + number)));
    all.extend((0..3).map(|number| entry(50, 0xBBBB_0000_0000 - number)));
    all
}

const WAITING: u64 = 1 << (libc::SIGUSR1 - 1) | 1 << (libc::SIGUSR2 - 1) | 1 << 39 | 1 << 49;

/// Signals that wait for the whole process, with their values and in their order.
pub fn signals_pending(_: &Room) -> Result<Check, Fault> {
    raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, &WAITING, std::ptr::null::<u64>(), SIZE)?;
    let want = some_signals(1);
    queue(&want, None)?;
    Ok(Box::new(move || {
        let got = drain(WAITING)?;
        queue(&want, None)?;
        same!("the process's queue", got, want);
        Ok(())
    }))
}

/// Signals that wait for one thread, different ones for each of three; none may turn up in another queue.
pub fn signals_pending_thread(_: &Room) -> Result<Check, Fault> {
    raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, &WAITING, std::ptr::null::<u64>(), SIZE)?;
    let mut threads = Vec::new();
    for seed in 10..12u64 {
        let (ask, asked) = channel::<()>();
        let (answer, answered) = channel();
        std::thread::spawn(move || {
            let work = || -> Result<Vec<Queued>, Fault> {
                let got = drain(WAITING)?;
                queue(&some_signals(seed), Some(raw!(SYS_gettid)?))?;
                Ok(got)
            };
            let _ = answer.send(work());
            while asked.recv().is_ok() {
                let _ = answer.send(work());
            }
        });
        let first = answered.recv().map_err(|_| "a thread ended early")??;
        ensure!(first.is_empty(), "a fresh thread has signals: {first:?}");
        threads.push((seed, ask, answered));
    }
    let main = sys!(getpid())?;
    queue(&some_signals(12), Some(main))?;
    Ok(Box::new(move || {
        for (seed, ask, answered) in &threads {
            ask.send(()).map_err(|_| "a thread has gone")?;
            let got = answered.recv().map_err(|_| "a thread has gone")??;
            same!(format!("queue of thread {seed}"), got, some_signals(*seed));
        }
        let got = drain(WAITING)?;
        queue(&some_signals(12), Some(main))?;
        same!("queue of the main thread", got, some_signals(12));
        Ok(())
    }))
}

static STACK_ROOM: OnceLock<Room> = OnceLock::new();

extern "C" fn serve_on_stack(_: i32) {
    let Some(room) = STACK_ROOM.get() else { return };
    let here = 0u8;
    let address = &raw const here as usize;
    let content = std::hint::black_box(pattern(3, 5000));
    room.serve((|| {
        let before = current_stack()?;
        Ok(Box::new(move || {
            let stack = current_stack()?;
            same!("alternate stack", stack, before);
            ensure!(stack.2 & libc::SS_ONSTACK != 0, "the handler does not run on the alternate stack");
            ensure!((stack.0..stack.0 + stack.1).contains(&address), "the handler's frame is elsewhere");
            ensure!(content == pattern(3, 5000), "the handler's data changed");
            Ok(())
        }) as Check)
    })());
}

fn current_stack() -> Result<(usize, usize, i32), Fault> {
    let mut stack = zeroed::<libc::stack_t>();
    sys!(sigaltstack(std::ptr::null(), &mut stack))?;
    Ok((stack.ss_sp as usize, stack.ss_size, stack.ss_flags))
}

/// A signal handler that runs on its alternate stack while the dump happens.
pub fn signal_stack_in_use(room: &Room) -> Result<Check, Fault> {
    STACK_ROOM.get_or_init(|| room.clone());
    let memory = Box::leak(vec![0u8; 128 << 10].into_boxed_slice());
    let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: memory.len() };
    sys!(sigaltstack(&stack, std::ptr::null_mut()))?;
    let mut action = zeroed::<libc::sigaction>();
    action.sa_sigaction = serve_on_stack as *const () as usize;
    action.sa_flags = libc::SA_ONSTACK;
    sys!(sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()))?;
    sys!(raise(libc::SIGUSR1))?;
    Err("the handler returned".to_owned())
}
