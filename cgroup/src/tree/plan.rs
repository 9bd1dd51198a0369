//! Every reason why a saved tree cannot be made here, found before anything is made.
//!
//! The tree comes from an image, which may be hostile: names must not lead out of the hierarchy, and only properties that are
//! known may be written.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use super::{CgroupTree, ChosenProperties, Directory, HierarchyTree, Mode, is_at_or_below};
use super::{chosen, properties};
use crate::directory::Cgroup;
use crate::hierarchy::{Hierarchies, Hierarchy, Version};

/// The deepest tree of directories that is accepted.
const DEEPEST: usize = 64;

/// A reason why the cgroups cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// The hierarchy is not mounted here, and tasks have cgroups in it.
    NoHierarchy {
        /// Its name.
        hierarchy: String,
    },
    /// A set names a hierarchy that the image does not describe.
    NotDescribed {
        /// The set.
        set: u32,
        /// The hierarchy's name.
        hierarchy: String,
    },
    /// A path or name leads elsewhere, or is too deep.
    BadPath {
        /// The path.
        path: String,
    },
    /// A property is none that ferry writes.
    UnknownProperty {
        /// The cgroup.
        cgroup: PathBuf,
        /// The file's name.
        name: String,
    },
    /// The mode wants the cgroup to exist.
    Missing {
        /// The cgroup.
        cgroup: PathBuf,
    },
    /// The mode wants the cgroup not to exist.
    Exists {
        /// The cgroup.
        cgroup: PathBuf,
    },
    /// The mount does not show that part of the hierarchy.
    OutOfSight {
        /// Why not.
        reason: String,
    },
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::NoHierarchy { hierarchy } if hierarchy.is_empty() => {
                write!(f, "cgroup v2 is not mounted here, and the tasks have cgroups in it")
            }
            Obstacle::NoHierarchy { hierarchy } => {
                write!(f, "the cgroup v1 hierarchy {hierarchy} is not mounted here, and the tasks have cgroups in it")
            }
            Obstacle::NotDescribed { set, hierarchy } => {
                write!(
                    f,
                    "the image's cgroup set {set} names the hierarchy {hierarchy:?}, which the image does not describe"
                )
            }
            Obstacle::BadPath { path } => {
                write!(f, "the image names the cgroup {path:?}, which is no path of a cgroup")
            }
            Obstacle::UnknownProperty { cgroup, name } => {
                write!(
                    f,
                    "the image sets {name:?} of the cgroup {}, which is no known property; name it (--cgroup-props) if it is to be restored",
                    cgroup.display()
                )
            }
            Obstacle::Missing { cgroup } => {
                write!(f, "the cgroup {} does not exist: make it, or use the mode soft", cgroup.display())
            }
            Obstacle::Exists { cgroup } => {
                write!(f, "the cgroup {} exists already: remove it, or use the mode soft", cgroup.display())
            }
            Obstacle::OutOfSight { reason } => f.write_str(reason),
        }
    }
}

/// A saved directory and the cgroup that it becomes; parents before children.
#[derive(Debug)]
pub(super) struct Step<'a> {
    pub cgroup: Cgroup,
    pub saved: &'a Directory,
    pub exists: bool,
}

/// What a restore will do.
#[derive(Debug, Default)]
pub(super) struct Plan<'a> {
    pub steps: Vec<Step<'a>>,
}

/// Looks for obstacles. Returns what to do when there are none.
pub(super) fn plan<'a>(
    tree: &'a CgroupTree,
    mode: Mode,
    hierarchies: &Hierarchies,
    chosen: &'a [ChosenProperties],
) -> Result<Plan<'a>, Vec<Obstacle>> {
    let mut planner = Planner { mode, chosen, plan: Plan::default(), obstacles: Vec::new() };
    planner.look_at_sets(tree);
    for saved in &tree.hierarchies {
        match find(hierarchies, saved) {
            Some(hierarchy) => planner.look_at_hierarchy(saved, hierarchy, &paths_in(tree, saved)),
            None if describes_cgroups(tree, saved) => {
                planner.obstacles.push(Obstacle::NoHierarchy { hierarchy: saved.name() })
            }
            None => {}
        }
    }
    if planner.obstacles.is_empty() { Ok(planner.plan) } else { Err(planner.obstacles) }
}

/// The hierarchy of this host for a saved one: v2, or the one with all of its controllers.
pub(super) fn find<'a>(hierarchies: &'a Hierarchies, saved: &HierarchyTree) -> Option<&'a Hierarchy> {
    let controllers: Vec<&String> = saved.controllers.iter().filter(|name| !name.is_empty()).collect();
    let found = match controllers.first() {
        None => hierarchies.unified(),
        Some(first) => hierarchies
            .with_controller(first)
            .filter(|hierarchy| controllers.iter().all(|name| hierarchy.has_controller(name))),
    };
    found.filter(|hierarchy| hierarchy.mount.is_some())
}

/// Whether the image describes cgroups of the tasks in it, other than its root.
pub(super) fn describes_cgroups(tree: &CgroupTree, saved: &HierarchyTree) -> bool {
    let is_whole = |head: &Directory| head.name.is_empty();
    !saved.heads.iter().all(is_whole)
        || !saved.heads.is_empty() && paths_in(tree, saved).into_iter().any(|path| path != "/")
}

/// The cgroups that tasks are in.
fn paths_in<'a>(tree: &'a CgroupTree, saved: &HierarchyTree) -> Vec<&'a str> {
    let name = saved.name();
    let members = tree.sets.iter().flat_map(|set| &set.members);
    members.filter(|member| member.hierarchy == name).map(|member| member.path.as_str()).collect()
}

struct Planner<'a> {
    mode: Mode,
    chosen: &'a [ChosenProperties],
    plan: Plan<'a>,
    obstacles: Vec<Obstacle>,
}

impl<'a> Planner<'a> {
    fn look_at_sets(&mut self, tree: &CgroupTree) {
        let names: BTreeSet<String> = tree.hierarchies.iter().map(HierarchyTree::name).collect();
        for set in &tree.sets {
            for member in &set.members {
                if !names.contains(&member.hierarchy) {
                    let hierarchy = member.hierarchy.clone();
                    self.obstacles.push(Obstacle::NotDescribed { set: set.id, hierarchy });
                }
                let prefix = member.path.get(..member.namespace_prefix);
                let whole = prefix.is_some_and(|_| member.path[member.namespace_prefix..].starts_with('/'))
                    || member.namespace_prefix == 0
                    || member.namespace_prefix == member.path.len();
                if !is_absolute(&member.path) || !whole {
                    self.obstacles.push(Obstacle::BadPath { path: member.path.clone() });
                }
            }
        }
    }

    fn look_at_hierarchy(&mut self, saved: &'a HierarchyTree, hierarchy: &Hierarchy, paths: &[&str]) {
        // CRIU saves the whole hierarchy under a head without a name when a task is in its root. Of that, only what holds other
        // tasks of the tree is the container's.
        let holds_tasks =
            |child: &&Directory| paths.iter().any(|path| is_at_or_below(path, &format!("/{}", child.name)));
        for head in &saved.heads {
            if head.name.is_empty() {
                head.children.iter().filter(holds_tasks).for_each(|child| self.look_at_head(child, hierarchy));
            } else {
                self.look_at_head(head, hierarchy);
            }
        }
    }

    fn look_at_head(&mut self, head: &'a Directory, hierarchy: &Hierarchy) {
        let path = format!("/{}", head.name);
        if head.name.is_empty() || !is_absolute(&path) {
            self.obstacles.push(Obstacle::BadPath { path });
            return;
        }
        match hierarchy.cgroup(&path) {
            Ok(cgroup) => self.look_at_directory(head, cgroup, hierarchy.version, 0),
            Err(error) => self.obstacles.push(Obstacle::OutOfSight { reason: error.to_string() }),
        }
    }

    fn look_at_directory(&mut self, saved: &'a Directory, cgroup: Cgroup, version: Version, depth: usize) {
        let exists = cgroup.exists();
        let directory = || cgroup.directory().to_owned();
        match self.mode {
            Mode::None | Mode::Props if !exists => self.obstacles.push(Obstacle::Missing { cgroup: directory() }),
            Mode::Strict if exists => self.obstacles.push(Obstacle::Exists { cgroup: directory() }),
            _ => {}
        }
        let known = |name: &str| properties::is_known(version, name) || chosen::is_chosen(self.chosen, name);
        for property in saved.properties.iter().filter(|property| !known(&property.name)) {
            self.obstacles.push(Obstacle::UnknownProperty { cgroup: directory(), name: property.name.clone() });
        }
        let parent = cgroup.clone();
        self.plan.steps.push(Step { cgroup, saved, exists });
        for child in &saved.children {
            if depth < DEEPEST && is_absolute(&format!("/{}", child.name)) && !child.name.is_empty() {
                self.look_at_directory(child, parent.child(&child.name), version, depth + 1);
            } else {
                self.obstacles.push(Obstacle::BadPath { path: format!("{}/{}", parent.path(), child.name) });
            }
        }
    }
}

/// Whether a path names a cgroup: `/`, or components that are neither empty nor dots nor too long for a file name.
fn is_absolute(path: &str) -> bool {
    let Some(components) = path.strip_prefix('/') else { return false };
    let good = |name: &str| !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains(['\0', '\n']);
    path.len() < 4096 && (components.is_empty() || components.split('/').all(good))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Member, Property, TaskSet};

    fn directory(name: &str, properties: &[&str], children: Vec<Directory>) -> Directory {
        let property = |name: &&str| Property { name: (*name).to_owned(), value: String::new(), permissions: None };
        Directory {
            name: name.into(),
            permissions: None,
            properties: properties.iter().map(property).collect(),
            children,
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_no_paths_of_cgroups() {
        for good in ["/", "/a", "/a/b.scope/c:d", "/a..b"] {
            assert!(is_absolute(good), "{good}");
        }
        for bad in ["", "a", "//", "/a//b", "/..", "/a/../b", "/a/.", "/a/", "/a\0b", "/a\nb"] {
            assert!(!is_absolute(bad), "{bad}");
        }
        assert!(!is_absolute(&format!("/{}", "x".repeat(256))));
    }

    fn host() -> Hierarchy {
        let mount = crate::hierarchy::Mount { point: "/nonesuch".into(), root: "/".into() };
        Hierarchy { version: Version::V1, controllers: vec!["nonesuch".into()], mount: Some(mount) }
    }

    #[test]
    fn of_a_whole_saved_hierarchy_only_what_holds_tasks_is_made() {
        let children =
            vec![directory("other", &[], vec![]), directory("own", &[], vec![directory("below", &[], vec![])])];
        let heads = vec![directory("", &[], children)];
        let hierarchy = HierarchyTree { controllers: vec!["nonesuch".into()], heads, threaded: true };
        let mut planner = Planner { mode: Mode::Soft, chosen: &[], plan: Plan::default(), obstacles: Vec::new() };
        planner.look_at_hierarchy(&hierarchy, &host(), &["/", "/own/below"]);
        let made: Vec<&str> = planner.plan.steps.iter().map(|step| step.cgroup.path()).collect();
        assert_eq!(made, ["/own", "/own/below"]);
    }

    #[test]
    fn hostile_trees_are_refused_with_all_reasons() {
        let mut deep = directory("x", &[], Vec::new());
        for _ in 0..100 {
            deep = directory("x", &[], vec![deep]);
        }
        let heads = vec![
            directory("ferry-none/../../etc", &[], Vec::new()),
            directory("ferry-none", &["release_agent", "../x"], vec![directory("..", &[], Vec::new()), deep]),
        ];
        let hierarchy = HierarchyTree { controllers: vec!["nonesuch".into()], heads, threaded: true };
        let mut planner = Planner { mode: Mode::Soft, chosen: &[], plan: Plan::default(), obstacles: Vec::new() };
        planner.look_at_hierarchy(&hierarchy, &host(), &[]);
        let count = |kind: fn(&Obstacle) -> bool| planner.obstacles.iter().filter(|obstacle| kind(obstacle)).count();
        assert_eq!(count(|obstacle| matches!(obstacle, Obstacle::UnknownProperty { .. })), 2);
        assert_eq!(count(|obstacle| matches!(obstacle, Obstacle::BadPath { .. })), 3);
    }

    #[test]
    fn sets_must_fit_the_description() {
        let member =
            |path: &str, namespace_prefix| Member { hierarchy: "cpu".into(), path: path.into(), namespace_prefix };
        let members = vec![member("/a/b", 2), member("/a/b", 4), member("/a/b", 3), member("/a/b", 9), member("a", 0)];
        let tree = CgroupTree { sets: vec![TaskSet { id: 2, members }], hierarchies: Vec::new() };
        let mut planner = Planner { mode: Mode::Soft, chosen: &[], plan: Plan::default(), obstacles: Vec::new() };
        planner.look_at_sets(&tree);
        let bad = planner.obstacles.iter().filter(|obstacle| matches!(obstacle, Obstacle::BadPath { .. })).count();
        assert_eq!(bad, 3, "{:?}", planner.obstacles);
        assert_eq!(planner.obstacles.len(), 5 + 3);
    }
}
