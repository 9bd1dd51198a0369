//! In which order mounts are made, so that each mount point can be reached by its path when its turn comes.
//!
//! A mount comes after its parent, after what it is bound from, and after everything that it will hide: its brothers whose
//! mount points lie at or below its own, with all that is mounted on them.

use std::collections::HashSet;

use super::record::Record;
use super::source::Source;

/// The places of all mounts but the root's, in order.
///
/// # Errors
/// The place of a mount whose turn never comes.
pub fn order(mounts: &[Record], root: usize, sources: &[Source]) -> Result<Vec<usize>, usize> {
    let parent_of = |place: usize| {
        let parent = mounts[place].mount.parent;
        mounts.iter().position(|other| other.mount.id == parent).unwrap_or(root)
    };
    let parents: Vec<usize> = (0..mounts.len()).map(parent_of).collect();
    let below = |place: usize, ancestor: usize| {
        let mut place = place;
        while place != ancestor && place != root {
            place = parents[place];
        }
        place == ancestor
    };
    // Whether `other` must be there before `place`.
    let before = |other: usize, place: usize| {
        if other == parents[place] || matches!(&sources[place], Source::Bind { of, .. } if *of == other) {
            return true;
        }
        let hides = |brother: usize| {
            brother != place
                && brother != root
                && parents[brother] == parents[place]
                && mounts[brother].mount.point.starts_with(&mounts[place].mount.point)
                && mounts[brother].mount.point != mounts[place].mount.point
        };
        (0..mounts.len()).any(|brother| hides(brother) && below(other, brother))
    };
    let mut done = vec![false; mounts.len()];
    done[root] = true;
    // Images list the last mount first.
    let mut left: Vec<usize> = (0..mounts.len()).rev().filter(|place| *place != root).collect();
    let needs: Vec<Vec<usize>> =
        (0..mounts.len())
            .map(|place| {
                if place == root {
                    Vec::new()
                } else {
                    (0..mounts.len()).filter(|other| before(*other, place)).collect()
                }
            })
            .collect();
    let mut order = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let Some(next) = left.iter().position(|place| needs[*place].iter().all(|other| done[*other])) else {
            return Err(left[0]);
        };
        let place = left.remove(next);
        done[place] = true;
        order.push(place);
    }
    Ok(order)
}

/// Whether a mount can be reached by its path when all are there: nothing lies over it or over the way to it.
pub fn is_visible(mounts: &[Record], place: usize) -> bool {
    let mount = &mounts[place].mount;
    let covers = |other: &Record| {
        // A child that begins at its parent's root, or a brother at or above the point.
        let other = &other.mount;
        let over = other.parent == mount.id && other.point == mount.point;
        let brother = other.parent == mount.parent && other.id != mount.id && mount.point.starts_with(&other.point);
        (over || brother) && other.id != mount.parent
    };
    if mounts.iter().any(covers) {
        return false;
    }
    match mounts.iter().position(|other| other.mount.id == mount.parent) {
        Some(parent) if parent != place => {
            // The parent may be covered by this very mount's own ancestors only if it is reached otherwise.
            mounts[parent].mount.point == mount.point || is_visible(mounts, parent)
        }
        _ => true,
    }
}

/// What is wrong with [`hidden_peers`].
pub const HIDDEN_PEER: &str = "it is shared or unbindable, and hidden by another mount";

/// Mounts whose propagation cannot be set at the end, since they cannot be reached then.
pub fn hidden_peers(mounts: &[Record]) -> Vec<usize> {
    let groups: HashSet<u32> = mounts.iter().filter_map(|record| record.mount.shared).collect();
    let concerned = |record: &Record| {
        let mount = &record.mount;
        mount.shared.is_some() || mount.unbindable || mount.master.is_some_and(|master| groups.contains(&master))
    };
    (0..mounts.len()).filter(|place| concerned(&mounts[*place]) && !is_visible(mounts, *place)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::source::tests::records;
    use super::super::source::{root, sources};
    use super::*;

    fn points(list: &[(i32, i32, u32, &str, &str, &str)]) -> Result<Vec<String>, usize> {
        let mounts = records(list);
        let root = root(&mounts).expect("a tree");
        let sources: Vec<Source> = sources(&mounts, root).into_iter().map(|source| source.expect("a source")).collect();
        let order = order(&mounts, root, &sources)?;
        Ok(order.iter().map(|place| mounts[*place].mount.point.display().to_string()).collect())
    }

    #[test]
    fn parents_sources_and_what_is_hidden_come_first() {
        let points = points(&[
            (15, 10, 5, "/", "/a", "tmpfs"),
            (14, 13, 4, "/x", "/a/b/c", "tmpfs"),
            (13, 10, 3, "/", "/a/b", "tmpfs"),
            (12, 10, 4, "/", "/z", "tmpfs"),
            (10, 1, 1, "/", "/", "ext4"),
        ]);
        assert_eq!(points, Ok(["/z", "/a/b", "/a/b/c", "/a"].map(String::from).to_vec()));
    }

    #[test]
    fn what_needs_itself_is_found() {
        // /a hides /a/b, which is bound from /a.
        let list = [(13, 10, 3, "/x", "/a/b", "tmpfs"), (12, 10, 3, "/", "/a", "tmpfs"), (10, 1, 1, "/", "/", "ext4")];
        assert!(points(&list).is_err());
    }

    #[test]
    fn hidden_mounts_are_known() {
        let mounts = records(&[
            (10, 1, 1, "/", "/", "ext4"),
            (11, 10, 2, "/", "/a/b", "tmpfs"),
            (12, 10, 3, "/", "/a", "tmpfs"),
            (13, 12, 4, "/", "/a", "tmpfs"),
            (14, 13, 5, "/", "/a/c", "tmpfs"),
        ]);
        let visible: Vec<bool> = (0..5).map(|place| is_visible(&mounts, place)).collect();
        assert_eq!(visible, [true, false, false, true, true]);
    }
}
