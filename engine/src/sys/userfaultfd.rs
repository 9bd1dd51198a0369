//! userfaultfd(2): filling another task's memory without zeroing it first, and having the kernel note which pages are written.
//!
//! The descriptor is made by the target (it belongs to the address space of its maker) and used here.
//! `UFFDIO_COPY` places a page only where none is, whatever the mapping's protection (ioctl_userfaultfd(2)).
#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use super::check;

/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd` (Linux 6.1).
pub const IOC_NEW: u64 = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// Flag of userfaultfd(2): faults of system calls are none of its business (Linux 5.11). Anybody may make such a descriptor, and
/// write-protection that the kernel resolves by itself works the same.
pub const USER_MODE_ONLY: u64 = 1;
const COPY_MODE_DONTWAKE: u64 = 1;

/// Agrees with the kernel on the interface; to be done once per descriptor.
pub fn handshake(uffd: impl AsFd) -> nix::Result<()> {
    handshake_for(uffd, 0)
}

/// The same for write-protection that the kernel resolves by itself (Linux 6.7).
///
/// # Errors
/// `EINVAL` from a kernel without it.
pub fn handshake_to_track(uffd: impl AsFd) -> nix::Result<()> {
    handshake_for(uffd, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED)
}

fn handshake_for(uffd: impl AsFd, features: u64) -> nix::Result<()> {
    let mut argument = [API, features, 0];
    // SAFETY: the argument has the layout of `struct uffdio_api`.
    check(i64::from(unsafe { libc::ioctl(uffd.as_fd().as_raw_fd(), UFFDIO_API, argument.as_mut_ptr()) })).map(drop)
}

/// Registers `range` for missing pages.
pub fn register(uffd: impl AsFd, range: Range<u64>) -> nix::Result<()> {
    register_for(uffd, range, REGISTER_MODE_MISSING)
}

/// Registers `range` so that its pages can be write-protected.
pub fn register_writes(uffd: impl AsFd, range: Range<u64>) -> nix::Result<()> {
    register_for(uffd, range, REGISTER_MODE_WP)
}

fn register_for(uffd: impl AsFd, range: Range<u64>, mode: u64) -> nix::Result<()> {
    let mut argument = [range.start, range.end - range.start, mode, 0];
    // SAFETY: the argument has the layout of `struct uffdio_register`.
    check(i64::from(unsafe { libc::ioctl(uffd.as_fd().as_raw_fd(), UFFDIO_REGISTER, argument.as_mut_ptr()) })).map(drop)
}

/// Ends the registration of `range`.
pub fn unregister(uffd: impl AsFd, range: Range<u64>) -> nix::Result<()> {
    let mut argument = [range.start, range.end - range.start];
    // SAFETY: the argument has the layout of `struct uffdio_range`.
    check(i64::from(unsafe { libc::ioctl(uffd.as_fd().as_raw_fd(), UFFDIO_UNREGISTER, argument.as_mut_ptr()) }))
        .map(drop)
}

/// Places `data` (whole pages) at `target` in the address space of `uffd`, where no page may be yet.
///
/// # Errors
/// `EEXIST` where a page is already; `ENOENT` where nothing is mapped or registered.
pub fn copy(uffd: impl AsFd, target: u64, data: &[u8]) -> nix::Result<()> {
    let mut done = 0;
    while done < data.len() {
        let mut argument =
            [target + done as u64, data[done..].as_ptr() as u64, (data.len() - done) as u64, COPY_MODE_DONTWAKE, 0];
        // SAFETY: the argument has the layout of `struct uffdio_copy` and its source covers the rest of `data`.
        let result =
            check(i64::from(unsafe { libc::ioctl(uffd.as_fd().as_raw_fd(), UFFDIO_COPY, argument.as_mut_ptr()) }));
        match result {
            Ok(_) => return Ok(()),
            Err(Errno::EAGAIN) if argument[4] as i64 > 0 => done += argument[4] as usize,
            Err(Errno::EAGAIN) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
