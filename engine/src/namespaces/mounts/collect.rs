//! The mounts of a tree, as found: records, what cannot be saved, and the content of each tmpfs.
//!
//! The content of a tmpfs is read from a detached copy of its mount (open_tree(2) with `OPEN_TREE_CLONE`, Linux 5.2), in
//! which nothing is mounted over anything. The copy is made by a thread in the tree's mount namespace, where no path leads out.

use std::ffi::CString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, CWD, StatxFlags, fstat, statx};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::Finding;
use super::order::{HIDDEN_PEER, hidden_peers, order};
use super::outside;
use super::record::Record;
use super::source::{self, Source};
use crate::file_tree::pack;
use crate::images::{Kind, Sink, encode};
use crate::namespaces::enter::visit;
use crate::namespaces::kind::NamespaceKind;
use crate::namespaces::mountinfo::{Mount, MountTable};
use crate::namespaces::{DumpNamespacesError, NamespaceOptions};
use crate::sys::{HostPid, NsPid};
use crate::tree::TaskRef;

/// The mounts of a tree's namespace.
#[derive(Debug, Default)]
pub struct Mounts {
    records: Vec<Record>,
    /// Places of the mounts whose content is saved.
    with_content: Vec<usize>,
}

impl Mounts {
    /// Looks at the mounts that the root task sees; `cgroup_namespace` tells whether the tree has one of its own.
    pub fn collect(
        root: &TaskRef,
        options: &NamespaceOptions,
        cgroup_namespace: bool,
    ) -> io::Result<(Self, Vec<Finding>)> {
        let (table, mut findings) = read(root.pid, options)?;
        let record = |mount: &Mount| {
            let mut mount = mount.clone();
            if cgroup_namespace && mount.fs_type.starts_with("cgroup") {
                // What ferry sees is the path from its own cgroup namespace's root; inside it is the whole hierarchy.
                mount.root = "/".into();
            }
            let external =
                options.external_mounts.get(&mount.point).filter(|_| mount.point.as_os_str() != "/").cloned();
            Record { mount, external, peers_inside: false }
        };
        // Readers of images build the tree from a list in which the last mounted comes first.
        let records: Vec<Record> = table.mounts().iter().rev().map(record).collect();
        let mut mounts = Self { records, with_content: Vec::new() };
        if !findings.is_empty() {
            return Ok((mounts, findings));
        }
        match source::root(&mounts.records) {
            Err(problem) => findings.push(Finding {
                object: "mount namespace".into(),
                problem: format!("{problem}: the root task may not have changed its root to a folder that is no mount"),
                remedy: String::new(),
            }),
            Ok(place) => {
                if !is_namespace_root(root, mounts.records[place].mount.id)? {
                    findings.push(Finding {
                        object: "mount namespace".into(),
                        problem: "the root task sees only a part of it (chroot)".into(),
                        remedy: "start it by pivot_root".into(),
                    });
                }
                if let Some(which) = options.found_mounts {
                    let own = MountTable::read(HostPid(std::process::id() as i32))?;
                    outside::find(&mut mounts.records, place, &own, which);
                }
                mounts.find_sources(place, &table, options.of_bundle, &mut findings);
            }
        }
        Ok((mounts, findings))
    }

    fn find_sources(&mut self, root: usize, table: &MountTable, of_bundle: bool, findings: &mut Vec<Finding>) {
        let found = source::sources(&self.records, root);
        let refuse = |place: usize, problem: &str| Finding {
            object: self.records[place].name(),
            problem: problem.into(),
            remedy: "unmount what hides it".into(),
        };
        findings.extend(hidden_peers(&self.records).into_iter().map(|place| refuse(place, HIDDEN_PEER)));
        // With all sources known, a restore must find an order.
        if let Ok(sources) = found.iter().cloned().collect::<Result<Vec<_>, _>>()
            && let Err(place) = order(&self.records, root, &sources)
        {
            findings.push(refuse(place, "it can be reached neither before nor after what hides it"));
        }
        for (place, source) in found.into_iter().enumerate() {
            let record = &self.records[place];
            let mut finding = |problem: String, remedy: String| {
                findings.push(Finding { object: record.name(), problem, remedy });
            };
            match &source {
                Err(reason) => finding(reason.problem.clone(), reason.remedy(record, of_bundle)),
                Ok(Source::New) if record.mount.fs_type == "tmpfs" => {
                    if table.lookup(&record.mount.point).is_some_and(|seen| seen.id != record.mount.id) {
                        finding("another mount hides it, so that its content cannot be read".into(), String::new());
                    } else if record.mount.unbindable {
                        finding("it is unbindable, so that its content cannot be read".into(), String::new());
                    } else {
                        self.with_content.push(place);
                    }
                }
                Ok(_) => {}
            }
            let outside = record
                .mount
                .master
                .is_some_and(|master| self.records.iter().all(|other| other.mount.shared != Some(master)));
            if outside && matches!(source, Ok(Source::New | Source::Bind { .. })) {
                finding(
                    "mounts propagate to it from outside the tree".into(),
                    format!("mount --make-private {}", record.mount.point.display()),
                );
            }
        }
    }

    /// Writes the records, and the content of every tmpfs; the tree is stopped.
    pub fn dump(
        &self,
        pid: NsPid,
        pidfd: BorrowedFd<'_>,
        number: u32,
        sink: &mut dyn Sink,
    ) -> Result<(), DumpNamespacesError> {
        let entries: Vec<_> = self.records.iter().map(Record::to_image).collect();
        sink.put(&Kind::Mnts.name_for(number), &encode(Kind::Mnts, &entries))?;
        let wanted: Vec<&Mount> = self.with_content.iter().map(|place| &self.records[*place].mount).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let copies = visit(pidfd, &[NamespaceKind::Mnt], || wanted.iter().map(|mount| copy(mount)).collect::<Vec<_>>())
            .map_err(|source| DumpNamespacesError::Enter { pid, source })?;
        for (mount, copy) in wanted.into_iter().zip(copies) {
            let failed = |source| DumpNamespacesError::Content { point: mount.point.clone(), source };
            let archive = copy.and_then(|copy| pack(&copy)).map_err(failed)?;
            sink.put_raw(&Kind::TmpfsDev.name_for(mount.device.to_kernel()), &archive)?;
        }
        Ok(())
    }
}

/// A detached copy of a mount of this thread's namespace, which must be the topmost at its point.
fn copy(mount: &Mount) -> io::Result<OwnedFd> {
    let point = CString::new(mount.point.as_os_str().as_bytes())?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let copy = open_tree(CWD, &point, flags)?;
    if fstat(&copy)?.st_dev != mount.device.to_stat() {
        return Err(io::Error::other("another file system is mounted there now"));
    }
    Ok(copy)
}

/// Whether mount `id` is the root of the task's whole mount namespace.
fn is_namespace_root(task: &TaskRef, id: i32) -> io::Result<bool> {
    let root = visit(task.pidfd(), &[NamespaceKind::Mnt], || statx(CWD, c"/", AtFlags::empty(), StatxFlags::MNT_ID))??;
    Ok(root.stx_mnt_id == id as u64)
}
/// The mounts that the task sees, without those to be left out; and those that cannot do without them.
fn read(pid: HostPid, options: &NamespaceOptions) -> io::Result<(MountTable, Vec<Finding>)> {
    let all = MountTable::read(pid)?;
    if options.skipped_mounts.is_empty() {
        return Ok((all, Vec::new()));
    }
    let table = all.clone().without(&options.skipped_mounts);
    let hangs = |mount: &&Mount| all.get(mount.parent).is_some() && table.get(mount.parent).is_none();
    let finding = |mount: &Mount| Finding {
        object: format!("mount {} ({})", mount.point.display(), mount.fs_type),
        problem: "what it is mounted on is to be left out".into(),
        remedy: format!("leave it out as well: --skip-mnt {}", mount.point.display()),
    };
    let findings = table.mounts().iter().filter(hangs).map(finding).collect();
    Ok((table, findings))
}
