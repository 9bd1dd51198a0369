//! The image set of a tree, decoded and checked against itself.
//!
//! Invariants of a [`Checkpoint`]: tasks are as `pstree.img` lists them, the root first and parents before children; every thread
//! has its core, the leader's first; every living task has its memory; page runs lie within the pages image.

use std::collections::HashMap;
use std::ops::Range;

use super::error::RestoreError;
use crate::cancel::Cancel;
use crate::dump::PRE_DUMP_OPTION;
use crate::images::core::{CoreEntry, March, TaskCoreEntry, task_state};
use crate::images::core_x86::UserX86RegsMode;
use crate::images::files::FileEntry;
use crate::images::fs::FsEntry;
use crate::images::ids::TaskKobjIdsEntry;
use crate::images::inventory::InventoryEntry;
use crate::images::kind::IMG_VERSION;
use crate::images::memfd::MemfdInodeEntry;
use crate::images::mm::MmEntry;
use crate::images::pstree::PstreeEntry;
use crate::images::{ImageSet, Kind, SourceError};
use crate::memory::images::PageImages;
use crate::memory::inherit::Memory;
use crate::memory::layout::Layout;
use crate::memory::parent::{common, without};
use crate::progress::Progress;
use crate::sys::NsPid;

/// An address space.
pub struct MemoryImages {
    /// Bounds and auxiliary vector.
    pub mm: MmEntry,
    /// Mappings.
    pub layout: Layout,
    /// Pages.
    pub pages: PageImages,
    /// Those of them that come after the task runs, ascending.
    pub later: Vec<Range<u64>>,
}

impl MemoryImages {
    /// What a child's memory is compared with.
    pub fn memory(&self) -> Memory<'_> {
        Memory { layout: &self.layout, pages: &self.pages.set, bytes: self.pages.pages.bytes() }
    }
}

/// A thread other than the leader.
pub struct ThreadImages {
    /// Its id.
    pub tid: NsPid,
    /// Its state.
    pub core: CoreEntry,
}

/// One process.
pub struct TaskImages {
    /// Its pid.
    pub pid: NsPid,
    /// Its name.
    pub comm: String,
    /// Its parent's place; none for the root.
    pub parent: Option<usize>,
    /// Its process group.
    pub group: i32,
    /// Its session.
    pub session: i32,
    /// The leader's state, and the process's.
    pub core: CoreEntry,
    /// Threads beyond the leader.
    pub threads: Vec<ThreadImages>,
    /// Which objects it shares.
    pub ids: TaskKobjIdsEntry,
    /// None for a task that has exited.
    pub memory: Option<MemoryImages>,
    /// Directories; none for a task that has exited.
    pub fs: Option<FsEntry>,
}

impl TaskImages {
    /// What the process has as a whole.
    pub fn process(&self) -> &TaskCoreEntry {
        self.core.tc.as_ref().expect("checked when it was decoded")
    }

    /// Whether it has exited and waits to be reaped.
    pub fn is_zombie(&self) -> bool {
        matches!(self.process().task_state, task_state::DEAD | task_state::ZOMBIE)
    }
}

/// A whole tree.
pub struct Checkpoint {
    /// All processes.
    pub tasks: Vec<TaskImages>,
    /// Contents of memory shared by relatives and of memfds, by number.
    pub shared: HashMap<u64, PageImages>,
    /// Memfds, by number of their memory.
    pub memfds: HashMap<u64, MemfdInodeEntry>,
    /// The number of the set of cgroups that the dumper was in.
    pub cgroup_set: Option<u32>,
}

impl Checkpoint {
    /// Reads and decodes a set.
    ///
    /// # Errors
    /// [`RestoreError`] about the images only.
    pub fn read(images: &ImageSet) -> Result<Self, RestoreError> {
        match images.manifest() {
            Some(manifest) => {
                manifest.check_architecture().map_err(SourceError::from)?;
                if manifest.options.contains_key(PRE_DUMP_OPTION) {
                    return Err(RestoreError::PreDump);
                }
            }
            // Another program's: what this one does not know must not be left out silently.
            None => images.check_understood()?,
        }
        let name = Kind::Inventory.name();
        let inventory: InventoryEntry =
            images.entry(Kind::Inventory, &name)?.ok_or_else(|| RestoreError::Missing { name: name.clone() })?;
        if inventory.img_version > IMG_VERSION || inventory.img_version == 0 {
            let problem = format!(
                "the images have format version {}, this version reads up to {IMG_VERSION}",
                inventory.img_version
            );
            return Err(RestoreError::Inconsistent { name, problem });
        }
        let name = Kind::Pstree.name();
        let tree: Vec<PstreeEntry> =
            images.entries(Kind::Pstree, &name)?.ok_or_else(|| RestoreError::Missing { name: name.clone() })?;
        let wrong = |problem: String| RestoreError::Inconsistent { name: name.clone(), problem };
        let (memfds, by_description) = read_memfds(images)?;
        let mut places: HashMap<u32, usize> = HashMap::new();
        let mut tasks = Vec::with_capacity(tree.len());
        for (place, entry) in tree.iter().enumerate() {
            let parent = if place == 0 { None } else { places.get(&entry.ppid).copied() };
            if parent.is_none() && place > 0 {
                return Err(wrong(format!(
                    "pid {} has parent {}, which does not come before it",
                    entry.pid, entry.ppid
                )));
            }
            if places.insert(entry.pid, place).is_some() {
                return Err(wrong(format!("pid {} is there twice", entry.pid)));
            }
            tasks.push(read_task(images, entry, parent, &by_description)?);
        }
        if tasks.is_empty() {
            return Err(wrong("there is no process in the tree".into()));
        }
        let mut checkpoint = Self { tasks, shared: HashMap::new(), memfds, cgroup_set: inventory.root_cg_set };
        checkpoint.read_shared(images)?;
        Ok(checkpoint)
    }

    fn read_shared(&mut self, images: &ImageSet) -> Result<(), RestoreError> {
        let mut numbers: Vec<u64> = self.tasks.iter().flat_map(shared_numbers).collect();
        numbers.sort_unstable();
        numbers.dedup();
        for number in numbers {
            let name = Kind::ShmemPagemap.name_for(number);
            if let Some(pages) = PageImages::read(images, &name, Kind::ShmemPagemap)? {
                if !pages.set.elsewhere.is_empty() {
                    let problem = "it leaves shared pages to a page server, which no dump does: damaged".to_owned();
                    return Err(RestoreError::Inconsistent { name, problem });
                }
                self.shared.insert(number, pages);
            }
        }
        Ok(())
    }

    /// Leaves pages that the images call lazy for later, where mappings are of such that may wait.
    ///
    /// # Errors
    /// Pages are not there that must be: all of them, unless `lazily`.
    pub fn part_memory(&mut self, lazily: bool) -> Result<(), RestoreError> {
        for task in &mut self.tasks {
            let Some(memory) = &mut task.memory else { continue };
            if lazily {
                let may_wait = memory.layout.mappings.iter().filter(|mapping| mapping.can_be_lazy());
                let may_wait: Vec<Range<u64>> = may_wait.map(|mapping| mapping.range.clone()).collect();
                memory.later = common(&memory.pages.lazy, &may_wait);
                memory.pages.set.leave_out(&memory.later);
            }
            if let Some(range) = without(&memory.pages.set.elsewhere, &memory.later).first() {
                let name = Kind::Pagemap.name_for(task.pid.0 as u64);
                let problem = format!(
                    "the pages at {:x} are with the page server of the dump: start `lazy-pages --page-server` and restore with --lazy-pages",
                    range.start
                );
                return Err(RestoreError::Inconsistent { name, problem });
            }
        }
        Ok(())
    }

    /// Bytes of memory content, private and shared.
    pub fn bytes(&self) -> u64 {
        let private = self.tasks.iter().filter_map(|task| task.memory.as_ref()).map(|memory| &memory.pages);
        private.chain(self.shared.values()).map(|pages| pages.set.bytes()).sum()
    }

    /// Has `progress` told of the memory that is taken from the images, and no more be taken when `cancel` is asked.
    pub fn tell(&mut self, progress: &Progress, cancel: &Cancel) {
        progress.expect(self.bytes());
        let private = self.tasks.iter_mut().filter_map(|task| task.memory.as_mut()).map(|memory| &mut memory.pages);
        for images in private.chain(self.shared.values_mut()) {
            (images.pages.progress, images.pages.cancel) = (progress.clone(), cancel.clone());
        }
    }

    /// Number of threads of all living tasks, leaders included.
    pub fn thread_count(&self) -> usize {
        self.tasks.iter().map(|task| 1 + task.threads.len()).sum()
    }
}

fn shared_numbers(task: &TaskImages) -> impl Iterator<Item = u64> + '_ {
    let mappings = task.memory.iter().flat_map(|memory| &memory.layout.mappings);
    mappings.filter_map(|mapping| match mapping.backing {
        crate::memory::layout::Backing::Shared { shmid, .. } => Some(shmid),
        _ => None,
    })
}

fn number(name: &str, value: u32) -> Result<i32, RestoreError> {
    i32::try_from(value).map_err(|_| RestoreError::Inconsistent {
        name: name.to_owned(),
        problem: format!("{value} is no pid: the image is damaged"),
    })
}

fn required<T>(found: Option<T>, name: &str) -> Result<T, RestoreError> {
    found.ok_or_else(|| RestoreError::Missing { name: name.to_owned() })
}

type Memfds = (HashMap<u64, MemfdInodeEntry>, HashMap<u32, u64>);

/// Memfds by number of their memory, and that number by description.
fn read_memfds(images: &ImageSet) -> Result<Memfds, RestoreError> {
    let name = Kind::MemfdInode.name();
    let inodes: Vec<MemfdInodeEntry> = images.entries(Kind::MemfdInode, &name)?.unwrap_or_default();
    if inodes.is_empty() {
        return Ok(Memfds::default());
    }
    let by_inode: HashMap<u64, u64> = inodes.iter().map(|inode| (inode.inode_id, inode.shmid.into())).collect();
    let files: Vec<FileEntry> = images.entries(Kind::Files, &Kind::Files.name())?.unwrap_or_default();
    let memfd = |file: FileEntry| Some((file.id, *by_inode.get(&file.memfd?.inode_id.into())?));
    let by_description = files.into_iter().filter_map(memfd).collect();
    Ok((inodes.into_iter().map(|inode| (inode.shmid.into(), inode)).collect(), by_description))
}

fn read_task(
    images: &ImageSet,
    entry: &PstreeEntry,
    parent: Option<usize>,
    memfds: &HashMap<u32, u64>,
) -> Result<TaskImages, RestoreError> {
    let tree = Kind::Pstree.name();
    let core = read_core(images, entry.pid)?;
    let name = Kind::Core.name_for(entry.pid);
    let wrong = |problem: &str| RestoreError::Inconsistent { name: name.clone(), problem: problem.to_owned() };
    let process = core.tc.as_ref().ok_or_else(|| wrong("it says nothing about the process: it is damaged"))?;
    let alive = match process.task_state {
        task_state::ALIVE | task_state::STOPPED => true,
        task_state::DEAD | task_state::ZOMBIE => false,
        _ => return Err(wrong("the task is in a state that this version does not know")),
    };
    let comm = String::from_utf8_lossy(&process.comm).trim_end_matches('\0').to_owned();
    let mut threads = Vec::new();
    for &tid in entry.threads.iter().filter(|tid| alive && **tid != entry.pid) {
        threads.push(ThreadImages { tid: NsPid(number(&tree, tid)?), core: read_core(images, tid)? });
    }
    let ids_name = Kind::Ids.name_for(entry.pid);
    let ids = match images.entry::<TaskKobjIdsEntry>(Kind::Ids, &ids_name)? {
        Some(ids) => ids,
        None if alive => required(core.ids.clone(), &ids_name)?,
        None => core.ids.clone().unwrap_or_default(),
    };
    let (mut memory, mut fs) = (None, None);
    if alive {
        if core.thread_info.is_none() || core.thread_core.is_none() {
            return Err(wrong("it has no registers: it is damaged"));
        }
        memory = Some(read_memory(images, entry.pid, memfds)?);
        let fs_name = Kind::Fs.name_for(entry.pid);
        fs = Some(required(images.entry::<FsEntry>(Kind::Fs, &fs_name)?, &fs_name)?);
    }
    Ok(TaskImages {
        pid: NsPid(number(&tree, entry.pid)?),
        comm,
        parent,
        group: number(&tree, entry.pgid)?,
        session: number(&tree, entry.sid)?,
        core,
        threads,
        ids,
        memory,
        fs,
    })
}

fn read_core(images: &ImageSet, tid: u32) -> Result<CoreEntry, RestoreError> {
    let name = Kind::Core.name_for(tid);
    let core: CoreEntry = required(images.entry(Kind::Core, &name)?, &name)?;
    let wrong = |problem: String| RestoreError::Inconsistent { name: name.clone(), problem };
    let machine = March::try_from(core.mtype).unwrap_or(March::Unknown);
    if machine != March::X86_64 {
        return Err(wrong(format!("it was made on {machine:?}, this machine is x86-64")));
    }
    let mode = core.thread_info.as_ref().and_then(|info| info.gpregs.mode);
    if mode == Some(UserX86RegsMode::Compat as i32) {
        return Err(wrong("it is a 32-bit task, which is not supported".into()));
    }
    Ok(core)
}

fn read_memory(images: &ImageSet, pid: u32, memfds: &HashMap<u32, u64>) -> Result<MemoryImages, RestoreError> {
    let name = Kind::Mm.name_for(pid);
    let mm: MmEntry = required(images.entry(Kind::Mm, &name)?, &name)?;
    let layout = Layout::decode(&mm, memfds).map_err(|problem| RestoreError::Inconsistent { name, problem })?;
    let name = Kind::Pagemap.name_for(pid);
    let pages = required(PageImages::read(images, &name, Kind::Pagemap)?, &name)?;
    for run in &pages.set.runs {
        let mut at = run.range.start;
        while at < run.range.end {
            let kernels = [&layout.vdso, &layout.vvar];
            let private = layout.mapping_at(at).filter(|mapping| mapping.is_private());
            let end = match private {
                Some(mapping) => mapping.range.end,
                None => match kernels.into_iter().flatten().find(|range| range.contains(&at)) {
                    Some(range) => range.end,
                    None => {
                        let problem =
                            format!("there are pages at {at:x}, where the task has no private memory: damaged");
                        return Err(RestoreError::Inconsistent { name, problem });
                    }
                },
            };
            at = end;
        }
    }
    Ok(MemoryImages { mm, layout, pages, later: Vec::new() })
}
