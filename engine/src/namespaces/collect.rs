//! The dump half: the namespaces of a tree, as found, and their images.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use super::enter::visit;
use super::kind::{self, NamespaceIds, NamespaceKind};
use super::mounts::{FindMounts, Finding, Mounts};
use super::{ipc, net, time, uts};
use crate::error::Refusal;
use crate::images::ids::TaskKobjIdsEntry;
use crate::images::net::NetnsEntry;
use crate::images::ns::{PidnsEntry, TimensEntry, UtsnsEntry};
use crate::images::{Kind, Sink, SinkError, encode};
use crate::sys::{HostPid, NsPid};
use crate::tree::TaskRef;

/// What is to be taken from outside instead of being saved.
#[derive(Clone, Debug, Default)]
pub struct NamespaceOptions {
    /// Mounts that the restore is given: where they are in the tree's namespace, and the key by which they are asked for then.
    pub external_mounts: BTreeMap<PathBuf, String>,
    /// Which other mounts are to be found in ferry's own mount namespace, if any.
    pub found_mounts: Option<FindMounts>,
    /// Network and pid namespaces that the restore is given, by kind and inode, and the key by which they are asked for then.
    pub external_namespaces: BTreeMap<(NamespaceKind, u64), String>,
    /// Whether the restore is to make an empty network namespace, which others will fill.
    pub empty_net: bool,
    /// Mount points whose mounts are left out, as if they were not there.
    pub skipped_mounts: Vec<PathBuf>,
    /// Whether what is external comes from a bundle's config, of which remedies then speak.
    pub of_bundle: bool,
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

/// Why the namespaces of a tree could not be written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum DumpNamespacesError {
    /// The sink failed.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The mount namespace could not be joined.
    #[error("cannot join the mount namespace of pid {pid}: {source}")]
    Enter { pid: NsPid, source: io::Error },
    /// The network namespace could not be joined, or its settings could not be read.
    #[error("cannot read the network settings of pid {pid}: {source}")]
    Settings { pid: NsPid, source: io::Error },
    /// The content of a tmpfs could not be read.
    #[error("cannot read the content of the tmpfs at {point}: {source}")]
    Content { point: PathBuf, source: io::Error },
}

/// The network namespace, as it is to be saved.
#[derive(Debug)]
enum FoundNet {
    External(String),
    Empty,
    Full(Box<net::Net>),
}

/// What the namespaces hold that are not ferry's own.
#[derive(Debug, Default)]
struct Content {
    mounts: Option<Mounts>,
    uts: Option<UtsnsEntry>,
    ipc: Option<ipc::Ipc>,
    net: Option<FoundNet>,
    pid_key: Option<String>,
}

/// The namespaces of a tree, as found.
#[derive(Debug)]
pub struct Collected {
    own: NamespaceIds,
    root: NamespaceIds,
    root_task: (NsPid, OwnedFd),
    tasks: HashMap<HostPid, NamespaceIds>,
    content: Content,
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
        options: &NamespaceOptions,
    ) -> Result<Self, CollectNamespacesError> {
        let me = HostPid(std::process::id() as i32);
        let mut numbering = kind::Numbering::default();
        let (own_inodes, _) = kind::inodes(me).map_err(cannot(me, "ferry's own namespaces"))?;
        let own = numbering.number(&own_inodes);
        let of_root = kind::inodes(root.pid).map_err(cannot(root.pid, "its namespaces"))?;
        let root_ids = numbering.number(&of_root.0);
        let pidfd = root.pidfd().try_clone_to_owned().map_err(cannot(root.pid, "its descriptor"))?;
        let mut collected = Self {
            own,
            root: root_ids,
            root_task: (root.ns_pid, pidfd),
            tasks: HashMap::with_capacity(all.len() + 1),
            content: Content::default(),
            time: time::collect(root.pid).map_err(cannot(root.pid, "the clocks of its time namespace"))?,
            refusals: Vec::new(),
        };
        collected.add_task(root, root, &of_root, &mut numbering);
        for task in all {
            if !collected.tasks.contains_key(&task.pid)
                && let Ok(found) = kind::inodes(task.pid)
            {
                collected.add_task(task, root, &found, &mut numbering);
            }
        }
        collected.look_inside(root, &of_root.0, options)?;
        Ok(collected)
    }

    fn add_task(
        &mut self,
        task: &TaskRef,
        root: &TaskRef,
        (inodes, others): &(kind::Inodes, Vec<NamespaceKind>),
        numbering: &mut kind::Numbering,
    ) {
        let ids = numbering.number(inodes);
        for kind in NamespaceKind::ALL {
            let problem = if ids.get(*kind) != self.root.get(*kind) {
                format!("it is another than that of the tree's root (pid {})", root.ns_pid)
            } else if others.contains(kind) {
                "its next child would be put into another one".into()
            } else {
                continue;
            };
            self.refusals.push(task.refuse(
                format!("{} namespace", kind.name()),
                problem,
                "trees with more than one namespace of a kind cannot be saved yet",
            ));
        }
        self.tasks.insert(task.pid, ids);
    }

    /// Looks at what the namespaces hold that are not ferry's own.
    fn look_inside(
        &mut self,
        root: &TaskRef,
        inodes: &kind::Inodes,
        options: &NamespaceOptions,
    ) -> Result<(), CollectNamespacesError> {
        let foreign = |kind| self.root.get(kind) != self.own.get(kind);
        let key = |kind: NamespaceKind| options.external_namespaces.get(&(kind, inodes[kind as usize])).cloned();
        let mut findings = Vec::new();
        let mut content = Content::default();
        let refuse = |object: &str, problem: &str, remedy: &str| Finding {
            object: object.into(),
            problem: problem.into(),
            remedy: remedy.into(),
        };
        if foreign(NamespaceKind::User) {
            findings.push(refuse(
                "user namespace",
                "it is not ferry's own, and cannot be saved yet",
                "run ferry inside of it",
            ));
        }
        if foreign(NamespaceKind::Pid) {
            content.pid_key = key(NamespaceKind::Pid);
            if content.pid_key.is_none() && root.ns_pid != NsPid(1) {
                let problem = "the tree's root is not its first process, so that others are in it";
                findings.push(refuse("pid namespace", problem, "dump from its pid 1, or name it as external"));
            }
        }
        if foreign(NamespaceKind::Mnt) {
            let (mounts, found) = Mounts::collect(root, options, foreign(NamespaceKind::Cgroup))
                .map_err(cannot(root.pid, "the mounts of its namespace"))?;
            content.mounts = Some(mounts);
            findings.extend(found);
        }
        // What can be joined is looked at from inside, in one visit.
        let mut look = Vec::new();
        if foreign(NamespaceKind::Net) {
            match key(NamespaceKind::Net) {
                Some(key) => content.net = Some(FoundNet::External(key)),
                None if options.empty_net => content.net = Some(FoundNet::Empty),
                None => look.push(NamespaceKind::Net),
            }
        }
        look.extend([NamespaceKind::Uts, NamespaceKind::Ipc].into_iter().filter(|kind| foreign(*kind)));
        if !look.is_empty() {
            let number = self.root.get(NamespaceKind::Net);
            visit(root.pidfd(), &look, || -> io::Result<()> {
                for kind in &look {
                    match kind {
                        NamespaceKind::Uts => content.uts = Some(uts::collect()?),
                        NamespaceKind::Ipc => content.ipc = Some(ipc::collect()?),
                        _ => content.net = Some(FoundNet::Full(Box::new(net::collect(number)?))),
                    }
                }
                Ok(())
            })
            .flatten()
            .map_err(cannot(root.pid, "its uts, ipc and net namespaces from inside"))?;
        }
        if let Some(ipc) = &content.ipc {
            let refuse = |object: &String| refuse(object, "IPC objects cannot be saved yet", "remove it (ipcrm)");
            findings.extend(ipc.objects.iter().map(refuse));
        }
        if let Some(FoundNet::Full(net)) = &content.net {
            let remedy = "give the restore this network namespace from outside, or an empty one (--empty-ns net)";
            findings.extend(net.problems.iter().map(|(object, problem)| refuse(object, problem, remedy)));
        }
        self.refusals
            .extend(findings.into_iter().map(|finding| root.refuse(finding.object, finding.problem, finding.remedy)));
        self.content = content;
        Ok(())
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

    /// Writes what has to be read now, of namespaces that are not ferry's: mounts with the content of every tmpfs, and network
    /// settings. The tree is stopped.
    ///
    /// # Errors
    /// [`DumpNamespacesError`].
    pub fn dump_content(&self, sink: &mut dyn Sink) -> Result<(), DumpNamespacesError> {
        let number = |kind| self.root.get(kind);
        if let Some(mounts) = &self.content.mounts {
            let (ns_pid, pidfd) = &self.root_task;
            mounts.dump(*ns_pid, pidfd.as_fd(), number(NamespaceKind::Mnt), sink)?;
        }
        self.dump_net(number(NamespaceKind::Net), sink)
    }

    /// Writes what has been read. The tree may run on.
    ///
    /// # Errors
    /// [`DumpNamespacesError::Sink`].
    pub fn dump_records(&self, sink: &mut dyn Sink) -> Result<(), DumpNamespacesError> {
        let number = |kind| self.root.get(kind);
        if let Some(names) = &self.content.uts {
            sink.put(
                &Kind::Utsns.name_for(number(NamespaceKind::Uts)),
                &encode(Kind::Utsns, std::slice::from_ref(names)),
            )?;
        }
        if let Some(ipc) = &self.content.ipc {
            let name = Kind::IpcVar.name_for(number(NamespaceKind::Ipc));
            sink.put(&name, &encode(Kind::IpcVar, std::slice::from_ref(&ipc.limits)))?;
        }
        if let Some(key) = &self.content.pid_key {
            let entry = PidnsEntry { ext_key: Some(key.clone()) };
            sink.put(&Kind::Pidns.name_for(number(NamespaceKind::Pid)), &encode(Kind::Pidns, &[entry]))?;
        }
        // The clocks of ferry's own namespace are saved as number 0.
        let time = if self.is_foreign(NamespaceKind::Time) { number(NamespaceKind::Time) } else { 0 };
        sink.put(&Kind::Timens.name_for(time), &encode(Kind::Timens, std::slice::from_ref(&self.time)))?;
        Ok(())
    }

    fn dump_net(&self, number: u32, sink: &mut dyn Sink) -> Result<(), DumpNamespacesError> {
        match &self.content.net {
            None | Some(FoundNet::Empty) => Ok(()),
            Some(FoundNet::External(key)) => {
                let entry = NetnsEntry { ext_key: Some(key.clone()), ..NetnsEntry::default() };
                Ok(sink.put(&Kind::Netns.name_for(number), &encode(Kind::Netns, &[entry]))?)
            }
            Some(FoundNet::Full(net)) => {
                let (pid, pidfd) = &self.root_task;
                let mut links = net.links.clone();
                let settings = visit(pidfd.as_fd(), &[NamespaceKind::Net], || net::collect_settings(&mut links))
                    .flatten()
                    .map_err(|source| DumpNamespacesError::Settings { pid: *pid, source })?;
                sink.put(&Kind::Netns.name_for(number), &encode(Kind::Netns, &[settings]))?;
                sink.put(&Kind::Netdev.name_for(number), &encode(Kind::Netdev, &links))?;
                sink.put(&Kind::Ifaddr.name_for(number), &net.addresses)?;
                sink.put(&Kind::Route.name_for(number), &net.routes)?;
                sink.put(&Kind::Route6.name_for(number), &net.routes6)?;
                Ok(sink.put(&Kind::Rule.name_for(number), &net.rules)?)
            }
        }
    }
}

fn cannot(pid: HostPid, what: &str) -> impl FnOnce(io::Error) -> CollectNamespacesError {
    let what = what.to_owned();
    move |source| CollectNamespacesError { pid, what, source }
}
