//! An image set as a restore reads it: found, verified, and only then decoded.

use std::ops::Range;

use prost::Message;

use super::digest::sha256;
use super::frame::{decode_all, decode_one};
use super::kind::{ImageName, Kind};
use super::layout::first_unknown;
use super::manifest::{Digest, ImageDigest, MANIFEST_NAME, Manifest, ManifestError};
use super::pagemap::PagemapEntry;
use super::parent::{MAX_CHAIN, PARENT_LINK};
use super::source::{RawImage, RawRegion, Source, SourceError};

/// The option of a manifest that holds the digest of the parent's.
pub const PARENT_OPTION: &str = "parent";

/// A source with its manifest, if it has one. With a manifest, images that it does not list are not there.
pub struct ImageSet {
    source: Box<dyn Source>,
    manifest: Option<Manifest>,
    /// SHA-256 of the manifest's file.
    digest: Option<String>,
    parent: Option<Box<Self>>,
}

impl ImageSet {
    /// Reads the manifest and checks that every image it lists is there and as long as it was; so for the parents of an
    /// incremental dump. Whether it was made for this machine is [`Manifest::check_architecture`]'s to say.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn open(source: Box<dyn Source>) -> Result<Self, SourceError> {
        // From the oldest on, so that no long chain makes deep calls.
        let mut chain = vec![source];
        while let Some(parent) = chain[chain.len() - 1].parent()? {
            if chain.len() == MAX_CHAIN {
                let problem = format!("their parents are more than {MAX_CHAIN}, or come back to themselves");
                return Err(SourceError::Parent { problem });
            }
            chain.push(parent);
        }
        let mut oldest = None;
        while let Some(source) = chain.pop() {
            oldest = Some(Box::new(Self::open_one(source, oldest)?));
        }
        // There was one at least.
        oldest.map(|set| *set).ok_or(SourceError::Missing { name: MANIFEST_NAME.to_owned() })
    }

    fn open_one(source: Box<dyn Source>, parent: Option<Box<Self>>) -> Result<Self, SourceError> {
        let bytes = source.get(MANIFEST_NAME)?;
        let manifest = bytes.as_ref().map(|bytes| Manifest::from_bytes(bytes)).transpose()?;
        let digest = bytes.map(|bytes| sha256(&bytes));
        let set = Self { source, manifest, digest, parent };
        set.check_parent()?;
        for (name, listed) in set.manifest.iter().flat_map(|manifest| &manifest.images) {
            let region = set.source.find(name)?.ok_or_else(|| SourceError::Missing { name: name.clone() })?;
            if region.len() != listed.length {
                let (found, expected) = (region.len(), listed.length);
                return Err(SourceError::Length { name: name.clone(), found, expected });
            }
        }
        Ok(set)
    }

    /// The parent must be the set that this one was made with.
    fn check_parent(&self) -> Result<(), SourceError> {
        let wanted = self.manifest.as_ref().and_then(|manifest| manifest.options.get(PARENT_OPTION));
        let found = self.parent.as_ref().map(|parent| parent.digest.as_deref());
        let problem = match (wanted.and_then(|wanted| wanted.as_str()), found) {
            (None, _) => return Ok(()),
            (Some(wanted), Some(Some(found))) if wanted == found => return Ok(()),
            (Some(_), None) => format!("the link to their parent images, {PARENT_LINK}, is missing"),
            (Some(_), Some(_)) => "their parent images are not those that they were made with".to_owned(),
        };
        Err(SourceError::Parent { problem })
    }

    /// The set that holds the pages which this one, made incrementally, left out.
    pub fn parent(&self) -> Option<&Self> {
        self.parent.as_deref()
    }

    /// This set, its parent, that one's parent and so on.
    pub fn chain(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |set| set.parent())
    }

    /// What tells this set from any other: the SHA-256 of its manifest. `None` for a set that CRIU made.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// The manifest; `None` for a set that CRIU made.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The runs of a pagemap whose pages were sent to a page server, as far as its images are not here.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn absent(&self, pagemap: &str) -> Result<Option<Vec<Range<u64>>>, SourceError> {
        let sent = self.manifest.as_ref().and_then(|manifest| manifest.elsewhere.get(pagemap));
        let Some(sent) = sent else { return Ok(None) };
        if self.source.find(pagemap)?.is_some() {
            return Ok(None);
        }
        sent.ranges().map(Some).ok_or(SourceError::Manifest(ManifestError::Damaged))
    }

    /// The contents of the pages that the image `pagemap` lists as `entries`, in pages image `number`, with that image's name.
    ///
    /// # Errors
    /// [`SourceError`], also if a page server's images are not those that it was to write.
    pub fn pages_of(
        &self,
        pagemap: &str,
        number: u32,
        entries: &[PagemapEntry],
    ) -> Result<(String, RawImage), SourceError> {
        let name = Kind::Pages.name_for(number);
        let missing = || SourceError::Absent { name: name.clone() };
        let sent = self.manifest.as_ref().and_then(|manifest| manifest.elsewhere.get(pagemap));
        let Some(sent) = sent else {
            let pages = self.raw(&name)?.ok_or_else(missing)?;
            return Ok((name, pages));
        };
        if !sent.lists(entries) {
            return Err(SourceError::NotSent { name: pagemap.to_owned() });
        }
        let region = self.source.find(&name)?.ok_or_else(missing)?;
        if region.len() != sent.pages.length {
            return Err(SourceError::Length { name, found: region.len(), expected: sent.pages.length });
        }
        let pages = self.in_place(&name, region, Some(&sent.pages))?;
        Ok((name, pages))
    }

    /// Names of the images, in order. Without a manifest, of the files that are called as images are.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn names(&self) -> Result<Vec<String>, SourceError> {
        match &self.manifest {
            Some(manifest) => {
                let mut names: Vec<String> = manifest.images.keys().chain(manifest.elsewhere.keys()).cloned().collect();
                names.sort_unstable();
                Ok(names)
            }
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
                None if manifest.elsewhere.contains_key(name) => {
                    let absent = || SourceError::Elsewhere { name: name.to_owned() };
                    return Ok(Some((self.source.find(name)?.ok_or_else(absent)?, None)));
                }
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

    fn child_of(parent: &str, folder: &Path, digest: Option<String>) {
        let options = FolderOptions::default();
        let mut sink = FolderSink::open(folder, options).unwrap().with_parent(Some(parent.into()));
        sink.put_raw("pages-1.img", &vec![7; 4096]).unwrap();
        let mut manifest = Manifest::new("6.18", 4096);
        manifest.options.extend(digest.map(|digest| (PARENT_OPTION.to_owned(), digest.into())));
        sink.finish(manifest).unwrap();
    }

    #[test]
    fn a_chain_is_opened_and_must_be_the_one_that_was_dumped() {
        let place = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let path = place.path().join(name);
            let _ = std::fs::create_dir(&path);
            path
        };
        child_of("../0", &folder("1"), None);
        assert!(matches!(open(&folder("1")), Err(SourceError::Parent { .. })), "the parent is not there");
        std::fs::rename(folder_with_set().keep(), folder("0")).unwrap();
        child_of("../1", &folder("2"), open(&folder("1")).unwrap().digest().map(str::to_owned));
        let chain = open(&folder("2")).unwrap();
        assert_eq!(chain.chain().count(), 3);
        assert!(chain.parent().is_some_and(|parent| parent.parent().is_some()));
        // Another set takes the parent's place.
        child_of("../0", &folder("1"), Some("none".into()));
        let sentence = open(&folder("2")).err().unwrap().to_string();
        assert!(sentence.contains("not those that they were made with"), "{sentence}");
        child_of("../0", &folder("1"), None);
        std::fs::remove_file(folder("2").join("parent")).unwrap();
        let sentence = open(&folder("2")).err().unwrap().to_string();
        assert!(sentence.contains("missing"), "{sentence}");
    }

    #[test]
    fn a_chain_that_comes_back_to_itself_ends() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("1");
        std::fs::create_dir(&folder).unwrap();
        child_of("../1", &folder, None);
        let sentence = open(&folder).err().unwrap().to_string();
        assert!(sentence.contains("come back to themselves"), "{sentence}");
    }

    #[test]
    fn a_set_that_is_written_without_a_parent_names_none() {
        let place = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", place.path().join("parent")).unwrap();
        let mut sink = FolderSink::open(place.path(), FolderOptions::default()).unwrap();
        sink.put("core-1.img", b"record").unwrap();
        sink.finish(Manifest::new("6.18", 4096)).unwrap();
        assert!(open(place.path()).unwrap().parent().is_none());
        // What is no link stays, and keeps a dump from naming a parent.
        std::fs::write(place.path().join("parent"), "mine").unwrap();
        for (parent, works) in [(None, true), (Some("../old".into()), false)] {
            let mut sink = FolderSink::open(place.path(), FolderOptions::default()).unwrap().with_parent(parent);
            assert_eq!(sink.put("core-1.img", b"record").is_ok(), works);
        }
        assert_eq!(std::fs::read(place.path().join("parent")).unwrap(), b"mine");
    }
}
