//! Every descriptor of every task, and which of them share a description.
//!
//! Kinds that their fdinfo does not tell enough about are duplicated (pidfd_getfd(2), Linux 5.6). kcmp(2) is asked only about
//! descriptors that look alike in every other way, and, since it orders what it compares, a few times even when thousands do.
//!
//! On a tree that runs, whatever vanishes between two looks is passed over.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, statx};

use super::epoll::{collect_epoll, resolve_targets};
use super::event;
use super::fdinfo::FdInfo;
use super::ghost::{Ghosts, kernel_device};
use super::lock::Locks;
use super::owner::{collect_owner, nobody};
use super::pipe::Pipes;
use super::regular::{self, Found, Paths, STATX};
use super::table::{Shown, Table, Unreadable};
use super::tty::{FoundTerminal, Job, Side, Terminals};
use super::{FilesOptions, Problem};
use crate::error::Refusal;
use crate::images::Kind;
use crate::images::encode;
use crate::images::files::{FdType, FdinfoEntry, FileEntry};
use crate::images::pipe::{FifoEntry, PipeEntry};
use crate::images::regfile::RegFileEntry;
use crate::images::tty::TtyFileEntry;
use crate::procfs::{Ids, Stat};
use crate::sockets::unix::SocketFile;
use crate::sockets::{self, Sockets};
use crate::sys::kcmp::{self, compare};
use crate::sys::{HostPid, NsPid, pidfd};
use crate::tree::TaskRef;

/// What a dump writes about descriptors.
#[derive(Debug, Default)]
pub struct FilesDump {
    /// `files.img`.
    pub files: Vec<FileEntry>,
    /// `fdinfo-N.img`, by N.
    pub fdinfo: Vec<(u32, Vec<FdinfoEntry>)>,
    /// All other images, by name: contents of pipes, deleted files, stand-ins for lost names.
    pub images: Vec<(String, Vec<u8>)>,
}

/// The first table's number; 1 is the dumper's own, in `root_ids` of the inventory.
const FIRST_TABLE: u32 = 2;

/// Who holds an object, for messages.
#[derive(Clone, Debug)]
struct Holder {
    pid: NsPid,
    comm: String,
    /// The descriptor's number; none for directories, executables and mappings.
    fd: Option<u32>,
    object: String,
    of_root: bool,
}

impl Holder {
    fn refusal(&self, problem: Problem) -> Refusal {
        let object = match self.fd {
            Some(fd) => format!("fd {fd}, {}", self.object),
            None => self.object.clone(),
        };
        let Problem { problem, remedy } = problem;
        Refusal { pid: self.pid, comm: self.comm.clone(), object, problem, remedy }
    }
}

/// What must be equal for two descriptors to share a description.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Likeness {
    inode: Inode,
    pos: u64,
    flags: u32,
}

/// An inode: by device and number, or as the kernel names those without a path.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Inode {
    OfPath(u32, u32, u64),
    Named(Vec<u8>, Option<String>),
}

/// A description, by the first descriptor found of it.
#[derive(Clone, Copy)]
struct Known {
    pid: HostPid,
    fd: u32,
    id: u32,
    kind: FdType,
}

/// Why a descriptor is not saved.
enum Skip {
    /// It, or its task, is gone; the tree runs.
    Gone,
    /// Nothing about it can keep a dump from succeeding; the tree runs.
    Nothing,
    Refused(Problem),
}

/// Objects whose state the kernel tells whole, so that preflight need not look closer.
const ALWAYS_SAVED: &[&[u8]] = &[b"anon_inode:[eventfd]", b"anon_inode:[signalfd]"];

impl From<Problem> for Skip {
    fn from(problem: Problem) -> Self {
        Self::Refused(problem)
    }
}

/// One descriptor, as found.
struct Descriptor<'a> {
    task: &'a TaskRef,
    fd: u32,
    name: &'a [u8],
    /// What its link leads to, if that is a path.
    stat: Option<&'a Statx>,
    info: FdInfo<'a>,
}

/// Collects the descriptors of a tree, task by task.
pub struct FilesCollector {
    options: FilesOptions,
    root: HostPid,
    paths: Paths,
    next_id: u32,
    /// Descriptor tables in the order of kcmp(2), with a task that has each, and its number.
    tables: Vec<(HostPid, u32)>,
    alike: HashMap<Likeness, Vec<Known>>,
    special: HashMap<(u32, u32, u64, Vec<u8>), u32>,
    ghosts: Ghosts,
    pipes: Pipes<Holder>,
    fifos: Pipes<Holder>,
    sockets: Sockets<Holder>,
    locks: Locks,
    terminals: Terminals<Holder>,
    /// epoll instances by id, with the descriptors that name them.
    epolls: BTreeMap<u32, Epoll>,
    refusals: Vec<Refusal>,
    dump: FilesDump,
}

/// An epoll instance whose targets are yet to be tied to descriptors, which may come later.
struct Epoll {
    file: usize,
    holder: Holder,
    named_by: Vec<(HostPid, u32)>,
}

impl FilesCollector {
    /// Begins with the tree below `root`, whose mount namespace all tasks must be in.
    ///
    /// # Errors
    /// Those of reading `/proc/PID`: the process may be gone.
    pub fn new(root: HostPid, options: FilesOptions) -> io::Result<Self> {
        let sockets = Sockets::of(root, options.network_namespace_id, options.requested_by)?;
        Ok(Self {
            paths: Paths::of(root, &options)?,
            options,
            root,
            next_id: 1,
            tables: Vec::new(),
            alike: HashMap::new(),
            special: HashMap::new(),
            ghosts: Ghosts::default(),
            pipes: Pipes::default(),
            fifos: Pipes::default(),
            sockets,
            locks: Locks::default(),
            terminals: Terminals::default(),
            epolls: BTreeMap::new(),
            refusals: Vec::new(),
            dump: FilesDump::default(),
        })
    }

    /// Notes the session of a process and what controls it. Terminals need this of every process.
    pub fn add_job(&mut self, task: &TaskRef, stat: &Stat, ids: &Ids) {
        self.terminals.add_job(Job::new(task, stat, ids));
    }

    /// Collects the descriptor table of a task, unless one that shares it was there before. Returns the table's number.
    pub fn add_task(&mut self, task: &TaskRef) -> u32 {
        let order = self.tables.binary_search_by(|(other, _)| {
            compare(kcmp::Kind::Files, (*other, 0), (task.pid, 0)).unwrap_or(Ordering::Less)
        });
        match order {
            Ok(index) => self.tables[index].1,
            Err(index) => {
                let number = self.tables.len() as u32 + FIRST_TABLE;
                self.tables.insert(index, (task.pid, number));
                let entries = self.collect_table(task, number);
                self.dump.fdinfo.push((number, entries));
                number
            }
        }
    }

    fn collect_table(&mut self, task: &TaskRef, number: u32) -> Vec<FdinfoEntry> {
        let table = match Table::open(task.pid) {
            Ok(table) => table,
            Err(error) => {
                if self.options.stopped {
                    let holder = self.holder(task, None, "its descriptors".into());
                    self.refusals.push(holder.refusal(Problem::unreadable("the table", error)));
                }
                return Vec::new();
            }
        };
        let mut entries = Vec::with_capacity(table.numbers().len());
        let passed_over = if self.options.stopped { &[] } else { ALWAYS_SAVED };
        table.read(passed_over, |read| {
            let (fd, name, outcome) = match read {
                Ok(shown) => {
                    let outcome = self.collect_descriptor((task, number), &shown);
                    (shown.fd, shown.name, outcome)
                }
                Err(Unreadable { fd, what, error }) => (fd, b"its object".to_vec(), Err(self.unreadable(what, error))),
            };
            match outcome {
                Ok(entry) => entries.push(entry),
                Err(Skip::Gone | Skip::Nothing) => {}
                Err(Skip::Refused(problem)) => {
                    let holder = self.holder(task, Some(fd), String::from_utf8_lossy(&name).into_owned());
                    self.refusals.push(holder.refusal(problem));
                }
            }
        });
        entries
    }

    fn holder(&self, task: &TaskRef, fd: Option<u32>, object: String) -> Holder {
        Holder { pid: task.ns_pid, comm: task.comm.clone(), fd, object, of_root: task.pid == self.root }
    }

    /// Whether an error means that a running task closed the descriptor, or ended.
    fn unreadable(&self, what: &str, error: rustix::io::Errno) -> Skip {
        use rustix::io::Errno;
        match error {
            Errno::NOENT | Errno::SRCH | Errno::BADF if !self.options.stopped => Skip::Gone,
            error => Skip::Refused(Problem::unreadable(what, error)),
        }
    }

    fn collect_descriptor(&mut self, (task, table): (&TaskRef, u32), shown: &Shown) -> Result<FdinfoEntry, Skip> {
        let fd = shown.fd;
        let info = FdInfo::parse(&shown.info)
            .ok_or_else(|| Problem::new("the kernel does not describe it as proc(5) says", ""))?;
        let descriptor = Descriptor { task, fd, name: &shown.name, stat: shown.stat.as_ref(), info };
        let (id, kind) = self.description(&descriptor)?;
        for lock in info.locks() {
            self.locks.collect(lock, (task.ns_pid.0, fd), (table, id), info.flags)?;
        }
        let flags = if info.cloexec { libc::FD_CLOEXEC as u32 } else { 0 };
        Ok(FdinfoEntry { id, flags, r#type: kind as i32, fd, xattr_security_selinux: None })
    }

    /// The description that a descriptor names: a known one, or a new one, which is dumped.
    fn description(&mut self, descriptor: &Descriptor<'_>) -> Result<(u32, FdType), Skip> {
        let Descriptor { task, fd, name, stat, info } = *descriptor;
        if let Some(lock) = info.locks().next().filter(|_| !self.options.file_locks) {
            let text = format!("it holds a file lock ({lock})");
            return Err(Problem::new(text, "save locks with --file-locks").into());
        }
        let likeness = Likeness {
            inode: match stat {
                Some(stat) => Inode::OfPath(stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino),
                // Anonymous inodes are one for all, but eventfds are told apart by a number of their own.
                None => Inode::Named(name.to_vec(), info.field("eventfd-id").map(str::to_owned)),
            },
            pos: info.pos,
            flags: info.flags,
        };
        let index = match self.alike.get(&likeness) {
            Some(alike) => match position(alike, task.pid, fd) {
                Ok(index) => {
                    let Known { id, kind, .. } = alike[index];
                    if let Some(epoll) = self.epolls.get_mut(&id) {
                        epoll.named_by.push((task.pid, fd));
                    }
                    return Ok((id, kind));
                }
                Err(index) => index,
            },
            None => 0,
        };
        let id = self.new_id();
        let entry = self.dump_description(descriptor, id)?;
        let kind = entry.r#type();
        self.dump.files.push(entry);
        self.alike.entry(likeness).or_default().insert(index, Known { pid: task.pid, fd, id, kind });
        Ok((id, kind))
    }

    fn new_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn dump_description(&mut self, descriptor: &Descriptor<'_>, id: u32) -> Result<FileEntry, Skip> {
        let Descriptor { name, info, .. } = *descriptor;
        let path_only = info.flags & libc::O_PATH as u32 != 0;
        let entry = |kind: FdType| FileEntry { r#type: kind as i32, id, ..FileEntry::default() };
        if let Some(stat) = descriptor.stat {
            if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Fifo && !path_only {
                let fifo = self.dump_fifo(descriptor, stat, id)?;
                return Ok(FileEntry { fifo: Some(fifo), ..entry(FdType::Fifo) });
            }
            if let Some(side) = terminal_side(stat).filter(|_| !path_only) {
                let tty = self.dump_terminal(descriptor, (side, stat), id)?;
                return Ok(FileEntry { tty: Some(tty), ..entry(FdType::Tty) });
            }
            let reg = self.dump_path(descriptor, stat, id)?;
            return Ok(FileEntry { reg: Some(reg), ..entry(FdType::Reg) });
        }
        let unsupported = || {
            let text = format!("{} cannot be saved yet", kind_of(name));
            Err(Skip::Refused(Problem::new(text, "have the program close it before the checkpoint")))
        };
        if path_only {
            return unsupported();
        }
        // None of these can send signals (they have no `fasync` operation), so none has an owner that matters.
        let fown = nobody();
        match name {
            b"anon_inode:[eventpoll]" => {
                let epfd = collect_epoll(id, &info, fown)?;
                let named_by = vec![(descriptor.task.pid, descriptor.fd)];
                let holder = self.holder_of(descriptor);
                self.epolls.insert(id, Epoll { file: self.dump.files.len(), holder, named_by });
                return Ok(FileEntry { epfd: Some(epfd), ..entry(FdType::Eventpoll) });
            }
            b"anon_inode:[eventfd]" => {
                return Ok(FileEntry { efd: Some(event::collect_eventfd(id, &info, fown)?), ..entry(FdType::Eventfd) });
            }
            b"anon_inode:[signalfd]" => {
                return Ok(FileEntry {
                    sgfd: Some(event::collect_signalfd(id, &info, fown)?),
                    ..entry(FdType::Signalfd)
                });
            }
            b"anon_inode:[timerfd]" => {
                return Ok(FileEntry { tfd: Some(event::collect_timerfd(id, &info, fown)?), ..entry(FdType::Timerfd) });
            }
            _ => {}
        }
        let Some(inode) = inode_of(name) else { return unsupported() };
        if !self.options.stopped && name.starts_with(b"pipe:[") && self.pipes.note_end(inode, info.flags) {
            return Err(Skip::Nothing);
        }
        let duplicate = self.duplicate(descriptor)?;
        let fown = collect_owner(duplicate.as_fd())?;
        match name {
            _ if name.starts_with(b"socket:[") => {
                let holder = self.holder_of(descriptor);
                let Descriptor { task, .. } = *descriptor;
                let paths = &self.paths;
                let find_file = |name: &[u8], file| socket_file(paths, task.pid, name, file);
                let pidfd = task.pidfd();
                let socket = sockets::Found { id, inode, info, duplicate: duplicate.as_fd(), pidfd, fown };
                Ok(self.sockets.collect(socket, &find_file, holder, self.options.stopped)?)
            }
            _ if name.starts_with(b"pipe:[") => {
                let holder = self.holder_of(descriptor);
                let pipe_id = inode;
                self.pipes.collect(pipe_id, info.flags, duplicate.as_fd(), holder, self.options.stopped)?;
                let pipe = PipeEntry { id, pipe_id, flags: info.flags, fown };
                Ok(FileEntry { pipe: Some(pipe), ..entry(FdType::Pipe) })
            }
            _ => unsupported(),
        }
    }

    fn holder_of(&self, descriptor: &Descriptor<'_>) -> Holder {
        let name = String::from_utf8_lossy(descriptor.name).into_owned();
        self.holder(descriptor.task, Some(descriptor.fd), name)
    }

    fn duplicate(&self, descriptor: &Descriptor<'_>) -> Result<OwnedFd, Skip> {
        pidfd::get_fd(descriptor.task.pidfd(), descriptor.fd as i32)
            .map_err(|errno| self.unreadable("the descriptor", rustix::io::Errno::from_raw_os_error(errno as i32)))
    }

    fn dump_fifo(&mut self, descriptor: &Descriptor<'_>, stat: &Statx, id: u32) -> Result<FifoEntry, Skip> {
        let regf_id = self.new_id();
        let mut reg = self.dump_path(descriptor, stat, regf_id)?;
        let duplicate = self.duplicate(descriptor)?;
        reg.fown = collect_owner(duplicate.as_fd())?;
        let file = FileEntry { r#type: FdType::Reg as i32, id: regf_id, reg: Some(reg), ..FileEntry::default() };
        let pipe_id = stat.stx_ino as u32;
        let holder = self.holder_of(descriptor);
        let flags = descriptor.info.flags;
        self.fifos.collect(pipe_id, flags, duplicate.as_fd(), holder, self.options.stopped)?;
        self.dump.files.push(file);
        Ok(FifoEntry { id, pipe_id, regf_id: Some(regf_id) })
    }

    fn dump_terminal(
        &mut self,
        descriptor: &Descriptor<'_>,
        (side, stat): (Side, &Statx),
        id: u32,
    ) -> Result<TtyFileEntry, Skip> {
        let Descriptor { task, name, info, .. } = *descriptor;
        let duplicate = self.duplicate(descriptor)?;
        let fown = collect_owner(duplicate.as_fd())?;
        let key = Some(Terminals::<Holder>::key(stat)).filter(|key| self.options.external.contains(key));
        let found = Found { name, stat, mnt_id: info.mnt_id, flags: info.flags };
        let (path, instance) = match key {
            Some(_) => (None, 0),
            None => {
                let (path, instance) = self.paths.terminal(&found, side == Side::Slave)?;
                (Some(path), instance)
            }
        };
        let file = path.as_ref().map(|_| self.new_id());
        let flags = info.flags;
        let terminal =
            FoundTerminal { id, side, stat, flags, file, instance, duplicate, fown: fown.clone(), pid: task.pid };
        let holder = self.holder_of(descriptor);
        let entry = self.terminals.collect(terminal, key, holder)?;
        if let (Some(id), Some(path)) = (file, path) {
            let mode = Some(stat.stx_mode.into());
            let reg =
                RegFileEntry { id, flags, fown, name: path.path, mnt_id: path.mnt_id, mode, ..Default::default() };
            let file = FileEntry { r#type: FdType::Reg as i32, id, reg: Some(reg), ..FileEntry::default() };
            self.dump.files.push(file);
        }
        Ok(entry)
    }

    fn dump_path(&mut self, descriptor: &Descriptor<'_>, stat: &Statx, id: u32) -> Result<RegFileEntry, Skip> {
        let Descriptor { task, fd, name, info, .. } = *descriptor;
        let found = Found { name, stat, mnt_id: info.mnt_id, flags: info.flags };
        let fown = if info.flags & libc::O_ASYNC as u32 != 0 {
            collect_owner(self.duplicate(descriptor)?.as_fd())?
        } else {
            nobody()
        };
        let source = format!("/proc/{}/fd/{fd}", task.pid);
        Ok(RegFileEntry { pos: info.pos, fown, ..self.dump_file(&found, id, &source)? })
    }

    /// A file by its name; `source` is the link of proc(5) that leads to it.
    fn dump_file(&mut self, found: &Found<'_>, id: u32, source: &str) -> Result<RegFileEntry, Problem> {
        let mut entry = RegFileEntry {
            id,
            flags: found.flags,
            mode: Some(found.stat.stx_mode.into()),
            size: regular::recorded_size(found),
            ..RegFileEntry::default()
        };
        let external = format!("file[{:x}:{:x}]", found.mnt_id, found.stat.stx_ino);
        if self.options.external.contains(&external) {
            return Ok(RegFileEntry { name: external.into_bytes(), ext: Some(true), size: None, ..entry });
        }
        regular::check_type(found)?;
        let name = self.paths.name(found)?;
        if name.deleted {
            self.ghosts.dump(id, source, found.stat, self.options.ghost_limit, self.options.stopped)?;
        }
        entry.name = name.path;
        entry.mnt_id = name.mnt_id;
        Ok(entry)
    }

    /// A file that no descriptor holds: `link` is a name in `/proc/PID`.
    fn add_link(&mut self, task: &TaskRef, link: &str, what: &str) -> Option<u32> {
        let source = format!("/proc/{}/{link}", task.pid);
        let read = || -> rustix::io::Result<(Vec<u8>, Statx)> {
            let name = rustix::fs::readlink(&source, Vec::new())?.into_bytes();
            Ok((name, regular::stat_link(rustix::fs::CWD, &source)?))
        };
        let (name, stat) = match read() {
            Ok(read) => read,
            Err(error) => {
                if let Skip::Refused(problem) = self.unreadable("the file", error) {
                    let refusal = self.holder(task, None, what.into()).refusal(problem);
                    self.refusals.push(refusal);
                }
                return None;
            }
        };
        let key = (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino, name);
        if let Some(id) = self.special.get(&key) {
            return Some(*id);
        }
        let id = self.new_id();
        let found = Found { name: &key.3, stat: &stat, mnt_id: stat.stx_mnt_id as i32, flags: 0 };
        match self.dump_file(&found, id, &source) {
            Ok(reg) => {
                let entry = FileEntry { r#type: FdType::Reg as i32, id, reg: Some(reg), ..FileEntry::default() };
                self.dump.files.push(entry);
                self.special.insert(key, id);
                Some(id)
            }
            Err(problem) => {
                let object = format!("{what}, {}", String::from_utf8_lossy(&key.3));
                let refusal = self.holder(task, None, object).refusal(problem);
                self.refusals.push(refusal);
                None
            }
        }
    }

    /// The number of the file that `range` maps; none if it is refused or gone.
    pub fn add_mapping(&mut self, task: &TaskRef, range: std::ops::Range<u64>) -> Option<u32> {
        let range = format!("{:x}-{:x}", range.start, range.end);
        self.add_link(task, &format!("map_files/{range}"), &format!("mapping {range}"))
    }

    /// The number of the task's executable; none if it is refused or gone.
    pub fn add_exe(&mut self, task: &TaskRef) -> Option<u32> {
        self.add_link(task, "exe", "its executable")
    }

    /// The number of the task's working directory; none if it is refused or gone.
    pub fn add_cwd(&mut self, task: &TaskRef) -> Option<u32> {
        self.add_link(task, "cwd", "its working directory")
    }

    /// The number of the task's root directory; none if it is refused or gone.
    pub fn add_root(&mut self, task: &TaskRef) -> Option<u32> {
        self.add_link(task, "root", "its root directory")
    }

    /// Ties the targets of epoll instances to descriptors of a task that has both.
    fn resolve_epolls(&mut self) {
        for Epoll { file, holder, named_by } in std::mem::take(&mut self.epolls).into_values() {
            let Some(entry) = self.dump.files.get_mut(file).and_then(|file| file.epfd.as_mut()) else { continue };
            let mut lost = None;
            for (pid, fd) in named_by {
                let table = Table::open(pid);
                let fds = table.as_ref().map(Table::numbers).unwrap_or_default();
                let mut resolved = entry.clone();
                match resolve_targets(&mut resolved, (pid, fd), fds) {
                    Ok(()) => {
                        *entry = resolved;
                        lost = None;
                        break;
                    }
                    Err(target) => lost = lost.or(Some(target)),
                }
            }
            // What a running task adds and removes meanwhile is no finding.
            if let Some(target) = lost.filter(|_| self.options.stopped) {
                self.refusals.push(holder.refusal(Problem::new(
                    format!("it watches what was once its descriptor {target}, which no task that has the instance holds any more"),
                    "have the program remove it from the instance (EPOLL_CTL_DEL), or close all its duplicates",
                )));
            }
        }
    }

    /// Everything that cannot be saved, once all tasks have been added.
    pub fn refusals(&mut self) -> Vec<Refusal> {
        self.resolve_epolls();
        let mut refusals = self.refusals.clone();
        let stopped = self.options.stopped && refusals.is_empty();
        let (problems, others) = self.terminals.problems(self.options.outside_terminal, stopped);
        refusals.extend(problems.into_iter().map(|(holder, problem)| holder.refusal(problem)));
        refusals.extend(others);
        let pipes = self.pipes.half_outside().map(|(inode, holder)| (format!("pipe[{inode}]"), holder));
        let fifos = self.fifos.half_outside().map(|(inode, holder)| (format!("fifo[{inode}]"), holder));
        let sockets = self.sockets.half_outside().map(|(inode, holder)| (format!("socket[{inode}]"), holder));
        for (key, holder) in pipes.chain(fifos).chain(sockets) {
            let stdio = self.options.outside_stdio && holder.of_root && holder.fd.is_some_and(|fd| fd <= 2);
            if stdio || self.options.external.contains(&key) {
                continue;
            }
            if self.options.outside_pipes && key.starts_with("pipe") {
                if self.options.stopped {
                    let told = holder.refusal(Problem::new("its other end is held by a process outside the tree", ""));
                    tracing::warn!(
                        "{told}: it will be closed in the restored tree, unless the restore is given another"
                    );
                }
                continue;
            }
            let remedy = match self.options.of_bundle {
                true => "have the program, or the process outside, close it".to_owned(),
                false => {
                    format!("name it with --external {key} and give it back at restore (--inherit-fd), or close it")
                }
            };
            refusals.push(holder.refusal(Problem::new("its other end is held by a process outside the tree", remedy)));
        }
        refusals
    }

    /// The records of all that was added.
    pub fn finish(mut self) -> FilesDump {
        self.resolve_epolls();
        let mut put = |kind: Kind, image: Vec<u8>| {
            if image != kind.magic() {
                self.dump.images.push((kind.name(), image));
            }
        };
        put(Kind::PipesData, self.pipes.image(Kind::PipesData));
        put(Kind::SkQueues, self.sockets.image());
        put(Kind::FifoData, self.fifos.image(Kind::FifoData));
        for (kind, image) in std::mem::take(&mut self.terminals).images() {
            put(kind, image);
        }
        put(Kind::FileLocks, encode(Kind::FileLocks, &self.locks.entries));
        put(Kind::RemapFpath, encode(Kind::RemapFpath, &self.ghosts.remaps));
        self.dump.images.append(&mut self.ghosts.images);
        self.dump
    }
}

fn terminal_side(stat: &Statx) -> Option<Side> {
    let is_device = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::CharacterDevice;
    Side::of_device(stat.stx_rdev_major, stat.stx_rdev_minor).filter(|_| is_device)
}

/// Finds the file that a local socket is bound to: an absolute name from the tree's root, another from the task's
/// working directory.
fn socket_file(paths: &Paths, pid: HostPid, name: &[u8], (inode, device): (u32, u32)) -> Option<SocketFile> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let (stat, directory) = match name.strip_prefix(b"/") {
        Some(relative) => (statx(paths.root()?, relative, flags, STATX), None),
        None => {
            let link = format!("/proc/{pid}/cwd");
            let open = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(&link, open, Mode::empty()).ok()?;
            (statx(directory, name, flags, STATX), Some(rustix::fs::readlink(&link, Vec::new()).ok()?.into_bytes()))
        }
    };
    let stat = stat.ok()?;
    let same = stat.stx_ino as u32 == inode && kernel_device(stat.stx_dev_major, stat.stx_dev_minor) == device;
    same.then_some(SocketFile { mode: stat.stx_mode.into(), uid: stat.stx_uid, gid: stat.stx_gid, directory })
}

/// The description of `pid`'s descriptor `fd` among those alike, or where it belongs.
fn position(alike: &[Known], pid: HostPid, fd: u32) -> Result<usize, usize> {
    alike
        .binary_search_by(|known| compare(kcmp::Kind::File, (known.pid, known.fd), (pid, fd)).unwrap_or(Ordering::Less))
}

/// The number in a name like `pipe:[7]` or `socket:[7]`; images have 32 bits for it.
fn inode_of(name: &[u8]) -> Option<u32> {
    let name = std::str::from_utf8(name).ok()?;
    let (_, number) = name.strip_suffix(']')?.split_once(":[")?;
    number.parse::<u64>().ok().map(|inode| inode as u32)
}

/// What people call an object that is no file.
fn kind_of(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    match name.split_once(":[") {
        Some(("anon_inode", kind)) => format!("{} descriptors", kind.trim_end_matches(']')),
        Some((kind @ ("net" | "mnt" | "pid" | "uts" | "ipc" | "user" | "cgroup" | "time"), _)) => {
            format!("descriptors of a namespace ({kind})")
        }
        _ => format!("objects of this kind ({name})"),
    }
}
