//! The kinds of namespaces, and the numbers that images give to them (namespaces(7)).

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags, openat, statat};

use crate::images::ids::TaskKobjIdsEntry;
use crate::sys::HostPid;

/// A kind of namespace, in the order in which images number those of one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "they are the kernel's")]
pub enum NamespaceKind {
    Pid,
    Net,
    Ipc,
    Uts,
    Time,
    Mnt,
    User,
    Cgroup,
}

/// How many kinds there are.
pub const KINDS: usize = NamespaceKind::ALL.len();

impl NamespaceKind {
    /// Every kind, in order.
    pub const ALL: &'static [Self] =
        &[Self::Pid, Self::Net, Self::Ipc, Self::Uts, Self::Time, Self::Mnt, Self::User, Self::Cgroup];

    /// Its file in `/proc/PID/ns`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pid => "pid",
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Time => "time",
            Self::Mnt => "mnt",
            Self::User => "user",
            Self::Cgroup => "cgroup",
        }
    }

    /// Its `CLONE_NEW*` flag.
    pub const fn clone_flag(self) -> u64 {
        let flag = match self {
            Self::Pid => libc::CLONE_NEWPID,
            Self::Net => libc::CLONE_NEWNET,
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Uts => libc::CLONE_NEWUTS,
            Self::Time => 0x80,
            Self::Mnt => libc::CLONE_NEWNS,
            Self::User => libc::CLONE_NEWUSER,
            Self::Cgroup => libc::CLONE_NEWCGROUP,
        };
        flag as u32 as u64
    }

    /// The file that shows what children will be put into, where that can differ.
    const fn for_children(self) -> Option<&'static str> {
        match self {
            Self::Pid => Some("pid_for_children"),
            Self::Time => Some("time_for_children"),
            _ => None,
        }
    }
}

/// The namespaces of a task, by inode; 0 where the kernel has no such kind.
pub(super) type Inodes = [u64; KINDS];

/// The namespaces of a task, and those kinds whose children would be put into another.
///
/// # Errors
/// Those of the system calls: the task is gone, or a zombie, which is in no namespace.
pub(super) fn inodes(pid: HostPid) -> io::Result<(Inodes, Vec<NamespaceKind>)> {
    let folder: OwnedFd = openat(
        rustix::fs::CWD,
        format!("/proc/{pid}/ns"),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let inode = |name: &str| match statat(&folder, name, AtFlags::empty()) {
        Ok(stat) => Ok(stat.st_ino),
        // A kind that this kernel lacks, or a namespace for children that has no init yet, or what a zombie gave up.
        Err(rustix::io::Errno::NOENT) => Ok(0),
        Err(error) => Err(io::Error::from(error)),
    };
    let mut all = [0; KINDS];
    let mut others = Vec::new();
    for (place, kind) in all.iter_mut().zip(NamespaceKind::ALL) {
        *place = inode(kind.name())?;
        if let Some(name) = kind.for_children()
            && inode(name)? != *place
        {
            others.push(*kind);
        }
    }
    // A task that ends gives up all but its pid and user namespaces in one step (kernel/exit.c, exit_task_namespaces); only
    // such a one has no mount namespace. Asked last, since the step may fall between two of the questions.
    if inode(NamespaceKind::Mnt.name())? == 0 {
        return Err(io::Error::from(io::ErrorKind::NotFound));
    }
    Ok((all, others))
}

/// Numbers for the namespaces of a tree: 1 to 8 for ferry's own, then on as others are met.
#[derive(Debug, Default)]
pub(super) struct Numbering {
    known: Vec<(NamespaceKind, u64)>,
}

impl Numbering {
    /// The numbers of a task's namespaces, which are made if they are new.
    pub fn number(&mut self, inodes: &Inodes) -> NamespaceIds {
        let mut ids = NamespaceIds::default();
        for (kind, inode) in NamespaceKind::ALL.iter().zip(inodes) {
            let found = self.known.iter().position(|known| *known == (*kind, *inode));
            let index = found.unwrap_or_else(|| {
                self.known.push((*kind, *inode));
                self.known.len() - 1
            });
            ids.0[*kind as usize] = index as u32 + 1;
        }
        ids
    }
}

/// The numbers by which images call the namespaces of one task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceIds([u32; KINDS]);

impl NamespaceIds {
    /// The number of one kind.
    pub fn get(&self, kind: NamespaceKind) -> u32 {
        self.0[kind as usize]
    }

    /// Fills the namespace fields of `entry`.
    pub fn fill(&self, entry: &mut TaskKobjIdsEntry) {
        let get = |kind| Some(self.get(kind));
        entry.pid_ns_id = get(NamespaceKind::Pid);
        entry.net_ns_id = get(NamespaceKind::Net);
        entry.ipc_ns_id = get(NamespaceKind::Ipc);
        entry.uts_ns_id = get(NamespaceKind::Uts);
        entry.time_ns_id = get(NamespaceKind::Time);
        entry.mnt_ns_id = get(NamespaceKind::Mnt);
        entry.user_ns_id = get(NamespaceKind::User);
        entry.cgroup_ns_id = get(NamespaceKind::Cgroup);
    }

    /// Reads the namespace fields of `entry`; 0 for those that it lacks.
    pub fn of(entry: &TaskKobjIdsEntry) -> Self {
        Self(
            [
                entry.pid_ns_id,
                entry.net_ns_id,
                entry.ipc_ns_id,
                entry.uts_ns_id,
                entry.time_ns_id,
                entry.mnt_ns_id,
                entry.user_ns_id,
                entry.cgroup_ns_id,
            ]
            .map(Option::unwrap_or_default),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_begin_with_ferrys_own_and_go_on() {
        let mut numbering = Numbering::default();
        let own = numbering.number(&[10, 11, 12, 13, 14, 15, 16, 17]);
        assert_eq!(own.0, [1, 2, 3, 4, 5, 6, 7, 8]);
        let other = numbering.number(&[20, 11, 12, 23, 14, 15, 16, 17]);
        assert_eq!(other.0, [9, 2, 3, 10, 5, 6, 7, 8]);
        let mut entry = TaskKobjIdsEntry::default();
        other.fill(&mut entry);
        assert_eq!((entry.uts_ns_id, entry.time_ns_id, entry.mnt_ns_id), (Some(10), Some(5), Some(6)));
        assert_eq!(NamespaceIds::of(&entry), other);
    }

    #[test]
    fn reads_this_process() {
        let (inodes, _) = inodes(HostPid(std::process::id() as i32)).expect("ns");
        let link = std::fs::read_link("/proc/self/ns/uts").expect("link");
        assert_eq!(link.to_string_lossy(), format!("uts:[{}]", inodes[NamespaceKind::Uts as usize]));
    }

    #[test]
    fn a_task_that_ends_is_in_all_or_in_none() {
        let own = inodes(HostPid(std::process::id() as i32)).expect("ns");
        for _ in 0..100 {
            let mut child = std::process::Command::new("true").spawn().expect("a child");
            while let Ok(seen) = inodes(HostPid(child.id() as i32)) {
                assert_eq!(seen, own);
            }
            child.wait().expect("the child's end");
        }
    }

    #[test]
    fn a_zombie_is_in_none() {
        let mut child = std::process::Command::new("true").spawn().expect("a child");
        let pid = HostPid(child.id() as i32);
        let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
        while !stat().contains(") Z ") {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let kind = inodes(pid).expect_err("a zombie").kind();
        child.wait().expect("the child's end");
        assert_eq!(kind, io::ErrorKind::NotFound);
    }
}
