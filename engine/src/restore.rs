//! Making a tree again from its images.
//!
//! Each task is made as an empty one that sits in an agent's runner, and is built by ferry from outside. [`RestorePhase`]
//! lists what happens, `Restore::run` in which order.
//!
//! On success the whole tree runs. On failure, whenever it happens and also if ferry is killed, no task is left: until
//! the end every task dies with ferry, and whatever ferry makes otherwise is undone.

mod arm;
mod attach;
mod birth;
mod checkpoint;
mod error;
mod grow;
mod lazy;
mod live;
mod numbers;
mod plan;
mod script;
mod shared;
mod space;

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

pub use error::{Obstacle, RestoreError};

use crate::agent::{Area, NODE};
use crate::cancel::Cancel;
use crate::cgroups::{CgroupOptions, CgroupPlan, Cgroups};
use crate::fault::{Edge, Faults, Point};
use crate::files::{Inherited, NameJournal, Terminals};
use crate::images::stats::{RestoreStatsEntry, StatsEntry};
use crate::images::{ImageSet, Kind, encode};
use crate::lazy::handshake::Daemon;
use crate::namespaces::{self, NamespaceKind, RestoreNamespaceOptions};
use crate::progress::Progress as MemoryProgress;
use crate::sys::robust::RobustList;
use crate::sys::{HostPid, PAGE_SIZE, RemoteAddr};
use attach::Files;
use checkpoint::{Checkpoint, MemoryImages};
use live::LiveTree;
use plan::{Circumstances, Plan};
use shared::SharedObjects;

/// What a caller may do at points of a restore.
pub type Callback<'a> = Box<dyn FnMut(HostPid) -> Result<(), String> + 'a>;

/// Stages at which a caller may act, as CRIU's action scripts name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The root is in its namespaces, which are empty. Only told when there is one.
    SetupNamespaces,
    /// They have their content.
    PostSetupNamespaces,
    /// All tasks are complete and none runs. The last stage whose failure undoes the restore.
    PostRestore,
    /// As before; the tree has a network namespace of its own, which peers may reach again.
    NetworkUnlock,
    /// As before.
    PreResume,
    /// All tasks run.
    PostResume,
}

/// Told of stages, with the root.
pub type Notify<'a> = Box<dyn FnMut(Stage, HostPid) -> Result<(), String> + 'a>;

/// Told of phases that begin.
pub type Progress<'a> = Box<dyn FnMut(RestorePhase) -> Result<(), String> + 'a>;

/// Takes the master side of a terminal.
pub type TakeTerminal<'a> = Box<dyn FnMut(OwnedFd) -> Result<(), String> + 'a>;

/// How to restore.
#[derive(Default)]
pub struct RestoreOptions<'a> {
    /// The root belongs to the session of ferry, as it belonged to a shell's.
    pub shell_job: bool,
    /// The root becomes the child of ferry's parent (`CLONE_PARENT`).
    pub sibling: bool,
    /// All tasks are left stopped, by SIGSTOP.
    pub leave_stopped: bool,
    /// A cgroup2 directory for the root to start in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Called with the root as soon as it exists and before any other task does: to place it in cgroups.
    pub first_task: Option<Callback<'a>>,
    /// Where namespaces are to be.
    pub namespaces: RestoreNamespaceOptions,
    /// What is done with the cgroups of the images.
    pub cgroups: CgroupOptions,
    /// Called at the stages that scripts know.
    pub notify: Option<Notify<'a>>,
    /// Called before each phase; its error fails the restore there.
    pub progress: Option<Progress<'a>>,
    /// Whom to tell of restored memory. What relatives share is not restored twice, so not all of it need be told.
    pub memory: MemoryProgress,
    /// Descriptors that stand for objects outside the tree.
    pub inherited: Inherited,
    /// Told of names that are given in file systems, to take them away if ferry is killed.
    pub names: Option<Box<dyn NameJournal>>,
    /// A terminal for the tree to share, in place of the one that it shared with a shell. Its master side is elsewhere.
    pub terminal: Option<OwnedFd>,
    /// Given the master side of the terminal whose master was held outside the tree, as soon as there is a new one.
    pub terminal_master: Option<TakeTerminal<'a>>,
    /// The daemon that brings pages later which the images call lazy. Without one all pages come at once.
    pub lazy: Option<Daemon>,
    /// What ends the restore early. Not looked at any more once the tree is to run.
    pub cancel: Cancel,
    /// What a test lets go wrong.
    pub faults: Faults,
}

impl RestoreOptions<'_> {
    /// Passes a point at which the restore may be made to fail, or be given up.
    pub(crate) fn pass(&self, point: Point) -> Result<(), RestoreError> {
        pass(&self.faults, &self.cancel, point)
    }
}

/// See [`RestoreOptions::pass`].
fn pass(faults: &Faults, cancel: &Cancel, point: Point) -> Result<(), RestoreError> {
    let interrupted = |why| RestoreError::Interrupted(why);
    faults.hit(point).map_err(|fault| interrupted(fault.into()))?;
    cancel.check().map_err(|cancelled| interrupted(cancelled.into()))
}

/// A tree that runs again.
#[derive(Clone, Debug)]
pub struct Restored {
    /// The root.
    pub pid: HostPid,
    /// Processes, exited ones included.
    pub processes: usize,
    /// Threads of all of them.
    pub threads: usize,
    /// Bytes of memory content in the images.
    pub bytes: u64,
    /// Pages that a task and the one that made it both have.
    pub pages_compared: u64,
    /// Those of them that are equal, and were left shared.
    pub pages_shared: u64,
    /// How long each phase took.
    pub phases: Vec<(RestorePhase, Duration)>,
}

impl Restored {
    /// How long it took until all ran.
    pub fn duration(&self) -> Duration {
        self.phases.iter().map(|(_, duration)| *duration).sum()
    }

    /// The content of `stats-restore`.
    pub fn stats_image(&self) -> Vec<u8> {
        let micros = |duration: Duration| u32::try_from(duration.as_micros()).unwrap_or(u32::MAX);
        let tree = self.phases.iter().filter(|(phase, _)| *phase == RestorePhase::Tree).map(|(_, took)| *took).sum();
        let stats = StatsEntry {
            dump: None,
            restore: Some(RestoreStatsEntry {
                pages_compared: self.pages_compared,
                pages_skipped_cow: self.pages_shared,
                forking_time: micros(tree),
                restore_time: micros(self.duration()),
                pages_restored: Some(self.bytes / PAGE_SIZE - self.pages_shared),
            }),
        };
        encode(Kind::StatsRestore, &[stats])
    }
}

/// The phases, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RestorePhase {
    /// Read, verify and decode the images. Nothing is made.
    Open,
    /// Decide everything and find every obstacle. Nothing is made.
    Plan,
    /// The first task and the memory that its tree shares. From here on, failure ends what was made.
    FirstTask,
    /// What is in the root's namespaces, mounts before all.
    Namespaces,
    /// All tasks, with memory, parents, sessions and groups.
    Tree,
    /// The tasks that had exited exit again, helpers go.
    Exits,
    /// Directories, and descriptors at their numbers.
    Attach,
    /// Threads.
    Threads,
    /// Attach to all threads: from here on the kernel ends them with ferry by itself.
    Seize,
    /// Signals, timers, limits, credentials, seccomp filters.
    Identity,
    /// Registers, with the agents out.
    Registers,
    /// All run. The one phase that does not undo.
    Go,
}

impl RestorePhase {
    /// All of them, in order.
    pub const ALL: &'static [Self] = &[
        Self::Open,
        Self::Plan,
        Self::FirstTask,
        Self::Namespaces,
        Self::Tree,
        Self::Exits,
        Self::Attach,
        Self::Threads,
        Self::Seize,
        Self::Identity,
        Self::Registers,
        Self::Go,
    ];
}

/// A restore on its way.
struct Restore<'a> {
    images: &'a ImageSet,
    options: RestoreOptions<'a>,
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    live: LiveTree,
    shared: SharedObjects,
    /// The root's pid namespace, if it is not ferry's.
    pid_namespace: Option<File>,
    files: Files,
    namespaces: namespaces::RestorePlan,
    cgroup_plan: CgroupPlan,
    /// After the tasks, which must be gone before their cgroups can go.
    cgroups: Option<Cgroups>,
    /// Tasks that a pending SIGSTOP stops.
    stops: HashSet<usize>,
    pages_compared: u64,
    pages_shared: u64,
}

/// Restores the tree of `images`.
///
/// # Errors
/// [`RestoreError`]; nothing of the tree is left then.
pub fn restore(images: &ImageSet, mut options: RestoreOptions<'_>) -> Result<Restored, RestoreError> {
    let mut clock = Clock { phases: Vec::new() };
    announce(&mut options, RestorePhase::Open)?;
    let mut checkpoint = clock.phase(RestorePhase::Open, || Checkpoint::read(images))?;
    checkpoint.part_memory(options.lazy.is_some())?;
    checkpoint.tell(&options.memory, &options.cancel);
    options.pass(Point::Restore(Edge::After, RestorePhase::Open))?;
    announce(&mut options, RestorePhase::Plan)?;
    let decisions = clock.phase(RestorePhase::Plan, || Decisions::make(images, &checkpoint, &mut options))?;
    options.pass(Point::Restore(Edge::After, RestorePhase::Plan))?;
    let mut restore = Restore::new(images, options, &checkpoint, &decisions.plan, decisions.parts)?;
    restore.run(&mut clock)?;
    let pid = restore.live.task(0).host;
    if let Err(error) = restore.notify(Stage::PostResume) {
        tracing::warn!(%error, "the tree runs, but an action after that failed");
    }
    let (pages_compared, pages_shared) = (restore.pages_compared, restore.pages_shared);
    restore.live.release();
    if let Some(Err(error)) = restore.cgroups.map(Cgroups::keep) {
        tracing::warn!(%error, "the tree runs, but not all of its cgroups are frozen as they were");
    }
    Ok(Restored {
        pid,
        processes: checkpoint.tasks.len(),
        threads: checkpoint.thread_count(),
        bytes: checkpoint.bytes(),
        pages_compared,
        pages_shared,
        phases: clock.phases,
    })
}

/// What the rooms have decided.
struct Decisions {
    plan: Plan,
    parts: Parts,
}

/// What the rooms work with.
struct Parts {
    namespaces: namespaces::RestorePlan,
    cgroups: CgroupPlan,
    files: Files,
    shared: SharedObjects,
}

impl Decisions {
    /// Decides everything. Nothing is made that others could see: shared memory is ferry's own so far.
    fn make(
        images: &ImageSet,
        checkpoint: &Checkpoint,
        options: &mut RestoreOptions<'_>,
    ) -> Result<Self, RestoreError> {
        let namespaces = namespaces::RestorePlan::new(images, std::mem::take(&mut options.namespaces))?;
        if !namespaces.obstacles().is_empty() {
            let root = &checkpoint.tasks[0];
            let obstacle = |found: &namespaces::NamespaceObstacle| Obstacle {
                pid: root.pid,
                comm: root.comm.clone(),
                problem: found.to_string(),
                pid_taken: false,
            };
            return Err(RestoreError::Obstacles(namespaces.obstacles().iter().map(obstacle).collect()));
        }
        let circumstances =
            Circumstances { shell_job: options.shell_job, pid_namespace: namespaces.has_pid_namespace() };
        let cgroups = CgroupPlan::new(images, checkpoint.cgroup_set, &options.cgroups)?;
        let mut inherited = std::mem::take(&mut options.inherited);
        let shared = shared::make_objects(checkpoint, &mut inherited)?;
        let plan = Plan::new(checkpoint, &circumstances)?;
        let terminals =
            Terminals { hands_out: options.terminal_master.is_some(), own: std::mem::take(&mut options.terminal) };
        let files = Files::plan(images, checkpoint, &plan.tree, inherited, terminals)?;
        // What lies in a cgroup may only be there once that is made.
        if !namespaces.has_mount_namespace() && cgroups.is_empty() {
            files.check("/")?;
        }
        Ok(Self { plan, parts: Parts { namespaces, cgroups, files, shared } })
    }
}

impl<'a> Restore<'a> {
    fn new(
        images: &'a ImageSet,
        options: RestoreOptions<'a>,
        checkpoint: &'a Checkpoint,
        plan: &'a Plan,
        parts: Parts,
    ) -> Result<Self, RestoreError> {
        let failed = |step| move |errno| RestoreError::Own { step, errno };
        let length = plan.area.end - plan.area.start;
        let file = memfd_create("ferry-area", MemfdFlags::CLOEXEC)
            .and_then(|file| ftruncate(&file, length).map(|()| file))
            .map_err(|errno| RestoreError::Own {
                step: "make shared memory",
                errno: Errno::from_raw(errno.raw_os_error()),
            })?;
        let area = Area::inherited(&file, length as usize, RemoteAddr(plan.area.start))
            .map_err(failed("map the memory that is shared with tasks"))?;
        let list = RobustList::install(NODE).map_err(failed("watch over tasks"))?;
        let count = checkpoint.tasks.len() + plan.tree.helpers.len();
        let (faults, cancel) = (options.faults.clone(), options.cancel.clone());
        Ok(Self {
            images,
            options,
            checkpoint,
            plan,
            live: LiveTree::new(list, area, count, faults, cancel),
            shared: parts.shared,
            pid_namespace: None,
            files: parts.files,
            namespaces: parts.namespaces,
            cgroup_plan: parts.cgroups,
            cgroups: None,
            stops: HashSet::new(),
            pages_compared: 0,
            pages_shared: 0,
        })
    }

    /// All phases but the first two.
    fn run(&mut self, clock: &mut Clock) -> Result<(), RestoreError> {
        self.phase(clock, RestorePhase::FirstTask, Self::first_task)?;
        self.phase(clock, RestorePhase::Namespaces, Self::fill_namespaces)?;
        self.phase(clock, RestorePhase::Tree, Self::tree)?;
        self.phase(clock, RestorePhase::Exits, Self::end_the_dead)?;
        self.phase(clock, RestorePhase::Attach, Self::attach)?;
        self.phase(clock, RestorePhase::Threads, Self::make_threads)?;
        self.phase(clock, RestorePhase::Seize, Self::seize)?;
        self.phase(clock, RestorePhase::Identity, Self::restore_identity)?;
        self.phase(clock, RestorePhase::Registers, Self::set_registers)?;
        self.phase(clock, RestorePhase::Go, Self::resume)
    }

    fn phase(
        &mut self,
        clock: &mut Clock,
        phase: RestorePhase,
        work: fn(&mut Self) -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
        announce(&mut self.options, phase)?;
        clock.phase(phase, || work(self))?;
        if phase == RestorePhase::Go {
            // They run: it is too late to fail.
            let _ = self.options.faults.hit(Point::Restore(Edge::After, phase));
            return Ok(());
        }
        self.options.pass(Point::Restore(Edge::After, phase))
    }

    fn first_task(&mut self) -> Result<(), RestoreError> {
        self.cgroups = Some(self.cgroup_plan.make(self.options.names.as_deref_mut())?);
        if !self.namespaces.has_mount_namespace() && !self.cgroup_plan.is_empty() {
            self.files.check("/")?;
        }
        self.namespaces.before_clone()?;
        let made = self.make_first();
        self.namespaces.after_clone()?;
        let root = made?;
        if self.namespaces.has_pid_namespace() {
            let namespace = File::open(format!("/proc/{root}/ns/pid"));
            self.pid_namespace = Some(namespace.map_err(|error| RestoreError::Own {
                step: "open the root's pid namespace",
                errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
            })?);
        }
        if let Some(callback) = &mut self.options.first_task {
            callback(root).map_err(|problem| RestoreError::Caller { what: "placing the first task", problem })?;
        }
        if let Some(cgroups) = &self.cgroups {
            cgroups.place_root(root, &self.checkpoint.tasks[0].core)?;
        }
        self.first_steps()?;
        self.fill_shared()
    }

    fn fill_namespaces(&mut self) -> Result<(), RestoreError> {
        let root = self.live.task(0).host;
        let any = self.namespaces.has_any();
        if any {
            self.notify(Stage::SetupNamespaces)?;
        }
        let open = self.namespaces.restore(&self.live.task(0).runner, root)?;
        self.place(0, None)?;
        if any {
            self.notify(Stage::PostSetupNamespaces)?;
        }
        if self.namespaces.has_mount_namespace() {
            self.files.check(&format!("/proc/{root}/root"))?;
        }
        let journal = self.options.names.take();
        for master in self.files.prepare(&self.live, &open, journal)? {
            if let Some(take) = &mut self.options.terminal_master {
                take(master).map_err(|problem| RestoreError::Caller { what: "handing out the terminal", problem })?;
            }
        }
        Ok(())
    }

    /// Puts the member at `place` into its cgroups, where its maker's are not the same.
    fn place(&self, place: usize, maker: Option<usize>) -> Result<(), RestoreError> {
        let members = &self.checkpoint.tasks;
        // Helpers stay where they are made.
        let (Some(cgroups), Some(task)) = (&self.cgroups, members.get(place)) else { return Ok(()) };
        let maker = maker.and_then(|maker| members.get(maker)).map(|maker| &maker.core);
        Ok(cgroups.place(self.live.task(place).host, &task.core, maker)?)
    }

    fn notify(&mut self, stage: Stage) -> Result<(), RestoreError> {
        let root = self.live.task(0).host;
        let Some(notify) = &mut self.options.notify else { return Ok(()) };
        notify(stage, root).map_err(|problem| RestoreError::Caller { what: "an action of the caller", problem })
    }

    fn resume(&mut self) -> Result<(), RestoreError> {
        self.files.finish()?;
        self.notify(Stage::PostRestore)?;
        if self.namespaces.has(NamespaceKind::Net) {
            self.notify(Stage::NetworkUnlock)?;
        }
        self.notify(Stage::PreResume)?;
        self.stop_again()?;
        // From here on there is no way back.
        self.files.remove_links();
        self.let_go();
        self.all_run();
        Ok(())
    }

    fn tree(&mut self) -> Result<(), RestoreError> {
        self.make_others()?;
        self.make_groups()?;
        self.make_foreground()?;
        self.hand_over_memory()
    }

    fn memory(&self, place: usize) -> &'a MemoryImages {
        self.checkpoint.tasks[place].memory.as_ref().expect("only tasks with memory are asked for it")
    }
}

/// Tells the caller which phase begins.
fn announce(options: &mut RestoreOptions<'_>, phase: RestorePhase) -> Result<(), RestoreError> {
    options.pass(Point::Restore(Edge::Before, phase))?;
    let Some(progress) = &mut options.progress else { return Ok(()) };
    progress(phase).map_err(|problem| RestoreError::Caller { what: "the restore was ended", problem })
}

/// Times phases and puts each into a span.
struct Clock {
    phases: Vec<(RestorePhase, Duration)>,
}

impl Clock {
    fn phase<T>(
        &mut self,
        phase: RestorePhase,
        work: impl FnOnce() -> Result<T, RestoreError>,
    ) -> Result<T, RestoreError> {
        let _span = tracing::debug_span!("restore", ?phase).entered();
        let start = Instant::now();
        let result = work();
        self.phases.push((phase, start.elapsed()));
        tracing::debug!(elapsed = ?start.elapsed(), ok = result.is_ok(), "phase done");
        result
    }
}
