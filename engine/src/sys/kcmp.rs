//! kcmp(2): whether two tasks share a kernel object, and a stable order between objects.
#![allow(unsafe_code)]

use std::cmp::Ordering;

use super::{HostPid, check};

/// What to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Kind {
    /// Two descriptors' open file descriptions.
    File = 0,
    /// Address spaces.
    Vm = 1,
    /// Descriptor tables.
    Files = 2,
    /// Working directory, root and umask.
    Fs = 3,
    /// Signal handlers.
    Sighand = 4,
    /// I/O contexts.
    Io = 5,
    /// System V semaphore adjustments.
    Sysvsem = 6,
}

/// Compares the objects of two tasks; for [`Kind::File`] the indexes are descriptor numbers.
pub fn compare(kind: Kind, left: (HostPid, u32), right: (HostPid, u32)) -> nix::Result<Ordering> {
    // SAFETY: kcmp takes numbers only.
    let result = check(unsafe {
        libc::syscall(libc::SYS_kcmp, left.0.0, right.0.0, kind as i32, left.1 as usize, right.1 as usize)
    })?;
    match result {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(nix::errno::Errno::ENOTSUP),
    }
}

/// A description that an epoll instance watches.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct EpollSlot {
    /// The instance's descriptor.
    pub epoll: u32,
    /// The number that the description was added with.
    pub target: u32,
    /// Which of several that were added with the same number.
    pub order: u32,
}

/// Whether descriptor `fd` of the task names the description in `slot` of its epoll instance (`KCMP_EPOLL_TFD`, Linux 4.13).
pub fn is_epoll_target(task: HostPid, fd: u32, slot: EpollSlot) -> nix::Result<bool> {
    const KCMP_EPOLL_TFD: i32 = 7;
    // SAFETY: for this kind the second index is a pointer to a structure of three 32-bit words, which outlives the call.
    let result =
        check(unsafe { libc::syscall(libc::SYS_kcmp, task.0, task.0, KCMP_EPOLL_TFD, fd as usize, &raw const slot) })?;
    Ok(result == 0)
}
