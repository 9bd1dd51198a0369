//! Where each mount comes from when it is made again. Dump and restore ask the same question, so that a dump refuses
//! what a restore could not make.
//!
//! Two mounts show one file system when their device numbers are equal. Of a file system that a restore makes new, one mount
//! that shows all of it is made, and the others are bound from it.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use super::record::Record;
use crate::namespaces::mountinfo::Device;

/// Where a mount comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// It is the root, which whoever restores prepares.
    Root,
    /// Whoever restores names it by this key.
    External(String),
    /// A new file system of its type.
    New,
    /// A part of another mount's file system.
    Bind {
        /// That mount's place in the list.
        of: usize,
        /// The part, from that mount's root.
        part: PathBuf,
    },
}

/// Why a mount cannot be made again, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoSource {
    /// What is wrong.
    pub problem: String,
    /// What to do; none where naming the mount as external helps.
    pub remedy: Option<&'static str>,
}

impl NoSource {
    /// What to do with `mount`, of a container that a bundle's config describes or of any tree.
    pub fn remedy(&self, mount: &Record, of_bundle: bool) -> String {
        let point = mount.mount.point.display();
        match self.remedy {
            Some(remedy) => remedy.to_owned(),
            None if of_bundle => "unmount it, or make it a bind mount of the bundle's config".to_owned(),
            None => format!("name it as external: --external 'mnt[{point}]:KEY'"),
        }
    }
}

/// Types whose content is the kernel's, or is saved.
const NEW: &[&str] = &[
    "proc",
    "sysfs",
    "devpts",
    "mqueue",
    "tmpfs",
    "cgroup",
    "cgroup2",
    "debugfs",
    "tracefs",
    "securityfs",
    "pstore",
    "fusectl",
    "devtmpfs",
];

/// The root's place in the list: the mount whose parent is not in it.
///
/// # Errors
/// A sentence, when there is not exactly one, it is not at `/`, or the mounts form no tree.
pub fn root(mounts: &[Record]) -> Result<usize, String> {
    let places: HashMap<i32, usize> =
        mounts.iter().enumerate().map(|(place, record)| (record.mount.id, place)).collect();
    if places.len() != mounts.len() {
        return Err("two mounts have one id".into());
    }
    let is_root =
        |record: &Record| record.mount.parent == record.mount.id || !places.contains_key(&record.mount.parent);
    let roots: Vec<usize> = (0..mounts.len()).filter(|place| is_root(&mounts[*place])).collect();
    let [root] = roots[..] else { return Err(format!("{} mounts have no parent, one must have none", roots.len())) };
    if mounts[root].mount.point.as_os_str() != "/" {
        return Err(format!("the root of the mounts is at {}", mounts[root].mount.point.display()));
    }
    // Every mount must lead up to the root, at points that lead up as well.
    let mut reached = HashSet::from([root]);
    for start in 0..mounts.len() {
        let mut path = Vec::new();
        let mut place = start;
        while reached.insert(place) {
            path.push(place);
            let parent = places[&mounts[place].mount.parent];
            if !mounts[place].mount.point.starts_with(&mounts[parent].mount.point) {
                return Err(format!("{} does not lie below its parent", mounts[place].name()));
            }
            if path.contains(&parent) {
                return Err(format!("{} lies below itself", mounts[place].name()));
            }
            place = parent;
        }
    }
    Ok(root)
}

/// The source of every mount; `root` is the root's place.
pub fn sources(mounts: &[Record], root: usize) -> Vec<Result<Source, NoSource>> {
    let makes_new = |record: &Record| record.external.is_none() && NEW.contains(&record.mount.fs_type.as_str());
    // Of each file system that is made new, the whole mount that is made: the one with the fewest others below it, so that
    // none of those is bound from it; then the one that was mounted first, which lists of mounts have last.
    let mut first: HashMap<Device, usize> = HashMap::new();
    for (place, record) in mounts.iter().enumerate().rev() {
        if place != root && makes_new(record) && record.mount.is_whole() {
            let chosen = first.entry(record.mount.device).or_insert(place);
            if depth(mounts, place) < depth(mounts, *chosen) {
                *chosen = place;
            }
        }
    }
    let given: Vec<usize> =
        (0..mounts.len()).filter(|place| *place == root || mounts[*place].external.is_some()).collect();
    let find = |place: usize| {
        let Record { mount, external, .. } = &mounts[place];
        if place == root {
            return Ok(Source::Root);
        }
        if let Some(key) = external {
            return Ok(Source::External(key.clone()));
        }
        if mount.deleted {
            return Err(NoSource {
                problem: format!("it is bound from {}, which was deleted", mount.root.display()),
                remedy: Some("unmount it"),
            });
        }
        match first.get(&mount.device) {
            Some(&of) if of == place => return Ok(Source::New),
            Some(&of) => {
                let part = mount.root.strip_prefix("/").unwrap_or(&mount.root).to_owned();
                return Ok(Source::Bind { of, part });
            }
            None => {}
        }
        for &of in &given {
            let other = &mounts[of].mount;
            if let Ok(part) = mount.root.strip_prefix(&other.root)
                && other.device == mount.device
            {
                return Ok(Source::Bind { of, part: part.to_owned() });
            }
        }
        Err(if makes_new(&mounts[place]) {
            NoSource {
                problem: format!(
                    "it shows only {} of a file system that is mounted nowhere else here",
                    mount.root.display()
                ),
                remedy: None,
            }
        } else {
            NoSource { problem: "it is a file system from outside the tree".into(), remedy: None }
        })
    };
    (0..mounts.len()).map(find).collect()
}

/// How many mounts lie below one, to the root.
fn depth(mounts: &[Record], place: usize) -> usize {
    let mut depth = 0;
    let mut record = &mounts[place];
    while let Some(parent) = mounts.iter().find(|other| other.mount.id == record.mount.parent)
        && depth < mounts.len()
    {
        record = parent;
        depth += 1;
    }
    depth
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::namespaces::mountinfo::Mount;

    /// One record per `(id, parent, device, root, point, type)`.
    pub fn records(list: &[(i32, i32, u32, &str, &str, &str)]) -> Vec<Record> {
        let record = |(id, parent, minor, root, point, kind): &(i32, i32, u32, &str, &str, &str)| Record {
            mount: Mount {
                id: *id,
                parent: *parent,
                device: Device { major: 0, minor: *minor },
                root: root.into(),
                point: point.into(),
                fs_type: (*kind).into(),
                ..Mount::default()
            },
            ..Record::default()
        };
        list.iter().map(record).collect()
    }

    #[test]
    fn a_container_is_made_of_new_bound_and_given_mounts() {
        let mut mounts = records(&[
            (10, 1, 1, "/rootfs", "/", "ext4"),
            (11, 10, 2, "/", "/proc", "proc"),
            (12, 10, 3, "/", "/dev", "tmpfs"),
            (13, 10, 1, "/data", "/data", "ext4"),
            (14, 11, 2, "/sys", "/proc/sys", "proc"),
            (15, 11, 3, "/null", "/proc/keys", "tmpfs"),
            (16, 10, 1, "/rootfs/a", "/b", "ext4"),
            (17, 10, 9, "/", "/c", "ext4"),
            (18, 10, 8, "/x", "/d", "tmpfs"),
            (19, 13, 1, "/data/e", "/data/f", "ext4"),
        ]);
        mounts[3].external = Some("/key".into());
        assert_eq!(root(&mounts), Ok(0));
        let sources = sources(&mounts, 0);
        let bind = |of: usize, part: &str| Some(Source::Bind { of, part: part.into() });
        let expected = [
            Some(Source::Root),
            Some(Source::New),
            Some(Source::New),
            Some(Source::External("/key".into())),
            bind(1, "sys"),
            bind(2, "null"),
            bind(0, "a"),
            None,
            None,
            bind(3, "e"),
        ];
        assert_eq!(sources.iter().map(|source| source.clone().ok()).collect::<Vec<_>>(), expected);
        let problem = sources[7].clone().unwrap_err();
        assert!(problem.remedy(&mounts[7], false).contains("mnt[/c]"), "{problem:?}");
        assert!(problem.remedy(&mounts[7], true).contains("bind mount"), "{problem:?}");
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        for (list, word) in [
            (vec![], "0 mounts"),
            (vec![(1, 0, 1, "/", "/a", "x")], "/a"),
            (vec![(1, 0, 1, "/", "/", "x"), (2, 9, 1, "/", "/b", "x")], "2 mounts"),
            (vec![(1, 0, 1, "/", "/", "x"), (1, 1, 1, "/", "/b", "x")], "one id"),
            (vec![(1, 0, 1, "/", "/", "x"), (2, 3, 1, "/", "/b", "x"), (3, 2, 1, "/", "/b", "x")], "below itself"),
            (vec![(1, 0, 1, "/", "/", "x"), (2, 1, 1, "/", "/b", "x"), (3, 2, 1, "/", "/c", "x")], "does not lie"),
        ] {
            let error = root(&records(&list)).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
