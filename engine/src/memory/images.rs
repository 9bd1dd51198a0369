//! The pages of an address space or of a shared object as images hold them, the chain of an incremental dump included.

use std::ops::Range;

use crate::images::pagemap::{PagemapEntry, PagemapHead, page_flags};
use crate::images::{DecodeError, ImageSet, Kind, Reader, SourceError};
use crate::memory::fill::Pages;
use crate::memory::pageset::{Level, PageSet};
use crate::sys::PAGE_SIZE;

/// Pages with their places.
pub struct PageImages {
    /// Which pages there are.
    pub set: PageSet,
    /// Which of them, and of those that are elsewhere, may come after the task runs: ascending, apart.
    pub lazy: Vec<Range<u64>>,
    /// Their contents.
    pub pages: Pages,
}

/// Why pages cannot be read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum PageImagesError {
    /// An image is not accepted.
    #[error(transparent)]
    Images(#[from] SourceError),
    /// A pagemap is damaged, or a parent lacks what it shall have.
    #[error("image {name}: {problem}")]
    Inconsistent { name: String, problem: String },
}

impl PageImages {
    /// Reads the pagemap `name` of `images`, and of its parents as far as they have it; `None` if `images` has not.
    ///
    /// # Errors
    /// [`PageImagesError`].
    pub fn read(images: &ImageSet, name: &str, kind: Kind) -> Result<Option<Self>, PageImagesError> {
        let (mut pagemaps, mut contents) = (Vec::new(), Vec::new());
        for set in images.chain() {
            let Some(bytes) = set.bytes(name)? else { break };
            let (head, entries) = decode(name, kind, &bytes).map_err(SourceError::from)?;
            let (pages, content) = set.pages_of(name, head.pages_id, &entries)?;
            let asks_parent = entries.iter().any(PagemapEntry::is_in_parent);
            pagemaps.push((entries, content.len()));
            contents.push((pages, content));
            if !asks_parent {
                break;
            }
        }
        if pagemaps.is_empty() {
            return Ok(None);
        }
        let (pages, starts) = Pages::open(contents)?;
        let levels = pagemaps.iter().zip(&starts);
        let levels: Vec<_> = levels
            .map(|((entries, available), start)| Level { entries, start: *start, available: *available })
            .collect();
        let wrong = |problem| PageImagesError::Inconsistent { name: name.to_owned(), problem };
        let set = PageSet::decode(&levels).map_err(wrong)?;
        let lazy = pagemaps.first().map(|(entries, _)| lazy_ranges(entries)).unwrap_or_default();
        Ok(Some(Self { set, lazy, pages }))
    }
}

/// What the entries, which have been decoded to runs, say to be lazy.
fn lazy_ranges(entries: &[PagemapEntry]) -> Vec<Range<u64>> {
    let is_lazy = |entry: &&PagemapEntry| {
        entry.kind() & page_flags::LAZY != 0 && entry.kind() & page_flags::PARENT == 0 && entry.pages() > 0
    };
    entries.iter().filter(is_lazy).map(|entry| entry.vaddr..entry.vaddr + entry.pages() * PAGE_SIZE).collect()
}

fn decode(name: &str, kind: Kind, bytes: &[u8]) -> Result<(PagemapHead, Vec<PagemapEntry>), DecodeError> {
    let mut reader = Reader::new(name, kind, bytes)?;
    let head = reader.expect_entry()?;
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        entries.push(entry);
    }
    Ok((head, entries))
}
