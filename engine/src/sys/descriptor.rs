//! Descriptors that a process was started with and knows by number only.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::check;

/// Takes descriptor `number` of this process, which becomes close-on-exec.
///
/// The number must have been given to this process from outside, as an argument: a descriptor that another value of the
/// program owns is not to be taken. Standard descriptors, which std owns, are refused by `EINVAL`.
///
/// # Errors
/// `EBADF` if it is not open.
pub fn take(number: i32) -> nix::Result<OwnedFd> {
    if (0..=2).contains(&number) {
        return Err(Errno::EINVAL);
    }
    // SAFETY: F_SETFD takes numbers. It fails for a descriptor that is not open, and then nothing is owned; otherwise the
    // caller's word is that nothing else in the program owns it.
    unsafe {
        check(i64::from(libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC)))?;
        Ok(OwnedFd::from_raw_fd(number))
    }
}
