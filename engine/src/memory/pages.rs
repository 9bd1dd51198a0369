//! The private pages of a process: which there are, and their contents as one image.
//!
//! `PAGEMAP_SCAN` walks the whole address space in one call. Saved are pages that are in memory or swapped out and
//! neither belong to a file nor are the shared page of zeros: they are what reading the mapping anew would not show.
//!
//! Reading must change nothing. process_vm_readv(2) pins what it reads, and since Linux 5.19 the kernel gives a task its own copy of
//! an anonymous page before it is pinned (mm/gup.c, gup_must_unshare): what fork left shared would be doubled, in the middle of a
//! dump, at the cost of the container's memory limit. Pages that another task maps too are read through `/proc/PID/mem`, which
//! does not pin.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::memory::mappings::{Kind, Mapping};
use crate::memory::parent::without;
use crate::sys::pagemap::{FILE, PFNZERO, PRESENT, PageRegion, Pagemap, SWAPPED, WORD_EXCLUSIVE, WORD_PRESENT, Wanted};
use crate::sys::{HostPid, PAGE_SIZE, process_vm};

/// Runs of pages of one process, in address order, and where each lies in the pages image.
#[derive(Clone, Debug, Default)]
pub struct PageRuns {
    runs: Vec<Range<u64>>,
    /// Offset in the image of each run, and at last the image's length.
    offsets: Vec<u64>,
    /// Which pages of the runs other tasks map too, in address order.
    shared: Vec<Range<u64>>,
}

impl PageRuns {
    /// Finds the pages to save of a stopped process.
    ///
    /// # Errors
    /// Those of opening and scanning the page map.
    pub fn collect(pid: HostPid, mappings: &[Mapping]) -> io::Result<Self> {
        let found = Self::find(pid, mappings)?;
        let mut runs = found.runs;
        // The vdso belongs to the kernel, but whoever restores compares it with its own.
        runs.extend(mappings.iter().filter(|mapping| mapping.kind == Kind::Vdso).map(|vdso| vdso.range.clone()));
        runs.sort_by_key(|run| run.start);
        Ok(Self::of(runs))
    }

    /// The same without the vdso's.
    ///
    /// # Errors
    /// As [`Self::collect`].
    pub fn find(pid: HostPid, mappings: &[Mapping]) -> io::Result<Self> {
        let wanted =
            Wanted { all_of: FILE | PFNZERO, inverted: FILE | PFNZERO, any_of: PRESENT | SWAPPED, report: PRESENT };
        let mut regions = Vec::new();
        let end = mappings.iter().rev().find(|mapping| mapping.kind != Kind::Vsyscall).map_or(0, |last| last.range.end);
        Pagemap::open(pid)?.scan(0..end, wanted, &mut regions)?;
        Ok(Self::of(Self::intersect(&regions, mappings)))
    }

    /// Finds out which of the pages other tasks map too, so that they are read without harm.
    ///
    /// # Errors
    /// Those of reading the page map.
    pub fn find_shared(&mut self, pid: HostPid) -> io::Result<()> {
        let pagemap = Pagemap::open(pid)?;
        self.shared.clear();
        for run in &self.runs {
            for (page, word) in (run.start..).step_by(PAGE_SIZE as usize).zip(pagemap.words(run.clone())?) {
                if word & (WORD_PRESENT | WORD_EXCLUSIVE) != WORD_PRESENT {
                    continue;
                }
                match self.shared.last_mut() {
                    Some(last) if last.end == page => last.end += PAGE_SIZE,
                    _ => self.shared.push(page..page + PAGE_SIZE),
                }
            }
        }
        Ok(())
    }

    /// Runs in address order, of pages that no other task maps.
    pub fn of(runs: Vec<Range<u64>>) -> Self {
        let mut offsets = Vec::with_capacity(runs.len() + 1);
        let mut offset = 0;
        for run in &runs {
            offsets.push(offset);
            offset += run.end - run.start;
        }
        offsets.push(offset);
        Self { runs, offsets, shared: Vec::new() }
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

    /// Takes `ranges`, ascending, out: they are not to be saved.
    pub fn leave_out(&mut self, ranges: &[Range<u64>]) {
        let left = Self::of(without(&self.runs, ranges));
        (self.runs, self.offsets) = (left.runs, left.offsets);
    }

    /// The runs, in address order.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// How many bytes the pages take.
    pub fn bytes(&self) -> u64 {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    /// Where in the image the pages at the front of `range` are, and how many bytes of it follow there.
    pub fn place(&self, range: &Range<u64>) -> Option<(u64, u64)> {
        let index = self.runs.partition_point(|run| run.end <= range.start);
        let run = self.runs.get(index).filter(|run| run.contains(&range.start))?;
        Some((self.offsets[index] + (range.start - run.start), run.end.min(range.end) - range.start))
    }

    /// The address ranges behind `len` bytes of the image from `offset`.
    pub fn ranges(&self, offset: u64, len: u64) -> Vec<Range<u64>> {
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

    /// The same ranges, cut where pages that other tasks map begin and end, with whether each is such pages.
    fn cut_by_sharing(&self, ranges: &[Range<u64>]) -> Vec<(Range<u64>, bool)> {
        let mut parts = Vec::with_capacity(ranges.len());
        for range in ranges {
            let mut start = range.start;
            let mut next = self.shared.partition_point(|shared| shared.end <= start);
            while start < range.end {
                let shared = self.shared.get(next).filter(|shared| shared.start < range.end);
                let (end, is_shared) = match shared {
                    Some(shared) if shared.start <= start => (shared.end.min(range.end), true),
                    Some(shared) => (shared.start, false),
                    None => (range.end, false),
                };
                parts.push((start..end, is_shared));
                next += usize::from(is_shared);
                start = end;
            }
        }
        parts
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

    /// Reads ranges that no other task maps: without a detour, but for pages that their owner may not read.
    fn read_own(&self, mut ranges: Vec<Range<u64>>, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let got = process_vm::read(self.pid, &ranges, &mut buffer[done..]).unwrap_or(0);
            done += got;
            drop_front(&mut ranges, got as u64);
            if got == 0 && !ranges.is_empty() {
                // The page at the front may not be read by its owner (PROT_NONE): one range the other way.
                let first = ranges.remove(0);
                let len = (first.end - first.start) as usize;
                self.read_unpinned(&[first], &mut buffer[done..done + len])?;
                done += len;
            } else if ranges.is_empty() && done < buffer.len() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "fewer pages than were found"));
            }
        }
        Ok(())
    }

    /// Reads ranges through `/proc/PID/mem`, which ignores protections and pins nothing, until `ranges` or the buffer end.
    fn read_unpinned(&self, ranges: &[Range<u64>], mut buffer: &mut [u8]) -> io::Result<()> {
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
        let ranges = self.runs.ranges(offset, buffer.len() as u64);
        let (mut own, mut own_bytes, mut rest) = (Vec::new(), 0, buffer);
        for (range, shared) in self.runs.cut_by_sharing(&ranges) {
            let bytes = (range.end - range.start) as usize;
            if !shared {
                own.push(range);
                own_bytes += bytes;
                continue;
            }
            let (before, after) = rest.split_at_mut(std::mem::take(&mut own_bytes));
            self.read_own(std::mem::take(&mut own), before)?;
            let (here, after) = after.split_at_mut(bytes);
            self.read_unpinned(&[range], here)?;
            rest = after;
        }
        self.read_own(own, rest)
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
        let runs = PageRuns::of(vec![0x1000..0x3000, 0x8000..0x9000, 0xa000..0xc000]);
        assert_eq!(runs.bytes(), 0x5000);
        assert_eq!(runs.ranges(0, 0x5000), [0x1000..0x3000, 0x8000..0x9000, 0xa000..0xc000]);
        assert_eq!(runs.ranges(0x1800, 0x1000), [0x2800..0x3000, 0x8000..0x8800]);
        assert_eq!(runs.ranges(0x2000, 0x1000), [0x8000..0x9000]);
        assert_eq!(runs.ranges(0x4fff, 1), [0xbfff..0xc000]);
        assert_eq!(runs.place(&(0x8000..0xa000)), Some((0x2000, 0x1000)));
        assert_eq!((runs.place(&(0xb000..0xc000)), runs.place(&(0x9000..0xc000))), (Some((0x4000, 0x1000)), None));
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
    fn ranges_are_cut_where_sharing_begins_and_ends() {
        let mut runs = PageRuns::of(vec![0x1000..0x9000, 0xa000..0xc000]);
        runs.shared = vec![0x2000..0x3000, 0x5000..0x6000, 0xa000..0xc000];
        let cut = runs.cut_by_sharing(&[0x1800..0x5800, 0x8000..0x9000, 0xb000..0xc000]);
        let want = [
            (0x1800..0x2000, false),
            (0x2000..0x3000, true),
            (0x3000..0x5000, false),
            (0x5000..0x5800, true),
            (0x8000..0x9000, false),
            (0xb000..0xc000, true),
        ];
        assert_eq!(cut, want);
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
        let runs = PageRuns::of(std::iter::once(start..start + len as u64).collect());
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
