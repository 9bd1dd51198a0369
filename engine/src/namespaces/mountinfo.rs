//! The mounts of a mount namespace, as a process in it sees them (proc_pid_mountinfo(5)).
//!
//! Kernel facts:
//! - mount points and roots have space, tab, newline, backslash and `#` written as three octal digits;
//! - the mount point is relative to the root directory of the process that is asked about, and mounts that this root does
//!   not reach are left out; a bind mount of a file that was unlinked since has a root that ends in `//deleted`;
//! - `/proc/PID/fd/N` read from another mount namespace shows the path from the root of that other namespace.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::procfs;
use crate::sys::HostPid;

/// Ends the root of a mount whose directory or file was unlinked.
const DELETED: &[u8] = b"//deleted";

/// A device number as `stat(2)` splits it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    /// Which driver, 0 for file systems without one.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl Device {
    /// The kernel's own form, 12 bits of major number above 20 of minor number, as images have it.
    pub fn to_kernel(self) -> u32 {
        self.major << 20 | self.minor & 0xf_ffff
    }

    /// From the kernel's own form.
    pub fn from_kernel(device: u32) -> Self {
        Self { major: device >> 20, minor: device & 0xf_ffff }
    }

    /// As `st_dev` of stat(2) has it.
    pub fn to_stat(self) -> u64 {
        libc::makedev(self.major, self.minor)
    }

    /// From `st_dev` of stat(2).
    pub fn from_stat(device: u64) -> Self {
        Self { major: libc::major(device), minor: libc::minor(device) }
    }
}

/// One mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// Its id, unique while it exists.
    pub id: i32,
    /// The id of the mount that it lies on; of one outside the table for the root.
    pub parent: i32,
    /// The file system's device.
    pub device: Device,
    /// Which directory or file of the file system is mounted.
    pub root: PathBuf,
    /// Whether `root` was unlinked since.
    pub deleted: bool,
    /// Where it is mounted, from the root of the process.
    pub point: PathBuf,
    /// `MS_*` flags of the mount.
    pub flags: u64,
    /// `MS_*` flags of the file system.
    pub super_flags: u64,
    /// Type of the file system, with a subtype after a dot.
    pub fs_type: String,
    /// What was given as its source.
    pub source: OsString,
    /// Options of the file system that are no flags, joined by commas.
    pub options: OsString,
    /// Peer group, if mounts and unmounts are shared with others.
    pub shared: Option<u32>,
    /// Peer group that mounts and unmounts come from.
    pub master: Option<u32>,
    /// Whether it may not be bind mounted.
    pub unbindable: bool,
}

/// Where a file lies, as images say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImagePath {
    /// The mount's id; none when the tree lives in ferry's own mount namespace.
    pub mnt_id: Option<i32>,
    /// The path from the namespace's root.
    pub path: PathBuf,
}

/// The mounts of one namespace.
#[derive(Clone, Debug, Default)]
pub struct MountTable {
    mounts: Vec<Mount>,
    by_id: HashMap<i32, usize>,
    own: bool,
}

impl MountTable {
    /// Reads the mounts that `pid` sees.
    ///
    /// # Errors
    /// Those of reading: the process may be gone. `InvalidData` when the kernel writes something else than proc(5) says.
    pub fn read(pid: HostPid) -> io::Result<Self> {
        let text = procfs::read(format!("/proc/{pid}/mountinfo"))?;
        let namespace = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/mnt"));
        let mut table = Self::parse(&text).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/mountinfo is not as proc(5) says"))
        })?;
        table.own = namespace(&pid.to_string())? == namespace("self")?;
        Ok(table)
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        Some(Self::new(lines.map(Mount::parse).collect::<Option<Vec<_>>>()?, false))
    }

    /// A table of the given mounts; `own` tells whether they are those of ferry's own namespace.
    pub fn new(mounts: Vec<Mount>, own: bool) -> Self {
        let by_id = mounts.iter().enumerate().map(|(index, mount)| (mount.id, index)).collect();
        Self { mounts, by_id, own }
    }

    /// The table without the mounts at these points, of which the root is none.
    pub fn without(self, points: &[PathBuf]) -> Self {
        let own = self.own;
        let stays = |mount: &Mount| mount.point.as_os_str() == "/" || !points.contains(&mount.point);
        Self::new(self.mounts.into_iter().filter(stays).collect(), own)
    }

    /// All mounts, in the kernel's order, which says nothing of what lies on what.
    pub fn mounts(&self) -> &[Mount] {
        &self.mounts
    }

    /// The mount with this id, as fdinfo(5) and statx(2) say it; none if it is not in this namespace or not reachable.
    pub fn get(&self, id: i32) -> Option<&Mount> {
        self.by_id.get(&id).map(|&index| &self.mounts[index])
    }

    /// Whether the namespace is ferry's own.
    pub fn is_own(&self) -> bool {
        self.own
    }

    /// The mount that is the root of the namespace: its parent is not in the table.
    pub fn root(&self) -> Option<&Mount> {
        self.mounts.iter().find(|mount| mount.id == mount.parent || self.get(mount.parent).is_none())
    }

    /// What images say of a file on mount `id`, which `/proc/PID/fd/N` (or `cwd`, `exe`, `map_files`) shows as `path`.
    ///
    /// Nothing when the mount is not in this namespace, or the file is not in any directory: such a file needs other means.
    /// A ` (deleted)` at the end is the caller's to take off.
    pub fn image_path(&self, id: i32, path: &Path) -> Option<ImagePath> {
        self.get(id)?;
        path.is_absolute().then(|| ImagePath { mnt_id: (!self.own).then_some(id), path: path.to_owned() })
    }

    /// The mount that `path` leads to: the one with the longest mount point, and of several over one another the topmost.
    pub fn lookup(&self, path: &Path) -> Option<&Mount> {
        let mut found: Option<&Mount> = None;
        for mount in self.mounts.iter().filter(|mount| path.starts_with(&mount.point)) {
            let better =
                found.is_none_or(|found| match mount.point.as_os_str().len().cmp(&found.point.as_os_str().len()) {
                    Ordering::Greater => true,
                    Ordering::Equal => self.lies_on(mount, found.id),
                    Ordering::Less => false,
                });
            if better {
                found = Some(mount);
            }
        }
        found
    }

    /// Whether `mount` lies on mount `id`, or on one that does, and so on.
    fn lies_on(&self, mount: &Mount, id: i32) -> bool {
        let mut parent = mount.parent;
        // No chain is longer than the table, whatever it says.
        for _ in 0..self.mounts.len() {
            if parent == id {
                return true;
            }
            match self.get(parent) {
                Some(next) if next.parent != parent => parent = next.parent,
                _ => return false,
            }
        }
        false
    }
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let mut next = || fields.next();
        let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<i32>().ok();
        let id = number(next()?)?;
        let parent = number(next()?)?;
        let (major, minor) = std::str::from_utf8(next()?).ok()?.split_once(':')?;
        let mut root = unescape(next()?);
        let deleted = root.ends_with(DELETED);
        if deleted {
            root.truncate(root.len() - DELETED.len());
        }
        let point = path(unescape(next()?));
        let (flags, _) = parse_options(next()?);
        let mut mount = Self {
            id,
            parent,
            device: Device { major: major.parse().ok()?, minor: minor.parse().ok()? },
            root: path(root),
            deleted,
            point,
            flags,
            ..Self::default()
        };
        loop {
            let field = std::str::from_utf8(next()?).ok()?;
            let (key, value) = field.split_once(':').unwrap_or((field, ""));
            match key {
                "-" => break,
                "shared" => mount.shared = value.parse().ok(),
                "master" => mount.master = value.parse().ok(),
                "unbindable" => mount.unbindable = true,
                // `propagate_from` follows from the master; what is unknown is to be ignored (proc(5)).
                _ => {}
            }
        }
        mount.fs_type = String::from_utf8(unescape(next()?)).ok()?;
        mount.source = OsString::from_vec(unescape(next()?));
        let (super_flags, options) = parse_options(next()?);
        mount.super_flags = super_flags;
        mount.options = OsString::from_vec(options);
        Some(mount)
    }

    /// Whether it shows the whole file system.
    pub fn is_whole(&self) -> bool {
        self.root == Path::new("/")
    }

    /// Whether two mounts show the same file system (perhaps different parts of it).
    pub fn same_file_system(&self, other: &Self) -> bool {
        self.device == other.device && self.fs_type == other.fs_type
    }

    /// The value of one of the file system's options.
    pub fn option(&self, key: &str) -> Option<&OsStr> {
        let options = self.options.as_bytes().split(|byte| *byte == b',');
        let mut values = options.filter_map(|option| option.strip_prefix(key.as_bytes())?.strip_prefix(b"="));
        values.next().map(OsStr::from_bytes)
    }
}

fn path(bytes: Vec<u8>) -> PathBuf {
    OsString::from_vec(bytes).into()
}

/// Undoes the kernel's escaping.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if first == b'\\' => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    bytes
}

/// Options that are flags of mount(2).
const FLAGS: &[(&[u8], u64)] = &[
    (b"ro", libc::MS_RDONLY),
    (b"nosuid", libc::MS_NOSUID),
    (b"nodev", libc::MS_NODEV),
    (b"noexec", libc::MS_NOEXEC),
    (b"sync", libc::MS_SYNCHRONOUS),
    (b"dirsync", libc::MS_DIRSYNC),
    (b"mand", libc::MS_MANDLOCK),
    (b"nosymfollow", libc::MS_NOSYMFOLLOW),
    (b"noatime", libc::MS_NOATIME),
    (b"nodiratime", libc::MS_NODIRATIME),
    (b"relatime", libc::MS_RELATIME),
    (b"strictatime", libc::MS_STRICTATIME),
    (b"lazytime", libc::MS_LAZYTIME),
];

/// Splits options into flags and the rest.
fn parse_options(field: &[u8]) -> (u64, Vec<u8>) {
    let mut flags = 0;
    let mut rest = Vec::new();
    for option in field.split(|byte| *byte == b',').filter(|option| *option != b"rw") {
        match FLAGS.iter().find(|(name, _)| *name == option) {
            Some((_, flag)) => flags |= flag,
            None => rest.push(unescape(option)),
        }
    }
    (flags, rest.join(&b','))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] =
        b"100 50 254:0 /rootfs / ro,nosuid,relatime shared:1 master:2 propagate_from:3 - ext4 /dev/a rw,discard
101 100 0:45 / /a\\040b\\134 rw,noexec - tmpfs none rw,size=65536k,mode=755
102 101 0:45 /x//deleted /a\\040b\\134/c rw unbindable - fuse.sshfs a\\011b ro,x=\\054
";

    #[test]
    fn fields_are_split_and_unescaped() {
        let table = MountTable::parse(TEXT).expect("parses");
        let root = table.root().expect("a root");
        assert_eq!((root.id, root.parent, root.device), (100, 50, Device { major: 254, minor: 0 }));
        assert_eq!(root.flags, libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_RELATIME);
        assert_eq!((root.shared, root.master, root.super_flags), (Some(1), Some(2), 0));
        assert_eq!((root.root.as_path(), root.options.as_bytes()), (Path::new("/rootfs"), &b"discard"[..]));
        let tmpfs = table.get(101).expect("the second");
        assert_eq!((tmpfs.point.as_path(), tmpfs.is_whole()), (Path::new("/a b\\"), true));
        assert_eq!((tmpfs.option("mode"), tmpfs.option("mod")), (Some(OsStr::new("755")), None));
        let bind = table.get(102).expect("the third");
        assert_eq!((bind.root.as_path(), bind.deleted, bind.unbindable), (Path::new("/x"), true, true));
        assert_eq!((bind.fs_type.as_str(), bind.source.as_bytes()), ("fuse.sshfs", &b"a\tb"[..]));
        assert_eq!((bind.super_flags, bind.options.as_bytes()), (libc::MS_RDONLY, &b"x=,"[..]));
    }

    #[test]
    fn a_path_belongs_to_the_longest_mount_point() {
        let table = MountTable::parse(TEXT).expect("parses");
        let id = |path: &str| table.lookup(Path::new(path)).map(|mount| mount.id);
        assert_eq!((id("/a b\\/c/d"), id("/a b\\/cc"), id("/a b"), id("x")), (Some(102), Some(101), Some(100), None));
    }

    #[test]
    fn of_mounts_over_one_another_the_topmost_is_seen() {
        let text = b"7 9 0:1 / /a rw - tmpfs x rw\n8 7 0:2 / /a rw - tmpfs x rw\n9 1 0:3 / / rw - ext4 x rw\n";
        let table = MountTable::parse(text).expect("parses");
        assert_eq!(table.lookup(Path::new("/a/b")).map(|mount| mount.id), Some(8));
        let reversed: Vec<Mount> = table.mounts.iter().rev().cloned().collect();
        assert_eq!(MountTable::new(reversed, false).lookup(Path::new("/a")).map(|mount| mount.id), Some(8));
    }

    #[test]
    fn image_paths_name_the_mount_only_in_a_namespace_of_its_own() {
        let mut table = MountTable::parse(TEXT).expect("parses");
        let file = Path::new("/a b\\/f");
        assert_eq!(table.image_path(101, file), Some(ImagePath { mnt_id: Some(101), path: file.into() }));
        assert_eq!(table.image_path(7, file), None);
        assert_eq!(table.image_path(101, Path::new("pipe:[1]")), None);
        table.own = true;
        assert_eq!(table.image_path(101, file), Some(ImagePath { mnt_id: None, path: file.into() }));
    }

    #[test]
    fn mounts_are_left_out_by_their_points() {
        let mount = |id, parent, point: &str| Mount { id, parent, point: point.into(), ..Mount::default() };
        let all = MountTable::new(vec![mount(1, 1, "/"), mount(2, 1, "/a"), mount(3, 2, "/a/b")], true);
        let kept = all.without(&["/a/".into(), "/".into()]);
        assert_eq!(kept.mounts().iter().map(|mount| mount.id).collect::<Vec<_>>(), [1, 3]);
        assert!(kept.is_own() && kept.get(2).is_none() && kept.get(3).is_some());
    }

    #[test]
    fn nonsense_is_not_a_table() {
        for text in ["x", "1 2 3:4 / / rw", "1 2 3 / / rw - a b c", "1 2 3:4 / / rw - ext4"] {
            assert!(MountTable::parse(text.as_bytes()).is_none(), "{text}");
        }
    }

    #[test]
    fn reads_this_process() {
        let table = MountTable::read(HostPid(std::process::id() as i32)).expect("mountinfo");
        assert!(table.is_own());
        assert_eq!(table.root().map(|root| root.point.clone()), Some("/".into()));
        assert_eq!(Device::from_kernel(Device { major: 254, minor: 7 }.to_kernel()).minor, 7);
    }
}
