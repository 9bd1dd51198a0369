//! Saving the cgroups of a container, and making them again.
//!
//! What is saved is what CRIU's `cgroup.img` holds, as plain structs: of each hierarchy the directories below the container's
//! cgroup with their properties, and the *sets* of cgroups that tasks are in, numbered. A task's record names its set.
//! The set of the dumping process has a number too, [`OWN_SET`], but is not in the image: a task in it is restored
//! to wherever the restoring process is.
//!
//! | module | what it owns |
//! | --- | --- |
//! | `sets` | the sets, and their numbers |
//! | `save` | reading directories and properties |
//! | `properties` | which properties, and how each is written |
//! | `chosen` | further ones, by a user's choice |
//! | `plan` | every reason why a tree cannot be made here, found before anything is made |
//! | `restore` | making directories, writing properties, moving tasks, and undoing it |

mod chosen;
pub mod plan;
mod properties;
pub mod restore;
mod save;
mod sets;

use std::str::FromStr;

pub use chosen::ChosenProperties;
pub use save::SaveError;
pub use sets::{OWN_SET, SetTable};

/// The cgroups of a container: the content of `cgroup.img`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CgroupTree {
    /// The sets that tasks are in.
    pub sets: Vec<TaskSet>,
    /// One per hierarchy.
    pub hierarchies: Vec<HierarchyTree>,
}

/// A set of cgroups, one per hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskSet {
    /// Its number.
    pub id: u32,
    /// Its cgroups.
    pub members: Vec<Member>,
}

/// A cgroup of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The hierarchy as `/proc/PID/cgroup` names it: `cpu,cpuacct`, `name=systemd`, empty for v2.
    pub hierarchy: String,
    /// The path within it, `/` first.
    pub path: String,
    /// The length in bytes of the part of the path that is outside the tasks' cgroup namespace; 0 without one.
    pub namespace_prefix: usize,
}

/// The directories of one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HierarchyTree {
    /// Its controllers; `[""]` for v2, as in CRIU's images.
    pub controllers: Vec<String>,
    /// The topmost saved directories. Their names are whole paths, without the slash at the start.
    pub heads: Vec<Directory>,
    /// Whether threads of a process can be in different cgroups: always in v1.
    pub threaded: bool,
}

impl HierarchyTree {
    /// The name that sets use for it.
    pub fn name(&self) -> String {
        self.controllers.join(",")
    }
}

/// A cgroup directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    /// Its name below the parent; may have several components.
    pub name: String,
    /// Owner and mode; `None` leaves what mkdir(2) gives.
    pub permissions: Option<Permissions>,
    /// Its control files.
    pub properties: Vec<Property>,
    /// The directories below it.
    pub children: Vec<Directory>,
}

/// A control file and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Property {
    /// The file's name.
    pub name: String,
    /// What it holds, without the newline at the end. Empty for `cgroup.procs` and `tasks`, of which only the permissions count.
    pub value: String,
    /// Owner and mode of the file.
    pub permissions: Option<Permissions>,
}

/// Owner and mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions {
    /// The mode as stat(2) gives it, file type included.
    pub mode: u32,
    /// The owner, as numbered here.
    pub uid: u32,
    /// The group, as numbered here.
    pub gid: u32,
}

/// What a restore does with cgroups, as `criu --manage-cgroups=MODE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Nothing: the tasks stay where the restoring process is.
    Ignore,
    /// The cgroups must exist, and keep their properties.
    None,
    /// The cgroups must exist, and get the saved properties.
    Props,
    /// Missing cgroups are made and get the saved properties; existing ones keep theirs.
    #[default]
    Soft,
    /// Missing cgroups are made, and all get the saved properties.
    Full,
    /// No cgroup may exist; all are made.
    Strict,
}

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Mode, UnknownMode> {
        match text {
            "ignore" => Ok(Mode::Ignore),
            "none" => Ok(Mode::None),
            "props" => Ok(Mode::Props),
            "" | "soft" => Ok(Mode::Soft),
            "full" => Ok(Mode::Full),
            "strict" => Ok(Mode::Strict),
            text => Err(UnknownMode(text.to_owned())),
        }
    }
}

/// A mode that there is not.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no way to manage cgroups: use ignore, none, props, soft, full or strict")]
pub struct UnknownMode(pub String);

impl CgroupTree {
    /// Puts the container's cgroup elsewhere: `controller`'s (or, with `None`, every hierarchy's) topmost directories become
    /// `new_root`, an absolute path within the hierarchy, and the sets follow. It is CRIU's `--cgroup-root`. Where the tasks
    /// have a cgroup namespace, its root becomes `new_root`, and what is below it stays.
    pub fn change_root(&mut self, controller: Option<&str>, new_root: &str) {
        let new_root = new_root.trim_end_matches('/');
        let CgroupTree { sets, hierarchies } = self;
        let chosen = |tree: &&mut HierarchyTree| {
            controller.is_none_or(|controller| tree.controllers.iter().any(|name| name == controller))
        };
        for tree in hierarchies.iter_mut().filter(chosen) {
            let name = tree.name();
            let mut new_heads: Vec<Option<String>> = vec![None; tree.heads.len()];
            for member in sets.iter_mut().flat_map(|set| &mut set.members).filter(|member| member.hierarchy == name) {
                let below = |head: &Directory| is_at_or_below(&member.path, &format!("/{}", head.name));
                let Some(index) = tree.heads.iter().position(below) else { continue };
                let head_length = tree.heads[index].name.len() + 1;
                let cut = if member.namespace_prefix > 0 { member.namespace_prefix } else { head_length };
                let head_below = format!("/{}", tree.heads[index].name).get(cut..).unwrap_or_default().to_owned();
                new_heads[index] = Some(format!("{new_root}{head_below}"));
                let rest = member.path.get(cut..).unwrap_or_default();
                member.path =
                    if new_root.is_empty() && rest.is_empty() { "/".into() } else { format!("{new_root}{rest}") };
                if member.namespace_prefix > 0 {
                    member.namespace_prefix = new_root.len();
                }
            }
            for (head, new) in tree.heads.iter_mut().zip(new_heads) {
                if let Some(new) = new {
                    head.name = new.trim_start_matches('/').to_owned();
                }
            }
        }
    }
}

/// Whether `path` is the cgroup `above` or one below it.
fn is_at_or_below(path: &str, above: &str) -> bool {
    above == "/" || path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(path: &str, namespace_prefix: usize) -> CgroupTree {
        let member = |name: &str| Member { hierarchy: name.into(), path: path.into(), namespace_prefix };
        let head_length = if namespace_prefix > 0 { namespace_prefix } else { path.len() };
        let head = Directory {
            name: path[1..head_length].into(),
            permissions: None,
            properties: Vec::new(),
            children: Vec::new(),
        };
        let hierarchy = |names: &[&str]| HierarchyTree {
            controllers: names.iter().map(|name| (*name).to_owned()).collect(),
            heads: vec![head.clone()],
            threaded: true,
        };
        CgroupTree {
            sets: vec![TaskSet { id: 2, members: vec![member("cpu,cpuacct"), member("")] }],
            hierarchies: vec![hierarchy(&["cpu", "cpuacct"]), hierarchy(&[""])],
        }
    }

    fn paths(tree: &CgroupTree) -> Vec<(&str, usize)> {
        tree.sets[0].members.iter().map(|member| (member.path.as_str(), member.namespace_prefix)).collect()
    }

    #[test]
    fn a_new_root_moves_heads_and_sets_of_the_chosen_hierarchy() {
        let mut moved = tree("/pods/a", 0);
        moved.change_root(Some("cpuacct"), "/new/b");
        assert_eq!(paths(&moved), [("/new/b", 0), ("/pods/a", 0)]);
        assert_eq!(moved.hierarchies[0].heads[0].name, "new/b");
        assert_eq!(moved.hierarchies[1].heads[0].name, "pods/a");
        moved.change_root(Some(""), "/v2/");
        assert_eq!(moved.hierarchies[1].heads[0].name, "v2");
    }

    #[test]
    fn a_new_root_replaces_the_part_outside_the_namespace() {
        let mut moved = tree("/docker/a/init.scope", "/docker/a".len());
        moved.change_root(None, "/x/y/z");
        assert_eq!(paths(&moved), [("/x/y/z/init.scope", 6), ("/x/y/z/init.scope", 6)]);
        assert_eq!(moved.hierarchies[0].heads[0].name, "x/y/z");
    }

    #[test]
    fn modes_are_read_and_soft_is_usual() {
        assert_eq!("strict".parse::<Mode>().unwrap(), Mode::Strict);
        assert_eq!("".parse::<Mode>().unwrap(), Mode::default());
        assert!("hard".parse::<Mode>().unwrap_err().to_string().contains("hard"));
    }
}
