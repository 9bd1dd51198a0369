//! A mount as images have it, to and from the kernel's description.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use crate::images::mnt::{FsType, MntEntry};
use crate::namespaces::mountinfo::{Device, Mount};

/// Longest path that an image may hold.
const LONGEST: usize = libc::PATH_MAX as usize;

/// One mount of the tree's namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// As the kernel describes it.
    pub mount: Mount,
    /// The key by which the restore is given it from outside.
    pub external: Option<String>,
    /// Of an external mount that was found by itself: its peers are the tree's own, not the outside's.
    pub peers_inside: bool,
}

/// How images call file systems.
const TYPES: &[(&str, FsType)] = &[
    ("proc", FsType::Proc),
    ("sysfs", FsType::Sysfs),
    ("devtmpfs", FsType::DevTmpfs),
    ("binfmt_misc", FsType::BinfmtMisc),
    ("tmpfs", FsType::Tmpfs),
    ("devpts", FsType::Devpts),
    ("simfs", FsType::Simfs),
    ("pstore", FsType::Pstore),
    ("securityfs", FsType::Securityfs),
    ("fusectl", FsType::Fusectl),
    ("debugfs", FsType::Debugfs),
    ("cgroup", FsType::Cgroup),
    ("aufs", FsType::Aufs),
    ("mqueue", FsType::Mqueue),
    ("fuse", FsType::Fuse),
    ("overlay", FsType::Overlayfs),
    ("autofs", FsType::Autofs),
    ("tracefs", FsType::Tracefs),
    ("cgroup2", FsType::Cgroup2),
];

impl Record {
    /// For `mountpoints-N.img`.
    pub fn to_image(&self) -> MntEntry {
        let mount = &self.mount;
        let kind = TYPES.iter().find(|(name, _)| *name == mount.fs_type).map_or(FsType::Unsupported, |(_, kind)| *kind);
        let mut flags = mount.flags;
        // Neither is what the kernel calls strictatime.
        if flags & (libc::MS_RELATIME | libc::MS_NOATIME) == 0 {
            flags |= libc::MS_STRICTATIME;
        }
        for (flag, set) in [
            (libc::MS_SHARED, mount.shared.is_some()),
            (libc::MS_SLAVE, mount.master.is_some()),
            (libc::MS_UNBINDABLE, mount.unbindable),
        ] {
            flags |= if set { flag } else { 0 };
        }
        let mut options = mount.options.clone();
        if kind == FsType::Devpts && mount.is_whole() {
            // Every devpts is an instance of its own since Linux 4.7; readers of images want to be told.
            options.push(if options.is_empty() { "newinstance" } else { ",newinstance" });
        }
        MntEntry {
            fstype: kind as u32,
            mnt_id: mount.id as u32,
            root_dev: mount.device.to_kernel(),
            parent_mnt_id: mount.parent as u32,
            flags: flags as u32,
            root: mount.root.as_os_str().as_bytes().to_vec(),
            mountpoint: mount.point.as_os_str().as_bytes().to_vec(),
            source: mount.source.as_bytes().to_vec(),
            options: options.into_vec(),
            shared_id: Some(mount.shared.unwrap_or(0)),
            master_id: Some(mount.master.unwrap_or(0)),
            sb_flags: Some(mount.super_flags as u32),
            ext_key: self.external.clone(),
            internal_sharing: self.peers_inside.then_some(true),
            deleted: mount.deleted.then_some(true),
            ..MntEntry::default()
        }
    }

    /// From `mountpoints-N.img`.
    ///
    /// # Errors
    /// What is wrong with it: paths must be absolute, without `..`, and not too long.
    pub fn from_image(entry: &MntEntry) -> Result<Self, String> {
        let point = image_path(&entry.mountpoint)?;
        let root = image_path(&entry.root).map_err(|error| format!("mount {}: {error}", point.display()))?;
        let kind = FsType::try_from(entry.fstype as i32).unwrap_or(FsType::Unsupported);
        let named = TYPES.iter().find(|(_, known)| *known == kind).map(|(name, _)| (*name).to_owned());
        let fs_type = match kind {
            FsType::Auto => entry.fsname.clone().unwrap_or_default(),
            _ => named.unwrap_or_else(|| "unsupported".into()),
        };
        let group = |id: Option<u32>| id.filter(|id| *id != 0);
        let flags = u64::from(entry.flags);
        let options = entry.options.split(|byte| *byte == b',').filter(|option| *option != b"newinstance");
        Ok(Self {
            mount: Mount {
                id: entry.mnt_id as i32,
                parent: entry.parent_mnt_id as i32,
                device: Device::from_kernel(entry.root_dev),
                root,
                deleted: entry.deleted.unwrap_or(false),
                point,
                flags: flags & !(libc::MS_SHARED | libc::MS_SLAVE | libc::MS_PRIVATE | libc::MS_UNBINDABLE),
                super_flags: entry.sb_flags.unwrap_or(0).into(),
                fs_type,
                source: OsString::from_vec(entry.source.clone()),
                options: OsString::from_vec(options.collect::<Vec<_>>().join(&b',')),
                shared: group(entry.shared_id),
                master: group(entry.master_id),
                unbindable: flags & libc::MS_UNBINDABLE != 0,
            },
            external: entry.ext_key.clone().filter(|key| !key.is_empty()),
            peers_inside: entry.internal_sharing.unwrap_or(false),
        })
    }

    /// For messages.
    pub fn name(&self) -> String {
        let point = self.mount.point.display();
        match self.mount.fs_type.as_str() {
            "unsupported" => format!("mount {point}"),
            kind => format!("mount {point} ({kind})"),
        }
    }
}

/// A path that an image names, which is absolute and goes only downwards.
fn image_path(bytes: &[u8]) -> Result<PathBuf, String> {
    // Old versions of the format begin with a dot.
    let bytes = bytes.strip_prefix(b".").unwrap_or(bytes);
    let path = Path::new(std::ffi::OsStr::from_bytes(bytes));
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || bytes.contains(&0) || bytes.len() >= LONGEST {
        return Err(format!("{:?} is no path of a mount: damaged image", String::from_utf8_lossy(bytes)));
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            mount: Mount {
                id: 5,
                parent: 3,
                device: Device { major: 0, minor: 42 },
                root: "/".into(),
                point: "/dev/pts".into(),
                flags: libc::MS_NOSUID | libc::MS_RELATIME,
                super_flags: libc::MS_RDONLY,
                fs_type: "devpts".into(),
                source: "devpts".into(),
                options: "gid=5,mode=620".into(),
                shared: Some(7),
                ..Mount::default()
            },
            ..Record::default()
        }
    }

    #[test]
    fn a_record_reads_back_as_written() {
        let image = record().to_image();
        assert_eq!(u64::from(image.flags), libc::MS_NOSUID | libc::MS_RELATIME | libc::MS_SHARED);
        assert_eq!(image.options, b"gid=5,mode=620,newinstance");
        assert_eq!(Record::from_image(&image), Ok(record()));
    }

    #[test]
    fn without_a_policy_times_are_strict() {
        let mut plain = record();
        plain.mount.flags = 0;
        assert_eq!(u64::from(plain.to_image().flags), libc::MS_STRICTATIME | libc::MS_SHARED);
    }

    #[test]
    fn paths_that_leave_the_tree_are_refused() {
        for path in [&b"/../etc"[..], b"/a/../b", b"a", b"", b"/a\0b", b"..", &[b'/'; 5000]] {
            let entry = MntEntry { mountpoint: path.to_vec(), ..record().to_image() };
            assert!(Record::from_image(&entry).is_err(), "{path:?}");
            let entry = MntEntry { root: path.to_vec(), ..record().to_image() };
            assert!(Record::from_image(&entry).is_err(), "{path:?}");
        }
    }
}
