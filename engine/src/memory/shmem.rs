//! Shared anonymous memory: nameless files of the kernel's tmpfs, told apart by their inode.
//!
//! `/proc/PID/map_files` (`CAP_CHECKPOINT_RESTORE`) opens the file behind a mapping; holes are pages that nobody has
//! touched (lseek(2), `SEEK_DATA`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use rustix::fs::{SeekFrom, seek};

use crate::cancel::Cancel;
use crate::images::Content;
use crate::images::pagemap::PagemapEntry;
use crate::memory::mappings::{Kind, Mapping};
use crate::memory::parent::{ParentMemory, equal_pages, page_count, without};
use crate::progress::MeteredContent;
use crate::sys::{HostPid, PAGE_SIZE};

/// One shared memory object.
pub struct SharedObject {
    file: File,
    /// Offsets of the pages to save, in order.
    runs: Vec<Range<u64>>,
    /// Of those that are left to the parent images.
    in_parent: Vec<Range<u64>>,
    /// How far any mapping reaches into it.
    end: u64,
}

/// The shared memory objects of a tree, by the id that mappings name them with.
#[derive(Default)]
pub struct SharedObjects {
    /// By inode. All are in the kernel's one internal tmpfs, so that the inode alone tells them apart.
    objects: BTreeMap<u64, SharedObject>,
}

impl SharedObjects {
    /// Notes a process's mapping, if it is of this kind; returns the id for its entry.
    ///
    /// # Errors
    /// Those of opening the file behind the mapping.
    pub fn add(&mut self, pid: HostPid, mapping: &Mapping) -> io::Result<u64> {
        if mapping.kind != Kind::AnonymousShared {
            return Ok(0);
        }
        let end = mapping.offset + (mapping.range.end - mapping.range.start);
        if let Some(known) = self.objects.get_mut(&mapping.inode) {
            known.end = known.end.max(end);
        } else {
            let path = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.range.start, mapping.range.end);
            let object = SharedObject { file: File::open(path)?, runs: Vec::new(), in_parent: Vec::new(), end };
            self.objects.insert(mapping.inode, object);
        }
        Ok(mapping.inode)
    }

    /// Finds the pages of every object, once no task can touch them any more.
    ///
    /// # Errors
    /// Those of lseek(2).
    pub fn collect_pages(&mut self) -> io::Result<()> {
        self.objects.values_mut().try_for_each(SharedObject::collect_pages)
    }

    /// Leaves to `parent` the pages that it has with the same content.
    ///
    /// # Errors
    /// Those of reading, and that it is given up.
    pub(crate) fn leave_to(&mut self, parent: &ParentMemory, cancel: &Cancel) -> io::Result<()> {
        for (id, object) in &mut self.objects {
            if let Some(pages) = parent.shared(*id) {
                let content = MeteredContent::untold(object, cancel);
                object.in_parent = equal_pages(&content, &object.runs, pages)?;
                object.runs = without(&object.runs, &object.in_parent);
            }
        }
        Ok(())
    }

    /// The objects with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &SharedObject)> {
        self.objects.iter().map(|(id, object)| (*id, object))
    }
}

impl SharedObject {
    fn collect_pages(&mut self) -> io::Result<()> {
        let mut offset = 0;
        while offset < self.end {
            let start = match seek(&self.file, SeekFrom::Data(offset)) {
                Ok(start) => start,
                Err(error) if error.raw_os_error() == Errno::ENXIO as i32 => break,
                Err(error) => return Err(error.into()),
            };
            if start >= self.end {
                break;
            }
            let end = seek(&self.file, SeekFrom::Hole(start))?.next_multiple_of(PAGE_SIZE).min(self.end);
            self.runs.push(start..end);
            offset = end;
        }
        Ok(())
    }

    /// The entries of its pagemap image: offsets in the object take the place of addresses.
    pub fn dump(&self) -> Vec<PagemapEntry> {
        PagemapEntry::of_runs(&self.runs, &self.in_parent)
    }

    /// How many pages are to be saved.
    pub fn pages(&self) -> u64 {
        self.len() / PAGE_SIZE
    }

    /// How many pages are left to the parent images.
    pub fn pages_in_parent(&self) -> u64 {
        page_count(&self.in_parent)
    }
}

impl Content for SharedObject {
    fn len(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    fn read_at(&self, offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        let mut skip = offset;
        for run in &self.runs {
            let len = run.end - run.start;
            if skip >= len {
                skip -= len;
                continue;
            }
            let take = (len - skip).min(buffer.len() as u64) as usize;
            let (head, rest) = buffer.split_at_mut(take);
            self.file.read_exact_at(head, run.start + skip)?;
            (buffer, skip) = (rest, 0);
            if buffer.is_empty() {
                return Ok(());
            }
        }
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "fewer shared pages than were found"))
    }
}
