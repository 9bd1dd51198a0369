//! The restore half: which namespaces a tree gets, and what is put into them.
//!
//! The root is cloned with [`RestorePlan::clone_flags`] and sits in its runner. [`RestorePlan::restore`] then gives its namespaces their
//! content: what a thread can join (uts, ipc, net) is set from a thread of ferry's own, the rest by calls of the root.
//! Everything lives in namespaces that only the root is in, so that it all goes with the root.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns};

use super::enter::visit;
use super::kind::{NamespaceIds, NamespaceKind};
use super::mounts::{Finding, MountPlan, RestoreMountsError};
use super::{ipc, net, time, uts};
use crate::agent::{AgentError, Runner};
use crate::files::OpenMaster;
use crate::images::core::CoreEntry;
use crate::images::ids::TaskKobjIdsEntry;
use crate::images::inventory::InventoryEntry;
use crate::images::ipc::{IpcMsgEntry, IpcVarEntry};
use crate::images::mnt::MntEntry;
use crate::images::net::{NetDeviceEntry, NetnsEntry};
use crate::images::ns::{PidnsEntry, TimensEntry, UtsnsEntry};
use crate::images::pstree::PstreeEntry;
use crate::images::{ImageSet, Kind, Reader, SourceError};
use crate::sys::{HostPid, pidfd};

/// Where a restored tree's namespaces are to be, besides what the images say.
#[derive(Debug, Default)]
pub struct RestoreNamespaceOptions {
    /// The new root of the tree's mount namespace; `/` when there is none.
    pub root: Option<PathBuf>,
    /// What external mounts are, by their keys: paths here.
    pub external_mounts: BTreeMap<String, PathBuf>,
    /// Whether mounts that the dump found outside by itself are taken from where it found them.
    pub found_mounts: bool,
    /// What external network and pid namespaces are, by their keys.
    pub external_namespaces: BTreeMap<String, OwnedFd>,
    /// Namespaces that the tree is to join, instead of those of the images.
    pub join: Vec<(NamespaceKind, OwnedFd)>,
    /// Whether a new network namespace is left empty, for others to fill.
    pub empty_net: bool,
    /// The SELinux context of mounts that were mounted with one (`context=`).
    pub mount_context: Option<String>,
    /// Whether what is external comes from a bundle's config, of which remedies then speak.
    pub of_bundle: bool,
    /// Whether the clocks of a tree that lived in ferry's own time namespace show ferry's, instead of going on.
    pub keep_clocks: bool,
}

/// Why a restore of namespaces could not be planned.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum PlanNamespacesError {
    /// An image cannot be read.
    #[error(transparent)]
    Images(#[from] SourceError),
    /// An image is missing.
    #[error("image {name} is missing")]
    Missing { name: String },
    /// An image contradicts itself.
    #[error("image {name}: {problem}")]
    Damaged { name: String, problem: String },
}

/// Why namespaces could not be restored.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum RestoreNamespacesError {
    /// The root task's agent failed, or one of its calls did.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Mounts could not be made.
    #[error(transparent)]
    Mounts(#[from] RestoreMountsError),
    /// Another namespace could not be filled or joined.
    #[error("{what}: {source}")]
    Namespace { what: String, source: io::Error },
}

/// Something that stands in the way of a restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceObstacle {
    /// What it is about.
    pub object: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for NamespaceObstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.problem)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "; {}", self.remedy) }
    }
}

/// How the namespaces of a tree will be made.
pub struct RestorePlan {
    /// Kinds that are made by the root's clone.
    cloned: Vec<NamespaceKind>,
    /// Namespaces that the root joins, as descriptors that it inherits.
    joined: Vec<(NamespaceKind, OwnedFd)>,
    cgroup: bool,
    time: Option<TimensEntry>,
    mounts: Option<MountPlan>,
    uts: Option<UtsnsEntry>,
    ipc: Option<IpcVarEntry>,
    net: Option<Box<net::Net>>,
    obstacles: Vec<NamespaceObstacle>,
}

impl RestorePlan {
    /// Reads what `images` say of namespaces, and decides. Nothing is made.
    ///
    /// # Errors
    /// [`PlanNamespacesError`]: images are damaged.
    pub fn new(images: &ImageSet, mut options: RestoreNamespaceOptions) -> Result<Self, PlanNamespacesError> {
        let (own, root) = numbers(images)?;
        let mut plan = Self {
            cloned: Vec::new(),
            joined: Vec::new(),
            cgroup: false,
            time: None,
            mounts: None,
            uts: None,
            ipc: None,
            net: None,
            obstacles: Vec::new(),
        };
        for kind in NamespaceKind::ALL {
            let join = options.join.iter().position(|(joined, _)| joined == kind);
            if let Some(index) = join {
                plan.joined.push(options.join.swap_remove(index));
            } else if root.get(*kind) != own.get(*kind) {
                plan.plan_kind(*kind, root.get(*kind), images, &mut options)?;
            } else if *kind == NamespaceKind::Time && !options.keep_clocks {
                plan.time = images.entry(Kind::Timens, &Kind::Timens.name_for(0u32))?;
            }
        }
        Ok(plan)
    }

    fn plan_kind(
        &mut self,
        kind: NamespaceKind,
        number: u32,
        images: &ImageSet,
        options: &mut RestoreNamespaceOptions,
    ) -> Result<(), PlanNamespacesError> {
        match kind {
            NamespaceKind::User => self.obstacle("user namespace", "user namespaces cannot be restored yet"),
            NamespaceKind::Cgroup => self.cgroup = true,
            NamespaceKind::Time => self.time = Some(needed(images, Kind::Timens, number)?),
            NamespaceKind::Uts => {
                self.uts = Some(needed(images, Kind::Utsns, number)?);
                self.cloned.push(kind);
            }
            NamespaceKind::Ipc => {
                self.find_ipc_objects(images, number)?;
                self.ipc = images.entry(Kind::IpcVar, &Kind::IpcVar.name_for(number))?;
                self.cloned.push(kind);
            }
            NamespaceKind::Pid => {
                let entry: Option<PidnsEntry> = images.entry(Kind::Pidns, &Kind::Pidns.name_for(number))?;
                self.clone_or_join(kind, entry.and_then(|entry| entry.ext_key), options);
            }
            NamespaceKind::Net => self.plan_net(number, images, options)?,
            NamespaceKind::Mnt => {
                let name = Kind::Mnts.name_for(number);
                let entries: Vec<MntEntry> = images
                    .entries(Kind::Mnts, &name)?
                    .ok_or_else(|| PlanNamespacesError::Missing { name: name.clone() })?;
                let root = options.root.clone().unwrap_or_else(|| "/".into());
                let mounts = MountPlan::new(&entries, images, root, options)
                    .map_err(|problem| PlanNamespacesError::Damaged { name, problem })?;
                let obstacle = |finding: &Finding| NamespaceObstacle {
                    object: finding.object.clone(),
                    problem: finding.problem.clone(),
                    remedy: finding.remedy.clone(),
                };
                self.obstacles.extend(mounts.findings().iter().map(obstacle));
                self.mounts = Some(mounts);
                self.cloned.push(kind);
            }
        }
        Ok(())
    }

    fn plan_net(
        &mut self,
        number: u32,
        images: &ImageSet,
        options: &mut RestoreNamespaceOptions,
    ) -> Result<(), PlanNamespacesError> {
        let settings: Option<NetnsEntry> = images.entry(Kind::Netns, &Kind::Netns.name_for(number))?;
        let key = settings.as_ref().and_then(|settings| settings.ext_key.clone());
        let filled = key.is_none() && !options.empty_net;
        self.clone_or_join(NamespaceKind::Net, key, options);
        let Some(settings) = settings.filter(|_| filled) else { return Ok(()) };
        let raw = |kind: Kind| images.bytes(&kind.name_for(number)).map(Option::unwrap_or_default);
        let links: Option<Vec<NetDeviceEntry>> = images.entries(Kind::Netdev, &Kind::Netdev.name_for(number))?;
        let net = net::Net {
            settings,
            links: links.unwrap_or_default(),
            addresses: raw(Kind::Ifaddr)?,
            routes: raw(Kind::Route)?,
            routes6: raw(Kind::Route6)?,
            rules: raw(Kind::Rule)?,
            problems: Vec::new(),
        };
        for (object, problem) in net::obstacles(&net) {
            self.obstacle(&object, &problem);
        }
        for (kind, what) in [
            (Kind::Iptables, "iptables rules"),
            (Kind::Ip6tables, "ip6tables rules"),
            (Kind::Nftables, "nftables rules"),
        ] {
            if !net::is_only_lock(&String::from_utf8_lossy(&raw(kind)?)) {
                self.obstacle(what, "packet filters cannot be restored yet");
            }
        }
        self.net = Some(Box::new(net));
        Ok(())
    }

    fn clone_or_join(&mut self, kind: NamespaceKind, key: Option<String>, options: &mut RestoreNamespaceOptions) {
        match key {
            None => self.cloned.push(kind),
            Some(key) => match options.external_namespaces.remove(&key) {
                Some(namespace) => self.joined.push((kind, namespace)),
                None => self.obstacles.push(NamespaceObstacle {
                    object: format!("{} namespace", kind.name()),
                    problem: format!("it is external, and nothing is given for its key {key:?}"),
                    remedy: match options.of_bundle {
                        true => "give its path in the bundle's config.json (linux.namespaces)".to_owned(),
                        false => format!("--inherit-fd 'fd[N]:{key}'"),
                    },
                }),
            },
        }
    }

    fn find_ipc_objects(&mut self, images: &ImageSet, number: u32) -> Result<(), PlanNamespacesError> {
        for (kind, what) in
            [(Kind::IpcnsShm, "shared memory"), (Kind::IpcnsMsg, "message queues"), (Kind::IpcnsSem, "semaphores")]
        {
            let name = kind.name_for(number);
            if let Some(bytes) = images.bytes(&name)? {
                // What follows the first entry differs; that there is one is enough.
                let mut reader = Reader::new(&name, kind, &bytes).map_err(SourceError::from)?;
                if reader.next_entry::<IpcMsgEntry>().map_or(true, |entry| entry.is_some()) {
                    self.obstacle(&format!("System V {what}"), "IPC objects cannot be restored yet");
                }
            }
        }
        Ok(())
    }

    fn obstacle(&mut self, object: &str, problem: &str) {
        let (object, problem) = (object.to_owned(), problem.to_owned());
        self.obstacles.push(NamespaceObstacle { object, problem, remedy: String::new() });
    }

    /// What stands in the way; nothing has been made.
    pub fn obstacles(&self) -> &[NamespaceObstacle] {
        &self.obstacles
    }

    /// The `CLONE_NEW*` flags for the root.
    pub fn clone_flags(&self) -> u64 {
        self.cloned.iter().fold(0, |flags, kind| flags | kind.clone_flag())
    }

    /// Whether the tree gets a namespace of this kind that is not ferry's, new or given. Not asked for cgroup and time.
    pub fn has(&self, kind: NamespaceKind) -> bool {
        self.cloned.contains(&kind) || self.joins(kind).is_some()
    }

    /// Whether the tree gets any namespace that is not ferry's.
    pub fn has_any(&self) -> bool {
        !self.cloned.is_empty() || !self.joined.is_empty()
    }

    /// Whether the root's pids are those of a pid namespace that is not ferry's.
    pub fn has_pid_namespace(&self) -> bool {
        self.has(NamespaceKind::Pid)
    }

    /// Whether the tree gets a mount namespace of its own.
    pub fn has_mount_namespace(&self) -> bool {
        self.mounts.is_some()
    }

    fn joins(&self, kind: NamespaceKind) -> Option<BorrowedFd<'_>> {
        self.joined.iter().find(|(joined, _)| *joined == kind).map(|(_, namespace)| namespace.as_fd())
    }

    /// Prepares the calling thread to clone the root: a pid namespace that is given has to be joined before.
    ///
    /// # Errors
    /// Those of setns(2).
    pub fn before_clone(&self) -> Result<(), RestoreNamespacesError> {
        self.join_for_children(self.joins(NamespaceKind::Pid))
    }

    /// Undoes [`Self::before_clone`], in the same thread.
    ///
    /// # Errors
    /// Those of setns(2).
    pub fn after_clone(&self) -> Result<(), RestoreNamespacesError> {
        if self.joins(NamespaceKind::Pid).is_none() {
            return Ok(());
        }
        let failed = |source| RestoreNamespacesError::Namespace { what: "ferry's own pid namespace".into(), source };
        let own = std::fs::File::open("/proc/self/ns/pid").map_err(failed)?;
        self.join_for_children(Some(own.as_fd()))
    }

    fn join_for_children(&self, namespace: Option<BorrowedFd<'_>>) -> Result<(), RestoreNamespacesError> {
        namespace.map_or(Ok(()), |namespace| {
            setns(namespace, CloneFlags::CLONE_NEWPID).map_err(|errno| RestoreNamespacesError::Namespace {
                what: "the pid namespace to join".into(),
                source: errno.into(),
            })
        })
    }

    /// Gives the root's namespaces their content. It sits in its runner, in its cgroups, and has no children yet. Returns the
    /// masters of terminals that it has open because their slaves are mounted somewhere.
    ///
    /// # Errors
    /// [`RestoreNamespacesError`]; ending the root undoes what was made.
    pub fn restore(&self, root: &Runner, pid: HostPid) -> Result<Vec<OpenMaster>, RestoreNamespacesError> {
        let mut batch = root.batch();
        for (kind, namespace) in self.joined.iter().filter(|(kind, _)| *kind != NamespaceKind::Pid) {
            // The root has inherited the descriptor.
            batch.must(libc::SYS_setns, &[namespace.as_raw_fd() as u64, kind.clone_flag()]);
        }
        if self.cgroup {
            batch.must(libc::SYS_unshare, &[NamespaceKind::Cgroup.clone_flag()]);
        }
        if !batch.is_empty() {
            batch.run()?.all_succeeded()?;
        }
        if let Some(clocks) = &self.time {
            restore_clocks(clocks, root, pid)?;
        }
        // Both mostly wait for the kernel.
        std::thread::scope(|scope| {
            let others = scope.spawn(|| self.restore_from_outside(pid));
            let mounts = self.mounts.as_ref().map_or(Ok(Vec::new()), |mounts| mounts.restore(root, pid));
            let others = others.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let open = mounts?;
            others.map(|()| open)
        })
    }

    fn restore_from_outside(&self, pid: HostPid) -> Result<(), RestoreNamespacesError> {
        let mut kinds = Vec::new();
        kinds.extend(self.uts.as_ref().map(|_| NamespaceKind::Uts));
        kinds.extend(self.ipc.as_ref().map(|_| NamespaceKind::Ipc));
        kinds.extend(self.net.as_ref().map(|_| NamespaceKind::Net));
        if kinds.is_empty() {
            return Ok(());
        }
        let failed = |what: &str| {
            let what = format!("{what} namespace");
            move |source| RestoreNamespacesError::Namespace { what, source }
        };
        let task = pidfd::open(pid).map_err(|errno| failed("root's uts, ipc or net")(errno.into()))?;
        visit(task.as_fd(), &kinds, || {
            self.uts.as_ref().map_or(Ok(()), uts::restore).map_err(failed("uts"))?;
            self.ipc.as_ref().map_or(Ok(()), ipc::restore).map_err(failed("ipc"))?;
            self.net.as_deref().map_or(Ok(()), net::restore).map_err(failed("net"))
        })
        .map_err(failed("root's uts, ipc or net"))?
    }
}

/// Moves the root, which has one thread, into a new time namespace whose clocks go on.
fn restore_clocks(clocks: &TimensEntry, root: &Runner, pid: HostPid) -> Result<(), RestoreNamespacesError> {
    let failed = |source| RestoreNamespacesError::Namespace { what: "time namespace".into(), source };
    root.call(libc::SYS_unshare, &[NamespaceKind::Time.clone_flag()])?;
    // Offsets can be set until the first task is in.
    let offsets = time::offsets_for(clocks).map_err(failed)?;
    std::fs::write(format!("/proc/{pid}/timens_offsets"), offsets).map_err(failed)?;
    let mut batch = root.batch();
    let path = batch.path("/proc/self/ns/time_for_children");
    let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
    let open = batch.must(libc::SYS_openat, &[libc::AT_FDCWD as u64, path.0, flags]);
    let join = batch.must(libc::SYS_setns, &[0, NamespaceKind::Time.clone_flag()]);
    batch.pass(open, join, 0);
    let answers = batch.run()?;
    answers.all_succeeded()?;
    root.call(libc::SYS_close, &[answers.value(open)?])?;
    Ok(())
}

fn needed<M: prost::Message + Default>(images: &ImageSet, kind: Kind, number: u32) -> Result<M, PlanNamespacesError> {
    let name = kind.name_for(number);
    images.entry(kind, &name)?.ok_or(PlanNamespacesError::Missing { name })
}

/// The numbers of the dumper's namespaces, and those of the root task's.
fn numbers(images: &ImageSet) -> Result<(NamespaceIds, NamespaceIds), PlanNamespacesError> {
    let missing = |name: &str| PlanNamespacesError::Missing { name: name.to_owned() };
    let name = Kind::Inventory.name();
    let inventory: InventoryEntry = images.entry(Kind::Inventory, &name)?.ok_or_else(|| missing(&name))?;
    let own = inventory.root_ids.ok_or_else(|| PlanNamespacesError::Damaged {
        name: name.clone(),
        problem: "it does not tell the dumper's own namespaces".into(),
    })?;
    let name = Kind::Pstree.name();
    let tree: Vec<PstreeEntry> = images.entries(Kind::Pstree, &name)?.ok_or_else(|| missing(&name))?;
    let root = tree.first().ok_or_else(|| missing(&name))?.pid;
    let ids: Option<TaskKobjIdsEntry> = images.entry(Kind::Ids, &Kind::Ids.name_for(root))?;
    let ids = match ids {
        Some(ids) => Some(ids),
        None => images.entry::<CoreEntry>(Kind::Core, &Kind::Core.name_for(root))?.and_then(|core| core.ids),
    };
    let ids = ids.ok_or_else(|| missing(&Kind::Ids.name_for(root)))?;
    Ok((NamespaceIds::of(&own), NamespaceIds::of(&ids)))
}
