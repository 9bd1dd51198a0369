//! Pages that come after a tree runs again (post-copy).
//!
//! A restore leaves out the pages that its images call lazy, registers the mappings that miss them with a userfaultfd of each process
//! (userfaultfd(2)), and hands those to a *daemon*, which places pages when they are touched, brings the others meanwhile, and ends when
//! none is missing. It takes them from the images, or from a page server on the machine that the tree comes from.
//!
//! - [`missing`]: which pages an address space still misses.
//! - [`handshake`]: what a restore tells the daemon.
//! - [`source`], [`fetch`]: where pages come from.
//! - [`serve`]: the daemon's work.
//! - [`offer`]: the other end of [`fetch`], behind which is a stopped tree, or images.
//!
//! Invariant: as long as a page is missing, its userfaultfd is open somewhere. When the last descriptor goes, the kernel fills what is
//! missing with zeros. So the caller of [`serve::serve`] has a second process hold them, which ends the tree when this one dies.

pub mod fetch;
pub mod handshake;
pub mod missing;
pub mod offer;
pub mod serve;
pub mod source;

use crate::sys::userfaultfd;

/// Whether this process may make a userfaultfd that serves faults of system calls too, and hears what is done with the memory.
pub fn is_possible() -> bool {
    userfaultfd::make().is_ok_and(|descriptor| userfaultfd::handshake_for_events(descriptor).is_ok())
}
