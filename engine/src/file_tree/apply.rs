//! Changing a folder that is in use as an archive of changes says.
//!
//! The archive may be hostile. All of it is checked before anything is changed; names are resolved below the folder, past no link
//! and into no other mount; and every change can be undone (`undo`). What is there already as it should be is left as it is, so
//! that changes that were never lost cost a comparison.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, mkdirat, open, openat, readlinkat, renameat, statat};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

use super::pack::{self, for_each};
use super::undo::Journal;
use super::unpack::{self, Attributes, MOST, confined, damaged, open_beneath};
use crate::images::{RawImage, RawRegion, SourceError};

/// Longest header of names and attributes.
const MOST_EXTENDED: u64 = 1 << 20;
/// The most that all files together may say they hold, holes included.
const MOST_CONTENT: u64 = 1 << 44;
/// How much of two files is compared at a time.
const BLOCK: usize = 256 << 10;

/// Changes of a folder, read and checked.
pub struct Changes {
    archive: Option<RawRegion>,
    /// What the archive holds: whether it is a folder.
    entries: BTreeMap<PathBuf, bool>,
    deleted: Vec<PathBuf>,
}

/// Changes that were made, until they are kept. Dropped, they are undone.
pub struct Applied {
    journal: Option<Journal>,
}

/// Why changes were not made. None is left then, unless it says so.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum ApplyError {
    /// The archive is not what was written.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The archive or the list cannot be accepted.
    #[error("cannot use {member} of the archive: {source}")]
    Member { member: &'static str, source: io::Error },
    /// The folder cannot be changed.
    #[error("cannot bring back the changes of the root file system {root}: {source}")]
    Change { root: PathBuf, source: io::Error },
    /// Nor could it be changed back.
    #[error("the changes of the root file system {root} could not be undone: {source}")]
    Undo { root: PathBuf, source: io::Error },
}

impl Changes {
    /// Verifies and reads an archive of changed files and a list of deleted ones (a JSON array of paths).
    ///
    /// # Errors
    /// [`ApplyError::Source`], [`ApplyError::Member`].
    pub fn read(archive: Option<&RawImage>, deleted: Option<&RawImage>) -> Result<Self, ApplyError> {
        let member = |member| move |source| ApplyError::Member { member, source };
        let mut changes = Self { archive: None, entries: BTreeMap::new(), deleted: Vec::new() };
        if let Some(archive) = archive {
            verify(archive)?;
            changes.entries = index(archive.region()).map_err(member(super::ROOTFS_DIFF))?;
            changes.archive = Some(archive.region().clone());
        }
        if let Some(list) = deleted {
            verify(list)?;
            changes.deleted =
                paths(&list.region().to_vec(super::DELETED_FILES)?).map_err(member(super::DELETED_FILES))?;
        }
        Ok(changes)
    }

    /// Makes the changes in the folder `root`.
    ///
    /// # Errors
    /// [`ApplyError::Change`], [`ApplyError::Undo`].
    pub fn apply(&self, root: &Path) -> Result<Applied, ApplyError> {
        let change = |source| ApplyError::Change { root: root.to_owned(), source };
        let folder = open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| change(error.into()))?;
        let mut work =
            Work { changes: self, journal: Journal::new(root, folder, std::process::id()), folders: Vec::new() };
        match work.run() {
            Ok(()) => Ok(Applied { journal: Some(work.journal) }),
            Err(source) => {
                work.journal.undo().map_err(|source| ApplyError::Undo { root: root.to_owned(), source })?;
                Err(change(source))
            }
        }
    }
}

impl Applied {
    /// Keeps the changes.
    ///
    /// # Errors
    /// [`ApplyError::Change`]: what the folder held before is still stored away in it.
    pub fn keep(mut self) -> Result<(), ApplyError> {
        let Some(journal) = self.journal.take() else { return Ok(()) };
        let root = journal.root.clone();
        journal.keep().map_err(|source| ApplyError::Change { root, source })
    }

    /// Undoes the changes.
    ///
    /// # Errors
    /// [`ApplyError::Undo`].
    pub fn undo(mut self) -> Result<(), ApplyError> {
        let Some(mut journal) = self.journal.take() else { return Ok(()) };
        journal.undo().map_err(|source| ApplyError::Undo { root: journal.root.clone(), source })
    }
}

impl Drop for Applied {
    fn drop(&mut self) {
        let Some(mut journal) = self.journal.take() else { return };
        if let Err(error) = journal.undo() {
            tracing::error!(root = %journal.root.display(), %error, "the changes of the root file system could not be undone");
        }
    }
}

/// A part of a file as a stream.
struct Stream<'a> {
    region: &'a RawRegion,
    position: u64,
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = (self.region.len().saturating_sub(self.position)).min(buffer.len() as u64) as usize;
        self.region.read_at(self.position, &mut buffer[..length])?;
        self.position += length as u64;
        Ok(length)
    }
}

impl Seek for Stream<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.region.len().checked_add_signed(by),
        };
        let past = || damaged("a size leads past its end");
        self.position = position.filter(|position| *position <= self.region.len()).ok_or_else(past)?;
        Ok(self.position)
    }
}

/// Checks that every chunk is as it was written.
fn verify(image: &RawImage) -> Result<(), SourceError> {
    let mut buffer = Vec::new();
    (0..image.chunk_count()).try_for_each(|chunk| image.read_chunk(chunk, &mut buffer).map(|_| ()))
}

/// Walks the archive and checks every entry of it.
fn index(region: &RawRegion) -> io::Result<BTreeMap<PathBuf, bool>> {
    let stream = || Stream { region, position: 0 };
    for entry in Archive::new(stream()).entries_with_seek()?.raw(true) {
        let header = entry?;
        let extended = !is_file(header.header().entry_type());
        if extended && header.header().entry_size()? > MOST_EXTENDED {
            return Err(damaged("a name is too long"));
        }
    }
    let mut entries = BTreeMap::new();
    let mut content = 0u64;
    for entry in Archive::new(stream()).entries_with_seek()? {
        let mut entry = entry?;
        let path = confined(&entry.path_bytes())?;
        let kind = entry.header().entry_type();
        let problem = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        unpack::attributes(&mut entry).map_err(problem)?;
        match kind {
            EntryType::Link => drop(unpack::link_target(&entry).map_err(problem)?),
            EntryType::Char | EntryType::Block => drop(unpack::number(&entry).map_err(problem)?),
            kind if is_file(kind) => {}
            _ => return Err(problem(damaged("an entry of an unknown kind"))),
        }
        if path.as_os_str().is_empty() && kind != EntryType::Directory {
            return Err(damaged("its root is no folder"));
        }
        content = content.saturating_add(entry.size());
        if entries.len() >= MOST || content > MOST_CONTENT {
            return Err(damaged("it holds more than any real one"));
        }
        entries.insert(path, kind == EntryType::Directory);
    }
    Ok(entries)
}

fn is_file(kind: EntryType) -> bool {
    use EntryType::{Block, Char, Continuous, Directory, Fifo, GNUSparse, Link, Regular, Symlink};
    matches!(kind, Regular | Continuous | GNUSparse | Directory | Link | Symlink | Char | Block | Fifo)
}

/// The paths of a list of deleted files, from the root on.
fn paths(list: &[u8]) -> io::Result<Vec<PathBuf>> {
    let list: Vec<String> = serde_json::from_slice(list)?;
    if list.len() > MOST {
        return Err(damaged("it lists more than any real one"));
    }
    let path = |path: &String| {
        let path = confined(path.trim_start_matches('/').as_bytes())?;
        if path.as_os_str().is_empty() { Err(damaged("it says that the root was deleted")) } else { Ok(path) }
    };
    list.iter().map(path).collect()
}

/// Changes being made.
struct Work<'a> {
    changes: &'a Changes,
    journal: Journal,
    /// Folders of the archive, whose times are set last.
    folders: Vec<(PathBuf, Attributes)>,
}

impl Work<'_> {
    fn run(&mut self) -> io::Result<()> {
        for path in &self.changes.deleted {
            self.delete(path).map_err(|error| at(path, error))?;
        }
        if let Some(region) = &self.changes.archive {
            for entry in Archive::new(Stream { region, position: 0 }).entries_with_seek()? {
                let mut entry = entry?;
                let path = confined(&entry.path_bytes())?;
                self.entry(&path, &mut entry, region).map_err(|error| at(&path, error))?;
            }
        }
        for (path, attributes) in std::mem::take(&mut self.folders).iter().rev() {
            let folder = open_beneath(self.journal.folder.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            self.journal.set_folder(&folder, path, attributes).map_err(|error| at(path, error))?;
        }
        Ok(())
    }

    /// Takes away what the archive does not have of a path that was deleted, and perhaps made again.
    fn delete(&mut self, path: &Path) -> io::Result<()> {
        let Some((parent, name)) = self.journal.parent_if_there(path)? else { return Ok(()) };
        let stat = match statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            stat => stat?,
        };
        match self.changes.entries.get(path) {
            None => self.journal.set_aside(path),
            Some(true) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                let folder =
                    openat(&parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
                let mut inside = Vec::new();
                for_each(&folder, path, path.components().count(), |_, path| {
                    inside.push(path.to_owned());
                    Ok(())
                })?;
                inside.iter().try_for_each(|path| self.delete(path))
            }
            Some(_) => Ok(()),
        }
    }

    fn entry(&mut self, path: &Path, entry: &mut Entry<'_, impl Read>, region: &RawRegion) -> io::Result<()> {
        self.journal.refuse_own(path)?;
        let attributes = unpack::attributes(entry)?;
        let Some(name) = path.file_name() else {
            self.journal.note_folder(path)?;
            self.folders.push((path.to_owned(), attributes));
            return Ok(());
        };
        let parent = self.journal.parent(path)?;
        let there = match statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error.into()),
        };
        if entry.header().entry_type() == EntryType::Directory {
            match there.map(|stat| FileType::from_raw_mode(stat.st_mode)) {
                Some(FileType::Directory) => self.journal.note_folder(path)?,
                other => {
                    if other.is_some() {
                        self.journal.set_aside(path)?;
                    }
                    self.journal.made(path)?;
                    mkdirat(&parent, name, Mode::RWXU)?;
                }
            }
            self.folders.push((path.to_owned(), attributes));
            return Ok(());
        }
        if let Some(stat) = &there {
            let place = Place { root: &self.journal.folder, parent: &parent, name, stat };
            if place.holds(entry, &attributes, region)? {
                return Ok(());
            }
        }
        let new = OsStr::new("new");
        let store = self.journal.store()?;
        unpack::make(&store, new, entry, &attributes, &self.journal.folder)?;
        if there.is_some() {
            self.journal.set_aside(path)?;
        }
        self.journal.made(path)?;
        Ok(renameat(&store, new, &parent, name)?)
    }
}

/// The error with the path in front.
fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", Path::new("/").join(path).display()))
}

/// A file that is there.
struct Place<'a> {
    root: &'a OwnedFd,
    parent: &'a OwnedFd,
    name: &'a OsStr,
    stat: &'a Stat,
}

impl Place<'_> {
    /// Whether it is just what the entry says, which is no folder.
    fn holds(&self, entry: &Entry<'_, impl Read>, attributes: &Attributes, region: &RawRegion) -> io::Result<bool> {
        let kind = entry.header().entry_type();
        let found = FileType::from_raw_mode(self.stat.st_mode);
        if kind == EntryType::Link {
            let target =
                open_beneath(self.root.as_fd(), &unpack::link_target(entry)?, OFlags::PATH | OFlags::NOFOLLOW)?;
            let target = rustix::fs::fstat(&target)?;
            return Ok((target.st_dev, target.st_ino) == (self.stat.st_dev, self.stat.st_ino));
        }
        let modified = (self.stat.st_mtime, self.stat.st_mtime_nsec as i64);
        let owned = (self.stat.st_uid, self.stat.st_gid) == (attributes.uid, attributes.gid);
        if !owned || modified != (attributes.modified.tv_sec, attributes.modified.tv_nsec) {
            return Ok(false);
        }
        if found != FileType::Symlink && self.stat.st_mode & 0o7777 != attributes.mode {
            return Ok(false);
        }
        Ok(match (kind, found) {
            (EntryType::Symlink, FileType::Symlink) => {
                let target = readlinkat(self.parent, self.name, Vec::new())?;
                entry.link_name_bytes().as_deref() == Some(target.to_bytes())
            }
            (EntryType::Fifo, FileType::Fifo) => true,
            (EntryType::Char, FileType::CharacterDevice) | (EntryType::Block, FileType::BlockDevice) => {
                unpack::number(entry)? == self.stat.st_rdev
            }
            (EntryType::Regular, FileType::RegularFile) if self.stat.st_size as u64 == entry.size() => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = std::fs::File::from(openat(self.parent, self.name, flags, Mode::empty())?);
                attributes.same_extended(&pack::attributes(file.as_fd())?)
                    && same_content(&file, region, entry.raw_file_position(), entry.size())?
            }
            _ => false,
        })
    }
}

fn same_content(file: &std::fs::File, region: &RawRegion, start: u64, length: u64) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let (mut here, mut there) = (vec![0; BLOCK], vec![0; BLOCK]);
    for offset in (0..length).step_by(BLOCK) {
        let size = (length - offset).min(BLOCK as u64) as usize;
        file.read_exact_at(&mut here[..size], offset)?;
        region.read_at(start + offset, &mut there[..size])?;
        if here[..size] != there[..size] {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::{ArchiveSink, ArchiveSource, ImageSet, Spool};
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use tar::{Builder, Header};

    /// An entry of an archive: name, kind, where a link leads to, content.
    type Line<'a> = (&'a [u8], EntryType, &'a [u8], &'a [u8]);

    fn diff(lines: &[Line]) -> Vec<u8> {
        let mut archive = Builder::new(Vec::new());
        for (path, kind, link, content) in lines {
            let mut header = Header::new_gnu();
            header.as_old_mut().name[..path.len()].copy_from_slice(path);
            header.set_entry_type(*kind);
            header.set_link_name_literal(link).unwrap();
            header.set_mode(0o755);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(7);
            header.set_size(content.len() as u64);
            header.set_cksum();
            archive.append(&header, *content).unwrap();
        }
        archive.into_inner().unwrap()
    }

    /// What an archive with these members says.
    fn changes(archive: &[u8], deleted: &str) -> Result<Changes, ApplyError> {
        let mut sink = ArchiveSink::new(Vec::new()).unwrap();
        sink.put_member("rootfs-diff.tar", archive).unwrap();
        sink.put_member("deleted.files", deleted.as_bytes()).unwrap();
        let source = ArchiveSource::spool(&sink.close().unwrap()[..], &Spool::Memory, 1 << 30).unwrap();
        let (diff, list) = (source.member("rootfs-diff.tar"), source.member("deleted.files"));
        let images = ImageSet::open(Box::new(source)).unwrap();
        let (diff, list) = (images.member("x", diff).unwrap(), images.member("y", list).unwrap());
        Changes::read(diff.as_ref(), list.as_ref())
    }

    const FILE: EntryType = EntryType::Regular;
    const FOLDER: EntryType = EntryType::Directory;
    const LINK: EntryType = EntryType::Link;

    #[test]
    fn what_leads_out_or_is_nonsense_is_refused_before_anything_changes() {
        let lines: [Line; 9] = [
            (b"../x", FILE, b"", b""),
            (b"/x", FILE, b"", b""),
            (b"a/../../x", FOLDER, b"", b""),
            (b"x", LINK, b"../../etc/passwd", b""),
            (b"x", LINK, b"/etc/passwd", b""),
            (b"x", LINK, b"", b""),
            (b".", FILE, b"", b""),
            (b"x", EntryType::new(b'V'), b"", b""),
            (b"x", EntryType::GNULongName, b"", &[b'x'; (MOST_EXTENDED + 1) as usize]),
        ];
        for line in lines {
            assert!(changes(&diff(&[line]), "[]").is_err(), "{}", String::from_utf8_lossy(line.0));
        }
        for list in ["", "{}", "[1]", "[\"/a/../../x\"]", "[\"/\"]", "[\"\"]"] {
            assert!(changes(&diff(&[]), list).is_err(), "{list}");
        }
        let whole = diff(&[(b"x", FILE, b"", &[1; 5000])]);
        for length in [100, 600, 4000] {
            assert!(changes(&whole[..length], "[]").is_err(), "{length}");
        }
    }

    #[test]
    fn links_of_the_root_are_not_followed() {
        let (outside, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("victim"), "safe").unwrap();
        symlink(outside.path(), root.path().join("out")).unwrap();
        let archives: [&[Line]; 4] = [
            &[(b"out/new", FILE, b"", b"x")],
            &[(b"out/victim", FILE, b"", b"x")],
            &[(b"name", LINK, b"out/victim", b"")],
            &[
                (b"in", EntryType::Symlink, outside.path().as_os_str().as_encoded_bytes(), b""),
                (b"in/victim", FILE, b"", b"x"),
            ],
        ];
        for lines in archives {
            let result = changes(&diff(lines), "[]").unwrap().apply(root.path());
            assert!(matches!(result, Err(ApplyError::Change { .. })), "{:?}", String::from_utf8_lossy(lines[0].0));
            assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "something is left");
        }
        changes(&diff(&[]), "[\"/out/victim\", \"/none/such\"]").unwrap().apply(root.path()).unwrap().keep().unwrap();
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        assert_eq!(fs::read(outside.path().join("victim")).unwrap(), b"safe");
        // What replaces the link stands where it was.
        let folder: [Line; 2] = [(b"out", FOLDER, b"", b""), (b"out/victim", FILE, b"", b"x")];
        changes(&diff(&folder), "[]").unwrap().apply(root.path()).unwrap().keep().unwrap();
        assert_eq!(fs::read(outside.path().join("victim")).unwrap(), b"safe");
        assert_eq!(fs::read(root.path().join("out/victim")).unwrap(), b"x");
    }

    /// Every file with its inode, times and content.
    fn listing(root: &Path) -> Vec<String> {
        let mut all = Vec::new();
        let mut open = vec![root.to_owned()];
        while let Some(path) = open.pop() {
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            let content = fs::read(&path).unwrap_or_default();
            let time = (meta.mtime(), meta.mtime_nsec());
            all.push(format!("{} {} {:o} {time:?} {content:?}", path.display(), meta.ino(), meta.mode()));
        }
        all.sort();
        all
    }

    #[test]
    fn changes_are_undone_unless_they_are_kept() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for folder in ["a/b", "gone/deep", "again/inside"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        for file in ["a/b/file", "gone/deep/file", "again/inside/old", "again/stays", "file"] {
            fs::write(at(file), file).unwrap();
        }
        let before = listing(root.path());
        let lines: [Line; 7] = [
            (b".", FOLDER, b"", b""),
            (b"a", FILE, b"", b"a folder once"),
            (b"file", FOLDER, b"", b""),
            (b"file/in", FILE, b"", b"in"),
            (b"again", FOLDER, b"", b""),
            (b"again/stays", FILE, b"", b"changed"),
            (b"again/name", LINK, b"again/stays", b""),
        ];
        let changes = changes(&diff(&lines), "[\"/gone\", \"/again\", \"/none\"]").unwrap();
        drop(changes.apply(root.path()).unwrap());
        assert_eq!(listing(root.path()), before, "dropped");
        changes.apply(root.path()).unwrap().undo().unwrap();
        assert_eq!(listing(root.path()), before, "undone");
        std::mem::forget(changes.apply(root.path()).unwrap());
        assert_ne!(listing(root.path()), before);
        crate::file_tree::take_back(root.path(), std::process::id() + 1).unwrap();
        assert_ne!(listing(root.path()), before, "another process");
        crate::file_tree::take_back(root.path(), std::process::id()).unwrap();
        assert_eq!(listing(root.path()), before, "taken back as if by another process");
        changes.apply(root.path()).unwrap().keep().unwrap();
        let names: Vec<_> =
            listing(root.path()).iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect();
        let expected = ["", "/a", "/again", "/again/name", "/again/stays", "/file", "/file/in"];
        assert_eq!(names, expected.map(|name| format!("{}{name}", root.path().display())));
        let kept = listing(root.path());
        changes.apply(root.path()).unwrap().keep().unwrap();
        assert_eq!(listing(root.path()), kept, "made once more");
        assert_eq!(fs::metadata(root.path()).unwrap().mtime(), 7);
    }
}
