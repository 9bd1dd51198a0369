//! Descriptors that a process was started with and knows by number only.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;

/// Takes descriptor `number` of this process, which becomes close-on-exec.
///
/// The number must have been given to this process from outside, as an argument: a descriptor that another value of the
/// program owns is not to be taken. Standard descriptors stay open, as std counts on it, and lead to `/dev/null` afterwards.
///
/// # Errors
/// `EBADF` if it is not open.
pub fn take(number: i32) -> nix::Result<OwnedFd> {
    if number > libc::STDERR_FILENO {
        // SAFETY: F_SETFD takes numbers. It fails for a descriptor that is not open, and then nothing is owned; otherwise
        // the caller's word is that nothing else in the program owns it.
        unsafe {
            check(i64::from(libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC)))?;
            return Ok(OwnedFd::from_raw_fd(number));
        }
    }
    let null = std::fs::File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(|error| nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    // SAFETY: numbers only; the duplicate is new and nobody else's. dup2(2) puts an open description in place of another
    // under a number that only std uses, for whatever is there.
    unsafe {
        let taken = OwnedFd::from_raw_fd(check(i64::from(libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3)))? as i32);
        check(i64::from(libc::dup2(null.as_raw_fd(), number)))?;
        Ok(taken)
    }
}
