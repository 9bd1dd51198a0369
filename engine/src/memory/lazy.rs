//! Which memory may come after a task runs again: what CRIU 4.2 takes for that too, so that either restores the other's images so.
//!
//! Private anonymous memory of ordinary pages that is not locked, but for the pages that threads have their stacks at: those are
//! touched at once.

use std::ops::Range;

use super::layout::{Backing, Mapping, subtract};
use super::pages::PageRuns;
use super::parent::common;
use crate::images::core::CoreEntry;
use crate::images::mm::{MmEntry, VmaEntry, vma_status};
use crate::images::pagemap::{PagemapEntry, page_flags};
use crate::sys::PAGE_SIZE;

impl Mapping {
    /// Whether its pages may come later.
    pub fn can_be_lazy(&self) -> bool {
        self.backing == Backing::Anonymous && !self.locked && self.flags & libc::MAP_HUGETLB as u32 == 0
    }
}

fn can_be_lazy(vma: &VmaEntry) -> bool {
    const WANTED: u32 = (libc::MAP_ANONYMOUS | libc::MAP_PRIVATE) as u32;
    const OTHERS: u32 = (libc::MAP_LOCKED | libc::MAP_HUGETLB) as u32;
    let kernels = vma_status::VDSO | vma_status::VVAR | vma_status::VSYSCALL | vma_status::GUARD;
    vma.flags & (WANTED | OTHERS) == WANTED && vma.status & kernels == 0
}

/// The ranges of an address space whose pages may come later; `cores` are those of its threads.
pub fn ranges<'a>(mm: &MmEntry, cores: impl IntoIterator<Item = &'a CoreEntry>) -> Vec<Range<u64>> {
    let stack = |core: &CoreEntry| Some(core.thread_info.as_ref()?.gpregs.sp & !(PAGE_SIZE - 1));
    let mut stacks: Vec<Range<u64>> =
        cores.into_iter().filter_map(stack).map(|page| page..page.saturating_add(PAGE_SIZE)).collect();
    stacks.sort_by_key(|page| page.start);
    stacks.dedup();
    let mappings = mm.vmas.iter().filter(|vma| can_be_lazy(vma)).map(|vma| vma.start..vma.end);
    mappings.flat_map(|range| subtract(range, &stacks)).collect()
}

/// The entries of a pagemap image with `present` pages, of which those in `lazy` may come later, and with pages that are in the parent.
pub fn entries(present: &[Range<u64>], in_parent: &[Range<u64>], lazy: &[Range<u64>]) -> Vec<PagemapEntry> {
    let entry = |flags| move |run: &Range<u64>| PagemapEntry::new(run.start, (run.end - run.start) / PAGE_SIZE, flags);
    let later = common(present, lazy);
    let at_once: Vec<Range<u64>> = present.iter().flat_map(|run| subtract(run.clone(), &later)).collect();
    let mut entries: Vec<PagemapEntry> = PagemapEntry::of_runs(&at_once, in_parent);
    entries.extend(later.iter().map(entry(page_flags::PRESENT | page_flags::LAZY)));
    entries.sort_by_key(|entry| entry.vaddr);
    entries
}

/// The pages of a process, parted into those that are written to its images and those that come later.
pub struct Parted {
    /// At once.
    pub written: PageRuns,
    /// Later.
    pub later: PageRuns,
}

impl Parted {
    /// Parts `runs`.
    pub fn of(runs: &PageRuns, lazy: &[Range<u64>]) -> Self {
        let (mut written, mut later) = (runs.clone(), runs.clone());
        written.leave_out(lazy);
        later.leave_out(written.runs());
        Self { written, later }
    }

    /// The entries of the pagemap image.
    pub fn entries(&self, in_parent: &[Range<u64>]) -> Vec<PagemapEntry> {
        let mut entries = PagemapEntry::of_runs(self.written.runs(), in_parent);
        let entry =
            |run: &Range<u64>| PagemapEntry::new(run.start, (run.end - run.start) / PAGE_SIZE, page_flags::LAZY);
        entries.extend(self.later.runs().iter().map(entry));
        entries.sort_by_key(|entry| entry.vaddr);
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(entries: &[PagemapEntry]) -> Vec<(u64, u64, u32)> {
        entries.iter().map(|entry| (entry.vaddr, entry.pages(), entry.kind())).collect()
    }

    #[test]
    fn pages_are_parted_by_whether_they_may_come_later() {
        let runs = PageRuns::of(vec![0x1000..0x9000, 0xa000..0xc000]);
        let lazy = [0x2000..0x5000, 0xb000..0xf000];
        let whole = entries(runs.runs(), &[0x9000..0xa000], &lazy);
        let expected = [(0x1000, 1, 4), (0x2000, 3, 6), (0x5000, 4, 4), (0x9000, 1, 1), (0xa000, 1, 4), (0xb000, 1, 6)];
        assert_eq!(kinds(&whole), expected);
        let parted = Parted::of(&runs, &lazy);
        assert_eq!(parted.later.runs(), [0x2000..0x5000, 0xb000..0xc000]);
        assert_eq!(parted.written.runs(), [0x1000..0x2000, 0x5000..0x9000, 0xa000..0xb000]);
        let expected = expected.map(|(at, count, kind)| (at, count, if kind == 6 { 2 } else { kind }));
        assert_eq!(kinds(&parted.entries(&[0x9000..0xa000])), expected);
    }

    #[test]
    fn locked_and_huge_memory_and_stack_pages_come_at_once() {
        let private = (libc::MAP_ANONYMOUS | libc::MAP_PRIVATE) as u32;
        let vma = |start: u64, flags: i32, status: u32| VmaEntry {
            start,
            end: start + 0x4000,
            flags: private | flags as u32,
            status,
            ..VmaEntry::default()
        };
        let regular = vma_status::REGULAR | vma_status::ANON_PRIVATE;
        let mut file = vma(0x5_0000, 0, vma_status::REGULAR | vma_status::FILE_PRIVATE);
        file.flags = libc::MAP_PRIVATE as u32;
        let vmas = vec![
            vma(0x1_0000, 0, regular),
            vma(0x2_0000, libc::MAP_LOCKED, regular),
            vma(0x3_0000, libc::MAP_HUGETLB, regular),
            vma(0x4_0000, 0, regular | vma_status::VDSO),
            file,
        ];
        let mm = MmEntry { vmas, ..MmEntry::default() };
        let mut core = CoreEntry::default();
        let mut info = crate::images::core_x86::ThreadInfoX86::default();
        info.gpregs.sp = 0x1_2345;
        core.thread_info = Some(info);
        assert_eq!(ranges(&mm, [&core]), [0x1_0000..0x1_2000, 0x1_3000..0x1_4000]);
    }
}
