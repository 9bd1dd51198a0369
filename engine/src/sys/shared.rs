//! Memory that ferry shares with other tasks: agents' areas.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use super::{RemoteAddr, check};

/// A shared mapping, of which the other side may change any byte at any time: only copied in and out, never borrowed.
pub struct SharedMemory {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and all access goes through raw copies and atomics.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; concurrent copies race only on bytes that the protocol gives to one side at a time.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `len` bytes of `file` from offset 0, shared and writable, at `at` if given (which must be free).
    ///
    /// # Errors
    /// Those of mmap(2); `EEXIST` when `at` is taken.
    pub fn map(file: impl AsFd, len: usize, at: Option<RemoteAddr>, executable: bool) -> nix::Result<Self> {
        let (hint, flags) = match at {
            Some(at) => (at.0 as *mut _, libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE),
            None => (std::ptr::null_mut(), libc::MAP_SHARED),
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE | if executable { libc::PROT_EXEC } else { 0 };
        // SAFETY: MAP_FIXED_NOREPLACE never replaces a mapping, so no memory in use is affected.
        let base = unsafe { libc::mmap(hint, len, protection, flags, file.as_fd().as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { base: NonNull::new(base.cast()).ok_or(Errno::EFAULT)?, len })
    }

    /// New shared memory of `len` bytes that no file backs; `flags` may ask for huge pages.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn anonymous(len: usize, flags: i32) -> nix::Result<Self> {
        let flags = flags & !libc::MAP_FIXED | libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { base: NonNull::new(base.cast()).ok_or(Errno::EFAULT)?, len })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the mapping is empty, which it never is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the mapping starts in this process.
    pub fn local_base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset, "access beyond the shared area");
        // SAFETY: just checked to lie inside the mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Copies `bytes` in at `offset`.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: `at` checks the range; source and destination cannot overlap, since nothing borrows the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(offset, bytes.len()), bytes.len()) }
    }

    /// Copies `bytes.len()` bytes out from `offset`.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(self.at(offset, bytes.len()), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// The 32-bit word at `offset`, for atomic access.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        // SAFETY: in range and aligned; the mapping lives as long as `self`, and atomics allow any concurrent change.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped; nothing borrows it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Sleeps until `word` is woken, differs from `expected`, or `timeout` is over (futex(2), FUTEX_WAIT).
pub fn futex_wait(word: &AtomicU32, expected: u32, timeout: Duration) {
    let timeout = libc::timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    // SAFETY: the word is a valid, aligned futex. Every outcome sends the caller back to check the word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const timeout) };
}

/// Wakes one waiter of `word` (futex(2), FUTEX_WAKE).
pub fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word is a valid, aligned futex.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}

/// Spins shortly, then sleeps, until `word` holds `wanted` or `patience` is over; tells whether it does.
pub fn await_word(word: &AtomicU32, wanted: u32, patience: Duration) -> bool {
    for _ in 0..400 {
        if word.load(Ordering::Acquire) == wanted {
            return true;
        }
        std::hint::spin_loop();
    }
    let seen = word.load(Ordering::Acquire);
    if seen != wanted {
        futex_wait(word, seen, patience);
    }
    word.load(Ordering::Acquire) == wanted
}

/// The calling thread's id, as futex words and robust lists want it.
pub fn this_thread() -> u32 {
    // SAFETY: takes no arguments and cannot fail.
    check(unsafe { libc::syscall(libc::SYS_gettid) }).unwrap_or(0) as u32
}
