//! Which cgroup to freeze, and which must not be.
//!
//! On a hybrid host a container may have a cgroup of its own in the v1 freezer hierarchy, in cgroup2, in both or in
//! neither: the membership that every process has in each proves nothing, since it may be the root or a cgroup shared
//! with others. A cgroup is fit when it is not a root, does not hold the caller, and every process in it is expected.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Component, Path};
use std::time::Duration;

use super::FreezeError;
use super::control::{self, State, read_error};
use super::guard::{self, Frozen};
use crate::directory::Cgroup;
use crate::hierarchy::{CgroupSet, Hierarchies, Hierarchy};

/// How many foreign processes an error names.
const NAMED: usize = 5;

/// Why a cgroup must not be frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// It is the root of its hierarchy, or of what this process sees of it.
    Root,
    /// There is no `freezer.state` or `cgroup.freeze`.
    NoFreezer,
    /// The calling process is in it, and would freeze itself.
    HoldsCaller,
    /// Processes are in it that the caller did not expect; the first of them.
    Foreign(Vec<i32>),
    /// Its directory or its tasks cannot be read.
    Unreadable(String),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unfit::Root => write!(f, "it is the root of the hierarchy"),
            Unfit::NoFreezer => write!(f, "it has no freezer"),
            Unfit::HoldsCaller => write!(f, "this very process is in it: run from another cgroup"),
            Unfit::Foreign(pids) => {
                let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
                write!(f, "it also holds processes that are not part of the container ({})", pids.join(", "))
            }
            Unfit::Unreadable(why) => write!(f, "it cannot be read: {why}"),
        }
    }
}

/// A cgroup that can be frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freezer {
    cgroup: Cgroup,
}

impl Freezer {
    /// The freezer of a cgroup given by its directory (`/sys/fs/cgroup/freezer/redis`), by its path within the v1 freezer
    /// hierarchy or cgroup2 (`/redis`, `redis`), or by the id of the container whose cgroup it is, as runtimes name cgroups:
    /// `ID`, `NAME-ID`, `NAME-ID.scope`, anywhere in the hierarchy. When it exists in both designs, the one with tasks is meant.
    ///
    /// # Errors
    /// When there is no such cgroup, several have tasks, or it is a root.
    pub fn for_path(path: impl AsRef<Path>) -> Result<Freezer, FreezeError> {
        let (path, hierarchies) = (path.as_ref(), Hierarchies::detect()?);
        let text = path.to_string_lossy().into_owned();
        // Links on the way to a directory are followed; what does not exist is looked up as it is.
        let real = path.canonicalize().ok().filter(|_| path.is_absolute());
        let looked_for = match hierarchies.at_directory(real.as_deref().unwrap_or(path)) {
            Some((_, cgroup)) => vec![cgroup],
            None => freezable(&hierarchies)
                .filter_map(|hierarchy| hierarchy.cgroup(&format!("/{}", text.trim_matches('/'))).ok())
                .collect(),
        };
        let dotted = real.is_none() && path.components().any(|component| component == Component::ParentDir);
        let mut found: Vec<Cgroup> = looked_for.iter().filter(|cgroup| !dotted && cgroup.exists()).cloned().collect();
        if let ([], Some(id)) = (&found[..], as_id(path)) {
            found = freezable(&hierarchies).flat_map(|hierarchy| named_for(hierarchy, id)).collect();
        }
        if found.len() > 1 && found[0].parent().is_some() {
            let populated = |cgroup: &Cgroup| cgroup.processes().is_ok_and(|processes| !processes.is_empty());
            let with_tasks: Vec<Cgroup> = found.iter().filter(|cgroup| populated(cgroup)).cloned().collect();
            match with_tasks.len() {
                0 => found.truncate(1),
                1 => found = with_tasks,
                _ => {
                    let candidates = with_tasks.iter().map(|cgroup| cgroup.directory().to_owned()).collect();
                    return Err(FreezeError::Ambiguous { path: text, candidates });
                }
            }
        }
        let Some(cgroup) = found.into_iter().next() else {
            let looked_for = looked_for.iter().map(|cgroup| cgroup.directory().to_owned()).collect();
            return Err(FreezeError::NotFound { path: text, looked_for });
        };
        let freezer = Freezer { cgroup };
        freezer.check_freezable().map_err(|reason| freezer.unfit(reason))?;
        Ok(freezer)
    }

    /// The freezer for the container whose main process has these cgroups. Fit is a cgroup that is not a root, does not
    /// hold the caller, and whose processes all satisfy `expected`. Of two fit ones, a frozen one is taken; otherwise
    /// v2, which notifies when it is done.
    ///
    /// # Errors
    /// When none is fit; the error says why not for each. Nothing was changed.
    pub fn of_container(set: &CgroupSet, expected: impl Fn(i32) -> bool) -> Result<Freezer, FreezeError> {
        let (mut fit, mut unfit) = (Vec::new(), Vec::new());
        for member in [set.unified(), set.with_controller("freezer")].into_iter().flatten() {
            let cgroup = match member.cgroup() {
                Ok(cgroup) => cgroup,
                Err(error) => {
                    unfit.push((member.path.clone().into(), Unfit::Unreadable(error.to_string())));
                    continue;
                }
            };
            let freezer = Freezer { cgroup };
            match freezer.check(&expected) {
                Ok(()) => fit.push(freezer),
                Err(reason) => unfit.push((freezer.cgroup.directory().to_owned(), reason)),
            }
        }
        let mut frozen = None;
        for freezer in &fit {
            if freezer.state()? == State::Frozen {
                frozen = Some(freezer.clone());
            }
        }
        frozen.or_else(|| fit.into_iter().next()).ok_or(FreezeError::NoneFits { candidates: unfit })
    }

    /// The cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// What the kernel says of it now.
    ///
    /// # Errors
    /// When the control file cannot be read.
    pub fn state(&self) -> Result<State, FreezeError> {
        control::state(&self.cgroup)
    }

    /// Every thread in the cgroup and its sub-cgroups.
    ///
    /// # Errors
    /// When a list cannot be read, or a task is outside this pid namespace.
    pub fn tasks(&self) -> Result<BTreeSet<i32>, FreezeError> {
        self.cgroup.tasks().map_err(|source| read_error(&self.cgroup, "", source))
    }

    /// Every process in the cgroup and its sub-cgroups.
    ///
    /// # Errors
    /// As [`Freezer::tasks`].
    pub fn processes(&self) -> Result<BTreeSet<i32>, FreezeError> {
        self.cgroup.processes().map_err(|source| read_error(&self.cgroup, "", source))
    }

    /// Whether [`Freezer::freeze`] and [`Frozen::thaw_for_ptrace`] would refuse, as far as can be told beforehand; nothing
    /// is changed.
    ///
    /// # Errors
    /// As those two.
    pub fn foresee(&self, expected: impl Fn(i32) -> bool) -> Result<(), FreezeError> {
        self.check(expected).map_err(|reason| self.unfit(reason))?;
        guard::check_holders(self, &guard::find_holders(self)?)
    }

    /// Freezes the cgroup and waits up to `timeout` for the kernel to say so. A cgroup that is frozen already, by hand, by
    /// the runtime or through an ancestor, is accepted, and will be left frozen by the guard.
    ///
    /// `expected` is asked about every process (a pid) in the cgroup, before and again after the freeze.
    ///
    /// # Errors
    /// When the cgroup holds the caller or unexpected processes, or does not freeze in time. It is then as it was.
    pub fn freeze(&self, expected: impl Fn(i32) -> bool, timeout: Duration) -> Result<Frozen, FreezeError> {
        self.check(&expected).map_err(|reason| self.unfit(reason))?;
        let frozen = Frozen::freeze(self, timeout)?;
        // Processes can have been moved in or born between the look and the freeze; the guard thaws on the way out.
        self.check(&expected).map_err(|reason| self.unfit(reason))?;
        Ok(frozen)
    }

    /// Thaws the cgroup itself, whoever froze it; ancestors stay as they are.
    ///
    /// # Errors
    /// When the control file cannot be written.
    pub fn thaw(&self) -> Result<(), FreezeError> {
        control::ask(&self.cgroup, control::Wish::Thaw)
    }

    fn check(&self, expected: impl Fn(i32) -> bool) -> Result<(), Unfit> {
        self.check_freezable()?;
        let processes = self.cgroup.processes().map_err(|error| Unfit::Unreadable(error.to_string()))?;
        if i32::try_from(std::process::id()).is_ok_and(|own| processes.contains(&own)) {
            return Err(Unfit::HoldsCaller);
        }
        let foreign: Vec<i32> = processes.into_iter().filter(|pid| !expected(*pid)).take(NAMED).collect();
        if foreign.is_empty() { Ok(()) } else { Err(Unfit::Foreign(foreign)) }
    }

    fn check_freezable(&self) -> Result<(), Unfit> {
        if self.cgroup.parent().is_none() {
            return Err(Unfit::Root);
        }
        if control::has_freezer(&self.cgroup) { Ok(()) } else { Err(Unfit::NoFreezer) }
    }

    fn unfit(&self, reason: Unfit) -> FreezeError {
        FreezeError::Unfit { cgroup: self.cgroup.directory().to_owned(), reason }
    }
}

fn freezable(hierarchies: &Hierarchies) -> impl Iterator<Item = &Hierarchy> {
    hierarchies.with_controller("freezer").into_iter().chain(hierarchies.unified())
}

/// The path as a container's id: a single name.
fn as_id(path: &Path) -> Option<&str> {
    let mut components = path.components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None) => name.to_str(),
        _ => None,
    }
}

/// The topmost cgroups of a hierarchy that are named for a container. Directories that cannot be read are passed over: they
/// are others'.
fn named_for(hierarchy: &Hierarchy, id: &str) -> Vec<Cgroup> {
    let Ok(root) = hierarchy.cgroup(hierarchy.mount.as_ref().map_or("/", |mount| &mount.root)) else {
        return Vec::new();
    };
    let (mut open, mut found) = (vec![root], Vec::new());
    while let Some(cgroup) = open.pop() {
        for child in cgroup.children().unwrap_or_default() {
            let name = child.path().rsplit('/').next().unwrap_or_default();
            if is_named_for(name, id) { &mut found } else { &mut open }.push(child);
        }
    }
    found
}

/// Whether a runtime names the cgroup of container `id` so: the cgroupfs drivers `ID` or `NAME-ID`, systemd's `NAME-ID.scope`.
fn is_named_for(name: &str, id: &str) -> bool {
    let name = name.strip_suffix(".scope").unwrap_or(name);
    name.strip_suffix(id).is_some_and(|rest| rest.is_empty() || rest.ends_with('-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_are_named_for_containers_in_the_ways_of_runtimes() {
        for name in ["c1", "libpod-c1", "docker-c1.scope", "cri-containerd-c1.scope", "c1.scope"] {
            assert!(is_named_for(name, "c1"), "{name}");
        }
        for name in ["c10", "xc1", "c1.slice", "libpod-conmon-c1x", "c1-x"] {
            assert!(!is_named_for(name, "c1"), "{name}");
        }
    }

    #[test]
    fn only_a_single_name_can_be_an_id() {
        assert_eq!(as_id(Path::new("c1")), Some("c1"));
        for path in ["/c1", "a/c1", "..", ""] {
            assert_eq!(as_id(Path::new(path)), None, "{path}");
        }
    }
}
