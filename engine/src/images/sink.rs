//! Where an image set goes: the trait that a dump writes to, and what its implementations share.
//!
//! Invariants: names are flat; each image is written once; the manifest is written last, and lists every image with its digest.

use std::collections::BTreeMap;
use std::io;

use super::content::Content;
use super::digest::{ChunkDigests, sha256};
use super::frame::Encoder;
use super::kind::Kind;
use super::manifest::{Digest, ImageDigest, Manifest, ManifestError};
use super::pagemap::{PagemapEntry, PagemapHead};
use crate::dump::Dumped;

/// Takes the images of one dump.
///
/// Dropped before [`Sink::finish`], a sink leaves nothing that could be taken for a complete set.
pub trait Sink: Send {
    /// Writes an image that is in memory.
    ///
    /// # Errors
    /// [`SinkError`]; the sink is then of no further use.
    fn put(&mut self, name: &str, content: &[u8]) -> Result<(), SinkError>;

    /// Writes an image that is read as it is written, perhaps by several threads.
    ///
    /// # Errors
    /// [`SinkError`]; the sink is then of no further use.
    fn put_raw(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError>;

    /// Writes the pages of a process or shared object: the image `pagemap`, which lists them as `entries`, and their contents, as pages
    /// image `number`.
    ///
    /// # Errors
    /// [`SinkError`]; the sink is then of no further use.
    fn put_pages(
        &mut self,
        pagemap: &str,
        number: u32,
        entries: &[PagemapEntry],
        pages: &dyn Content,
    ) -> Result<(), SinkError> {
        let mut image = Encoder::new(Kind::Pagemap);
        image.entry(&PagemapHead { pages_id: number });
        for entry in entries {
            image.entry(entry);
        }
        self.put(pagemap, &image.finish())?;
        self.put_raw(&Kind::Pages.name_for(number), pages)
    }

    /// Writes something that belongs to the checkpoint and is no image, beside the images. Only archives have room for it.
    ///
    /// # Errors
    /// [`SinkError`]; the sink is then of no further use.
    fn put_beside(&mut self, name: &str, _content: &dyn Content) -> Result<(), SinkError> {
        Err(SinkError::NoRoom { name: name.to_owned() })
    }

    /// Completes the set: fills the digests into `manifest`, writes it, and returns it. No image can be written after.
    ///
    /// # Errors
    /// [`SinkError`].
    fn finish(&mut self, manifest: Manifest) -> Result<Manifest, SinkError>;

    /// Puts the finished set where it belongs. A tree that is not to run on is ended after this, so whatever may still fail
    /// is done here.
    ///
    /// # Errors
    /// [`SinkError`]; nothing of the set is left.
    fn seal(&mut self, _dumped: &Dumped) -> Result<(), SinkError> {
        Ok(())
    }
}

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum SinkError {
    /// The image folder cannot be used.
    #[error("cannot use the image folder {path}: {source}")]
    Folder { path: String, source: io::Error },
    /// Not a flat name that every sink can hold.
    #[error("{name:?} cannot be the name of an image")]
    Name { name: String },
    /// The dump wrote one image twice.
    #[error("image {name} was written twice")]
    Duplicate { name: String },
    /// The set was complete already.
    #[error("image {name} was written after the image set was complete")]
    Finished { name: String },
    /// The sink takes images only.
    #[error("{name} is no image, and can only be put into an archive")]
    NoRoom { name: String },
    /// The file cannot be made.
    #[error("cannot create image {name}: {source}")]
    Create { name: String, source: io::Error },
    /// The target does not take the bytes.
    #[error("cannot write image {name}: {source}")]
    Write { name: String, source: io::Error },
    /// The page server is gone, or does not take the pages.
    #[error("cannot send the pages of {name} to the page server at {peer}: {source}")]
    PageServer { name: String, peer: String, source: io::Error },
    /// The page server said that it could not.
    #[error("the page server at {peer} could not write the pages that it was sent: its own log tells why")]
    NotTaken { peer: String },
    /// Pages were left to images that the page server does not have.
    #[error("the page server at {peer} has no earlier images of {name}: start it with --prev-images-dir")]
    NoParent { name: String, peer: String },
    /// The finished set could not be put where it belongs.
    #[error("the images are written, but the checkpoint cannot be completed: {problem}")]
    Seal { problem: String },
    /// The content is not to be had.
    #[error("cannot read what is to go into image {name}, at offset {offset}: {source}")]
    Content { name: String, offset: u64, source: io::Error },
    /// The manifest cannot be written as JSON.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// Whether `name` can be an image's: one path component of at most 88 bytes (a tar header holds 100, folder included), not hidden.
pub fn is_flat_name(name: &str) -> bool {
    (1..=88).contains(&name.len()) && !name.starts_with('.') && !name.bytes().any(|byte| byte == b'/' || byte == 0)
}

pub(super) fn write_error(name: &str, source: io::Error) -> SinkError {
    SinkError::Write { name: name.to_owned(), source }
}

/// What has been written so far.
#[derive(Default)]
pub(super) struct Ledger {
    pub(super) images: BTreeMap<String, ImageDigest>,
    finished: bool,
}

impl Ledger {
    /// Checks that an image of this name may be written now.
    pub(super) fn admit(&self, name: &str) -> Result<(), SinkError> {
        let name = name.to_owned();
        if !is_flat_name(&name) {
            Err(SinkError::Name { name })
        } else if self.finished {
            Err(SinkError::Finished { name })
        } else if self.images.contains_key(&name) {
            Err(SinkError::Duplicate { name })
        } else {
            Ok(())
        }
    }

    /// Notes an image that is written.
    pub(super) fn note(&mut self, name: &str, digest: ImageDigest) {
        self.images.insert(name.to_owned(), digest);
    }

    /// Puts the digests into the manifest and refuses images from now on.
    pub(super) fn close(&mut self, mut manifest: Manifest) -> Result<(Manifest, Vec<u8>), SinkError> {
        self.admit(super::manifest::MANIFEST_NAME)?;
        self.finished = true;
        manifest.images = std::mem::take(&mut self.images);
        let bytes = manifest.to_bytes()?;
        Ok((manifest, bytes))
    }
}

/// Length and digest of a record image.
pub(super) fn record_digest(content: &[u8]) -> ImageDigest {
    ImageDigest { length: content.len() as u64, digest: Digest::Sha256(sha256(content)) }
}

/// Length and digest of plain content.
pub(crate) fn chunked_digest(length: u64, digests: ChunkDigests) -> ImageDigest {
    ImageDigest { length, digest: Digest::Chunks(digests) }
}
