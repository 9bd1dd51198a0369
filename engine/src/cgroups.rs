//! The cgroups of a tree: both halves, dump and restore (cgroups(7)).
//!
//! Which *set* of cgroups a task is in stands in its `core` image, by number; what the sets are, and the directories with
//! their properties, in `cgroup.img`. The set that the dumper itself is in is in no image: a task of it is restored to wherever
//! the restorer is. [`ferry_cgroup::tree`] reads and makes cgroups; here is when, and how images tell of them.
//!
//! A restore makes the directories before the first task, and moves every task as soon as it exists, before it has memory: what a
//! cgroup limits or counts begins with that.

mod image;

use std::path::PathBuf;

use ferry_cgroup::{
    CgroupTree, Frozen, Hierarchies, HierarchyError, Mode, OWN_SET, RestoredCgroups, SaveError, SetTable,
};

use crate::images::cgroup::CgroupEntry;
use crate::images::core::CoreEntry;
use crate::images::{ImageSet, Kind};
use crate::restore::RestoreError;
use crate::sys::HostPid;

/// How cgroups are saved or restored.
#[derive(Clone, Debug)]
pub struct CgroupOptions {
    /// What is done with them. A dump knows only two ways: [`Mode::Ignore`] leaves directories and properties out.
    pub mode: Mode,
    /// At a restore: where a controller's cgroups (or, with `None`, all others') go, as absolute paths within the hierarchy. At a
    /// dump: the directories to begin at, instead of those that tasks are in.
    pub roots: Vec<(Option<String>, String)>,
    /// At a dump: the only controllers to save; all if empty.
    pub controllers: Vec<String>,
    /// A folder with a mount of every hierarchy, instead of those of the host.
    pub yard: Option<PathBuf>,
}

impl CgroupOptions {
    fn hierarchies(&self) -> Result<Hierarchies, HierarchyError> {
        self.yard.as_deref().map_or_else(Hierarchies::detect, Hierarchies::in_yard)
    }
}

impl Default for CgroupOptions {
    /// Cgroups are not managed.
    fn default() -> Self {
        Self { mode: Mode::Ignore, roots: Vec::new(), controllers: Vec::new(), yard: None }
    }
}

/// The sets that tasks of a stopped tree are in.
#[derive(Debug)]
pub struct CgroupSets {
    table: SetTable,
}

impl CgroupSets {
    /// With nothing but ferry's own set.
    ///
    /// # Errors
    /// When the hierarchies of this host cannot be read.
    pub fn new(options: &CgroupOptions) -> Result<Self, SaveError> {
        Ok(Self { table: SetTable::within(options.hierarchies()?)? })
    }

    /// Notes the sets of a process's threads, the leader first, in their cores.
    ///
    /// # Errors
    /// When a task is gone, or is outside the root of its cgroup namespace.
    pub fn add<'a>(
        &mut self,
        threads: impl IntoIterator<Item = (HostPid, &'a mut CoreEntry)>,
    ) -> Result<(), SaveError> {
        let mut of_process = None;
        for (tid, core) in threads {
            let set = match of_process {
                None => self.table.of_process(tid.0)?,
                Some(process) => self.table.of_thread(tid.0, process)?,
            };
            of_process.get_or_insert(set);
            if let Some(thread) = &mut core.thread_core {
                thread.cg_set = Some(set);
            }
        }
        Ok(())
    }

    /// The content of `cgroup.img`; none when all tasks are where ferry is. `frozen` is what keeps them frozen, if they still are.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn dump(&self, options: &CgroupOptions, frozen: Option<&Frozen>) -> Result<Option<CgroupEntry>, SaveError> {
        if self.table.sets().is_empty() {
            return Ok(None);
        }
        let mut tree = if options.mode == Mode::Ignore {
            CgroupTree { sets: self.table.sets().to_vec(), hierarchies: Vec::new() }
        } else {
            CgroupTree::collect_from(&self.table, &options.roots, frozen)?
        };
        if !options.controllers.is_empty() {
            let chosen = |name: &str| name.split(',').any(|one| options.controllers.iter().any(|chosen| chosen == one));
            tree.hierarchies.retain(|saved| chosen(&saved.name()));
            tree.sets.iter_mut().for_each(|set| set.members.retain(|member| chosen(&member.hierarchy)));
        }
        Ok(Some(image::entry(&tree)))
    }
}

/// The number of ferry's own set, for the inventory.
pub const ROOT_SET: u32 = OWN_SET;

/// What a restore knows of cgroups.
#[derive(Debug)]
pub struct CgroupPlan {
    options: CgroupOptions,
    tree: CgroupTree,
    /// The set of whoever dumped.
    own: u32,
}

impl CgroupPlan {
    /// Reads `cgroup.img`; `own` is the number of the dumper's set, as the inventory tells.
    ///
    /// # Errors
    /// The image cannot be read.
    pub fn new(images: &ImageSet, own: Option<u32>, options: &CgroupOptions) -> Result<Self, RestoreError> {
        let mut plan = Self { options: options.clone(), tree: CgroupTree::default(), own: own.unwrap_or(OWN_SET) };
        if options.mode == Mode::Ignore {
            return Ok(plan);
        }
        let name = Kind::Cgroup.name();
        if let Some(entry) = images.entry::<CgroupEntry>(Kind::Cgroup, &name)? {
            plan.tree = image::tree(&entry).map_err(|problem| RestoreError::Inconsistent { name, problem })?;
        }
        let controllers: Vec<Vec<String>> = plan.tree.hierarchies.iter().map(|one| one.controllers.clone()).collect();
        for names in controllers {
            let of = |wanted: &Option<String>| wanted.as_ref().is_some_and(|wanted| names.contains(wanted));
            let root = options.roots.iter().find(|(wanted, _)| of(wanted));
            let root = root.or_else(|| options.roots.iter().find(|(wanted, _)| wanted.is_none()));
            if let Some((_, root)) = root {
                plan.tree.change_root(names.first().map(String::as_str), root);
            }
        }
        Ok(plan)
    }

    /// Whether there is anything to make.
    pub fn is_empty(&self) -> bool {
        self.tree.sets.is_empty()
    }

    /// Makes the directories. Dropping what it returns removes them.
    ///
    /// # Errors
    /// Every obstacle at once, before anything is made; or the step that failed.
    pub fn make(&self) -> Result<Cgroups, ferry_cgroup::RestoreError> {
        let hierarchies = self.options.hierarchies()?;
        let restored = self.tree.restore_within(self.options.mode, hierarchies)?;
        Ok(Cgroups { restored, managed: !self.is_empty(), own: self.own })
    }
}

/// Cgroups that tasks are put into. Dropped before [`Self::keep`], those that were made are removed, once they are empty.
#[derive(Debug)]
#[must_use = "dropping it removes the cgroups again"]
pub struct Cgroups {
    restored: RestoredCgroups,
    managed: bool,
    own: u32,
}

impl Cgroups {
    /// Puts the root into its cgroups, or, if those are seen from a namespace, where that namespace begins.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn place_root(&self, root: HostPid, core: &CoreEntry) -> Result<(), ferry_cgroup::RestoreError> {
        match self.set_of(core) {
            Some(set) if self.restored.move_to_namespace_root(root.0, set)? => Ok(()),
            Some(set) => self.restored.move_process(root.0, set),
            None => Ok(()),
        }
    }

    /// Puts a process that its maker has just cloned into its cgroups. `maker` is none for the root, in its namespaces now.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn place(
        &self,
        pid: HostPid,
        core: &CoreEntry,
        maker: Option<&CoreEntry>,
    ) -> Result<(), ferry_cgroup::RestoreError> {
        match self.set_of(core) {
            Some(set) if maker.is_none_or(|maker| self.set_of(maker) != Some(set)) => {
                self.restored.move_process(pid.0, set)
            }
            _ => Ok(()),
        }
    }

    /// Puts a thread where its process is not.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn place_thread(
        &self,
        tid: HostPid,
        core: &CoreEntry,
        leader: &CoreEntry,
    ) -> Result<(), ferry_cgroup::RestoreError> {
        match self.set_of(core) {
            Some(set) if self.set_of(leader) != Some(set) => self.restored.move_thread(tid.0, set),
            _ => Ok(()),
        }
    }

    /// The tree runs: what was made stays, and what was frozen is frozen again.
    ///
    /// # Errors
    /// When a freezer does not take its state.
    pub fn keep(mut self) -> Result<(), ferry_cgroup::RestoreError> {
        let frozen = self.restored.restore_freezer_states();
        self.restored.keep();
        frozen
    }

    /// The set that a task is to be in; none for what has none, and where cgroups are not managed.
    fn set_of(&self, core: &CoreEntry) -> Option<u32> {
        let of_thread = core.thread_core.as_ref().and_then(|thread| thread.cg_set);
        // Dumps before CRIU 3.17 have it with the process.
        let set = of_thread.or_else(|| core.tc.as_ref().and_then(|process| process.cg_set));
        // A zombie has none.
        set.filter(|set| self.managed && *set != 0).map(|set| if set == self.own { OWN_SET } else { set })
    }
}
