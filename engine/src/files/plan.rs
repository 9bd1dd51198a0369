//! What a restore makes, and which task makes it.
//!
//! A description belongs to the lowest common ancestor of the tasks that hold it: that task makes it before it clones its
//! children, at a number that no task uses, and clone(2) hands it down. What only one task holds is made last, at its final
//! number. Descriptions that can only be made together (the ends of a pipe) form one unit.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use rustix::fs::{Mode, OFlags};

use super::ghost_restore::GhostPlan;
use super::lock;
use super::names::Names;
use super::pipe::PipeContent;
use super::tty::{Circumstances, TerminalPlan};
use crate::agent::AgentError;
use crate::images::file_lock::FileLockEntry;
use crate::images::files::{FdType, FdinfoEntry, FileEntry};
use crate::images::pipe::PipeDataEntry;
use crate::images::tty::{TtyDataEntry, TtyInfoEntry};
use crate::images::unix::UnixSkEntry;
use crate::images::{DecodeError, Kind, Reader, decode_all};
use crate::sockets::{decode_queues, inet, unix};
use crate::sys::NsPid;

/// Why descriptors could not be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum RestoreFilesError {
    /// An image is damaged.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// An image cannot be read.
    #[error("cannot read image {image}: {source}")]
    Read { image: String, source: std::io::Error },
    /// The set contradicts itself.
    #[error("the images of descriptors are inconsistent: {problem}: damaged, or not a whole set")]
    Inconsistent { problem: String },
    /// Some things cannot be made; all of them.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Obstacles(Vec<Obstacle>),
    /// The task did not do its work.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A step failed.
    #[error("pid {pid} ({comm}): {object}: cannot {step}: {errno}")]
    Step { pid: NsPid, comm: String, object: String, step: &'static str, errno: Errno },
    /// A file is not what it was.
    #[error("pid {pid} ({comm}): {object}: {problem}")]
    Changed { pid: NsPid, comm: String, object: String, problem: String },
    /// A name cannot be used.
    #[error("{path}: cannot {step}: {source}")]
    Name { path: String, step: &'static str, source: std::io::Error },
    /// A deleted file cannot be made again.
    #[error("deleted file {path}: cannot {step}: {source}")]
    Ghost { path: String, step: &'static str, source: std::io::Error },
}

pub(super) fn inconsistent(problem: impl Into<String>) -> RestoreFilesError {
    RestoreFilesError::Inconsistent { problem: problem.into() }
}

/// One thing that stands in a restore's way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// The process that needs it, as its own namespace numbers it.
    pub pid: NsPid,
    /// Its name.
    pub comm: String,
    /// The object: "fd 7, /tmp/x".
    pub object: String,
    /// What is wrong.
    pub problem: String,
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pid {} ({}): {}: {}", self.pid, self.comm, self.object, self.problem)
    }
}

/// A task to be restored, as far as descriptors are concerned.
#[derive(Clone, Debug)]
pub struct RestoreTask {
    /// Its id as its own namespace sees it.
    pub pid: NsPid,
    /// Its name.
    pub comm: String,
    /// The place in the list, before its own, of the task that clones it; none for the first task.
    pub parent: Option<usize>,
    /// The number of its descriptor table; 0 for tasks that have none.
    pub files_id: u32,
    /// The session it is in; none for one that has exited.
    pub session: i32,
    /// Whether it is made before the task that makes it begins its session.
    pub early: bool,
}

/// What a restore has for terminals whose master side was held outside the tree.
#[derive(Debug, Default)]
pub struct Terminals {
    /// Somebody takes the master of a new one.
    pub hands_out: bool,
    /// The terminal of whoever restores, to be shared.
    pub own: Option<OwnedFd>,
}

/// Descriptors of ferry's that the first task inherits, by key: the stand-in for an object of the set (`pipe:[INO]`,
/// `socket:[INO]`, `file[MNT:INO]`, a path without its first slash), or a name of the caller's own.
pub type Inherited = BTreeMap<String, OwnedFd>;

/// How many descriptors the making of a unit needs at most besides its members: the other ends of pipes and FIFOs, a directory.
const SPARE: u32 = 4;

/// What is made as one, and by whom.
pub(super) struct Unit {
    /// Descriptions, by id.
    pub members: Vec<u32>,
    /// The task that makes them.
    pub task: usize,
    /// Whether no other task holds any.
    pub private: bool,
    /// Lowest descriptor number of a member, to make things in the order of their numbers.
    lowest: u32,
}

/// A descriptor table, and the topmost task that has it.
pub(super) struct Table {
    pub owner: usize,
    pub entries: Vec<FdinfoEntry>,
}

/// The plan of one restore. See [`RestorePlan::prepare`] for the order of calls.
pub struct RestorePlan {
    pub(super) tasks: Vec<RestoreTask>,
    pub(super) entries: HashMap<u32, FileEntry>,
    pub(super) tables: BTreeMap<u32, Table>,
    pub(super) units: Vec<Unit>,
    /// Where shared descriptions wait to be placed, by id.
    pub(super) waiting: HashMap<u32, u32>,
    /// The first task that holds a description, and its number there.
    pub(super) first_holder: HashMap<u32, (usize, u32)>,
    pub(super) pipe_contents: HashMap<u32, PipeContent>,
    pub(super) fifo_contents: HashMap<u32, PipeContent>,
    /// What waits in receive queues, by description.
    pub(super) queues: HashMap<u32, Vec<Vec<u8>>>,
    pub(super) locks: Vec<FileLockEntry>,
    pub(super) inherited: Inherited,
    /// The number of an inherited descriptor in the tree until all is placed.
    pub(super) inherited_at: BTreeMap<String, u32>,
    pub(super) ghosts: GhostPlan,
    pub(super) names: Names,
    pub(super) terminals: TerminalPlan,
    pub(super) base: u32,
    pub(super) end: u32,
}

impl RestorePlan {
    /// Reads the images through `read` (none for an image that is not in the set) and plans for `tasks`, parents first.
    ///
    /// # Errors
    /// Damaged or inconsistent images; [`RestoreFilesError::Obstacles`] for all that cannot be restored by any means.
    pub fn new(
        read: &mut dyn FnMut(&str) -> std::io::Result<Option<Vec<u8>>>,
        tasks: Vec<RestoreTask>,
        inherited: Inherited,
        terminals: Terminals,
    ) -> Result<Self, RestoreFilesError> {
        let mut get =
            |name: &str| read(name).map_err(|source| RestoreFilesError::Read { image: name.to_owned(), source });
        let files: Vec<FileEntry> = match get(&Kind::Files.name())? {
            Some(bytes) => decode_all(&Kind::Files.name(), Kind::Files, &bytes)?,
            None => Vec::new(),
        };
        let mut tables = BTreeMap::new();
        for (index, task) in tasks.iter().enumerate() {
            if task.parent.map_or(index != 0, |parent| parent >= index) {
                return Err(inconsistent(format!("pid {} does not come after its parent", task.pid)));
            }
            if task.files_id == 0 || tables.contains_key(&task.files_id) {
                continue;
            }
            let name = Kind::Fdinfo.name_for(task.files_id);
            let bytes = get(&name)?.ok_or_else(|| inconsistent(format!("{name} is missing")))?;
            tables.insert(task.files_id, Table { owner: index, entries: decode_all(&name, Kind::Fdinfo, &bytes)? });
        }
        let mut contents = |kind: Kind| match get(&kind.name())? {
            Some(bytes) => decode_contents(kind, &bytes),
            None => Ok(HashMap::new()),
        };
        let (pipe_contents, fifo_contents) = (contents(Kind::PipesData)?, contents(Kind::FifoData)?);
        let locks: Vec<FileLockEntry> = match get(&Kind::FileLocks.name())? {
            Some(bytes) => decode_all(&Kind::FileLocks.name(), Kind::FileLocks, &bytes)?,
            None => Vec::new(),
        };
        if let Some(lock) = locks.iter().find(|lock| !lock::is_whole(lock)) {
            return Err(inconsistent(format!(
                "the lock at descriptor {} of pid {} is of no known kind",
                lock.fd, lock.pid
            )));
        }
        let queues = match get(&Kind::SkQueues.name())? {
            Some(bytes) => decode_queues(&bytes)?,
            None => HashMap::new(),
        };
        let infos = match get(&Kind::TtyInfo.name())? {
            Some(bytes) => decode_all(&Kind::TtyInfo.name(), Kind::TtyInfo, &bytes)?,
            None => Vec::new(),
        };
        let input = match get(&Kind::TtyData.name())? {
            Some(bytes) => decode_all(&Kind::TtyData.name(), Kind::TtyData, &bytes)?,
            None => Vec::new(),
        };
        let entries: HashMap<u32, FileEntry> = files.into_iter().map(|entry| (entry.id, entry)).collect();
        let ghosts = GhostPlan::read(&mut get, &entries)?;
        let mut plan = Self {
            tasks,
            entries,
            tables,
            units: Vec::new(),
            waiting: HashMap::new(),
            first_holder: HashMap::new(),
            pipe_contents,
            fifo_contents,
            queues,
            locks,
            inherited,
            inherited_at: BTreeMap::new(),
            ghosts,
            names: Names::default(),
            terminals: TerminalPlan::default(),
            base: 0,
            end: 0,
        };
        plan.find_obstacles((infos, input), &terminals)?;
        plan.share_terminal(terminals.own.as_ref());
        plan.reopen_inherited_pipes();
        plan.arrange();
        plan.check_limit()?;
        Ok(plan)
    }

    /// The lowest number from which on no task uses any in the end.
    pub fn base(&self) -> u32 {
        self.base
    }

    /// The number, in every task until its descriptors are placed, of an inherited descriptor.
    pub fn inherited_number(&self, key: &str) -> Option<u32> {
        self.inherited_at.get(key).copied()
    }

    /// The task that has epoll instance `id` watch its descriptor `target` again: the first that holds both.
    pub(super) fn watcher(&self, id: u32, target: u32) -> Option<usize> {
        let holds = |table: &&Table| {
            table.entries.iter().any(|entry| entry.id == id) && table.entries.iter().any(|entry| entry.fd == target)
        };
        self.tables.values().filter(holds).map(|table| table.owner).min()
    }

    /// The words for a description in messages: its number in the first task that has it, and its path or kind.
    pub(super) fn object(&self, id: u32) -> String {
        let name = match self.entries.get(&id) {
            Some(FileEntry { reg: Some(reg), .. }) => String::from_utf8_lossy(&reg.name).into_owned(),
            Some(FileEntry { fifo: Some(fifo), .. }) => match fifo.regf_id.and_then(|id| self.entries.get(&id)) {
                Some(FileEntry { reg: Some(reg), .. }) => format!("FIFO {}", String::from_utf8_lossy(&reg.name)),
                _ => "a FIFO".into(),
            },
            Some(FileEntry { pipe: Some(pipe), .. }) => format!("pipe:[{}]", pipe.pipe_id),
            Some(FileEntry { usk: Some(socket), .. }) => format!("socket:[{}]", socket.ino),
            Some(FileEntry { isk: Some(socket), .. }) => format!("socket:[{}]", socket.ino),
            Some(FileEntry { tty: Some(tty), .. }) => {
                match tty.regf_id.and_then(|id| self.entries.get(&id)).and_then(|entry| entry.reg.as_ref()) {
                    Some(reg) => String::from_utf8_lossy(&reg.name).into_owned(),
                    None => "a terminal".into(),
                }
            }
            Some(entry) => format!("{:?}", entry.r#type()).to_lowercase(),
            None => format!("description {id}"),
        };
        match self.first_holder.get(&id) {
            Some((_, fd)) => format!("fd {fd}, {name}"),
            None => name,
        }
    }

    fn obstacle(&self, task: usize, object: String, problem: impl Into<String>) -> Obstacle {
        let RestoreTask { pid, comm, .. } = &self.tasks[task];
        Obstacle { pid: *pid, comm: comm.clone(), object, problem: problem.into() }
    }

    /// Checks that the set is whole, and finds what cannot be restored.
    fn find_obstacles(
        &mut self,
        described: (Vec<TtyInfoEntry>, Vec<TtyDataEntry>),
        terminals: &Terminals,
    ) -> Result<(), RestoreFilesError> {
        for table in self.tables.values() {
            for FdinfoEntry { id, fd, .. } in &table.entries {
                if !self.entries.contains_key(id) {
                    return Err(inconsistent(format!("descriptor {fd} names no description")));
                }
                if *fd >= i32::MAX as u32 {
                    return Err(inconsistent(format!("descriptor {fd} is too high")));
                }
                self.first_holder.entry(*id).or_insert((table.owner, *fd));
            }
        }
        let mut obstacles = Vec::new();
        for (id, (task, _)) in &self.first_holder {
            if let Some(problem) = self.unsupported(*id)? {
                obstacles.push(self.obstacle(*task, self.object(*id), problem));
            }
        }
        let circumstances = Circumstances {
            hands_out: terminals.hands_out,
            has_own: terminals.own.is_some(),
            inherited: &self.inherited,
        };
        let held = self.first_holder.keys().copied();
        let (plan, problems) = TerminalPlan::new(&self.entries, held, described, &self.tasks, circumstances)?;
        self.terminals = plan;
        for (id, problem) in problems.into_iter().chain(self.early_holders()) {
            let task = self.first_holder.get(&id).map_or(0, |(task, _)| *task);
            obstacles.push(self.obstacle(task, self.object(id), problem));
        }
        for task in &self.tasks {
            let Some(owner) = self.tables.get(&task.files_id).map(|table| table.owner) else { continue };
            // CLONE_FILES of clone(2): only the one that clones can share its table.
            let parent = task.parent.map(|parent| self.tasks[parent].files_id);
            if self.tasks[owner].pid != task.pid && parent != Some(task.files_id) {
                let problem = "it is shared with a task that is not its parent, which cannot be restored";
                obstacles.push(Obstacle {
                    pid: task.pid,
                    comm: task.comm.clone(),
                    object: "its descriptor table".into(),
                    problem: problem.into(),
                });
            }
        }
        obstacles.sort_by_key(|obstacle| obstacle.pid);
        if obstacles.is_empty() { Ok(()) } else { Err(RestoreFilesError::Obstacles(obstacles)) }
    }

    /// Descriptions of `/dev/tty` that somebody holds who cannot inherit them from the session's leader.
    fn early_holders(&self) -> Vec<(u32, String)> {
        let mut found = Vec::new();
        for table in self.tables.values() {
            for FdinfoEntry { id, .. } in &table.entries {
                let Some(leader) = self.terminals.opened_late.get(id).copied().flatten() else { continue };
                let (mut task, mut early) = (table.owner, false);
                while task != leader && task != 0 {
                    early = self.tasks[task].early;
                    task = self.tasks[task].parent.unwrap_or(0);
                }
                if task != leader || early {
                    let pid = self.tasks[table.owner].pid;
                    found
                        .push((*id, format!("pid {pid} holds it, and was not made by the session that it belongs to")));
                }
            }
        }
        found
    }

    /// Every description of a terminal from outside is opened anew from the one that is shared: its flags are the tree's alone.
    fn share_terminal(&mut self, own: Option<&OwnedFd>) {
        let Some(own) = own else { return };
        for id in self.terminals.own.clone() {
            let flags = self.entries.get(&id).and_then(|entry| entry.tty.as_ref()).map_or(0, |tty| tty.flags);
            if let Some(opened) = reopen(own, flags) {
                self.inherited.insert(description_key(id), opened);
            }
        }
    }

    /// Why a description cannot be restored, if so. An entry that lacks its own part is an error.
    fn unsupported(&self, id: u32) -> Result<Option<&'static str>, RestoreFilesError> {
        let entry = &self.entries[&id];
        let whole = match entry.r#type() {
            FdType::Reg => match &entry.reg {
                Some(reg) if reg.ext == Some(true) => {
                    let key = String::from_utf8_lossy(&reg.name).into_owned();
                    return Ok((!self.inherited.contains_key(&key))
                        .then_some("it is external: name its stand-in with --inherit-fd"));
                }
                Some(reg) => reg.name.starts_with(b"/") && !reg.name.contains(&0),
                None => false,
            },
            FdType::Pipe => match &entry.pipe {
                Some(pipe) => self.fits(self.pipe_contents.get(&pipe.pipe_id)),
                None => false,
            },
            FdType::Fifo => match &entry.fifo {
                Some(fifo) => {
                    let reg = fifo.regf_id.and_then(|id| self.entries.get(&id)).and_then(|entry| entry.reg.as_ref());
                    reg.is_some_and(|reg| reg.name.starts_with(b"/") && !reg.name.contains(&0))
                        && self.fits(self.fifo_contents.get(&fifo.pipe_id))
                }
                None => false,
            },
            FdType::InetSk => match &entry.isk {
                Some(socket) if inet::is_whole(socket) => return Ok(inet::obstacle(socket)),
                _ => false,
            },
            FdType::UnixSk => match &entry.usk {
                Some(socket) if unix::is_whole(socket) => return Ok(self.unix_obstacle(id, socket)),
                _ => false,
            },
            FdType::Eventpoll => entry.epfd.is_some(),
            FdType::Eventfd => entry.efd.is_some(),
            FdType::Signalfd => entry.sgfd.is_some(),
            FdType::Timerfd => entry.tfd.is_some(),
            FdType::Tty => entry.tty.is_some(),
            _ => return Ok(Some("objects of this kind cannot be restored yet")),
        };
        if whole { Ok(None) } else { Err(inconsistent(format!("description {id} is not whole"))) }
    }

    fn unix_obstacle(&self, id: u32, socket: &UnixSkEntry) -> Option<&'static str> {
        if self.inherited.contains_key(&format!("socket:[{}]", socket.ino)) {
            return None;
        }
        let has_peer = |entry: &FileEntry| {
            entry.usk.as_ref().is_some_and(|peer| (peer.ino, peer.peer) == (socket.peer, socket.ino) && peer.id != id)
        };
        if unix::is_connected(socket) && socket.peer != 0 && !self.entries.values().any(has_peer) {
            return Some("its other end is not in the set: name its stand-in with --inherit-fd");
        }
        unix::obstacle(socket)
    }

    /// Whether content can be written to a new pipe without waiting for a reader.
    fn fits(&self, content: Option<&PipeContent>) -> bool {
        content.is_none_or(|content| content.bytes.len() <= content.size.unwrap_or(65536).max(4096) as usize)
    }

    /// Inherited pipes get a description of their own for each of the set's, opened anew from ferry's: flags and
    /// direction are then the tree's alone. What is not a pipe after all is used as it is.
    fn reopen_inherited_pipes(&mut self) {
        for (id, entry) in &self.entries {
            let Some(pipe) = &entry.pipe else { continue };
            let Some(given) = self.inherited.get(&format!("pipe:[{}]", pipe.pipe_id)) else { continue };
            if let Some(opened) = reopen(given, pipe.flags) {
                self.inherited.insert(description_key(*id), opened);
            }
        }
    }

    /// The inherited descriptor that stands for a description, by its key.
    pub(super) fn stand_in(&self, id: u32) -> Option<u32> {
        let by_key = |key: &str| self.inherited_at.get(key).copied();
        by_key(&description_key(id)).or_else(|| match self.entries.get(&id)? {
            FileEntry { reg: Some(reg), .. } => {
                let name = String::from_utf8_lossy(&reg.name);
                by_key(name.strip_prefix('/').unwrap_or(&name))
            }
            FileEntry { usk: Some(socket), .. } => by_key(&format!("socket:[{}]", socket.ino)),
            FileEntry { tty: Some(_), .. } => by_key(self.terminals.given.get(&id)?),
            _ => None,
        })
    }

    /// Finds out who makes what, and where shared descriptions wait.
    fn arrange(&mut self) {
        let mut units: BTreeMap<(FdType, u32), Unit> = BTreeMap::new();
        let mut highest = 2;
        for table in self.tables.values() {
            for FdinfoEntry { id, fd, .. } in &table.entries {
                highest = highest.max(*fd);
                if self.terminals.makes(*id) {
                    continue;
                }
                let unit = units.entry(self.unit_key(*id)).or_insert_with(|| Unit {
                    members: Vec::new(),
                    task: table.owner,
                    private: true,
                    lowest: *fd,
                });
                if unit.task != table.owner {
                    unit.task = common_ancestor(&self.tasks, unit.task, table.owner);
                    unit.private = false;
                }
                unit.lowest = unit.lowest.min(*fd);
                unit.members.push(*id);
            }
        }
        self.units = units.into_values().collect();
        // What is being made may need numbers above the highest when all below are taken; nothing may wait there.
        let members = self.units.iter().map(|unit| unit.members.len()).max().unwrap_or(0) as u32;
        self.base = highest + 1 + members.max(self.terminals.spare()) + SPARE;
        // A socket whose file was deleted leaves its name to others, one that has it now among them.
        let passes = |id: &u32| self.entries[id].usk.as_ref().is_some_and(|socket| socket.deleted == Some(true));
        self.units.sort_by_cached_key(|unit| (!unit.members.iter().any(passes), unit.lowest));
        let mut next = self.base;
        for key in self.inherited.keys() {
            self.inherited_at.insert(key.clone(), next);
            next += 1;
        }
        next = self.terminals.place(next, &mut self.waiting);
        for unit in &mut self.units {
            unit.members.sort_unstable();
            unit.members.dedup();
            if !unit.private {
                for id in &unit.members {
                    self.waiting.insert(*id, next);
                    next += 1;
                }
            }
        }
        // The last number is the sessions' own.
        self.end = next + 1;
    }

    fn unit_key(&self, id: u32) -> (FdType, u32) {
        let entry = &self.entries[&id];
        match entry {
            FileEntry { pipe: Some(pipe), .. } => (FdType::Pipe, pipe.pipe_id),
            FileEntry { fifo: Some(fifo), .. } => (FdType::Fifo, fifo.pipe_id),
            FileEntry { usk: Some(socket), .. } if unix::is_connected(socket) && socket.peer != 0 => {
                (FdType::UnixSk, socket.ino.min(socket.peer))
            }
            _ => (FdType::Und, id),
        }
    }

    fn check_limit(&self) -> Result<(), RestoreFilesError> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        if limit.is_none_or(|limit| u64::from(self.end) <= limit) || self.tasks.is_empty() {
            return Ok(());
        }
        let problem = format!(
            "{} descriptor numbers are needed for a restore, and ferry's hard limit allows {}: raise it (ulimit -Hn)",
            self.end,
            limit.unwrap_or_default()
        );
        Err(RestoreFilesError::Obstacles(vec![self.obstacle(0, "its descriptors".into(), problem)]))
    }
}

/// A description of its own of what `given` is, or, where that cannot be had, the same.
fn reopen(given: &OwnedFd, flags: u32) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", given.as_raw_fd());
    let flags = OFlags::from_bits_retain(flags) | OFlags::CLOEXEC | OFlags::NOCTTY;
    let opened = rustix::fs::open(path, flags, Mode::empty()).map_err(std::io::Error::from);
    opened.or_else(|_| given.try_clone()).ok()
}

/// The key of an inherited descriptor that is one description of the set.
pub(super) fn description_key(id: u32) -> String {
    format!("description {id}")
}

/// The closest task that is both, or an ancestor of both.
fn common_ancestor(tasks: &[RestoreTask], mut left: usize, mut right: usize) -> usize {
    // Parents come first in the list, so the later of the two cannot be an ancestor of the other.
    while left != right {
        let later = if left > right { &mut left } else { &mut right };
        *later = tasks[*later].parent.unwrap_or(0);
    }
    left
}

fn decode_contents(kind: Kind, bytes: &[u8]) -> Result<HashMap<u32, PipeContent>, RestoreFilesError> {
    let name = kind.name();
    let mut reader = Reader::new(&name, kind, bytes)?;
    let mut contents = HashMap::new();
    while let Some(entry) = reader.next_entry::<PipeDataEntry>()? {
        let bytes = reader.tail(entry.bytes.into())?.to_vec();
        contents.insert(entry.pipe_id, PipeContent { size: entry.size, bytes });
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::encode;
    use crate::images::event::EventfdFileEntry;
    use crate::images::pipe::PipeEntry;

    fn task(pid: i32, parent: Option<usize>, files_id: u32) -> RestoreTask {
        RestoreTask { pid: NsPid(pid), comm: "t".into(), parent, files_id, session: 1, early: false }
    }

    fn descriptor(fd: u32, id: u32) -> FdinfoEntry {
        FdinfoEntry { id, fd, ..FdinfoEntry::default() }
    }

    fn pipe(id: u32, pipe_id: u32) -> FileEntry {
        let pipe = PipeEntry { id, pipe_id, ..PipeEntry::default() };
        FileEntry { r#type: FdType::Pipe as i32, id, pipe: Some(pipe), ..FileEntry::default() }
    }

    fn eventfd(id: u32) -> FileEntry {
        let efd = EventfdFileEntry { id, ..EventfdFileEntry::default() };
        FileEntry { r#type: FdType::Eventfd as i32, id, efd: Some(efd), ..FileEntry::default() }
    }

    fn plan(
        files: &[FileEntry],
        tables: &[(u32, Vec<FdinfoEntry>)],
        tasks: Vec<RestoreTask>,
    ) -> Result<RestorePlan, RestoreFilesError> {
        let mut read = |name: &str| {
            if name == "files.img" {
                return Ok(Some(encode(Kind::Files, files)));
            }
            let table = tables.iter().find(|(number, _)| name == Kind::Fdinfo.name_for(*number));
            Ok(table.map(|(_, entries)| encode(Kind::Fdinfo, entries)))
        };
        RestorePlan::new(&mut read, tasks, Inherited::new(), Terminals::default())
    }

    #[test]
    fn the_closest_common_ancestor_makes_what_is_shared() {
        // 1 - 2 - 3 and 1 - 2 - 4; the ends of one pipe are held by 3 and 4, an eventfd by 4 alone.
        let tasks = vec![task(1, None, 1), task(2, Some(0), 2), task(3, Some(1), 3), task(4, Some(1), 4)];
        let tables =
            [(1, vec![]), (2, vec![]), (3, vec![descriptor(5, 10)]), (4, vec![descriptor(5, 11), descriptor(9, 12)])];
        let plan = plan(&[pipe(10, 7), pipe(11, 7), eventfd(12)], &tables, tasks).expect("a plan");
        let units: Vec<_> = plan.units.iter().map(|unit| (unit.members.clone(), unit.task, unit.private)).collect();
        assert_eq!(units, [(vec![10, 11], 1, false), (vec![12], 3, true)]);
        // Above the highest number, 9, there is room for two members and what else their making needs.
        let base = plan.base();
        assert_eq!(base, 9 + 1 + 2 + SPARE);
        assert_eq!(
            (plan.waiting.get(&10), plan.waiting.get(&11), plan.waiting.get(&12)),
            (Some(&base), Some(&(base + 1)), None)
        );
    }

    #[test]
    fn a_table_of_several_tasks_is_one_holder() {
        let tasks = vec![task(1, None, 1), task(2, Some(0), 1)];
        let plan = plan(&[eventfd(3)], &[(1, vec![descriptor(0, 3), descriptor(1, 3)])], tasks).expect("a plan");
        assert!(plan.units[0].private);
        assert_eq!(plan.units[0].members, [3]);
    }

    #[test]
    fn sets_that_contradict_themselves_are_refused() {
        let lost = plan(&[], &[(1, vec![descriptor(0, 3)])], vec![task(1, None, 1)]);
        assert!(matches!(lost, Err(RestoreFilesError::Inconsistent { .. })));
        let missing = plan(&[], &[], vec![task(1, None, 1)]);
        assert!(matches!(missing, Err(RestoreFilesError::Inconsistent { .. })));
        let hollow = FileEntry { r#type: FdType::Pipe as i32, id: 3, ..FileEntry::default() };
        let hollow = plan(&[hollow], &[(1, vec![descriptor(0, 3)])], vec![task(1, None, 1)]);
        assert!(matches!(hollow, Err(RestoreFilesError::Inconsistent { .. })));
        let unknown = FileEntry { r#type: FdType::Bpfmap as i32, id: 3, ..FileEntry::default() };
        let unknown = plan(&[unknown], &[(1, vec![descriptor(0, 3)])], vec![task(1, None, 1)]);
        assert!(matches!(unknown, Err(RestoreFilesError::Obstacles(all)) if all.len() == 1));
    }
}
