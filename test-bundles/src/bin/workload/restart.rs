//! System calls in which a process sleeps when the dump happens (signal(7), "Interruption of system calls").
//!
//! Being dumped must not show: a sleep neither ends early nor starts from the beginning again and again, a wait for an event
//! is not answered EINTR. A child sleeps in the call under test and notes each answer; the check makes the event happen, or waits
//! for the time to pass, and reads the note.

use crate::memory::map;
use crate::room::{Check, Room, fork};
use crate::sys::{Fault, Verdict, await_syscall, clock, ensure, errno, raw, same, sys, timespec, wait_for, zeroed};
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long the timed calls sleep: long enough for a dump to fall into most of it.
const LENGTH: Duration = Duration::from_millis(2500);

/// What the sleeping child tells, in memory shared with the parent.
#[repr(C)]
struct Note {
    /// Calls that came back.
    returned: AtomicU32,
    /// A word to sleep on with futex(2).
    futex: AtomicU32,
    /// What the last call answered; minus errno where it failed.
    answer: AtomicI64,
    /// How long it took, in milliseconds of CLOCK_MONOTONIC.
    took: AtomicI64,
    /// The lowest duration and the first wrong answer of all calls so far.
    shortest: AtomicI64,
    wrong: AtomicI64,
}

fn note() -> Result<&'static Note, Fault> {
    let page = map(4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS)?;
    // SAFETY: a fresh zeroed page that is never unmapped; every field is an atomic integer.
    let note = unsafe { &*(page as *const Note) };
    note.shortest.store(i64::MAX, Ordering::SeqCst);
    Ok(note)
}

/// Starts a child that makes `call` again and again, and waits until it sleeps in system call `number`.
/// `call` answers as the kernel does: a result, or minus errno.
fn sleeper(note: &'static Note, number: libc::c_long, right: i64, call: impl Fn() -> i64) -> Result<i32, Fault> {
    let pid = fork(|| {
        loop {
            let before = Instant::now();
            let answer = call();
            let took = before.elapsed().as_millis() as i64;
            note.answer.store(answer, Ordering::SeqCst);
            note.took.store(took, Ordering::SeqCst);
            note.shortest.fetch_min(took, Ordering::SeqCst);
            if answer != right {
                let _ = note.wrong.compare_exchange(0, answer, Ordering::SeqCst, Ordering::SeqCst);
            }
            note.returned.fetch_add(1, Ordering::SeqCst);
        }
    })?;
    await_syscall(pid, number)?;
    Ok(pid)
}

/// The answer of a call as the kernel gives it.
fn kernel_answer(answer: Result<i64, Fault>) -> i64 {
    answer.unwrap_or_else(|_| -i64::from(errno()))
}

/// The answer of a call that signal(7) lets fail with EINTR after any stop, handler or not: it is made again, as programs have to.
fn unless_stopped(mut call: impl FnMut() -> i64) -> i64 {
    loop {
        let answer = call();
        if answer != -i64::from(libc::EINTR) {
            return answer;
        }
    }
}

/// A check of a call that ends by itself after LENGTH with the answer `right`.
fn timed(number: libc::c_long, right: i64, call: impl Fn() -> i64) -> Result<Check, Fault> {
    let note = note()?;
    let pid = sleeper(note, number, right, call)?;
    Ok(Box::new(move || {
        let (before, asked) = (note.returned.load(Ordering::SeqCst), Instant::now());
        wait_for("the call to return", || note.returned.load(Ordering::SeqCst) > before)?;
        let waited = asked.elapsed();
        let wrong = note.wrong.load(Ordering::SeqCst);
        ensure!(wrong == 0, "the call answered {wrong}, not {right}");
        let shortest = note.shortest.load(Ordering::SeqCst);
        ensure!(
            shortest >= LENGTH.as_millis() as i64 - 2,
            "the call returned after {shortest} ms, {LENGTH:?} were asked"
        );
        ensure!(waited < LENGTH + Duration::from_secs(2), "the call had {waited:?} left of {LENGTH:?}");
        await_syscall(pid, number)
    }))
}

/// A check of a call that ends with the answer `right` when `wake` is called.
fn woken(
    number: libc::c_long,
    right: i64,
    call: impl Fn() -> i64,
    mut wake: impl FnMut(i32) -> Verdict + 'static,
) -> Result<Check, Fault> {
    let note = note()?;
    let pid = sleeper(note, number, right, call)?;
    let mut expected = 0;
    Ok(Box::new(move || {
        let (returned, wrong) = (note.returned.load(Ordering::SeqCst), note.wrong.load(Ordering::SeqCst));
        ensure!(returned == expected, "the call returned by itself, with {wrong}");
        wake(pid)?;
        wait_for("the call to return", || note.returned.load(Ordering::SeqCst) > expected)?;
        same!("the call's answer", note.answer.load(Ordering::SeqCst), right);
        expected += 1;
        await_syscall(pid, number)
    }))
}

/// nanosleep(2).
pub fn restart_nanosleep(_: &Room) -> Result<Check, Fault> {
    timed(libc::SYS_nanosleep, 0, || {
        let mut left = zeroed::<libc::timespec>();
        kernel_answer(raw!(SYS_nanosleep, &timespec(LENGTH), &mut left))
    })
}

/// clock_nanosleep(2), relative.
pub fn restart_clock_nanosleep(_: &Room) -> Result<Check, Fault> {
    timed(libc::SYS_clock_nanosleep, 0, || {
        let none = std::ptr::null_mut::<libc::timespec>();
        kernel_answer(raw!(SYS_clock_nanosleep, libc::CLOCK_BOOTTIME, 0, &timespec(LENGTH), none))
    })
}

/// clock_nanosleep(2) until a point in time.
pub fn restart_clock_nanosleep_absolute(_: &Room) -> Result<Check, Fault> {
    timed(libc::SYS_clock_nanosleep, 0, || {
        let until = clock(libc::CLOCK_MONOTONIC).unwrap_or_default() + LENGTH;
        let none = std::ptr::null_mut::<libc::timespec>();
        kernel_answer(raw!(SYS_clock_nanosleep, libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &timespec(until), none))
    })
}

/// A pipe on which nothing ever comes unless someone writes.
fn pipe() -> Result<[i32; 2], Fault> {
    let mut ends = [0i32; 2];
    sys!(pipe(ends.as_mut_ptr()))?;
    Ok(ends)
}

/// poll(2) with a time limit.
pub fn restart_poll(_: &Room) -> Result<Check, Fault> {
    let ends = pipe()?;
    timed(libc::SYS_poll, 0, move || {
        let mut poll = libc::pollfd { fd: ends[0], events: libc::POLLIN, revents: 0 };
        kernel_answer(raw!(SYS_poll, &mut poll, 1, LENGTH.as_millis() as i32))
    })
}

/// ppoll(2) with a time limit and a signal mask.
pub fn restart_ppoll(_: &Room) -> Result<Check, Fault> {
    let ends = pipe()?;
    timed(libc::SYS_ppoll, 0, move || {
        let mut poll = libc::pollfd { fd: ends[0], events: libc::POLLIN, revents: 0 };
        let mask = 1u64 << (libc::SIGUSR2 - 1);
        kernel_answer(raw!(SYS_ppoll, &mut poll, 1, &mut timespec(LENGTH), &mask, 8))
    })
}

/// select(2) with a time limit.
pub fn restart_select(_: &Room) -> Result<Check, Fault> {
    let ends = pipe()?;
    timed(libc::SYS_select, 0, move || {
        let mut set = zeroed::<libc::fd_set>();
        // SAFETY: a pipe's descriptor of a small program is below FD_SETSIZE.
        unsafe { libc::FD_SET(ends[0], &mut set) };
        let mut left = libc::timeval { tv_sec: LENGTH.as_secs() as i64, tv_usec: LENGTH.subsec_micros().into() };
        let none = std::ptr::null_mut::<libc::fd_set>();
        kernel_answer(raw!(SYS_select, ends[0] + 1, &mut set, none, none, &mut left))
    })
}

/// futex(2) FUTEX_WAIT with a time limit.
pub fn restart_futex_timeout(_: &Room) -> Result<Check, Fault> {
    let word = note()?;
    timed(libc::SYS_futex, -i64::from(libc::ETIMEDOUT), move || {
        kernel_answer(raw!(SYS_futex, &word.futex, libc::FUTEX_WAIT, 0, &timespec(LENGTH)))
    })
}

/// futex(2) FUTEX_WAIT without one.
pub fn restart_futex(_: &Room) -> Result<Check, Fault> {
    let word = note()?;
    let none = std::ptr::null::<libc::timespec>();
    woken(
        libc::SYS_futex,
        0,
        move || kernel_answer(raw!(SYS_futex, &word.futex, libc::FUTEX_WAIT, 0, none)),
        move |_| {
            same!("sleepers woken", raw!(SYS_futex, &word.futex, libc::FUTEX_WAKE, 1)?, 1);
            Ok(())
        },
    )
}

/// epoll_wait(2) without a time limit.
pub fn restart_epoll_wait(_: &Room) -> Result<Check, Fault> {
    let set = sys!(epoll_create1(0))? as i32;
    let event = sys!(eventfd(0, 0))? as i32;
    let mut interest = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 77 };
    sys!(epoll_ctl(set, libc::EPOLL_CTL_ADD, event, &mut interest))?;
    woken(
        libc::SYS_epoll_wait,
        1,
        move || {
            let mut got = zeroed::<libc::epoll_event>();
            let answer = unless_stopped(|| kernel_answer(raw!(SYS_epoll_wait, set, &mut got, 1, -1)));
            let mut count = 0u64;
            if answer == 1 {
                let _ = sys!(read(event, (&raw mut count).cast(), 8));
            }
            if answer == 1 && got.u64 != 77 { -1000 } else { answer }
        },
        move |_| {
            let one = 1u64;
            sys!(write(event, (&raw const one).cast(), 8)).map(|_| ())
        },
    )
}

/// read(2) on an empty pipe.
pub fn restart_read(_: &Room) -> Result<Check, Fault> {
    let ends = pipe()?;
    woken(
        libc::SYS_read,
        3,
        move || {
            let mut got = [0u8; 16];
            let answer = kernel_answer(raw!(SYS_read, ends[0], got.as_mut_ptr(), 16));
            if answer == 3 && &got[..3] != b"hi!" { -1000 } else { answer }
        },
        move |_| sys!(write(ends[1], b"hi!".as_ptr().cast(), 3)).map(|_| ()),
    )
}

/// Signals that the handler below has seen.
static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_signal(_: i32) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// sigsuspend(2): the signal is handled once, the call answers EINTR, and the mask of before is back.
pub fn restart_sigsuspend(_: &Room) -> Result<Check, Fault> {
    let mut action = zeroed::<libc::sigaction>();
    action.sa_sigaction = count_signal as *const () as usize;
    sys!(sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()))?;
    let blocked = 1u64 << (libc::SIGUSR1 - 1);
    raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, &blocked, std::ptr::null::<u64>(), 8)?;
    woken(
        libc::SYS_rt_sigsuspend,
        -i64::from(libc::EINTR),
        move || {
            let before = HANDLED.load(Ordering::SeqCst);
            let answer = kernel_answer(raw!(SYS_rt_sigsuspend, &0u64, 8));
            let mut mask = 0u64;
            let _ = raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, std::ptr::null::<u64>(), &mut mask, 8);
            let handled = HANDLED.load(Ordering::SeqCst) - before;
            if handled != 1 || mask & blocked == 0 { -1000 - i64::from(handled) } else { answer }
        },
        |pid| sys!(kill(pid, libc::SIGUSR1)).map(|_| ()),
    )
}

/// sigtimedwait(2) without a time limit.
pub fn restart_sigtimedwait(_: &Room) -> Result<Check, Fault> {
    let set = 1u64 << (libc::SIGUSR2 - 1);
    raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, &set, std::ptr::null::<u64>(), 8)?;
    let none = std::ptr::null::<libc::timespec>();
    woken(
        libc::SYS_rt_sigtimedwait,
        i64::from(libc::SIGUSR2),
        move || {
            unless_stopped(|| kernel_answer(raw!(SYS_rt_sigtimedwait, &set, &mut zeroed::<libc::siginfo_t>(), none, 8)))
        },
        |pid| sys!(kill(pid, libc::SIGUSR2)).map(|_| ()),
    )
}

/// wait4(2) for a child that is still running.
pub fn restart_wait4(room: &Room) -> Result<Check, Fault> {
    let end = room.path("end-grandchild");
    let waker = end.clone();
    woken(
        libc::SYS_wait4,
        1,
        move || {
            let end = end.clone();
            let child = fork(move || {
                while !end.exists() {
                    crate::sys::pause();
                }
                let _ = std::fs::remove_file(&end);
                9
            });
            let Ok(child) = child else { return -1000 };
            let mut status = 0;
            let none = std::ptr::null_mut::<libc::rusage>();
            match kernel_answer(raw!(SYS_wait4, child, &mut status, 0, none)) {
                pid if pid == i64::from(child) && libc::WEXITSTATUS(status) == 9 => 1,
                answer => answer,
            }
        },
        move |_| std::fs::write(&waker, "").map_err(|error| error.to_string()),
    )
}
