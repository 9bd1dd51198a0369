//! Making a tree again from its images.
//!
//! Each task is made as an empty one that sits in an agent's runner, and is built by ferry from outside. [`RestorePhase`]
//! lists what happens, [`Restore::run`] in which order.
//!
//! On success the whole tree runs. On failure, whenever it happens and also if ferry is killed, no task is left: until
//! the end every task dies with ferry, and whatever ferry makes otherwise is undone.

mod arm;
mod attach;
mod birth;
mod checkpoint;
mod error;
mod grow;
mod live;
mod plan;
mod script;
mod shared;
mod space;

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create};

pub use error::{Obstacle, RestoreError};

use crate::agent::{Area, NODE};
use crate::files::Inherited;
use crate::images::ImageSet;
use crate::sys::robust::RobustList;
use crate::sys::{HostPid, RemoteAddr};
use attach::Files;
use checkpoint::{Checkpoint, MemoryImages};
use live::LiveTree;
use plan::{Circumstances, Plan};
use shared::SharedObjects;

/// What a caller may do at points of a restore.
pub type Callback<'a> = Box<dyn FnMut(HostPid) -> Result<(), String> + 'a>;

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
    /// `CLONE_NEW*` flags of the root.
    pub clone_flags: u64,
    /// Descriptors that stand for objects outside the tree.
    pub inherited: Inherited,
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
    /// How long each phase took.
    pub phases: Vec<(RestorePhase, Duration)>,
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
    /// Tasks that a pending SIGSTOP stops.
    stops: HashSet<usize>,
}

/// Restores the tree of `images`.
///
/// # Errors
/// [`RestoreError`]; nothing of the tree is left then.
pub fn restore(images: &ImageSet, mut options: RestoreOptions<'_>) -> Result<Restored, RestoreError> {
    let mut clock = Clock { phases: Vec::new() };
    let checkpoint = clock.phase(RestorePhase::Open, || Checkpoint::read(images))?;
    let circumstances = Circumstances {
        shell_job: options.shell_job,
        pid_namespace: options.clone_flags & libc::CLONE_NEWPID as u64 != 0,
    };
    let inherited = std::mem::take(&mut options.inherited);
    let (plan, files, shared) =
        clock.phase(RestorePhase::Plan, || decide(images, &checkpoint, &circumstances, inherited))?;
    let mut restore = Restore::new(images, options, &checkpoint, &plan, files, shared)?;
    restore.run(&mut clock)?;
    let pid = restore.live.task(0).host;
    restore.live.release();
    Ok(Restored {
        pid,
        processes: checkpoint.tasks.len(),
        threads: checkpoint.thread_count(),
        bytes: checkpoint.bytes(),
        phases: clock.phases,
    })
}

/// Decides everything. Nothing is made that others could see: shared memory is ferry's own so far.
fn decide(
    images: &ImageSet,
    checkpoint: &Checkpoint,
    circumstances: &Circumstances,
    mut inherited: Inherited,
) -> Result<(Plan, Files, SharedObjects), RestoreError> {
    let shared = shared::make_objects(checkpoint, &mut inherited)?;
    let plan = Plan::new(checkpoint, circumstances)?;
    let files = Files::plan(images, checkpoint, &plan.tree, inherited)?;
    let root =
        rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
            RestoreError::Own { step: "open the root directory", errno: Errno::from_raw(errno.raw_os_error()) }
        })?;
    files.check(root.as_fd())?;
    Ok((plan, files, shared))
}

impl<'a> Restore<'a> {
    fn new(
        images: &'a ImageSet,
        options: RestoreOptions<'a>,
        checkpoint: &'a Checkpoint,
        plan: &'a Plan,
        files: Files,
        shared: SharedObjects,
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
        Ok(Self {
            images,
            options,
            checkpoint,
            plan,
            live: LiveTree::new(list, area, count),
            shared,
            pid_namespace: None,
            files,
            stops: HashSet::new(),
        })
    }

    /// All phases but the first two.
    fn run(&mut self, clock: &mut Clock) -> Result<(), RestoreError> {
        clock.phase(RestorePhase::FirstTask, || self.first_task())?;
        clock.phase(RestorePhase::Tree, || self.tree())?;
        clock.phase(RestorePhase::Exits, || self.end_the_dead())?;
        clock.phase(RestorePhase::Attach, || self.attach())?;
        clock.phase(RestorePhase::Threads, || self.make_threads())?;
        clock.phase(RestorePhase::Seize, || self.seize())?;
        clock.phase(RestorePhase::Identity, || self.restore_identity())?;
        clock.phase(RestorePhase::Registers, || self.set_registers())?;
        self.files.finish()?;
        clock.phase(RestorePhase::Go, || self.go())
    }

    fn first_task(&mut self) -> Result<(), RestoreError> {
        self.make_first()?;
        let root = self.live.task(0).host;
        if let Some(callback) = &mut self.options.first_task {
            callback(root).map_err(|problem| RestoreError::Caller { what: "placing the first task", problem })?;
        }
        self.fill_shared()?;
        self.files.prepare(&self.live)
    }

    fn tree(&mut self) -> Result<(), RestoreError> {
        self.make_others()?;
        self.make_groups()
    }

    fn memory(&self, place: usize) -> &'a MemoryImages {
        self.checkpoint.tasks[place].memory.as_ref().expect("only tasks with memory are asked for it")
    }
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
