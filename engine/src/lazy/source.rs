//! Where the daemon takes pages from, and which pages each process misses at first.

use std::collections::HashMap;

use super::fetch::{FetchError, PageServer};
use super::missing::Missing;
use crate::images::mm::MmEntry;
use crate::images::pstree::PstreeEntry;
use crate::images::{ImageSet, Kind, SourceError};
use crate::memory::fill::FillError;
use crate::memory::images::{PageImages, PageImagesError};
use crate::memory::layout::{advice, subtract};

/// Why pages cannot be had.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum PagesError {
    /// An image is not accepted.
    #[error(transparent)]
    Images(#[from] SourceError),
    /// A pagemap, or its pages.
    #[error(transparent)]
    PageImages(#[from] PageImagesError),
    /// What the images say is damaged, or was read by nobody.
    #[error(transparent)]
    Content(#[from] FillError),
    /// The images lack the tree.
    #[error("image {name} is missing: the set is incomplete, or not an image set at all")]
    Missing { name: String },
    /// They are elsewhere.
    #[error(
        "pages of pid {pid} are not in the images but with the page server of their dump: give --page-server, --address and --port"
    )]
    Elsewhere { pid: u32 },
    /// The restore is of other images.
    #[error("the images have no memory of pid {pid}: is the restore one of the same images?")]
    Unknown { pid: u32 },
    /// No page is there.
    #[error("the images lack the page at {address:x} of pid {pid}")]
    Lacking { pid: u32, address: u64 },
    /// The page server.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

/// The pages of a tree.
pub struct TreePages {
    processes: HashMap<u32, ProcessPages>,
    /// How many processes there are, exited ones included.
    tasks: usize,
    server: Option<PageServer>,
}

struct ProcessPages {
    images: PageImages,
    missing: Missing,
}

impl TreePages {
    /// Reads which pages `images` have. With a `server`, all contents come from there.
    ///
    /// # Errors
    /// [`PagesError`], about the images only.
    pub fn read(images: &ImageSet, server: Option<PageServer>) -> Result<Self, PagesError> {
        let name = Kind::Pstree.name();
        let tree: Vec<PstreeEntry> = images.entries(Kind::Pstree, &name)?.ok_or(PagesError::Missing { name })?;
        let mut processes = HashMap::new();
        for entry in &tree {
            let name = Kind::Pagemap.name_for(entry.pid);
            // An exited process has none.
            let Some(pages) = PageImages::read(images, &name, Kind::Pagemap)? else { continue };
            if server.is_none() && !pages.set.elsewhere.is_empty() {
                return Err(PagesError::Elsewhere { pid: entry.pid });
            }
            let name = Kind::Mm.name_for(entry.pid);
            let mm: MmEntry = images.entry(Kind::Mm, &name)?.ok_or(PagesError::Missing { name })?;
            let missing = missing_at_first(&pages, &mm);
            processes.insert(entry.pid, ProcessPages { images: pages, missing });
        }
        Ok(Self { processes, tasks: tree.len(), server })
    }

    /// How many processes a restore tells of.
    pub fn tasks(&self) -> usize {
        self.tasks
    }

    /// What the process misses when it begins to run.
    ///
    /// # Errors
    /// [`PagesError::Unknown`].
    pub fn missing(&self, pid: u32) -> Result<Missing, PagesError> {
        self.processes.get(&pid).map(|process| process.missing.clone()).ok_or(PagesError::Unknown { pid })
    }

    /// The pages at `address` of the process that the images call `pid`: one at least, and at most `length` bytes.
    ///
    /// # Errors
    /// [`PagesError`].
    pub fn content(&mut self, pid: u32, address: u64, length: u64) -> Result<&[u8], PagesError> {
        if let Some(server) = &mut self.server {
            return Ok(server.get(pid, address, length)?);
        }
        let process = self.processes.get(&pid).ok_or(PagesError::Unknown { pid })?;
        let run = process.images.set.within(address..address + length).next();
        match run.filter(|run| run.range.start == address) {
            Some(run) => Ok(process.images.pages.part(run.offset, run.range.end - run.range.start)?),
            None => Err(PagesError::Lacking { pid, address }),
        }
    }

    /// Everything has been brought: tells the page server.
    ///
    /// # Errors
    /// [`PagesError::Fetch`].
    pub fn finish(self) -> Result<(), PagesError> {
        Ok(self.server.map_or(Ok(()), PageServer::close)?)
    }
}

fn missing_at_first(pages: &PageImages, mm: &MmEntry) -> Missing {
    let is_wiped = |madv: Option<u64>| madv.unwrap_or(0) & advice::WIPEONFORK != 0;
    let wiped: Vec<_> = mm.vmas.iter().filter(|vma| is_wiped(vma.madv)).map(|vma| vma.start..vma.end).collect();
    let mut missing = Missing::default();
    for range in &pages.lazy {
        let kept = subtract(range.clone(), &wiped);
        subtract(range.clone(), &kept).into_iter().for_each(|part| missing.add(part, true));
        kept.into_iter().for_each(|part| missing.add(part, false));
    }
    missing
}
