//! The memory of earlier images, as an incremental dump uses it: pages that are the same need not be saved again.
//!
//! A page may be left to the parent for one of two reasons: its content was compared, or the kernel vouches that nobody has written
//! to it since the parent was made ([`crate::track`]). The first is always right, whatever process the images were of, and whether or not
//! it ran while they were made.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Mutex;

use crate::images::{Content, ImageName, ImageSet, Kind};
use crate::memory::images::{PageImages, PageImagesError};
use crate::memory::layout::subtract;
use crate::memory::parallel::in_parallel;
use crate::sys::{NsPid, PAGE_SIZE};

/// What one thread compares at a time.
const PIECE: u64 = 512 << 10;

/// All pages of an image set and its parents.
pub struct ParentMemory {
    digest: Option<String>,
    private: HashMap<u64, PageImages>,
    shared: HashMap<u64, PageImages>,
    /// What a page server has of processes, and is not here to be compared.
    absent: HashMap<u64, Vec<Range<u64>>>,
}

impl std::fmt::Debug for ParentMemory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "ParentMemory({:?}, {} processes)", self.digest, self.private.len())
    }
}

impl ParentMemory {
    /// Finds the pages of `images`.
    ///
    /// # Errors
    /// [`PageImagesError`], about any of them.
    pub fn open(images: &ImageSet) -> Result<Self, PageImagesError> {
        let digest = images.digest().map(str::to_owned);
        let mut memory = Self { digest, private: HashMap::new(), shared: HashMap::new(), absent: HashMap::new() };
        for name in images.names()? {
            let (kind, number, of_kind) = match ImageName::parse(&name) {
                Some(ImageName { kind: Kind::Pagemap, number: Some(number) }) => {
                    (Kind::Pagemap, number, &mut memory.private)
                }
                Some(ImageName { kind: Kind::ShmemPagemap, number: Some(number) }) => {
                    (Kind::ShmemPagemap, number, &mut memory.shared)
                }
                _ => continue,
            };
            if let Some(ranges) = images.absent(&name)? {
                if kind == Kind::Pagemap {
                    memory.absent.insert(number, ranges);
                }
            } else if let Some(pages) = PageImages::read(images, &name, kind)? {
                of_kind.insert(number, pages);
            }
        }
        Ok(memory)
    }

    /// What tells the images from any other; see [`ImageSet::digest`].
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// Those of `runs`, all of one process, that `unwritten` pages of it need not be saved of, since the images have them.
    pub fn has_of(&self, pid: NsPid, runs: &[Range<u64>], unwritten: &[Range<u64>]) -> Vec<Range<u64>> {
        let absent = u64::try_from(pid.0).ok().and_then(|pid| self.absent.get(&pid));
        let here = || Some(self.private(pid)?.set.runs.iter().map(|run| run.range.clone()).collect());
        let Some(theirs): Option<Vec<Range<u64>>> = absent.cloned().or_else(here) else { return Vec::new() };
        common(&common(runs, unwritten), &theirs)
    }

    /// Forgets the pages of which `has` does not say that a page server's images have them too, by the kind and number of their pagemap.
    ///
    /// # Errors
    /// Those of `has`.
    pub fn retain<E>(&mut self, mut has: impl FnMut(Kind, u64) -> Result<bool, E>) -> Result<(), E> {
        fn retain<T, E>(all: &mut HashMap<u64, T>, mut has: impl FnMut(u64) -> Result<bool, E>) -> Result<(), E> {
            for number in all.keys().copied().collect::<Vec<_>>() {
                if !has(number)? {
                    all.remove(&number);
                }
            }
            Ok(())
        }
        retain(&mut self.private, |number| has(Kind::Pagemap, number))?;
        retain(&mut self.absent, |number| has(Kind::Pagemap, number))?;
        retain(&mut self.shared, |number| has(Kind::ShmemPagemap, number))
    }

    /// The private pages of the process that had this pid.
    pub fn private(&self, pid: NsPid) -> Option<&PageImages> {
        self.private.get(&u64::try_from(pid.0).ok()?)
    }

    /// The pages of a shared object.
    pub fn shared(&self, id: u64) -> Option<&PageImages> {
        self.shared.get(&id)
    }
}

/// Two places of the same pages.
struct Piece {
    address: u64,
    /// In the content.
    offset: u64,
    /// In the parent's pages.
    theirs: u64,
    length: u64,
}

/// The pages among `runs`, which follow one another in `content`, that `parent` has with the same bytes.
///
/// # Errors
/// Those of reading the content.
pub fn equal_pages(content: &dyn Content, runs: &[Range<u64>], parent: &PageImages) -> io::Result<Vec<Range<u64>>> {
    let mut pieces = Vec::new();
    let mut offset = 0;
    for run in runs {
        for theirs in parent.set.within(run.clone()) {
            let mut done = 0;
            let (start, length) = (theirs.range.start, theirs.range.end - theirs.range.start);
            while done < length {
                let take = PIECE.min(length - done);
                let at = offset + (start - run.start) + done;
                pieces.push(Piece { address: start + done, offset: at, theirs: theirs.offset + done, length: take });
                done += take;
            }
        }
        offset += run.end - run.start;
    }
    let bytes = pieces.iter().map(|piece| piece.length).sum();
    let equal = Mutex::new(Vec::new());
    in_parallel(
        bytes,
        &pieces,
        || vec![0; PIECE as usize],
        |buffer, piece| {
            let ours = &mut buffer[..piece.length as usize];
            content.read_at(piece.offset, ours)?;
            let found = equal_in(piece.address, ours, parent.pages.peek(piece.theirs, piece.length));
            equal.lock().unwrap_or_else(std::sync::PoisonError::into_inner).extend(found);
            Ok::<_, io::Error>(())
        },
    )?;
    let mut equal = equal.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    equal.sort_by_key(|range: &Range<u64>| range.start);
    Ok(joined(equal))
}

/// The pages from `address` on that are the same in both.
fn equal_in(address: u64, ours: &[u8], theirs: &[u8]) -> Vec<Range<u64>> {
    if ours == theirs {
        return std::iter::once(address..address + ours.len() as u64).collect();
    }
    let page = PAGE_SIZE as usize;
    let pages = ours.chunks(page).zip(theirs.chunks(page)).zip((address..).step_by(page));
    joined(pages.filter(|((ours, theirs), _)| ours == theirs).map(|(_, at)| at..at + PAGE_SIZE))
}

/// Ascending ranges, neighbours made one.
fn joined(ranges: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

/// How many pages lie in ranges.
pub fn page_count(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| (range.end - range.start) / PAGE_SIZE).sum()
}

/// What both have in common; both ascending.
pub fn common(one: &[Range<u64>], other: &[Range<u64>]) -> Vec<Range<u64>> {
    without(one, &without(one, other))
}

/// `runs` without `holes`; both ascending.
pub fn without(runs: &[Range<u64>], holes: &[Range<u64>]) -> Vec<Range<u64>> {
    runs.iter().flat_map(|run| subtract(run.clone(), holes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::Cancel;
    use crate::images::pagemap::{PagemapEntry, PagemapHead};
    use crate::images::{Encoder, FolderOptions, FolderSink, FolderSource, Manifest, Sink};
    use crate::progress::MeteredContent;

    const PAGE: u64 = PAGE_SIZE;

    fn pages(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().flat_map(|byte| vec![*byte; PAGE as usize]).collect()
    }

    #[test]
    fn pages_of_the_same_content_are_found_across_runs() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = FolderSink::open(folder.path(), FolderOptions::default()).unwrap();
        let mut pagemap = Encoder::new(Kind::Pagemap);
        pagemap.entry(&PagemapHead { pages_id: 3 });
        let listed = [2 * PAGE..6 * PAGE, 9 * PAGE..10 * PAGE];
        PagemapEntry::of_runs(&listed, &[]).iter().for_each(|entry| {
            pagemap.entry(entry);
        });
        sink.put("pagemap-7.img", &pagemap.finish()).unwrap();
        sink.put_raw("pages-3.img", &pages(&[2, 3, 4, 5, 9])).unwrap();
        sink.finish(Manifest::new("6.18", 4096)).unwrap();
        let images = ImageSet::open(Box::new(FolderSource::open(folder.path()).unwrap())).unwrap();
        let parent = ParentMemory::open(&images).unwrap();
        assert!(parent.private(NsPid(8)).is_none() && parent.shared(7).is_none());

        let runs = [PAGE..4 * PAGE, 4 * PAGE..5 * PAGE, 8 * PAGE..11 * PAGE];
        let content = pages(&[2, 2, 7, 4, 9, 9, 9]);
        let equal = equal_pages(&content, &runs, parent.private(NsPid(7)).unwrap()).unwrap();
        assert_eq!(equal, [2 * PAGE..3 * PAGE, 4 * PAGE..5 * PAGE, 9 * PAGE..10 * PAGE]);
        let left = without(&runs, &equal);
        assert_eq!(
            common(&runs, &[0..PAGE, 3 * PAGE..9 * PAGE]),
            [3 * PAGE..4 * PAGE, 4 * PAGE..5 * PAGE, 8 * PAGE..9 * PAGE]
        );
        assert_eq!(left, [PAGE..2 * PAGE, 3 * PAGE..4 * PAGE, 8 * PAGE..9 * PAGE, 10 * PAGE..11 * PAGE]);

        let cancel = Cancel::default();
        let told = || equal_pages(&MeteredContent::untold(&content, &cancel), &runs, parent.private(NsPid(7)).unwrap());
        assert_eq!(told().unwrap(), equal);
        cancel.caller_gone();
        assert!(told().is_err(), "a dump that is given up compares no further");
    }
}
