//! userfaultfd(2): filling another task's memory without zeroing it first, having the kernel note which pages are written, and
//! bringing pages when they are touched.
//!
//! The descriptor is made by the target (it belongs to the address space of its maker) and used here.
//! `UFFDIO_COPY` places a page only where none is, whatever the mapping's protection (ioctl_userfaultfd(2)).
#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::{PAGE_SIZE, check};

/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd` (Linux 6.1).
pub const IOC_NEW: u64 = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
/// Events of fork(2), mremap(2), madvise(2) and munmap(2) (Linux 4.11).
const FEATURE_EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
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

/// The same to hear what the owner of the memory does with it ([`Event`]); whoever asks needs `CAP_SYS_PTRACE`.
///
/// # Errors
/// `EPERM` without the capability.
pub fn handshake_for_events(uffd: impl AsFd) -> nix::Result<()> {
    handshake_for(uffd, FEATURE_EVENTS)
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

/// What the kernel tells of registered memory. Whoever caused it waits, but for a fault until the page is there, until it is read.
#[derive(Debug)]
pub enum Event {
    /// A page that is missing was touched.
    Fault {
        /// Where, to the page.
        page: u64,
    },
    /// The process forked; this is for the child, which has the same pages and misses the same.
    Fork {
        /// The child's descriptor.
        child: OwnedFd,
    },
    /// A range was moved.
    Moved {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Bytes that were moved.
        length: u64,
    },
    /// The pages of a range are gone, or about to go (`MADV_DONTNEED` and its like): they are zeros from now on.
    Removed {
        /// Which.
        range: Range<u64>,
    },
    /// A range is no longer mapped.
    Unmapped {
        /// Which.
        range: Range<u64>,
    },
}

/// The next event, if there is one already. Faults come before what else happened, even if it happened later.
///
/// # Errors
/// Those of read(2), and `EPROTO` for an event that was not asked for.
pub fn read_event(uffd: impl AsFd) -> nix::Result<Option<Event>> {
    // `struct uffd_msg` (linux/userfaultfd.h): the event in the first byte, its arguments from the ninth on.
    let mut message = [0u8; 32];
    match rustix::io::read(&uffd, &mut message) {
        Ok(32) => {}
        Ok(0) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        Ok(_) => return Err(Errno::EPROTO),
        Err(errno) => return Err(Errno::from_raw(errno.raw_os_error())),
    }
    let word = |index: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[8 + 8 * index..16 + 8 * index]);
        u64::from_ne_bytes(bytes)
    };
    Ok(Some(match message[0] {
        0x12 => Event::Fault { page: word(1) & !(PAGE_SIZE - 1) },
        // SAFETY: the kernel has made this descriptor for whoever reads the message, and nobody else knows of it.
        0x13 => Event::Fork { child: unsafe { OwnedFd::from_raw_fd(word(0) as u32 as i32) } },
        0x14 => Event::Moved { from: word(0), to: word(1), length: word(2) },
        0x15 => Event::Removed { range: word(0)..word(1) },
        0x16 => Event::Unmapped { range: word(0)..word(1) },
        _ => return Err(Errno::EPROTO),
    }))
}

/// Places as much of `data` (whole pages) at `target` as there is room for before something stands in the way, and wakes who waits for
/// it: how many bytes, and what stood in the way.
///
/// That is `EEXIST` where a page is already, `ENOENT` where nothing is registered or a mapping ends, `EAGAIN` while an event waits to
/// be read, `ESRCH` when the process has ended or executes another program.
pub fn place(uffd: impl AsFd, target: u64, data: &[u8]) -> (usize, Option<Errno>) {
    let mut done = 0;
    while done < data.len() {
        let mut argument = [target + done as u64, data[done..].as_ptr() as u64, (data.len() - done) as u64, 0, 0];
        // SAFETY: the argument has the layout of `struct uffdio_copy` and its source covers the rest of `data`.
        let result =
            check(i64::from(unsafe { libc::ioctl(uffd.as_fd().as_raw_fd(), UFFDIO_COPY, argument.as_mut_ptr()) }));
        match (result, argument[4] as i64) {
            (Ok(_), _) => return (data.len(), None),
            (Err(Errno::EAGAIN), copied) if copied > 0 => done += copied as usize,
            (Err(errno), _) => return (done, Some(errno)),
        }
    }
    (done, None)
}

/// Places a page of zeros, and wakes who waits for it.
///
/// # Errors
/// As what stands in the way of [`place`].
pub fn place_zeros(uffd: impl AsFd, page: u64) -> nix::Result<()> {
    let mut argument = [page, PAGE_SIZE, 0, 0];
    // SAFETY: the argument has the layout of `struct uffdio_zeropage`.
    check(i64::from(unsafe { libc::ioctl(uffd.as_fd().as_raw_fd(), UFFDIO_ZEROPAGE, argument.as_mut_ptr()) })).map(drop)
}

/// Wakes who waits for a page, to look again.
pub fn wake(uffd: impl AsFd, page: u64) -> nix::Result<()> {
    let mut argument = [page, PAGE_SIZE];
    // SAFETY: the argument has the layout of `struct uffdio_range`.
    check(i64::from(unsafe { libc::ioctl(uffd.as_fd().as_raw_fd(), UFFDIO_WAKE, argument.as_mut_ptr()) })).map(drop)
}

/// A descriptor for this process's own memory, as a task makes it to hand it on: faults of system calls are its business too.
///
/// # Errors
/// `ENOSYS` from a kernel without it; `EPERM` without `CAP_SYS_PTRACE`.
pub fn make() -> nix::Result<OwnedFd> {
    // SAFETY: takes a number; the result is a new descriptor that nobody else owns.
    unsafe {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        Ok(OwnedFd::from_raw_fd(check(libc::syscall(libc::SYS_userfaultfd, flags))? as i32))
    }
}
