//! What a manifest says of pages that were sent to a page server, and are not with the other images.
//!
//! The server numbers its pages images itself, so they are known by the pagemap that names them. The manifest has the runs that
//! this lists, and the digest of the pages in them: once the server's images are beside the others, both are verified. The runs also
//! serve a later dump, which may leave pages to a server's images that it cannot read.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::manifest::ImageDigest;
use super::pagemap::{PagemapEntry, page_flags};
use crate::sys::PAGE_SIZE;

/// The pages of one pagemap image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesElsewhere {
    /// Its runs in order, separated by commas: the number of the first page and how many there are, both hexadecimal and with a plus
    /// between them; a `p` follows where they are in the parent set.
    runs: String,
    /// The pages image.
    #[serde(flatten)]
    pub pages: ImageDigest,
}

impl PagesElsewhere {
    /// What was sent.
    pub fn new(entries: &[PagemapEntry], pages: ImageDigest) -> Self {
        Self { runs: runs_of(entries), pages }
    }

    /// Whether a pagemap lists what was sent.
    pub fn lists(&self, entries: &[PagemapEntry]) -> bool {
        self.runs == runs_of(entries)
    }

    /// Where the pages are that the server's set or its parents have. `None` if that is damaged.
    pub fn ranges(&self) -> Option<Vec<Range<u64>>> {
        let mut ranges = Vec::new();
        let mut last = 0;
        for run in self.runs.split(',').filter(|run| !run.is_empty()) {
            let (first, count) = run.trim_end_matches('p').split_once('+')?;
            let start = u64::from_str_radix(first, 16).ok()?.checked_mul(PAGE_SIZE)?;
            let length = u64::from_str_radix(count, 16).ok()?.checked_mul(PAGE_SIZE)?;
            let end = start.checked_add(length)?;
            if start < last {
                return None;
            }
            ranges.push(start..end);
            last = end;
        }
        Some(ranges)
    }
}

fn runs_of(entries: &[PagemapEntry]) -> String {
    let run = |entry: &PagemapEntry| {
        let parent = if entry.is_in_parent() { "p" } else { "" };
        // Pages that are in neither make no run.
        let there = entry.kind() & (page_flags::PRESENT | page_flags::PARENT) != 0;
        there.then(|| format!("{:x}+{:x}{parent}", entry.vaddr / PAGE_SIZE, entry.pages()))
    };
    entries.iter().filter_map(run).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::super::digest::digest_chunks;
    use super::super::manifest::Digest;
    use super::*;

    #[test]
    fn runs_are_compared_and_read_back() {
        let entries = [
            PagemapEntry::new(0x5000, 2, page_flags::PRESENT | page_flags::LAZY),
            PagemapEntry::new(0x8000, 1, page_flags::PARENT),
        ];
        let pages = ImageDigest { length: 2, digest: Digest::Chunks(digest_chunks(b"ab")) };
        let sent = PagesElsewhere::new(&entries, pages.clone());
        assert!(sent.lists(&entries));
        assert!(!sent.lists(&entries[..1]));
        assert!(!sent.lists(&[entries[0].clone(), PagemapEntry::new(0x8000, 1, page_flags::PRESENT)]));
        assert_eq!(sent.ranges().unwrap(), [0x5000..0x7000, 0x8000..0x9000]);
        let json = serde_json::to_value(&sent).unwrap();
        assert_eq!(json["runs"], "5+2,8+1p");
        assert_eq!(serde_json::from_value::<PagesElsewhere>(json).unwrap(), sent);
        assert_eq!(PagesElsewhere::new(&[], pages.clone()).ranges().unwrap(), []);
        for damaged in ["x+1", "5", "5+2,4+1", "ffffffffffffffff+1", "5+fffffffffffffff"] {
            let sent = PagesElsewhere { runs: damaged.to_owned(), pages: pages.clone() };
            assert_eq!(sent.ranges(), None, "{damaged}");
        }
    }
}
