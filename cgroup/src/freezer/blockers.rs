//! The tasks that keep a freeze from completing, for the message of a timeout.
//!
//! The kernel tells only whether a cgroup is frozen, not which task is not. proc_pid_stat(5) and `/proc/PID/wchan` tell
//! the rest, as measured on Linux 6.18: a task frozen by v1 shows state `D`, in `__refrigerator` or, when it was asleep in
//! a freezable call (Linux 6.1), wherever it slept; one frozen by v2 shows `S` in `get_signal` (`do_freezer_trap` where it
//! is not inlined); stopped and traced tasks (`T`, `t`) and zombies count as frozen.

use std::fmt;
use std::fs;
use std::path::Path;

use super::control::{self, State};
use crate::directory::Cgroup;
use crate::hierarchy::Version;

/// How many are named in a message; the error holds them all.
const NAMED: usize = 8;

/// A task that is not frozen, or of which it cannot be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// The thread.
    pub tid: i32,
    /// Its command, as in `/proc/PID/comm`.
    pub comm: String,
    /// Its state letter of proc_pid_stat(5).
    pub state: char,
    /// The kernel function it sleeps in, empty when it runs or the kernel does not tell.
    pub wchan: String,
    /// Whether it is surely not frozen. A v1 task asleep in `D` may be either.
    pub certain: bool,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}), state {}", self.tid, self.comm, self.state)?;
        if !self.wchan.is_empty() {
            write!(f, " in {}", self.wchan)?;
        }
        Ok(())
    }
}

/// Looks at the tasks of the tree, but not at those of v1 cgroups that the kernel calls frozen; the surest blockers first.
/// What cannot be read is left out: this feeds a message.
pub(super) fn find(cgroup: &Cgroup) -> Vec<Blocker> {
    let mut found: Vec<Blocker> = cgroup
        .subtree()
        .unwrap_or_default()
        .iter()
        .filter(|cgroup| cgroup.version() == Version::V2 || !matches!(control::state(cgroup), Ok(State::Frozen)))
        .flat_map(|cgroup| cgroup.own_tasks().unwrap_or_default())
        .filter_map(|tid| look_at(cgroup.version(), tid))
        .collect();
    found.sort_by_key(|blocker| (!blocker.certain, blocker.tid));
    found
}

/// The message's list.
pub(super) fn list(blockers: &[Blocker]) -> String {
    let mut text: Vec<String> = blockers.iter().take(NAMED).map(ToString::to_string).collect();
    if blockers.len() > NAMED {
        text.push(format!("and {} more", blockers.len() - NAMED));
    }
    if text.is_empty() { "none (any more)".to_owned() } else { text.join("; ") }
}

/// The task as a blocker, `None` when it is frozen, counts as such, or is gone.
pub(super) fn look_at(version: Version, tid: i32) -> Option<Blocker> {
    let stat = fs::read_to_string(format!("/proc/{tid}/stat")).ok()?;
    let (comm, state) = parse_stat(&stat)?;
    let wchan = fs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
    let wchan = if wchan == "0" { String::new() } else { wchan };
    let certain = match (version, state, wchan.as_str()) {
        (_, 'T' | 't' | 'Z' | 'X', _) => return None,
        (Version::V1, 'D', "__refrigerator") => return None,
        (Version::V1, 'D', _) => false,
        (Version::V2, 'S', "get_signal" | "do_freezer_trap") => return None,
        (Version::V2, 'S', "") if !wchan_is_told() => return None,
        _ => true,
    };
    Some(Blocker { tid, comm, state, wchan, certain })
}

/// Whether `/proc/PID/wchan` names the function of a sleeping task: only with `CONFIG_KALLSYMS`. Then no name means that the
/// task runs, whatever state was read before: one that loops in the kernel passes through `S`. Without it, a sleeping task
/// is taken for frozen.
fn wchan_is_told() -> bool {
    Path::new("/proc/kallsyms").exists()
}

/// Command and state of a line of proc_pid_stat(5); the command may itself hold spaces and parentheses.
fn parse_stat(stat: &str) -> Option<(String, char)> {
    let (_, rest) = stat.split_once('(')?;
    let (comm, rest) = rest.rsplit_once(')')?;
    Some((comm.to_owned(), rest.trim_start().chars().next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_parentheses_is_read_whole() {
        assert_eq!(parse_stat("12 (a) R (b) S 1 2"), Some(("a) R (b".to_owned(), 'S')));
        assert_eq!(parse_stat("12 nothing"), None);
    }

    #[test]
    fn a_long_list_is_cut_and_says_so() {
        let blocker = |tid| Blocker { tid, comm: "x".into(), state: 'D', wchan: "f".into(), certain: false };
        let all: Vec<Blocker> = (1..=10).map(blocker).collect();
        let text = list(&all);
        assert!(text.starts_with("1 (x), state D in f; 2 "), "{text}");
        assert!(text.ends_with("; and 2 more"), "{text}");
    }
}
