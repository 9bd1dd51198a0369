//! Processes beside a tree that are in its cgroup, or in its pid namespace.
//!
//! The first would be frozen with the tree; and when the tree's cgroup was found frozen, they would run while it is thawed. The
//! second end when the tree's first process does, and no image holds them: commands that were started in a container from
//! outside (`exec`) are no descendants of its first process (pid_namespaces(7), setns(2)).
//!
//! Both are looked for twice: while the tree runs, and once it stands. The second time only processes that have come since
//! are asked for their namespace, since a process never changes its own.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

use ferry_cgroup::Freezer;

use crate::error::Refusal;
use crate::procfs::{Ids, Stat};
use crate::sys::{HostPid, NsPid};

/// What is known of the processes beside a tree.
pub(crate) struct Surroundings {
    root: HostPid,
    /// The inode of the pid namespace whose first process is the tree's root.
    pid_namespace: Option<u64>,
    /// Processes that are surely not in it.
    elsewhere: HashSet<HostPid>,
}

impl Surroundings {
    /// Looks at the processes beside the running tree below `root`; each refusal is an outsider. Processes that come or go
    /// meanwhile are left for the second look.
    pub fn look(root: HostPid, ns_pid: NsPid, freezer: Option<&Freezer>) -> (Self, Vec<Refusal>) {
        let own = pid_namespace(HostPid(std::process::id() as i32));
        let pid_namespace = pid_namespace(root).filter(|inode| ns_pid == NsPid(1) && Some(*inode) != own);
        let mut surroundings = Self { root, pid_namespace, elsewhere: HashSet::new() };
        let refusals = surroundings.refusals(|pid| surroundings.is_descendant(pid), freezer);
        surroundings.elsewhere = match surroundings.pid_namespace {
            Some(inode) => processes().into_iter().filter(|pid| is_elsewhere(*pid, inode)).collect(),
            None => HashSet::new(),
        };
        (surroundings, refusals)
    }

    /// Looks again, at the stopped tree that consists of `tree`.
    pub fn newcomers(&self, tree: &HashSet<HostPid>, freezer: Option<&Freezer>) -> Vec<Refusal> {
        self.refusals(|pid| tree.contains(&pid), freezer)
    }

    fn refusals(&self, is_ours: impl Fn(HostPid) -> bool, freezer: Option<&Freezer>) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        let mut named = HashSet::new();
        for pid in self.in_pid_namespace() {
            if !is_ours(pid) {
                refusals.extend(refusal(pid, "pid namespace", |pid| {
                    let problem = format!(
                        "process {pid} was started in the container from outside (exec) and is no descendant of its \
                         first process, so that it would be lost"
                    );
                    (problem, "end it, or wait for its end, and try again")
                }));
                named.insert(pid);
            }
        }
        let Some(freezer) = freezer else { return refusals };
        let directory = freezer.cgroup().directory().display();
        // If the list cannot be read, the freeze itself says why.
        for pid in freezer.processes().unwrap_or_default().into_iter().map(HostPid) {
            if !named.contains(&pid) && !is_ours(pid) {
                refusals.extend(refusal(pid, format!("cgroup {directory}"), |pid| {
                    let problem =
                        format!("process {pid} is in it, but does not belong to the tree of process {}", self.root);
                    (problem, "end it, move it to another cgroup, or give a cgroup that holds the tree alone")
                }));
            }
        }
        refusals
    }

    /// Every process that may be in the tree's pid namespace and is, but for those that are known to be elsewhere.
    fn in_pid_namespace(&self) -> Vec<HostPid> {
        let Some(inode) = self.pid_namespace else { return Vec::new() };
        let candidates = processes().into_iter().filter(|pid| !self.elsewhere.contains(pid));
        candidates.filter(|pid| pid_namespace(*pid) == Some(inode)).collect()
    }

    /// Whether a running process is below the root, or its line of parents cannot be told because one of them ends.
    fn is_descendant(&self, mut pid: HostPid) -> bool {
        while pid != self.root {
            match Stat::read(pid) {
                Ok(Stat { parent: 0 | 1, .. }) => return self.root.0 == 1,
                Ok(stat) => pid = HostPid(stat.parent),
                Err(_) => break,
            }
        }
        true
    }
}

fn is_elsewhere(pid: HostPid, inode: u64) -> bool {
    pid_namespace(pid).is_some_and(|other| other != inode)
}

/// The refusal of a process, unless it is gone or has ended.
fn refusal(
    pid: HostPid,
    object: impl Into<String>,
    words: impl FnOnce(HostPid) -> (String, &'static str),
) -> Option<Refusal> {
    let stat = Stat::read(pid).ok().filter(|stat| !matches!(stat.state, 'Z' | 'X'))?;
    let (problem, remedy) = words(pid);
    let ns_pid = Ids::read(pid).ok()?.innermost();
    Some(Refusal { pid: ns_pid, comm: stat.comm, object: object.into(), problem, remedy: remedy.into() })
}

/// None for zombies and processes that are gone.
fn pid_namespace(pid: HostPid) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/pid")).ok().map(|metadata| metadata.ino())
}

/// Every process that this pid namespace shows.
fn processes() -> Vec<HostPid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(HostPid).collect()
}
