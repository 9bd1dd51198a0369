//! Making a container's cgroups again: directories, properties, tasks; and undoing it.
//!
//! The order matters. Directories first, each with the properties that must precede children and tasks; then the other
//! properties; then the tasks are moved, when the caller has made them; the freezer's state last, when they are complete.
//! What was made or changed is recorded as it happens, so that the undo, which is what dropping means, removes exactly that.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::plan::{self, Obstacle, Step};
use super::properties::{self, Turn};
use super::{CgroupTree, ChosenProperties, Directory, Member, Mode, OWN_SET, Permissions, Property};
use crate::directory::{Cgroup, is_gone};
use crate::hierarchy::{Hierarchies, HierarchyError, Version};

/// How long a cgroup may stay busy while tasks that were killed leave it.
const BUSY: Duration = Duration::from_secs(5);

/// The bits that chmod(2) sets.
const MODE_BITS: u32 = 0o7777;

/// Why cgroups were not restored. Nothing that was made is left, but for what [`RestoreError::Undo`] names.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The hierarchies of this host, or the cgroups of a task, could not be read.
    #[error(transparent)]
    Hierarchy(#[from] HierarchyError),
    /// The tree cannot be made here. Nothing was done.
    #[error("the cgroups cannot be restored: {}", list(.0))]
    Refused(Vec<Obstacle>),
    /// A directory could not be made.
    #[error("cannot make the cgroup {}", .path.display())]
    Make {
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A property could not be written or read.
    #[error("cannot set {} to {value:?}", .path.display())]
    Property {
        /// The control file.
        path: PathBuf,
        /// What it was to be.
        value: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Owner or mode could not be set.
    #[error("cannot give {} to user {uid}, group {gid} with mode {mode:o}", .path.display())]
    Permissions {
        /// The directory or file.
        path: PathBuf,
        /// The owner.
        uid: u32,
        /// The group.
        gid: u32,
        /// The mode.
        mode: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The image has no such set.
    #[error("task {task} is to be in the cgroup set {set}, which the image does not have")]
    NoSet {
        /// The task.
        task: i32,
        /// The set.
        set: u32,
    },
    /// A task could not be moved.
    #[error("cannot move task {task} into the cgroup {}", .cgroup.display())]
    Move {
        /// The task.
        task: i32,
        /// The cgroup.
        cgroup: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Something that was made could not be removed, or a property not be set back.
    #[error("cannot undo the change of {}", .path.display())]
    Undo {
        /// The directory or control file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

fn list(obstacles: &[Obstacle]) -> String {
    obstacles.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Something that the undo sets back.
#[derive(Debug)]
enum Change {
    /// A directory was made.
    Made(Cgroup),
    /// A control file of an existing cgroup was written; this was in it.
    Wrote { cgroup: Cgroup, name: String, before: String },
    /// Owner and mode of something existing were changed; these they were.
    Permitted { path: PathBuf, before: Permissions },
}

/// Restored cgroups. Dropped, all that was made for them is removed, unless [`RestoredCgroups::keep`] was called.
#[derive(Debug)]
#[must_use = "dropping it removes the cgroups again"]
pub struct RestoredCgroups {
    /// The cgroups of each set, with the length of what is above the cgroup namespace.
    sets: HashMap<u32, Vec<(Member, Cgroup)>>,
    /// Freezer states still to be restored, outermost first.
    frozen: Vec<(Cgroup, Property)>,
    changes: Vec<Change>,
    hierarchies: Hierarchies,
}

impl CgroupTree {
    /// Makes the directories and writes the properties, as `mode` says. Tasks are moved afterwards.
    ///
    /// # Errors
    /// Every obstacle at once, before anything is made; or the step that failed, after which what was made is removed.
    pub fn restore(&self, mode: Mode) -> Result<RestoredCgroups, RestoreError> {
        self.restore_within(mode, Hierarchies::detect()?, &[], &mut |_| Ok(()))
    }

    /// The same, in hierarchies that are reached otherwise. One that is mounted nowhere, and in which there is something to make, is
    /// mounted for this. `coming` is told of each directory before it is made.
    ///
    /// # Errors
    /// As [`CgroupTree::restore`], and those of `coming`.
    pub fn restore_within(
        &self,
        mode: Mode,
        mut hierarchies: Hierarchies,
        chosen: &[ChosenProperties],
        coming: &mut dyn FnMut(&Path) -> io::Result<()>,
    ) -> Result<RestoredCgroups, RestoreError> {
        for saved in
            self.hierarchies.iter().filter(|saved| mode != Mode::Ignore && plan::describes_cgroups(self, saved))
        {
            if let Err(error) = hierarchies.provide(&saved.controllers) {
                // Then it is an obstacle, told with all others.
                tracing::debug!(%error, "a hierarchy of the image cannot be had");
            }
        }
        let mut restored =
            RestoredCgroups { sets: HashMap::new(), frozen: Vec::new(), changes: Vec::new(), hierarchies };
        if mode == Mode::Ignore {
            return Ok(restored);
        }
        let plan = plan::plan(self, mode, &restored.hierarchies, chosen).map_err(RestoreError::Refused)?;
        // An early return drops `restored`, which is the undo.
        for step in &plan.steps {
            if !step.exists {
                restored.make(step, coming)?;
            }
            if writes_properties(mode, step) {
                restored.restore_permissions(step.cgroup.directory(), step.saved.permissions)?;
                restored.restore_properties(step, Turn::Early)?;
            }
        }
        for step in plan.steps.iter().filter(|step| writes_properties(mode, step)) {
            restored.restore_properties(step, Turn::Usual)?;
            restored.frozen.extend(freezer_state(step.saved).map(|property| (step.cgroup.clone(), property.clone())));
        }
        restored.find_sets(self)?;
        Ok(restored)
    }
}

fn writes_properties(mode: Mode, step: &Step<'_>) -> bool {
    match mode {
        Mode::Ignore | Mode::None => false,
        Mode::Soft => !step.exists,
        Mode::Props | Mode::Full | Mode::Strict => true,
    }
}

fn freezer_state(saved: &Directory) -> Option<&Property> {
    saved.properties.iter().find(|property| properties::turn(&property.name) == Turn::Freezer)
}

impl RestoredCgroups {
    /// Moves a process with all its threads into a set's cgroups, where it is not in them already. It must not have begun to use
    /// what it is limited in. [`OWN_SET`] means to stay.
    ///
    /// # Errors
    /// When there is no such set, or the kernel refuses; the process may then be in some of them.
    pub fn move_process(&self, pid: i32, set: u32) -> Result<(), RestoreError> {
        self.move_task(pid, set, |_| Some("cgroup.procs"))
    }

    /// Moves one thread, in those hierarchies where threads can differ.
    ///
    /// # Errors
    /// As [`RestoredCgroups::move_process`].
    pub fn move_thread(&self, tid: i32, set: u32) -> Result<(), RestoreError> {
        self.move_task(tid, set, |cgroup| match cgroup.version() {
            Version::V1 => Some("tasks"),
            Version::V2 => {
                let threaded = cgroup.read("cgroup.type").is_ok_and(|kind| kind.contains("threaded"));
                threaded.then_some("cgroup.threads")
            }
        })
    }

    /// Moves a process to the cgroups that are to become the root of its cgroup namespace; it then unshares that, and is moved
    /// into its set. False when the set has no namespace and nothing was done.
    ///
    /// # Errors
    /// As [`RestoredCgroups::move_process`].
    pub fn move_to_namespace_root(&self, pid: i32, set: u32) -> Result<bool, RestoreError> {
        let mut moved = false;
        for (member, cgroup) in self.members(pid, set)? {
            let below = member.path.get(member.namespace_prefix..).unwrap_or_default();
            if member.namespace_prefix > 0 {
                let mut root = cgroup.clone();
                for _ in below.split('/').filter(|name| !name.is_empty()) {
                    root = root.parent().unwrap_or(root);
                }
                write_task(pid, &root, "cgroup.procs")?;
                moved = true;
            }
        }
        Ok(moved)
    }

    /// Puts cgroups into the freezer state that was saved. To be called last: their tasks do nothing more afterwards.
    ///
    /// # Errors
    /// When a control file cannot be written.
    pub fn restore_freezer_states(&mut self) -> Result<(), RestoreError> {
        for (cgroup, property) in std::mem::take(&mut self.frozen) {
            self.restore_property(&cgroup, &property)?;
        }
        Ok(())
    }

    /// The directories that were made, outermost first.
    pub fn made(&self) -> Vec<&Path> {
        let made = self.changes.iter().filter_map(|change| match change {
            Change::Made(cgroup) => Some(cgroup.directory()),
            Change::Wrote { .. } | Change::Permitted { .. } => None,
        });
        made.collect()
    }

    /// The restore succeeded: nothing is undone any more.
    pub fn keep(mut self) {
        self.changes.clear();
    }

    /// Removes what was made and sets back what was changed, as dropping does, and tells what goes wrong. The tasks must have been
    /// killed; it waits for them to be gone.
    ///
    /// # Errors
    /// Everything that could not be undone.
    pub fn undo(mut self) -> Result<(), Vec<RestoreError>> {
        let errors = self.set_back();
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn find_sets(&mut self, tree: &CgroupTree) -> Result<(), RestoreError> {
        for set in &tree.sets {
            let mut members = Vec::new();
            for member in &set.members {
                let saved = tree.hierarchies.iter().find(|saved| saved.name() == member.hierarchy);
                // Hierarchies that are missing here are only those in whose root the tasks were. And a cgroup that was
                // not saved was the dumping process's own: where there is none of that name, tasks stay in this process's.
                let Some(hierarchy) = saved.and_then(|saved| plan::find(&self.hierarchies, saved)) else { continue };
                let cgroup = hierarchy.cgroup(&member.path)?;
                if cgroup.exists() {
                    members.push((member.clone(), cgroup));
                } else {
                    let cgroup = cgroup.directory().display();
                    tracing::warn!(%cgroup, "the image does not describe this cgroup: its tasks stay in that of ferry");
                }
            }
            self.sets.insert(set.id, members);
        }
        Ok(())
    }

    fn members(&self, task: i32, set: u32) -> Result<&[(Member, Cgroup)], RestoreError> {
        if set == OWN_SET || set == 0 {
            return Ok(&[]);
        }
        // Without any set the cgroups are not managed.
        match self.sets.get(&set) {
            Some(members) => Ok(members),
            None if self.sets.is_empty() => Ok(&[]),
            None => Err(RestoreError::NoSet { task, set }),
        }
    }

    fn move_task(
        &self,
        task: i32,
        set: u32,
        file: impl Fn(&Cgroup) -> Option<&'static str>,
    ) -> Result<(), RestoreError> {
        let members = self.members(task, set)?;
        if members.is_empty() {
            return Ok(());
        }
        let now = self.hierarchies.of_task(task)?;
        for (_, cgroup) in members {
            let is_there = now.memberships.iter().any(|member| member.cgroup().is_ok_and(|now| now == *cgroup));
            if let Some(file) = file(cgroup).filter(|_| !is_there) {
                write_task(task, cgroup, file)?;
            }
        }
        Ok(())
    }

    /// Makes a directory and those missing above it.
    fn make(&mut self, step: &Step<'_>, coming: &mut dyn FnMut(&Path) -> io::Result<()>) -> Result<(), RestoreError> {
        let mut missing = vec![step.cgroup.clone()];
        let directory = step.cgroup.directory();
        for (parent, path) in directory.ancestors().zip(ancestors_of_path(step.cgroup.path())).skip(1) {
            let parent = Cgroup::new(step.cgroup.version(), parent.to_owned(), path.to_owned());
            if parent.exists() || path == "/" {
                break;
            }
            missing.push(parent);
        }
        for cgroup in missing.into_iter().rev() {
            coming(cgroup.directory())
                .and_then(|()| fs::create_dir(cgroup.directory()))
                .map_err(|source| RestoreError::Make { path: cgroup.directory().to_owned(), source })?;
            self.changes.push(Change::Made(cgroup.clone()));
            give_cpuset(&cgroup)?;
        }
        Ok(())
    }

    /// Writes a directory's properties of one turn. A limit may be refused because of another that is yet to be written, so what
    /// fails is tried again after the others.
    fn restore_properties(&mut self, step: &Step<'_>, turn: Turn) -> Result<(), RestoreError> {
        let mut failed: Vec<&Property> = Vec::new();
        for property in step.saved.properties.iter().filter(|property| properties::turn(&property.name) == turn) {
            if self.restore_property(&step.cgroup, property).is_err() {
                failed.push(property);
            }
        }
        failed.into_iter().try_for_each(|property| self.restore_property(&step.cgroup, property))
    }

    fn restore_property(&mut self, cgroup: &Cgroup, property: &Property) -> Result<(), RestoreError> {
        let Property { name, value, permissions } = property;
        let path = cgroup.directory().join(name);
        let fail = |source| RestoreError::Property { path: path.clone(), value: value.clone(), source };
        if !path.exists() {
            // Its controller is not enabled or not built in. A limit that was set must not be lost silently.
            return if properties::lists_tasks(name) || properties::is_usual(name, value) {
                Ok(())
            } else {
                Err(fail(io::ErrorKind::NotFound.into()))
            };
        }
        if !properties::lists_tasks(name) {
            let current = cgroup.read(name).map_err(fail)?;
            let writes = properties::writes(name, &current, value);
            if !writes.is_empty() && !self.is_made(cgroup) {
                self.changes.push(Change::Wrote { cgroup: cgroup.clone(), name: name.clone(), before: current });
            }
            for (file, text) in writes {
                match cgroup.write(&file, &text) {
                    // The kernel gave this limit up (Linux 5.11) and still shows it.
                    Err(error) if name.starts_with("memory.kmem.") && is_unsupported(&error) => {}
                    written => written.map_err(fail)?,
                }
            }
        }
        self.restore_permissions(&path, *permissions)
    }

    fn restore_permissions(&mut self, path: &Path, wanted: Option<Permissions>) -> Result<(), RestoreError> {
        let Some(wanted) = wanted else { return Ok(()) };
        let fail = |source| RestoreError::Permissions {
            path: path.to_owned(),
            uid: wanted.uid,
            gid: wanted.gid,
            mode: wanted.mode & MODE_BITS,
            source,
        };
        let metadata = fs::symlink_metadata(path).map_err(fail)?;
        let before = Permissions { mode: metadata.mode(), uid: metadata.uid(), gid: metadata.gid() };
        if same_permissions(before, wanted) {
            return Ok(());
        }
        let made = self
            .changes
            .iter()
            .any(|change| matches!(change, Change::Made(cgroup) if path.starts_with(cgroup.directory())));
        if !made {
            self.changes.push(Change::Permitted { path: path.to_owned(), before });
        }
        permit(path, wanted).map_err(fail)
    }

    fn is_made(&self, cgroup: &Cgroup) -> bool {
        self.changes.iter().any(|change| matches!(change, Change::Made(made) if made == cgroup))
    }

    fn set_back(&mut self) -> Vec<RestoreError> {
        let deadline = Instant::now() + BUSY;
        let mut errors = Vec::new();
        for change in std::mem::take(&mut self.changes).into_iter().rev() {
            let (path, undone) = match change {
                Change::Made(cgroup) => (cgroup.directory().to_owned(), remove(&cgroup, deadline)),
                Change::Wrote { cgroup, name, before } => {
                    let current = cgroup.read(&name).unwrap_or_default();
                    let value = properties::saved_value(&name, &before);
                    let writes = properties::writes(&name, &current, &value);
                    let undone = writes.iter().try_for_each(|(file, text)| cgroup.write(file, text));
                    (cgroup.directory().join(name), undone)
                }
                Change::Permitted { path, before } => {
                    let undone = permit(&path, before);
                    (path, undone)
                }
            };
            match undone {
                Err(source) if !is_gone(&source) => errors.push(RestoreError::Undo { path, source }),
                _ => {}
            }
        }
        errors
    }
}

impl Drop for RestoredCgroups {
    fn drop(&mut self) {
        for error in self.set_back() {
            tracing::error!(error = &error as &dyn std::error::Error, "a restored cgroup could not be undone");
        }
    }
}

/// The path itself, then those above it, `/` last.
fn ancestors_of_path(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| match path.rfind('/') {
        _ if *path == "/" => None,
        Some(0) => Some("/"),
        Some(at) => Some(&path[..at]),
        None => None,
    })
}

/// A v1 cpuset starts without processors and memory nodes, so that nothing can enter it or be made below it. It gets
/// its parent's; saved values come later.
fn give_cpuset(cgroup: &Cgroup) -> Result<(), RestoreError> {
    let Some(parent) = cgroup.parent().filter(|_| cgroup.version() == Version::V1) else { return Ok(()) };
    for name in ["cpuset.cpus", "cpuset.mems"] {
        if cgroup.read(name).is_ok_and(|value| value.is_empty()) {
            let path = || cgroup.directory().join(name);
            let value = parent.read(name).unwrap_or_default();
            cgroup.write(name, &value).map_err(|source| RestoreError::Property { path: path(), value, source })?;
        }
    }
    Ok(())
}

fn write_task(task: i32, cgroup: &Cgroup, file: &str) -> Result<(), RestoreError> {
    cgroup.write(file, &task.to_string()).map_err(|source| RestoreError::Move {
        task,
        cgroup: cgroup.directory().to_owned(),
        source,
    })
}

fn same_permissions(a: Permissions, b: Permissions) -> bool {
    (a.mode & MODE_BITS, a.uid, a.gid) == (b.mode & MODE_BITS, b.uid, b.gid)
}

fn permit(path: &Path, wanted: Permissions) -> io::Result<()> {
    std::os::unix::fs::lchown(path, Some(wanted.uid), Some(wanted.gid))?;
    fs::set_permissions(path, fs::Permissions::from_mode(wanted.mode & MODE_BITS))
}

fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error())
}

/// Removes an empty cgroup. Tasks that were killed keep it busy until they are gone.
fn remove(cgroup: &Cgroup, deadline: Instant) -> io::Result<()> {
    loop {
        match fs::remove_dir(cgroup.directory()) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            removed => return removed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ancestors_of_a_path_end_at_the_root() {
        assert_eq!(ancestors_of_path("/a/b").collect::<Vec<_>>(), ["/a/b", "/a", "/"]);
        assert_eq!(ancestors_of_path("/").collect::<Vec<_>>(), ["/"]);
    }
}
