//! The sets of cgroups that tasks are in, and their numbers.
//!
//! A task in a cgroup namespace of its own (cgroup_namespaces(7)) sees its cgroups relative to that namespace's root, which must
//! be restored too. The kernel shows `/proc/PID/cgroup` relative to the namespace of the reader, so a thread that joins the
//! task's namespace and reads it learns where the root is; nothing has to run in the task.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Member, SaveError, TaskSet};
use crate::hierarchy::{CgroupSet, Hierarchies};

/// The number of the set that the dumping process itself is in. CRIU's inventory has it as `root_cg_set`.
pub const OWN_SET: u32 = 1;

/// The sets seen so far.
#[derive(Debug)]
pub struct SetTable {
    hierarchies: Hierarchies,
    own: CgroupSet,
    sets: Vec<TaskSet>,
    /// Position in `sets` by members.
    known: HashMap<Vec<(String, String, usize)>, u32>,
    /// Numbers by what `/proc/PID/cgroup` says and the cgroup namespace: most tasks of a tree are where others are.
    of_processes: HashMap<(String, u64), u32>,
    /// The same for threads, by the number of their process's set.
    of_threads: HashMap<(String, u32), u32>,
}

impl SetTable {
    /// A table with nothing but the caller's own set.
    ///
    /// # Errors
    /// When the hierarchies cannot be read.
    pub fn new() -> Result<SetTable, SaveError> {
        Self::within(Hierarchies::detect()?)
    }

    /// The same, with hierarchies that are reached otherwise.
    ///
    /// # Errors
    /// When the caller's own cgroups cannot be read.
    pub fn within(hierarchies: Hierarchies) -> Result<SetTable, SaveError> {
        let own = hierarchies.of_task(i32::try_from(std::process::id()).unwrap_or_default())?;
        Ok(SetTable {
            hierarchies,
            own,
            sets: Vec::new(),
            known: HashMap::new(),
            of_processes: HashMap::new(),
            of_threads: HashMap::new(),
        })
    }

    /// The number of the set that a process is in, a new one if need be.
    ///
    /// # Errors
    /// When the task is gone, or is outside the root of its own cgroup namespace.
    pub fn of_process(&mut self, pid: i32) -> Result<u32, SaveError> {
        let namespace = fs::metadata(format!("/proc/{pid}/ns/cgroup"))
            .map_err(|source| SaveError::Namespace { pid, source })?
            .ino();
        let key = (said_of(pid)?, namespace);
        if let Some(set) = self.of_processes.get(&key) {
            return Ok(*set);
        }
        let set = self.find_process(pid, &key.0)?;
        // Its threads are where it is, for the most part.
        self.of_threads.insert((key.0.clone(), set), set);
        self.of_processes.insert(key, set);
        Ok(set)
    }

    fn find_process(&mut self, pid: i32, said: &str) -> Result<u32, SaveError> {
        let outside = self.hierarchies.of_text(pid, said)?;
        let inside = self.seen_from_inside(pid)?;
        let mut members = Vec::new();
        for member in &outside.memberships {
            let name = member.hierarchy.name();
            let inner = inside
                .as_ref()
                .and_then(|set| set.memberships.iter().find(|inner| inner.hierarchy == member.hierarchy));
            let namespace_prefix = match inner {
                None => 0,
                Some(inner) => prefix_of(&member.path, &inner.path)
                    .ok_or_else(|| SaveError::OutsideNamespace { pid, path: member.path.clone() })?,
            };
            members.push(Member { hierarchy: name, path: member.path.clone(), namespace_prefix });
        }
        Ok(self.number_of(outside, members))
    }

    /// The number of the set that one thread is in, which only differs from its process's in threaded hierarchies. The
    /// namespace of `process_set`, the number of its process's set, is the thread's too.
    ///
    /// # Errors
    /// When the thread is gone.
    pub fn of_thread(&mut self, tid: i32, process_set: u32) -> Result<u32, SaveError> {
        let key = (said_of(tid)?, process_set);
        if let Some(set) = self.of_threads.get(&key) {
            return Ok(*set);
        }
        let set = self.find_thread(tid, &key.0, process_set)?;
        self.of_threads.insert(key, set);
        Ok(set)
    }

    fn find_thread(&mut self, tid: i32, said: &str, process_set: u32) -> Result<u32, SaveError> {
        let outside = self.hierarchies.of_text(tid, said)?;
        let of_process =
            self.sets.iter().find(|set| set.id == process_set).map(|set| set.members.clone()).unwrap_or_default();
        let members = outside
            .memberships
            .iter()
            .map(|member| {
                let name = member.hierarchy.name();
                let namespace_prefix =
                    of_process.iter().find(|other| other.hierarchy == name).map_or(0, |other| other.namespace_prefix);
                Member { hierarchy: name, path: member.path.clone(), namespace_prefix }
            })
            .collect();
        Ok(self.number_of(outside, members))
    }

    /// The sets, without the caller's own.
    pub fn sets(&self) -> &[TaskSet] {
        &self.sets
    }

    /// The caller's own cgroup in the hierarchy of that name.
    pub(super) fn own_path(&self, hierarchy: &str) -> &str {
        let member = self.own.memberships.iter().find(|member| member.hierarchy.name() == hierarchy);
        member.map_or("/", |member| &member.path)
    }

    pub(super) fn hierarchies(&self) -> &Hierarchies {
        &self.hierarchies
    }

    fn number_of(&mut self, set: CgroupSet, members: Vec<Member>) -> u32 {
        if set == self.own && members.iter().all(|member| member.namespace_prefix == 0) {
            return OWN_SET;
        }
        let key = members
            .iter()
            .map(|member| (member.hierarchy.clone(), member.path.clone(), member.namespace_prefix))
            .collect::<Vec<_>>();
        if let Some(id) = self.known.get(&key) {
            return *id;
        }
        let id = self.sets.last().map_or(OWN_SET, |set| set.id) + 1;
        self.known.insert(key, id);
        self.sets.push(TaskSet { id, members });
        id
    }

    /// The cgroups of a process as it sees them itself, `None` when it is in the caller's cgroup namespace.
    fn seen_from_inside(&self, pid: i32) -> Result<Option<CgroupSet>, SaveError> {
        let path = format!("/proc/{pid}/ns/cgroup");
        let fail = |source| SaveError::Namespace { pid, source };
        let own = fs::metadata("/proc/self/ns/cgroup").map_err(fail)?;
        let theirs = fs::metadata(&path).map_err(fail)?;
        if (own.dev(), own.ino()) == (theirs.dev(), theirs.ino()) {
            return Ok(None);
        }
        let namespace = File::open(path).map_err(fail)?;
        // A thread of its own, since it does not come back.
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::ControlGroup))
                        .map_err(|errno| fail(errno.into()))?;
                    Ok(Some(self.hierarchies.of_task(pid)?))
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// `/proc/TASK/cgroup`.
fn said_of(task: i32) -> Result<String, SaveError> {
    let path = PathBuf::from(format!("/proc/{task}/cgroup"));
    fs::read_to_string(&path).map_err(|source| SaveError::Read { path, source })
}

/// How much of `outside` is above the namespace in which the same cgroup is called `inside`.
fn prefix_of(outside: &str, inside: &str) -> Option<usize> {
    if outside == inside {
        return Some(0);
    }
    let below = if inside == "/" { "" } else { inside };
    outside.strip_suffix(below).map(str::len).filter(|_| !inside.starts_with("/.."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_outside_the_namespace_is_measured() {
        assert_eq!(prefix_of("/foo/bar", "/bar"), Some(4));
        assert_eq!(prefix_of("/foo/bar", "/"), Some(8));
        assert_eq!(prefix_of("/foo", "/foo"), Some(0));
        assert_eq!(prefix_of("/", "/"), Some(0));
        assert_eq!(prefix_of("/foo/bar", "/../other"), None);
        assert_eq!(prefix_of("/foo/bar", "/baz"), None);
    }
}
