//! An image set as a restore reads it: found, verified, and only then decoded.

use prost::Message;

use super::digest::sha256;
use super::frame::{decode_all, decode_one};
use super::kind::{ImageName, Kind};
use super::layout::first_unknown;
use super::manifest::{Digest, ImageDigest, MANIFEST_NAME, Manifest};
use super::source::{RawImage, RawRegion, Source, SourceError};

/// A source with its manifest, if it has one. With a manifest, images that it does not list are not there.
pub struct ImageSet {
    source: Box<dyn Source>,
    manifest: Option<Manifest>,
}

impl ImageSet {
    /// Reads the manifest and checks that every image it lists is there and as long as it was. Whether it was made for this
    /// machine is [`Manifest::check_architecture`]'s to say.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn open(source: Box<dyn Source>) -> Result<Self, SourceError> {
        let manifest = source.get(MANIFEST_NAME)?.map(|bytes| Manifest::from_bytes(&bytes)).transpose()?;
        let set = Self { source, manifest };
        for (name, listed) in set.manifest.iter().flat_map(|manifest| &manifest.images) {
            let region = set.source.find(name)?.ok_or_else(|| SourceError::Missing { name: name.clone() })?;
            if region.len() != listed.length {
                let (found, expected) = (region.len(), listed.length);
                return Err(SourceError::Length { name: name.clone(), found, expected });
            }
        }
        Ok(set)
    }

    /// The manifest; `None` for a set that CRIU made.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// Names of the images, in order. Without a manifest, of the files that are called as images are.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn names(&self) -> Result<Vec<String>, SourceError> {
        match &self.manifest {
            Some(manifest) => Ok(manifest.images.keys().cloned().collect()),
            None => Ok(self.source.names()?.into_iter().filter(|name| ImageName::parse(name).is_some()).collect()),
        }
    }

    /// Whether there is an image of this name.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn contains(&self, name: &str) -> Result<bool, SourceError> {
        Ok(self.find(name)?.is_some())
    }

    /// An image in memory, verified.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>, SourceError> {
        let Some((region, digest)) = self.find(name)? else { return Ok(None) };
        let bytes = region.to_vec(name)?;
        verify(name, &bytes, digest)?;
        Ok(Some(bytes))
    }

    /// An image in place, whose chunks are verified as they are used. Small images that were digested as a whole are
    /// verified here.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn raw(&self, name: &str) -> Result<Option<RawImage>, SourceError> {
        let Some((region, digest)) = self.find(name)? else { return Ok(None) };
        if let Some(ImageDigest { digest: Digest::Sha256(_), .. }) = digest {
            verify(name, &region.to_vec(name)?, digest)?;
        }
        Ok(Some(RawImage::new(name, region, digest.cloned())))
    }

    /// The entries of the image of this name; `None` if there is no such image.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn entries<M: Message + Default>(&self, kind: Kind, name: &str) -> Result<Option<Vec<M>>, SourceError> {
        let bytes = self.bytes(name)?;
        Ok(bytes.map(|bytes| decode_all(name, kind, &bytes)).transpose()?)
    }

    /// The only entry of the image of this name; `None` if there is no such image.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn entry<M: Message + Default>(&self, kind: Kind, name: &str) -> Result<Option<M>, SourceError> {
        let bytes = self.bytes(name)?;
        Ok(bytes.map(|bytes| decode_one(name, kind, &bytes)).transpose()?)
    }

    /// Decodes every record image and checks that all of it is understood, so that a restore drops nothing silently. For sets
    /// of another program or version; tails and raw images are not looked into.
    ///
    /// # Errors
    /// [`SourceError::Unknown`] for the first image that has something unknown, and every other [`SourceError`].
    pub fn check_understood(&self) -> Result<(), SourceError> {
        for name in self.names()? {
            let Some(ImageName { kind, .. }) = ImageName::parse(&name) else { continue };
            let bytes = match kind {
                _ if kind.is_raw() => continue,
                Kind::GhostFile => {
                    self.raw(&name)?.map(|image| image.read_chunk(0, &mut Vec::new()).map(<[u8]>::to_vec))
                }
                _ => self.bytes(&name).transpose(),
            };
            let Some(bytes) = bytes else { continue };
            if let Some(offset) = first_unknown(kind, &name, &bytes?)? {
                return Err(SourceError::Unknown { name, offset });
            }
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Result<Option<(RawRegion, Option<&ImageDigest>)>, SourceError> {
        let digest = match &self.manifest {
            None => None,
            Some(manifest) => match manifest.images.get(name) {
                None => return Ok(None),
                listed => listed,
            },
        };
        Ok(self.source.find(name)?.map(|region| (region, digest)))
    }
}

/// Checks the content of a whole image. Also good for archive members.
///
/// # Errors
/// [`SourceError::Length`], [`SourceError::Damaged`].
pub fn verify(name: &str, bytes: &[u8], digest: Option<&ImageDigest>) -> Result<(), SourceError> {
    let Some(ImageDigest { length, digest }) = digest else { return Ok(()) };
    if bytes.len() as u64 != *length {
        return Err(SourceError::Length { name: name.to_owned(), found: bytes.len() as u64, expected: *length });
    }
    let damaged = match digest {
        Digest::Sha256(expected) => (sha256(bytes) != *expected).then_some(0),
        Digest::Chunks(digests) => digests.first_damaged(bytes),
    };
    damaged.map_or(Ok(()), |offset| Err(SourceError::Damaged { name: name.to_owned(), offset }))
}
