//! Every reason a dump would fail that can be seen while the tree runs, all at once.
//!
//! Nothing is stopped or changed. Tasks and descriptors that vanish meanwhile are passed over; what appears meanwhile, and
//! what only a stopped task shows, is found by the recheck of the dump itself.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::agent::landing::Landings;
use crate::dump::{DumpError, DumpOptions, relations};
use crate::error::Refusal;
use crate::files::{FilesCollector, FilesOptions};
use crate::freeze::{FreezeError, Surroundings};
use crate::memory::mappings;
use crate::namespaces;
use crate::procfs::{self, Ids, Resident, Stat};
use crate::sys::pagemap::{PRESENT, Pagemap, Wanted};
use crate::sys::{HostPid, PAGE_SIZE};
use crate::task::refuse;
use crate::tree::TaskRef;

/// Looks at the running tree below `root`.
///
/// # Errors
/// When the root itself cannot be looked at.
pub fn check(root: HostPid, options: &DumpOptions) -> Result<Vec<Refusal>, DumpError> {
    Ok(look(root, options)?.refusals)
}

/// What a running tree shows of itself.
pub(crate) struct Outlook {
    /// What would make a dump fail.
    pub refusals: Vec<Refusal>,
    /// Who is beside it.
    pub surroundings: Surroundings,
    /// Bytes of memory that a dump would save now, about: shared memory is counted as if all processes shared the same.
    pub memory: u64,
    /// How many mappings the root has.
    pub mappings: usize,
    /// Where agents can land in its programs.
    pub landings: Landings,
}

/// Looks at the running tree below `root`, once.
pub(crate) fn look(root: HostPid, options: &DumpOptions) -> Result<Outlook, DumpError> {
    let (tasks, jobs) = list(root)?;
    let freezer = options.freezer.as_ref();
    let (surroundings, mut refusals) = Surroundings::look(root, tasks[0].ns_pid, freezer);
    refusals.extend(relations::outside_job(&tasks[0], &jobs[0].ids, jobs[0].ids.pid.len() - 1, options));
    if let Some(Err(error)) = freezer.map(|freezer| freezer.foresee(|_| true)) {
        refusals.push(tasks[0].refuse("cgroup", sentence(&error), ""));
    }
    let mut landings = Landings::default();
    let mut mappings_of_root = None;
    for (task, job) in tasks.iter().zip(&jobs) {
        if let Some(parent) = job.parent {
            refusals.extend(relations::shared_with_running_parent(task, &tasks[parent]));
        }
        if job.stat.state == 'Z' && is_without_leader(task.pid) {
            refusals.push(relations::without_leader(task));
        }
        let mapped = mappings::collect_names(task.pid).unwrap_or_default();
        mappings_of_root.get_or_insert(mapped.len());
        refusals.extend(mapped.iter().filter_map(|mapping| mappings::refusal(task, mapping)));
        landings.find(task.pid, &mapped);
        refusals.extend(refuse::check_running(task));
    }
    let mappings = mappings_of_root.unwrap_or(0);
    // With its first thread the root has lost what would be looked at through it.
    if jobs[0].stat.state == 'Z' && !refusals.is_empty() {
        return Ok(Outlook { refusals, surroundings, memory: 0, mappings, landings });
    }
    let namespaces = namespaces::Collected::collect(&tasks[0], &tasks, &options.namespaces)?;
    refusals.extend_from_slice(namespaces.refusals());
    let files = FilesOptions { stopped: false, ..options.files.clone() };
    let mut collector = FilesCollector::new(root, files).map_err(DumpError::read(root, "mounts"))?;
    for (task, job) in tasks.iter().zip(&jobs) {
        collector.add_job(task, &job.stat, &job.ids);
        collector.add_task(task);
    }
    refusals.extend(collector.refusals());
    let resident: Vec<Resident> = tasks.iter().filter_map(|task| Resident::read(task.pid).ok()).collect();
    let shared = resident.iter().map(|resident| resident.shared).max().unwrap_or(0);
    let memory = resident.iter().map(|resident| resident.anonymous).sum::<u64>() + shared;
    Ok(Outlook { refusals, surroundings, memory, mappings, landings })
}

/// An error with its causes.
fn sentence(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// What the kernel says of a process as a whole.
struct Job {
    stat: Stat,
    ids: Ids,
    /// The place of its parent in the list.
    parent: Option<usize>,
}

/// The processes of a running tree that are alive, parents first.
fn list(root: HostPid) -> Result<(Vec<TaskRef>, Vec<Job>), DumpError> {
    let (task, job) = open(root, None).ok_or(FreezeError::NoProcess { pid: root })?;
    let (mut tasks, mut jobs, mut seen) = (vec![task], vec![job], HashSet::from([root]));
    let mut next = 0;
    while let Some(pid) = tasks.get(next).map(|task| task.pid) {
        for tid in procfs::threads(pid).unwrap_or_default() {
            // One that comes to another parent meanwhile may be met again.
            let children = procfs::children(pid, tid).unwrap_or_default();
            for child in children.into_iter().filter(|child| seen.insert(*child)) {
                if let Some((task, job)) = open(child, Some(next)) {
                    tasks.push(task);
                    jobs.push(job);
                }
            }
        }
        next += 1;
    }
    Ok((tasks, jobs))
}

fn open(pid: HostPid, parent: Option<usize>) -> Option<(TaskRef, Job)> {
    let stat = Stat::read(pid).ok().filter(|stat| stat.state != 'Z' || procfs::has_living_threads(pid))?;
    let ids = Ids::read(pid).ok()?;
    Some((TaskRef::open(pid, ids.innermost(), stat.comm.clone()).ok()?, Job { stat, ids, parent }))
}

/// Whether the process lives on after the end of its first thread, rather than ending now.
fn is_without_leader(pid: HostPid) -> bool {
    let is = || Stat::read(pid).is_ok_and(|stat| stat.state == 'Z') && procfs::has_living_threads(pid);
    let deadline = Instant::now() + EXIT_TIME;
    while is() {
        if Instant::now() > deadline {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// Longer than a process takes to end all its threads, on a busy machine too: threads that are to end need a processor for it.
const EXIT_TIME: Duration = Duration::from_millis(500);

/// Whether this host lets ferry do what every dump needs.
///
/// # Errors
/// A sentence that says what is missing.
pub fn check_host() -> Result<(), HostError> {
    let me = HostPid(std::process::id() as i32);
    std::fs::read_dir(format!("/proc/{me}/map_files")).map_err(HostError::MapFiles)?;
    Pagemap::open(me)
        .map_err(HostError::Pagemap)?
        .scan(0..PAGE_SIZE, Wanted { any_of: PRESENT, report: PRESENT, ..Wanted::default() }, &mut Vec::new())
        .map_err(|errno| HostError::PagemapScan(errno.into()))
}

/// What a host lacks.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the sentences say it")]
pub enum HostError {
    #[error(
        "/proc/PID/map_files cannot be read: {0}: run ferry as root, or with CAP_CHECKPOINT_RESTORE and CAP_SYS_PTRACE"
    )]
    MapFiles(#[source] std::io::Error),
    #[error(
        "/proc/PID/pagemap cannot be read: {0}: run ferry as root, or with CAP_CHECKPOINT_RESTORE and CAP_SYS_PTRACE"
    )]
    Pagemap(#[source] std::io::Error),
    #[error("the kernel has no PAGEMAP_SCAN: {0}: ferry needs Linux 6.7 or newer")]
    PagemapScan(#[source] std::io::Error),
}
