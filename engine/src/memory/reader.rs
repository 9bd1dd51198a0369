//! A thread that finds, and where there is room copies, the pages of processes while the rest of their state is collected.
//!
//! Both take about as long for a small process, and neither needs the other: an agent that answers questions changes no
//! private page but the one in which the kernel tells the processor's number (rseq(2)), and that is told anew when the
//! process runs on. The thread is started before the tree is stopped.

use std::io;
use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use crate::cancel::Cancel;
use crate::memory::mappings::{Kind, Mapping};
use crate::memory::pages::{PageRuns, ProcessPages};
use crate::memory::parent::{ParentMemory, equal_pages, page_count, without};
use crate::memory::staging::{Staged, Staging};
use crate::procfs::Ids;
use crate::progress::MeteredContent;
use crate::sys::HostPid;
use crate::track::Keepers;

/// The pages of one process.
#[derive(Default)]
pub struct Found {
    /// Which are to be saved.
    pub runs: PageRuns,
    /// Which are left to the parent images, in address order.
    pub in_parent: Vec<Range<u64>>,
    /// Where their copy is, if there was room.
    pub copy: Option<Staged>,
}

impl Found {
    /// How many pages are left to the parent images.
    pub fn pages_in_parent(&self) -> u64 {
        page_count(&self.in_parent)
    }
}

/// Why pages could not be read.
#[derive(Debug, thiserror::Error)]
#[error("process {pid}: cannot read its {what}: {source}")]
pub struct ReadPagesError {
    /// The process.
    pub pid: HostPid,
    /// What of it.
    pub what: &'static str,
    /// Why.
    pub source: io::Error,
}

/// Earlier images, to which pages are left.
pub struct Parent {
    /// Their memory.
    pub memory: Arc<ParentMemory>,
    /// Who may know what was written since; the rest is compared.
    pub keepers: Arc<Keepers>,
}

struct Job {
    pid: HostPid,
    mappings: Arc<[Mapping]>,
}

/// The thread. Dropped without [`Self::finish`], it ends after the process at hand, of which it only reads.
pub struct PageReader {
    jobs: mpsc::Sender<Job>,
    thread: JoinHandle<Result<(Vec<Found>, Staging), ReadPagesError>>,
}

impl PageReader {
    /// Starts the thread, which copies into `staging` what `parent` does not have.
    ///
    /// # Errors
    /// Those of making a thread.
    pub fn start(staging: Staging, parent: Option<Parent>, cancel: Cancel) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("pages".into())
            .spawn(move || read_all(queue, staging, parent.as_ref(), &cancel))?;
        Ok(Self { jobs, thread })
    }

    /// Has the pages of a stopped process read.
    pub fn read(&self, pid: HostPid, mappings: Arc<[Mapping]>) {
        // The thread is gone only when it failed, which `finish` tells.
        let _ = self.jobs.send(Job { pid, mappings });
    }

    /// Waits for the pages of all processes, in the order in which they were asked for; returns the room for others too.
    ///
    /// # Errors
    /// The first process whose pages could not be read.
    pub fn finish(self) -> Result<(Vec<Found>, Staging), ReadPagesError> {
        drop(self.jobs);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn read_all(
    queue: mpsc::Receiver<Job>,
    mut staging: Staging,
    parent: Option<&Parent>,
    cancel: &Cancel,
) -> Result<(Vec<Found>, Staging), ReadPagesError> {
    let mut all = Vec::new();
    for Job { pid, mappings } in queue {
        let failed = |what| move |source| ReadPagesError { pid, what, source };
        let mut runs = PageRuns::collect(pid, &mappings).map_err(failed("page map"))?;
        let in_parent = match parent {
            Some(parent) => leave_to_parent(pid, &mut runs, &mappings, parent, cancel).map_err(failed("memory"))?,
            None => Vec::new(),
        };
        runs.find_shared(pid).map_err(failed("page map"))?;
        let copy = if staging.has_room() {
            let pages = ProcessPages::open(pid, &runs).map_err(failed("memory"))?;
            staging.take(&pages).map_err(failed("memory"))?
        } else {
            None
        };
        all.push(Found { runs, in_parent, copy });
    }
    Ok((all, staging))
}

/// Takes out of `runs` what need not be saved, since `parent` has it; returns it. Where writes are tracked, pages that were written or
/// whose mapping is new are saved without a look at their content.
fn leave_to_parent(
    pid: HostPid,
    runs: &mut PageRuns,
    mappings: &[Mapping],
    Parent { memory: parent, keepers }: &Parent,
    cancel: &Cancel,
) -> io::Result<Vec<Range<u64>>> {
    let process = Ids::read(pid)?.innermost();
    let left = match (keepers.unwritten(pid, mappings, parent.digest()), parent.private(process)) {
        (_, None) => return Ok(Vec::new()),
        (Some(unwritten), Some(_)) => {
            let left = parent.has_of(process, runs.runs(), &unwritten);
            tracing::debug!(%pid, pages = page_count(&left), "writes were tracked: pages are left to the parent unread");
            left
        }
        (None, Some(images)) => {
            runs.find_shared(pid)?;
            let pages = ProcessPages::open(pid, runs)?;
            equal_pages(&MeteredContent::untold(&pages, cancel), runs.runs(), images)?
        }
    };
    // Whoever restores looks into the vdso before anything else.
    let vdso = mappings.iter().filter(|mapping| mapping.kind == Kind::Vdso).map(|vdso| vdso.range.clone());
    let left = without(&left, &vdso.collect::<Vec<_>>());
    runs.leave_out(&left);
    Ok(left)
}
