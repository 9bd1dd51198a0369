//! Pids of another pid namespace, as ferry sees them (`NS_GET_PID_FROM_PIDNS`, Linux 6.11).
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

use super::{HostPid, NsPid, check};

const NS_GET_PID_FROM_PIDNS: libc::c_ulong = 0x8004_b706;

/// The thread that has `pid` in the namespace behind `namespace` (`/proc/PID/ns/pid`).
///
/// # Errors
/// `ENOTTY` before Linux 6.11; `ESRCH` when there is none.
pub fn translate(namespace: &File, pid: NsPid) -> nix::Result<HostPid> {
    // SAFETY: the argument is a number.
    let result = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_PID_FROM_PIDNS, pid.0) };
    check(i64::from(result)).map(|pid| HostPid(pid as i32))
}
