//! Looking at the inside of a task's namespaces from a thread of ferry's own.
//!
//! setns(2) moves one thread. UTS, IPC and network namespaces can be joined by any thread; a mount namespace by one that
//! shares its root and working directory with no other (`unshare(CLONE_FS)`). The thread ends with the visit, so that no
//! other thread of ferry ever is anywhere else.

use std::io;
use std::os::fd::BorrowedFd;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use super::kind::NamespaceKind;

/// Runs `work` in a thread that is in the namespaces `kinds` of the task behind `pidfd`.
///
/// # Errors
/// Those of setns(2) and of starting a thread; `ESRCH` when the task is gone.
pub(crate) fn visit<T: Send>(
    pidfd: BorrowedFd<'_>,
    kinds: &[NamespaceKind],
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    let bits = kinds.iter().fold(0, |bits, kind| bits | kind.clone_flag());
    let flags = CloneFlags::from_bits_retain(bits as u32 as i32);
    thread::scope(|scope| {
        let visitor = thread::Builder::new().name("visitor".into()).spawn_scoped(scope, move || {
            if flags.contains(CloneFlags::CLONE_NEWNS) {
                unshare(CloneFlags::CLONE_FS)?;
            }
            // A pidfd names several namespaces at once (Linux 5.8).
            if !flags.is_empty() {
                setns(pidfd, flags)?;
            }
            Ok(work())
        })?;
        visitor.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
