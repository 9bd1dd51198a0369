//! Which pages of a task an image set holds, and where in the pages image.

use std::ops::Range;

use crate::images::pagemap::{PagemapEntry, page_flags};
use crate::sys::PAGE_SIZE;

use super::layout::ADDRESS_END;

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
}

impl PageSet {
    /// Takes the runs out of a pagemap whose pages image has `available` bytes.
    ///
    /// # Errors
    /// A sentence about what is damaged, or needs more than this set.
    pub fn decode(entries: &[PagemapEntry], available: u64) -> Result<Self, String> {
        let mut set = Self::default();
        let (mut offset, mut end) = (0u64, 0u64);
        for entry in entries {
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
                return Err(format!(
                    "the pages at {start:x} are in a parent image set (incremental dump), which is not supported yet"
                ));
            }
            if kind & page_flags::PRESENT == 0 {
                if kind & page_flags::LAZY != 0 {
                    return Err(format!("the pages at {start:x} are with a page server, which is not supported yet"));
                }
                continue; // zeros
            }
            let after = offset + (range.end - range.start);
            if after > available {
                return Err(format!("the pages image ends before the pages at {start:x}: it is truncated"));
            }
            match set.runs.last_mut() {
                Some(last) if last.range.end == range.start => last.range.end = range.end,
                _ => set.runs.push(PageRun { range, offset }),
            }
            offset = after;
        }
        Ok(set)
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

    #[test]
    fn runs_are_joined_and_placed() {
        let present = |at, pages| PagemapEntry::new(at, pages, page_flags::PRESENT);
        let set = PageSet::decode(
            &[present(0x1000, 2), present(0x3000, 1), PagemapEntry::new(0x8000, 4, 0), present(0xc000, 1)],
            4 * PAGE_SIZE,
        )
        .unwrap();
        let run = |range, offset| PageRun { range, offset };
        assert_eq!(set.runs, [run(0x1000..0x4000, 0), run(0xc000..0xd000, 0x3000)]);
        assert_eq!(
            set.within(0x2000..0xd000).collect::<Vec<_>>(),
            [run(0x2000..0x4000, 0x1000), run(0xc000..0xd000, 0x3000)]
        );
        assert_eq!((set.bytes(), set.end()), (4 * PAGE_SIZE, 0xd000));
    }

    #[test]
    fn damage_is_an_error() {
        let present = |at, pages| PagemapEntry::new(at, pages, page_flags::PRESENT);
        for bad in [
            vec![present(0x1001, 1)],
            vec![present(0x1000, 3)],
            vec![present(0x1000, u64::MAX)],
            vec![present(0x2000, 1), present(0x1000, 1)],
            vec![PagemapEntry::new(0x1000, 1, page_flags::PARENT)],
            vec![PagemapEntry::new(0x1000, 1, page_flags::LAZY)],
            vec![present(u64::MAX - 0xfff, 1)],
        ] {
            assert!(PageSet::decode(&bad, 2 * PAGE_SIZE).is_err(), "{bad:?}");
        }
    }
}
