//! Saving a process tree: the phases, in order.
//!
//! On success the tree is as [`After`] says. On any failure it runs on exactly as before: every phase before the last
//! only looks, and dropping a phase's product lets the tree go. If ferry is killed, the kernel does the same
//! ([`crate::agent`], [`crate::freeze`]).

mod collect;
mod memory;
mod predump;
mod records;
pub(crate) mod relations;
mod stages;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tracing::{debug, info, info_span};

use crate::agent::{AgentError, NODE};
use crate::cancel::{Cancel, Cancelled};
use crate::cgroups::{CgroupOptions, CgroupSets};
use crate::error::{Refusal, Refusals};
use crate::fault::{DumpStep, Edge, Faults, Interrupted, Point};
use crate::files::FilesOptions;
use crate::freeze::{FreezeError, StoppedTree};
use crate::images::{Manifest, Sink, SinkError};
use crate::journal::Journal;
use crate::lazy::offer::{OfferError, PageOffer};
use crate::memory::parent::ParentMemory;
use crate::memory::reader::{PageReader, ReadPagesError};
use crate::memory::staging::Staging;
use crate::namespaces::{CollectNamespacesError, DumpNamespacesError, NamespaceOptions};
use crate::preflight;
use crate::progress::{Metered, Progress};
use crate::sys::robust::RobustList;
use crate::sys::{HostPid, PAGE_SIZE, ptrace};
use crate::task::TaskError;
use crate::track::Keepers;
use stages::Listening;

pub use collect::{ProcessState, TreeState};
pub use predump::{PRE_DUMP_OPTION, pre_dump};
pub use stages::{DumpListener, DumpStage, NoListener};

/// What becomes of the tree after it has been saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// It is ended, once the images are complete.
    #[default]
    Kill,
    /// It runs on, as soon as its memory has been read.
    Run,
    /// Every process is left in a job-control stop (SIGSTOP).
    Stop,
}

/// Enough for small processes, whose pause is short otherwise. Preparing the memory costs as much as writing to it: for much
/// more than this, a dump takes twice as long (measured: 64 MiB in 290 ms instead of 150 ms where memory has to be had from
/// the hypervisor first).
const DEFAULT_STAGING: u64 = 32 << 20;

/// So few that looking at them takes less time than preparing the dump.
const FEW_MAPPINGS: usize = 200;

/// What a dump on top of earlier images prepares memory for, at most.
const INCREMENT: u64 = 16 << 20;

/// How to dump.
#[derive(Clone, Debug)]
pub struct DumpOptions {
    /// What becomes of the tree.
    pub after: After,
    /// The root's session and group may be led from outside the tree.
    pub shell_job: bool,
    /// How long stopping the tree may take.
    pub freeze_deadline: Duration,
    /// How long the tree may stand still, from before the first stop until it runs on, or until the images are complete. The dump is
    /// given up at the next edge, batch or chunk then.
    pub standstill: Option<Duration>,
    /// Most bytes of memory that may be used to let a tree that runs on go before its pages are written.
    pub staging: u64,
    /// The cgroup to freeze while the tree is stopped.
    pub freezer: Option<ferry_cgroup::Freezer>,
    /// Descriptors.
    pub files: FilesOptions,
    /// Namespaces.
    pub namespaces: NamespaceOptions,
    /// Cgroups.
    pub cgroups: CgroupOptions,
    /// Whether the images tell of the processor.
    pub cpuinfo: bool,
    /// Whom to tell of written memory.
    pub progress: Progress,
    /// What ends the dump early. Not looked at any more once the images are complete.
    pub cancel: Cancel,
    /// What a test lets go wrong.
    pub faults: Faults,
    /// Where the dump notes what somebody has to undo if ferry is killed.
    pub journal: Option<Journal>,
    /// The memory of earlier images, whose folder the sink names as the parent: pages that are the same are left to it.
    pub parent: Option<Arc<ParentMemory>>,
    /// Whether the images may become the parent of others.
    pub track_memory: bool,
    /// Where pages that may come after a restore are fetched from the tree, instead of being written: it stays stopped until they
    /// have been.
    pub lazy: Option<Arc<PageOffer>>,
}

impl DumpOptions {
    /// Passes a point within a phase, at which the dump may be made to fail, or be given up.
    pub(crate) fn step(&self, step: DumpStep) -> Result<(), Interrupted> {
        self.faults.hit(Point::DumpStep(step))?;
        Ok(self.cancel.check()?)
    }

    /// Passes the edge of a phase. Once the images are complete it is too late to give up: what is left is done.
    fn edge(&self, edge: Edge, phase: DumpPhase) -> Result<(), Interrupted> {
        self.faults.hit(Point::Dump(edge, phase))?;
        if phase < DumpPhase::Finish && (edge, phase) != (Edge::After, DumpPhase::Save) {
            self.cancel.check()?;
        }
        Ok(())
    }
}

impl Default for DumpOptions {
    fn default() -> Self {
        Self {
            after: After::Kill,
            shell_job: false,
            freeze_deadline: Duration::from_secs(10),
            standstill: None,
            staging: DEFAULT_STAGING,
            freezer: None,
            files: FilesOptions::default(),
            namespaces: NamespaceOptions::default(),
            progress: Progress::default(),
            cancel: Cancel::default(),
            faults: Faults::default(),
            journal: None,
            parent: None,
            track_memory: false,
            lazy: None,
            cgroups: CgroupOptions::default(),
            cpuinfo: false,
        }
    }
}

/// The phases of a dump, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DumpPhase {
    /// Everything that would make the dump fail, found while the tree runs.
    Preflight,
    /// Every task stopped.
    Freeze,
    /// The kernel asked, from outside and from inside.
    Collect,
    /// What preflight could not see; the last point to refuse.
    Recheck,
    /// Pages copied, or written to the sink; what file systems in memory hold.
    Memory,
    /// The tree let go, if it is to run on.
    Release,
    /// Copied pages and records written to the sink, the manifest last.
    Save,
    /// The tree ended or stopped, if it is not to run on.
    Finish,
}

impl DumpPhase {
    /// All of them, in order.
    pub const ALL: &'static [Self] = &[
        Self::Preflight,
        Self::Freeze,
        Self::Collect,
        Self::Recheck,
        Self::Memory,
        Self::Release,
        Self::Save,
        Self::Finish,
    ];
}

/// What a dump did, for summaries and `stats-dump`. Sizes are in pages and bytes.
#[derive(Clone, Debug, Default)]
pub struct Dumped {
    /// Processes saved, zombies included.
    pub processes: usize,
    /// Threads saved.
    pub threads: usize,
    /// Pages of memory written.
    pub pages: u64,
    /// Those of them that are of shared memory.
    pub shared_pages: u64,
    /// Pages of private memory that were left to the parent images.
    pub parent_pages: u64,
    /// The same of shared memory.
    pub shared_parent_pages: u64,
    /// Pages that were left out of the images, to be fetched.
    pub lazy_pages: u64,
    /// Time from the first stop to the last.
    pub freezing: Duration,
    /// Time that the tree was stopped, as far as it ran on or was ended.
    pub frozen: Duration,
    /// Time that its memory took while it was stopped.
    pub memory: Duration,
    /// Time that writing copied memory took when it ran on.
    pub memory_writing: Duration,
    /// The manifest, with the size and digest of every image.
    pub manifest: Option<Manifest>,
}

/// Why a tree was not saved.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum DumpError {
    /// Some of its objects cannot be saved; all of them.
    #[error("{refusals}")]
    Refused { refusals: Refusals },
    /// It could not be stopped.
    #[error(transparent)]
    Freeze(FreezeError),
    /// The agent failed.
    #[error(transparent)]
    Agent(AgentError),
    /// A task's state could not be read.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// The pages of a process could not be read.
    #[error(transparent)]
    Pages(#[from] ReadPagesError),
    /// Namespaces could not be read.
    #[error(transparent)]
    Namespaces(#[from] CollectNamespacesError),
    /// The kernel did not tell something of a process.
    #[error("process {pid}: cannot read its {what}: {source}")]
    Read { pid: HostPid, what: &'static str, source: io::Error },
    /// The content of namespaces could not be saved.
    #[error(transparent)]
    NamespaceContent(#[from] DumpNamespacesError),
    /// The processor could not be told.
    #[error(transparent)]
    Cpu(#[from] crate::cpuinfo::CpuError),
    /// Cgroups could not be read.
    #[error(transparent)]
    Cgroups(#[from] ferry_cgroup::SaveError),
    /// The images could not be written.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// A listener failed.
    #[error("{problem}")]
    Caller { problem: String },
    /// Whoever was to fetch the pages did not fetch them all.
    #[error("not all memory was fetched: {0}; the processes run on as before, and the images are of no use")]
    Offer(#[from] OfferError),
    /// It was given up.
    #[error("the dump was given up: {0}; the processes run on as before")]
    Interrupted(#[from] Interrupted),
    /// The tree was saved whole, but could not be ended.
    #[error("the images are complete, but process {pid} could not be ended: {errno}")]
    Kill { pid: HostPid, errno: nix::errno::Errno },
}

impl From<FreezeError> for DumpError {
    fn from(error: FreezeError) -> Self {
        match error {
            FreezeError::Refused { refusals } => Self::Refused { refusals },
            FreezeError::Interrupted(interrupted) => Self::Interrupted(interrupted),
            error => Self::Freeze(error),
        }
    }
}

impl From<AgentError> for DumpError {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::Interrupted(why) => Self::Interrupted(why),
            error => Self::Agent(error),
        }
    }
}

impl DumpError {
    /// That the dump was given up, if that is behind this error: content tells it by errors of reading.
    fn or_given_up(self) -> Self {
        let mut error: Option<&(dyn std::error::Error + 'static)> = Some(&self);
        while let Some(inner) = error {
            let told = inner.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            if let Some(cancelled) = told.and_then(|told| told.downcast_ref::<Cancelled>()) {
                return Self::Interrupted((*cancelled).into());
            }
            error = inner.source();
        }
        self
    }

    pub(crate) fn read(pid: HostPid, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Read { pid, what, source }
    }
}

/// Saves the tree below `root` into `sink`.
///
/// # Errors
/// [`DumpError`]; the tree runs on as before then, except for [`DumpError::Kill`].
pub fn dump(root: HostPid, sink: &mut dyn Sink, options: &DumpOptions) -> Result<Dumped, DumpError> {
    dump_telling(root, sink, options, &mut NoListener)
}

/// Saves the tree below `root` into `sink`, and tells `listener` of its stages.
///
/// # Errors
/// As [`dump`].
pub fn dump_telling(
    root: HostPid,
    sink: &mut dyn Sink,
    options: &DumpOptions,
    listener: &mut dyn DumpListener,
) -> Result<Dumped, DumpError> {
    let mut options = options.clone();
    let mut dumped = Dumped::default();
    // Before what is stopped, so that it is dropped after it.
    let mut listening = Listening::new(listener, root);
    listening.reached(DumpStage::PreDump)?;
    let keepers = Keepers::default();
    if options.parent.is_some() {
        keepers.look();
    }
    let (reader, surroundings, cgroups, landings) = enter(DumpPhase::Preflight, &options, || {
        let outlook = preflight::look(root, &options)?;
        if !listening.names_external() {
            refuse(outlook.refusals)?;
        }
        let is_small = outlook.memory <= options.staging && outlook.mappings <= FEW_MAPPINGS;
        let first = is_small.then_some(root);
        let reader = PageReader::start(first, options.parent.clone(), keepers, options.cancel.clone())
            .map_err(DumpError::read(root, "memory"))?;
        let runs_on = options.after == After::Run;
        // Most of it is left to the parent, if there is one.
        let expected = if options.parent.is_some() { outlook.memory.min(INCREMENT) } else { outlook.memory };
        let stages = runs_on && options.lazy.is_none();
        let room = if stages { Staging::prepare(expected, options.staging) } else { Staging::default() };
        let cgroups = CgroupSets::new(&options.cgroups)?;
        reader.prepare(room);
        Ok((reader, outlook.surroundings, cgroups, outlook.landings))
    })?;
    let start = Instant::now();
    let mut stopped = enter(DumpPhase::Freeze, &options, || Ok(StoppedTree::stop(root, &options, &surroundings)?))?;
    dumped.freezing = start.elapsed();
    listening.lock_network()?;
    options.files.external.extend(listening.more_external()?);
    // What keeps it from being stopped in time is better told by the phase itself.
    if let Some(limit) = options.standstill {
        options.cancel.limit(start, limit);
    }
    let options = &options;
    let mut state = enter(DumpPhase::Collect, options, || {
        let mut list = install_list(root)?;
        collect::collect_tree(&mut stopped, options, &mut list, reader, cgroups, landings)
    })?;
    enter(DumpPhase::Recheck, options, || refuse(std::mem::take(&mut state.refusals)))?;
    listening.stopped(sink)?;
    let sink = &mut Metered::new(sink, options, state.pages() * PAGE_SIZE);
    let mut copied = enter(DumpPhase::Memory, options, || memory::save(&mut state, sink, options, &mut dumped))?;
    let later = std::mem::take(&mut copied.later);
    let mut stopped = Some(stopped);
    enter(DumpPhase::Release, options, || {
        if options.after == After::Run && !listening.sees_end() && options.lazy.is_none() {
            stopped.take();
            dumped.frozen = start.elapsed();
            options.cancel.lift_limit();
        }
        Ok(())
    })?;
    enter(DumpPhase::Save, options, || {
        if stopped.is_some() {
            dumped.frozen = start.elapsed();
        }
        copied.save(sink, options, &mut dumped)?;
        records::save(&state, sink, options, stopped.as_ref().and_then(StoppedTree::frozen), &mut dumped)?;
        Ok(sink.seal(&dumped)?)
    })?;
    listening.reached(DumpStage::PostDump)?;
    if let Some(offer) = &options.lazy {
        listening.reached(DumpStage::StatusReady)?;
        offer.serve(&later, &options.cancel)?;
        dumped.frozen = start.elapsed();
    }
    if stopped.is_some() && options.after == After::Kill {
        listening.forget_network();
    } else {
        listening.unlock_network()?;
    }
    if options.after == After::Run && stopped.take().is_some() {
        dumped.frozen = start.elapsed();
    }
    enter(DumpPhase::Finish, options, || match (stopped, options.after) {
        (Some(tree), After::Kill) => end(tree, options),
        (Some(tree), After::Stop) => stop_for_good(tree),
        _ => Ok(()),
    })?;
    info!(processes = dumped.processes, threads = dumped.threads, pages = dumped.pages, frozen = ?dumped.frozen, "dumped");
    Ok(dumped)
}

fn enter<T>(
    phase: DumpPhase,
    options: &DumpOptions,
    run: impl FnOnce() -> Result<T, DumpError>,
) -> Result<T, DumpError> {
    let span = info_span!("dump", ?phase);
    let _entered = span.enter();
    options.edge(Edge::Before, phase)?;
    let start = Instant::now();
    let result = run();
    debug!(took = ?start.elapsed(), ok = result.is_ok(), "phase done");
    let product = result.map_err(DumpError::or_given_up)?;
    options.edge(Edge::After, phase)?;
    Ok(product)
}

/// The list by which the kernel wakes agents when this process dies.
fn install_list(root: HostPid) -> Result<RobustList, AgentError> {
    let step = "have the kernel watch over the agents";
    RobustList::install(NODE).map_err(|errno| AgentError::Inject { tid: root, step, errno })
}

fn refuse(refusals: Vec<Refusal>) -> Result<(), DumpError> {
    if refusals.is_empty() { Ok(()) } else { Err(DumpError::Refused { refusals: Refusals(refusals) }) }
}

/// Kills every process of the stopped tree and waits until all are gone, zombies for their parents aside.
fn end(tree: StoppedTree, options: &DumpOptions) -> Result<(), DumpError> {
    if let Some(journal) = &options.journal {
        let processes = tree.processes.iter().filter(|process| !process.is_zombie());
        journal.ending(processes.map(|process| (process.pid, process.stat.start_time)));
    }
    for process in tree.processes.iter().filter(|process| !process.is_zombie()) {
        match kill(Pid::from_raw(process.pid.0), Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(errno) => return Err(DumpError::Kill { pid: process.pid, errno }),
        }
    }
    ptrace::reap(
        tree.processes.iter().rev().flat_map(|process| process.threads.iter().rev().map(|thread| thread.tid)).collect(),
    );
    tree.ended();
    Ok(())
}

/// Leaves every process in a job-control stop.
fn stop_for_good(tree: StoppedTree) -> Result<(), DumpError> {
    for process in tree.processes.iter().filter(|process| !process.is_zombie()) {
        for thread in &process.threads {
            // A thread that died meanwhile needs no stopping.
            let _ = ptrace::detach(thread.tid, if thread.tid == process.pid { libc::SIGSTOP } else { 0 });
        }
    }
    Ok(())
}
