//! Mount points that the root file system lacks, made before a restore.
//!
//! A container is often restored over a fresh root file system, one that no runtime has prepared: from an archive on
//! another host, or over an image's untouched layers. What was mounted on folders and files that the runtime had made
//! then needs them again, as runc makes them too. Nothing is made below a mount whose content comes back with the
//! images (tmpfs) or from the kernel; below a bind mount it is made in what is bound.
//!
//! The root file system is the container's own work, so no link in it is followed out of it: every step is openat2(2)
//! with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS` (Linux 5.6) along a path whose links were read before.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::Spec;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, mkdirat, open, openat2, unlinkat};
use rustix::io::Errno;

use crate::externals;
use crate::failure::Failure;
use crate::janitor::{Janitor, Kind};

/// Mount points that were made; removed again when dropped, unless they are kept.
pub struct Mountpoints<'a> {
    /// The folder that each was made in, its name, and whether it is a folder itself; in the order of their making.
    made: Vec<(OwnedFd, OsString, AtFlags)>,
    janitor: Option<&'a Janitor>,
}

impl<'a> Mountpoints<'a> {
    /// Makes the mount points of the config's mounts that are missing in the root file system, or in what is bound into it. The
    /// janitor is told of them.
    ///
    /// # Errors
    /// When one cannot be made; then those made before it are gone again.
    pub fn make(spec: &Spec, bundle: &Path, rootfs: &Path, janitor: Option<&'a Janitor>) -> Result<Self, Failure> {
        let mut points = Self { made: Vec::new(), janitor };
        // What is mounted so far, by its place in the container: a folder of the host, or content that comes by itself.
        let mut mounted: BTreeMap<PathBuf, Option<PathBuf>> = [(PathBuf::from("/"), Some(rootfs.to_owned()))].into();
        for mount in spec.mounts().iter().flatten() {
            let source = mount.source().as_ref().filter(|_| externals::is_bind(mount)).map(|path| bundle.join(path));
            let place = externals::place(rootfs, mount.destination());
            let is_file = source.as_ref().is_some_and(|path| path.exists() && !path.is_dir());
            let below = place.ancestors().find_map(|folder| Some((folder, mounted.get(folder)?)));
            if let Some((folder, Some(base))) = below
                && let Ok(path) = place.strip_prefix(folder)
                && base.is_dir()
            {
                points.add(base, path, is_file).map_err(|error| {
                    Failure::from(error).context(format!(
                        "the mount point {} is missing and cannot be made in {}",
                        place.display(),
                        base.display()
                    ))
                })?;
            }
            mounted.insert(place, source);
        }
        Ok(points)
    }

    /// Makes `path` below `base`, and the folders on the way to it.
    fn add(&mut self, base: &Path, path: &Path, is_file: bool) -> io::Result<()> {
        let mut folder = open(base, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let mut names = path.components().map(|component| component.as_os_str()).peekable();
        while let Some(name) = names.next() {
            let is_last = names.peek().is_none();
            let next = match open_in(&folder, name) {
                Err(Errno::NOENT) => self.add_one(&folder, name, is_last && is_file)?,
                found => found?,
            };
            folder = next;
        }
        Ok(())
    }

    fn add_one(&mut self, folder: &OwnedFd, name: &OsStr, is_file: bool) -> io::Result<OwnedFd> {
        if let Some(janitor) = self.janitor {
            let kind = if is_file { Kind::File } else { Kind::Directory };
            janitor.name(folder.as_fd(), name, kind, None)?;
        }
        if is_file {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            drop(openat2(folder, name, flags, Mode::from_raw_mode(0o644), confined())?);
        } else {
            mkdirat(folder, name, Mode::from_raw_mode(0o755))?;
        }
        let how = if is_file { AtFlags::empty() } else { AtFlags::REMOVEDIR };
        self.made.push((folder.try_clone()?, name.to_owned(), how));
        Ok(open_in(folder, name)?)
    }

    /// Keeps what was made.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Mountpoints<'_> {
    fn drop(&mut self) {
        for (folder, name, how) in self.made.drain(..).rev() {
            let _ = unlinkat(folder, name, how);
        }
    }
}

fn confined() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

fn open_in(folder: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    openat2(folder, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), confined())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(mounts: serde_json::Value) -> Spec {
        let config = serde_json::json!({"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "mounts": mounts});
        serde_json::from_value(config).unwrap()
    }

    #[test]
    fn what_is_missing_is_made_and_taken_back() {
        let bundle = tempfile::tempdir().unwrap();
        let rootfs = bundle.path().join("rootfs");
        std::fs::create_dir_all(rootfs.join("run")).unwrap();
        std::fs::create_dir(bundle.path().join("data")).unwrap();
        std::fs::write(bundle.path().join("hosts"), "").unwrap();
        let spec = spec(serde_json::json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/shm", "type": "bind", "source": "data", "options": ["rbind"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "hosts", "options": ["bind"]},
            {"destination": "/data", "type": "bind", "source": "data", "options": ["rbind"]},
            {"destination": "/data/deep/file", "type": "bind", "source": "hosts", "options": ["bind"]}
        ]));
        let made = Mountpoints::make(&spec, bundle.path(), &rootfs, None).unwrap();
        assert!(rootfs.join("proc").is_dir() && rootfs.join("dev").is_dir() && rootfs.join("data").is_dir());
        assert!(rootfs.join("etc/hosts").is_file() && bundle.path().join("data/deep/file").is_file());
        assert!(!rootfs.join("dev/shm").exists() && !rootfs.join("data/deep").exists());
        drop(made);
        let left: Vec<_> = std::fs::read_dir(&rootfs).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["run"]);
        assert_eq!(std::fs::read_dir(bundle.path().join("data")).unwrap().count(), 0);
        Mountpoints::make(&spec, bundle.path(), &rootfs, None).unwrap().keep();
        assert!(rootfs.join("etc/hosts").exists());
    }

    #[test]
    fn links_do_not_lead_out() {
        let bundle = tempfile::tempdir().unwrap();
        let (rootfs, outside) = (bundle.path().join("rootfs"), bundle.path().join("outside"));
        std::fs::create_dir_all(rootfs.join("real")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, rootfs.join("absolute")).unwrap();
        std::os::unix::fs::symlink("../outside", rootfs.join("up")).unwrap();
        std::os::unix::fs::symlink("/real", rootfs.join("inside")).unwrap();
        let spec = spec(serde_json::json!([
            {"destination": "/absolute/a", "type": "tmpfs"},
            {"destination": "/up/b", "type": "tmpfs"},
            {"destination": "/inside/c", "type": "tmpfs"}
        ]));
        Mountpoints::make(&spec, bundle.path(), &rootfs, None).unwrap().keep();
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        assert!(rootfs.join("real/c").is_dir() && rootfs.join("outside/b").is_dir());
    }
}
