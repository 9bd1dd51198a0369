//! pidfd_open(2) and pidfd_getfd(2) (Linux 5.6).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{HostPid, check};

/// A descriptor of the process `pid`.
pub fn open(pid: HostPid) -> nix::Result<OwnedFd> {
    // SAFETY: takes numbers; the result is a new descriptor that nobody else owns.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::syscall(libc::SYS_pidfd_open, pid.0, 0))? as i32)) }
}

/// A duplicate, close-on-exec, of descriptor `fd` of the process behind `pidfd`.
pub fn get_fd(pidfd: BorrowedFd<'_>, fd: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes numbers; the result is a new descriptor that nobody else owns.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0))? as i32)) }
}

/// Sends `signal` to the process (pidfd_send_signal(2), Linux 5.1).
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    // SAFETY: takes numbers and no siginfo.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, 0, 0) }).map(drop)
}

/// Waits until the process has ended (a pidfd can be read then, pidfd_open(2)).
///
/// # Errors
/// `ETIMEDOUT` after `patience`.
pub fn wait_gone(pidfd: BorrowedFd<'_>, patience: Duration) -> nix::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        match check(i64::from(unsafe { libc::poll(&raw mut poll, 1, left.as_millis() as i32) })) {
            Ok(0) if left.is_zero() => return Err(Errno::ETIMEDOUT),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
}
