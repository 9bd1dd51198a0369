//! Handing memory that comes later over to the daemon that brings it ([`crate::lazy`]).
//!
//! Before: every task has its mappings and the pages that it needs at once, and no task of the tree will be made any more but
//! threads. After: whoever touches a missing page waits for the daemon, the kernel on behalf of a task included. Nothing may touch
//! the memory of tasks in between but by the mappings that miss nothing; what was touched would be zeros for ever.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use super::Restore;
use super::checkpoint::MemoryImages;
use super::error::RestoreError;
use super::live::LiveTask;
use super::script::Script;
use crate::sys::{pidfd, userfaultfd};

impl Restore<'_> {
    /// Whether pages come later.
    pub(super) fn is_lazy(&self) -> bool {
        self.options.lazy.is_some()
    }

    /// Has the first task, and with it all that it makes, get no huge pages: one for a page that is there would be zeros for
    /// its neighbours that come later. Each task's own setting comes with its identity.
    pub(super) fn forbid_huge_pages(&self, script: &mut Script) {
        if self.is_lazy() {
            let arguments = [libc::PR_SET_THP_DISABLE as u64, 1];
            script.must("forbid them", "transparent huge pages", libc::SYS_prctl, &arguments);
        }
    }

    /// Registers what is missing, and gives the descriptors to the daemon.
    pub(super) fn hand_over_memory(&mut self) -> Result<(), RestoreError> {
        let Some(daemon) = &self.options.lazy else { return Ok(()) };
        let gone = |source: std::io::Error| RestoreError::Lazy { problem: source.to_string() };
        let members = self.checkpoint.tasks.iter().enumerate();
        let (alive, exited): (Vec<_>, Vec<_>) = members.partition(|(_, task)| task.memory.is_some());
        let mut scripts = Vec::with_capacity(alive.len());
        for (place, _) in &alive {
            let mut script = Script::default();
            let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
            script.must("make it", "userfaultfd", libc::SYS_userfaultfd, &[flags]);
            scripts.push((*place, script));
        }
        let numbers = self.live.run(scripts)?;
        let mut closing = Vec::with_capacity(alive.len());
        for ((place, images), results) in alive.iter().zip(&numbers) {
            let task = self.live.task(*place);
            let failed = |errno| task.step("have its missing pages brought", "userfaultfd", errno);
            let number = results[0].map_err(failed)?;
            let memory = images.memory.as_ref().map_or(Ok(None), |memory| take(task, number, memory).map(Some));
            if let Some(descriptor) = memory.map_err(failed)? {
                daemon.hand_over(images.pid, task.host, descriptor.as_fd()).map_err(gone)?;
            }
            let mut script = Script::default();
            script.attempt(libc::SYS_close, &[number]);
            closing.push((*place, script));
        }
        for (_, images) in exited {
            daemon.exited(images.pid).map_err(gone)?;
        }
        self.live.run(closing).map(drop)
    }

    /// Tells the daemon that it may bring pages that nobody waits for.
    pub(super) fn all_run(&self) {
        // They run: without a daemon its watcher ends them.
        if let Some(Err(error)) = self.options.lazy.as_ref().map(|daemon| daemon.finished()) {
            tracing::warn!(%error, "the tree runs, but the daemon that brings its pages is gone");
        }
    }
}

fn take(task: &LiveTask, number: u64, memory: &MemoryImages) -> Result<OwnedFd, Errno> {
    let process = pidfd::open(task.host)?;
    let descriptor = pidfd::get_fd(process.as_fd(), number as i32)?;
    userfaultfd::handshake_for_events(&descriptor)?;
    let misses = |range: &std::ops::Range<u64>| {
        let first = memory.later.partition_point(|later| later.end <= range.start);
        memory.later.get(first).is_some_and(|later| later.start < range.end)
    };
    for mapping in memory.layout.mappings.iter().filter(|mapping| mapping.can_be_lazy() && misses(&mapping.range)) {
        userfaultfd::register(&descriptor, mapping.range.clone())?;
    }
    Ok(descriptor)
}
