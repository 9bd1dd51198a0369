//! The image folder: one regular file an image, flat, as CRIU and containerd expect it.
//!
//! The folder is used through a descriptor, so that renaming its parents meanwhile does no harm. An image of the same name
//! that is there already is replaced by a new file, never written through, whatever it is linked to. An old `ferry.json` is
//! removed with the first image and the new one appears last and whole (`rename(2)`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use super::content::Content;
use super::copy::{copy_into_file, default_threads};
use super::manifest::{MANIFEST_NAME, Manifest};
use super::parent::{self, PARENT_LINK};
use super::sink::{Ledger, Sink, SinkError, chunked_digest, is_flat_name, record_digest, write_error};
use super::source::{RawRegion, Source, SourceError};
use crate::journal::Journal;

/// How a folder is written.
#[derive(Clone, Copy, Debug)]
pub struct FolderOptions {
    /// Wait until the images have reached the disk, each and at last the folder. Off, a crash of the machine soon after the
    /// dump may lose them.
    pub fsync: bool,
    /// Most threads that copy one large image, from 1 to 4.
    pub threads: usize,
}

impl Default for FolderOptions {
    fn default() -> Self {
        Self { fsync: false, threads: default_threads() }
    }
}

/// Writes an image set into a folder. Dropped before it is finished, it removes the images that it wrote.
pub struct FolderSink {
    folder: OwnedFd,
    options: FolderOptions,
    ledger: Ledger,
    /// Names of files made by this sink while the set is incomplete.
    made: Vec<String>,
    /// Where they are noted too, with the path of the folder.
    journal: Option<(Journal, PathBuf)>,
    /// Where the folder of the parent images is, seen from this one.
    parent: Option<PathBuf>,
}

/// The manifest until it is whole. Not a name that an image may have.
const UNFINISHED: &str = ".ferry.json.new";

impl FolderSink {
    /// Uses the folder at `path`, which must exist.
    ///
    /// # Errors
    /// [`SinkError::Folder`] if it is not a folder that can be opened and written to.
    pub fn open(path: &Path, options: FolderOptions) -> Result<Self, SinkError> {
        match open_folder(path) {
            Ok(folder) => Ok(Self::new(folder, options)),
            Err(source) => Err(SinkError::Folder { path: path.display().to_string(), source: source.into() }),
        }
    }

    /// Uses an open folder. Nothing in it is changed before the first image is written.
    pub fn new(folder: OwnedFd, options: FolderOptions) -> Self {
        Self { folder, options, ledger: Ledger::default(), made: Vec::new(), journal: None, parent: None }
    }

    /// Has the images noted in `journal` until the set is complete, so that somebody else can remove them if ferry is killed. `path` is
    /// the folder's.
    #[must_use]
    pub fn noted_in(mut self, journal: Option<Journal>, path: &Path) -> Self {
        self.journal = journal.map(|journal| (journal, path.to_owned()));
        self
    }

    /// Has the folder name `parent`, a path seen from it, as that of its parent images; without, it names none.
    #[must_use]
    pub fn with_parent(mut self, parent: Option<PathBuf>) -> Self {
        self.parent = parent;
        self
    }

    /// Makes the link to the parent, in place of one that may be there.
    fn link_parent(&mut self) -> Result<(), SinkError> {
        let failed = |source: Errno| SinkError::Create { name: PARENT_LINK.to_owned(), source: source.into() };
        // What is no link is somebody else's, and in the way only if a parent is wanted.
        if rustix::fs::readlinkat(&self.folder, PARENT_LINK, Vec::new()).is_ok() {
            remove(&self.folder, PARENT_LINK).map_err(failed)?;
        }
        let Some(parent) = &self.parent else { return Ok(()) };
        self.note(PARENT_LINK);
        rustix::fs::symlinkat(parent, &self.folder, PARENT_LINK).map_err(failed)?;
        self.made.push(PARENT_LINK.to_owned());
        Ok(())
    }

    fn note(&self, name: &str) {
        if let Some((journal, folder)) = &self.journal {
            journal.path(&folder.join(name));
        }
    }

    fn create(&mut self, name: &str) -> Result<File, SinkError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if self.made.is_empty() {
            remove(&self.folder, MANIFEST_NAME).map_err(|source| write_error(MANIFEST_NAME, source.into()))?;
            self.link_parent()?;
        }
        self.note(name);
        let file = remove(&self.folder, name)
            .and_then(|()| rustix::fs::openat(&self.folder, name, flags, Mode::RUSR | Mode::WUSR))
            .map_err(|source| SinkError::Create { name: name.to_owned(), source: source.into() })?;
        self.made.push(name.to_owned());
        Ok(File::from(file))
    }

    fn write(&mut self, name: &str, content: &[u8]) -> Result<(), SinkError> {
        let file = self.create(name)?;
        file.write_all_at(content, 0).and_then(|()| self.sync(&file)).map_err(|source| write_error(name, source))
    }

    fn sync(&self, file: impl AsFd) -> io::Result<()> {
        if self.options.fsync { rustix::fs::fsync(file).map_err(Into::into) } else { Ok(()) }
    }
}

/// Reads an image set from a folder.
pub struct FolderSource {
    folder: OwnedFd,
}

impl FolderSource {
    /// Uses the folder at `path`.
    ///
    /// # Errors
    /// [`SourceError::Folder`] if it is not a folder that can be opened.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        match open_folder(path) {
            Ok(folder) => Ok(Self::new(folder)),
            Err(source) => Err(SourceError::Folder { path: path.display().to_string(), source: source.into() }),
        }
    }

    /// Uses an open folder.
    pub fn new(folder: OwnedFd) -> Self {
        Self { folder }
    }
}

impl Source for FolderSource {
    fn parent(&self) -> Result<Option<Box<dyn Source>>, SourceError> {
        Ok(parent::open(&self.folder)?.map(|folder| Box::new(Self::new(folder)) as _))
    }

    fn names(&self) -> Result<Vec<String>, SourceError> {
        let failed = |source: Errno| SourceError::Folder { path: ".".to_owned(), source: source.into() };
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            names.extend(entry.file_name().to_str().ok().filter(|name| is_flat_name(name)).map(str::to_owned));
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Never follows a link, and never waits for the other end of a FIFO.
    fn find(&self, name: &str) -> Result<Option<RawRegion>, SourceError> {
        let name_owned = || name.to_owned();
        if !is_flat_name(name) {
            return Err(SourceError::Name { name: name_owned() });
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.folder, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(SourceError::Link { name: name_owned() }),
            // A socket, or a device without a driver.
            Err(Errno::NXIO | Errno::NODEV) => return Err(SourceError::NotRegular { name: name_owned() }),
            Err(error) => return Err(SourceError::read(name, error.into())),
            Ok(file) => File::from(file),
        };
        let metadata = file.metadata().map_err(|source| SourceError::read(name, source))?;
        if !metadata.is_file() {
            return Err(SourceError::NotRegular { name: name_owned() });
        }
        Ok(Some(RawRegion::new(Arc::new(file), 0, metadata.len())))
    }
}

fn open_folder(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn remove(folder: &OwnedFd, name: &str) -> Result<(), Errno> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

impl Sink for FolderSink {
    fn put(&mut self, name: &str, content: &[u8]) -> Result<(), SinkError> {
        self.ledger.admit(name)?;
        self.write(name, content)?;
        self.ledger.note(name, record_digest(content));
        Ok(())
    }

    fn put_raw(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError> {
        self.ledger.admit(name)?;
        let file = self.create(name)?;
        let digests = copy_into_file(name, content, &file, 0, self.options.threads)?;
        self.sync(&file).map_err(|source| write_error(name, source))?;
        self.ledger.note(name, chunked_digest(content.len(), digests));
        Ok(())
    }

    fn finish(&mut self, manifest: Manifest) -> Result<Manifest, SinkError> {
        let (manifest, bytes) = self.ledger.close(manifest)?;
        self.write(UNFINISHED, &bytes)?;
        self.note(MANIFEST_NAME);
        rustix::fs::renameat(&self.folder, UNFINISHED, &self.folder, MANIFEST_NAME)
            .map_err(io::Error::from)
            .and_then(|()| self.sync(&self.folder))
            .map_err(|source| write_error(MANIFEST_NAME, source))?;
        self.made.clear();
        if let Some((journal, _)) = &self.journal {
            journal.keep_paths();
        }
        Ok(manifest)
    }
}

impl Drop for FolderSink {
    fn drop(&mut self) {
        for name in self.made.drain(..) {
            if let Err(error) = remove(&self.folder, &name) {
                tracing::warn!(image = name, %error, "an image of the failed dump stays behind");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ImageSet;
    use super::super::digest::CHUNK;
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    fn pages() -> Vec<u8> {
        (0..11 * CHUNK + 4096).map(|at| (at ^ (at >> 11)) as u8).collect()
    }

    fn files(folder: &Path) -> Vec<String> {
        FolderSource::open(folder).unwrap().names().unwrap()
    }

    #[test]
    fn a_set_is_written_and_read_whatever_the_number_of_threads() {
        for (threads, fsync) in [(1, false), (4, true)] {
            let folder = tempfile::tempdir().unwrap();
            let mut sink = FolderSink::open(folder.path(), FolderOptions { fsync, threads }).unwrap();
            sink.put("core-1.img", b"record").unwrap();
            sink.put_raw("pages-1.img", &pages()).unwrap();
            assert_eq!(files(folder.path()), ["core-1.img", "pages-1.img"], "the manifest comes last");
            let manifest = sink.finish(Manifest::new("6.18", 4096)).unwrap();
            drop(sink);
            assert_eq!(files(folder.path()), ["core-1.img", MANIFEST_NAME, "pages-1.img"]);
            assert!(std::fs::read(folder.path().join("pages-1.img")).unwrap() == pages());
            let mode = folder.path().join("core-1.img").metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "memory may hold secrets");

            let set = ImageSet::open(Box::new(FolderSource::open(folder.path()).unwrap())).unwrap();
            assert_eq!(set.manifest(), Some(&manifest));
            assert!(set.bytes("pages-1.img").unwrap().unwrap() == pages());
        }
    }

    #[test]
    fn a_dropped_sink_leaves_nothing_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("notes"), "mine").unwrap();
        let mut sink = FolderSink::open(folder.path(), FolderOptions::default()).unwrap();
        sink.put("core-1.img", b"record").unwrap();
        drop(sink);
        assert_eq!(files(folder.path()), ["notes"]);
    }

    #[test]
    fn what_is_there_is_replaced_and_never_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let precious = folder.path().join("precious");
        std::fs::write(&precious, "precious").unwrap();
        std::fs::write(folder.path().join(MANIFEST_NAME), "old").unwrap();
        symlink(&precious, folder.path().join("core-1.img")).unwrap();
        std::fs::hard_link(&precious, folder.path().join("core-2.img")).unwrap();
        let mut sink = FolderSink::open(folder.path(), FolderOptions::default()).unwrap();
        assert!(folder.path().join(MANIFEST_NAME).exists(), "nothing is changed by opening");
        for name in ["core-1.img", "core-2.img"] {
            sink.put(name, b"record").unwrap();
            assert_eq!(std::fs::read(folder.path().join(name)).unwrap(), b"record");
        }
        assert!(!folder.path().join(MANIFEST_NAME).exists());
        assert_eq!(std::fs::read(&precious).unwrap(), b"precious");
    }

    #[test]
    fn names_and_orders_that_make_no_set_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = FolderSink::open(folder.path(), FolderOptions::default()).unwrap();
        for name in ["", ".", "..", "a/b", "/x", ".hidden", "nul\0", &"x".repeat(89)] {
            assert!(matches!(sink.put(name, b""), Err(SinkError::Name { .. })), "{name}");
        }
        sink.put("core-1.img", b"").unwrap();
        assert!(matches!(sink.put_raw("core-1.img", &Vec::new()), Err(SinkError::Duplicate { .. })));
        sink.finish(Manifest::new("6.18", 4096)).unwrap();
        assert!(matches!(sink.put("core-2.img", b""), Err(SinkError::Finished { .. })));
    }

    #[test]
    fn content_that_fails_stops_every_thread() {
        struct Failing;
        impl Content for Failing {
            fn len(&self) -> u64 {
                64 * CHUNK
            }
            fn read_at(&self, offset: u64, _: &mut [u8]) -> io::Result<()> {
                if offset < 20 * CHUNK { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let mut sink = FolderSink::open(folder.path(), FolderOptions { fsync: false, threads: 3 }).unwrap();
        let error = sink.put_raw("pages-1.img", &Failing).unwrap_err();
        assert!(matches!(error, SinkError::Content { offset, .. } if offset >= 20 * CHUNK), "{error}");
    }

    #[test]
    fn anything_but_regular_files_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        symlink("/etc/passwd", folder.path().join("core-1.img")).unwrap();
        std::fs::create_dir(folder.path().join("core-2.img")).unwrap();
        let fifo = folder.path().join("core-3.img");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        let _socket = UnixListener::bind(folder.path().join("core-4.img")).unwrap();
        let source = FolderSource::open(folder.path()).unwrap();
        assert!(matches!(source.find("core-1.img"), Err(SourceError::Link { .. })));
        for name in ["core-2.img", "core-3.img", "core-4.img"] {
            assert!(matches!(source.find(name), Err(SourceError::NotRegular { .. })), "{name}");
        }
        assert!(matches!(source.find("../core-1.img"), Err(SourceError::Name { .. })));
        assert!(source.find("core-5.img").unwrap().is_none());
    }
}
