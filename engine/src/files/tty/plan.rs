//! The restore half, before anything is made: which pairs there are, who is controlled by them, and what stands for the
//! sides that the set lacks.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::super::plan::{Inherited, RestoreFilesError, RestoreTask, inconsistent};
use super::input::Input;
use super::{Side, external_key};
use crate::images::files::FileEntry;
use crate::images::tty::{TtyDataEntry, TtyFileEntry, TtyInfoEntry, TtyType};

/// Highest index that is sought: there are at most so many pairs (`kernel.pty.max`, by default).
const MOST: u32 = 4096;

/// What becomes of a pair's master.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Fate {
    /// The tree has it.
    Kept,
    /// It was closed: the slaves are hung up.
    HungUp,
    /// It goes to whoever restores.
    HandedOut,
}

/// A pair that will be made.
#[derive(Clone, Debug)]
pub(in super::super) struct Pair {
    pub index: u32,
    /// What its descriptions are called, for messages and paths: the master, then slaves.
    pub master: Option<u32>,
    pub slaves: Vec<u32>,
    pub master_info: Option<TtyInfoEntry>,
    pub slave_info: Option<TtyInfoEntry>,
    pub fate: Fate,
    pub input: Input,
    /// Where the master waits to be placed.
    pub master_at: u32,
    /// Where a slave that nobody has waits, to begin a session with.
    pub keeper_at: Option<u32>,
}

impl Pair {
    /// What both sides tell alike.
    pub fn info(&self) -> Option<&TtyInfoEntry> {
        self.slave_info.as_ref().or(self.master_info.as_ref())
    }

    /// A description of it.
    pub fn member(&self) -> u32 {
        self.master.or(self.slaves.first().copied()).unwrap_or(0)
    }
}

/// A terminal that controls a session: the leader, by its place among tasks, what of the set names the terminal, and the
/// foreground group.
#[derive(Clone, Debug)]
pub(in super::super) struct Control {
    /// The leader; none for the session that whoever restores is in.
    pub leader: Option<usize>,
    pub through: Through,
    pub group: i32,
}

/// What names a terminal.
#[derive(Clone, Debug)]
pub(in super::super) enum Through {
    /// A pair, by its place.
    Pair(usize),
    /// A description that is given.
    Given(u32),
}

/// All terminals of a set.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct TerminalPlan {
    pub pairs: Vec<Pair>,
    /// Descriptions of `/dev/tty`, each with the leader that opens it; none for the first task, in the session it comes from.
    pub opened_late: BTreeMap<u32, Option<usize>>,
    /// Descriptions of terminals that are given by key.
    pub given: BTreeMap<u32, String>,
    /// Descriptions that become the terminal of whoever restores.
    pub own: Vec<u32>,
    pub controls: Vec<Control>,
    /// File entries that are paths of terminals.
    pub files: HashSet<u32>,
    pub infos: HashMap<u32, TtyInfoEntry>,
    /// Somebody takes a master.
    pub hands_out: bool,
}

/// What a restore has for terminals whose other side is not in the set.
#[derive(Clone, Copy)]
pub(in super::super) struct Circumstances<'a> {
    /// Somebody takes a master.
    pub hands_out: bool,
    /// Whoever restores has a terminal to share.
    pub has_own: bool,
    /// What is given by key.
    pub inherited: &'a Inherited,
}

/// A description that cannot be made, and why.
pub(in super::super) type Problems = Vec<(u32, String)>;

impl TerminalPlan {
    /// Plans for the descriptions `held` by tasks, in the order of their numbers.
    ///
    /// # Errors
    /// [`RestoreFilesError::Inconsistent`].
    pub fn new(
        entries: &HashMap<u32, FileEntry>,
        held: impl Iterator<Item = u32>,
        (infos, data): (Vec<TtyInfoEntry>, Vec<TtyDataEntry>),
        tasks: &[RestoreTask],
        circumstances: Circumstances<'_>,
    ) -> Result<(Self, Problems), RestoreFilesError> {
        let infos = infos.into_iter().map(|info| (info.id, info)).collect();
        let mut plan = Self { infos, hands_out: circumstances.hands_out, ..Self::default() };
        let mut problems = Problems::new();
        let mut sides: BTreeMap<u32, Vec<(u32, Side)>> = BTreeMap::new();
        let mut held: Vec<u32> = held.collect();
        held.sort_unstable();
        for id in held {
            let Some(tty) = entries.get(&id).and_then(|entry| entry.tty.as_ref()) else { continue };
            plan.files.extend(tty.regf_id);
            let info = plan.infos.get(&tty.tty_info_id);
            let info = info.ok_or_else(|| inconsistent(format!("terminal {id} is not described")))?;
            let key = external_key(info.rdev.into(), info.dev.unwrap_or(0).into());
            let side = Side::of_device(libc::major(info.rdev.into()), libc::minor(info.rdev.into()));
            match (info.r#type(), side) {
                (TtyType::Pty | TtyType::ExtTty, _) if circumstances.inherited.contains_key(&key) => {
                    plan.control_by(Through::Given(id), info_of(&plan.infos, tty), tasks);
                    plan.given.insert(id, key);
                }
                (TtyType::Pty, Some(side @ (Side::Master | Side::Slave))) => {
                    sides.entry(tty.tty_info_id >> 1).or_default().push((id, side));
                }
                (TtyType::Ctty, _) => match leader_of(info, tasks) {
                    None if !circumstances.has_own => {
                        problems.push((id, "the terminal of its session is not in the set: give --shell-job".into()));
                    }
                    leader => drop(plan.opened_late.insert(id, leader)),
                },
                (TtyType::ExtTty, _) => {
                    problems.push((id, format!("it is external: name its stand-in with --inherit-fd 'fd[N]:{key}'")));
                }
                // Opened like any other device.
                (TtyType::Console | TtyType::Vt | TtyType::Serial, _) if tty.regf_id.is_some() => {}
                _ => problems.push((id, "terminals of this kind cannot be restored".into())),
            }
        }
        let mut data: HashMap<u32, Vec<u8>> = data.into_iter().map(|entry| (entry.tty_id, entry.data)).collect();
        for (number, members) in sides {
            plan.add_pair(number, &members, &mut data, tasks, circumstances, &mut problems)?;
        }
        plan.pairs.sort_by_key(|pair| pair.index);
        for place in 0..plan.pairs.len() {
            let info = plan.pairs[place].info().cloned();
            plan.control_by(Through::Pair(place), info, tasks);
        }
        plan.check_late(tasks, &mut problems);
        Ok((plan, problems))
    }

    fn add_pair(
        &mut self,
        number: u32,
        members: &[(u32, Side)],
        data: &mut HashMap<u32, Vec<u8>>,
        tasks: &[RestoreTask],
        circumstances: Circumstances<'_>,
        problems: &mut Problems,
    ) -> Result<(), RestoreFilesError> {
        let of = |wanted: Side| members.iter().filter(move |(_, side)| *side == wanted).map(|(id, _)| *id);
        let masters: Vec<u32> = of(Side::Master).collect();
        if masters.len() > 1 {
            return Err(inconsistent("a terminal has two masters"));
        }
        let (master_id, slave_id) = (number << 1 | 1, number << 1);
        let slaves: Vec<u32> = of(Side::Slave).collect();
        let side = |id: u32, is_there: bool| self.infos.get(&id).filter(|_| is_there).cloned();
        let (master_info, slave_info) = (side(master_id, !masters.is_empty()), side(slave_id, !slaves.is_empty()));
        let info =
            slave_info.as_ref().or(master_info.as_ref()).ok_or_else(|| inconsistent("a terminal has no side"))?;
        let index = info.pty.as_ref().map(|pty| pty.index);
        let index = index.ok_or_else(|| inconsistent("a pseudoterminal has no index"))?;
        let member = members.first().map_or(0, |(id, _)| *id);
        if index > MOST {
            problems.push((member, format!("its index {index} is too high to be sought")));
        }
        let fate = match (masters.first(), info.termios.is_some()) {
            (Some(_), true) => Fate::Kept,
            (None, false) => Fate::HungUp,
            (Some(_), false) => return Err(inconsistent("a terminal has a master and no settings")),
            (None, true) if circumstances.hands_out => Fate::HandedOut,
            (None, true) if circumstances.has_own => {
                let control = Control {
                    leader: leader_of(info, tasks),
                    through: Through::Given(member),
                    group: info.pgrp as i32,
                };
                self.controls.push(control);
                self.own.extend(slaves);
                return Ok(());
            }
            (None, true) => {
                let problem = "its master side was held outside: give a console socket that takes a new one, or \
                               --shell-job with a terminal as standard input";
                problems.push((member, problem.into()));
                return Ok(());
            }
        };
        let mut input = |id: u32| data.remove(&id).unwrap_or_default();
        let input = Input { master: input(master_id), slave: input(slave_id) };
        let master = masters.first().copied();
        self.pairs.push(Pair {
            index,
            master,
            slaves,
            master_info,
            slave_info,
            fate,
            input,
            master_at: 0,
            keeper_at: None,
        });
        Ok(())
    }

    fn control_by(&mut self, through: Through, info: Option<TtyInfoEntry>, tasks: &[RestoreTask]) {
        let Some(info) = info else { return };
        if let Some(leader) = leader_of(&info, tasks)
            && self.controls.iter().all(|control| control.leader != Some(leader))
        {
            self.controls.push(Control { leader: Some(leader), through, group: info.pgrp as i32 });
        }
    }

    /// What is opened as `/dev/tty` comes after the session's beginning: whoever holds it must have been made after that.
    fn check_late(&self, tasks: &[RestoreTask], problems: &mut Problems) {
        for (id, leader) in &self.opened_late {
            let Some(leader) = *leader else { continue };
            if self.controls.iter().all(|control| control.leader != Some(leader)) {
                let problem =
                    format!("pid {} leads its session and is controlled by no terminal of the set", tasks[leader].pid);
                problems.push((*id, problem));
            }
        }
    }

    /// Numbers for everything that waits, from `next` on; masters come first. Returns the first number that is left.
    pub fn place(&mut self, mut next: u32, waiting: &mut HashMap<u32, u32>) -> u32 {
        let mut take = || {
            next += 1;
            next - 1
        };
        for pair in &mut self.pairs {
            pair.master_at = take();
            waiting.extend(pair.master.map(|id| (id, pair.master_at)));
        }
        for (place, pair) in self.pairs.iter_mut().enumerate() {
            waiting.extend(pair.slaves.iter().map(|id| (*id, take())));
            let controls = |control: &Control| matches!(control.through, Through::Pair(of) if of == place);
            if pair.slaves.is_empty() && self.controls.iter().any(controls) {
                pair.keeper_at = Some(take());
            }
        }
        waiting.extend(self.opened_late.keys().map(|id| (*id, take())));
        next
    }

    /// How many numbers making a pair may need at once.
    pub fn spare(&self) -> u32 {
        self.pairs.iter().map(|pair| pair.index.min(MOST) + 2).max().unwrap_or(0)
    }

    /// Whether a description is made here, and not as others are.
    pub fn makes(&self, id: u32) -> bool {
        self.opened_late.contains_key(&id)
            || self.pairs.iter().any(|pair| pair.master == Some(id) || pair.slaves.contains(&id))
    }
}

fn info_of(infos: &HashMap<u32, TtyInfoEntry>, tty: &TtyFileEntry) -> Option<TtyInfoEntry> {
    infos.get(&tty.tty_info_id).cloned()
}

/// The task that leads the session of a terminal.
fn leader_of(info: &TtyInfoEntry, tasks: &[RestoreTask]) -> Option<usize> {
    tasks.iter().position(|task| info.sid != 0 && task.pid.0 == info.sid as i32 && task.session == task.pid.0)
}
