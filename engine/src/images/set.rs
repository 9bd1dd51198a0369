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
        self.in_place(name, region, digest).map(Some)
    }

    fn in_place(&self, name: &str, region: RawRegion, digest: Option<&ImageDigest>) -> Result<RawImage, SourceError> {
        if let Some(ImageDigest { digest: Digest::Sha256(_), .. }) = digest {
            verify(name, &region.to_vec(name)?, digest)?;
        }
        Ok(RawImage::new(name, region, digest.cloned()))
    }

    /// Something beside the images, which is `region` if it is there, with the digest that the manifest has of it, if it has one.
    ///
    /// # Errors
    /// [`SourceError`], if it is not what the manifest lists.
    pub fn member(&self, name: &str, region: Option<RawRegion>) -> Result<Option<RawImage>, SourceError> {
        let listed = self.manifest.as_ref().and_then(|manifest| manifest.members.get(name));
        match (region, listed) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(SourceError::Missing { name: name.to_owned() }),
            (Some(region), Some(listed)) if region.len() != listed.length => {
                Err(SourceError::Length { name: name.to_owned(), found: region.len(), expected: listed.length })
            }
            (Some(region), listed) => self.in_place(name, region, listed).map(Some),
        }
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

#[cfg(test)]
mod tests {
    use super::super::fs::FsEntry;
    use super::super::{FolderOptions, FolderSink, FolderSource, Sink, encode};
    use super::*;
    use std::path::Path;

    fn open(folder: &Path) -> Result<ImageSet, SourceError> {
        ImageSet::open(Box::new(FolderSource::open(folder).unwrap()))
    }

    fn folder_with_set() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = FolderSink::open(folder.path(), FolderOptions::default()).unwrap();
        let entry = FsEntry { cwd_id: 1, root_id: 2, umask: None };
        sink.put("fs-1.img", &encode(Kind::Fs, &[entry])).unwrap();
        sink.put_raw("pages-1.img", &vec![7; 4096]).unwrap();
        sink.finish(Manifest::new("6.18", 4096)).unwrap();
        folder
    }

    #[test]
    fn entries_are_decoded_once_they_are_verified() {
        let folder = folder_with_set();
        let set = open(folder.path()).unwrap();
        assert_eq!(set.entry::<FsEntry>(Kind::Fs, "fs-1.img").unwrap().unwrap().root_id, 2);
        assert_eq!(set.entries::<FsEntry>(Kind::Fs, "fs-1.img").unwrap().unwrap().len(), 1);
        assert!(set.entry::<FsEntry>(Kind::Fs, "fs-2.img").unwrap().is_none());
        set.check_understood().unwrap();
        let mut bytes = std::fs::read(folder.path().join("fs-1.img")).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(folder.path().join("fs-1.img"), bytes).unwrap();
        assert!(matches!(set.entry::<FsEntry>(Kind::Fs, "fs-1.img"), Err(SourceError::Damaged { .. })));
        assert!(matches!(set.raw("fs-1.img"), Err(SourceError::Damaged { .. })));
    }

    #[test]
    fn missing_and_shortened_images_are_found_at_once() {
        let folder = folder_with_set();
        let pages = folder.path().join("pages-1.img");
        std::fs::write(&pages, [7; 4095]).unwrap();
        let sentence = open(folder.path()).err().unwrap().to_string();
        assert!(sentence.contains("it has 4095 bytes, 4096 were dumped"), "{sentence}");
        std::fs::remove_file(&pages).unwrap();
        let sentence = open(folder.path()).err().unwrap().to_string();
        assert!(sentence.contains("pages-1.img is missing"), "{sentence}");
    }

    #[test]
    fn files_that_the_manifest_does_not_list_are_not_images() {
        let folder = folder_with_set();
        std::fs::write(folder.path().join("fs-9.img"), "stray").unwrap();
        let set = open(folder.path()).unwrap();
        assert!(!set.contains("fs-9.img").unwrap());
        assert_eq!(set.names().unwrap(), ["fs-1.img", "pages-1.img"]);
    }

    #[test]
    fn a_set_without_a_manifest_is_read_unverified() {
        let folder = folder_with_set();
        std::fs::remove_file(folder.path().join(MANIFEST_NAME)).unwrap();
        std::fs::write(folder.path().join("dump.log"), "a log").unwrap();
        let set = open(folder.path()).unwrap();
        assert!(set.manifest().is_none());
        assert_eq!(set.names().unwrap(), ["fs-1.img", "pages-1.img"]);
        set.check_understood().unwrap();
        let unknown = [Kind::Fs.magic(), vec![6, 0, 0, 0, 8, 1, 16, 2, 120, 1]].concat();
        std::fs::write(folder.path().join("fs-1.img"), unknown).unwrap();
        let sentence = set.check_understood().unwrap_err().to_string();
        assert!(sentence.contains("fs-1.img: the entry at offset 8"), "{sentence}");
    }
}
