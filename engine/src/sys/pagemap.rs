//! `PAGEMAP_SCAN` (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst): which pages a task has, as ranges.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::{HostPid, PAGE_SIZE, check};

/// The page lies in a mapping whose writes are tracked: registered for asynchronous write-protection (Linux 6.7).
pub const WRITES_TRACKED: u64 = 1;
/// The page is written since the last write-protecting scan.
pub const WRITTEN: u64 = 1 << 1;
/// The page belongs to a file or to shared memory.
pub const FILE: u64 = 1 << 2;
/// The page is in memory.
pub const PRESENT: u64 = 1 << 3;
/// The page is swapped out.
pub const SWAPPED: u64 = 1 << 4;
/// The page is the shared page of zeros.
pub const PFNZERO: u64 = 1 << 5;
/// The page is mapped by a huge entry.
pub const HUGE: u64 = 1 << 6;

/// In a page's word: no other mapping of the page exists, in no task.
pub const WORD_EXCLUSIVE: u64 = 1 << 56;
/// In a page's word: the page is in memory.
pub const WORD_PRESENT: u64 = 1 << 63;

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const REGIONS_AT_ONCE: usize = 1024;
/// `PM_SCAN_WP_MATCHING`: pages that are found are write-protected.
const PROTECT: u64 = 1;

/// A range of pages of the same categories.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageRegion {
    /// First byte.
    pub start: u64,
    /// First byte past the range.
    pub end: u64,
    /// The categories, of those asked for, that hold for every page.
    pub categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Which pages a scan reports.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Categories that must all hold, after inversion.
    pub all_of: u64,
    /// Of these, which must be absent instead.
    pub inverted: u64,
    /// Categories of which at least one must hold.
    pub any_of: u64,
    /// Categories to report.
    pub report: u64,
}

/// An open `/proc/PID/pagemap`.
pub struct Pagemap(File);

impl Pagemap {
    /// Opens the page map of `pid`.
    pub fn open(pid: HostPid) -> std::io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// The words of the pages of `range`, one for each (Documentation/admin-guide/mm/pagemap.rst).
    pub fn words(&self, range: Range<u64>) -> std::io::Result<Vec<u64>> {
        let mut bytes = vec![0; ((range.end - range.start) / PAGE_SIZE) as usize * 8];
        self.0.read_exact_at(&mut bytes, range.start / PAGE_SIZE * 8)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect())
    }

    /// Has the kernel notice from now on which pages of `range` are written, as far as they are in memory or swapped out and lie in
    /// mappings whose writes are tracked.
    pub fn watch_writes(&self, range: Range<u64>) -> nix::Result<()> {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: PROTECT,
            start: range.start,
            end: range.end,
            category_mask: WRITES_TRACKED,
            category_anyof_mask: PRESENT | SWAPPED,
            ..ScanArgument::default()
        };
        // SAFETY: the argument has the size it says, and asks for no answer beyond it.
        check(i64::from(unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) })).map(drop)
    }

    /// Appends to `regions` the wanted pages of `range`, in address order.
    pub fn scan(&self, range: Range<u64>, wanted: Wanted, regions: &mut Vec<PageRegion>) -> nix::Result<()> {
        let mut block = [PageRegion::default(); REGIONS_AT_ONCE];
        let mut start = range.start;
        while start < range.end {
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                start,
                end: range.end,
                vec: block.as_mut_ptr() as u64,
                vec_len: block.len() as u64,
                category_inverted: wanted.inverted,
                category_mask: wanted.all_of,
                category_anyof_mask: wanted.any_of,
                return_mask: wanted.report,
                ..ScanArgument::default()
            };
            // SAFETY: the argument has the size it says, and `vec` covers `block`, which outlives the call.
            let found =
                check(i64::from(unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) }))? as usize;
            regions.extend_from_slice(&block[..found]);
            // `walk_end` is that of an earlier stop when the kernel, which gathers 512 regions at a time, has come to the end
            // of the range after more than that (seen on Linux 6.18).
            start = if found < block.len() { range.end } else { block[found - 1].end };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::shared::SharedMemory;

    #[test]
    fn each_page_is_found_once_however_many_regions_there_are() {
        for regions in [1, 511, 512, 513, 700, 1023, 1024, 1025, 3000] {
            let memory = SharedMemory::anonymous(2 * regions * PAGE_SIZE as usize, 0).unwrap();
            let start = memory.local_base() as u64;
            for index in 0..regions {
                memory.write(2 * index * PAGE_SIZE as usize, &[1]);
            }
            let mut found = Vec::new();
            let wanted = Wanted { all_of: PRESENT, report: PRESENT, ..Wanted::default() };
            let map = Pagemap::open(HostPid(std::process::id() as i32)).unwrap();
            map.scan(start..start + memory.len() as u64, wanted, &mut found).unwrap();
            let expected: Vec<u64> = (0..regions as u64).map(|index| start + 2 * index * PAGE_SIZE).collect();
            assert_eq!(found.iter().map(|region| region.start).collect::<Vec<_>>(), expected, "{regions} regions");
        }
    }
}
