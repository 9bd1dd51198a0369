//! What the upper layer of an overlay changes (Documentation/filesystems/overlayfs.rst of the kernel).
//!
//! The upper layer tells which names were changed; what they are now is read from the overlay itself, so that a file of
//! which only the metadata was copied up, or a folder that was renamed without its content, is read whole.
//!
//! - A device with the number 0:0, and an empty file with the attribute `overlay.whiteout` (Linux 6.7), hide what the lower
//!   layers have of this name.
//! - A folder with the attribute `overlay.opaque` hides what they have in it; one with `overlay.redirect` shows a folder of
//!   theirs from elsewhere.
//! - The attributes are in `trusted.`, or in `user.` when mounted with `userxattr`.

use std::ffi::{CStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fgetxattr, fstat, open, openat, statat};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::pack::{Packer, for_each, open_folder};
use super::tape::{Layout, Tape, packer};
use crate::namespaces::{Mount, MountTable, NamespaceKind, visit};
use crate::sys::{HostPid, pidfd};

/// The overlay that is the root of a container, with an upper layer.
pub struct Overlay {
    upper: OwnedFd,
    merged: OwnedFd,
    /// The lower layers, as far as their paths tell where they are.
    lower: Option<Vec<PathBuf>>,
    attributes: &'static str,
}

/// What the upper layer changes.
pub struct OverlayChanges {
    /// What was made or changed, as it is now.
    pub tape: Tape,
    /// What was deleted, with everything in it; from the root on, without a slash in front. Of a folder that was made again and is in
    /// the archive, what it had before.
    pub deleted: Vec<PathBuf>,
}

/// Why changes could not be read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum OverlayError {
    /// The mounts of the container could not be read.
    #[error("cannot look at the root file system of process {pid}: {source}")]
    Look { pid: HostPid, source: io::Error },
    /// The upper layer is not to be had.
    #[error("cannot open {path}, the writable layer of the container's root: {source}")]
    Upper { path: PathBuf, source: io::Error },
    /// A file is not to be had.
    #[error("cannot read the changes of the container's root: {source}")]
    Read { source: io::Error },
}

impl Overlay {
    /// The overlay that is the root of a process in a mount namespace of its own; none if its root is something else, or has no
    /// upper layer.
    ///
    /// # Errors
    /// [`OverlayError`].
    pub fn of(pid: HostPid) -> Result<Option<Self>, OverlayError> {
        let look = |source| OverlayError::Look { pid, source };
        let table = MountTable::read(pid).map_err(look)?;
        let Some(root) = table.lookup(Path::new("/")) else { return Ok(None) };
        let Some(upper) = root.option("upperdir") else { return Ok(None) };
        if table.is_own() || root.fs_type != "overlay" || !root.is_whole() {
            return Ok(None);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let upper = open(upper, flags, Mode::empty())
            .map_err(|error| OverlayError::Upper { path: upper.into(), source: error.into() })?;
        let process = pidfd::open(pid).map_err(|errno| look(errno.into()))?;
        let merged = visit(process.as_fd(), &[NamespaceKind::Mnt], copy_of_root).and_then(|copy| copy).map_err(look)?;
        if fstat(&merged).map_err(|error| look(error.into()))?.st_dev != root.device.to_stat() {
            return Err(look(io::Error::other("another file system is mounted there now")));
        }
        let user = root.options.as_bytes().split(|byte| *byte == b',').any(|option| option == b"userxattr");
        Ok(Some(Self {
            upper,
            merged,
            lower: lower_layers(root),
            attributes: if user { "user.overlay." } else { "trusted.overlay." },
        }))
    }

    /// Reads which files were changed, and as what. Their content is read with the tape; nothing may change meanwhile.
    ///
    /// # Errors
    /// [`OverlayError::Read`].
    pub fn changes(&self) -> Result<OverlayChanges, OverlayError> {
        self.collect().map_err(|source| OverlayError::Read { source })
    }

    fn collect(&self) -> io::Result<OverlayChanges> {
        let mut changes = Collector { overlay: self, packer: packer(), deleted: Vec::new() };
        let merged = open_folder(self.merged.as_fd(), c".")?;
        changes.packer.entry(&fstat(&merged)?, Path::new("."), Some(merged.as_fd()))?;
        changes.folder(&open_folder(self.upper.as_fd(), c".")?, &merged, Path::new(""), 0)?;
        Ok(OverlayChanges { tape: Tape::new(merged, changes.packer)?, deleted: changes.deleted })
    }

    /// The value of an attribute by which the overlay remembers something of a file of the upper layer.
    fn remembers(&self, file: BorrowedFd<'_>, what: &str) -> io::Result<Option<u8>> {
        let mut value = [0; 256];
        match fgetxattr(file, format!("{}{what}", self.attributes), &mut value) {
            Ok(_) => Ok(Some(value[0])),
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(None),
            Err(rustix::io::Errno::RANGE) => Ok(Some(value[0])),
            Err(error) => Err(error.into()),
        }
    }

    fn is_whiteout(&self, folder: &OwnedFd, name: &CStr, stat: &Stat) -> io::Result<bool> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice => Ok(stat.st_rdev == 0),
            FileType::RegularFile if stat.st_size == 0 => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat(folder, name, flags, Mode::empty())?;
                Ok(self.remembers(file.as_fd(), "whiteout")?.is_some())
            }
            _ => Ok(false),
        }
    }

    /// Whether a lower layer has something of this name; also if that is not known.
    fn is_below(&self, path: &Path) -> bool {
        let has = |layer: &PathBuf| layer.join(path).symlink_metadata().is_ok();
        self.lower.as_ref().is_none_or(|layers| layers.iter().any(has))
    }
}

struct Collector<'a> {
    overlay: &'a Overlay,
    packer: Packer<Layout>,
    deleted: Vec<PathBuf>,
}

impl Collector<'_> {
    /// `upper` is what the upper layer has of the folder `path`, `merged` what the overlay shows of it.
    fn folder(&mut self, upper: &OwnedFd, merged: &OwnedFd, path: &Path, depth: usize) -> io::Result<()> {
        for_each(upper, path, depth, |name, path| {
            let stat = statat(upper, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if self.overlay.is_whiteout(upper, name, &stat)? {
                self.deleted.push(path.to_owned());
                return Ok(());
            }
            let Some(shown) = self.packer.member(merged, name, path)? else { return Ok(()) };
            let own = open_folder(upper.as_fd(), name)?;
            let moved = self.overlay.remembers(own.as_fd(), "redirect")?.is_some();
            let hides = moved || self.overlay.remembers(own.as_fd(), "opaque")? == Some(b'y');
            if hides && self.overlay.is_below(path) {
                self.deleted.push(path.to_owned());
            }
            if moved { self.packer.folder(&shown, path, depth + 1) } else { self.folder(&own, &shown, path, depth + 1) }
        })
    }
}

/// A copy of the mount that is the root of this thread, without what is mounted on it.
fn copy_of_root() -> io::Result<OwnedFd> {
    Ok(open_tree(CWD, c"/", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?)
}

/// The paths of the lower layers; none if they are relative to where the mounter was, or not told.
fn lower_layers(mount: &Mount) -> Option<Vec<PathBuf>> {
    let mut layers = Vec::new();
    for option in mount.options.as_bytes().split(|byte| *byte == b',') {
        // One option with all of them, or one for each (Linux 6.7).
        if let Some(list) = option.strip_prefix(b"lowerdir=") {
            layers.extend(split_layers(list));
        } else if let Some(layer) = option.strip_prefix(b"lowerdir+=") {
            layers.push(path(layer.to_vec()));
        }
    }
    (!layers.is_empty() && layers.iter().all(|layer| layer.is_absolute())).then_some(layers)
}

/// Splits at colons that no backslash is in front of. What follows two colons has data only, and no names.
fn split_layers(list: &[u8]) -> Vec<PathBuf> {
    let mut layers = vec![Vec::new()];
    let mut bytes = list.iter();
    while let Some(byte) = bytes.next() {
        match (byte, layers.last_mut()) {
            (b':', Some(last)) if last.is_empty() => break,
            (b':', _) => layers.push(Vec::new()),
            (b'\\', Some(last)) => last.extend(bytes.next()),
            (byte, Some(last)) => last.push(*byte),
            (_, None) => {}
        }
    }
    layers.into_iter().filter(|layer| !layer.is_empty()).map(path).collect()
}

fn path(bytes: Vec<u8>) -> PathBuf {
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_layers_are_those_with_names() {
        let split = |text: &str| split_layers(text.as_bytes());
        assert_eq!(split("/a:/b\\:c:/d"), ["/a", "/b:c", "/d"].map(PathBuf::from));
        assert_eq!(split("/a::/data"), ["/a"].map(PathBuf::from));
        let mount = |options: &str| Mount { options: options.into(), ..Mount::default() };
        assert_eq!(lower_layers(&mount("lowerdir=l/A:l/B,upperdir=/u")), None);
        assert_eq!(
            lower_layers(&mount("lowerdir+=/a,lowerdir+=/b,upperdir=/u")),
            Some(vec![PathBuf::from("/a"), PathBuf::from("/b")])
        );
        assert_eq!(lower_layers(&mount("upperdir=/u")), None);
    }
}
