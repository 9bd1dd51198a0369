//! Namespaces and what lies in them: both halves, dump and restore (namespaces(7)).
//!
//! | file | what it owns |
//! | --- | --- |
//! | `kind` | the kinds of namespaces and how images number them |
//! | `mountinfo` | [`MountTable`]: the mounts that a process sees |
//! | `time` | clocks |
//!
//! A tree may live in ferry's own namespace of a kind, which is then neither saved nor made, or all of it in one other,
//! which its root's is. Anything else is refused.

mod kind;
mod mountinfo;
mod time;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;

pub use kind::{NamespaceIds, NamespaceKind};
pub use mountinfo::{Device, ImagePath, Mount, MountTable};

use crate::error::Refusal;
use crate::images::ids::TaskKobjIdsEntry;
use crate::images::ns::TimensEntry;
use crate::images::{Kind, Sink, SinkError, encode};
use crate::sys::HostPid;
use crate::tree::TaskRef;

/// What is to be taken from outside instead of being saved.
#[derive(Clone, Debug, Default)]
pub struct NamespaceOptions {
    /// Mounts that the restore is given: where they are in the tree's namespace, and the key by which they are asked for then.
    pub external_mounts: BTreeMap<PathBuf, String>,
    /// Namespaces that the restore is given, by kind and inode, and the key by which they are asked for then.
    pub external_namespaces: BTreeMap<(NamespaceKind, u64), String>,
    /// Whether the restore is to make an empty network namespace, which others will fill.
    pub empty_net: bool,
}

/// Why the namespaces of a tree could not be examined.
#[derive(Debug, thiserror::Error)]
#[error("pid {pid}: cannot read {what}: {source}")]
pub struct CollectNamespacesError {
    /// The task, as ferry sees it.
    pub pid: HostPid,
    /// What was to be read.
    pub what: String,
    /// Why it was not.
    pub source: io::Error,
}

/// The namespaces of a tree, as found.
#[derive(Debug)]
pub struct Collected {
    own: NamespaceIds,
    root: NamespaceIds,
    tasks: HashMap<HostPid, NamespaceIds>,
    time: TimensEntry,
    refusals: Vec<Refusal>,
}

impl Collected {
    /// Looks at the namespaces of `all`, the tasks below and including `root`. Tasks that are gone, or zombies, are
    /// passed over.
    ///
    /// # Errors
    /// When what the root's namespaces hold cannot be read.
    pub fn collect(
        root: &TaskRef,
        all: &[TaskRef],
        _options: &NamespaceOptions,
    ) -> Result<Self, CollectNamespacesError> {
        let cannot = |pid: HostPid, what: &str| {
            let what = what.to_owned();
            move |source| CollectNamespacesError { pid, what, source }
        };
        let me = HostPid(std::process::id() as i32);
        let mut numbering = kind::Numbering::default();
        let (own_inodes, _) = kind::inodes(me).map_err(cannot(me, "ferry's own namespaces"))?;
        let own = numbering.number(&own_inodes);
        let (root_inodes, _) = kind::inodes(root.pid).map_err(cannot(root.pid, "its namespaces"))?;
        let root_ids = numbering.number(&root_inodes);
        let mut tasks = HashMap::with_capacity(all.len() + 1);
        let mut refusals = Vec::new();
        for task in std::iter::once(root).chain(all) {
            if tasks.contains_key(&task.pid) {
                continue;
            }
            let Ok((inodes, others)) = kind::inodes(task.pid) else { continue };
            let ids = numbering.number(&inodes);
            for kind in NamespaceKind::ALL {
                if ids.get(*kind) != root_ids.get(*kind) {
                    refusals.push(task.refuse(
                        format!("{} namespace", kind.name()),
                        format!("it is another than that of the tree's root (pid {})", root.ns_pid),
                        "trees with more than one namespace of a kind cannot be saved yet",
                    ));
                } else if others.contains(kind) {
                    refusals.push(task.refuse(
                        format!("{} namespace", kind.name()),
                        "its next child would be put into another one",
                        "trees with more than one namespace of a kind cannot be saved yet",
                    ));
                }
            }
            tasks.insert(task.pid, ids);
        }
        for kind in NamespaceKind::ALL {
            if root_ids.get(*kind) != own.get(*kind) && *kind != NamespaceKind::Time {
                refusals.push(root.refuse(
                    format!("{} namespace", kind.name()),
                    "it is not ferry's own",
                    "this kind of namespace cannot be saved yet",
                ));
            }
        }
        let time = time::collect(root.pid).map_err(cannot(root.pid, "the clocks of its time namespace"))?;
        Ok(Self { own, root: root_ids, tasks, time, refusals })
    }

    /// The numbers of ferry's own namespaces, for the inventory: a task that has the same lives in them.
    pub fn own_ids(&self) -> NamespaceIds {
        self.own
    }

    /// The numbers of a task's namespaces; none for a zombie.
    pub fn ids(&self, pid: HostPid) -> Option<NamespaceIds> {
        self.tasks.get(&pid).copied()
    }

    /// Fills the namespace fields of a task's `entry`; those of a zombie are left as they are.
    pub fn fill(&self, pid: HostPid, entry: &mut TaskKobjIdsEntry) {
        if let Some(ids) = self.tasks.get(&pid) {
            ids.fill(entry);
        }
    }

    /// Whether the tree has a namespace of this kind that is not ferry's.
    pub fn is_foreign(&self, kind: NamespaceKind) -> bool {
        self.root.get(kind) != self.own.get(kind)
    }

    /// What cannot be saved.
    pub fn refusals(&self) -> &[Refusal] {
        &self.refusals
    }

    /// Writes the images of the namespaces that are not ferry's.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn dump(&self, sink: &mut dyn Sink) -> Result<(), SinkError> {
        let number = if self.is_foreign(NamespaceKind::Time) { self.root.get(NamespaceKind::Time) } else { 0 };
        sink.put(&Kind::Timens.name_for(number), &encode(Kind::Timens, std::slice::from_ref(&self.time)))
    }
}
