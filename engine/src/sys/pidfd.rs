//! pidfd_open(2) and pidfd_getfd(2) (Linux 5.6).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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
