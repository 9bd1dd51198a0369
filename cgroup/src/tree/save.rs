//! Reading a container's cgroup directories with their properties.
//!
//! Saved is what belongs to the container: the subtree of each cgroup that one of its tasks is in, or of its cgroup
//! namespace's root. A task in the root of a hierarchy, or in the cgroup that the dumping process is in itself, has no cgroup
//! of its own there, so nothing of that hierarchy is saved but the task's membership.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{CgroupTree, ChosenProperties, Directory, HierarchyTree, Permissions, Property, SetTable, is_at_or_below};
use super::{chosen, properties};
use crate::directory::{Cgroup, is_gone};
use crate::freezer::{self, FreezeError, Frozen};
use crate::hierarchy::{Hierarchy, HierarchyError, Version};

/// Why the cgroups of a container could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The hierarchies or a task's cgroups could not be read.
    #[error(transparent)]
    Hierarchy(#[from] HierarchyError),
    /// The freezer's state could not be read.
    #[error(transparent)]
    Freezer(#[from] FreezeError),
    /// The cgroup namespace could not be looked at.
    #[error("cannot look at the cgroup namespace of process {pid}")]
    Namespace {
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A task was moved out of what its namespace shows.
    #[error("process {pid} is in the cgroup {path}, outside the root of its own cgroup namespace: move it back first")]
    OutsideNamespace {
        /// The process.
        pid: i32,
        /// Its cgroup.
        path: String,
    },
    /// A directory or control file could not be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl CgroupTree {
    /// Reads the directories of all sets in the table. When the tasks are frozen by `frozen`, what is saved of the freezer is
    /// the state that it found.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn collect(table: &SetTable, frozen: Option<&Frozen>) -> Result<CgroupTree, SaveError> {
        Self::collect_from(table, &[], &[], frozen)
    }

    /// The same, beginning at `roots`: absolute paths within the hierarchy of a controller, or with `None` of every other. What is
    /// above the tasks is saved too then. Of the control files `chosen` are saved as well.
    ///
    /// # Errors
    /// As [`CgroupTree::collect`].
    pub fn collect_from(
        table: &SetTable,
        roots: &[(Option<String>, String)],
        chosen: &[ChosenProperties],
        frozen: Option<&Frozen>,
    ) -> Result<CgroupTree, SaveError> {
        let sets = table.sets().to_vec();
        if sets.is_empty() {
            return Ok(CgroupTree::default());
        }
        let mut hierarchies = Vec::new();
        let mut reachable = table.hierarchies().clone();
        for hierarchy in table.hierarchies().iter() {
            let name = hierarchy.name();
            let members = sets.iter().flat_map(|set| &set.members).filter(|member| member.hierarchy == name);
            let paths = members.map(|member| match member.namespace_prefix {
                0 => member.path.as_str(),
                prefix => &member.path[..prefix],
            });
            let mut heads = topmost(paths);
            heads.retain(|head| !is_at_or_below(table.own_path(&name), head));
            let of = |controller: &String| name == *controller || hierarchy.has_controller(controller);
            let root = roots.iter().find(|(controller, _)| controller.as_ref().is_some_and(of));
            if let Some((_, root)) = root.or_else(|| roots.iter().find(|(controller, _)| controller.is_none())) {
                heads = topmost(heads.into_iter().chain(std::iter::once(root.as_str())));
            }
            if !heads.is_empty() {
                reachable.provide(&hierarchy.controllers)?;
            }
            let hierarchy = reachable.by_name(&name).unwrap_or(hierarchy);
            hierarchies.push(collect_hierarchy(hierarchy, &heads, chosen, frozen)?);
        }
        Ok(CgroupTree { sets, hierarchies })
    }
}

/// The paths that are below no other, without the root.
fn topmost<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut sorted: Vec<&str> = paths.filter(|path| *path != "/").collect();
    sorted.sort_unstable();
    let mut heads: Vec<&str> = Vec::new();
    for path in sorted {
        if !heads.iter().any(|head| is_at_or_below(path, head)) {
            heads.push(path);
        }
    }
    heads
}

fn collect_hierarchy(
    hierarchy: &Hierarchy,
    paths: &[&str],
    chosen: &[ChosenProperties],
    frozen: Option<&Frozen>,
) -> Result<HierarchyTree, SaveError> {
    let mut heads = Vec::new();
    for path in paths {
        let cgroup = hierarchy.cgroup(path)?;
        let name = path.trim_start_matches('/').to_owned();
        heads.extend(collect_directory(&cgroup, name, &hierarchy.controllers, chosen, frozen)?);
    }
    let controllers = match hierarchy.version {
        Version::V1 => hierarchy.controllers.clone(),
        Version::V2 => vec![String::new()],
    };
    let threaded = hierarchy.version == Version::V1 || heads.iter().any(has_threaded);
    Ok(HierarchyTree { controllers, heads, threaded })
}

fn has_threaded(directory: &Directory) -> bool {
    let threaded = |property: &Property| property.name == "cgroup.type" && property.value == "threaded";
    directory.properties.iter().any(threaded) || directory.children.iter().any(has_threaded)
}

/// `None` when the directory is gone: then no task is in it either.
fn collect_directory(
    cgroup: &Cgroup,
    name: String,
    controllers: &[String],
    chosen: &[ChosenProperties],
    frozen: Option<&Frozen>,
) -> Result<Option<Directory>, SaveError> {
    let fail = |source| SaveError::Read { path: cgroup.directory().to_owned(), source };
    let Some(permissions) = collect_permissions(cgroup.directory())? else {
        return Ok(None);
    };
    let mut properties = Vec::new();
    let mut names = properties::names(cgroup, controllers).map_err(fail)?;
    chosen::apply(chosen, cgroup.version(), controllers, &mut names);
    for name in names {
        properties.extend(collect_property(cgroup, name, frozen)?);
    }
    let mut children = Vec::new();
    for child in cgroup.children().map_err(fail)? {
        let name = child.path().rsplit('/').next().unwrap_or_default().to_owned();
        children.extend(collect_directory(&child, name, controllers, chosen, frozen)?);
    }
    Ok(Some(Directory { name, permissions: Some(permissions), properties, children }))
}

fn collect_property(cgroup: &Cgroup, name: String, frozen: Option<&Frozen>) -> Result<Option<Property>, SaveError> {
    let path = cgroup.directory().join(&name);
    let Some(permissions) = collect_permissions(&path)? else {
        return Ok(None);
    };
    let value = match name.as_str() {
        name if properties::lists_tasks(name) => String::new(),
        // What it was asked itself, without ferry's freeze and without what follows from cgroups above.
        "freezer.state" | "cgroup.freeze" => {
            let asked = match frozen {
                Some(frozen) => frozen.found_asked(cgroup)?,
                None => freezer::is_asked_to_freeze(cgroup)?,
            };
            freezer::control_text(cgroup.version(), asked).to_owned()
        }
        _ => match cgroup.read(&name) {
            Ok(text) => properties::saved_value(&name, &text),
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => {
                // Files of switched-off or removed features exist but answer with an error (memory.kmem.*).
                tracing::debug!(file = %path.display(), %error, "a cgroup property cannot be read and is not saved");
                return Ok(None);
            }
        },
    };
    if !properties::is_worth_saving(&name, &value) {
        return Ok(None);
    }
    Ok(Some(Property { name, value, permissions: Some(permissions) }))
}

fn collect_permissions(path: &Path) -> Result<Option<Permissions>, SaveError> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(Permissions { mode: metadata.mode(), uid: metadata.uid(), gid: metadata.gid() })),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(SaveError::Read { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_topmost_paths_are_walked() {
        let paths = ["/a/b", "/a", "/", "/ab", "/c/d", "/c/d/e", "/a"];
        assert_eq!(topmost(paths.into_iter()), ["/a", "/ab", "/c/d"]);
    }
}
