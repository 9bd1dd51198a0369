//! The content of a tmpfs as a compressed tar.
//!
//! Names begin at the file system's root, which is `.`; times are exact and extended attributes kept, by pax headers; a file
//! of several names is one file and links to it. Sockets are left out: binding makes them again.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
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
/// The attribute's name, in pax headers, follows.
pub(super) const PAX_ATTRIBUTE: &str = "SCHILY.xattr.";

/// Packs the file system that `mount` shows.
pub fn pack(mount: &OwnedFd) -> io::Result<Vec<u8>> {
    let used = fstatfs(mount)?;
    let used = used.f_blocks.saturating_sub(used.f_bfree).saturating_mul(used.f_bsize as u64);
    let level = if used > COMPRESSED { Compression::none() } else { Compression::fast() };
    let mut packer = Packer { archive: Builder::new(GzEncoder::new(Vec::new(), level)), linked: HashMap::new() };
    let root = open_folder(mount.as_fd(), c".")?;
    packer.entry(&fstat(&root)?, Path::new("."), Some(root.as_fd()))?;
    packer.folder(&root, Path::new(""), 0)?;
    packer.archive.into_inner()?.finish()
}

struct Packer {
    archive: Builder<GzEncoder<Vec<u8>>>,
    /// Files of several names that were met, by inode.
    linked: HashMap<u64, PathBuf>,
}

fn open_folder(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::empty())?)
}

impl Packer {
    fn folder(&mut self, folder: &OwnedFd, path: &Path, depth: usize) -> io::Result<()> {
        if depth > DEEPEST {
            return Err(io::Error::other(format!("folders are nested deeper than {DEEPEST}: {}", path.display())));
        }
        for entry in Dir::read_from(folder)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                let path = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
                let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
                self.member(folder, name, &path, depth).map_err(named)?;
            }
        }
        Ok(())
    }

    fn member(&mut self, folder: &OwnedFd, name: &CStr, path: &Path, depth: usize) -> io::Result<()> {
        let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Socket {
            return Ok(());
        }
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.linked.get(&stat.st_ino) {
                let mut header = header(&stat, EntryType::Link);
                return self.archive.append_link(&mut header, path, Path::new(".").join(first));
            }
            self.linked.insert(stat.st_ino, path.to_owned());
        }
        match kind {
            FileType::Directory => {
                let folder = open_folder(folder.as_fd(), name)?;
                self.entry(&stat, path, Some(folder.as_fd()))?;
                self.folder(&folder, path, depth + 1)
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
                let mut file = File::from(openat(folder, name, flags, Mode::empty())?);
                self.extensions(&stat, Some(file.as_fd()))?;
                self.archive.append_file(path, &mut file)
            }
            FileType::Symlink => {
                let target = readlinkat(folder, name, Vec::new())?;
                self.extensions(&stat, None)?;
                let target = Path::new(std::ffi::OsStr::from_bytes(target.to_bytes()));
                self.archive.append_link(&mut header(&stat, EntryType::Symlink), path, target)
            }
            _ => self.entry(&stat, path, None),
        }
    }

    /// An entry without data.
    fn entry(&mut self, stat: &Stat, path: &Path, open: Option<BorrowedFd<'_>>) -> io::Result<()> {
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
        for name in open.map(attributes).transpose()?.unwrap_or_default() {
            let Some(open) = open else { continue };
            // The largest value of any attribute is 64 KiB (xattr(7)).
            let mut value = vec![0; 64 << 10];
            let length = fgetxattr(open, name.as_str(), &mut value)?;
            value.truncate(length);
            extensions.push((format!("{PAX_ATTRIBUTE}{name}"), value));
        }
        self.archive.append_pax_extensions(extensions.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
    }
}

/// Names of a file's extended attributes.
fn attributes(file: BorrowedFd<'_>) -> io::Result<Vec<String>> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 64 << 10];
    let names = match flistxattr(file, &mut buffer) {
        Ok((names, _)) => &*names,
        Err(rustix::io::Errno::OPNOTSUPP) => &[],
        Err(error) => return Err(error.into()),
    };
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
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
