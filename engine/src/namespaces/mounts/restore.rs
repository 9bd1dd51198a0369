//! The restore half: the mounts of a tree, made by its root task.
//!
//! The task begins with a copy of ferry's mounts. It keeps copies of those that it is given from outside, makes the new root its
//! root by pivot_root(2), lets go of everything else, and then makes each mount at its place: every path is resolved inside
//! the new root, so that no link in it leads out. All of it lives in the task's mount namespace and goes with it.
//!
//! What is bound is copied (open_tree(2), Linux 5.2) from its file system before anything is mounted on that, so that
//! nothing hides it. Content of a tmpfs is unpacked by ferry before anything is mounted on it. Mounts are private until the
//! end; peer groups are made then (`MOVE_MOUNT_SET_GROUP`, Linux 5.15).

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use super::Finding;
use super::context::with_context;
use super::order::{HIDDEN_PEER, hidden_peers, order};
use super::outside::FOUND;
use super::record::Record;
use super::script::{Script, StepError};
use super::source::{self, Source};
use crate::agent::{AgentError, Runner};
use crate::file_tree::unpack;
use crate::files::OpenMaster;
use crate::images::mnt::MntEntry;
use crate::images::{ImageSet, Kind, RawImage};
use crate::namespaces::RestoreNamespaceOptions;
use crate::namespaces::mountinfo::Mount;
use crate::sys::HostPid;
use crate::sys::terminal::TIOCGPTN;

const CURRENT: u64 = libc::AT_FDCWD as u64;
const OPEN_TREE_CLONE: u64 = 1;
const OPEN_TREE: u64 = OPEN_TREE_CLONE | libc::O_CLOEXEC as u64;
const MOVE_MOUNT_F_EMPTY_PATH: u64 = 4;
const MOVE_MOUNT_SET_GROUP: u64 = 0x100;
/// Flags of mount(2) that belong to a file system, not to one mount of it.
const SUPER_FLAGS: u64 = libc::MS_SYNCHRONOUS | libc::MS_DIRSYNC | libc::MS_MANDLOCK | libc::MS_LAZYTIME;
/// Flags that mount(2) takes for a mount.
const MOUNT_FLAGS: u64 = libc::MS_NOSUID
    | libc::MS_NODEV
    | libc::MS_NOEXEC
    | libc::MS_NOATIME
    | libc::MS_NODIRATIME
    | libc::MS_RELATIME
    | libc::MS_STRICTATIME
    | libc::MS_NOSYMFOLLOW
    | libc::MS_RDONLY;

/// The mounts of a tree, and how each will be made.
pub struct MountPlan {
    mounts: Vec<Record>,
    root: usize,
    sources: Vec<Source>,
    order: Vec<usize>,
    content: HashMap<usize, RawImage>,
    given: HashMap<String, PathBuf>,
    /// Whether what the dump found outside is looked for where it was.
    found: bool,
    root_path: PathBuf,
    findings: Vec<Finding>,
}

/// Why mounts could not be made.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum RestoreMountsError {
    /// The root task's agent failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A call failed.
    #[error("{object}: cannot {step}: {errno}")]
    Call { object: String, step: &'static str, errno: Errno },
    /// Content could not be unpacked.
    #[error("cannot fill the tmpfs at {point}: {source}")]
    Content { point: PathBuf, source: io::Error },
}

impl From<StepError> for RestoreMountsError {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Agent(error) => Self::Agent(error),
            StepError::Call { object, step, errno } => Self::Call { object, step, errno },
        }
    }
}

/// Descriptors that the root task keeps meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kept {
    Root,
    /// What the mount at this place is moved from.
    Copy(usize),
}

impl MountPlan {
    /// Plans the mounts that `entries` describe.
    ///
    /// # Errors
    /// What is wrong with the image.
    pub fn new(
        entries: &[MntEntry],
        images: &ImageSet,
        root_path: PathBuf,
        options: &RestoreNamespaceOptions,
    ) -> Result<Self, String> {
        let mut mounts: Vec<Record> = entries.iter().map(Record::from_image).collect::<Result<_, _>>()?;
        for record in mounts.iter_mut().filter(|record| record.external.is_none()) {
            record.mount.options = with_context(&record.mount.options, options.mount_context.as_deref());
        }
        let root = source::root(&mounts)?;
        let mut findings = Vec::new();
        let mut sources = Vec::with_capacity(mounts.len());
        for (record, source) in mounts.iter().zip(source::sources(&mounts, root)) {
            sources.push(source.unwrap_or_else(|reason| {
                let remedy = reason.remedy(record, options.of_bundle);
                findings.push(Finding { object: record.name(), problem: reason.problem, remedy });
                Source::New
            }));
        }
        let order = order(&mounts, root, &sources)
            .map_err(|place| format!("{} needs what it hides or what hides it", mounts[place].name()))?;
        let mut content = HashMap::new();
        for (place, record) in mounts.iter().enumerate() {
            if sources[place] == Source::New && record.mount.fs_type == "tmpfs" {
                let device = Kind::TmpfsDev.name_for(record.mount.device.to_kernel());
                // Images of older versions are numbered by mount.
                let old = Kind::TmpfsImg.name_for(record.mount.id as u32);
                let find = |name: &str| images.raw(name).map_err(|error| error.to_string());
                match find(&device)?.map_or_else(|| find(&old), |image| Ok(Some(image)))? {
                    Some(image) => drop(content.insert(place, image)),
                    None => return Err(format!("{}: image {device}, its content, is missing", record.name())),
                }
            }
        }
        let given = options.external_mounts.iter().map(|(key, path)| (key.clone(), path.clone())).collect();
        let found = options.found_mounts;
        let mut plan = Self { mounts, root, sources, order, content, given, found, root_path, findings };
        plan.find_obstacles(options.of_bundle);
        Ok(plan)
    }

    /// What stands in the way.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    fn find_obstacles(&mut self, of_bundle: bool) {
        let mut findings = Vec::new();
        let mut find = |record: &Record, problem: String, remedy: String| {
            findings.push(Finding { object: record.name(), problem, remedy });
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = openat(CWD, &self.root_path, flags | OFlags::DIRECTORY, Mode::empty());
        if let Err(error) = &root {
            let problem = format!("the new root {} cannot be opened: {error}", self.root_path.display());
            find(&self.mounts[self.root], problem, "create it, or name another (--root)".into());
        }
        for (place, record) in self.mounts.iter().enumerate() {
            let point = &record.mount.point;
            if let Source::External(key) = &self.sources[place] {
                match self.given_for(place) {
                    None if key == FOUND => find(
                        record,
                        format!("it was found at {} of the host", record.mount.source.display()),
                        "allow that again: --external 'mnt[]'".into(),
                    ),
                    None if of_bundle => find(
                        record,
                        "it was bound from the host, and the bundle has no bind mount there".into(),
                        format!("add one with the destination {} to config.json", point.display()),
                    ),
                    None => find(
                        record,
                        format!("it is external, and nothing is given for its key {key:?}"),
                        format!("--external 'mnt[{key}]:PATH'"),
                    ),
                    Some(path) => {
                        if let Err(error) = openat(CWD, path, flags, Mode::empty()) {
                            find(
                                record,
                                format!("{} is given for it, which cannot be opened: {error}", path.display()),
                                String::new(),
                            );
                        }
                    }
                }
            }
            // The root's own folders can be looked at before; other file systems bring theirs with them.
            let in_root = place != self.root && record.mount.parent == self.mounts[self.root].mount.id;
            if let (true, Ok(root)) = (in_root, &root) {
                let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
                if let Err(error) = openat2(root, point, flags, Mode::empty(), inside) {
                    let problem = format!("{} in the new root cannot be opened: {error}", point.display());
                    find(record, problem, format!("create it in {}", self.root_path.display()));
                }
            }
        }
        for place in hidden_peers(&self.mounts) {
            find(&self.mounts[place], HIDDEN_PEER.into(), String::new());
        }
        self.findings.extend(findings);
    }

    /// Whether mounts propagate to it from another mount of the tree.
    fn has_inner_master(&self, place: usize) -> bool {
        self.mounts[place].mount.master.is_some_and(|master| self.first_of_group(master).is_some())
    }

    /// The member of a peer group that the others take it from: the kernel wants one that shows all that they show.
    fn first_of_group(&self, group: u32) -> Option<usize> {
        let members = (0..self.mounts.len()).filter(|place| self.mounts[*place].mount.shared == Some(group));
        members.min_by_key(|place| self.mounts[*place].mount.root.as_os_str().len())
    }

    /// Makes all mounts in the mount namespace of the root task, which is new.
    ///
    /// A slave of a terminal is mounted only while its master is open: those masters are returned, open in the task.
    pub fn restore(&self, runner: &Runner, pid: HostPid) -> Result<Vec<OpenMaster>, RestoreMountsError> {
        let mut script = Script::new(runner);
        self.enter_root(&mut script)?;
        let mut maker = Maker { plan: self, pid, unfilled: HashSet::new(), masters: Vec::new() };
        maker.after_mount(&mut script, self.root)?;
        for &place in &self.order {
            maker.mount(&mut script, place)?;
        }
        for place in maker.unfilled.clone() {
            maker.fill(&mut script, place)?;
        }
        self.restore_propagation(&mut script)?;
        script.finish()?;
        Ok(maker.masters)
    }

    /// Keeps what is given from outside, and makes the new root the task's root.
    fn enter_root(&self, script: &mut Script<'_, Kept>) -> Result<(), RestoreMountsError> {
        self.take_given(script, |place| self.keeps_peers(place))?;
        let slash = script.path("/");
        // Slaves, so that nothing goes out, and what is given may go on to receive from outside.
        let flags = libc::MS_REC | libc::MS_SLAVE;
        script.call("mount /", "detach it from ferry's", libc::SYS_mount, &[0, slash.0, 0, flags, 0]);
        self.take_given(script, |place| !self.keeps_peers(place))?;
        let object = format!("the new root {}", self.root_path.display());
        let root = self.root_path.as_os_str().as_bytes();
        script.make_room()?;
        let path = script.path(root);
        script.open(Kept::Root, &object, "copy its mount", libc::SYS_open_tree, &[CURRENT, path.0, OPEN_TREE]);
        let copy = script.descriptor(Kept::Root)?.unwrap_or(u64::MAX);
        let (path, empty, dot, slash) = (script.path(root), script.path(""), script.path("."), script.path("/"));
        script.call(
            &object,
            "mount it",
            libc::SYS_move_mount,
            &[copy, empty.0, CURRENT, path.0, MOVE_MOUNT_F_EMPTY_PATH],
        );
        script.call(&object, "enter it", libc::SYS_chdir, &[path.0]);
        script.call(&object, "make it the root", libc::SYS_pivot_root, &[dot.0, dot.0]);
        // The old root now lies over the new one.
        script.call(&object, "let go of ferry's mounts", libc::SYS_umount2, &[dot.0, libc::MNT_DETACH as u64]);
        script.call(&object, "enter it", libc::SYS_chdir, &[slash.0]);
        Ok(())
    }

    /// Copies what is given for external mounts, for those of them that are `chosen`.
    fn take_given(
        &self,
        script: &mut Script<'_, Kept>,
        chosen: impl Fn(usize) -> bool,
    ) -> Result<(), RestoreMountsError> {
        for place in (0..self.mounts.len()).filter(|place| chosen(*place)) {
            let Some(path) = self.given_for(place) else { continue };
            script.make_room()?;
            let object = self.mounts[place].name();
            let path = script.path(path.as_os_str().as_bytes());
            script.open(
                Kept::Copy(place),
                &object,
                "take what is given for it",
                libc::SYS_open_tree,
                &[CURRENT, path.0, OPEN_TREE],
            );
        }
        Ok(())
    }

    /// What is given for an external mount.
    fn given_for(&self, place: usize) -> Option<&Path> {
        let Source::External(key) = &self.sources[place] else { return None };
        if key == FOUND {
            return self.found.then(|| Path::new(&self.mounts[place].mount.source));
        }
        self.given.get(key).map(PathBuf::as_path)
    }

    /// Whether an external mount stays a peer of the mount outside that it is copied from.
    fn keeps_peers(&self, place: usize) -> bool {
        let Record { mount, external, peers_inside } = &self.mounts[place];
        external.as_deref() == Some(FOUND) && mount.shared.is_some() && !peers_inside
    }

    /// Peer groups, and who receives from whom. All mounts are there.
    fn restore_propagation(&self, script: &mut Script<'_, Kept>) -> Result<(), RestoreMountsError> {
        let mut places: Vec<usize> = (0..self.mounts.len()).filter(|place| !self.keeps_peers(*place)).collect();
        // A slave takes its master from a member of the group, which comes before: whoever is no slave itself, and then
        // the first of each group.
        places.sort_by_key(|place| {
            let group = self.mounts[*place].mount.shared;
            (
                self.has_inner_master(*place),
                group.is_none(),
                group.and_then(|group| self.first_of_group(group)) != Some(*place),
            )
        });
        for place in places {
            let mount = &self.mounts[place].mount;
            let object = self.mounts[place].name();
            script.make_room()?;
            let point = script.path(mount.point.as_os_str().as_bytes());
            let join = |script: &mut Script<'_, Kept>, member: usize| {
                let from = script.path(self.mounts[member].mount.point.as_os_str().as_bytes());
                let arguments = [CURRENT, from.0, CURRENT, point.0, MOVE_MOUNT_SET_GROUP];
                script.call(&object, "join its peers", libc::SYS_move_mount, &arguments);
            };
            let change = |script: &mut Script<'_, Kept>, flag: u64| {
                script.call(&object, "set its propagation", libc::SYS_mount, &[0, point.0, 0, flag, 0]);
            };
            let first = mount.shared.and_then(|group| self.first_of_group(group));
            if let Some(master) = mount.master.and_then(|master| self.first_of_group(master))
                && first.is_none_or(|first| first == place)
            {
                join(script, master);
                change(script, libc::MS_SLAVE);
            }
            match first {
                Some(first) if first == place => change(script, libc::MS_SHARED),
                Some(first) => join(script, first),
                None if mount.unbindable => change(script, libc::MS_UNBINDABLE),
                None => {}
            }
        }
        Ok(())
    }
}

/// The making of mounts, one after the other.
struct Maker<'a> {
    plan: &'a MountPlan,
    pid: HostPid,
    /// Mounts whose content is still to be unpacked.
    unfilled: HashSet<usize>,
    /// Open masters of terminals.
    masters: Vec<OpenMaster>,
}

impl Maker<'_> {
    fn mount(&mut self, script: &mut Script<'_, Kept>, place: usize) -> Result<(), RestoreMountsError> {
        let record = &self.plan.mounts[place];
        let object = record.name();
        // What it is mounted on must have its content, and with it the mount point.
        let parent = self.plan.mounts.iter().position(|other| other.mount.id == record.mount.parent);
        let source = match &self.plan.sources[place] {
            Source::Bind { of, .. } => Some(*of),
            _ => None,
        };
        for needed in parent.into_iter().chain(source) {
            self.fill(script, needed)?;
        }
        script.make_room()?;
        if self.plan.sources[place] == Source::New {
            self.make_new(script, place, &object)?;
        } else if let Some(copy) = script.descriptor(Kept::Copy(place))? {
            let (empty, point) = (script.path(""), script.path(record.mount.point.as_os_str().as_bytes()));
            let arguments = [copy, empty.0, CURRENT, point.0, MOVE_MOUNT_F_EMPTY_PATH];
            script.call(&object, "mount it", libc::SYS_move_mount, &arguments);
        }
        self.after_mount(script, place)
    }

    fn make_new(
        &mut self,
        script: &mut Script<'_, Kept>,
        place: usize,
        object: &str,
    ) -> Result<(), RestoreMountsError> {
        let mount = &self.plan.mounts[place].mount;
        let unfilled = self.plan.content.contains_key(&place);
        let mut flags = mount.flags & MOUNT_FLAGS & !libc::MS_RDONLY | mount.super_flags & SUPER_FLAGS;
        if unfilled {
            self.unfilled.insert(place);
        } else {
            flags |= mount.super_flags & libc::MS_RDONLY;
        }
        let source = script.path(mount.source.as_bytes());
        let point = script.path(mount.point.as_os_str().as_bytes());
        let kind = script.path(&mount.fs_type);
        let data = if mount.options.is_empty() { 0 } else { script.path(mount.options.as_bytes()).0 };
        script.call(object, "mount it", libc::SYS_mount, &[source.0, point.0, kind.0, flags, data]);
        Ok(())
    }

    /// What is to be done as long as the mount is empty: its flags, and copies for what is bound from it.
    fn after_mount(&mut self, script: &mut Script<'_, Kept>, place: usize) -> Result<(), RestoreMountsError> {
        if self.unfilled.contains(&place) {
            return Ok(());
        }
        let plan = self.plan;
        let mount = &plan.mounts[place].mount;
        for (bound, source) in plan.sources.iter().enumerate() {
            let Source::Bind { of, part } = source else { continue };
            if *of == place {
                if let Some(index) = terminal_index(mount, part) {
                    self.open_master(script, mount, index)?;
                }
                script.make_room()?;
                let path = if part.as_os_str().is_empty() { mount.point.clone() } else { mount.point.join(part) };
                let path = script.path(path.as_os_str().as_bytes());
                let object = plan.mounts[bound].name();
                script.open(
                    Kept::Copy(bound),
                    &object,
                    "copy what it is bound from",
                    libc::SYS_open_tree,
                    &[CURRENT, path.0, OPEN_TREE],
                );
            }
        }
        script.make_room()?;
        let object = plan.mounts[place].name();
        let point = script.path(mount.point.as_os_str().as_bytes());
        let flags = mount.flags & MOUNT_FLAGS;
        let is_new = plan.sources[place] == Source::New;
        let (mounted_read_only, wanted) = (
            mount.super_flags & libc::MS_RDONLY != 0 && !plan.content.contains_key(&place),
            mount.flags & libc::MS_RDONLY != 0,
        );
        if is_new && plan.content.contains_key(&place) && mount.super_flags & libc::MS_RDONLY != 0 {
            // Filled now: the file system itself becomes read-only, and so does the mount.
            let all = libc::MS_REMOUNT | libc::MS_RDONLY | flags | mount.super_flags & SUPER_FLAGS;
            script.call(&object, "make it read-only", libc::SYS_mount, &[0, point.0, 0, all, 0]);
        }
        if !is_new || mounted_read_only != wanted {
            let arguments = [0, point.0, 0, libc::MS_REMOUNT | libc::MS_BIND | flags, 0];
            script.call(&object, "set its flags", libc::SYS_mount, &arguments);
        }
        if !is_new
            && !plan.keeps_peers(place)
            && mount.master.is_none_or(|master| plan.first_of_group(master).is_some())
        {
            script.call(&object, "set its propagation", libc::SYS_mount, &[0, point.0, 0, libc::MS_PRIVATE, 0]);
        }
        Ok(())
    }

    /// Has the task open masters in a devpts, whose index is the lowest free one, until there is that with `index`.
    fn open_master(
        &mut self,
        script: &mut Script<'_, Kept>,
        devpts: &Mount,
        index: u32,
    ) -> Result<(), RestoreMountsError> {
        script.run()?;
        let instance = devpts.device.to_stat();
        let failed = |step, errno| RestoreMountsError::Call { object: format!("terminal {index}"), step, errno };
        let is_it = |open: &OpenMaster| (open.instance, open.index) == (instance, index);
        while !self.masters.iter().any(is_it) {
            let mut batch = script.runner().batch();
            let path = batch.path(devpts.point.join("ptmx").as_os_str().as_bytes());
            let flags = (libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) as u64;
            let open = batch.must(libc::SYS_openat, &[CURRENT, path.0, flags]);
            let got = batch.space(4);
            let ask = batch.must(libc::SYS_ioctl, &[0, TIOCGPTN, got.addr.0]);
            batch.pass(open, ask, 0);
            let answers = batch.run()?;
            let number = answers.result(open).map_err(|errno| failed("open its master side", errno))? as u32;
            answers.result(ask).map_err(|errno| failed("read its index", errno))?;
            let found = answers.u32_at(got, 0);
            if found > index {
                return Err(failed("have it again: its index is in use", Errno::EBUSY));
            }
            self.masters.push(OpenMaster { instance, index: found, number, mounted: false });
        }
        self.masters.iter_mut().filter(|open| is_it(open)).for_each(|open| open.mounted = true);
        Ok(())
    }

    /// Unpacks the content of a tmpfs, unless that has been done.
    fn fill(&mut self, script: &mut Script<'_, Kept>, place: usize) -> Result<(), RestoreMountsError> {
        if !self.unfilled.remove(&place) {
            return Ok(());
        }
        script.run()?;
        let point = &self.plan.mounts[place].mount.point;
        if let Some(image) = self.plan.content.get(&place) {
            let filled = open_inside(self.pid, point).and_then(|folder| unpack(ImageReader::new(image), &folder));
            filled.map_err(|source| RestoreMountsError::Content { point: point.clone(), source })?;
        }
        self.after_mount(script, place)
    }
}

/// The index of the terminal whose slave is a part of a devpts.
fn terminal_index(devpts: &Mount, part: &Path) -> Option<u32> {
    part.to_str().filter(|_| devpts.fs_type == "devpts")?.parse().ok()
}

/// A folder in the root of a task; no link on the way leads out of it.
fn open_inside(pid: HostPid, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, format!("/proc/{pid}/root"), flags, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(&root, path, flags, Mode::empty(), resolve)?)
}

/// Reads an image from its beginning to its end, verified.
struct ImageReader<'a> {
    image: &'a RawImage,
    next: u64,
    chunk: Vec<u8>,
    used: usize,
}

impl<'a> ImageReader<'a> {
    fn new(image: &'a RawImage) -> Self {
        Self { image, next: 0, chunk: Vec::new(), used: 0 }
    }
}

impl io::Read for ImageReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.used == self.chunk.len() && self.next < self.image.chunk_count() {
            self.image.read_chunk(self.next, &mut self.chunk).map_err(io::Error::other)?;
            self.next += 1;
            self.used = 0;
        }
        let length = buffer.len().min(self.chunk.len() - self.used);
        buffer[..length].copy_from_slice(&self.chunk[self.used..self.used + length]);
        self.used += length;
        Ok(length)
    }
}
