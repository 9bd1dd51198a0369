//! Control files that a user names to be saved and restored, besides or instead of those that are known.
//!
//! The kernel gets new controllers and files. An image may name such files only where whoever restores it has named them too.

use super::properties;
use crate::hierarchy::Version;

/// Files of one controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChosenProperties {
    /// The controller, by its own name also where it is one of version 2.
    pub controller: String,
    /// Whether they take the place of those that are known of it.
    pub replace: bool,
    /// The files' names.
    pub names: Vec<String>,
}

/// Adds to `names`, of a cgroup of these controllers, those that were chosen, and takes out what they replace.
pub(super) fn apply(chosen: &[ChosenProperties], version: Version, controllers: &[String], names: &mut Vec<String>) {
    for one in chosen.iter().filter(|one| version == Version::V2 || controllers.contains(&one.controller)) {
        if one.replace {
            names.retain(|name| !properties::is_of(version, &one.controller, name));
        }
        let new = one.names.iter().filter(|name| !names.contains(name)).cloned().collect::<Vec<_>>();
        names.extend(new);
    }
}

/// Whether a file was chosen.
pub(super) fn is_chosen(chosen: &[ChosenProperties], name: &str) -> bool {
    chosen.iter().any(|one| one.names.iter().any(|chosen| chosen == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_files_are_added_or_replace() {
        let names = |version, replace| {
            let mut names: Vec<String> =
                ["cpu.shares", "cpu.weight", "pids.max", "tasks"].map(str::to_owned).into_iter().collect();
            let (controller, new) = ("cpu".to_owned(), vec!["cpu.new".to_owned(), "pids.max".to_owned()]);
            let chosen = [ChosenProperties { controller, replace, names: new }];
            apply(&chosen, version, &["cpu".to_owned()], &mut names);
            assert!(is_chosen(&chosen, "cpu.new") && !is_chosen(&chosen, "cpu.shares"));
            names.join(" ")
        };
        assert_eq!(names(Version::V1, false), "cpu.shares cpu.weight pids.max tasks cpu.new");
        assert_eq!(names(Version::V1, true), "cpu.weight pids.max tasks cpu.new");
        assert_eq!(names(Version::V2, true), "pids.max tasks cpu.new");
        let mut others = vec!["pids.max".to_owned()];
        let chosen = [ChosenProperties { controller: "cpu".into(), replace: true, names: vec!["x".into()] }];
        apply(&chosen, Version::V1, &["pids".to_owned()], &mut others);
        assert_eq!(others, ["pids.max"]);
    }
}
