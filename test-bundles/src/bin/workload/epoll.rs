//! Descriptors of events: counters, signals, timers, and epoll sets over them (eventfd(2), signalfd(2), timerfd_create(2), epoll(7)).

use crate::room::{Check, Room};
use crate::sys::{Fault, Verdict, ensure, errno, raw, same, sys, timespec, zeroed};
use std::time::Duration;

fn add(counter: i32, value: u64) -> Verdict {
    sys!(write(counter, (&raw const value).cast(), 8)).map(|_| ())
}

fn take(counter: i32) -> Result<u64, Fault> {
    let mut value = 0u64;
    sys!(read(counter, (&raw mut value).cast(), 8))?;
    Ok(value)
}

/// Counters: plain, as a semaphore, at zero, near the limit.
pub fn eventfd(_: &Room) -> Result<Check, Fault> {
    let plain = sys!(eventfd(0, libc::EFD_NONBLOCK))? as i32;
    let semaphore = sys!(eventfd(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))? as i32;
    let zero = sys!(eventfd(0, libc::EFD_NONBLOCK))? as i32;
    let full = sys!(eventfd(0, libc::EFD_NONBLOCK))? as i32;
    add(plain, 123_456_789_012)?;
    add(full, u64::MAX - 1)?;
    Ok(Box::new(move || {
        same!("counter", take(plain)?, 123_456_789_012);
        add(plain, 123_456_789_012)?;
        same!("semaphore", [take(semaphore)?, take(semaphore)?, take(semaphore)?], [1, 1, 1]);
        ensure!(take(semaphore).is_err() && errno() == libc::EAGAIN, "the semaphore counts more than three");
        add(semaphore, 3)?;
        ensure!(take(zero).is_err() && errno() == libc::EAGAIN, "the counter at zero is not at zero");
        ensure!(add(full, 1).is_err() && errno() == libc::EAGAIN, "the full counter is not full");
        Ok(())
    }))
}

/// A counter shared with a child.
pub fn eventfd_shared(room: &Room) -> Result<Check, Fault> {
    let counter = sys!(eventfd(0, libc::EFD_NONBLOCK))? as i32;
    let child = room.child("child", move |_| Ok(Box::new(move || add(counter, 5))))?;
    take(counter)?;
    Ok(Box::new(move || {
        child.ask()?;
        same!("what the child counted", take(counter)?, 5);
        Ok(())
    }))
}

fn watch(set: i32, operation: i32, descriptor: i32, events: i32, data: u64) -> Verdict {
    let mut event = libc::epoll_event { events: events as u32, u64: data };
    sys!(epoll_ctl(set, operation, descriptor, &mut event)).map(|_| ())
}

/// What is ready now: event masks and data, in the order of the data.
fn ready(set: i32) -> Result<Vec<(u32, u64)>, Fault> {
    let mut events = [zeroed::<libc::epoll_event>(); 32];
    let count = sys!(epoll_wait(set, events.as_mut_ptr(), 32, 0))? as usize;
    let mut all: Vec<(u32, u64)> = events[..count].iter().map(|event| (event.events, event.u64)).collect();
    all.sort_unstable_by_key(|(_, data)| *data);
    Ok(all)
}

const IN: u32 = libc::EPOLLIN as u32;

/// A set over counters and pipes: data values, and what is ready.
pub fn epoll_set(_: &Room) -> Result<Check, Fault> {
    let set = sys!(epoll_create1(libc::EPOLL_CLOEXEC))? as i32;
    let (quiet, loud) = (sys!(eventfd(0, 0))? as i32, sys!(eventfd(1, 0))? as i32);
    let mut ends = [0i32; 2];
    sys!(pipe(ends.as_mut_ptr()))?;
    watch(set, libc::EPOLL_CTL_ADD, quiet, libc::EPOLLIN, 0x1111_2222_3333_4444)?;
    watch(set, libc::EPOLL_CTL_ADD, loud, libc::EPOLLIN | libc::EPOLLPRI, 0xFFFF_FFFF_FFFF_FFFF)?;
    watch(set, libc::EPOLL_CTL_ADD, ends[0], libc::EPOLLIN | libc::EPOLLRDHUP, 3)?;
    watch(set, libc::EPOLL_CTL_ADD, ends[1], libc::EPOLLOUT, 4)?;
    Ok(Box::new(move || {
        let usual = vec![(libc::EPOLLOUT as u32, 4), (IN, u64::MAX)];
        same!("ready", ready(set)?, usual);
        add(quiet, 1)?;
        same!("ready with one more", ready(set)?, vec![usual[0], (IN, 0x1111_2222_3333_4444), usual[1]]);
        take(quiet)?;
        watch(set, libc::EPOLL_CTL_MOD, quiet, libc::EPOLLIN, 0x1111_2222_3333_4444)
    }))
}

/// A set within a set.
pub fn epoll_nested(_: &Room) -> Result<Check, Fault> {
    let (outer, inner) = (sys!(epoll_create1(0))? as i32, sys!(epoll_create1(0))? as i32);
    let counter = sys!(eventfd(0, 0))? as i32;
    watch(outer, libc::EPOLL_CTL_ADD, inner, libc::EPOLLIN, 10)?;
    watch(inner, libc::EPOLL_CTL_ADD, counter, libc::EPOLLIN, 20)?;
    Ok(Box::new(move || {
        same!("outer set at rest", ready(outer)?, vec![]);
        add(counter, 1)?;
        same!("outer set", ready(outer)?, vec![(IN, 10)]);
        same!("inner set", ready(inner)?, vec![(IN, 20)]);
        take(counter)?;
        Ok(())
    }))
}

/// Edge-triggered and one-shot entries, one of which has fired and is silent; an entry under a number that was moved.
pub fn epoll_modes(_: &Room) -> Result<Check, Fault> {
    let set = sys!(epoll_create1(0))? as i32;
    let (edge, once, fired) = (sys!(eventfd(0, 0))? as i32, sys!(eventfd(0, 0))? as i32, sys!(eventfd(1, 0))? as i32);
    watch(set, libc::EPOLL_CTL_ADD, fired, libc::EPOLLIN | libc::EPOLLONESHOT, 3)?;
    same!("one-shot entry", ready(set)?, vec![(IN, 3)]);
    watch(set, libc::EPOLL_CTL_ADD, edge, libc::EPOLLIN | libc::EPOLLET, 1)?;
    watch(set, libc::EPOLL_CTL_ADD, once, libc::EPOLLIN | libc::EPOLLONESHOT, 2)?;
    Ok(Box::new(move || {
        same!("ready at rest", ready(set)?, vec![]);
        add(edge, 1)?;
        add(once, 1)?;
        same!("edge and one-shot", ready(set)?, vec![(IN, 1), (IN, 2)]);
        same!("the second time", ready(set)?, vec![]);
        take(edge)?;
        take(once)?;
        watch(set, libc::EPOLL_CTL_MOD, once, libc::EPOLLIN | libc::EPOLLONESHOT, 2)?;
        add(once, 1)?;
        same!("one-shot, armed again", ready(set)?, vec![(IN, 2)]);
        take(once)?;
        watch(set, libc::EPOLL_CTL_MOD, once, libc::EPOLLIN | libc::EPOLLONESHOT, 2)
    }))
}

/// Signals through a descriptor (signalfd(2)).
pub fn signalfd(_: &Room) -> Result<Check, Fault> {
    let set = 1u64 << (libc::SIGUSR1 - 1);
    raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, &set, std::ptr::null::<u64>(), 8)?;
    let descriptor = raw!(SYS_signalfd4, -1, &set, 8, libc::SFD_NONBLOCK)? as i32;
    Ok(Box::new(move || {
        sys!(raise(libc::SIGUSR1))?;
        let mut bytes = [0u8; 128];
        same!("bytes of the signal", sys!(read(descriptor, bytes.as_mut_ptr().cast(), 128))?, 128);
        ensure!(sys!(read(descriptor, bytes.as_mut_ptr().cast(), 128)).is_err(), "the signal came twice");
        Ok(())
    }))
}

/// A periodic timer behind a descriptor (timerfd_create(2)).
pub fn timerfd(_: &Room) -> Result<Check, Fault> {
    let descriptor = sys!(timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK))? as i32;
    let tick = timespec(Duration::from_millis(20));
    let set = libc::itimerspec { it_interval: tick, it_value: tick };
    sys!(timerfd_settime(descriptor, 0, &set, std::ptr::null_mut()))?;
    Ok(Box::new(move || {
        let mut count = 0u64;
        let mut poll = libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: 0 };
        same!("the timer fires", sys!(poll(&mut poll, 1, 5000))?, 1);
        sys!(read(descriptor, (&raw mut count).cast(), 8))?;
        ensure!(count > 0, "the timer has not expired");
        Ok(())
    }))
}
