//! Memory that is a file without a name: what relatives share, and memfd_create(2).
//!
//! Ferry makes each object before the first task. What relatives share is made as the kernel makes it for
//! `MAP_SHARED | MAP_ANONYMOUS`, and opened through `/proc/self/map_files`. Every task inherits the descriptor and maps what it
//! had of it. The content is written through the root's copy of ferry's mapping, so that the pages are charged to the
//! root's cgroup.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;

use nix::errno::Errno;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::Restore;
use super::checkpoint::Checkpoint;
use super::error::RestoreError;
use crate::files::Inherited;
use crate::images::memfd::MemfdInodeEntry;
use crate::memory::fill;
use crate::memory::inherit::PageWrite;
use crate::memory::layout::Backing;
use crate::sys::PAGE_SIZE;
use crate::sys::shared::SharedMemory;

/// What CRIU calls the memfd that stands for shared anonymous memory.
const ANONYMOUS: &[u8] = b"/dev/zero";

/// One object, as ferry has it.
struct SharedObject {
    memory: SharedMemory,
    file: File,
}

/// All objects of the tree, mapped in ferry and in those of its children that were not cleared yet, by number.
pub type SharedObjects = BTreeMap<u64, SharedMemory>;

/// The name under which an object's descriptor is handed over to all tasks.
fn key(shmid: u64) -> String {
    format!("ferry-memory:{shmid}")
}

/// Makes the objects that the tree's mappings show, and adds their descriptors to what tasks inherit.
pub fn make_objects(checkpoint: &Checkpoint, inherited: &mut Inherited) -> Result<SharedObjects, RestoreError> {
    // How far mappings reach, and whether into huge pages.
    let mut reach: HashMap<u64, (u64, u32)> = HashMap::new();
    let memories = checkpoint.tasks.iter().filter_map(|task| task.memory.as_ref());
    for mapping in memories.flat_map(|memory| &memory.layout.mappings) {
        if let Backing::Shared { shmid, .. } = mapping.backing {
            let end = mapping.offset.saturating_add(mapping.range.end - mapping.range.start);
            let size = reach.entry(shmid).or_insert((0, mapping.flags & !(libc::MAP_GROWSDOWN as u32)));
            size.0 = size.0.max(end);
        }
    }
    let mut objects = SharedObjects::new();
    for (shmid, (reach, flags)) in reach {
        let saved = checkpoint.shared.get(&shmid).map_or(0, |pages| pages.set.end());
        let memfd = checkpoint.memfds.get(&shmid).filter(|memfd| memfd.name != ANONYMOUS);
        let object = match memfd {
            Some(memfd) => make_memfd(memfd, saved)?,
            None => {
                // What lies behind the last mapping is known for memory that CRIU wrote as a memfd only.
                let size = checkpoint.memfds.get(&shmid).map_or(0, |memfd| memfd.size).max(reach).max(saved);
                make_anonymous(whole_pages(size)?, flags)?
            }
        };
        inherited.insert(key(shmid), object.file.into());
        objects.insert(shmid, object.memory);
    }
    Ok(objects)
}

/// `size` rounded up to pages, at least one.
fn whole_pages(size: u64) -> Result<u64, RestoreError> {
    let too_large = RestoreError::Own { step: "make shared memory as large as its image says", errno: Errno::EFBIG };
    size.max(PAGE_SIZE).checked_next_multiple_of(PAGE_SIZE).ok_or(too_large)
}

fn make_anonymous(size: u64, flags: u32) -> Result<SharedObject, RestoreError> {
    let memory = SharedMemory::anonymous(size as usize, flags as i32)
        .map_err(|errno| RestoreError::Own { step: "make shared memory", errno })?;
    let start = memory.local_base() as u64;
    let path = format!("/proc/self/map_files/{start:x}-{:x}", start + memory.len() as u64);
    let file = File::options().read(true).write(true).open(path).map_err(|error| RestoreError::Own {
        step: "open shared memory (CAP_CHECKPOINT_RESTORE is needed)",
        errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
    })?;
    Ok(SharedObject { memory, file })
}

fn make_memfd(memfd: &MemfdInodeEntry, saved: u64) -> Result<SharedObject, RestoreError> {
    let failed =
        |step| move |errno: rustix::io::Errno| RestoreError::Own { step, errno: Errno::from_raw(errno.raw_os_error()) };
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if let Some(huge) = memfd.hugetlb_flag {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(huge);
    }
    let file = memfd_create(memfd.name.as_slice(), flags).map_err(failed("make a memfd"))?;
    ftruncate(&file, memfd.size).map_err(failed("size a memfd"))?;
    // Mapped to be filled, perhaps beyond its end, where no page is.
    let length = whole_pages(memfd.size.max(saved))? as usize;
    let memory = SharedMemory::map(&file, length, None, false)
        .map_err(|errno| RestoreError::Own { step: "map a memfd", errno })?;
    Ok(SharedObject { memory, file: file.into() })
}

impl Restore<'_> {
    /// The descriptor, in every task, of a shared memory object.
    pub(super) fn shared_descriptor(&self, shmid: u64) -> u64 {
        self.files.handed_over(&key(shmid)).map_or(u64::MAX, u64::from)
    }

    /// Fills the objects. The root still has ferry's mappings.
    pub(super) fn fill_shared(&mut self) -> Result<(), RestoreError> {
        let root = self.live.task(0);
        for (shmid, memory) in &self.shared {
            let Some(images) = self.checkpoint.shared.get(shmid) else { continue };
            let base = memory.local_base() as u64;
            let to_write = |run: &crate::memory::pageset::PageRun| PageWrite {
                address: base + run.range.start,
                offset: run.offset,
                length: run.range.end - run.range.start,
            };
            let writes: Vec<PageWrite> = images.set.runs.iter().map(to_write).collect();
            fill::write(root.host, &images.pages, &writes)
                .map_err(|source| RestoreError::fill(root.pid, &root.comm, source))?;
        }
        Ok(())
    }
}
