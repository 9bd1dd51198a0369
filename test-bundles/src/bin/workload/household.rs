//! Much at once: a tree with most of what a restore makes step by step, for tests that cut it short at each.

use crate::room::{Check, Room};
use crate::sys::Fault;
use crate::{epoll, filesystem, pipes, seccomp, sockets, threads, timers, tree};

/// Children in sessions and groups, an adopted one, an exited one, a stopped one, a filter, a deleted file, a pipe in use, listeners, timers, threads.
pub fn household(room: &Room) -> Result<Check, Fault> {
    // What forks comes first, so that no child holds what another part is about; threads come last.
    let parts = [
        tree::sessions,
        tree::orphans,
        tree::zombies,
        tree::stopped_child,
        seccomp::seccomp_filter,
        filesystem::deleted_file,
        pipes::pipe_between_processes,
        sockets::unix_listener,
        sockets::tcp_listener,
        timers::timers_posix,
        epoll::timerfd,
        threads::threads,
    ];
    let mut checks = parts.into_iter().map(|part| part(room)).collect::<Result<Vec<Check>, Fault>>()?;
    Ok(Box::new(move || checks.iter_mut().try_for_each(|check| check())))
}
