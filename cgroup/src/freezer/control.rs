//! The freezer's control files: what they say, and waiting for them to say it.
//!
//! v1 has no notification, so the wait polls with a growing pause, and writes `FROZEN` again each time: the kernel then
//! wakes once more every task that is not frozen yet. v2 notifies pollers of `cgroup.events` (POLLPRI, kernfs).
//!
//! v2 has a gap (kernel/cgroup/freezer.c, measured on Linux 6.18): a cgroup with both tasks and sub-cgroups says `frozen 1` as
//! soon as *either* its own tasks or all of its sub-cgroups are frozen. Such cgroups are common where no controller is
//! enabled, as on hybrid hosts. So a cgroup counts as frozen when each cgroup of its tree says so, and the tasks of the mixed
//! ones are looked at one by one.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{FreezeError, blockers};
use crate::directory::{Cgroup, is_gone};
use crate::hierarchy::Version;

/// What the kernel says of a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its tasks run.
    Thawed,
    /// It was asked to freeze, here or above, and some task has not stopped yet.
    Freezing,
    /// Every task in it and below it is stopped.
    Frozen,
}

/// Asked to freeze, or to thaw: what is written to a cgroup's control file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Thaw,
    Freeze,
}

/// The shortest and longest pause between two looks at `freezer.state`.
const PAUSES: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(5));

/// The file that [`Wish`]es are written to.
pub(super) fn wish_file(version: Version) -> &'static str {
    match version {
        Version::V1 => "freezer.state",
        Version::V2 => "cgroup.freeze",
    }
}

/// What is written to [`wish_file`].
pub(super) fn wish_text(version: Version, wish: Wish) -> &'static str {
    match (version, wish) {
        (Version::V1, Wish::Freeze) => "FROZEN",
        (Version::V1, Wish::Thaw) => "THAWED",
        (Version::V2, Wish::Freeze) => "1",
        (Version::V2, Wish::Thaw) => "0",
    }
}

/// Whether the cgroup can be frozen: the root of a hierarchy has no such file, nor has cgroup2 before Linux 5.2.
pub(super) fn has_freezer(cgroup: &Cgroup) -> bool {
    cgroup.directory().join(wish_file(cgroup.version())).exists()
}

/// Whether this very cgroup, not one above, was asked to freeze. A cgroup that is gone was not.
pub(super) fn asked_to_freeze(cgroup: &Cgroup) -> Result<bool, FreezeError> {
    let file = match cgroup.version() {
        Version::V1 => "freezer.self_freezing",
        Version::V2 => "cgroup.freeze",
    };
    match cgroup.read(file) {
        Ok(text) => Ok(text == "1"),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(read_error(cgroup, file, error)),
    }
}

/// Writes the wish. Thawing a cgroup that is gone is done already.
pub(super) fn ask(cgroup: &Cgroup, wish: Wish) -> Result<(), FreezeError> {
    let (file, text) = (wish_file(cgroup.version()), wish_text(cgroup.version(), wish));
    match cgroup.write(file, text) {
        Err(error) if wish == Wish::Thaw && is_gone(&error) => Ok(()),
        written => written.map_err(|source| FreezeError::Control {
            action: format!("write {text:?} to"),
            file: cgroup.directory().join(file),
            source,
        }),
    }
}

/// The kernel's word on a cgroup. One that is gone holds no task that could be stopped: thawed.
pub(super) fn state(cgroup: &Cgroup) -> Result<State, FreezeError> {
    let file = match cgroup.version() {
        Version::V1 => "freezer.state",
        Version::V2 => "cgroup.events",
    };
    let text = match cgroup.read(file) {
        Err(error) if is_gone(&error) => return Ok(State::Thawed),
        text => text.map_err(|error| read_error(cgroup, file, error))?,
    };
    match (cgroup.version(), text.as_str()) {
        (Version::V1, "FROZEN") => Ok(State::Frozen),
        (Version::V1, "FREEZING") => Ok(State::Freezing),
        (Version::V1, _) => Ok(State::Thawed),
        (Version::V2, events) => {
            if says_frozen(events) && first_unfrozen(cgroup)?.is_none() {
                return Ok(State::Frozen);
            }
            let mut asked = asked_to_freeze(cgroup)?;
            let mut above = cgroup.parent();
            while let (false, Some(ancestor)) = (asked, above) {
                asked = asked_to_freeze(&ancestor)?;
                above = ancestor.parent();
            }
            Ok(if asked { State::Freezing } else { State::Thawed })
        }
    }
}

/// Waits until the kernel says frozen. The cgroup must have been asked. Returns the last word, which is not `Frozen`
/// only when the deadline passed.
pub(super) fn wait_frozen(cgroup: &Cgroup, deadline: Instant) -> Result<State, FreezeError> {
    match cgroup.version() {
        Version::V1 => wait_frozen_v1(cgroup, deadline),
        Version::V2 => wait_frozen_v2(cgroup, deadline),
    }
}

fn wait_frozen_v1(cgroup: &Cgroup, deadline: Instant) -> Result<State, FreezeError> {
    let mut pause = PAUSES.0;
    loop {
        let state = state(cgroup)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if state == State::Frozen || left.is_zero() {
            return Ok(state);
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(PAUSES.1);
        ask(cgroup, Wish::Freeze)?;
    }
}

fn wait_frozen_v2(cgroup: &Cgroup, deadline: Instant) -> Result<State, FreezeError> {
    let mut pause = PAUSES.0;
    loop {
        let Some(unfrozen) = first_unfrozen(cgroup)? else {
            return Ok(State::Frozen);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(State::Freezing);
        }
        match unfrozen {
            Unfrozen::Cgroup(events) => poll_change(&events, left).map_err(|error| read_error(cgroup, "", error))?,
            Unfrozen::Task => {
                std::thread::sleep(pause.min(left));
                pause = (pause * 2).min(PAUSES.1);
            }
        }
    }
}

/// What is not frozen yet in a v2 tree.
enum Unfrozen {
    /// A cgroup that says so. Its `cgroup.events`, just read, so that poll(2) wakes on a change since.
    Cgroup(File),
    /// A task of a cgroup that says frozen but also has sub-cgroups.
    Task,
}

fn first_unfrozen(cgroup: &Cgroup) -> Result<Option<Unfrozen>, FreezeError> {
    let tree = cgroup.subtree().map_err(|error| read_error(cgroup, "", error))?;
    for (index, cgroup) in tree.iter().enumerate() {
        match read_events(cgroup) {
            Ok((events, text)) if !says_frozen(&text) => return Ok(Some(Unfrozen::Cgroup(events))),
            Err(error) if !is_gone(&error) => return Err(read_error(cgroup, "cgroup.events", error)),
            Ok(_) | Err(_) => {}
        }
        // Parents come before children in the list.
        let mixed = tree[index + 1..].iter().any(|other| other.directory().starts_with(cgroup.directory()));
        if mixed {
            let tasks = cgroup.own_tasks().map_err(|error| read_error(cgroup, "cgroup.threads", error))?;
            if tasks.into_iter().any(|tid| blockers::look_at(Version::V2, tid).is_some()) {
                return Ok(Some(Unfrozen::Task));
            }
        }
    }
    Ok(None)
}

fn read_events(cgroup: &Cgroup) -> io::Result<(File, String)> {
    let mut events = File::open(cgroup.directory().join("cgroup.events"))?;
    let mut text = String::new();
    events.read_to_string(&mut text)?;
    Ok((events, text))
}

fn poll_change(events: &File, timeout: Duration) -> io::Result<()> {
    let timeout = Timespec::try_from(timeout).map_err(|_| io::ErrorKind::InvalidInput)?;
    match poll(&mut [PollFd::from_borrowed_fd(events.as_fd(), PollFlags::PRI)], Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn says_frozen(events: &str) -> bool {
    events.lines().any(|line| line == "frozen 1")
}

/// An error of reading `file` in `cgroup`.
pub(super) fn read_error(cgroup: &Cgroup, file: &str, source: io::Error) -> FreezeError {
    FreezeError::Control { action: "read".to_owned(), file: cgroup.directory().join(file), source }
}
