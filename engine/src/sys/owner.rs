//! fcntl(2): the owner of a descriptor's signals (`F_GETSIG`, `F_GETOWN_EX`, and `F_GETOWNER_UIDS` of Linux 3.7).
//!
//! An owner is looked up among the kernel's numbers and not among its tasks (`find_vpid` in fs/fcntl.c): a number that no task has any
//! more can be one while a group or session has it, and for the moment between a task's end and the release of its number.
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

/// Whether a task, a process group or a session has `number` in ferry's pid namespace. Nobody else's descriptor may share the description of
/// `probe`, whose owner changes.
pub fn is_number_in_use(probe: BorrowedFd<'_>, number: i32) -> bool {
    const F_OWNER_PID: i32 = 1;
    let owner = [F_OWNER_PID, number];
    // SAFETY: F_SETOWN_EX reads two 32-bit words, and the array is that large.
    let set = unsafe { libc::fcntl(probe.as_raw_fd(), F_SETOWN_EX, owner.as_ptr()) };
    check(i64::from(set)) != Err(nix::errno::Errno::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn numbers_of_tasks_are_in_use() {
        let probe = std::fs::File::open("/dev/null").expect("/dev/null");
        assert!(is_number_in_use(probe.as_fd(), std::process::id() as i32));
        // The largest that there can be is PID_MAX_LIMIT, 2^22.
        assert!(!is_number_in_use(probe.as_fd(), (1 << 22) + 1));
    }
}
