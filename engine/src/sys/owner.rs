//! fcntl(2): the owner of a descriptor's signals (`F_GETSIG`, `F_GETOWN_EX`, and `F_GETOWNER_UIDS` of Linux 3.7).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// Numbers that libc lacks.
pub const F_SETSIG: i32 = 10;
/// Sets an [`Owner`]'s kind and id.
pub const F_SETOWN_EX: i32 = 15;
const F_GETSIG: i32 = 11;
const F_GETOWN_EX: i32 = 16;
const F_GETOWNER_UIDS: i32 = 17;

/// Who is signalled, and on whose behalf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Signal in place of SIGIO; 0 for SIGIO itself.
    pub signal: i32,
    /// `F_OWNER_TID` (0), `F_OWNER_PID` (1) or `F_OWNER_PGRP` (2).
    pub kind: i32,
    /// Its id as ferry numbers it; 0 if there is none.
    pub pid: i32,
    /// Real and effective user id of the one who set it.
    pub uids: [u32; 2],
}

/// The owner of the description behind `fd`.
pub fn get(fd: BorrowedFd<'_>) -> nix::Result<Owner> {
    let fd = fd.as_raw_fd();
    let mut pair = [0i32; 2];
    let mut uids = [0u32; 2];
    // SAFETY: F_GETSIG takes no argument; the other two write two 32-bit words each, and the arrays are that large.
    unsafe {
        let signal = check(i64::from(libc::fcntl(fd, F_GETSIG)))? as i32;
        check(i64::from(libc::fcntl(fd, F_GETOWN_EX, pair.as_mut_ptr())))?;
        if pair[1] != 0 {
            check(i64::from(libc::fcntl(fd, F_GETOWNER_UIDS, uids.as_mut_ptr())))?;
        }
        Ok(Owner { signal, kind: pair[0], pid: pair[1], uids })
    }
}
