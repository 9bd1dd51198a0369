//! Timers and clocks (setitimer(2), timer_create(2), clock_gettime(2)).

use crate::room::{Check, Room};
use crate::sys::{Fault, clock, ensure, raw, same, sys, text, timespec, wait_for, zeroed};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

fn of_timeval(value: libc::timeval) -> Duration {
    Duration::new(value.tv_sec as u64, value.tv_usec as u32 * 1000)
}

fn of_timespec(value: libc::timespec) -> Duration {
    Duration::new(value.tv_sec as u64, value.tv_nsec as u32)
}

/// An interval timer far from its end: interval and remaining time come back.
fn itimer(which: i32) -> Result<Check, Fault> {
    let value = libc::timeval { tv_sec: 5000, tv_usec: 123_456 };
    let interval = libc::timeval { tv_sec: 77, tv_usec: 654_321 };
    let set = libc::itimerval { it_interval: interval, it_value: value };
    sys!(setitimer(which, &set, std::ptr::null_mut()))?;
    let mut last = of_timeval(value) + Duration::from_millis(20);
    Ok(Box::new(move || {
        let mut now = zeroed::<libc::itimerval>();
        sys!(getitimer(which, &mut now))?;
        same!("interval", of_timeval(now.it_interval), of_timeval(interval));
        let left = of_timeval(now.it_value);
        ensure!(left <= last, "{left:?} left, more than the {last:?} of before");
        ensure!(left > Duration::from_secs(4000), "only {left:?} left of 5000 s");
        last = left + Duration::from_millis(20);
        Ok(())
    }))
}

/// ITIMER_REAL.
pub fn itimer_real(_: &Room) -> Result<Check, Fault> {
    itimer(libc::ITIMER_REAL)
}

/// ITIMER_VIRTUAL.
pub fn itimer_virtual(_: &Room) -> Result<Check, Fault> {
    itimer(libc::ITIMER_VIRTUAL)
}

/// ITIMER_PROF.
pub fn itimer_prof(_: &Room) -> Result<Check, Fault> {
    itimer(libc::ITIMER_PROF)
}

/// The kernel's sigevent with the thread's id, which the C library's binding names differently from libc to libc.
fn event(notify: i32, signal: i32, value: u64, thread: i32) -> libc::sigevent {
    let mut event = zeroed::<libc::sigevent>();
    event.sigev_notify = notify;
    event.sigev_signo = signal;
    event.sigev_value.sival_ptr = value as *mut libc::c_void;
    event.sigev_notify_thread_id = thread;
    event
}

fn create(id: libc::clockid_t, event: &libc::sigevent) -> Result<i32, Fault> {
    let mut timer = 0i32;
    raw!(SYS_timer_create, id, event, &mut timer)?;
    Ok(timer)
}

fn arm(timer: i32, flags: i32, value: Duration, interval: Duration) -> Result<(), Fault> {
    let set = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(value) };
    raw!(SYS_timer_settime, timer, flags, &set, std::ptr::null_mut::<libc::itimerspec>()).map(|_| ())
}

fn left(timer: i32) -> Result<(Duration, Duration), Fault> {
    let mut now = zeroed::<libc::itimerspec>();
    raw!(SYS_timer_gettime, timer, &mut now)?;
    Ok((of_timespec(now.it_value), of_timespec(now.it_interval)))
}

/// Timers of each clock and each way to notify, with holes in their ids, armed and not, relative and absolute.
pub fn timers_posix(_: &Room) -> Result<Check, Fault> {
    let (here, far) = (raw!(SYS_gettid)? as i32, Duration::from_secs(3000));
    let mut timers = Vec::new();
    for (number, id) in [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME, libc::CLOCK_BOOTTIME].into_iter().enumerate() {
        for notify in [libc::SIGEV_SIGNAL, libc::SIGEV_THREAD_ID, libc::SIGEV_NONE] {
            let timer = create(id, &event(notify, 36 + number as i32, 0xCAFE_0000 + number as u64, here))?;
            timers.push((timer, id));
        }
    }
    for hole in [1, 4, 5] {
        raw!(SYS_timer_delete, timers[hole].0)?;
    }
    timers = timers.into_iter().enumerate().filter(|(at, _)| ![1, 4, 5].contains(at)).map(|(_, timer)| timer).collect();
    arm(timers[0].0, 0, far, Duration::from_secs(60))?;
    arm(timers[1].0, 0, far, Duration::ZERO)?;
    let until = clock(timers[2].1)? + far;
    arm(timers[2].0, libc::TIMER_ABSTIME, until, Duration::from_millis(2500))?;
    let until = clock(timers[4].1)? + far;
    arm(timers[4].0, libc::TIMER_ABSTIME, until, Duration::ZERO)?;
    let list = text("/proc/self/timers")?;
    let mut before: Vec<_> = timers.iter().map(|(timer, _)| left(*timer)).collect::<Result<_, _>>()?;
    Ok(Box::new(move || {
        same!("/proc/self/timers", text("/proc/self/timers")?, list);
        for ((timer, _), before) in timers.iter().zip(&mut before) {
            let now = left(*timer)?;
            same!(format!("interval of timer {timer}"), now.1, before.1);
            same!(format!("timer {timer} is armed"), now.0 > Duration::ZERO, before.0 > Duration::ZERO);
            ensure!(
                now.0 <= before.0 + Duration::from_millis(50),
                "timer {timer}: {:?} left, was {:?}",
                now.0,
                before.0
            );
            ensure!(
                now.0 + Duration::from_secs(600) >= before.0,
                "timer {timer}: {:?} left, was {:?}",
                now.0,
                before.0
            );
            *before = now;
        }
        let fresh = create(libc::CLOCK_MONOTONIC, &event(libc::SIGEV_NONE, 0, 0, 0))?;
        raw!(SYS_timer_delete, fresh)?;
        ensure!(timers.iter().all(|(timer, _)| *timer != fresh), "a new timer got the id {fresh}, which is in use");
        Ok(())
    }))
}

/// A periodic timer whose signal is blocked: it goes on, and its overrun count only grows.
pub fn timer_overrun(_: &Room) -> Result<Check, Fault> {
    let (signal, set) = (libc::SIGRTMIN() + 3, 1u64 << (libc::SIGRTMIN() + 2));
    raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, &set, std::ptr::null::<u64>(), 8)?;
    let timer = create(libc::CLOCK_MONOTONIC, &event(libc::SIGEV_SIGNAL, signal, 0x5151, 0))?;
    arm(timer, 0, Duration::from_millis(10), Duration::from_millis(10))?;
    std::thread::sleep(Duration::from_millis(100));
    Ok(Box::new(move || {
        let mut info = zeroed::<libc::siginfo_t>();
        let limit = timespec(Duration::from_secs(5));
        raw!(SYS_rt_sigtimedwait, &set, &mut info, &limit, 8)?;
        // SAFETY: a timer's signal carries a value.
        let value = unsafe { info.si_value() }.sival_ptr as usize;
        same!("the timer's value", (info.si_code, value), (libc::SI_TIMER, 0x5151));
        raw!(SYS_timer_getoverrun, timer)?;
        std::thread::sleep(Duration::from_millis(100));
        raw!(SYS_rt_sigtimedwait, &set, &mut info, &limit, 8)?;
        let overrun = raw!(SYS_timer_getoverrun, timer)?;
        ensure!((4..100).contains(&overrun), "{overrun} overruns in 100 ms of a timer of 10 ms");
        Ok(())
    }))
}

static TICKS: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

extern "C" fn tick_itimer(_: i32) {
    TICKS[0].fetch_add(1, Ordering::SeqCst);
}

extern "C" fn tick_timer(_: i32) {
    TICKS[1].fetch_add(1, Ordering::SeqCst);
}

/// Timers that fire all the time go on firing.
pub fn timers_firing(_: &Room) -> Result<Check, Fault> {
    for (signal, handler) in [(libc::SIGALRM, tick_itimer as *const ()), (libc::SIGUSR1, tick_timer as *const ())] {
        let mut action = zeroed::<libc::sigaction>();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_RESTART;
        sys!(sigaction(signal, &action, std::ptr::null_mut()))?;
    }
    let tick = libc::timeval { tv_sec: 0, tv_usec: 7000 };
    let set = libc::itimerval { it_interval: tick, it_value: tick };
    sys!(setitimer(libc::ITIMER_REAL, &set, std::ptr::null_mut()))?;
    let timer = create(libc::CLOCK_BOOTTIME, &event(libc::SIGEV_SIGNAL, libc::SIGUSR1, 0, 0))?;
    arm(timer, 0, Duration::from_millis(9), Duration::from_millis(9))?;
    Ok(Box::new(|| {
        let before = TICKS.each_ref().map(|ticks| ticks.load(Ordering::SeqCst));
        wait_for("both timers to fire", || {
            TICKS.iter().zip(before).all(|(ticks, before)| ticks.load(Ordering::SeqCst) > before + 3)
        })
    }))
}

/// Clocks never step back: monotonic, boottime and the process's own.
pub fn clocks(_: &Room) -> Result<Check, Fault> {
    let ids = [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_REALTIME];
    let now = move || ids.into_iter().map(clock).collect::<Result<Vec<_>, _>>();
    let mut before = now()?;
    Ok(Box::new(move || {
        let after = now()?;
        for (id, (was, is)) in ids.into_iter().zip(before.iter().zip(&after)) {
            ensure!(is >= was, "clock {id} stepped back from {was:?} to {is:?}");
            ensure!(*is < *was + Duration::from_secs(3600), "clock {id} leapt from {was:?} to {is:?}");
        }
        before = after;
        Ok(())
    }))
}
