//! The dump half: what the kernel says of each terminal.
//!
//! Everything is asked of duplicates, from outside. The master tells the session and the foreground group; of a pair whose
//! master is outside, the session's leader does (proc_pid_stat(5)).

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use rustix::fs::Statx;

use super::super::Problem;
use super::job::{Job, Number};
use super::{AUXILIARY_MAJOR, Side, dump_settings, dump_size, external_key, input};
use crate::error::Refusal;
use crate::images::extension::FerryTtyEntry;
use crate::images::fown::FownEntry;
use crate::images::tty::{TtyDataEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType};
use crate::images::{Kind, encode};
use crate::sys::{HostPid, terminal};

/// CRIU numbers terminals by index and side; those without an index have these in its place.
const CONSOLE: u32 = 1002;
const VIRTUAL: u32 = 1004;
const CONTROLLING: u32 = 1006;
const SERIAL: u32 = 1010;
const EXTERNAL: u32 = 1013;
/// Pairs of several devpts instances with one index are told apart by multiples of this, which CRIU does not accept.
const NEXT_INSTANCE: u32 = 4096;

/// A description of a terminal, as found.
pub(crate) struct FoundTerminal<'a> {
    /// Its number in images.
    pub id: u32,
    /// What its device is.
    pub side: Side,
    /// What its path leads to.
    pub stat: &'a Statx,
    /// Status flags.
    pub flags: u32,
    /// The file entry that has its path; none for one that is given to a restore.
    pub file: Option<u32>,
    /// The device of the devpts instance that it belongs to.
    pub instance: u64,
    /// A duplicate.
    pub duplicate: OwnedFd,
    /// Who is signalled.
    pub fown: FownEntry,
    /// The process that was looked at.
    pub pid: HostPid,
}

/// A pair.
struct Pair<H> {
    instance: u64,
    index: u32,
    number: u32,
    holder: H,
    master: Option<(OwnedFd, TtyInfoEntry)>,
    slave: Option<(OwnedFd, TtyInfoEntry)>,
    hung_up: bool,
    input: input::Input,
}

/// A terminal that is no pair of the tree's.
struct Other {
    info: TtyInfoEntry,
    /// The device behind it, 0 if that cannot be said, and a process that has it.
    device: u32,
    pid: HostPid,
}

impl Other {
    /// Whether it was opened as `/dev/tty`.
    fn is_controlling(&self) -> bool {
        self.info.r#type == TtyType::Ctty as i32
    }
}

/// All terminals of a tree.
pub(crate) struct Terminals<H> {
    pairs: Vec<Pair<H>>,
    others: Vec<(H, Other)>,
    external: BTreeMap<String, u32>,
    jobs: Vec<Job>,
}

impl<H> Default for Terminals<H> {
    fn default() -> Self {
        Self { pairs: Vec::new(), others: Vec::new(), external: BTreeMap::new(), jobs: Vec::new() }
    }
}

fn unreadable(what: &'static str) -> impl FnOnce(Errno) -> Problem {
    move |errno| Problem::unreadable(what, errno)
}

fn device(major: u32, minor: u32) -> u64 {
    libc::makedev(major, minor)
}

/// As `/proc/PID/stat` tells a controlling terminal.
fn of_pair((major, minor): (u32, u32)) -> u32 {
    device(major, minor) as u32
}

impl<H: Clone> Terminals<H> {
    /// Notes a process of the tree.
    pub fn add_job(&mut self, job: Job) {
        self.jobs.push(job);
    }

    /// The key under which a restore can be given a terminal from outside.
    pub fn key(stat: &Statx) -> String {
        let of = |major, minor| device(major, minor);
        external_key(of(stat.stx_rdev_major, stat.stx_rdev_minor), of(stat.stx_dev_major, stat.stx_dev_minor))
    }

    /// Reads one description. `external` is its key, if it is to come from outside.
    pub fn collect(
        &mut self,
        found: FoundTerminal<'_>,
        external: Option<String>,
        holder: H,
    ) -> Result<TtyFileEntry, Problem> {
        let FoundTerminal { id, flags, file, .. } = found;
        let fown = found.fown.clone();
        let entry = |info: u32| TtyFileEntry { id, tty_info_id: info, flags, fown, regf_id: file };
        if let Some(key) = external {
            let next = EXTERNAL + self.external.len() as u32;
            let number = *self.external.entry(key).or_insert(next);
            if self.others.iter().all(|(_, other)| other.info.id != number << 1) {
                let info = TtyInfoEntry { r#type: TtyType::ExtTty as i32, ..info(&found, number << 1)? };
                let device = terminal::device(found.duplicate.as_fd()).map_or(0, of_pair);
                self.others.push((holder, Other { info, device, pid: found.pid }));
            }
            return Ok(entry(number << 1));
        }
        match found.side {
            Side::Hardware => self.hardware(found, holder).map(entry),
            Side::Controlling => self.controlling(found, holder).map(entry),
            Side::Master | Side::Slave => self.side(found, holder).map(entry),
        }
    }

    fn controlling(&mut self, found: FoundTerminal<'_>, holder: H) -> Result<u32, Problem> {
        let device = terminal::device(found.duplicate.as_fd()).map(of_pair).map_err(|errno| match errno {
            Errno::EIO => Problem::new("the terminal behind /dev/tty was hung up", "have the program close it"),
            errno => Problem::unreadable("the terminal behind /dev/tty", errno),
        })?;
        let others = || self.others.iter().map(|(_, other)| other).filter(|other| other.is_controlling());
        if let Some(other) = others().find(|other| other.device == device) {
            return Ok(other.info.id);
        }
        let id = (CONTROLLING + others().count() as u32 * NEXT_INSTANCE) << 1;
        let info = TtyInfoEntry { r#type: TtyType::Ctty as i32, ..info(&found, id)? };
        self.others.push((holder, Other { info, device, pid: found.pid }));
        Ok(id)
    }

    /// A console, a virtual terminal, a serial line: its settings are the machine's.
    fn hardware(&mut self, found: FoundTerminal<'_>, holder: H) -> Result<u32, Problem> {
        let (kind, number) = match (found.stat.stx_rdev_major, found.stat.stx_rdev_minor) {
            (AUXILIARY_MAJOR, 1) => (TtyType::Console, CONSOLE),
            (4, 0..64) => (TtyType::Vt, VIRTUAL),
            _ => (TtyType::Serial, SERIAL),
        };
        let rdev = device(found.stat.stx_rdev_major, found.stat.stx_rdev_minor) as u32;
        let alike = || self.others.iter().filter(|(_, other)| other.info.r#type == kind as i32);
        if let Some((_, other)) = alike().find(|(_, other)| other.info.rdev == rdev) {
            return Ok(other.info.id);
        }
        let id = (number + alike().count() as u32 * NEXT_INSTANCE) << 1;
        let info = TtyInfoEntry { r#type: kind as i32, ..info(&found, id)? };
        self.others.push((holder, Other { info, device: 0, pid: found.pid }));
        Ok(id)
    }

    fn side(&mut self, found: FoundTerminal<'_>, holder: H) -> Result<u32, Problem> {
        let fd = found.duplicate.as_fd();
        let is_master = found.side == Side::Master;
        let index = match is_master {
            true => terminal::index(fd).map_err(unreadable("its index"))?,
            false => found.stat.stx_rdev_minor,
        };
        let hung_up = terminal::settings(fd) == Err(Errno::EIO);
        let place = match self.pairs.iter().position(|pair| (pair.instance, pair.index) == (found.instance, index)) {
            Some(place) => place,
            None => {
                let alike = self.pairs.iter().filter(|pair| pair.index == index).count() as u32;
                let number = index + alike * NEXT_INSTANCE;
                let (instance, input) = (found.instance, input::Input::default());
                let pair = Pair { instance, index, number, holder, master: None, slave: None, hung_up, input };
                self.pairs.push(pair);
                self.pairs.len() - 1
            }
        };
        let pair = &mut self.pairs[place];
        if !is_master && hung_up != pair.hung_up {
            return Err(Problem::new(
                "it was hung up (vhangup(2)) while others have the terminal open",
                "have the program close it",
            ));
        }
        let id = pair.number << 1 | u32::from(is_master);
        let side = if is_master { &mut pair.master } else { &mut pair.slave };
        if side.is_none() {
            let pty = Some(TtyPtyEntry { index });
            let mut info = TtyInfoEntry { r#type: TtyType::Pty as i32, pty, ..info(&found, id)? };
            if is_master {
                info.locked = terminal::is_locked(fd).map_err(unreadable("its lock"))?;
                info.packet_mode = terminal::packet_mode(fd).map_err(unreadable("its mode"))?;
            }
            *side = Some((found.duplicate, info));
        }
        Ok(id)
    }

    /// Completes what only the whole tree tells, and tells what cannot be saved. With `outside`, one terminal's master may be
    /// held outside; with `stopped`, unread input is looked at.
    pub fn problems(&mut self, outside: bool, stopped: bool) -> (Vec<(H, Problem)>, Vec<Refusal>) {
        let (mut problems, mut refusals) = (Vec::new(), Vec::new());
        let mut controlled = HashSet::new();
        let paired: HashSet<i32> = self.pairs.iter().filter_map(|pair| session_of(pair).ok()).collect();
        let mut orphans = 0;
        for pair in &mut self.pairs {
            let mut problem = |problem: String, remedy: &str| {
                problems.push((pair.holder.clone(), Problem::new(problem, remedy)));
            };
            if pair.hung_up {
                continue;
            }
            let of_device = of_pair((136, pair.index));
            let leader = match session_of(pair) {
                Ok(0) => None,
                Ok(session) => Some(session),
                Err(Errno::ENXIO) => {
                    let leads = |job: &&Job| job.terminal == of_device && !paired.contains(&job.session.here);
                    self.jobs.iter().find(leads).map(|job| job.session.here)
                }
                Err(errno) => {
                    problem(format!("its session cannot be read: {errno}"), "");
                    continue;
                }
            };
            if pair.master.is_none() {
                orphans += 1;
                if !outside || orphans > 1 {
                    let text = if outside { "only one terminal may be from outside" } else { MASTER_OUTSIDE };
                    problem(
                        text.into(),
                        "give --shell-job to have it take the terminal of whoever restores it, \
                        or start the program with its input and output in files or /dev/null",
                    );
                }
            }
            let Some(session) = leader else { continue };
            let inside = self.jobs.iter().find(|job| job.session.here == session);
            let leads = self.jobs.iter().any(|job| job.leads_session() && job.session.here == session);
            if !leads && pair.master.is_some() {
                problem(format!("it controls session {session}, whose leader is outside the tree"), "dump that too");
                continue;
            }
            let foreground = match &pair.master {
                Some((master, _)) => terminal::foreground(master.as_fd()).unwrap_or(0),
                None => inside.map_or(0, |job| job.foreground.max(0)),
            };
            let group = self.jobs.iter().map(|job| job.group).find(|group| group.here == foreground);
            if leads && group.is_none() && foreground != 0 {
                problem(format!("its foreground process group {foreground} has no process any more"), "dump it later");
            }
            let session = inside.map_or(Number::default(), |job| job.session);
            controlled.insert(session.here);
            for (_, info) in [&mut pair.master, &mut pair.slave].into_iter().flatten() {
                info.sid = session.inside as u32;
                info.pgrp = group.unwrap_or_default().inside as u32;
            }
        }
        for (holder, other) in &mut self.others {
            let mut of_device = self.jobs.iter().filter(|job| other.device != 0 && job.terminal == other.device);
            let own = self.jobs.iter().find(|job| job.pid == other.pid && job.terminal == other.device);
            if let Some(job) = own.or_else(|| of_device.find(|job| job.leads_session())) {
                let group = self.jobs.iter().map(|other| other.group).find(|group| group.here == job.foreground);
                other.info.sid = job.session.inside as u32;
                other.info.pgrp = group.unwrap_or_default().inside as u32;
                controlled.insert(job.session.here);
            } else if other.is_controlling() {
                let text = "it was opened when another terminal controlled the session";
                problems.push((holder.clone(), Problem::new(text, "have the program close it")));
            }
        }
        for job in self.jobs.iter().filter(|job| job.leads_session() && job.terminal != 0) {
            if !controlled.contains(&job.session.here) {
                let device = u64::from(job.terminal);
                let name = format!("{}:{}", libc::major(device), libc::minor(device));
                let text = format!("no process of the tree has a pseudoterminal open that is this one (device {name})");
                refusals.push(job.refuse(text, "start it with setsid"));
            }
        }
        if stopped && problems.is_empty() {
            for pair in &mut self.pairs {
                if let Err(problem) = look_at_input(pair) {
                    problems.push((pair.holder.clone(), problem));
                }
            }
        }
        (problems, refusals)
    }

    /// `tty-info.img` and `tty-data.img`.
    pub fn images(self) -> [(Kind, Vec<u8>); 2] {
        let (mut infos, mut data) = (Vec::new(), Vec::new());
        for Pair { master, slave, input, .. } in self.pairs {
            for (side, bytes) in [(master, input.master), (slave, input.slave)] {
                let Some((_, info)) = side else { continue };
                if !bytes.is_empty() {
                    data.push(TtyDataEntry { tty_id: info.id, data: bytes });
                }
                infos.push(info);
            }
        }
        infos.extend(self.others.into_iter().map(|(_, other)| other.info));
        [(Kind::TtyInfo, encode(Kind::TtyInfo, &infos)), (Kind::TtyData, encode(Kind::TtyData, &data))]
    }
}

const MASTER_OUTSIDE: &str = "its master side is held by a process outside the tree";

/// The session of a pair as ferry numbers it, 0 for none; `ENXIO` when its master is not there to ask.
fn session_of<H>(pair: &Pair<H>) -> nix::Result<i32> {
    pair.master.as_ref().map_or(Err(Errno::ENXIO), |(master, _)| terminal::session(master.as_fd()))
}

/// What both sides have not read. Where the slave was never open there is nothing, and opening it would be seen; of a pair
/// whose master is outside, the input stays with the terminal.
fn look_at_input<H>(pair: &mut Pair<H>) -> Result<(), Problem> {
    let Some((master, info)) = &mut pair.master else { return Ok(()) };
    let master: BorrowedFd<'_> = master.as_fd();
    let abandoned = input::is_abandoned(master).map_err(unreadable("its state"))?;
    if abandoned {
        info.ferry = Some(FerryTtyEntry { abandoned: Some(true) });
    }
    if abandoned || pair.slave.is_some() {
        pair.input = input::look(master).map_err(|errno| match errno {
            Errno::EBUSY => Problem::new(
                "in packet mode it has a change of state that nobody has read yet",
                "dump it when the program has read it",
            ),
            errno => Problem::unreadable("what nobody has read from it yet", errno),
        })?;
    }
    Ok(())
}

/// What all terminals have. One that was hung up has only its place.
fn info(found: &FoundTerminal<'_>, id: u32) -> Result<TtyInfoEntry, Problem> {
    let (fd, stat) = (found.duplicate.as_fd(), found.stat);
    let mut info = TtyInfoEntry {
        id,
        rdev: device(stat.stx_rdev_major, stat.stx_rdev_minor) as u32,
        dev: Some(device(stat.stx_dev_major, stat.stx_dev_minor) as u32),
        uid: Some(stat.stx_uid),
        gid: Some(stat.stx_gid),
        ..TtyInfoEntry::default()
    };
    let settings = match terminal::settings(fd) {
        Err(Errno::EIO) => return Ok(info),
        settings => settings.map_err(unreadable("its settings"))?,
    };
    let locked = terminal::locked_settings(fd).map_err(unreadable("its locked settings"))?;
    info.termios = Some(dump_settings(&settings));
    info.termios_locked = Some(dump_settings(&locked));
    info.winsize = Some(dump_size(terminal::window_size(fd).map_err(unreadable("its size"))?));
    info.exclusive = terminal::is_exclusive(fd).map_err(unreadable("its mode"))?;
    Ok(info)
}
