//! Private memory of ferry's own whose pages are all there already, so that writing it takes no page fault.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use nix::errno::Errno;

/// A private anonymous mapping, populated.
pub struct TouchedMemory {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, as a `Box<[u8]>` would; the process may use it from any thread.
unsafe impl Send for TouchedMemory {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for TouchedMemory {}

impl TouchedMemory {
    /// Maps `len` bytes of zeros and has the kernel fault them in at once, in huge pages where it can (madvise(2),
    /// `MADV_POPULATE_WRITE`, Linux 5.14).
    ///
    /// # Errors
    /// Those of mmap(2), `EINVAL` for no bytes; `ENOMEM` and `EFAULT` when there is not as much memory.
    pub fn new(len: usize) -> nix::Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let memory = Self { base: NonNull::new(base.cast()).ok_or(Errno::EFAULT)?, len };
        // SAFETY: exactly the mapping made above; neither advice changes its content. Without huge pages it works too.
        let populated = unsafe {
            libc::madvise(base, len, libc::MADV_HUGEPAGE);
            libc::madvise(base, len, libc::MADV_POPULATE_WRITE)
        };
        Errno::result(populated).map(|_| memory)
    }
}

impl Deref for TouchedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is as long, initialised with zeros by the kernel, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl DerefMut for TouchedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` is the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl Drop for TouchedMemory {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped; nothing borrows it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
