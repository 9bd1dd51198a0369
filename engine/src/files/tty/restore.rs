//! Making terminals: the first task opens them, ferry gives them what they had through duplicates.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use rustix::fs::{Gid, Mode, Uid};

use super::super::plan::{RestoreFilesError, RestorePlan};
use super::super::regular::open_flags;
use super::super::session::{Done, Numbers, Place, Session, SessionError, Temporary};
use super::plan::{Fate, Pair, Through};
use super::{input, read_settings, read_size};
use crate::agent::Runner;
use crate::images::tty::TtyInfoEntry;
use crate::sys::{pidfd, terminal};

/// A master that the first task has open already, since its slave is mounted somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenMaster {
    /// The device of its devpts instance when it was saved, as in `st_dev`.
    pub instance: u64,
    /// The slave's number.
    pub index: u32,
    /// The descriptor.
    pub number: u32,
    /// Whether it is its slave that is mounted; else it was only in the way.
    pub mounted: bool,
}

/// How a session leader gets its terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controlled {
    /// The task's place in the list.
    pub leader: usize,
    /// The number of a descriptor of the terminal, in every task until it is placed.
    pub number: u32,
    /// The foreground process group; 0 for the leader's own.
    pub group: i32,
}

type Furnished = Result<(), (&'static str, Errno)>;

impl RestorePlan {
    /// The sessions that have a controlling terminal.
    pub fn controlled(&self) -> Vec<Controlled> {
        let of = |control: &super::plan::Control| {
            let number = match control.through {
                Through::Pair(place) => {
                    let pair = &self.terminals.pairs[place];
                    pair.keeper_at.or_else(|| self.waiting.get(pair.slaves.first()?).copied())
                }
                Through::Given(id) => self.stand_in(id),
            };
            Some(Controlled { leader: control.leader.unwrap_or(0), number: number?, group: control.group })
        };
        self.terminals.controls.iter().filter_map(of).collect()
    }

    /// Makes all pairs, in the first task. Returns the masters that go to whoever restores.
    ///
    /// # Errors
    /// [`RestoreFilesError`].
    pub(in super::super) fn make_terminals(
        &self,
        first: &Runner,
        open: &[OpenMaster],
    ) -> Result<Vec<OwnedFd>, RestoreFilesError> {
        let mut handed_out = Vec::new();
        if self.terminals.pairs.is_empty() && self.terminals.opened_late.is_empty() && self.terminals.own.is_empty() {
            return Ok(handed_out);
        }
        let failed = |id: u32, step: &'static str| move |errno| self.explain(0, SessionError::Step { id, step, errno });
        let task = pidfd::open(first.tid()).map_err(failed(0, "look at the first task"))?;
        for pair in &self.terminals.pairs {
            let id = pair.member();
            let is_open = self.master_of(pair, open).is_some();
            let made = || -> Result<Option<OwnedFd>, RestoreFilesError> {
                let told = |error| self.explain(0, error);
                if !is_open {
                    self.open_master(first, pair).map_err(told)?;
                }
                let master = pidfd::get_fd(task.as_fd(), pair.master_at as i32).map_err(failed(id, "reach it"))?;
                terminal::set_locked(master.as_fd(), false).map_err(failed(id, "unlock it"))?;
                self.open_slaves(first, pair).map_err(told)?;
                let mut slaves = Vec::new();
                for slave in &pair.slaves {
                    let number = self.waiting[slave] as i32;
                    slaves.push(pidfd::get_fd(task.as_fd(), number).map_err(failed(*slave, "reach it"))?);
                }
                self.furnish(pair, master.as_fd(), &slaves).map_err(|(step, errno)| failed(id, step)(errno))?;
                if pair.fate != Fate::Kept {
                    let mut session = Session::new(first, Numbers::default(), self.scratch());
                    session.about(id);
                    session.close(Temporary::known(pair.master_at)).and_then(|()| session.flush()).map_err(told)?;
                }
                Ok((pair.fate == Fate::HandedOut).then_some(master))
            };
            handed_out.extend(made()?);
        }
        self.open_controlling(None, first)?;
        self.furnish_own();
        Ok(handed_out)
    }

    /// The master of a terminal that is mounted somewhere (as `/dev/console`) while no task has it open.
    pub(in super::super) fn take_unheld(
        &self,
        first: &Runner,
        open: &[OpenMaster],
    ) -> Result<Option<OwnedFd>, RestoreFilesError> {
        let held = |open: &OpenMaster| self.terminals.pairs.iter().any(|pair| self.is_master_of(pair, open));
        let Some(unheld) = open.iter().find(|open| self.terminals.hands_out && open.mounted && !held(open)) else {
            return Ok(None);
        };
        let failed = |errno| {
            let step = "take over a terminal that is mounted";
            self.explain(0, SessionError::Step { id: 0, step, errno })
        };
        let task = pidfd::open(first.tid()).map_err(failed)?;
        let master = pidfd::get_fd(task.as_fd(), unheld.number as i32).map_err(failed)?;
        terminal::set_locked(master.as_fd(), false).map_err(failed)?;
        Ok(Some(master))
    }

    fn is_master_of(&self, pair: &Pair, open: &OpenMaster) -> bool {
        let device = pair.slave_info.as_ref().and_then(|info| info.dev);
        open.index == pair.index && device.is_none_or(|device| u64::from(device) == open.instance)
    }

    /// The open master of a pair.
    pub(in super::super) fn master_of(&self, pair: &Pair, open: &[OpenMaster]) -> Option<u32> {
        open.iter().find(|open| self.is_master_of(pair, open)).map(|open| open.number)
    }

    fn path(&self, id: u32) -> Option<&[u8]> {
        let file = self.entries.get(&id)?.tty.as_ref()?.regf_id?;
        Some(&self.entries.get(&file)?.reg.as_ref()?.name)
    }

    fn flags(&self, id: u32) -> u32 {
        self.entries.get(&id).and_then(|entry| entry.tty.as_ref()).map_or(libc::O_RDWR as u32, |tty| tty.flags)
    }

    /// Opens masters until the index comes.
    fn open_master(&self, first: &Runner, pair: &Pair) -> Done {
        let mut session = Session::new(first, Numbers::default(), self.scratch());
        session.about(pair.member());
        let beside = |slave: &[u8]| {
            let directory = &slave[..slave.iter().rposition(|byte| *byte == b'/')?];
            directory.ends_with(b"/pts").then(|| [directory, b"/ptmx"].concat())
        };
        let own = pair.master.and_then(|id| self.path(id)).map(<[u8]>::to_vec);
        let path = own.or_else(|| pair.slaves.iter().find_map(|id| beside(self.path(*id)?)));
        let path = path.unwrap_or_else(|| b"/dev/ptmx".to_vec());
        let flags = open_flags(pair.master.map_or(libc::O_RDWR as u32, |id| self.flags(id))) | libc::O_CLOEXEC as u32;
        let mut others = Vec::new();
        loop {
            let master = session.open(&path, flags)?;
            let arguments = [master.number().into(), terminal::TIOCGPTN];
            let index = session.ask("read its index", libc::SYS_ioctl, &arguments, 4)?;
            let index = index.try_into().map_or(u32::MAX, u32::from_ne_bytes);
            if index > pair.index {
                let problem = format!("the pseudoterminal with index {} is in use by another program", pair.index);
                return Err(SessionError::Changed { id: session.id(), problem });
            }
            if index == pair.index {
                session.duplicate(master.number(), Place { number: pair.master_at, cloexec: true })?;
                session.close(master)?;
                break;
            }
            others.push(master);
        }
        others.into_iter().try_for_each(|master| session.close(master))?;
        session.flush()
    }

    fn open_slaves(&self, first: &Runner, pair: &Pair) -> Done {
        let mut session = Session::new(first, Numbers::default(), self.scratch());
        let mut moves = Vec::new();
        let mut wait = |slave, number| moves.push((slave, vec![Place { number, cloexec: true }]));
        for id in &pair.slaves {
            session.about(*id);
            let path = self.path(*id).map_or_else(|| format!("/dev/pts/{}", pair.index).into_bytes(), <[u8]>::to_vec);
            let flags = open_flags(self.flags(*id)) | libc::O_CLOEXEC as u32;
            wait(session.open(&path, flags)?, self.waiting[id]);
        }
        if let Some(number) = pair.keeper_at {
            session.about(pair.member());
            let flags = (libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) as u64;
            let arguments = [pair.master_at.into(), terminal::TIOCGPTPEER, flags];
            wait(session.make("open its slave side", libc::SYS_ioctl, &arguments, &[], &[])?, number);
        }
        session.settle(moves)?;
        session.flush()
    }

    /// Opens a terminal of the machine, which keeps its settings.
    pub(in super::super) fn open_hardware(&self, session: &mut Session<'_>, id: u32, cloexec: bool) -> Done<Temporary> {
        let flags = open_flags(self.flags(id)) | if cloexec { libc::O_CLOEXEC as u32 } else { 0 };
        session.open(self.path(id).unwrap_or(b"/dev/console"), flags)
    }

    /// Opens `/dev/tty` in the leader of a session, which has just got its terminal; without one, in the first task.
    ///
    /// # Errors
    /// [`RestoreFilesError`].
    pub fn open_controlling(&self, leader: Option<usize>, runner: &Runner) -> Result<(), RestoreFilesError> {
        let run = || -> Done {
            let mut session = Session::new(runner, Numbers::default(), self.scratch());
            let mut moves = Vec::new();
            for (id, _) in self.terminals.opened_late.iter().filter(|(_, of)| **of == leader) {
                session.about(*id);
                let flags = open_flags(self.flags(*id)) | libc::O_CLOEXEC as u32;
                let opened = session.open(self.path(*id).unwrap_or(b"/dev/tty"), flags)?;
                moves.push((opened, vec![Place { number: self.waiting[id], cloexec: true }]));
            }
            session.settle(moves)?;
            session.flush()
        };
        run().map_err(|error| self.explain(leader.unwrap_or(0), error))
    }

    /// Whether [`Self::open_controlling`] has something to do for a leader.
    pub fn opens_controlling(&self, leader: usize) -> bool {
        self.terminals.opened_late.values().any(|of| *of == Some(leader))
    }

    /// Gives a pair its settings, input and modes.
    fn furnish(&self, pair: &Pair, master: BorrowedFd<'_>, slaves: &[OwnedFd]) -> Furnished {
        let step = |step: &'static str| move |errno| (step, errno);
        for slave in slaves {
            if terminal::device(slave.as_fd()) != Ok((136, pair.index)) {
                return Err(("open the slave that belongs to its master", Errno::ENODEV));
            }
        }
        if let Some((slave, info)) = slaves.first().zip(pair.slave_info.as_ref()) {
            let owner = (info.uid.map(Uid::from_raw), info.gid.map(Gid::from_raw));
            let errno = |error: rustix::io::Errno| Errno::from_raw(error.raw_os_error());
            rustix::fs::fchown(slave, owner.0, owner.1).map_err(|error| ("set its owner", errno(error)))?;
            let file = pair.slaves.first().and_then(|id| self.entries.get(id)?.tty.as_ref()?.regf_id);
            if let Some(mode) = file.and_then(|id| self.entries.get(&id)?.reg.as_ref()?.mode) {
                let mode = Mode::from_raw_mode(mode & 0o7777);
                rustix::fs::fchmod(slave, mode).map_err(|error| ("set its mode", errno(error)))?;
            }
        }
        if pair.fate == Fate::HungUp {
            return Ok(());
        }
        if let Some(info) = pair.info() {
            set(master, info, true)?;
        }
        if pair.master_info.as_ref().and_then(|info| info.ferry?.abandoned) == Some(true) {
            input::open_slave(master).map_err(step("have its slave side closed"))?;
        }
        if pair.fate == Fate::Kept {
            input::put(master, &pair.input).map_err(step("put back what was not read"))?;
        }
        let exclusive = |info: &Option<TtyInfoEntry>| info.as_ref().is_some_and(|info| info.exclusive);
        if let (Some(slave), true) = (slaves.first(), exclusive(&pair.slave_info)) {
            terminal::set_exclusive(slave.as_fd()).map_err(step("keep it to itself"))?;
        }
        if exclusive(&pair.master_info) {
            terminal::set_exclusive(master).map_err(step("keep it to itself"))?;
        }
        let of_master = |told: fn(&TtyInfoEntry) -> bool| pair.master_info.as_ref().is_some_and(told);
        if of_master(|info| info.packet_mode) {
            terminal::set_packet_mode(master).map_err(step("set its packet mode"))?;
        }
        if of_master(|info| info.locked) {
            terminal::set_locked(master, true).map_err(step("lock it"))?;
        }
        Ok(())
    }

    /// Gives the terminal of whoever restores the settings that the tree's had. Its size is its own.
    fn furnish_own(&self) {
        for id in &self.terminals.own {
            let info =
                self.entries.get(id).and_then(|entry| self.terminals.infos.get(&entry.tty.as_ref()?.tty_info_id));
            if let (Some(own), Some(info)) = (self.inherited.get(&super::super::plan::description_key(*id)), info)
                && let Err((step, errno)) = set(own.as_fd(), info, false)
            {
                tracing::warn!(%errno, "cannot {step} of this terminal");
            }
        }
    }
}

/// Sets what a pair's sides tell alike.
fn set(fd: BorrowedFd<'_>, info: &TtyInfoEntry, whole: bool) -> Furnished {
    if let Some(settings) = &info.termios {
        terminal::set_settings(fd, &read_settings(settings)).map_err(|errno| ("set the settings", errno))?;
    }
    if let Some(locked) = info.termios_locked.as_ref().filter(|_| whole).map(read_settings)
        && locked != terminal::Termios::default()
    {
        terminal::lock_settings(fd, &locked).map_err(|errno| ("lock the settings", errno))?;
    }
    if let Some(size) = info.winsize.as_ref().filter(|_| whole) {
        terminal::set_window_size(fd, read_size(size)).map_err(|errno| ("set the size", errno))?;
    }
    Ok(())
}
