//! The pages of an address space or of a shared object as images hold them, the chain of an incremental dump included.

use crate::images::pagemap::{PagemapEntry, PagemapHead};
use crate::images::{DecodeError, ImageSet, Kind, Reader, SourceError};
use crate::memory::fill::Pages;
use crate::memory::pageset::{Level, PageSet};

/// Pages with their places.
pub struct PageImages {
    /// Which pages there are.
    pub set: PageSet,
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
        Ok(Some(Self { set, pages }))
    }
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
