//! Seccomp (seccomp(2)): strict mode, a filter, filters one over the other.

use crate::room::{Check, Room, ask_all, fork};
use crate::sys::{Fault, ensure, errno, raw, same, status_field, sys};
use std::sync::mpsc::channel;

/// A process in strict mode can only read, write and end: it echoes bytes from one pipe to another.
pub fn seccomp_strict(_: &Room) -> Result<Check, Fault> {
    let (mut to, mut from) = ([0i32; 2], [0i32; 2]);
    sys!(pipe(to.as_mut_ptr()))?;
    sys!(pipe(from.as_mut_ptr()))?;
    let pid = fork(|| {
        let _ = sys!(prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT, 0, 0, 0));
        let mut byte = 0u8;
        loop {
            // Nothing that may allocate or ask for errno's text: only read and write are allowed.
            // SAFETY: one byte of this frame.
            if unsafe { libc::read(to[0], (&raw mut byte).cast(), 1) } == 1 {
                byte = byte.wrapping_add(1);
                // SAFETY: as above.
                unsafe { libc::write(from[1], (&raw const byte).cast(), 1) };
            }
        }
    })?;
    Ok(Box::new(move || {
        let byte = 41u8;
        sys!(write(to[1], (&raw const byte).cast(), 1))?;
        let mut poll = libc::pollfd { fd: from[0], events: libc::POLLIN, revents: 0 };
        same!("the strict process's answer", raw!(SYS_poll, &mut poll, 1, 10_000)?, 1);
        let mut answer = 0u8;
        sys!(read(from[0], (&raw mut answer).cast(), 1))?;
        same!("the strict process's answer", answer, 42u8);
        same!("Seccomp", status_field(&pid.to_string(), "Seccomp")?, "1");
        Ok(())
    }))
}

/// One instruction of classic BPF.
const fn op(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// Installs a filter that answers `error` to system call `number`.
fn forbid(number: libc::c_long, error: u32, flags: u32) -> Result<(), Fault> {
    let mut program = [
        op(0x20, 0, 0, 0),                               // load the number
        op(0x15, 0, 1, number as u32),                   // is it the one?
        op(0x06, 0, 0, libc::SECCOMP_RET_ERRNO | error), // then fail with the error
        op(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    raw!(SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &filter).map(|_| ())
}

/// Installs a filter that ends the process at any of these system calls.
pub fn kill_on(numbers: &[libc::c_long]) -> Result<(), Fault> {
    let mut program = vec![op(0x20, 0, 0, 0)];
    for number in numbers {
        program.push(op(0x15, 0, 1, *number as u32));
        program.push(op(0x06, 0, 0, libc::SECCOMP_RET_KILL_PROCESS));
    }
    program.push(op(0x06, 0, 0, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    raw!(SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &filter).map(|_| ())
}

/// A process under these filters; each must still answer its error, and all must still be there.
fn filtered(room: &Room, filters: &'static [(libc::c_long, u32, u32)], no_new_privs: bool) -> Result<Check, Fault> {
    let child = room.child("filtered", |_| {
        if no_new_privs {
            sys!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        }
        for (number, error, flags) in filters {
            forbid(*number, *error, *flags)?;
        }
        let count = status_field("self", "Seccomp_filters").ok();
        Ok(Box::new(move || {
            same!("Seccomp", status_field("self", "Seccomp")?, "2");
            same!("filters", status_field("self", "Seccomp_filters").ok(), count);
            for (number, error, _) in filters {
                // SAFETY: the filter answers before the kernel looks at an argument.
                let answer = unsafe { libc::syscall(*number, -1, 0, 0, 0) };
                ensure!(answer == -1 && errno() == *error as i32, "call {number} answers {answer}, errno {}", errno());
            }
            Ok(())
        }))
    })?;
    Ok(ask_all(vec![child]))
}

/// A filter.
pub fn seccomp_filter(room: &Room) -> Result<Check, Fault> {
    filtered(room, &[(libc::SYS_sethostname, 111, 0)], true)
}

/// Two filters, one with SECCOMP_FILTER_FLAG_LOG, in a process that kept its privileges.
pub fn seccomp_two_filters(room: &Room) -> Result<Check, Fault> {
    filtered(room, &[(libc::SYS_sethostname, 111, 0), (libc::SYS_swapon, 99, 2)], false)
}

/// Threads that have one filter in common: one of them can still give all another (SECCOMP_FILTER_FLAG_TSYNC).
pub fn seccomp_threads(room: &Room) -> Result<Check, Fault> {
    const FOR_ALL: u32 = 1;
    let calls = [libc::SYS_sethostname, libc::SYS_swapon];
    let child = room.child("threads", |_| {
        sys!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        forbid(calls[0], 111, 0)?;
        let (ask, asked) = channel::<libc::c_long>();
        let (answer, answered) = channel();
        std::thread::spawn(move || {
            for number in asked {
                // SAFETY: the filter answers before the kernel looks at an argument; without one the call fails as well.
                let result = unsafe { libc::syscall(number, -1, 0, 0, 0) };
                let _ = answer.send((result, errno()));
            }
        });
        let mut rounds = 0;
        Ok(Box::new(move || {
            // The first of the checks is before the dump; from then on each adds one for all.
            rounds += 1;
            if rounds > 1 {
                forbid(calls[1], 112, FOR_ALL)?;
            }
            for (number, error) in calls.into_iter().zip([111, 112]).take(rounds.min(2)) {
                ask.send(number).map_err(|error| error.to_string())?;
                let got = answered.recv().map_err(|error| error.to_string())?;
                same!(format!("answer of call {number} in the other thread"), got, (-1, error));
            }
            Ok(())
        }))
    })?;
    Ok(ask_all(vec![child]))
}
