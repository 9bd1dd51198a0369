//! A tree of files as a tar.
//!
//! Names begin at the file system's root, which is `.`; times are exact and extended attributes kept, by pax headers; a file
//! of several names is one file and links to it. Sockets are left out: binding makes them again.

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, fgetxattr, flistxattr, fstat, fstatfs, openat, readlinkat, statat,
};
use tar::{Builder, EntryType, Header};

/// Up to how many bytes of content are compressed; more would keep the tree stopped for too long.
const COMPRESSED: u64 = 8 << 20;
/// How deep folders may be nested: each takes a descriptor.
const DEEPEST: usize = 256;
/// The largest value of any attribute, and the longest list of names (xattr(7)).
const LARGEST_ATTRIBUTE: usize = 64 << 10;
/// The attribute's name, in pax headers, follows.
pub(super) const PAX_ATTRIBUTE: &str = "SCHILY.xattr.";

/// Packs the file system that `mount` shows, compressed, in memory.
pub(crate) fn pack(mount: &OwnedFd) -> io::Result<Vec<u8>> {
    let used = fstatfs(mount)?;
    let used = used.f_blocks.saturating_sub(used.f_bfree).saturating_mul(used.f_bsize as u64);
    let level = if used > COMPRESSED { Compression::none() } else { Compression::fast() };
    let mut packer = Packer::new(GzEncoder::new(Vec::new(), level), |archive, path, _, mut file| {
        archive.append_file(path, &mut file)
    });
    let root = open_folder(mount.as_fd(), c".")?;
    packer.entry(&fstat(&root)?, Path::new("."), Some(root.as_fd()))?;
    packer.folder(&root, Path::new(""), 0)?;
    packer.archive.into_inner()?.finish()
}

/// Adds a regular file to the archive, after its extended headers.
type Regular<W> = fn(&mut Builder<W>, &Path, Header, File) -> io::Result<()>;

/// Writes entries of an archive.
pub(super) struct Packer<W: Write> {
    pub(super) archive: Builder<W>,
    regular: Regular<W>,
    /// Files of several names that were met, by device and inode.
    linked: HashMap<(u64, u64), PathBuf>,
}

pub(super) fn open_folder(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::empty())?)
}

/// Calls `each` with the name and path of everything in `folder`, which is `path` in the archive; errors are told with the path.
pub(super) fn for_each(
    folder: &OwnedFd,
    path: &Path,
    depth: usize,
    mut each: impl FnMut(&CStr, &Path) -> io::Result<()>,
) -> io::Result<()> {
    if depth > DEEPEST {
        return Err(io::Error::other(format!("folders are nested deeper than {DEEPEST}: {}", path.display())));
    }
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            let path = path.join(OsStr::from_bytes(name.to_bytes()));
            each(name, &path).map_err(|error| named(&path, error))?;
        }
    }
    Ok(())
}

/// The error with the path in front, unless another path is.
fn named(path: &Path, error: io::Error) -> io::Error {
    let text = error.to_string();
    if text.starts_with(&format!("{}", path.display())) {
        return error;
    }
    io::Error::new(error.kind(), format!("{}: {text}", path.display()))
}

impl<W: Write> Packer<W> {
    pub(super) fn new(target: W, regular: Regular<W>) -> Self {
        Self { archive: Builder::new(target), regular, linked: HashMap::new() }
    }

    /// Everything in a folder.
    pub(super) fn folder(&mut self, folder: &OwnedFd, path: &Path, depth: usize) -> io::Result<()> {
        for_each(folder, path, depth, |name, path| match self.member(folder, name, path)? {
            Some(folder) => self.folder(&folder, path, depth + 1),
            None => Ok(()),
        })
    }

    /// One file of a folder; opened, if it is a folder itself.
    pub(super) fn member(&mut self, folder: &OwnedFd, name: &CStr, path: &Path) -> io::Result<Option<OwnedFd>> {
        let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Socket {
            return Ok(None);
        }
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let file = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.linked.get(&file) {
                let mut header = header(&stat, EntryType::Link);
                self.archive.append_link(&mut header, path, Path::new(".").join(first))?;
                return Ok(None);
            }
            self.linked.insert(file, path.to_owned());
        }
        match kind {
            FileType::Directory => {
                let folder = open_folder(folder.as_fd(), name)?;
                self.entry(&stat, path, Some(folder.as_fd()))?;
                return Ok(Some(folder));
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
                let file = File::from(openat(folder, name, flags, Mode::empty())?);
                self.extensions(&stat, Some(file.as_fd()))?;
                (self.regular)(&mut self.archive, path, header(&stat, EntryType::Regular), file)?;
            }
            FileType::Symlink => {
                let target = readlinkat(folder, name, Vec::new())?;
                self.extensions(&stat, None)?;
                let target = Path::new(OsStr::from_bytes(target.to_bytes()));
                self.archive.append_link(&mut header(&stat, EntryType::Symlink), path, target)?;
            }
            _ => self.entry(&stat, path, None)?,
        }
        Ok(None)
    }

    /// An entry without data.
    pub(super) fn entry(&mut self, stat: &Stat, path: &Path, open: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let (kind, has_number) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => (EntryType::Directory, false),
            FileType::CharacterDevice => (EntryType::Char, true),
            FileType::BlockDevice => (EntryType::Block, true),
            FileType::Fifo => (EntryType::Fifo, false),
            other => return Err(io::Error::other(format!("a file of an unknown kind ({other:?})"))),
        };
        let mut header = header(stat, kind);
        if has_number {
            header.set_device_major(libc::major(stat.st_rdev))?;
            header.set_device_minor(libc::minor(stat.st_rdev))?;
        }
        self.extensions(stat, open)?;
        self.archive.append_data(&mut header, path, io::empty())
    }

    /// What does not fit the header.
    fn extensions(&mut self, stat: &Stat, open: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut extensions =
            vec![("mtime".to_owned(), format!("{}.{:09}", stat.st_mtime, stat.st_mtime_nsec).into_bytes())];
        for (name, value) in open.map(attributes).transpose()?.unwrap_or_default() {
            extensions.push((format!("{PAX_ATTRIBUTE}{name}"), value));
        }
        self.archive.append_pax_extensions(extensions.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
    }
}

/// A file's extended attributes.
pub(super) fn attributes(file: BorrowedFd<'_>) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); LARGEST_ATTRIBUTE];
    let names = match flistxattr(file, &mut buffer) {
        Ok((names, _)) => &*names,
        Err(rustix::io::Errno::OPNOTSUPP) => &[],
        Err(error) => return Err(error.into()),
    };
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let name = String::from_utf8_lossy(name).into_owned();
            let mut value = vec![0; LARGEST_ATTRIBUTE];
            let length = fgetxattr(file, name.as_str(), &mut value)?;
            value.truncate(length);
            Ok((name, value))
        })
        .collect()
}

fn header(stat: &Stat, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(stat.st_mtime.max(0) as u64);
    header.set_size(0);
    header
}
