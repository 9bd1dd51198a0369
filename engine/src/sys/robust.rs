//! A robust futex list of our own: the kernel wakes the agents when this thread dies.
//!
//! get_robust_list(2): when a thread exits, for whatever reason, the kernel walks its list and, in each
//! futex word that holds the thread's id, sets `FUTEX_OWNER_DIED` and wakes a waiter. An agent sleeps on
//! such a word, so ferry's death reaches it without a descriptor in the target. The walk ends after 2,048
//! entries (`ROBUST_LIST_LIMIT`).
#![allow(unsafe_code)] // the list is a kernel ABI made of raw pointers into the shared areas.

use std::marker::PhantomData;
use std::{mem, ptr};

use super::check;

/// Set by the kernel in a futex word whose owner died.
pub const FUTEX_OWNER_DIED: u32 = 0x4000_0000;

#[repr(C)]
struct Node {
    next: *mut Node,
}

#[repr(C)]
struct Head {
    first: *mut Node,
    futex_offset: libc::c_long,
    pending: *mut Node,
}

/// This thread's robust list while it drives agents; glibc's own list is put back on drop.
pub struct RobustList {
    head: Box<Head>,
    previous: (*mut Head, usize),
    _this_thread: PhantomData<*mut ()>,
}

impl RobustList {
    /// Installs an empty list whose futex words lie `node_offset` bytes before their list nodes.
    pub fn install(node_offset: usize) -> nix::Result<Self> {
        let mut previous = (ptr::null_mut::<Head>(), 0usize);
        // SAFETY: both out pointers are valid for writes; pid 0 is this thread.
        check(unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut previous.0, &raw mut previous.1) })?;
        let mut head =
            Box::new(Head { first: ptr::null_mut(), futex_offset: -(node_offset as i64), pending: ptr::null_mut() });
        head.first = (&raw mut *head).cast();
        // SAFETY: the boxed head stays at its address until `drop` replaces it.
        check(unsafe { libc::syscall(libc::SYS_set_robust_list, &raw mut *head, mem::size_of::<Head>()) })?;
        Ok(Self { head, previous, _this_thread: PhantomData })
    }

    /// Adds the node at `node`.
    ///
    /// # Safety
    /// `node` must stay mapped and unused by others until [`Self::clear`] or the drop of this list.
    pub unsafe fn add(&mut self, node: *mut u8) {
        let node = node.cast::<Node>();
        // SAFETY: the caller vouches for the node; it is linked before the head points at it, so that the kernel sees a
        // whole list at every instant.
        unsafe { ptr::write_volatile(&raw mut (*node).next, self.head.first) };
        self.head.first = node;
    }

    /// Forgets all nodes.
    pub fn clear(&mut self) {
        self.head.first = (&raw mut *self.head).cast();
    }
}

impl Drop for RobustList {
    fn drop(&mut self) {
        // SAFETY: puts back exactly what `install` found; that list belongs to the C library and outlives the thread.
        unsafe { libc::syscall(libc::SYS_set_robust_list, self.previous.0, self.previous.1) };
    }
}
