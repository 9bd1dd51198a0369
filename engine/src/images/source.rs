//! Where an image set comes from: the trait that a restore reads from, and what its implementations share.
//!
//! A source finds an image as a part of a file. It accepts only what a dump writes, whatever it is given: flat names, regular
//! files, each once, whole.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::digest::{CHUNK, chunk_count, chunk_length};
use super::frame::DecodeError;
use super::manifest::{Digest, ImageDigest, ManifestError};

/// Largest image that is read into memory as a whole: 512 MiB. Pages, deleted files and archives are used in place.
pub const MAX_RECORD_IMAGE: u64 = 512 << 20;

/// Gives the images of one set, unverified; [`super::ImageSet`] verifies them.
pub trait Source: Send + Sync {
    /// Names of everything that could be an image, in order.
    ///
    /// # Errors
    /// [`SourceError`].
    fn names(&self) -> Result<Vec<String>, SourceError>;

    /// Finds an image; `None` if there is none of this name.
    ///
    /// # Errors
    /// [`SourceError`], if there is something else of this name.
    fn find(&self, name: &str) -> Result<Option<RawRegion>, SourceError>;

    /// The source of the parent images, if the set was made incrementally.
    ///
    /// # Errors
    /// [`SourceError::Parent`].
    fn parent(&self) -> Result<Option<Box<dyn Source>>, SourceError> {
        Ok(None)
    }

    /// Reads an image of at most [`MAX_RECORD_IMAGE`] bytes.
    ///
    /// # Errors
    /// [`SourceError`].
    fn get(&self, name: &str) -> Result<Option<Vec<u8>>, SourceError> {
        self.find(name)?.map(|region| region.to_vec(name)).transpose()
    }
}

/// A part of a file, which other parts may share.
#[derive(Clone, Debug)]
pub struct RawRegion {
    file: Arc<File>,
    offset: u64,
    length: u64,
}

impl RawRegion {
    /// The `length` bytes of `file` from `offset` on.
    pub fn new(file: Arc<File>, offset: u64, length: u64) -> Self {
        Self { file, offset, length }
    }

    /// The file, to map or to copy from.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where the part begins in the file. In an archive it is a multiple of 512, not of the page size.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Fills `buffer` with the bytes from `offset` of the part on.
    ///
    /// # Errors
    /// The system's; `UnexpectedEof` if they do not lie within the part, or the file was cut short.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.read_exact_at(buffer, self.offset + offset)
    }

    /// All bytes, at most [`MAX_RECORD_IMAGE`]. The name is for messages.
    ///
    /// # Errors
    /// [`SourceError::TooLarge`], [`SourceError::Read`].
    pub fn to_vec(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        if self.length > MAX_RECORD_IMAGE {
            return Err(SourceError::TooLarge { name: name.to_owned(), length: self.length });
        }
        let mut bytes = vec![0; self.length as usize];
        self.read_at(0, &mut bytes).map_err(|source| SourceError::read(name, source))?;
        Ok(bytes)
    }
}

/// A large image in place, and the digests of its chunks.
#[derive(Clone, Debug)]
pub struct RawImage {
    name: String,
    region: RawRegion,
    digest: Option<ImageDigest>,
}

impl RawImage {
    /// `digest` is what the manifest says, if there is one.
    pub(super) fn new(name: &str, region: RawRegion, digest: Option<ImageDigest>) -> Self {
        Self { name: name.to_owned(), region, digest }
    }

    /// Where the image lies.
    pub fn region(&self) -> &RawRegion {
        &self.region
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.region.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.region.is_empty()
    }

    /// Number of chunks of [`CHUNK`] bytes, the last of which may be shorter.
    pub fn chunk_count(&self) -> u64 {
        chunk_count(self.len())
    }

    /// Checks that `bytes` are the whole chunk `index`, as it was dumped. Without a manifest anything is accepted, and an
    /// image digested as a whole was verified when it was opened.
    ///
    /// # Errors
    /// [`SourceError::Damaged`].
    pub fn verify_chunk(&self, index: u64, bytes: &[u8]) -> Result<(), SourceError> {
        match &self.digest {
            Some(ImageDigest { digest: Digest::Chunks(digests), .. }) if !digests.verify(index, bytes) => {
                let (name, offset) = (self.name.clone(), index.saturating_mul(CHUNK));
                Err(SourceError::Damaged { name, offset })
            }
            _ => Ok(()),
        }
    }

    /// Reads chunk `index` into `buffer`, verified, and returns it.
    ///
    /// # Errors
    /// [`SourceError::Read`], [`SourceError::Damaged`].
    pub fn read_chunk<'a>(&self, index: u64, buffer: &'a mut Vec<u8>) -> Result<&'a [u8], SourceError> {
        buffer.resize(chunk_length(self.len(), index), 0);
        self.region
            .read_at(index.saturating_mul(CHUNK), buffer)
            .map_err(|source| SourceError::read(&self.name, source))?;
        self.verify_chunk(index, buffer)?;
        Ok(buffer)
    }
}

/// Why a source or an image in it is not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum SourceError {
    /// The image folder cannot be read.
    #[error("cannot read the image folder {path}: {source}")]
    Folder { path: String, source: io::Error },
    /// The archive cannot be read.
    #[error("cannot read the archive: {source}")]
    Archive { source: io::Error },
    /// Not a tar, or damaged.
    #[error("the archive is damaged at offset {offset}, or it is no tar archive")]
    Header { offset: u64 },
    /// It ends too early.
    #[error("the archive is truncated: it ends at offset {offset}")]
    Truncated { offset: u64 },
    /// Something follows its end.
    #[error("the archive is damaged: data follows its end")]
    Trailer,
    /// The stream holds more than the caller wants to keep.
    #[error("the archive is too large: it holds more than {limit} bytes")]
    ArchiveTooLarge { limit: u64 },
    /// No honest archive has so many.
    #[error("the archive is damaged: it has too many members")]
    TooManyMembers,
    /// A path that leads elsewhere or is no text.
    #[error("{name:?} is not allowed as a name among images: it must not be absolute or lead elsewhere")]
    Name { name: String },
    /// A link.
    #[error("{name:?} is a link, only regular files are allowed among images")]
    Link { name: String },
    /// A device, pipe, socket or folder.
    #[error("{name:?} is not a regular file, nothing else is allowed among images")]
    NotRegular { name: String },
    /// Too deep.
    #[error("{name:?} lies in a folder within the images, which must be flat")]
    Nested { name: String },
    /// Twice.
    #[error("{name:?} is there twice")]
    Duplicate { name: String },
    /// Larger than any honest record.
    #[error("image {name} has {length} bytes, more than the {MAX_RECORD_IMAGE} that are read: it is damaged")]
    TooLarge { name: String, length: u64 },
    /// The system refuses.
    #[error("cannot read image {name}: {source}")]
    Read { name: String, source: io::Error },
    /// The manifest lists it, but there is none.
    #[error("image {name} is missing: {MANIFEST_NAME} lists it", MANIFEST_NAME = super::manifest::MANIFEST_NAME)]
    Missing { name: String },
    /// A pages image that a pagemap names is not there.
    #[error("image {name} is missing: the set is incomplete")]
    Absent { name: String },
    /// A page server has it.
    #[error(
        "image {name} is not here: its pages were sent to a page server; copy the images that it wrote beside these"
    )]
    Elsewhere { name: String },
    /// A page server's image is another one's.
    #[error(
        "image {name} does not list the pages that were sent to the page server: it is damaged, or of another dump"
    )]
    NotSent { name: String },
    /// The images of an earlier dump, which hold some of the pages, cannot be had.
    #[error("the images are of an incremental dump: {problem}")]
    Parent { problem: String },
    /// Shorter or longer than the manifest says.
    #[error("image {name} is damaged: it has {found} bytes, {expected} were dumped")]
    Length { name: String, found: u64, expected: u64 },
    /// Its digest differs.
    #[error("image {name} is damaged: its content from offset {offset} on is not what was dumped")]
    Damaged { name: String, offset: u64 },
    /// Decodes, but not to what it encodes from.
    #[error(
        "image {name}: the entry at offset {offset} has a field that this version does not know, or lacks one: it was made by a newer program"
    )]
    Unknown { name: String, offset: usize },
    /// The manifest is not accepted.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The image is not what its name says.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl SourceError {
    pub(super) fn archive(source: io::Error) -> Self {
        Self::Archive { source }
    }

    pub(super) fn read(name: &str, source: io::Error) -> Self {
        Self::Read { name: name.to_owned(), source }
    }
}
