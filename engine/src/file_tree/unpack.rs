//! Filling a new tmpfs from a compressed tar, which may be hostile.
//!
//! Every name is resolved from the file system's root and may neither leave it nor pass a link (openat2(2) with
//! `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, Linux 5.6), so that nothing outside can be touched. Ownership, mode and times are
//! those of the archive; times of folders are set last, since filling a folder changes them.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use flate2::read::MultiGzDecoder;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, chmodat,
    chownat, fsetxattr, linkat, makedev, mkdirat, mknodat, openat2, symlinkat, utimensat,
};
use tar::{Archive, Entry, EntryType};

use super::pack::PAX_ATTRIBUTE;

/// Most entries that are unpacked.
pub(super) const MOST: usize = 1 << 20;
/// How much of a file is copied at a time.
const BLOCK: usize = 64 << 10;

/// What an entry says of a file besides its content.
#[derive(Clone, Debug)]
pub(super) struct Attributes {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: Timespec,
    pub(super) extended: Vec<(String, Vec<u8>)>,
}

/// Unpacks the archive into the empty folder `root`.
pub(crate) fn unpack(archive: impl Read, root: &OwnedFd) -> io::Result<()> {
    let mut archive = Archive::new(MultiGzDecoder::new(archive));
    let mut folders: Vec<(PathBuf, Timespec)> = Vec::new();
    for (index, entry) in archive.entries()?.enumerate() {
        if index >= MOST {
            return Err(damaged("it has more entries than any real one"));
        }
        let mut entry = entry?;
        let path = confined(&entry.path_bytes())?;
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let attributes = attributes(&mut entry).map_err(named)?;
        let modified = attributes.modified;
        create(root, &path, &mut entry, &attributes).map_err(named)?;
        if entry.header().entry_type() == EntryType::Directory {
            folders.push((path, modified));
        }
    }
    // To the end, where the compressed stream's own length and checksum are.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    for (path, modified) in folders.iter().rev() {
        let folder = open_beneath(root.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        rustix::fs::futimens(&folder, &times(*modified))?;
    }
    Ok(())
}

pub(super) fn damaged(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the archive is damaged: {problem}"))
}

/// The path of an entry, as one that goes only downwards; empty for the root itself.
pub(super) fn confined(bytes: &[u8]) -> io::Result<PathBuf> {
    let mut path = PathBuf::new();
    for part in Path::new(OsStr::from_bytes(bytes)).components() {
        match part {
            Component::CurDir => {}
            Component::Normal(name) => path.push(name),
            _ => return Err(damaged(&format!("{:?} leads out of it", String::from_utf8_lossy(bytes)))),
        }
    }
    Ok(path)
}

pub(super) fn attributes(entry: &mut Entry<'_, impl Read>) -> io::Result<Attributes> {
    let header = entry.header();
    let id = |id: io::Result<u64>| u32::try_from(id?).map_err(|_| damaged("an owner's number is too large"));
    let mut attributes = Attributes {
        mode: header.mode()? & 0o7777,
        uid: id(header.uid())?,
        gid: id(header.gid())?,
        modified: Timespec { tv_sec: header.mtime()? as i64, tv_nsec: 0 },
        extended: Vec::new(),
    };
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        let key = extension.key().map_err(|_| damaged("a key is no text"))?;
        if key == "mtime" {
            let text = extension.value().unwrap_or_default();
            attributes.modified = time(text).ok_or_else(|| damaged("a time is no number"))?;
        } else if let Some(name) = key.strip_prefix(PAX_ATTRIBUTE) {
            attributes.extended.push((name.to_owned(), extension.value_bytes().to_vec()));
        }
    }
    Ok(attributes)
}

/// Seconds with a fraction of up to nine digits.
fn time(text: &str) -> Option<Timespec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = fraction.get(..fraction.len().min(9))?;
    let nanoseconds = digits.parse::<u32>().ok()? * 10_u32.pow(9 - digits.len() as u32);
    Some(Timespec { tv_sec: seconds.parse().ok()?, tv_nsec: nanoseconds.into() })
}

pub(super) fn open_beneath(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    Ok(openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

pub(super) fn times(modified: Timespec) -> Timestamps {
    Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: modified }
}

fn create(root: &OwnedFd, path: &Path, entry: &mut Entry<'_, impl Read>, attributes: &Attributes) -> io::Result<()> {
    let kind = entry.header().entry_type();
    let Some(name) = path.file_name() else {
        return match kind {
            EntryType::Directory => finish_folder(root, Path::new(""), attributes),
            _ => Err(damaged("its root is no folder")),
        };
    };
    let parent = path.parent().unwrap_or(Path::new(""));
    let parent = open_beneath(root.as_fd(), parent, OFlags::PATH | OFlags::DIRECTORY)?;
    if kind == EntryType::Directory {
        mkdirat(&parent, name, Mode::RWXU)?;
        return finish_folder(root, path, attributes);
    }
    make(&parent, name, entry, attributes, root)
}

/// Where a hard link leads to.
pub(super) fn link_target(entry: &Entry<'_, impl Read>) -> io::Result<PathBuf> {
    confined(&link(entry)?)
}

fn link(entry: &Entry<'_, impl Read>) -> io::Result<Vec<u8>> {
    Ok(entry.link_name_bytes().ok_or_else(|| damaged("a link has no target"))?.into_owned())
}

/// Makes what is no folder as `name` in `parent`, where nothing is; targets of hard links lie below `root`.
pub(super) fn make(
    parent: &OwnedFd,
    name: &OsStr,
    entry: &mut Entry<'_, impl Read>,
    attributes: &Attributes,
    root: &OwnedFd,
) -> io::Result<()> {
    let private = Mode::RUSR | Mode::WUSR;
    match entry.header().entry_type() {
        EntryType::Link => {
            let target = open_beneath(root.as_fd(), &link_target(entry)?, OFlags::PATH | OFlags::NOFOLLOW)?;
            return Ok(linkat(&target, "", parent, name, AtFlags::EMPTY_PATH)?);
        }
        EntryType::Symlink => symlinkat(OsStr::from_bytes(&link(entry)?), parent, name)?,
        EntryType::Char => mknodat(parent, name, FileType::CharacterDevice, private, number(entry)?)?,
        EntryType::Block => mknodat(parent, name, FileType::BlockDevice, private, number(entry)?)?,
        EntryType::Fifo => mknodat(parent, name, FileType::Fifo, private, 0)?,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::openat(parent, name, flags, private)?);
            copy(entry, &file)?;
            // A change of owner takes capabilities away.
            rustix::fs::fchown(&file, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))?;
            for (name, value) in &attributes.extended {
                fsetxattr(&file, name.as_str(), value, XattrFlags::empty())?;
            }
            rustix::fs::fchmod(&file, Mode::from_raw_mode(attributes.mode))?;
            return Ok(rustix::fs::futimens(&file, &times(attributes.modified))?);
        }
        other => return Err(damaged(&format!("an entry of kind {other:?}"))),
    }
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if entry.header().entry_type() != EntryType::Symlink {
        // The name was just made, and is no link: nobody else sees this file system yet.
        chmodat(parent, name, Mode::from_raw_mode(attributes.mode), AtFlags::empty())?;
    }
    utimensat(parent, name, &times(attributes.modified), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

pub(super) fn number(entry: &Entry<'_, impl Read>) -> io::Result<u64> {
    let (major, minor) = (entry.header().device_major()?, entry.header().device_minor()?);
    let missing = || damaged("a device has no number");
    Ok(makedev(major.ok_or_else(missing)?, minor.ok_or_else(missing)?))
}

fn finish_folder(root: &OwnedFd, path: &Path, attributes: &Attributes) -> io::Result<()> {
    attributes.set(&open_beneath(root.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY)?)
}

impl Attributes {
    /// Whether both are the same, times aside.
    pub(super) fn same_but_for_time(&self, other: &Self) -> bool {
        (self.mode, self.uid, self.gid) == (other.mode, other.uid, other.gid) && self.same_extended(&other.extended)
    }

    /// Whether the extended attributes are these, in whatever order.
    pub(super) fn same_extended(&self, other: &[(String, Vec<u8>)]) -> bool {
        let sorted = |list: &[(String, Vec<u8>)]| {
            let mut list = list.to_vec();
            list.sort_unstable();
            list
        };
        sorted(&self.extended) == sorted(other)
    }

    /// Gives them to a folder, times aside.
    pub(super) fn set(&self, folder: &OwnedFd) -> io::Result<()> {
        for (name, value) in &self.extended {
            fsetxattr(folder, name.as_str(), value, XattrFlags::empty())?;
        }
        rustix::fs::fchown(folder, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?;
        rustix::fs::fchmod(folder, Mode::from_raw_mode(self.mode))?;
        Ok(())
    }
}

/// Copies the content; blocks of zeros become holes, as they were or might have been.
fn copy(entry: &mut impl Read, file: &File) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    let mut offset = 0u64;
    loop {
        let mut length = 0;
        while length < BLOCK {
            match entry.read(&mut block[length..])? {
                0 => break,
                more => length += more,
            }
        }
        if length == 0 {
            break;
        }
        if block[..length].iter().any(|byte| *byte != 0) {
            file.write_all_at(&block[..length], offset)?;
        }
        offset += length as u64;
    }
    file.set_len(offset)
}

#[cfg(test)]
mod tests {
    use super::super::pack::pack;
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use tar::{Builder, Header};

    fn folder() -> (tempfile::TempDir, OwnedFd) {
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder on a tmpfs");
        let fd = File::open(folder.path()).expect("opens").into();
        (folder, fd)
    }

    #[test]
    fn a_packed_folder_comes_back() {
        let (from, from_fd) = folder();
        let at = |name: &str| from.path().join(name);
        std::fs::create_dir(at("d")).unwrap();
        std::fs::write(at("d/f"), "content").unwrap();
        std::fs::set_permissions(at("d/f"), std::fs::Permissions::from_mode(0o4751)).unwrap();
        std::fs::hard_link(at("d/f"), at("g")).unwrap();
        symlink("/nowhere/../else", at("s")).unwrap();
        let long = "x".repeat(200);
        std::fs::write(at(&long), "").unwrap();
        let sparse = File::create(at("sparse")).unwrap();
        sparse.write_all_at(b"end", 10 << 20).unwrap();
        mknodat(&from_fd, "null", FileType::CharacterDevice, Mode::RUSR, makedev(1, 3)).unwrap();
        mknodat(&from_fd, "fifo", FileType::Fifo, Mode::RUSR, 0).unwrap();
        fsetxattr(File::open(at("d/f")).unwrap(), "trusted.x", b"y", XattrFlags::empty()).unwrap();
        chownat(&from_fd, "s", Some(Uid::from_raw(7)), Some(Gid::from_raw(3_000_000)), AtFlags::SYMLINK_NOFOLLOW)
            .unwrap();
        let past = Timespec { tv_sec: 1_000_000_000, tv_nsec: 123_456_789 };
        utimensat(&from_fd, "d", &times(past), AtFlags::empty()).unwrap();
        utimensat(&from_fd, "d/f", &times(past), AtFlags::empty()).unwrap();

        let archive = pack(&from_fd).unwrap();
        let (to, to_fd) = folder();
        unpack(&archive[..], &to_fd).unwrap();

        let at = |name: &str| to.path().join(name);
        let meta = |name: &str| std::fs::symlink_metadata(at(name)).unwrap();
        assert_eq!(std::fs::read(at("d/f")).unwrap(), b"content");
        assert_eq!((meta("d/f").mode() & 0o7777, meta("d/f").ino()), (0o4751, meta("g").ino()));
        for name in ["d", "d/f"] {
            assert_eq!((meta(name).mtime(), meta(name).mtime_nsec()), (1_000_000_000, 123_456_789), "{name}");
        }
        assert_eq!(std::fs::read_link(at("s")).unwrap(), Path::new("/nowhere/../else"));
        assert_eq!((meta("s").uid(), meta("s").gid()), (7, 3_000_000));
        assert_eq!((meta("sparse").len(), meta("sparse").blocks() < 2000), ((10 << 20) + 3, true));
        assert_eq!(meta("null").rdev(), makedev(1, 3));
        assert!(meta("fifo").mode() & libc::S_IFMT == libc::S_IFIFO && at(&long).exists());
        let mut value = [0; 1];
        rustix::fs::getxattr(at("d/f"), "trusted.x", &mut value).unwrap();
        assert_eq!(&value, b"y");
    }

    fn hostile(path: &[u8], kind: EntryType, link: Option<&[u8]>) -> Vec<u8> {
        let mut archive = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        let mut add = |path: &[u8], kind: EntryType, link: Option<&[u8]>| {
            let mut header = Header::new_gnu();
            header.as_old_mut().name[..path.len()].copy_from_slice(path);
            header.set_entry_type(kind);
            if let Some(link) = link {
                header.set_link_name_literal(link).unwrap();
            }
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(0);
            header.set_cksum();
            archive.append(&header, io::empty()).unwrap();
        };
        add(b"out", EntryType::Symlink, Some(b"/tmp"));
        add(path, kind, link);
        archive.into_inner().unwrap().finish().unwrap()
    }

    #[test]
    fn names_and_links_that_lead_out_are_refused() {
        for (path, kind, link) in [
            (&b"../x"[..], EntryType::Regular, None),
            (b"/x", EntryType::Regular, None),
            (b"a/../../x", EntryType::Directory, None),
            (b"out/x", EntryType::Regular, None),
            (b"out", EntryType::Regular, None),
            (b"x", EntryType::Link, Some(&b"../../etc/passwd"[..])),
            (b"x", EntryType::Link, Some(b"/etc/passwd")),
            (b"x", EntryType::Link, Some(b"out/passwd")),
            (b"x", EntryType::Link, None),
            (b".", EntryType::Regular, None),
        ] {
            let (_to, to_fd) = folder();
            let result = unpack(&hostile(path, kind, link)[..], &to_fd);
            assert!(result.is_err(), "{:?}", String::from_utf8_lossy(path));
        }
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let (from, from_fd) = folder();
        std::fs::write(from.path().join("f"), vec![7; 100_000]).unwrap();
        let archive = pack(&from_fd).unwrap();
        for length in [0, 5, 20, archive.len() / 2, archive.len() - 1] {
            let (_to, to_fd) = folder();
            assert!(unpack(&archive[..length], &to_fd).is_err(), "{length}");
        }
    }
}
