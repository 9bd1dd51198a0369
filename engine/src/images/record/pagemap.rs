//! `pagemap-PID.img`, `pagemap-shmem-ID.img`: which pages lie in `pages-N.img`.
//!
//! The image is one [`PagemapHead`], then [`PagemapEntry`]s in ascending address order. The contents of the runs
//! that are `PRESENT` follow one another in `pages-N.img` without gaps.

use std::ops::Range;

use crate::sys::PAGE_SIZE;

/// First entry: `pages_id` is the number of the pages image.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PagemapHead {
    #[prost(uint32, required, tag = "1")]
    pub pages_id: u32,
}

/// A run of pages. Read the count through [`PagemapEntry::pages`], the kind through [`PagemapEntry::kind`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    pub vaddr: u64,
    #[prost(uint32, required, tag = "2")]
    pub compat_nr_pages: u32,
    #[prost(bool, optional, tag = "3")]
    pub in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    pub flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pub nr_pages: Option<u64>,
}

/// Bits of [`PagemapEntry::flags`].
pub mod page_flags {
    /// The pages are in the parent set.
    pub const PARENT: u32 = 1 << 0;
    /// The pages may come after the task runs.
    pub const LAZY: u32 = 1 << 1;
    /// The pages are in the pages image.
    pub const PRESENT: u32 = 1 << 2;
}

impl PagemapEntry {
    /// The runs of a pages image, and those that are in the parent set, by address.
    pub fn of_runs(present: &[Range<u64>], in_parent: &[Range<u64>]) -> Vec<Self> {
        let entry = |flags| move |run: &Range<u64>| Self::new(run.start, (run.end - run.start) / PAGE_SIZE, flags);
        let present = present.iter().map(entry(page_flags::PRESENT));
        let mut entries: Vec<Self> = present.chain(in_parent.iter().map(entry(page_flags::PARENT))).collect();
        entries.sort_by_key(|entry| entry.vaddr);
        entries
    }

    /// A run of `pages` pages at `vaddr` with the given [`page_flags`]. The count is written in both of its fields
    /// where it fits, so that CRIU 4.0 and older read it too.
    pub fn new(vaddr: u64, pages: u64, flags: u32) -> Self {
        let compat_nr_pages = u32::try_from(pages).unwrap_or(0);
        Self { vaddr, compat_nr_pages, in_parent: None, flags: Some(flags), nr_pages: Some(pages) }
    }

    /// Whether the pages are in the parent set.
    pub fn is_in_parent(&self) -> bool {
        self.kind() & page_flags::PARENT != 0
    }

    /// Number of pages in the run. Sets older than CRIU 4.1 hold it in a field of 32 bits.
    pub fn pages(&self) -> u64 {
        self.nr_pages.unwrap_or(u64::from(self.compat_nr_pages))
    }

    /// The [`page_flags`] of the run, also where an old set says them otherwise.
    pub fn kind(&self) -> u32 {
        match (self.in_parent, self.flags) {
            (Some(true), flags) => flags.unwrap_or(0) | page_flags::PARENT,
            (_, Some(flags)) => flags,
            (_, None) => page_flags::PRESENT,
        }
    }
}
