//! Which pages an address space still misses, and where in the images each of them is.
//!
//! A page's address changes with mremap(2); its address in the images does not.

use std::collections::BTreeMap;
use std::ops::Range;

/// A run of missing pages, keyed by where it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gap {
    end: u64,
    /// The address that the first page had in the images.
    image: u64,
    /// Whether a child sees zeros instead (`MADV_WIPEONFORK`).
    wiped: bool,
}

/// The missing pages of an address space, as runs that are apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    gaps: BTreeMap<u64, Gap>,
}

/// Part of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where the pages are missing.
    pub range: Range<u64>,
    /// The address that the first of them has in the images.
    pub image: u64,
}

impl Missing {
    /// Adds a run that no other overlaps, under its address in the images.
    pub fn add(&mut self, range: Range<u64>, wiped: bool) {
        if !range.is_empty() {
            self.gaps.insert(range.start, Gap { end: range.end, image: range.start, wiped });
        }
    }

    /// Whether nothing is missing.
    pub fn is_empty(&self) -> bool {
        self.gaps.is_empty()
    }

    /// How many bytes are missing.
    pub fn bytes(&self) -> u64 {
        self.gaps.iter().map(|(start, gap)| gap.end - start).sum()
    }

    /// The run from `page` on, if it is missing.
    pub fn at(&self, page: u64) -> Option<Found> {
        let (start, gap) = self.gaps.range(..=page).next_back()?;
        (page < gap.end).then(|| Found { range: page..gap.end, image: gap.image + (page - start) })
    }

    /// The first run at or after `page`, or the first of all.
    pub fn next(&self, page: u64) -> Option<Found> {
        self.at(page).or_else(|| {
            let (start, gap) = self.gaps.range(page..).next().or_else(|| self.gaps.iter().next())?;
            Some(Found { range: *start..gap.end, image: gap.image })
        })
    }

    /// Cuts the run that `address` is within, so that one starts there.
    fn cut(&mut self, address: u64) {
        let Some((start, gap)) = self.gaps.range_mut(..address).next_back() else { return };
        if address < gap.end {
            let tail = Gap { image: gap.image + (address - start), ..*gap };
            gap.end = address;
            self.gaps.insert(address, tail);
        }
    }

    fn take(&mut self, range: &Range<u64>) -> Vec<(u64, Gap)> {
        if range.is_empty() {
            return Vec::new();
        }
        self.cut(range.start);
        self.cut(range.end);
        let starts: Vec<u64> = self.gaps.range(range.clone()).map(|(start, _)| *start).collect();
        starts.into_iter().filter_map(|start| Some((start, self.gaps.remove(&start)?))).collect()
    }

    /// The pages of `range` are not missing any more.
    pub fn remove(&mut self, range: &Range<u64>) {
        drop(self.take(range));
    }

    /// What is missing of `length` bytes at `from` is missing at `to` instead.
    pub fn move_range(&mut self, from: u64, to: u64, length: u64) {
        let moved = self.take(&(from..from.saturating_add(length)));
        self.remove(&(to..to.saturating_add(length)));
        for (start, gap) in moved {
            let (start, end) = (start - from + to, gap.end - from + to);
            self.gaps.insert(start, Gap { end, ..gap });
        }
    }

    /// What a child misses.
    pub fn of_child(&self) -> Self {
        Self { gaps: self.gaps.iter().filter(|(_, gap)| !gap.wiped).map(|(start, gap)| (*start, *gap)).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(missing: &Missing) -> Vec<(u64, u64, u64)> {
        missing.gaps.iter().map(|(start, gap)| (*start, gap.end, gap.image)).collect()
    }

    fn some() -> Missing {
        let mut missing = Missing::default();
        missing.add(0x1000..0x9000, false);
        missing.add(0xc000..0xe000, true);
        missing
    }

    #[test]
    fn pages_are_found_with_their_place_in_the_images() {
        let missing = some();
        assert_eq!(missing.at(0x3000), Some(Found { range: 0x3000..0x9000, image: 0x3000 }));
        assert_eq!((missing.at(0), missing.at(0x9000)), (None, None));
        assert_eq!(missing.next(0x9000).map(|found| found.range), Some(0xc000..0xe000));
        assert_eq!(missing.next(0xd000).map(|found| found.range), Some(0xd000..0xe000));
        assert_eq!(missing.next(0xe000).map(|found| found.range), Some(0x1000..0x9000), "from the start again");
        assert_eq!(missing.bytes(), 0xa000);
    }

    #[test]
    fn ranges_go_whole_or_in_part() {
        let mut missing = some();
        missing.remove(&(0x3000..0x4000));
        assert_eq!(runs(&missing), [(0x1000, 0x3000, 0x1000), (0x4000, 0x9000, 0x4000), (0xc000, 0xe000, 0xc000)]);
        missing.remove(&(0x2000..0xd000));
        assert_eq!(runs(&missing), [(0x1000, 0x2000, 0x1000), (0xd000, 0xe000, 0xd000)]);
        missing.remove(&(0..u64::MAX));
        assert!(missing.is_empty());
    }

    #[test]
    fn moved_pages_keep_their_place_in_the_images() {
        let mut missing = some();
        missing.move_range(0x2000, 0x10_0000, 0x2000);
        assert_eq!(missing.at(0x10_1000), Some(Found { range: 0x10_1000..0x10_2000, image: 0x3000 }));
        assert_eq!(missing.at(0x2000), None);
        // Onto others, over a gap, and by less than its length.
        missing.move_range(0x4000, 0xc000, 0x1000);
        assert_eq!(missing.at(0xc000), Some(Found { range: 0xc000..0xd000, image: 0x4000 }));
        assert_eq!(missing.at(0xd000), Some(Found { range: 0xd000..0xe000, image: 0xd000 }));
        missing.move_range(0x10_0000, 0x10_1000, 0x2000);
        assert_eq!(missing.at(0x10_1000).map(|found| found.image), Some(0x2000));
        assert_eq!(missing.at(0x10_2000).map(|found| found.image), Some(0x3000));
        assert_eq!(missing.at(0x10_0000), None);
    }

    #[test]
    fn a_child_does_not_miss_what_is_wiped() {
        assert_eq!(runs(&some().of_child()), [(0x1000, 0x9000, 0x1000)]);
    }
}
