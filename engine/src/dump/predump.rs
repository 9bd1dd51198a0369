//! A pre-dump: memory alone, copied while the tree runs, so that the dump after it has less to save while it is stopped.
//!
//! The tree is stopped only to find its mappings and pages at one instant. They are read when it runs again, and may change
//! while they are: such an image set is no checkpoint. It is the parent of one, whose dump leaves a page to it only where it has
//! compared the content, or where the kernel vouches that nobody wrote to it since that instant
//! ([`crate::memory::parent`], [`crate::track`]).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::records::{manifest, save_pages, shared_pagemap_image, uptime};
use super::{DumpError, DumpOptions, DumpPhase, Dumped, enter, install_list};
use crate::agent::inject::Overseer;
use crate::fault::DumpStep;
use crate::freeze::StoppedTree;
use crate::images::inventory::InventoryEntry;
use crate::images::kind::{IMG_VERSION, Kind};
use crate::images::pagemap::PagemapEntry;
use crate::images::{Content, Manifest, Sink, SinkError, encode};
use crate::memory::mappings::{self, Mapping};
use crate::memory::pages::PageRuns;
use crate::memory::parent::{equal_pages, page_count};
use crate::memory::shmem::SharedObjects;
use crate::preflight;
use crate::procfs::Ids;
use crate::progress::{Metered, MeteredContent};
use crate::sys::{HostPid, NsPid, PAGE_SIZE};
use crate::track::{Keepers, Tracker};

/// The option of the manifest of a pre-dump.
pub const PRE_DUMP_OPTION: &str = "pre_dump";
/// What CRIU calls reading memory from outside, by `--pre-dump-mode`.
const MODE_READ: u32 = 2;

/// A process whose pages are to be read.
struct Process {
    pid: HostPid,
    ns_pid: NsPid,
    pages: RunningPages,
    /// Pages that were not written since the parent images, if that is known.
    unwritten: Option<Vec<Range<u64>>>,
}

/// Saves the memory of the tree below `root` into `sink`. The tree runs on in any case.
///
/// # Errors
/// [`DumpError`]; nothing was changed then.
pub fn pre_dump(root: HostPid, sink: &mut dyn Sink, options: &DumpOptions) -> Result<Dumped, DumpError> {
    let mut dumped = Dumped::default();
    let surroundings = enter(DumpPhase::Preflight, options, || {
        let outlook = preflight::look(root, options)?;
        for refusal in &outlook.refusals {
            tracing::warn!("a dump would be refused now: {refusal}");
        }
        Ok(outlook.surroundings)
    })?;
    let keepers = Keepers::default();
    keepers.look();
    let start = Instant::now();
    let stopped = enter(DumpPhase::Freeze, options, || Ok(StoppedTree::stop(root, options, &surroundings)?))?;
    dumped.freezing = start.elapsed();
    if let Some(limit) = options.standstill {
        options.cancel.limit(start, limit);
    }
    let Collected { processes, mut shared, tracker } =
        enter(DumpPhase::Collect, options, || collect(&stopped, options, keepers))?;
    enter(DumpPhase::Release, options, || {
        dumped.threads = stopped.processes.iter().map(|process| process.threads.len()).sum();
        drop(stopped);
        dumped.frozen = start.elapsed();
        options.cancel.lift_limit();
        Ok(())
    })?;
    let pages = processes.iter().map(|process| process.pages.runs.pages()).sum::<u64>();
    let shared_pages = shared.iter().map(|(_, object)| object.pages()).sum::<u64>();
    let sink = &mut Metered::new(sink, options, (pages + shared_pages) * PAGE_SIZE);
    enter(DumpPhase::Memory, options, || {
        let start = Instant::now();
        save(root, processes, &mut shared, sink, options, &mut dumped)?;
        dumped.memory = start.elapsed();
        Ok(())
    })?;
    enter(DumpPhase::Save, options, || {
        let inventory = InventoryEntry {
            img_version: IMG_VERSION,
            dump_uptime: Some(uptime()),
            pre_dump_mode: Some(MODE_READ),
            ..InventoryEntry::default()
        };
        sink.put("inventory.img", &encode(Kind::Inventory, &[inventory]))?;
        let mut manifest = manifest(options);
        manifest.options.insert(PRE_DUMP_OPTION.into(), true.into());
        dumped.manifest = Some(sink.finish(manifest)?);
        Ok(sink.seal(&dumped)?)
    })?;
    // Last, since what the keeper vouches for must be there.
    enter(DumpPhase::Finish, options, || {
        let digest = dumped.manifest.as_ref().map(Manifest::digest).transpose().map_err(SinkError::from)?;
        if let Err(error) = tracker.keep(&digest.unwrap_or_default()) {
            tracing::warn!(%error, "writes are not tracked: the dump will compare all of the memory");
        }
        Ok(())
    })?;
    tracing::info!(processes = dumped.processes, pages = dumped.pages, frozen = ?dumped.frozen, "pre-dumped");
    Ok(dumped)
}

/// What is where in the stopped tree.
struct Collected {
    processes: Vec<Process>,
    shared: SharedObjects,
    tracker: Tracker,
}

/// Looks at the stopped tree, and has its writes tracked from now on.
fn collect(stopped: &StoppedTree, options: &DumpOptions, keepers: Keepers) -> Result<Collected, DumpError> {
    let mut processes = Vec::with_capacity(stopped.processes.len());
    let mut shared = SharedObjects::default();
    let mut mappings = Vec::with_capacity(stopped.processes.len());
    let images = options.parent.as_ref().and_then(|parent| parent.digest());
    let living = || stopped.processes.iter().filter(|process| !process.is_zombie());
    for pid in living().map(|process| process.pid) {
        let read = |what| DumpError::read(pid, what);
        let mapped: Vec<Mapping> = mappings::collect_names(pid).map_err(read("mappings"))?;
        for mapping in &mapped {
            shared.add(pid, mapping).map_err(read("shared memory"))?;
        }
        let ns_pid = Ids::read(pid).map_err(read("ids"))?.innermost();
        let runs = PageRuns::find(pid, &mapped).map_err(read("page map"))?;
        // Opened now, so that it stays that of this program.
        let memory = File::open(format!("/proc/{pid}/mem")).map_err(read("memory"))?;
        let unwritten = keepers.unwritten(pid, &mapped, images);
        processes.push(Process { pid, ns_pid, pages: RunningPages { memory, runs }, unwritten });
        mappings.push(mapped);
    }
    shared.collect_pages().map_err(DumpError::read(stopped.root().pid, "shared memory"))?;
    let mut list = install_list(stopped.root().pid)?;
    let pass = |step| options.step(step);
    let overseer = Overseer { journal: options.journal.as_ref(), pass: &pass };
    let mut tracker = Tracker::take_over(keepers, &stopped.processes);
    for (process, mapped) in living().zip(&mappings) {
        tracker.add(process, mapped, &mut list, overseer)?;
    }
    Ok(Collected { processes, shared, tracker })
}

/// Writes pages, but for those that the parent has.
fn save(
    root: HostPid,
    processes: Vec<Process>,
    shared: &mut SharedObjects,
    sink: &mut dyn Sink,
    options: &DumpOptions,
    dumped: &mut Dumped,
) -> Result<(), DumpError> {
    let parent = options.parent.as_deref();
    let mut number = 0;
    let mut put = |pagemap: String, entries: Vec<PagemapEntry>, pages: &dyn Content| {
        number += 1;
        options.step(DumpStep::Pages)?;
        save_pages(sink, &pagemap, number, &entries, pages)
    };
    for Process { pid, ns_pid, mut pages, unwritten } in processes {
        let in_parent = match (parent, unwritten) {
            (None, _) => Vec::new(),
            (Some(parent), Some(unwritten)) => parent.has_of(ns_pid, pages.runs.runs(), &unwritten),
            (Some(parent), None) => parent
                .private(ns_pid)
                .map_or(Ok(Vec::new()), |images| {
                    equal_pages(&MeteredContent::untold(&pages, &options.cancel), pages.runs.runs(), images)
                })
                .map_err(DumpError::read(pid, "memory"))?,
        };
        pages.runs.leave_out(&in_parent);
        let entries = PagemapEntry::of_runs(pages.runs.runs(), &in_parent);
        put(Kind::Pagemap.name_for(ns_pid.0 as u64), entries, &pages)?;
        dumped.processes += 1;
        dumped.pages += pages.runs.pages();
        dumped.parent_pages += page_count(&in_parent);
    }
    if let Some(parent) = parent {
        shared.leave_to(parent, &options.cancel).map_err(DumpError::read(root, "shared memory"))?;
    }
    for (id, object) in shared.iter() {
        put(shared_pagemap_image(id), object.dump(), object)?;
        dumped.pages += object.pages();
        dumped.shared_pages += object.pages();
        dumped.shared_parent_pages += object.pages_in_parent();
    }
    Ok(())
}

/// Pages of a process that runs.
struct RunningPages {
    memory: File,
    runs: PageRuns,
}

impl Content for RunningPages {
    fn len(&self) -> u64 {
        self.runs.bytes()
    }

    /// A page that has gone meanwhile reads as zeros: the dump will not find it, or another in its place.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = buffer;
        for range in self.runs.ranges(offset, rest.len() as u64) {
            let (here, others) = rest.split_at_mut((range.end - range.start) as usize);
            read_if_there(&self.memory, range.start, here);
            rest = others;
        }
        Ok(())
    }
}

/// Reads memory that may have gone.
fn read_if_there(memory: &File, start: u64, mut buffer: &mut [u8]) {
    let mut at = start;
    while !buffer.is_empty() {
        let got = match memory.read_at(buffer, at) {
            Ok(got) if got > 0 => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            _ => {
                let gone = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(buffer.len());
                buffer[..gone].fill(0);
                gone
            }
        };
        at += got as u64;
        buffer = &mut buffer[got..];
    }
}
