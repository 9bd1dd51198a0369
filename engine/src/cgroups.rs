//! The cgroups of a tree: both halves, dump and restore (cgroups(7)).
//!
//! Which *set* of cgroups a task is in stands in its `core` image, by number; what the sets are, and the directories with
//! their properties, in `cgroup.img`. The set that the dumper itself is in is in no image: a task of it is restored to wherever
//! the restorer is. [`ferry_cgroup::tree`] reads and makes cgroups; here is when, and how images tell of them.
//!
//! A restore makes the directories before the first task, and moves every task as soon as it exists, before it has memory: what a
//! cgroup limits or counts begins with that.

mod image;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ferry_cgroup::tree::HierarchyTree;
use ferry_cgroup::{
    CgroupTree, ChosenProperties, Frozen, Hierarchies, HierarchyError, Mode, OWN_SET, RestoredCgroups, SaveError,
    SetTable,
};

use crate::files::{NameJournal, NewName};
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
    /// Control files to save and restore besides those that are known, or instead of them.
    pub properties: Vec<ChosenProperties>,
    /// A folder with a mount of every hierarchy, instead of those of the host.
    pub yard: Option<PathBuf>,
    /// At a restore: `roots` are all that there may be. A hierarchy without one is left out, and nothing may lie elsewhere.
    pub confined: bool,
}

impl CgroupOptions {
    fn hierarchies(&self) -> Result<Hierarchies, HierarchyError> {
        self.yard.as_deref().map_or_else(Hierarchies::detect, Hierarchies::in_yard)
    }
}

impl Default for CgroupOptions {
    /// Cgroups are not managed.
    fn default() -> Self {
        let (roots, controllers, properties) = (Vec::new(), Vec::new(), Vec::new());
        Self { mode: Mode::Ignore, roots, controllers, properties, yard: None, confined: false }
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
            CgroupTree::collect_from(&self.table, &options.roots, &options.properties, frozen)?
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
        if options.confined {
            leave_out_foreign(&mut plan.tree, options);
        }
        for names in controllers {
            let of = |wanted: &Option<String>| wanted.as_ref().is_some_and(|wanted| names.contains(wanted));
            let root = options.roots.iter().find(|(wanted, _)| of(wanted));
            let root = root.or_else(|| options.roots.iter().find(|(wanted, _)| wanted.is_none()));
            if let Some((_, root)) = root {
                plan.tree.change_root(names.first().map(String::as_str), root);
            }
        }
        if options.confined
            && let Some(head) = outside_of_roots(&plan.tree, options)
        {
            let problem = format!("it has cgroups at /{head}, and only the container's own may be made");
            return Err(RestoreError::Inconsistent { name: Kind::Cgroup.name(), problem });
        }
        Ok(plan)
    }

    /// Whether there is anything to make.
    pub fn is_empty(&self) -> bool {
        self.tree.sets.is_empty()
    }

    /// Makes the directories. Dropping what it returns removes them; `journal` is told of each, for when ferry is killed.
    ///
    /// # Errors
    /// Every obstacle at once, before anything is made; or the step that failed.
    pub fn make(
        &self,
        journal: Option<&mut (dyn NameJournal + 'static)>,
    ) -> Result<Cgroups, ferry_cgroup::RestoreError> {
        let hierarchies = self.options.hierarchies()?;
        let mut record = Record { journal, folders: 0 };
        let restored =
            self.tree.restore_within(self.options.mode, hierarchies, &self.options.properties, &mut |directory| {
                record.coming(directory)
            })?;
        Ok(Cgroups { restored, managed: !self.is_empty(), own: self.own })
    }
}

/// Keeps record of directories that are made.
struct Record<'a> {
    journal: Option<&'a mut (dyn NameJournal + 'static)>,
    folders: usize,
}

impl Record<'_> {
    fn coming(&mut self, directory: &Path) -> io::Result<()> {
        let Some(journal) = &mut self.journal else { return Ok(()) };
        let (Some(above), Some(name)) = (directory.parent(), directory.file_name()) else { return Ok(()) };
        let folder = File::open(above)?;
        self.folders += 1;
        journal.coming(NewName {
            folder: folder.as_fd(),
            // From the end on, as the folders of files count from 0.
            folder_number: usize::MAX - self.folders,
            name: name.as_bytes(),
            is_directory: true,
        })
    }
}

/// Whether a root is given for the hierarchy.
fn has_root(saved: &HierarchyTree, options: &CgroupOptions) -> bool {
    options.roots.iter().any(|(wanted, _)| wanted.as_ref().is_none_or(|wanted| saved.controllers.contains(wanted)))
}

/// Leaves out hierarchies without a root in which the tasks had one cgroup alone: whoever restores has put them into another.
fn leave_out_foreign(tree: &mut CgroupTree, options: &CgroupOptions) {
    let goes = |saved: &HierarchyTree| {
        !has_root(saved, options) && saved.heads.iter().all(|head| head.children.is_empty()) && saved.heads.len() < 2
    };
    let names: Vec<String> = tree.hierarchies.iter().filter(|saved| goes(saved)).map(HierarchyTree::name).collect();
    tree.hierarchies.retain(|saved| !names.contains(&saved.name()));
    tree.sets.iter_mut().for_each(|set| set.members.retain(|member| !names.contains(&member.hierarchy)));
}

/// A topmost directory that is neither a root nor below one.
fn outside_of_roots<'a>(tree: &'a CgroupTree, options: &CgroupOptions) -> Option<&'a str> {
    let within = |saved: &HierarchyTree, path: &str| {
        options.roots.iter().any(|(wanted, root)| {
            wanted.as_ref().is_none_or(|wanted| saved.controllers.contains(wanted))
                && path
                    .strip_prefix(root.trim_start_matches('/'))
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    };
    let heads = tree.hierarchies.iter().flat_map(|saved| saved.heads.iter().map(move |head| (saved, head)));
    heads
        .map(|(saved, head)| (saved, head.name.as_str()))
        .find(|(saved, name)| !within(saved, name))
        .map(|(_, name)| name)
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

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_cgroup::tree::{Directory, Member, TaskSet};

    fn hierarchy(name: &str, heads: &[(&str, usize)]) -> HierarchyTree {
        let directory =
            |name: &str, children| Directory { name: name.into(), permissions: None, properties: Vec::new(), children };
        let head =
            |(name, below): &(&str, usize)| directory(name, (0..*below).map(|_| directory("x", Vec::new())).collect());
        HierarchyTree { controllers: vec![name.into()], heads: heads.iter().map(head).collect(), threaded: true }
    }

    fn tree(hierarchies: Vec<HierarchyTree>) -> CgroupTree {
        let member =
            |saved: &HierarchyTree| Member { hierarchy: saved.name(), path: "/old".into(), namespace_prefix: 0 };
        CgroupTree { sets: vec![TaskSet { id: 2, members: hierarchies.iter().map(member).collect() }], hierarchies }
    }

    fn confined() -> CgroupOptions {
        let roots = vec![(Some("pids".to_owned()), "/new".to_owned())];
        CgroupOptions { mode: Mode::Soft, roots, confined: true, ..CgroupOptions::default() }
    }

    #[test]
    fn hierarchies_without_a_root_are_left_out_unless_something_would_be_lost() {
        let mut tree =
            tree(vec![hierarchy("pids", &[("old", 1)]), hierarchy("cpu", &[("old", 0)]), hierarchy("", &[("old", 1)])]);
        leave_out_foreign(&mut tree, &confined());
        let names: Vec<String> = tree.hierarchies.iter().map(HierarchyTree::name).collect();
        assert_eq!(names, ["pids", ""]);
        assert_eq!(tree.sets[0].members.len(), 2);
        tree.change_root(Some("pids"), "/new");
        assert_eq!(outside_of_roots(&tree, &confined()), Some("old"), "of v2, where there is none");
    }

    #[test]
    fn an_image_cannot_name_cgroups_elsewhere() {
        let outside = |heads: &[(&str, usize)]| {
            let mut tree = tree(vec![hierarchy("pids", heads)]);
            tree.change_root(Some("pids"), "/new");
            outside_of_roots(&tree, &confined()).map(str::to_owned)
        };
        assert_eq!(outside(&[("old", 1)]), None);
        assert_eq!(outside(&[("old", 1), ("system.slice", 0)]).as_deref(), Some("system.slice"));
        assert_eq!(outside(&[("newer", 0)]).as_deref(), Some("newer"));
    }
}
