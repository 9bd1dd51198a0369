//! Descriptors of namespaces (namespaces(7)), by what they are and not by how they are called: one that is mounted somewhere,
//! as `ip netns` does it, has the mount's path for a name.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

/// `NSFS_MAGIC` (linux/magic.h).
const MAGIC: i64 = 0x6e73_6673;
/// `NS_GET_NSTYPE` (ioctl_nsfs(2), Linux 4.11).
const NS_GET_NSTYPE: u64 = 0xb703;

/// The kind of namespace that a descriptor is of, as its `CLONE_NEW*` flag; none when it is of none.
pub fn clone_flag(descriptor: impl AsFd) -> Option<u64> {
    let descriptor = descriptor.as_fd();
    if rustix::fs::fstatfs(descriptor).ok()?.f_type != MAGIC {
        return None;
    }
    // SAFETY: the descriptor is of a namespace, for which this takes no argument and changes nothing.
    let flag = unsafe { libc::ioctl(descriptor.as_raw_fd(), NS_GET_NSTYPE) };
    u64::try_from(flag).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn namespaces_are_told_apart() {
        let kind = |path: &str| clone_flag(File::open(path).unwrap());
        assert_eq!(kind("/proc/self/ns/net"), Some(libc::CLONE_NEWNET as u64));
        assert_eq!(kind("/proc/self/ns/uts"), Some(libc::CLONE_NEWUTS as u64));
        assert_eq!((kind("/dev/null"), kind("/proc/self/stat")), (None, None));
    }
}
