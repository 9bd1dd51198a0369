//! `tmpcopyup`: a tmpfs that begins with what the folder below it holds, as runc and crun know it and Podman's `--tmpfs` and
//! `--read-only` ask for it. libcontainer would hand the word to the kernel, which refuses it.
//!
//! The copy is made when the container has its mounts and its program has not begun. Nothing is followed out of either side:
//! openat2(2) with `RESOLVE_IN_ROOT` finds the two folders, and below them no link is followed and no mount entered, since what
//! is mounted in the tmpfs is somebody else's.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{Mount, Spec};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, chownat, fchmod,
    mkdirat, mknodat, openat2, readlinkat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

/// The option.
const OPTION: &str = "tmpcopyup";
/// How deep folders may be nested: each takes two descriptors.
const DEEPEST: usize = 128;

/// Takes the option out of the config's mounts; returns where they are.
pub fn take(spec: &mut Spec) -> Vec<PathBuf> {
    let mut points = Vec::new();
    for mount in spec.mounts_mut().iter_mut().flatten().filter(|mount| is_copied(mount)) {
        let options = mount.options().iter().flatten().filter(|option| *option != OPTION).cloned().collect();
        mount.set_options(Some(options));
        points.push(mount.destination().clone());
    }
    points
}

fn is_copied(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("tmpfs") && mount.options().iter().flatten().any(|option| option == OPTION)
}

/// Copies what `rootfs` has at each of these places to where the container with this process has its tmpfs.
///
/// # Errors
/// The place with the kernel's answer.
pub fn fill(points: &[PathBuf], rootfs: &Path, pid: i32) -> io::Result<()> {
    let inside = PathBuf::from(format!("/proc/{pid}/root"));
    for point in points {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", point.display()));
        let from = match open_root(rootfs, point) {
            // It is below another mount, of which the root file system knows nothing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            found => found.map_err(named)?,
        };
        let to = open_root(&inside, point).map_err(named)?;
        copy_attributes(&statat(&from, c"", AtFlags::EMPTY_PATH)?, to.as_fd()).map_err(|error| named(error.into()))?;
        copy(from, to, 0).map_err(named)?;
    }
    Ok(())
}

fn open_root(root: &Path, point: &Path) -> io::Result<OwnedFd> {
    let root = openat2(CWD, root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::empty())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat2(root, point, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)?)
}

fn open_below(folder: BorrowedFd<'_>, name: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let mode = if flags.contains(OFlags::CREATE) { Mode::RUSR | Mode::WUSR } else { Mode::empty() };
    openat2(folder, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, mode, resolve)
}

/// Copies what is in a folder. What the other has already was made for a mount.
fn copy(from: OwnedFd, to: OwnedFd, depth: usize) -> io::Result<()> {
    if depth > DEEPEST {
        return Err(io::Error::other(format!("folders are nested deeper than {DEEPEST}")));
    }
    for entry in Dir::read_from(&from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        match copy_one(&from, &to, name, depth) {
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::EXIST | Errno::XDEV)) => {}
            done => done?,
        }
    }
    Ok(())
}

fn copy_one(from: &OwnedFd, to: &OwnedFd, name: &CStr, depth: usize) -> io::Result<()> {
    let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let source = open_below(from.as_fd(), name, OFlags::RDONLY | OFlags::DIRECTORY)?;
            match mkdirat(to, name, Mode::RWXU) {
                Err(Errno::EXIST) => {}
                made => made?,
            }
            let target = open_below(to.as_fd(), name, OFlags::RDONLY | OFlags::DIRECTORY)?;
            let again = target.try_clone()?;
            copy(source, target, depth + 1)?;
            copy_attributes(&stat, again.as_fd())?;
        }
        FileType::RegularFile => {
            let source = open_below(from.as_fd(), name, OFlags::RDONLY)?;
            let target = open_below(to.as_fd(), name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?;
            let mut target = File::from(target);
            io::copy(&mut File::from(source), &mut target)?;
            copy_attributes(&stat, target.as_fd())?;
        }
        FileType::Symlink => {
            symlinkat(readlinkat(from, name, Vec::new())?, to, name)?;
            chownat(to, name, Some(owner(&stat).0), Some(owner(&stat).1), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        kind @ (FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice) => {
            mknodat(to, name, kind, Mode::from_raw_mode(stat.st_mode), stat.st_rdev)?;
            chownat(to, name, Some(owner(&stat).0), Some(owner(&stat).1), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        // A socket is its server's; nothing else is in file systems.
        _ => {}
    }
    Ok(())
}

fn owner(stat: &Stat) -> (Uid, Gid) {
    (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid))
}

/// Owner, mode and times; in this order, since a change of the owner clears bits of the mode.
fn copy_attributes(stat: &Stat, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let (uid, gid) = owner(stat);
    rustix::fs::fchown(target, Some(uid), Some(gid))?;
    fchmod(target, Mode::from_raw_mode(stat.st_mode))?;
    let time = |seconds: i64, nanoseconds: u64| Timespec { tv_sec: seconds, tv_nsec: nanoseconds as i64 };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    utimensat(target, c"", &times, AtFlags::EMPTY_PATH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_option_is_taken_out() {
        let mut spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "mounts": [
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["rw", "tmpcopyup", "nosuid"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]}
            ]
        }))
        .unwrap();
        assert_eq!(take(&mut spec), [PathBuf::from("/tmp")]);
        assert_eq!(spec.mounts().as_ref().unwrap()[0].options().as_ref().unwrap(), &["rw", "nosuid"]);
        assert!(take(&mut spec).is_empty());
    }

    #[test]
    fn a_folder_is_copied_around_what_is_there() {
        let place = tempfile::tempdir().unwrap();
        let (from, to) = (place.path().join("from"), place.path().join("to"));
        std::fs::create_dir_all(from.join("a/b")).unwrap();
        std::fs::create_dir_all(to.join("a")).unwrap();
        for (name, text) in [("file", "new"), ("a/b/deep", "deep"), ("taken", "new")] {
            std::fs::write(from.join(name), text).unwrap();
        }
        std::fs::write(to.join("taken"), "old").unwrap();
        std::fs::set_permissions(from.join("file"), std::fs::Permissions::from_mode(0o4751)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", from.join("link")).unwrap();
        let root = Path::new("/");
        copy(open_root(root, &from).unwrap(), open_root(root, &to).unwrap(), 0).unwrap();
        let text = |name: &str| std::fs::read_to_string(to.join(name)).unwrap();
        assert_eq!((text("file"), text("a/b/deep"), text("taken")), ("new".into(), "deep".into(), "old".into()));
        assert_eq!(to.join("file").metadata().unwrap().permissions().mode() & 0o7777, 0o4751);
        assert_eq!(std::fs::read_link(to.join("link")).unwrap(), Path::new("/etc/passwd"));
    }
}
