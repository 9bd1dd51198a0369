//! Files opened by path: regular files, directories, the common character devices, and whatever is open with `O_PATH`.
//!
//! proc(5): a link in `/proc/PID/fd` is the path from the root of the file's mount namespace, whatever the process's own root,
//! followed by ` (deleted)` when that name is gone. statx(2) through the link tells inode and mount (Linux 5.8) without a duplicate.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, statx};

use super::session::{Done, Session, Temporary};
use super::{FilesOptions, Problem};
use crate::images::regfile::RegFileEntry;
use crate::namespaces::{Mount, MountTable};
use crate::sys::HostPid;

/// What is asked of every object by statx(2).
pub const STATX: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::MNT_ID);
const DELETED: &[u8] = b" (deleted)";
/// Major number of `/dev/null` and its like (mem(4)).
const MEM_MAJOR: u32 = 1;

/// A file as the kernel names it.
pub struct Found<'a> {
    /// The link in proc(5).
    pub name: &'a [u8],
    /// What it leads to.
    pub stat: &'a Statx,
    /// The mount it was opened on.
    pub mnt_id: i32,
    /// Status flags.
    pub flags: u32,
}

impl Found<'_> {
    fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.stat.stx_mode.into())
    }

    fn is_path_only(&self) -> bool {
        self.flags & libc::O_PATH as u32 != 0
    }
}

/// The name under which a file is saved.
pub struct Name {
    /// Path from the root of the mount namespace.
    pub path: Vec<u8>,
    /// The mount, when the tree has a mount namespace of its own.
    pub mnt_id: Option<i32>,
    /// The file is deleted: its content has to be saved.
    pub deleted: bool,
}

/// The mount namespace of the tree, as ferry looks into it.
pub struct Paths {
    mounts: MountTable,
    /// The root of that namespace, where it can be reached.
    root: Option<OwnedFd>,
    of_bundle: bool,
}

impl Paths {
    /// Looks into the mount namespace of the tree's first task.
    ///
    /// # Errors
    /// Those of reading `/proc/PID`: the process may be gone.
    pub fn of(pid: HostPid, options: &FilesOptions) -> io::Result<Self> {
        let mounts = MountTable::read(pid)?.without(&options.skipped_mounts);
        let root = if mounts.is_own() {
            Some("/".to_owned())
        } else {
            // A process that changed its root (chroot(2)) does not lead to the namespace's.
            let link = format!("/proc/{pid}/root");
            (std::fs::read_link(&link)?.as_os_str() == "/").then_some(link)
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = root.map(|root| rustix::fs::open(root, flags, Mode::empty())).transpose()?;
        Ok(Self { mounts, root, of_bundle: options.of_bundle })
    }

    /// Finds the name to save a file under, and makes sure that a restore will find the same file there.
    pub fn name(&self, found: &Found<'_>) -> Result<Name, Problem> {
        if !found.name.starts_with(b"/") {
            let kind = String::from_utf8_lossy(found.name).into_owned();
            return Err(Problem::new(
                format!("{kind} is of a kind that cannot be saved yet"),
                "have the program close it",
            ));
        }
        let is_memory_device = found.file_type() == FileType::CharacterDevice && found.stat.stx_rdev_major == MEM_MAJOR;
        if found.name.starts_with(b"/memfd:") && found.stat.stx_nlink == 0 {
            return Err(Problem::new("memory files (memfd_create) cannot be saved yet", "have the program close it"));
        }
        let Some(mount) = self.mounts.get(found.mnt_id) else {
            // Runtimes hand their own /dev/null in; the container's does as well.
            if is_memory_device {
                return Ok(Name { path: found.name.to_vec(), mnt_id: None, deleted: false });
            }
            let named = format!(", or name it with --external file[{:x}:{:x}]", found.mnt_id, found.stat.stx_ino);
            let named = if self.of_bundle { "" } else { &named };
            return Err(Problem::new(
                format!("the file lies outside the mounts of the tree (mount {})", found.mnt_id),
                format!("have the program close it{named}"),
            ));
        };
        let mnt_id = (!self.mounts.is_own()).then_some(found.mnt_id);
        let stripped = found.name.strip_suffix(DELETED);
        if mount.fs_type == "proc" {
            return match stripped {
                Some(_) => Err(Problem::new("it belongs to a process that has ended", "have the program close it")),
                None => Ok(Name { path: found.name.to_vec(), mnt_id, deleted: false }),
            };
        }
        if found.stat.stx_nlink == 0 {
            return Ok(Name { path: stripped.unwrap_or(found.name).to_vec(), mnt_id, deleted: true });
        }
        if self.leads_to(found.name, found.stat) {
            return Ok(Name { path: found.name.to_vec(), mnt_id, deleted: false });
        }
        Err(match stripped {
            Some(_) => Problem::new(
                format!("its name was deleted while {} other hard links remain", found.stat.stx_nlink),
                "have the program open the file again by a name that exists",
            ),
            None => Problem::new(
                "its path now leads to another file: something was mounted or put in its place",
                "have the program close the file, or unmount what covers it",
            ),
        })
    }

    /// The name of a terminal, and the devpts instance that it belongs to. The kernel makes slaves' names, so that one which is
    /// gone stands for its index; a terminal from outside the mounts keeps its name.
    pub fn terminal(&self, found: &Found<'_>, is_slave: bool) -> Result<(Name, u64), Problem> {
        let path = found.name.strip_suffix(DELETED).unwrap_or(found.name).to_vec();
        let mount = self.mounts.get(found.mnt_id);
        let mnt_id = mount.filter(|_| !self.mounts.is_own()).map(|mount| mount.id);
        let is_there = found.name.len() == path.len();
        if mount.is_some() && is_there && !self.leads_to(found.name, found.stat) {
            return Err(Problem::new(
                "its path now leads to another file: something was mounted or put in its place",
                "have the program close it, or unmount what covers it",
            ));
        }
        let own = libc::makedev(found.stat.stx_dev_major, found.stat.stx_dev_minor);
        let is_devpts = |mount: &&Mount| mount.fs_type == "devpts";
        // A node elsewhere stands for the instance that is mounted beside it (Documentation/filesystems/devpts.rst).
        let beside =
            || self.mounts.lookup(&Path::new(OsStr::from_bytes(&path)).parent()?.join("pts")).filter(is_devpts);
        let instance = match mount.filter(is_devpts) {
            None if !is_slave => beside().map_or(own, |mount| mount.device.to_stat()),
            _ => own,
        };
        Ok((Name { path, mnt_id, deleted: false }, instance))
    }

    /// The root of the tree's mount namespace, where it can be reached.
    pub fn root(&self) -> Option<BorrowedFd<'_>> {
        self.root.as_ref().map(AsFd::as_fd)
    }

    /// Whether the path leads to the inode. Where the root cannot be reached, the name's own ending has to do.
    fn leads_to(&self, path: &[u8], stat: &Statx) -> bool {
        let Some(root) = &self.root else { return !path.ends_with(DELETED) };
        let relative = if path == b"/" { &b"."[..] } else { &path[1..] };
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
        statx(root, relative, flags, StatxFlags::INO).is_ok_and(|there| {
            (there.stx_ino, there.stx_dev_major, there.stx_dev_minor)
                == (stat.stx_ino, stat.stx_dev_major, stat.stx_dev_minor)
        })
    }
}

/// Refuses devices that are more than a file: their drivers hold state of their own.
pub fn check_type(found: &Found<'_>) -> Result<(), Problem> {
    let stat = found.stat;
    let device = format!("{}:{}", stat.stx_rdev_major, stat.stx_rdev_minor);
    match found.file_type() {
        FileType::CharacterDevice if !found.is_path_only() => match stat.stx_rdev_major {
            MEM_MAJOR => Ok(()),
            _ => Err(Problem::new(
                format!("the driver of character device {device} holds state that cannot be saved"),
                "have the program close it",
            )),
        },
        FileType::BlockDevice if !found.is_path_only() => {
            Err(Problem::new(format!("open block devices cannot be saved ({device})"), "have the program close it"))
        }
        _ => Ok(()),
    }
}

/// The size to be checked at restore: none for logs, which others may write to meanwhile.
pub fn recorded_size(found: &Found<'_>) -> Option<u64> {
    let log = (libc::O_WRONLY | libc::O_APPEND) as u32;
    let checked = found.file_type() == FileType::RegularFile && found.flags & (libc::O_ACCMODE as u32 | log) != log;
    checked.then_some(found.stat.stx_size)
}

/// Flags to open a file with again: what open(2) itself consumed or would do a second time is left out.
pub fn open_flags(flags: u32) -> u32 {
    let temporary = (libc::O_TMPFILE & !libc::O_DIRECTORY) as u32;
    let mut kept = flags & !((libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC) as u32);
    if flags & temporary != 0 {
        kept &= !(libc::O_TMPFILE as u32);
    }
    // A terminal must not become the controlling one by the way.
    kept | libc::O_NOCTTY as u32
}

/// Opens the file at `path` as `entry` says, with the offset it had.
pub fn restore_regular(session: &mut Session<'_>, entry: &RegFileEntry, path: &[u8], cloexec: bool) -> Done<Temporary> {
    let flags = open_flags(entry.flags) | if cloexec { libc::O_CLOEXEC as u32 } else { 0 };
    let file = session.open(path, flags)?;
    if entry.size.is_some() || entry.mode.is_some() {
        session.check_file(file, entry.size, entry.mode)?;
    }
    if entry.pos != 0 && entry.pos != u64::MAX && entry.flags & libc::O_PATH as u32 == 0 {
        let seek = [file.number().into(), entry.pos, libc::SEEK_SET as u64];
        // Devices without an offset refuse, or have it at 0 whatever is asked.
        if entry.mode.is_some_and(|mode| mode & libc::S_IFMT == libc::S_IFCHR) {
            session.try_call(libc::SYS_lseek, &seek)?;
        } else {
            session.must("set its offset", libc::SYS_lseek, &seek)?;
        }
    }
    Ok(file)
}

/// Reads what a link of proc(5) leads to, for files that no descriptor holds: a directory, the executable, a mapping.
pub fn stat_link(directory: impl AsFd, link: &str) -> rustix::io::Result<Statx> {
    statx(directory, link, AtFlags::NO_AUTOMOUNT, STATX)
}
