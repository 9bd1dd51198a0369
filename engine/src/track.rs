//! Which pages a tree writes after a pre-dump, as the kernel tells it: the dump need not look at the others.
//!
//! `PAGEMAP_SCAN` reports pages as written once their mapping is registered with a userfaultfd for asynchronous write-protection
//! (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst and userfaultfd.rst). A fault on a protected page, whoever causes it, lifts its
//! protection and goes on; nobody waits for ferry. The kernel forgets all of it with the last descriptor, so a small process, the
//! *keeper*, holds the descriptors until the tree has ended. What it holds stands in a sealed memory file beside them.
//!
//! Invariants:
//! - A page counts as unwritten only if its mapping is registered now and its protection stands now. Whatever the kernel maps anew,
//!   moves, forks or executes is not registered; what it populates anew is not protected.
//! - Protection is put up while the tree is stopped, before its pages are read; and the keeper that vouches for an earlier image set is
//!   ended before that. So as long as a keeper lives, unwritten means: since the images that it names.
//! - Without a keeper nothing is believed; pages are compared.
//!
//! See `docs/decisions/0004-a-keeper-holds-write-tracking.md`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::time::Duration;

use nix::errno::Errno;
use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};

use crate::agent::AgentError;
use crate::agent::inject::{Injected, Overseer};
use crate::agent::landing::Landings;
use crate::fault::DumpStep;
use crate::freeze::StoppedProcess;
use crate::memory::mappings::{Kind, Mapping};
use crate::memory::parent::common;
use crate::procfs::{self, Stat};
use crate::sys::pagemap::{PRESENT, Pagemap, WRITES_TRACKED, WRITTEN, Wanted};
use crate::sys::robust::RobustList;
use crate::sys::{HostPid, keep, pidfd, userfaultfd};

/// The name of the memory file, as `/proc/PID/fd` shows it.
const RECORD: &str = "ferry-tracking";
/// Larger than the record of any tree that can be stopped.
const RECORD_LIMIT: usize = 16 << 20;
/// How long a keeper may take to die.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a keeper holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// The digest of the image set since which writes are tracked.
    images: String,
    tasks: Vec<Tracked>,
}

/// One process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Tracked {
    pid: i32,
    /// With the pid, which process it is.
    start_time: u64,
    /// Where its stack begins: another program's is elsewhere.
    stack: u64,
    /// The userfaultfd, by the keeper's number.
    descriptor: i32,
}

/// A keeper that was found.
#[derive(Debug)]
struct Keeper {
    process: OwnedFd,
    record: Record,
}

/// All keepers of this host, looked for when they are first asked about.
#[derive(Debug, Default)]
pub struct Keepers(OnceLock<Vec<Keeper>>);

impl Keepers {
    /// Looks for them now, while nothing is stopped.
    pub fn look(&self) {
        self.all();
    }

    fn all(&self) -> &[Keeper] {
        self.0.get_or_init(|| procfs::processes().into_iter().flatten().filter_map(Keeper::of_process).collect())
    }

    /// Whether one of them has the writes of a process tracked, so that what its mappings show of that is ferry's own doing.
    pub fn track(&self, pid: HostPid) -> bool {
        let knows = |keeper: &Keeper| keeper.task(pid).is_some() && keeper.is_alive();
        // One may have come since they were looked for.
        self.all().iter().any(knows) || Self::default().all().iter().any(knows)
    }

    /// The pages of a stopped process that nobody has written to since the images with this digest were made, in address order. None if
    /// nobody knows.
    pub fn unwritten(&self, pid: HostPid, mapped: &[Mapping], images: Option<&str>) -> Option<Vec<Range<u64>>> {
        let images = images?;
        let keeper = self.all().iter().find(|keeper| keeper.record.images == images && keeper.task(pid).is_some())?;
        let unwritten = keeper.unwritten(pid, mapped);
        unwritten.inspect_err(|error| tracing::debug!(%pid, %error, "nothing is known of its writes")).ok()
    }
}

impl Keeper {
    /// The keeper that process `pid` is, if it is one of this user's that knows pids by the same numbers.
    fn of_process(pid: HostPid) -> Option<Self> {
        if procfs::comm(pid).ok()? != keep::NAME {
            return None;
        }
        let process = pidfd::open(pid).ok()?;
        let me = HostPid(std::process::id() as i32);
        let same = |kind| procfs::namespace_inode(pid, kind) == procfs::namespace_inode(me, kind);
        if !same("pid") || !same("user") || procfs::effective_user(pid).ok()? != rustix::process::geteuid().as_raw() {
            return None;
        }
        let record = Record::read(pid)?;
        Some(Self { process, record })
    }

    /// Whether it still holds what it held.
    fn is_alive(&self) -> bool {
        pidfd::wait_gone(self.process.as_fd(), Duration::ZERO) == Err(Errno::ETIMEDOUT)
    }

    fn task(&self, pid: HostPid) -> Option<&Tracked> {
        let task = self.record.tasks.iter().find(|task| task.pid == pid.0)?;
        Stat::read(pid).is_ok_and(|stat| stat.start_time == task.start_time).then_some(task)
    }

    /// The pages of a stopped process that nobody has written to since the images of this keeper.
    fn unwritten(&self, pid: HostPid, mapped: &[Mapping]) -> io::Result<Vec<Range<u64>>> {
        let task = self.task(pid).ok_or(io::ErrorKind::NotFound)?;
        let descriptor = pidfd::get_fd(self.process.as_fd(), task.descriptor)?;
        // Swapped pages are not believed: where a page of a private file mapping was protected and then given back
        // (MADV_DONTNEED), the kernel leaves a marker that looks like one, and the page is the file's again.
        let wanted =
            Wanted { all_of: WRITES_TRACKED | WRITTEN, inverted: WRITTEN, any_of: PRESENT, report: WRITES_TRACKED };
        let mut regions = Vec::new();
        Pagemap::open(pid)?.scan(0..end_of(mapped), wanted, &mut regions)?;
        // The protection may have been put up by somebody else, at another time. Registering is no change where the mapping is
        // this descriptor's, and refused where it is another's.
        let is_ours = |mapping: &&Mapping| {
            let first = regions.partition_point(|region| region.end <= mapping.range.start);
            regions.get(first).is_some_and(|region| region.start < mapping.range.end)
                && userfaultfd::register_writes(&descriptor, mapping.range.clone()).is_ok()
        };
        let ours: Vec<Range<u64>> = mapped.iter().filter(is_ours).map(|mapping| mapping.range.clone()).collect();
        // Alive still, when the process is stopped: the protection of its mappings has stood since the images.
        if !self.is_alive() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let unwritten: Vec<Range<u64>> = regions.into_iter().map(|region| region.start..region.end).collect();
        Ok(common(&unwritten, &ours))
    }

    /// Takes over what it holds, and ends it: nobody vouches for its images any more.
    fn take_over(self) -> nix::Result<Vec<(Tracked, OwnedFd)>> {
        let take = |task: Tracked| {
            let descriptor = pidfd::get_fd(self.process.as_fd(), task.descriptor)?;
            Ok((task, descriptor))
        };
        let taken = self.record.tasks.iter().cloned().map(take).collect::<nix::Result<_>>();
        match pidfd::send_signal(self.process.as_fd(), libc::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => return Err(errno),
        }
        pidfd::wait_gone(self.process.as_fd(), PATIENCE)?;
        taken
    }
}

/// Where the last mapping of a process's own ends.
fn end_of(mapped: &[Mapping]) -> u64 {
    mapped.iter().rev().find(|mapping| mapping.kind != Kind::Vsyscall).map_or(0, |last| last.range.end)
}

impl Record {
    fn read(pid: HostPid) -> Option<Self> {
        let folder = format!("/proc/{pid}/fd");
        let is_record = |path: &std::path::PathBuf| {
            let target = std::fs::read_link(path).ok();
            target.is_some_and(|target| target.to_string_lossy().starts_with(&format!("/memfd:{RECORD}")))
        };
        let path = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).find(is_record)?;
        let file = File::open(path).ok()?;
        let length = usize::try_from(file.metadata().ok()?.len()).ok().filter(|length| *length <= RECORD_LIMIT)?;
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, 0).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes it into a memory file for good.
    fn write(&self, file: &File) -> io::Result<()> {
        file.write_all_at(&serde_json::to_vec(self)?, 0)?;
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        Ok(rustix::fs::fcntl_add_seals(file, seals)?)
    }
}

/// What a pre-dump tracks from now on. Dropped, nothing is tracked.
#[derive(Debug, Default)]
pub struct Tracker {
    tasks: Vec<(Tracked, OwnedFd)>,
    /// The userfaultfds of an earlier pre-dump that have not been asked for again.
    earlier: Vec<(Tracked, OwnedFd)>,
}

impl Tracker {
    /// Begins, with what an earlier pre-dump of any of these processes, which are stopped, left with a keeper. It vouches for its images no
    /// more.
    pub fn take_over(keepers: Keepers, processes: &[StoppedProcess]) -> Self {
        let mut tracker = Self::default();
        for keeper in keepers.0.into_inner().unwrap_or_default() {
            if processes.iter().any(|process| keeper.task(process.pid).is_some()) {
                // What it holds is another's still if this fails, and cannot be registered.
                match keeper.take_over() {
                    Ok(taken) => tracker.earlier.extend(taken),
                    Err(errno) => tracing::debug!(%errno, "cannot take over what tracked writes until now"),
                }
            }
        }
        tracker
    }

    /// Tracks the writes of a stopped process from now on. Where the kernel does not let ferry, the process is only not tracked.
    ///
    /// # Errors
    /// The agent failed, or the dump is given up.
    pub fn add(
        &mut self,
        process: &StoppedProcess,
        mapped: &[Mapping],
        list: &mut RobustList,
        overseer: Overseer<'_>,
    ) -> Result<(), AgentError> {
        let (pid, stat) = (process.pid, &process.stat);
        let is_it = |task: &Tracked| {
            (task.pid, task.start_time, task.stack) == (pid.0, stat.start_time, stat.bounds.start_stack)
        };
        let known = self.earlier.iter().position(|(task, _)| is_it(task)).map(|at| self.earlier.swap_remove(at).1);
        let descriptor = match known {
            Some(descriptor) => Some(descriptor),
            None => make_descriptor(process, mapped, list, overseer)?,
        };
        let Some(descriptor) = descriptor else { return Ok(()) };
        if let Err(error) = register(pid, &descriptor, mapped) {
            tracing::debug!(%pid, %error, "writes are not tracked");
            return Ok(());
        }
        let task = Tracked { pid: pid.0, start_time: stat.start_time, stack: stat.bounds.start_stack, descriptor: 0 };
        self.tasks.push((task, descriptor));
        Ok(())
    }

    /// Starts the keeper, which vouches that pages which are unwritten then are those of the image set with this digest.
    ///
    /// # Errors
    /// There can be none; nothing is tracked then.
    pub fn keep(self, images: &str) -> io::Result<()> {
        let mut processes = Vec::with_capacity(self.tasks.len());
        let mut tasks = Vec::with_capacity(self.tasks.len());
        for (task, descriptor) in self.tasks {
            // One that has ended meanwhile needs nothing.
            if let Ok(process) = pidfd::open(HostPid(task.pid)) {
                processes.push(process);
                tasks.push((task, descriptor));
            }
        }
        if tasks.is_empty() {
            return Ok(());
        }
        let file: File = rustix::fs::memfd_create(RECORD, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into();
        let of_tasks = tasks.iter().map(|(_, descriptor)| descriptor.as_fd());
        let waits: Vec<BorrowedFd<'_>> = processes.iter().map(AsFd::as_fd).collect();
        let kept: Vec<BorrowedFd<'_>> = of_tasks.chain(waits.iter().copied()).chain([file.as_fd()]).collect();
        let numbers = keep::numbers(&kept);
        let numbered =
            tasks.iter().zip(&numbers).map(|((task, _), number)| Tracked { descriptor: *number, ..task.clone() });
        Record { images: images.to_owned(), tasks: numbered.collect() }.write(&file)?;
        Ok(keep::start(&kept, &waits)?)
    }
}

/// Has a stopped process make a userfaultfd, and takes it away from it: its own table stays as it was.
fn make_descriptor(
    process: &StoppedProcess,
    mapped: &[Mapping],
    list: &mut RobustList,
    overseer: Overseer<'_>,
) -> Result<Option<OwnedFd>, AgentError> {
    let (pid, context) = (process.pid, &process.threads[0].context);
    let foothold = Landings::default().foothold(pid, mapped)?;
    let agents = Injected::new(pid, context, foothold, 0, list, overseer)?;
    let made = ask_for_descriptor(&agents, pid, overseer);
    let left = agents.leave();
    list.clear();
    left?;
    (overseer.pass)(DumpStep::Left)?;
    made.or_else(|error| match error {
        AgentError::Call { errno, .. } => {
            tracing::debug!(%pid, %errno, "no userfaultfd, writes are not tracked");
            Ok(None)
        }
        error => Err(error),
    })
}

/// If ferry is killed while the process has the descriptor, whoever watches over it has the process close it.
fn ask_for_descriptor(
    agents: &Injected<'_>,
    pid: HostPid,
    overseer: Overseer<'_>,
) -> Result<Option<OwnedFd>, AgentError> {
    agents.note_userfaultfd(lowest_free_descriptor(pid).ok());
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | userfaultfd::USER_MODE_ONLY;
    let number = agents.leader().call(libc::SYS_userfaultfd, &[flags])?;
    let passed = (overseer.pass)(DumpStep::Descriptor);
    let taken = pidfd::open(pid).and_then(|process| pidfd::get_fd(process.as_fd(), number as i32));
    agents.leader().call(libc::SYS_close, &[number])?;
    agents.note_userfaultfd(None);
    passed?;
    Ok(taken.and_then(|taken| userfaultfd::handshake_to_track(&taken).map(|()| taken)).ok())
}

/// The number that the next descriptor of a stopped process will have (open(2)).
fn lowest_free_descriptor(pid: HostPid) -> io::Result<u32> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd"))?;
    let mut numbers: Vec<u32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    let free = (0..).zip(&numbers).find(|(free, number)| free != *number).map(|(free, _)| free);
    Ok(free.unwrap_or(numbers.len() as u32))
}

/// Registers the private memory of a process, and protects what is in it.
fn register(pid: HostPid, descriptor: &OwnedFd, mapped: &[Mapping]) -> io::Result<()> {
    let pagemap = Pagemap::open(pid)?;
    let is_tracked = |mapping: &&Mapping| mapping.has_private_pages() && !mapping.is_of_huge_pages();
    for mapping in mapped.iter().filter(is_tracked) {
        // What is another's must not be protected: that one would take it for unwritten. It is saved whole.
        match userfaultfd::register_writes(descriptor, mapping.range.clone()) {
            Ok(()) => pagemap.watch_writes(mapping.range.clone())?,
            Err(errno) => tracing::debug!(%pid, %errno, mapping = mapping.name, "writes to a mapping are not tracked"),
        }
    }
    Ok(())
}
