//! What tasks have of the file system: descriptors, directories, umask.
//!
//! The descriptors' own room ([`crate::files`]) makes and places them; here is the order of its tasks, which is that of
//! their births, and what it hands over to all of them: memory that is a nameless file.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use rustix::fs::{Mode, OFlags};

use super::Restore;
use super::birth::{Maker, TreePlan};
use super::checkpoint::{Checkpoint, TaskImages};
use super::error::{Obstacle, RestoreError};
use super::live::LiveTree;
use super::script::{Data, Script};
use crate::fault::RestoreStep;
use crate::files::{
    self, Controlled, FoundFile, Inherited, NameJournal, OpenMaster, RestorePlan, RestoreTask, Terminals,
};
use crate::images::ImageSet;
use crate::sys::NsPid;

/// The plan for descriptors, and the place that each task has in it.
pub struct Files {
    plan: RestorePlan,
    places: HashMap<usize, usize>,
}

impl Files {
    /// Plans for all members and helpers, in the order of their births.
    ///
    /// # Errors
    /// [`RestoreError::Files`].
    pub fn plan(
        images: &ImageSet,
        checkpoint: &Checkpoint,
        tree: &TreePlan,
        inherited: Inherited,
        terminals: Terminals,
    ) -> Result<Self, RestoreError> {
        let mut places = HashMap::new();
        let mut tasks = Vec::new();
        for birth in tree.waves.iter().flatten() {
            let member: Option<&TaskImages> = checkpoint.tasks.get(birth.task);
            let helper = || NsPid(tree.helpers[birth.task - checkpoint.tasks.len()].pid);
            tasks.push(RestoreTask {
                pid: member.map_or_else(helper, |task| task.pid),
                comm: member.map_or_else(String::new, |task| task.comm.clone()),
                parent: birth.maker.task().map(|maker| places[&maker]),
                files_id: member.filter(|task| !task.is_zombie()).map_or(0, |task| task.ids.files_id),
                session: member.filter(|task| !task.is_zombie()).map_or(0, |task| task.session),
                early: birth.early,
            });
            places.insert(birth.task, tasks.len() - 1);
        }
        let mut read = |name: &str| images.bytes(name).map_err(std::io::Error::other);
        Ok(Self { plan: RestorePlan::new(&mut read, tasks, inherited, terminals)?, places })
    }

    /// Looks for files that are missing or changed below `root`.
    ///
    /// # Errors
    /// [`RestoreError::Obstacles`].
    pub fn check(&self, root: &str) -> Result<(), RestoreError> {
        let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(
            |errno| RestoreError::Own {
                step: "open the tree's root directory",
                errno: Errno::from_raw(errno.raw_os_error()),
            },
        )?;
        let found = self.plan.check(root.as_fd(), &|_| true);
        if found.is_empty() {
            return Ok(());
        }
        let obstacle = |found: files::Obstacle| Obstacle {
            pid: found.pid,
            comm: found.comm,
            problem: format!("{}: {}", found.object, found.problem),
            pid_taken: false,
        };
        Err(RestoreError::Obstacles(found.into_iter().map(obstacle).collect()))
    }

    /// The number that all tasks have for something that ferry handed over.
    pub fn handed_over(&self, key: &str) -> Option<u32> {
        self.plan.inherited_number(key)
    }

    /// Readies the first task, which has some masters of terminals open; `journal` is told of names that are given in file
    /// systems. Returns the masters that go to whoever restores.
    pub fn prepare(
        &mut self,
        live: &LiveTree,
        open: &[OpenMaster],
        journal: Option<Box<dyn NameJournal>>,
    ) -> Result<Vec<OwnedFd>, RestoreError> {
        Ok(self.plan.prepare(&live.task(0).runner, open, journal)?)
    }

    /// The terminal that controls the session of a leader.
    pub fn terminal_of(&self, leader: usize) -> Option<Controlled> {
        let place = *self.places.get(&leader)?;
        self.plan.controlled().into_iter().find(|controlled| controlled.leader == place)
    }

    /// Whether a leader opens `/dev/tty` as soon as its session has its terminal.
    pub fn opens_terminal(&self, leader: usize) -> bool {
        self.places.get(&leader).is_some_and(|place| self.plan.opens_controlling(*place))
    }

    /// Opens it.
    pub fn open_terminal(&self, live: &LiveTree, leader: usize) -> Result<(), RestoreError> {
        Ok(self.plan.open_controlling(Some(self.places[&leader]), &live.task(leader).runner)?)
    }

    /// Makes what a task shares with those that it will make.
    pub fn create(&self, live: &LiveTree, place: usize) -> Result<(), RestoreError> {
        Ok(self.plan.create(self.places[&place], &live.task(place).runner)?)
    }

    /// Removes the names that deleted files had for the time being.
    pub fn finish(&mut self) -> Result<(), RestoreError> {
        Ok(self.plan.finish()?)
    }

    /// Removes the links that the dump had made for this restore.
    pub fn remove_links(&mut self) {
        self.plan.remove_links();
    }

    /// Appends the opening of a file that no descriptor holds; returns the call's place.
    ///
    /// # Errors
    /// [`RestoreError::Files`].
    pub fn open(&self, script: &mut Script, id: u32, flags: u32) -> Result<usize, RestoreError> {
        match self.plan.find_file(id)? {
            FoundFile::StandIn(number) => {
                let arguments = [number.into(), libc::F_DUPFD_CLOEXEC as u64, 0];
                Ok(script.must("take it over", format!("descriptor {number}"), libc::SYS_fcntl, &arguments))
            }
            FoundFile::Path(path) => {
                let flags = u64::from(flags) | (libc::O_CLOEXEC | libc::O_NOCTTY) as u64;
                let data = Data { argument: 1, bytes: [path, &[0]].concat(), inner: None };
                let name = String::from_utf8_lossy(path).into_owned();
                let arguments = [libc::AT_FDCWD as u64, 0, flags];
                Ok(script.with_data("open it", name, libc::SYS_openat, &arguments, data))
            }
        }
    }
}

/// The `CLONE_*` flags for what a task shares with the one that makes it.
pub fn shared_with_maker(checkpoint: &Checkpoint, task: usize, maker: Maker) -> u64 {
    let (Some(task), Maker::Parent(maker)) = (checkpoint.tasks.get(task), maker) else { return 0 };
    let Some(maker) = checkpoint.tasks.get(maker) else { return 0 };
    let shared = |id: u32, other: u32, flag: i32| if id != 0 && id == other { flag as u64 } else { 0 };
    shared(task.ids.files_id, maker.ids.files_id, libc::CLONE_FILES)
        | shared(task.ids.fs_id, maker.ids.fs_id, libc::CLONE_FS)
}

impl Restore<'_> {
    /// The descriptors of all tasks at their numbers, then directories and umask. Files are opened by paths from the root of
    /// the mount namespace, so before a task has a root of its own.
    pub(super) fn attach(&mut self) -> Result<(), RestoreError> {
        let living: Vec<usize> = self.live.living().map(|(place, _)| place).collect();
        for place in living {
            self.live.step(RestoreStep::Batch)?;
            self.files.plan.place(self.files.places[&place], &self.live.task(place).runner)?;
        }
        let places: Vec<usize> =
            self.live.living().map(|(place, _)| place).filter(|place| self.directories(*place).is_some()).collect();
        let mut opening = Vec::new();
        for &place in &places {
            let Some((cwd, root, _)) = self.directories(place) else { continue };
            let mut script = Script::default();
            let flags = (libc::O_PATH | libc::O_DIRECTORY) as u32;
            self.files.open(&mut script, root, flags)?;
            self.files.open(&mut script, cwd, flags)?;
            opening.push((place, script));
        }
        let opened = self.live.run(opening)?;
        let mut entering = Vec::new();
        for (&place, results) in places.iter().zip(&opened) {
            let Some((_, _, umask)) = self.directories(place) else { continue };
            let [Ok(root), Ok(cwd)] = results[..] else { continue };
            let mut script = Script::default();
            script.must("enter it", "the root directory", libc::SYS_fchdir, &[root]);
            let here = Data { argument: 0, bytes: b".\0".to_vec(), inner: None };
            script.with_data("make it the root", "the root directory", libc::SYS_chroot, &[0], here);
            script.must("enter it", "the working directory", libc::SYS_fchdir, &[cwd]);
            script.must("set it", "umask", libc::SYS_umask, &[umask.into()]);
            script.attempt(libc::SYS_close, &[root]);
            script.attempt(libc::SYS_close, &[cwd]);
            entering.push((place, script));
        }
        self.live.run(entering)?;
        Ok(())
    }

    fn directories(&self, place: usize) -> Option<(u32, u32, u32)> {
        let fs = self.checkpoint.tasks.get(place)?.fs.as_ref()?;
        Some((fs.cwd_id, fs.root_id, fs.umask.unwrap_or(0o022)))
    }
}
