//! Which pages of a task an image set holds, and where in the pages image.

use std::ops::Range;

use crate::images::pagemap::{PagemapEntry, page_flags};
use crate::sys::PAGE_SIZE;

use super::layout::{ADDRESS_END, subtract};

/// Pages that follow one another in the task and in the pages image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Addresses in the task.
    pub range: Range<u64>,
    /// Where the first byte is in the pages image.
    pub offset: u64,
}

/// All runs of one pagemap image, ascending and apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    /// The runs.
    pub runs: Vec<PageRun>,
    /// Pages that the images say to be with the page server of their dump, ascending and apart from the runs.
    pub elsewhere: Vec<Range<u64>>,
}

/// The pagemap of one image set of a chain.
#[derive(Clone, Copy)]
pub struct Level<'a> {
    /// What it lists.
    pub entries: &'a [PagemapEntry],
    /// Where its pages image begins in the bytes that runs refer to.
    pub start: u64,
    /// Bytes of its pages image.
    pub available: u64,
}

/// Where pages are.
#[derive(Clone, Copy)]
enum Place {
    Here(u64),
    Zeros,
    /// Left with the page server of a dump.
    Elsewhere,
    /// In a parent that lacks them. No damage unless somebody asks for them.
    Missing,
}

struct Part {
    range: Range<u64>,
    place: Place,
}

impl Level<'_> {
    /// What the level lists, ascending and apart; `below` is what its parent does.
    fn parts(&self, below: &[Part]) -> Result<Vec<Part>, String> {
        let mut parts = Vec::with_capacity(self.entries.len());
        let (mut used, mut end) = (0u64, 0u64);
        for entry in self.entries {
            let (start, kind) = (entry.vaddr, entry.kind());
            let length = entry.pages().checked_mul(PAGE_SIZE).filter(|length| *length <= ADDRESS_END);
            let Some(range) = length.map(|length| start..start.saturating_add(length)) else {
                return Err(format!("the run of pages at {start:x} is longer than memory: the image is damaged"));
            };
            if !start.is_multiple_of(PAGE_SIZE) || range.start < end || range.end > ADDRESS_END {
                return Err(format!("the run of pages at {start:x} is out of place: the image is damaged"));
            }
            end = range.end;
            if kind & page_flags::PARENT != 0 {
                look_up(range, below, &mut parts);
            } else if kind & page_flags::PRESENT != 0 {
                let offset = used;
                used += range.end - range.start;
                if used > self.available {
                    return Err(format!("the pages image ends before the pages at {start:x}: it is truncated"));
                }
                parts.push(Part { range, place: Place::Here(self.start + offset) });
            } else if kind & page_flags::LAZY != 0 {
                parts.push(Part { range, place: Place::Elsewhere });
            } else {
                parts.push(Part { range, place: Place::Zeros });
            }
        }
        Ok(parts)
    }
}

/// Appends what `below` lists of `range`; what it does not is missing.
fn look_up(range: Range<u64>, below: &[Part], parts: &mut Vec<Part>) {
    let mut at = range.start;
    let first = below.partition_point(|part| part.range.end <= range.start);
    for part in below[first..].iter().take_while(|part| part.range.start < range.end) {
        let start = part.range.start.max(range.start);
        let end = part.range.end.min(range.end);
        if at < start {
            parts.push(Part { range: at..start, place: Place::Missing });
        }
        let place = match part.place {
            Place::Here(offset) => Place::Here(offset + (start - part.range.start)),
            // The page server of a parent's dump has gone with that.
            Place::Elsewhere => Place::Missing,
            other => other,
        };
        parts.push(Part { range: start..end, place });
        at = end;
    }
    if at < range.end {
        parts.push(Part { range: at..range.end, place: Place::Missing });
    }
}

impl PageSet {
    /// Finds the runs that the newest pagemap lists: `levels` are the image sets of a chain, each before its parent. Pages that
    /// it says to be in its parent are looked up there, and further down where the parent says so too.
    ///
    /// # Errors
    /// A sentence about what is damaged, missing, or needs more than these sets.
    pub fn decode(levels: &[Level<'_>]) -> Result<Self, String> {
        let mut below: Vec<Part> = Vec::new();
        for level in levels.iter().rev() {
            below = level.parts(&below)?;
        }
        let mut set = Self::default();
        for Part { range, place } in below {
            match place {
                Place::Here(offset) => set.push(PageRun { range, offset }),
                Place::Zeros => {}
                Place::Elsewhere => set.elsewhere.push(range),
                Place::Missing => {
                    let first = range.start;
                    return Err(format!("the pages at {first:x} should be in the parent images, which lack them"));
                }
            }
        }
        Ok(set)
    }

    /// Appends a run.
    fn push(&mut self, run: PageRun) {
        match self.runs.last_mut() {
            Some(last)
                if last.range.end == run.range.start
                    && last.offset + (last.range.end - last.range.start) == run.offset =>
            {
                last.range.end = run.range.end;
            }
            _ => self.runs.push(run),
        }
    }

    /// Takes `ranges`, ascending, out.
    pub fn leave_out(&mut self, ranges: &[Range<u64>]) {
        let runs = std::mem::take(&mut self.runs);
        for run in runs {
            for range in subtract(run.range.clone(), ranges) {
                let offset = run.offset + (range.start - run.range.start);
                self.runs.push(PageRun { range, offset });
            }
        }
    }

    /// The parts of runs that lie in `range`.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = PageRun> + '_ {
        let first = self.runs.partition_point(|run| run.range.end <= range.start);
        self.runs[first..].iter().take_while(move |run| run.range.start < range.end).map(move |run| {
            let start = run.range.start.max(range.start);
            let offset = run.offset + (start - run.range.start);
            PageRun { range: start..run.range.end.min(range.end), offset }
        })
    }

    /// Number of bytes of all runs.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.range.end - run.range.start).sum()
    }

    /// First address past the last run.
    pub fn end(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.range.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn present(at: u64, pages: u64) -> PagemapEntry {
        PagemapEntry::new(at, pages, page_flags::PRESENT)
    }

    fn in_parent(at: u64, pages: u64) -> PagemapEntry {
        PagemapEntry::new(at, pages, page_flags::PARENT)
    }

    fn run(range: Range<u64>, offset: u64) -> PageRun {
        PageRun { range, offset }
    }

    fn level(entries: &[PagemapEntry], start: u64, pages: u64) -> Level<'_> {
        Level { entries, start, available: pages * PAGE_SIZE }
    }

    #[test]
    fn runs_are_joined_and_placed() {
        let entries = [present(0x1000, 2), present(0x3000, 1), PagemapEntry::new(0x8000, 4, 0), present(0xc000, 1)];
        let set = PageSet::decode(&[level(&entries, 0, 4)]).unwrap();
        assert_eq!(set.runs, [run(0x1000..0x4000, 0), run(0xc000..0xd000, 0x3000)]);
        assert_eq!(
            set.within(0x2000..0xd000).collect::<Vec<_>>(),
            [run(0x2000..0x4000, 0x1000), run(0xc000..0xd000, 0x3000)]
        );
        assert_eq!((set.bytes(), set.end()), (4 * PAGE_SIZE, 0xd000));
    }

    #[test]
    fn pages_in_parents_are_found_however_deep() {
        let newest = [in_parent(0x1000, 3), present(0x4000, 1), in_parent(0x8000, 2)];
        let middle = [present(0x1000, 1), in_parent(0x2000, 2), present(0x4000, 1), PagemapEntry::new(0x8000, 9, 0)];
        // The deepest was made with a parent too; nobody asks for what it had of that.
        let deepest = [in_parent(0, 1), present(0x1000, 4), in_parent(0x6000, 1)];
        let chain = [level(&newest, 0, 1), level(&middle, 0x10_0000, 2), level(&deepest, 0x20_0000, 4)];
        let set = PageSet::decode(&chain).unwrap();
        let found = [run(0x1000..0x2000, 0x10_0000), run(0x2000..0x4000, 0x20_1000), run(0x4000..0x5000, 0)];
        assert_eq!(set.runs, found);
        for (length, missing) in [(1, "1000"), (2, "2000")] {
            let problem = PageSet::decode(&chain[..length]).unwrap_err();
            assert!(problem.contains(&format!("at {missing} should be in the parent")), "{problem}");
        }
    }

    #[test]
    fn pages_with_a_page_server_are_elsewhere() {
        let entries = [present(0x1000, 1), PagemapEntry::new(0x2000, 2, page_flags::LAZY), present(0x4000, 1)];
        let mut set = PageSet::decode(&[level(&entries, 0, 2)]).unwrap();
        assert_eq!(set.elsewhere, [0x2000..0x4000]);
        assert_eq!(set.runs, [run(0x1000..0x2000, 0), run(0x4000..0x5000, 0x1000)]);
        let asked = [in_parent(0x2000, 1)];
        assert!(PageSet::decode(&[level(&asked, 0, 0), level(&entries, 0, 2)]).is_err(), "not those of a parent");
        set.leave_out(&[0..0x1800, 0x4000..0x5000]);
        assert_eq!(set.runs, [run(0x1800..0x2000, 0x800)]);
    }

    #[test]
    fn damage_is_an_error() {
        for bad in [
            vec![present(0x1001, 1)],
            vec![present(0x1000, 3)],
            vec![present(0x1000, u64::MAX)],
            vec![present(0x2000, 1), present(0x1000, 1)],
            vec![in_parent(0x1000, 1)],
            vec![in_parent(0x1000, u64::MAX / PAGE_SIZE)],
            vec![present(u64::MAX - 0xfff, 1)],
        ] {
            assert!(PageSet::decode(&[level(&bad, 0, 2)]).is_err(), "{bad:?}");
            let asked = [in_parent(0x1000, 1)];
            assert!(PageSet::decode(&[level(&asked, 0, 0), level(&bad, 0, 2)]).is_err(), "{bad:?} in a parent");
        }
    }
}
