//! Typed wrappers of the kernel interfaces that `rustix` and `nix` lack.
//!
//! This is one of the two places of the crate where `unsafe` is allowed (the other is `agent/`): every
//! wrapper owns the argument checks that make its system call sound, so that the rest of the engine
//! stays safe code.

pub mod clone;
pub mod cpuid;
pub mod descriptor;
pub mod kcmp;
pub mod keep;
pub mod nsfs;
pub mod owner;
pub mod pagemap;
pub mod pidfd;
pub mod pidns;
pub mod process_vm;
pub mod processor;
pub mod ptrace;
pub mod robust;
pub mod shared;
pub mod sockopt;
pub mod terminal;
pub mod touched;
pub mod userfaultfd;
pub mod view;

use std::fmt;

/// A process or thread id as ferry's own pid namespace sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPid(pub i32);

/// A process or thread id as the innermost pid namespace of its task sees it: what images hold.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NsPid(pub i32);

impl fmt::Display for HostPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for HostPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host pid {}", self.0)
    }
}

impl fmt::Display for NsPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for NsPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {}", self.0)
    }
}

/// An address in another task. It cannot be dereferenced here.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct RemoteAddr(pub u64);

impl RemoteAddr {
    /// The address `bytes` further on.
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

impl fmt::Debug for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The size of a page of memory, in bytes.
///
/// Both supported architectures can be configured otherwise; images made with another size are
/// refused by the manifest check.
pub const PAGE_SIZE: u64 = 4096;

/// Turns a raw system call's result into the value or the error number it carries.
pub(crate) fn check(result: libc::c_long) -> nix::Result<u64> {
    if result == -1 { Err(nix::errno::Errno::last()) } else { Ok(result as u64) }
}
