//! A thread that reads the mappings of processes, finds their pages, and copies these where there is room, while the rest of their
//! state is collected.
//!
//! Both take about as long for a small process, and neither needs the other: an agent that answers questions changes no
//! private page but the one in which the kernel tells the processor's number (rseq(2)), and that is told anew when the
//! process runs on. The thread is started before the tree is stopped, and whoever waits for the other stays awake for a while: a thread
//! that is woken may be put on the waking thread's processor, and one of both then waits for the other (measured: 1.1 of 3 ms of a
//! small process's pause).

use std::io;
use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::sched_getcpu;

use crate::cancel::Cancel;
use crate::memory::mappings::{self, Kind, Mapping};
use crate::memory::pages::{PageRuns, ProcessPages};
use crate::memory::parent::{ParentMemory, equal_pages, page_count, without};
use crate::memory::staging::{Staged, Staging};
use crate::procfs::Ids;
use crate::progress::MeteredContent;
use crate::sys::HostPid;
use crate::sys::processor::{go_to, leave};
use crate::track::Keepers;

/// How long a thread stays awake for a message that is to come soon.
const VIGIL: Duration = Duration::from_millis(5);

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

/// What the thread is told.
enum Order {
    /// There will be something to read soon, with room for copies. The sender runs on this processor.
    Prepare { staging: Staging, processor: Option<usize> },
    /// Stopped processes to read. Their agents will answer on this processor.
    Read { pids: Vec<HostPid>, processor: usize },
}

/// The thread. Dropped without [`Self::finish`], it ends after the process at hand, of which it only reads.
pub struct PageReader {
    orders: mpsc::Sender<Order>,
    mappings: mpsc::Receiver<Arc<[Mapping]>>,
    thread: JoinHandle<Result<(Vec<Found>, Staging), ReadPagesError>>,
}

/// What the thread works with.
struct Work {
    orders: mpsc::Receiver<Order>,
    mappings: mpsc::Sender<Arc<[Mapping]>>,
    /// Room for copies.
    staging: Staging,
    /// Earlier images, to which pages are left.
    parent: Option<Arc<ParentMemory>>,
    /// Who may know what was written since; the rest is compared.
    keepers: Keepers,
    cancel: Cancel,
}

impl PageReader {
    /// Starts the thread, which leaves pages to `parent`; `keepers` may know what was written since that. It looks at the mappings of `first`
    /// once before it is asked to: of a small process, which costs little, the first look takes three times as long as the second.
    ///
    /// # Errors
    /// Those of making a thread.
    pub fn start(
        first: Option<HostPid>,
        parent: Option<Arc<ParentMemory>>,
        keepers: Keepers,
        cancel: Cancel,
    ) -> io::Result<Self> {
        let (orders, received) = mpsc::channel();
        let (sender, mappings) = mpsc::channel();
        let work = Work { orders: received, mappings: sender, staging: Staging::default(), parent, keepers, cancel };
        let thread = std::thread::Builder::new().name("pages".into()).spawn(move || work.run(first))?;
        Ok(Self { orders, mappings, thread })
    }

    /// Wakes the thread, since it will be asked soon, gives it room for copies, and parts it from the caller.
    pub fn prepare(&self, staging: Staging) {
        let processor = sched_getcpu().ok();
        // The thread is gone only when it failed, which is told later.
        let _ = self.orders.send(Order::Prepare { staging, processor });
    }

    /// Has stopped processes read: the mappings of all first, then their pages. The caller goes to `processor`, where it has agents
    /// answer, and the thread elsewhere.
    pub fn read(&self, pids: Vec<HostPid>, processor: usize) {
        // As above.
        let _ = self.orders.send(Order::Read { pids, processor });
        note(go_to(processor));
    }

    /// Waits for the mappings of the next process. None when the thread has failed: [`Self::finish`] tells why.
    pub fn next_mappings(&self) -> Option<Arc<[Mapping]>> {
        receive_soon(&self.mappings)
    }

    /// Waits for the pages of all processes, in the order in which they were asked for; returns the room for others too.
    ///
    /// # Errors
    /// The first process that could not be read.
    pub fn finish(self) -> Result<(Vec<Found>, Staging), ReadPagesError> {
        drop(self.orders);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Work {
    fn run(mut self, first: Option<HostPid>) -> Result<(Vec<Found>, Staging), ReadPagesError> {
        if let Some(pid) = first {
            // What is wrong with it will be seen again.
            let _ = mappings::collect(pid);
        }
        let mut all = Vec::new();
        let mut next = self.orders.recv().ok();
        while let Some(order) = next {
            next = match order {
                Order::Prepare { staging, processor } => {
                    self.staging = staging;
                    note(processor.map_or(Ok(()), leave));
                    receive_soon(&self.orders)
                }
                Order::Read { pids, processor } => {
                    note(leave(processor));
                    let mapped = pids.into_iter().map(|pid| self.map(pid)).collect::<Result<Vec<_>, _>>()?;
                    for (pid, mappings) in mapped {
                        all.push(self.find(pid, &mappings)?);
                    }
                    self.orders.recv().ok()
                }
            };
        }
        Ok((all, self.staging))
    }

    /// Reads the mappings of a process, and passes them on.
    fn map(&self, pid: HostPid) -> Result<(HostPid, Arc<[Mapping]>), ReadPagesError> {
        let failed = |source| ReadPagesError { pid, what: "mappings", source };
        let mut mapped = mappings::collect(pid).map_err(failed)?;
        if mapped.iter().any(|mapping| mapping.writes_tracked) && !self.keepers.track(pid) {
            mappings::refuse_tracked(&mut mapped);
        }
        let mapped: Arc<[Mapping]> = mapped.into();
        // Nobody wants them any more when the dump has failed.
        let _ = self.mappings.send(mapped.clone());
        Ok((pid, mapped))
    }

    fn find(&mut self, pid: HostPid, mappings: &[Mapping]) -> Result<Found, ReadPagesError> {
        let failed = |what| move |source| ReadPagesError { pid, what, source };
        let mut runs = PageRuns::collect(pid, mappings).map_err(failed("page map"))?;
        let in_parent = match &self.parent {
            Some(parent) => self.leave_to(parent, pid, &mut runs, mappings).map_err(failed("memory"))?,
            None => Vec::new(),
        };
        runs.find_shared(pid).map_err(failed("page map"))?;
        let copy = if self.staging.has_room() {
            let pages = ProcessPages::open(pid, &runs).map_err(failed("memory"))?;
            self.staging.take(&pages).map_err(failed("memory"))?
        } else {
            None
        };
        Ok(Found { runs, in_parent, copy })
    }

    /// Takes out of `runs` what need not be saved, since `parent` has it; returns it. Where writes are tracked, pages that were written or
    /// whose mapping is new are saved without a look at their content.
    fn leave_to(
        &self,
        parent: &ParentMemory,
        pid: HostPid,
        runs: &mut PageRuns,
        mappings: &[Mapping],
    ) -> io::Result<Vec<Range<u64>>> {
        let process = Ids::read(pid)?.innermost();
        let left = match (self.keepers.unwritten(pid, mappings, parent.digest()), parent.private(process)) {
            (Some(unwritten), _) => {
                let left = parent.has_of(process, runs.runs(), &unwritten);
                tracing::debug!(%pid, pages = page_count(&left), "writes were tracked: pages are left to the parent unread");
                left
            }
            // Those that a page server has cannot be compared.
            (None, None) => return Ok(Vec::new()),
            (None, Some(images)) => {
                runs.find_shared(pid)?;
                let pages = ProcessPages::open(pid, runs)?;
                equal_pages(&MeteredContent::untold(&pages, &self.cancel), runs.runs(), images)?
            }
        };
        // Whoever restores looks into the vdso before anything else.
        let vdso = mappings.iter().filter(|mapping| mapping.kind == Kind::Vdso).map(|vdso| vdso.range.clone());
        let left = without(&left, &vdso.collect::<Vec<_>>());
        runs.leave_out(&left);
        Ok(left)
    }
}

/// Where threads run is a matter of speed alone.
fn note(placed: nix::Result<()>) {
    if let Err(errno) = placed {
        tracing::debug!(%errno, "a thread stays where it is");
    }
}

/// The next message, which may come at any moment. None when the sender is gone.
fn receive_soon<T>(messages: &mpsc::Receiver<T>) -> Option<T> {
    let start = Instant::now();
    while start.elapsed() < VIGIL {
        match messages.try_recv() {
            Ok(message) => return Some(message),
            Err(mpsc::TryRecvError::Disconnected) => return None,
            // Whoever else is to run here does.
            Err(mpsc::TryRecvError::Empty) => std::thread::yield_now(),
        }
    }
    messages.recv().ok()
}
