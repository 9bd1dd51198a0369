//! Writing what was collected, image by image. No task needs to be stopped for this.

use std::time::Duration;

use ferry_cgroup::Frozen;

use crate::fault::DumpStep;
use crate::files::FilesDump;
use crate::images::ids::TaskKobjIdsEntry;
use crate::images::inventory::{InventoryEntry, LsmType, PluginsEntry};
use crate::images::kind::{IMG_VERSION, Kind};
use crate::images::pagemap::PagemapEntry;
use crate::images::pstree::PstreeEntry;
use crate::images::set::PARENT_OPTION;
use crate::images::stats::{DumpStatsEntry, StatsEntry};
use crate::images::{Content, Manifest, Sink, encode};
use crate::sys::PAGE_SIZE;
use crate::{cgroups, cpuinfo};

use super::{DumpError, DumpOptions, Dumped, ProcessState, TreeState};

/// The name of a shared object's pagemap image.
pub fn shared_pagemap_image(id: u64) -> String {
    Kind::ShmemPagemap.name_for(id)
}

/// Writes a pagemap image and its pages image number `number`.
pub fn save_pages(
    sink: &mut dyn Sink,
    pagemap: &str,
    number: u32,
    entries: &[PagemapEntry],
    pages: &dyn Content,
) -> Result<(), DumpError> {
    Ok(sink.put_pages(pagemap, number, entries, pages)?)
}

/// Writes every record, and at last the manifest. `frozen` is what keeps the tree frozen, if it still is.
pub fn save(
    state: &TreeState,
    sink: &mut dyn Sink,
    options: &DumpOptions,
    frozen: Option<&Frozen>,
    dumped: &mut Dumped,
) -> Result<(), DumpError> {
    dumped.processes = state.processes.len();
    dumped.threads = state.processes.iter().map(|process| process.cores.len()).sum();
    for process in &state.processes {
        options.step(DumpStep::Records)?;
        save_process(process, sink)?;
    }
    let tree: Vec<PstreeEntry> = state.processes.iter().map(|process| tree_entry(process, state.level)).collect();
    sink.put("pstree.img", &encode(Kind::Pstree, &tree))?;
    save_files(&state.files, sink)?;
    state.namespaces.dump_records(sink)?;
    sink.put("seccomp.img", &encode(Kind::Seccomp, std::slice::from_ref(&state.filters)))?;
    if options.cpuinfo {
        sink.put("cpuinfo.img", &encode(Kind::Cpuinfo, &[cpuinfo::collect()?]))?;
    }
    if let Some(cgroups) = state.cgroups.dump(&options.cgroups, frozen)? {
        sink.put("cgroup.img", &encode(Kind::Cgroup, &[cgroups]))?;
    }
    sink.put("inventory.img", &encode(Kind::Inventory, &[inventory(state, options)]))?;
    let mut manifest = manifest(options);
    manifest.options.insert("shell_job".into(), options.shell_job.into());
    dumped.manifest = Some(sink.finish(manifest)?);
    Ok(())
}

/// A manifest that says of which images the dump left pages.
pub fn manifest(options: &DumpOptions) -> Manifest {
    let mut manifest = Manifest::new(kernel_release(), PAGE_SIZE as u32);
    if let Some(digest) = options.parent.as_ref().and_then(|parent| parent.digest()) {
        manifest.options.insert(PARENT_OPTION.into(), digest.into());
    }
    manifest
}

/// Microseconds since the machine was started. CRIU takes a process that began later than the parent images were made for
/// another one.
pub fn uptime() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

fn save_process(process: &ProcessState, sink: &mut dyn Sink) -> Result<(), DumpError> {
    let pid = process.task.ns_pid.0 as u64;
    for (tid, core) in &process.cores {
        sink.put(&Kind::Core.name_for(*tid as u64), &encode(Kind::Core, std::slice::from_ref(core)))?;
    }
    if let Some(ids) = process.cores.first().and_then(|(_, leader)| leader.ids.clone()) {
        sink.put(&Kind::Ids.name_for(pid), &encode(Kind::Ids, &[ids]))?;
    }
    if let Some(mm) = &process.mm {
        sink.put(&Kind::Mm.name_for(pid), &encode(Kind::Mm, std::slice::from_ref(mm)))?;
    }
    if let Some(fs) = &process.fs {
        sink.put(&Kind::Fs.name_for(pid), &encode(Kind::Fs, std::slice::from_ref(fs)))?;
    }
    Ok(())
}

fn save_files(files: &FilesDump, sink: &mut dyn Sink) -> Result<(), DumpError> {
    sink.put("files.img", &encode(Kind::Files, &files.files))?;
    for (number, descriptors) in &files.fdinfo {
        sink.put(&Kind::Fdinfo.name_for(*number), &encode(Kind::Fdinfo, descriptors))?;
    }
    for (name, content) in &files.images {
        sink.put(name, content)?;
    }
    Ok(())
}

fn tree_entry(process: &ProcessState, level: usize) -> PstreeEntry {
    let at = |ids: &[i32]| ids.get(level).copied().unwrap_or(0) as u32;
    PstreeEntry {
        pid: process.task.ns_pid.0 as u32,
        ppid: process.parent as u32,
        pgid: at(&process.ids.group),
        sid: at(&process.ids.session),
        threads: process.cores.iter().map(|(tid, _)| *tid as u32).collect(),
    }
}

fn inventory(state: &TreeState, options: &DumpOptions) -> InventoryEntry {
    InventoryEntry {
        img_version: IMG_VERSION,
        fdinfo_per_id: Some(true),
        root_ids: Some(own_ids(state)),
        ns_per_id: Some(true),
        root_cg_set: Some(cgroups::ROOT_SET),
        lsmtype: Some(LsmType::NoLsm as i32),
        dump_uptime: options.track_memory.then(uptime),
        pre_dump_mode: None,
        tcp_close: None,
        network_lock_method: Some(0),
        plugins_entry: Some(PluginsEntry::default()),
        dump_criu_run_id: None,
        allow_uprobes: None,
    }
}

/// The dumper's own objects, as `root_ids` names them: a task with the same numbers lives in ferry's own namespaces.
fn own_ids(state: &TreeState) -> TaskKobjIdsEntry {
    let mut ids = TaskKobjIdsEntry { vm_id: 1, files_id: 1, fs_id: 1, sighand_id: 1, ..TaskKobjIdsEntry::default() };
    state.namespaces.own_ids().fill(&mut ids);
    ids
}

/// The release of the running kernel, as uname(2) says it.
fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

impl Dumped {
    /// The image `stats-dump`, which goes to the work folder.
    pub fn stats_image(&self) -> Vec<u8> {
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        let dump = DumpStatsEntry {
            freezing_time: micros(self.freezing),
            frozen_time: micros(self.frozen),
            memdump_time: micros(self.memory),
            memwrite_time: micros(self.memory + self.memory_writing),
            pages_scanned: self.pages - self.shared_pages + self.parent_pages + self.lazy_pages,
            pages_skipped_parent: self.parent_pages,
            pages_written: self.pages - self.shared_pages,
            irmap_resolve: None,
            pages_lazy: self.lazy_pages,
            page_pipes: None,
            page_pipe_bufs: None,
            shpages_scanned: Some(self.shared_pages + self.shared_parent_pages),
            shpages_skipped_parent: Some(self.shared_parent_pages),
            shpages_written: Some(self.shared_pages),
        };
        encode(Kind::StatsDump, &[StatsEntry { dump: Some(dump), restore: None }])
    }
}
