//! The frozen state as a value: what was found, and how to give it back.
//!
//! A task runs only when nothing holds it: not its cgroup, not one above or (for a part of the tasks) below, and not
//! a cgroup of the other design. So the guard remembers of all of these which had been asked to freeze when it came, and
//! thaws and restores exactly those. It asks its own cgroup to freeze even when an ancestor is frozen already, so that
//! someone who thaws the ancestor meanwhile does not set the container running under the dump.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::time::{Duration, Instant};

use super::control::{self, State, Wish};
use super::rescue::Rescue;
use super::{FreezeError, Freezer, blockers};
use crate::directory::Cgroup;
use crate::hierarchy::{Hierarchies, Version};

/// How many processes an error names.
const NAMED: usize = 5;

/// A frozen cgroup. Dropped, it gives the cgroup back as it was found: thawed, or frozen if it had been. So it is too when
/// this process is killed: see `rescue`.
#[derive(Debug)]
#[must_use = "dropping the guard thaws the cgroup"]
pub struct Frozen {
    freezer: Freezer,
    /// Whether the cgroup itself had been asked to freeze before.
    found_asked: bool,
    /// What the kernel said of it before.
    found: State,
    /// Other cgroups that were found asked to freeze.
    holders: Holders,
    /// Gives back in the place of a process that was killed; taken once there is nothing to give back any more.
    rescue: Option<Rescue>,
}

/// A write that undoes a freeze, ready to be done by a process that may only make system calls.
#[derive(Debug)]
pub(super) struct UndoWrite {
    /// The control file, open for writing.
    pub file: File,
    /// What to write to it.
    pub text: &'static str,
}

impl Frozen {
    pub(super) fn freeze(freezer: &Freezer, timeout: Duration) -> Result<Frozen, FreezeError> {
        let deadline = Instant::now() + timeout;
        let cgroup = freezer.cgroup();
        let mut frozen = Frozen {
            found_asked: control::asked_to_freeze(cgroup)?,
            found: control::state(cgroup)?,
            holders: find_holders(freezer)?,
            freezer: freezer.clone(),
            rescue: None,
        };
        let rescue = Rescue::arm(frozen.undo_writes()?);
        frozen.rescue =
            Some(rescue.map_err(|source| FreezeError::Rescue { cgroup: cgroup.directory().to_owned(), source })?);
        if !frozen.found_asked {
            control::ask(cgroup, Wish::Freeze)?;
        }
        frozen.wait(timeout, deadline)?;
        tracing::debug!(cgroup = %cgroup.directory().display(), found = ?frozen.found, "frozen");
        Ok(frozen)
    }

    /// The cgroup's freezer.
    pub fn freezer(&self) -> &Freezer {
        &self.freezer
    }

    /// Whether the cgroup was frozen when this guard came, and will be left so.
    pub fn was_frozen(&self) -> bool {
        self.found != State::Thawed
    }

    /// Whether the cgroup, or a part of it, was frozen when this guard came.
    pub fn found_any_frozen(&self) -> bool {
        self.was_frozen() || !self.holders.is_empty()
    }

    /// Whether the v1 freezer holds the tasks or some of them: this cgroup's, or one that was found frozen.
    pub fn is_of_v1(&self) -> bool {
        self.holders.iter().chain([self.freezer.cgroup()]).any(|cgroup| cgroup.version() == Version::V1)
    }

    /// Whether a cgroup had itself been asked to freeze before this guard came.
    ///
    /// # Errors
    /// When the cgroup is none that the guard knows of, and its control file cannot be read.
    pub fn found_asked(&self, cgroup: &Cgroup) -> Result<bool, FreezeError> {
        if cgroup == self.freezer.cgroup() {
            return Ok(self.found_asked);
        }
        Ok(self.holders.iter().any(|holder| holder == cgroup) || control::asked_to_freeze(cgroup)?)
    }

    /// Thaws everything that holds the container's tasks, so that tasks that were seized and interrupted reach their ptrace
    /// stops, and system calls can run in them. v1 needs it for the former, both for the latter. To be called when every task
    /// is seized and interrupted: one that is not simply runs on.
    ///
    /// # Errors
    /// When the tasks are held by a cgroup that holds other processes too; see [`FreezeError::HeldElsewhere`]. The guard
    /// still gives back the state that was found.
    pub fn thaw_for_ptrace(&mut self) -> Result<(), FreezeError> {
        check_holders(&self.freezer, &self.holders)?;
        for cgroup in self.holders.iter().chain([self.freezer.cgroup()]) {
            control::ask(cgroup, Wish::Thaw)?;
        }
        Ok(())
    }

    /// Freezes again after [`Frozen::thaw_for_ptrace`], and waits up to `timeout`. Tasks in ptrace stops count as frozen, so
    /// this before the detach leaves a container that was found frozen without a gap.
    ///
    /// # Errors
    /// When it does not freeze in time.
    pub fn refreeze(&mut self, timeout: Duration) -> Result<(), FreezeError> {
        let deadline = Instant::now() + timeout;
        for cgroup in self.holders.iter().chain([self.freezer.cgroup()]) {
            control::ask(cgroup, Wish::Freeze)?;
        }
        self.wait(timeout, deadline)
    }

    /// Gives the cgroup back as it was found, as dropping does, and reports what goes wrong.
    ///
    /// # Errors
    /// When a control file cannot be written. A cgroup that is gone is no error.
    pub fn restore(mut self) -> Result<(), FreezeError> {
        self.give_back()
    }

    /// Leaves the cgroup frozen for good: a pause, rather than a step of a dump.
    pub fn keep(mut self) {
        self.dismiss_rescue();
    }

    /// Thaws for good, even what was found frozen: for a container that is ended, whose tasks v1 lets die only so.
    ///
    /// # Errors
    /// As [`Frozen::thaw_for_ptrace`]; the state found is then given back.
    pub fn thaw(mut self) -> Result<(), FreezeError> {
        self.thaw_for_ptrace()?;
        self.dismiss_rescue();
        Ok(())
    }

    /// For a container whose tasks have been killed and have ended: leaves its cgroup thawed even if it was found frozen,
    /// since whatever comes to live in it next is to run, and so those below it and its cgroup of the other design. Those above
    /// are given back as they were found.
    ///
    /// # Errors
    /// When a control file cannot be written. A cgroup that is gone is no error.
    pub fn end(mut self) -> Result<(), FreezeError> {
        self.found_asked = false;
        let mut first = Ok(());
        for cgroup in std::mem::take(&mut self.holders.own) {
            first = first.and(control::ask(&cgroup, Wish::Thaw));
        }
        first.and(self.give_back())
    }

    /// The writes that give back the state found, with their files open.
    fn undo_writes(&self) -> Result<Vec<UndoWrite>, FreezeError> {
        self.wishes_found()
            .map(|(cgroup, wish)| {
                let path = cgroup.directory().join(control::wish_file(cgroup.version()));
                match OpenOptions::new().write(true).open(&path) {
                    Ok(file) => Ok(UndoWrite { file, text: control::wish_text(cgroup.version(), wish) }),
                    Err(source) => Err(FreezeError::Control { action: "open".to_owned(), file: path, source }),
                }
            })
            .collect()
    }

    /// Every cgroup that this guard may have changed, with what it had been asked.
    fn wishes_found(&self) -> impl Iterator<Item = (&Cgroup, Wish)> {
        let own = if self.found_asked { Wish::Freeze } else { Wish::Thaw };
        self.holders.iter().map(|holder| (holder, Wish::Freeze)).chain([(self.freezer.cgroup(), own)])
    }

    fn give_back(&mut self) -> Result<(), FreezeError> {
        let mut first = Ok(());
        for (cgroup, wish) in self.wishes_found() {
            if cgroup.exists() {
                first = first.and(control::ask(cgroup, wish));
            }
        }
        // Not before: this process may be killed between any two of the writes.
        self.dismiss_rescue();
        first
    }

    fn dismiss_rescue(&mut self) {
        if let Some(rescue) = self.rescue.take() {
            rescue.dismiss();
        }
    }

    fn wait(&self, timeout: Duration, deadline: Instant) -> Result<(), FreezeError> {
        let cgroup = self.freezer.cgroup();
        match control::wait_frozen(cgroup, deadline)? {
            State::Frozen => Ok(()),
            state => Err(FreezeError::Timeout {
                cgroup: cgroup.directory().to_owned(),
                timeout,
                state,
                blockers: blockers::find(cgroup),
            }),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // Without it nothing was changed, or all was given back.
        if self.rescue.is_none() {
            return;
        }
        if let Err(error) = self.give_back() {
            let cgroup = self.freezer.cgroup().directory().display();
            tracing::error!(%cgroup, error = &error as &dyn std::error::Error, "the cgroup could not be given back as found");
        }
    }
}

/// Cgroups other than the freezer's own that were asked to freeze, and hold its tasks or some of them.
#[derive(Debug, Default)]
pub(super) struct Holders {
    /// Those above it, and above its processes' cgroups in the other design.
    above: Vec<Cgroup>,
    /// Those below it, and its processes' cgroups in the other design.
    own: Vec<Cgroup>,
}

impl Holders {
    fn iter(&self) -> impl Iterator<Item = &Cgroup> {
        self.above.iter().chain(&self.own)
    }

    fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }
}

/// Makes sure that thawing what holds the freezer's tasks sets nobody else running.
pub(super) fn check_holders(freezer: &Freezer, holders: &Holders) -> Result<(), FreezeError> {
    let own = freezer.processes()?;
    for holder in holders.iter() {
        let foreign = processes_of(holder)?.difference(&own).copied().take(NAMED).collect::<Vec<i32>>();
        if !foreign.is_empty() {
            return Err(FreezeError::HeldElsewhere { cgroup: holder.directory().to_owned(), foreign });
        }
    }
    Ok(())
}

/// Looks for what holds the freezer's tasks besides its own cgroup.
pub(super) fn find_holders(freezer: &Freezer) -> Result<Holders, FreezeError> {
    let freezers = freezer.cgroup();
    let mut own: BTreeSet<Cgroup> = cgroups_in_other_design(freezer)?;
    own.extend(freezers.subtree().map_err(|source| control::read_error(freezers, "", source))?);
    let mut all = BTreeSet::new();
    for cgroup in &own {
        add_with_ancestors(&mut all, cgroup.clone());
    }
    all.remove(freezers);
    let mut holders = Holders::default();
    for cgroup in all {
        if control::has_freezer(&cgroup) && control::asked_to_freeze(&cgroup)? {
            if own.contains(&cgroup) { &mut holders.own } else { &mut holders.above }.push(cgroup);
        }
    }
    Ok(holders)
}

fn add_with_ancestors(all: &mut BTreeSet<Cgroup>, cgroup: Cgroup) {
    let mut next = Some(cgroup);
    while let Some(cgroup) = next {
        next = cgroup.parent();
        all.insert(cgroup);
    }
}

/// The cgroups that the processes have in the other design's freezer hierarchy, without its root. Processes that end
/// meanwhile are left out.
fn cgroups_in_other_design(freezer: &Freezer) -> Result<BTreeSet<Cgroup>, FreezeError> {
    let hierarchies = Hierarchies::detect()?;
    let other = match freezer.cgroup().version() {
        Version::V1 => hierarchies.unified(),
        Version::V2 => hierarchies.with_controller("freezer"),
    };
    let Some(other) = other.filter(|hierarchy| hierarchy.mount.is_some()) else {
        return Ok(BTreeSet::new());
    };
    let mut found = BTreeSet::new();
    for pid in freezer.processes()? {
        let Ok(set) = hierarchies.of_task(pid) else { continue };
        let member = set.memberships.into_iter().find(|member| &member.hierarchy == other);
        if let Some(member) = member.filter(|member| member.path != "/") {
            found.extend(member.cgroup().ok());
        }
    }
    Ok(found)
}

fn processes_of(cgroup: &Cgroup) -> Result<BTreeSet<i32>, FreezeError> {
    cgroup.processes().map_err(|source| control::read_error(cgroup, "", source))
}
