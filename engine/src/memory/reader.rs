//! A thread that finds, and where there is room copies, the pages of processes while the rest of their state is collected.
//!
//! Both take about as long for a small process, and neither needs the other: an agent that answers questions changes no
//! private page but the one in which the kernel tells the processor's number (rseq(2)), and that is told anew when the
//! process runs on. The thread is started before the tree is stopped.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use crate::memory::mappings::Mapping;
use crate::memory::pages::{PageRuns, ProcessPages};
use crate::memory::staging::{Staged, Staging};
use crate::sys::HostPid;

/// The pages of one process.
#[derive(Default)]
pub struct Found {
    /// Which there are.
    pub runs: PageRuns,
    /// Where their copy is, if there was room.
    pub copy: Option<Staged>,
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
    /// Starts the thread, which copies into `staging`.
    ///
    /// # Errors
    /// Those of making a thread.
    pub fn start(staging: Staging) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let thread = std::thread::Builder::new().name("pages".into()).spawn(|| read_all(queue, staging))?;
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

fn read_all(queue: mpsc::Receiver<Job>, mut staging: Staging) -> Result<(Vec<Found>, Staging), ReadPagesError> {
    let mut all = Vec::new();
    for Job { pid, mappings } in queue {
        let failed = |what| move |source| ReadPagesError { pid, what, source };
        let runs = PageRuns::collect(pid, &mappings).map_err(failed("page map"))?;
        let copy = if staging.has_room() {
            let pages = ProcessPages::open(pid, &runs).map_err(failed("memory"))?;
            staging.take(&pages).map_err(failed("memory"))?
        } else {
            None
        };
        all.push(Found { runs, copy });
    }
    Ok((all, staging))
}
