//! What a process has in common with others that no image can hold: told from outside, of running tasks too.

use super::DumpOptions;
use crate::error::Refusal;
use crate::procfs::{self, Ids, Stat};
use crate::sys::kcmp;
use crate::tree::TaskRef;

/// A tree whose session or group is led from outside can only be restored into another job of a shell. `ids` are the root's, and
/// `level` that of its pid namespace below ferry's.
pub fn outside_job(task: &TaskRef, ids: &Ids, level: usize, options: &DumpOptions) -> Option<Refusal> {
    let at = |ids: &[i32]| ids.get(level).copied().unwrap_or(0);
    let (session, group) = (at(&ids.session), at(&ids.group));
    if options.shell_job || (session == task.ns_pid.0 && (group == task.ns_pid.0)) {
        return None;
    }
    Some(task.refuse(
        "session",
        format!("the root of the tree does not lead its session {session} and process group {group}"),
        "start it with setsid, or give --shell-job to have it restored into the session of whoever restores it",
    ))
}

/// Objects that processes share when they were cloned so, and that cannot be saved as shared yet.
pub fn shared_with_parent(task: &TaskRef, parent: &TaskRef) -> Vec<Refusal> {
    let kinds = [
        (kcmp::Kind::Vm, "memory", "CLONE_VM"),
        (kcmp::Kind::Fs, "working directory and root", "CLONE_FS"),
        (kcmp::Kind::Sighand, "signal handlers", "CLONE_SIGHAND"),
    ];
    kinds
        .into_iter()
        .filter(|(kind, ..)| kcmp::compare(*kind, (task.pid, 0), (parent.pid, 0)).is_ok_and(|order| order.is_eq()))
        .map(|(_, what, flag)| {
            task.refuse(
                what,
                format!("it is shared with pid {} ({}) by clone(2), {flag}", parent.ns_pid, parent.comm),
                "processes that share it cannot be saved yet",
            )
        })
        .collect()
}

/// The same of running processes: a parent that waits in vfork(2), where it cannot be stopped, shares its memory only until then.
pub fn shared_with_running_parent(task: &TaskRef, parent: &TaskRef) -> Vec<Refusal> {
    let waits = |tid| Stat::read(tid).is_ok_and(|stat| stat.state == 'D');
    if procfs::threads(parent.pid).is_ok_and(|threads| threads.into_iter().any(waits)) {
        return Vec::new();
    }
    shared_with_parent(task, parent)
}

/// A process whose first thread has ended while others run on.
pub fn without_leader(task: &TaskRef) -> Refusal {
    let remedy = "have the program keep its main thread, or end the process";
    task.refuse("threads", "its main thread has ended while others run on, which cannot be saved yet", remedy)
}
