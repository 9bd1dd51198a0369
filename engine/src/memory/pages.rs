//! The private pages of a process: which there are, and their contents as one image.
//!
//! `PAGEMAP_SCAN` walks the whole address space in one call. Saved are pages that are in memory or swapped out and
//! neither belong to a file nor are the shared page of zeros: they are what reading the mapping anew would not show.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::images::pagemap::{PagemapEntry, page_flags};
use crate::memory::mappings::{Kind, Mapping};
use crate::sys::pagemap::{FILE, PFNZERO, PRESENT, PageRegion, Pagemap, SWAPPED, Wanted};
use crate::sys::{HostPid, PAGE_SIZE, process_vm};

/// Runs of pages of one process, in address order, and where each lies in the pages image.
#[derive(Clone, Debug, Default)]
pub struct PageRuns {
    runs: Vec<Range<u64>>,
    /// Offset in the image of each run, and at last the image's length.
    offsets: Vec<u64>,
}

impl PageRuns {
    /// Finds the pages to save of a stopped process.
    ///
    /// # Errors
    /// Those of opening and scanning the page map.
    pub fn collect(pid: HostPid, mappings: &[Mapping]) -> io::Result<Self> {
        let wanted =
            Wanted { all_of: FILE | PFNZERO, inverted: FILE | PFNZERO, any_of: PRESENT | SWAPPED, report: PRESENT };
        let mut regions = Vec::new();
        let end = mappings.iter().rev().find(|mapping| mapping.kind != Kind::Vsyscall).map_or(0, |last| last.range.end);
        Pagemap::open(pid)?.scan(0..end, wanted, &mut regions)?;
        let mut runs = Self::intersect(&regions, mappings);
        // The vdso belongs to the kernel, but whoever restores compares it with its own.
        runs.extend(mappings.iter().filter(|mapping| mapping.kind == Kind::Vdso).map(|vdso| vdso.range.clone()));
        runs.sort_by_key(|run| run.start);
        Ok(Self::new(runs))
    }

    fn new(runs: Vec<Range<u64>>) -> Self {
        let mut offsets = Vec::with_capacity(runs.len() + 1);
        let mut offset = 0;
        for run in &runs {
            offsets.push(offset);
            offset += run.end - run.start;
        }
        offsets.push(offset);
        Self { runs, offsets }
    }

    /// The parts of `regions` that lie in mappings with private pages, each within one mapping.
    fn intersect(regions: &[PageRegion], mappings: &[Mapping]) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::with_capacity(regions.len());
        let mut regions = regions.iter().copied().peekable();
        for mapping in mappings.iter().filter(|mapping| mapping.has_private_pages()) {
            let first = runs.len();
            while let Some(region) = regions.peek_mut() {
                if region.end <= mapping.range.start {
                    regions.next();
                    continue;
                }
                if region.start >= mapping.range.end {
                    break;
                }
                let part = region.start.max(mapping.range.start)..region.end.min(mapping.range.end);
                let part_end = part.end;
                match runs[first..].last_mut() {
                    Some(last) if last.end == part.start => last.end = part.end,
                    _ => runs.push(part),
                }
                if part_end < region.end {
                    region.start = part_end;
                    break;
                }
                regions.next();
            }
        }
        runs
    }

    /// How many bytes the pages take.
    pub fn bytes(&self) -> u64 {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    /// The entries of the pagemap image.
    pub fn dump(&self) -> impl Iterator<Item = PagemapEntry> {
        self.runs.iter().map(|run| PagemapEntry::new(run.start, (run.end - run.start) / PAGE_SIZE, page_flags::PRESENT))
    }

    /// The address ranges behind `len` bytes of the image from `offset`.
    fn ranges(&self, offset: u64, len: u64) -> Vec<Range<u64>> {
        let mut index = self.offsets.partition_point(|start| *start <= offset) - 1;
        let mut ranges = Vec::new();
        let (mut offset, mut left) = (offset, len);
        while left > 0 && index < self.runs.len() {
            let start = self.runs[index].start + (offset - self.offsets[index]);
            let take = left.min(self.runs[index].end - start);
            ranges.push(start..start + take);
            offset += take;
            left -= take;
            index += 1;
        }
        ranges
    }
}

/// The pages of a process as the bytes of a pages image, read when they are asked for.
pub struct ProcessPages<'a> {
    pid: HostPid,
    runs: &'a PageRuns,
    /// For pages that their owner may not read itself.
    memory: File,
}

impl<'a> ProcessPages<'a> {
    /// Opens the memory of a process that ferry traces.
    ///
    /// # Errors
    /// Those of opening `/proc/PID/mem`.
    pub fn open(pid: HostPid, runs: &'a PageRuns) -> io::Result<Self> {
        Ok(Self { pid, runs, memory: File::open(format!("/proc/{pid}/mem"))? })
    }

    /// Reads ranges through `/proc/PID/mem`, which ignores protections, until `ranges` or the buffer end.
    fn read_protected(&self, ranges: &[Range<u64>], mut buffer: &mut [u8]) -> io::Result<()> {
        for range in ranges {
            let (head, rest) = buffer.split_at_mut((range.end - range.start) as usize);
            self.memory.read_exact_at(head, range.start)?;
            buffer = rest;
        }
        Ok(())
    }
}

impl crate::images::Content for ProcessPages<'_> {
    fn len(&self) -> u64 {
        self.runs.bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut ranges = self.runs.ranges(offset, buffer.len() as u64);
        let mut done = 0;
        while done < buffer.len() {
            let got = process_vm::read(self.pid, &ranges, &mut buffer[done..]).unwrap_or(0);
            done += got;
            drop_front(&mut ranges, got as u64);
            if got == 0 && !ranges.is_empty() {
                // The page at the front may not be read by its owner (PROT_NONE): one range the other way.
                let first = ranges.remove(0);
                let len = (first.end - first.start) as usize;
                self.read_protected(&[first], &mut buffer[done..done + len])?;
                done += len;
            } else if ranges.is_empty() && done < buffer.len() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "fewer pages than were found"));
            }
        }
        Ok(())
    }
}

/// Takes `bytes` off the front of `ranges`.
fn drop_front(ranges: &mut Vec<Range<u64>>, mut bytes: u64) {
    let mut gone = 0;
    for range in ranges.iter_mut() {
        let len = range.end - range.start;
        if bytes < len {
            range.start += bytes;
            break;
        }
        bytes -= len;
        gone += 1;
    }
    ranges.drain(..gone);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::Content;

    #[test]
    fn image_offsets_map_to_addresses() {
        let runs = PageRuns::new(vec![0x1000..0x3000, 0x8000..0x9000, 0xa000..0xc000]);
        assert_eq!(runs.bytes(), 0x5000);
        assert_eq!(runs.ranges(0, 0x5000), [0x1000..0x3000, 0x8000..0x9000, 0xa000..0xc000]);
        assert_eq!(runs.ranges(0x1800, 0x1000), [0x2800..0x3000, 0x8000..0x8800]);
        assert_eq!(runs.ranges(0x2000, 0x1000), [0x8000..0x9000]);
        assert_eq!(runs.ranges(0x4fff, 1), [0xbfff..0xc000]);
    }

    #[test]
    fn fronts_are_dropped_across_ranges() {
        let mut ranges = vec![0..10, 20..30, 40..50];
        drop_front(&mut ranges, 15);
        assert_eq!(ranges, [25..30, 40..50]);
        drop_front(&mut ranges, 15);
        assert!(ranges.is_empty());
    }

    #[test]
    fn reads_pages_that_their_owner_may_not() {
        let len = 3 * PAGE_SIZE as usize;
        // SAFETY: a fresh private mapping, used only through the kernel below and unmapped at the end.
        #[allow(unsafe_code)]
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            std::ptr::write_bytes(at.cast::<u8>(), 7, len);
            libc::mprotect(at.wrapping_byte_add(PAGE_SIZE as usize), PAGE_SIZE as usize, libc::PROT_NONE);
            at as u64
        };
        let me = HostPid(std::process::id() as i32);
        let runs = PageRuns::new(std::iter::once(start..start + len as u64).collect());
        let mut buffer = vec![0; len];
        ProcessPages::open(me, &runs).expect("mem").read_at(0, &mut buffer).expect("readable");
        assert!(buffer.iter().all(|byte| *byte == 7));
        // SAFETY: unmaps the mapping made above.
        #[allow(unsafe_code)]
        unsafe {
            libc::munmap(start as *mut _, len)
        };
    }
}
