//! Carrying out a [`RestorePlan`], task by task.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, openat2, statx};

use super::epoll::{restore_epoll, watch_target};
use super::event::{arm_timerfd, restore_eventfd, restore_signalfd, restore_timerfd};
use super::lock::restore_lock;
use super::names::{NameJournal, Names, Stay};
use super::owner::restore_owner;
use super::pipe::{directions, restore_fifo, restore_pipe};
use super::plan::{Obstacle, RestoreFilesError, RestorePlan, Unit, inconsistent};
use super::regular::{STATX, open_flags, restore_regular};
use super::session::{Done, Numbers, Place, Session, SessionError, Temporary, compare};
use super::tty::OpenMaster;
use crate::agent::Runner;
use crate::images::event::EventpollTfdEntry;
use crate::images::files::{FdType, FileEntry};
use crate::images::fown::FownEntry;
use crate::images::pipe::PipeEntry;
use crate::images::regfile::RegFileEntry;
use crate::sockets::inet::restore_inet;
use crate::sockets::unix;
use crate::sys::HostPid;

/// A file that no descriptor of the tree holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundFile<'a> {
    /// To be duplicated from this descriptor.
    StandIn(u32),
    /// To be opened at this absolute path.
    Path(&'a [u8]),
}

impl RestorePlan {
    /// Readies the first task, cloned by ferry and at home in its mounts: deleted files are there again, its
    /// descriptor limit is as high as it may be, and it holds nothing but what was handed down and all pseudoterminals, of
    /// which it may have some masters `open` already. Returns the masters that whoever restores gets.
    ///
    /// `journal` is told of the names that are given in file systems.
    ///
    /// Then, for each task, parents first, [`Self::create`], after which its children may be cloned; and when the whole
    /// tree is there, [`Self::place`] for each. Until a task's descriptors are placed it must not keep
    /// descriptors below [`Self::base`] from one of these calls to the next. [`Self::finish`] ends it all.
    ///
    /// # Errors
    /// [`RestoreFilesError`]; what was made outside the task is removed when the plan is dropped.
    pub fn prepare(
        &mut self,
        first: &Runner,
        open: &[OpenMaster],
        journal: Option<Box<dyn NameJournal>>,
    ) -> Result<Vec<OwnedFd>, RestoreFilesError> {
        let mut numbers = Numbers::default();
        let mut moves = Vec::new();
        for (key, descriptor) in &self.inherited {
            let number = descriptor.as_raw_fd() as u32;
            numbers.take(number);
            moves.push((Temporary::known(number), vec![Place { number: self.inherited_at[key], cloexec: true }]));
        }
        let first_master = self.base + self.inherited_at.len() as u32;
        let masters = first_master + self.terminals.pairs.len() as u32;
        let mut unused: Vec<u32> = (first_master..masters).collect();
        for pair in &self.terminals.pairs {
            if let Some(number) = self.master_of(pair, open) {
                numbers.take(number);
                moves.push((Temporary::known(number), vec![Place { number: pair.master_at, cloexec: true }]));
                unused.retain(|number| *number != pair.master_at);
            }
        }
        let scratch = self.scratch().max(moves.iter().map(|(from, _)| from.number() + 1).max().unwrap_or(0));
        let run = || -> Done {
            let mut session = Session::new(first, numbers, scratch);
            let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
            let words = [limit.to_ne_bytes(), limit.to_ne_bytes()].concat();
            let resource = [0, libc::RLIMIT_NOFILE.into()];
            session.must_around("raise its descriptor limit", libc::SYS_prlimit64, &resource, &words, &[0])?;
            session.settle(moves)?;
            session.close_range(0, self.base - 1)?;
            session.close_range(masters, u32::MAX)?;
            for number in unused {
                session.try_call(libc::SYS_close, &[number.into()])?;
            }
            session.finish().map(drop)
        };
        let unheld = self.take_unheld(first, open)?;
        run().map_err(|error| self.explain(0, error))?;
        self.give_names(first.tid(), journal)?;
        let mut masters = self.make_terminals(first, open)?;
        masters.extend(unheld.filter(|_| masters.is_empty()));
        Ok(masters)
    }

    /// Gives the names that the tasks will open, and tells of those that they will bind sockets to.
    fn give_names(&mut self, task: HostPid, journal: Option<Box<dyn NameJournal>>) -> Result<(), RestoreFilesError> {
        let sockets: Vec<(Vec<u8>, Stay)> =
            self.entries.values().filter_map(|entry| unix::bound_file(entry.usk.as_ref()?)).collect();
        if sockets.is_empty() && !self.ghosts.needs_names() {
            return Ok(());
        }
        let failed = |path: &[u8], step| {
            let path = String::from_utf8_lossy(path).into_owned();
            move |source| RestoreFilesError::Name { path, step, source }
        };
        self.names = Names::of(task, journal).map_err(failed(b"/", "open the tree's root"))?;
        for (path, stay) in sockets {
            self.names.expect(&path, stay).map_err(failed(&path, "prepare for its socket"))?;
        }
        self.ghosts.make(&mut self.names)
    }

    /// Makes, in `task`, what it shares with its descendants or they among each other.
    ///
    /// # Errors
    /// [`RestoreFilesError`].
    pub fn create(&self, task: usize, runner: &Runner) -> Result<(), RestoreFilesError> {
        let run = || -> Done {
            let mut session = Session::new(runner, Numbers::default(), self.scratch());
            for unit in self.units.iter().filter(|unit| unit.task == task && !unit.private) {
                let made = self.make_unit(&mut session, unit, &|_| true)?;
                let wait = |id| self.waiting.get(&id).map(|number| Place { number: *number, cloexec: true });
                let moves = made.into_iter().map(|(id, from)| (from, id.and_then(wait).into_iter().collect()));
                session.settle(moves.collect())?;
            }
            session.finish().map(drop)
        };
        run().map_err(|error| self.explain(task, error))
    }

    /// Gives every descriptor of `task` its number, makes what it alone holds, and closes all else.
    ///
    /// # Errors
    /// [`RestoreFilesError`].
    pub fn place(&self, task: usize, runner: &Runner) -> Result<(), RestoreFilesError> {
        let Some(table) = self.tables.get(&self.tasks[task].files_id) else {
            let run = || Session::new(runner, Numbers::default(), self.scratch()).close_range(0, u32::MAX);
            return run().map_err(|error| self.explain(task, error));
        };
        if table.owner != task {
            return Ok(());
        }
        let mut places: std::collections::HashMap<u32, Vec<Place>> = std::collections::HashMap::new();
        for descriptor in &table.entries {
            let cloexec = descriptor.flags & libc::FD_CLOEXEC as u32 != 0;
            places.entry(descriptor.id).or_default().push(Place { number: descriptor.fd, cloexec });
        }
        let run = || -> Done {
            let mut session = Session::new(runner, Numbers::default(), self.scratch());
            for descriptor in &table.entries {
                if let Some(from) = self.waiting.get(&descriptor.id) {
                    session.about(descriptor.id);
                    let cloexec = descriptor.flags & libc::FD_CLOEXEC as u32 != 0;
                    session.duplicate(*from, Place { number: descriptor.fd, cloexec })?;
                }
            }
            let cloexec = |id| places.get(&id).and_then(|places| places.first()).is_some_and(|place| place.cloexec);
            for unit in self.units.iter().filter(|unit| unit.task == task && unit.private) {
                let made = self.make_unit(&mut session, unit, &cloexec)?;
                let moves = made.into_iter().map(|(id, from)| {
                    let mut places = id.and_then(|id| places.get(&id)).cloned().unwrap_or_default();
                    // A descriptor that is in place already has the flag of the first place.
                    if places.iter().skip(1).any(|place| place.number == from.number()) {
                        places.sort_by_key(|place| place.number != from.number());
                    }
                    (id, from, places)
                });
                let moves: Vec<_> = moves.collect();
                for (id, from, places) in &moves {
                    let hinted = id.is_some_and(cloexec);
                    if let Some(place) =
                        places.iter().find(|place| place.number == from.number() && place.cloexec != hinted)
                    {
                        session.set_cloexec(*from, place.cloexec)?;
                    }
                }
                session.settle(moves.into_iter().map(|(_, from, places)| (from, places)).collect())?;
            }
            session.close_range(self.base, u32::MAX)?;
            for (id, places) in &places {
                if let Some(epoll) = self.entries.get(id).and_then(|entry| entry.epfd.as_ref()) {
                    let own = |target: &&EventpollTfdEntry| self.watcher(*id, target.tfd) == Some(task);
                    for target in epoll.tfd.iter().filter(own) {
                        watch_target(&mut session, places[0].number, target)?;
                    }
                }
                if self.first_holder.get(id).is_some_and(|(holder, _)| *holder == task) {
                    self.complete(&mut session, *id, places)?;
                }
            }
            let pid = self.tasks[task].pid;
            for lock in self.locks.iter().filter(|lock| lock.pid == pid.0) {
                let holder = table.entries.iter().find(|entry| entry.fd == lock.fd as u32);
                restore_lock(&mut session, holder.map_or(0, |entry| entry.id), lock)?;
            }
            session.finish().map(drop)
        };
        run().map_err(|error| self.explain(task, error))
    }

    /// What can only be set when a description has its numbers and the whole tree is there.
    fn complete(&self, session: &mut Session<'_>, id: u32, places: &[Place]) -> Done {
        let (Some(entry), Some(place)) = (self.entries.get(&id), places.first()) else { return Ok(()) };
        if let Some(timer) = &entry.tfd {
            arm_timerfd(session, timer, place.number)?;
        }
        match self.owner_of(entry) {
            Some((owner, flags)) => restore_owner(session, id, place.number, owner, flags),
            None => Ok(()),
        }
    }

    fn owner_of<'e>(&'e self, entry: &'e FileEntry) -> Option<(&'e FownEntry, u32)> {
        Some(match entry.r#type() {
            FdType::Reg => entry.reg.as_ref().map(|reg| (&reg.fown, reg.flags))?,
            FdType::Pipe => entry.pipe.as_ref().map(|pipe| (&pipe.fown, pipe.flags))?,
            FdType::Fifo => self.fifo_file(entry).map(|reg| (&reg.fown, reg.flags))?,
            FdType::InetSk => entry.isk.as_ref().map(|socket| (&socket.fown, socket.flags))?,
            FdType::UnixSk => entry.usk.as_ref().map(|socket| (&socket.fown, socket.flags))?,
            FdType::Eventpoll => entry.epfd.as_ref().map(|epoll| (&epoll.fown, epoll.flags))?,
            FdType::Eventfd => entry.efd.as_ref().map(|event| (&event.fown, event.flags))?,
            FdType::Signalfd => entry.sgfd.as_ref().map(|signal| (&signal.fown, signal.flags))?,
            FdType::Timerfd => entry.tfd.as_ref().map(|timer| (&timer.fown, timer.flags))?,
            FdType::Tty => entry.tty.as_ref().map(|tty| (&tty.fown, tty.flags))?,
            _ => return None,
        })
    }

    fn fifo_file<'e>(&'e self, entry: &'e FileEntry) -> Option<&'e RegFileEntry> {
        self.entries.get(&entry.fifo.as_ref()?.regf_id?)?.reg.as_ref()
    }

    pub(super) fn scratch(&self) -> u32 {
        self.end - 1
    }

    /// Makes the descriptions of a unit; those without an id are by-products, to be closed.
    fn make_unit(
        &self,
        session: &mut Session<'_>,
        unit: &Unit,
        cloexec: &dyn Fn(u32) -> bool,
    ) -> Done<Vec<(Option<u32>, Temporary)>> {
        let first = unit.members[0];
        session.about(first);
        let (Some(entry), flag) = (self.entries.get(&first), cloexec(first)) else { return Ok(Vec::new()) };
        if unit.members.iter().any(|id| self.stand_in(*id).is_some()) {
            let mut made = Vec::new();
            for id in &unit.members {
                session.about(*id);
                if let Some(number) = self.stand_in(*id) {
                    let arguments = [number.into(), libc::F_DUPFD_CLOEXEC as u64, 0];
                    let from = session.make("take it over", libc::SYS_fcntl, &arguments, &[], &[])?;
                    if !cloexec(*id) {
                        session.set_cloexec(from, false)?;
                    }
                    made.push((Some(*id), from));
                }
            }
            return Ok(made);
        }
        let one = |made: Temporary| Ok(vec![(Some(first), made)]);
        match entry {
            FileEntry { reg: Some(reg), .. } => {
                let path = self.ghosts.path(first).unwrap_or(&reg.name);
                one(restore_regular(session, reg, path, flag)?)
            }
            FileEntry { pipe: Some(_), .. } => self.make_pipe(session, unit, cloexec),
            FileEntry { fifo: Some(_), .. } => {
                let mut made = Vec::new();
                for id in &unit.members {
                    session.about(*id);
                    let Some(entry) = self.entries.get(id) else { continue };
                    let (Some(fifo), Some(reg)) = (&entry.fifo, self.fifo_file(entry)) else { continue };
                    let path = fifo.regf_id.and_then(|id| self.ghosts.path(id)).unwrap_or(&reg.name);
                    let content = if made.is_empty() { self.fifo_contents.get(&fifo.pipe_id) } else { None };
                    made.push((Some(*id), restore_fifo(session, path, reg.flags, content, cloexec(*id))?));
                }
                Ok(made)
            }
            FileEntry { isk: Some(socket), .. } => one(restore_inet(session, socket, flag)?),
            FileEntry { usk: Some(socket), .. } if !unix::is_connected(socket) => {
                one(unix::restore_single(session, socket, flag)?)
            }
            FileEntry { usk: Some(_), .. } => {
                let end = |id: &u32| {
                    let entry = self.entries.get(id)?.usk.as_ref()?;
                    let packets = self.queues.get(id).map_or(&[][..], Vec::as_slice);
                    Some(unix::End { entry, packets, cloexec: cloexec(*id) })
                };
                let mut ends = unit.members.iter().filter_map(end);
                let Some(first) = ends.next() else { return Ok(Vec::new()) };
                let made = unix::restore_pair(session, first, ends.next())?;
                Ok(made.into_iter().enumerate().map(|(index, end)| (unit.members.get(index).copied(), end)).collect())
            }
            FileEntry { epfd: Some(_), .. } => one(restore_epoll(session, flag)?),
            FileEntry { efd: Some(event), .. } => one(restore_eventfd(session, event, flag)?),
            FileEntry { sgfd: Some(signal), .. } => one(restore_signalfd(session, signal, flag)?),
            FileEntry { tfd: Some(timer), .. } => one(restore_timerfd(session, timer, flag)?),
            FileEntry { tty: Some(_), .. } => one(self.open_hardware(session, first, flag)?),
            _ => Ok(Vec::new()),
        }
    }

    fn make_pipe(
        &self,
        session: &mut Session<'_>,
        unit: &Unit,
        cloexec: &dyn Fn(u32) -> bool,
    ) -> Done<Vec<(Option<u32>, Temporary)>> {
        let members: Vec<&PipeEntry> =
            unit.members.iter().filter_map(|id| self.entries.get(id)?.pipe.as_ref()).collect();
        // The first description of each direction comes from pipe(2), further ones are opened from those.
        let end = |wanted: (bool, bool)| members.iter().find(|pipe| directions(pipe.flags) == wanted);
        let (reader, writer) = (end((true, false)), end((false, true)));
        let flags = [reader, writer].map(|pipe| pipe.map_or(0, |pipe| pipe.flags));
        let content = members.first().and_then(|pipe| self.pipe_contents.get(&pipe.pipe_id));
        let ends = restore_pipe(session, flags, content, false)?;
        let mut made = Vec::new();
        for (end, pipe) in ends.into_iter().zip([reader, writer]) {
            if let Some(pipe) = pipe
                && cloexec(pipe.id)
            {
                session.set_cloexec(end, true)?;
            }
            made.push((pipe.map(|pipe| pipe.id), end));
        }
        for pipe in &members {
            if made.iter().any(|(id, _)| *id == Some(pipe.id)) {
                continue;
            }
            session.about(pipe.id);
            let path = format!("/proc/self/fd/{}", ends[0].number());
            let flag = if cloexec(pipe.id) { libc::O_CLOEXEC as u32 } else { 0 };
            made.push((Some(pipe.id), session.open(path.as_bytes(), open_flags(pipe.flags) | flag)?));
        }
        Ok(made)
    }

    /// Where a file is found that no descriptor holds: a mapping's, the executable, a directory. The task's root must be
    /// that of its mount namespace, and its descriptors not be placed yet.
    ///
    /// # Errors
    /// [`RestoreFilesError::Inconsistent`] when there is no such file in the set.
    pub fn find_file(&self, id: u32) -> Result<FoundFile<'_>, RestoreFilesError> {
        let reg = self.entries.get(&id).and_then(|entry| entry.reg.as_ref());
        let reg = reg.ok_or_else(|| inconsistent(format!("there is no file {id}")))?;
        if let Some(number) = self.stand_in(id) {
            return Ok(FoundFile::StandIn(number));
        }
        let path = self.ghosts.path(id).unwrap_or(&reg.name);
        if path.starts_with(b"/") && !path.contains(&0) {
            return Ok(FoundFile::Path(path));
        }
        Err(inconsistent(format!("file {id} has no path")))
    }

    /// The path of a file of the set, for messages.
    pub fn path_of(&self, id: u32) -> Option<String> {
        let reg = self.entries.get(&id)?.reg.as_ref()?;
        Some(String::from_utf8_lossy(&reg.name).into_owned())
    }

    /// Ends the restore, as far as it can be undone: the names of deleted files are gone again, those of sockets stay.
    ///
    /// # Errors
    /// [`RestoreFilesError::Ghost`] for a name that could not be removed.
    pub fn finish(&mut self) -> Result<(), RestoreFilesError> {
        let passing = self.names.finish();
        passing.map_err(|(path, source)| RestoreFilesError::Ghost {
            path: String::from_utf8_lossy(&path).into_owned(),
            step: "remove it again",
            source,
        })
    }

    /// Removes the links that the dump had made for this restore, which cannot be repeated from then on. The tree is as good as
    /// running: a link that stays is only logged.
    pub fn remove_links(&mut self) {
        self.ghosts.remove_links(&mut self.names);
    }

    /// Looks, below `root`, for files that are missing or not what they were; nothing is made. `on_mount` tells whether files
    /// of a mount (none: the only one there is) can be seen there already.
    pub fn check(&self, root: BorrowedFd<'_>, on_mount: &dyn Fn(Option<i32>) -> bool) -> Vec<Obstacle> {
        let mut obstacles = Vec::new();
        for (id, entry) in &self.entries {
            let Some(reg) = &entry.reg else { continue };
            let skipped = reg.ext == Some(true)
                || self.terminals.files.contains(id)
                || self.ghosts.is_remapped(*id)
                || self.stand_in(*id).is_some();
            if skipped || !on_mount(reg.mnt_id) || self.is_of_task(&reg.name) {
                continue;
            }
            if let Err(problem) = look_at(root, reg) {
                let task = self.first_holder.get(id).map_or(0, |(task, _)| *task);
                let (pid, comm) = (self.tasks[task].pid, self.tasks[task].comm.clone());
                obstacles.push(Obstacle { pid, comm, object: self.object(*id), problem });
            }
        }
        obstacles.sort_by(|left, right| (left.pid, &left.object).cmp(&(right.pid, &right.object)));
        obstacles
    }

    /// Whether a file is what `/proc` shows of a task of the tree, which may not exist yet.
    fn is_of_task(&self, path: &[u8]) -> bool {
        let number = path.strip_prefix(b"/proc/").and_then(|rest| rest.split(|byte| *byte == b'/').next());
        let pid = number.and_then(|digits| std::str::from_utf8(digits).ok()?.parse::<i32>().ok());
        pid.is_some_and(|pid| self.tasks.iter().any(|task| task.pid.0 == pid))
    }

    /// Puts a session's failure into words.
    pub(super) fn explain(&self, task: usize, error: SessionError) -> RestoreFilesError {
        let task = &self.tasks[task];
        let (pid, comm) = (task.pid, task.comm.clone());
        match error {
            SessionError::Agent(error) => RestoreFilesError::Agent(error),
            SessionError::Step { id, step, errno } => {
                RestoreFilesError::Step { pid, comm, object: self.object(id), step, errno }
            }
            SessionError::Changed { id, problem } => {
                RestoreFilesError::Changed { pid, comm, object: self.object(id), problem }
            }
            SessionError::Number { id, expected, got } => {
                let problem = format!("the kernel gave descriptor {got} where {expected} was free");
                RestoreFilesError::Changed { pid, comm, object: self.object(id), problem }
            }
        }
    }
}

/// Compares the file at a saved path with what was saved.
fn look_at(root: BorrowedFd<'_>, reg: &RegFileEntry) -> Result<(), String> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let found = openat2(root, &reg.name[..], flags, Mode::empty(), ResolveFlags::IN_ROOT)
        .and_then(|file| statx(file.as_fd(), "", AtFlags::EMPTY_PATH, STATX));
    match found {
        Ok(stat) => compare(reg.size, reg.mode, stat.stx_size, stat.stx_mode.into()),
        Err(rustix::io::Errno::NOENT) => Err("the file is missing: put it back where it was".into()),
        Err(error) => Err(format!("it cannot be found: {error}")),
    }
}
