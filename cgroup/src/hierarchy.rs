//! Which cgroup hierarchies exist, where they are mounted, and which cgroup of each a task is in.
//!
//! Nothing is guessed from conventional paths. `/proc/PID/cgroup` (cgroups(7)) names every hierarchy, one a line:
//! `ID:CONTROLLERS:PATH`. Version 1 hierarchies list their controllers, or `name=NAME` when they have none; the line of
//! version 2 has id 0 and an empty list, and is there whether cgroup2 is mounted or not. `/proc/self/mountinfo`
//! (proc_pid_mountinfo(5)) says where each is mounted: of a v1 mount the super options name the controllers. A mount that
//! another mount hides is recognised by the device number that stat(2) gives for its mount point.
//!
//! Paths in `/proc/PID/cgroup` and the root field of mountinfo are both relative to the cgroup namespace of the reader
//! (cgroup_namespaces(7)), so the directory of a cgroup is the mount point plus what follows the mount's root.

mod reach;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::directory::Cgroup;

/// The two designs of cgroups, which can be in use side by side (a hybrid host).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Version {
    /// One hierarchy per controller or group of controllers, `fstype cgroup`.
    V1,
    /// The single unified hierarchy, `fstype cgroup2`.
    V2,
}

/// Where a hierarchy can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The mount point, as seen by this process.
    pub point: PathBuf,
    /// The cgroup that the mount point shows, as a path within the hierarchy; `/` for the whole of it.
    pub root: String,
}

/// One hierarchy of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// The design it follows.
    pub version: Version,
    /// v1: controllers in the kernel's order, `name=NAME` for a named hierarchy. v2: empty.
    pub controllers: Vec<String>,
    /// The mount with the widest view; `None` when this process sees no mount of it.
    pub mount: Option<Mount>,
}

impl Hierarchy {
    /// The name that `/proc/PID/cgroup` and CRIU's images use: controllers joined by commas, empty for v2.
    pub fn name(&self) -> String {
        self.controllers.join(",")
    }

    /// Whether `controller` (for example `freezer`) is attached to this v1 hierarchy.
    pub fn has_controller(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }

    /// The cgroup at `path`, a path within the hierarchy such as `/machine/redis`. It need not exist.
    ///
    /// # Errors
    /// When the hierarchy is not mounted, or the mount does not show that path.
    pub fn cgroup(&self, path: &str) -> Result<Cgroup, HierarchyError> {
        let Some(mount) = &self.mount else {
            return Err(HierarchyError::NotMounted { hierarchy: self.label() });
        };
        let below = path_below(&mount.root, path).ok_or_else(|| HierarchyError::OutOfSight {
            hierarchy: self.label(),
            path: path.to_owned(),
            point: mount.point.clone(),
            root: mount.root.clone(),
        })?;
        Ok(Cgroup::new(self.version, mount.point.join(below), path.to_owned()))
    }

    /// The name for people: `cgroup v1 freezer`, `cgroup v2`.
    pub fn label(&self) -> String {
        match self.version {
            Version::V1 => format!("cgroup v1 {}", self.name()),
            Version::V2 => "cgroup v2".to_owned(),
        }
    }
}

/// Every hierarchy of the host, in the order of `/proc/self/cgroup`.
#[derive(Debug, Clone)]
pub struct Hierarchies {
    list: Vec<Hierarchy>,
    /// Mounts of this process's own, which some of the mount points lead to.
    kept: Vec<Arc<OwnedFd>>,
}

impl Hierarchies {
    /// Reads `/proc/self/cgroup` and `/proc/self/mountinfo`.
    ///
    /// # Errors
    /// When either cannot be read or has a line of unknown shape.
    pub fn detect() -> Result<Hierarchies, HierarchyError> {
        let cgroup = read("/proc/self/cgroup")?;
        let mountinfo = read("/proc/self/mountinfo")?;
        let mut mounts = parse_mountinfo(&mountinfo)?;
        mounts.retain(|mount| mount.is_visible());
        let list = parse_proc_cgroup(&cgroup)?
            .into_iter()
            .map(|(controllers, _)| {
                let version = version_of(&controllers);
                let mount = widest_mount(&mounts, &controllers);
                Hierarchy { version, controllers, mount }
            })
            .collect();
        Ok(Hierarchies { list, kept: Vec::new() })
    }

    /// All hierarchies.
    pub fn iter(&self) -> impl Iterator<Item = &Hierarchy> {
        self.list.iter()
    }

    /// The hierarchy that `/proc/PID/cgroup` calls `name` (empty for v2).
    pub fn by_name(&self, name: &str) -> Option<&Hierarchy> {
        self.list.iter().find(|hierarchy| hierarchy.name() == name)
    }

    /// The v1 hierarchy with `controller` attached.
    pub fn with_controller(&self, controller: &str) -> Option<&Hierarchy> {
        self.list.iter().find(|hierarchy| hierarchy.has_controller(controller))
    }

    /// The unified hierarchy.
    pub fn unified(&self) -> Option<&Hierarchy> {
        self.list.iter().find(|hierarchy| hierarchy.version == Version::V2)
    }

    /// The cgroup of a directory such as `/sys/fs/cgroup/freezer/redis`, `None` when no hierarchy is mounted there.
    /// `directory` must be absolute and without `..`; it need not exist.
    pub fn at_directory(&self, directory: &Path) -> Option<(&Hierarchy, Cgroup)> {
        let seen = |hierarchy: &&Hierarchy| {
            hierarchy
                .mount
                .as_ref()
                .filter(|mount| directory.starts_with(&mount.point))
                .map(|mount| mount.point.as_os_str().len())
        };
        let hierarchy = self.list.iter().filter(|hierarchy| seen(hierarchy).is_some()).max_by_key(seen)?;
        let mount = hierarchy.mount.as_ref()?;
        let below = directory.strip_prefix(&mount.point).ok()?.to_str()?;
        let path = match (mount.root.as_str(), below) {
            (root, "") => root.to_owned(),
            ("/", below) => format!("/{below}"),
            (root, below) => format!("{root}/{below}"),
        };
        Some((hierarchy, Cgroup::new(hierarchy.version, directory.to_owned(), path)))
    }

    /// The cgroups of a process, or of one thread when `pid` is a thread's id. Hierarchies that came into being after
    /// [`Hierarchies::detect`] are passed over as long as the task is in their root, as all tasks are then.
    ///
    /// # Errors
    /// When the task does not exist, or is elsewhere in such a hierarchy already.
    pub fn of_task(&self, pid: i32) -> Result<CgroupSet, HierarchyError> {
        self.of_text(pid, &read(&format!("/proc/{pid}/cgroup"))?)
    }

    /// The same, of what `/proc/PID/cgroup` says.
    pub(crate) fn of_text(&self, pid: i32, text: &str) -> Result<CgroupSet, HierarchyError> {
        let memberships = parse_proc_cgroup(text)?
            .into_iter()
            .filter_map(|(controllers, path)| {
                match self.list.iter().find(|hierarchy| hierarchy.controllers == controllers) {
                    Some(hierarchy) => Some(Ok(Membership { hierarchy: hierarchy.clone(), path })),
                    None if path == "/" => None,
                    None => Some(Err(HierarchyError::Unknown { pid, name: controllers.join(",") })),
                }
            })
            .collect::<Result<_, HierarchyError>>()?;
        Ok(CgroupSet { memberships })
    }
}

/// A task's cgroup in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// The hierarchy, with its mount point and controllers.
    pub hierarchy: Hierarchy,
    /// The cgroup's path within it, as `/proc/PID/cgroup` gives it.
    pub path: String,
}

impl Membership {
    /// The cgroup's directory.
    ///
    /// # Errors
    /// When the hierarchy is not mounted, or the mount does not show that path.
    pub fn cgroup(&self) -> Result<Cgroup, HierarchyError> {
        self.hierarchy.cgroup(&self.path)
    }
}

/// A task's cgroups, one per hierarchy, in the order of `/proc/PID/cgroup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupSet {
    /// One entry per hierarchy of the host.
    pub memberships: Vec<Membership>,
}

impl CgroupSet {
    /// Reads the hierarchies of the host and the cgroups of `pid` (a process or thread). Use [`Hierarchies::of_task`] for many tasks.
    ///
    /// # Errors
    /// As [`Hierarchies::detect`] and [`Hierarchies::of_task`].
    pub fn of(pid: i32) -> Result<CgroupSet, HierarchyError> {
        Hierarchies::detect()?.of_task(pid)
    }

    /// The membership in the v1 hierarchy with `controller` attached.
    pub fn with_controller(&self, controller: &str) -> Option<&Membership> {
        self.memberships.iter().find(|member| member.hierarchy.has_controller(controller))
    }

    /// The membership in the unified hierarchy.
    pub fn unified(&self) -> Option<&Membership> {
        self.memberships.iter().find(|member| member.hierarchy.version == Version::V2)
    }
}

/// Why the cgroups of the host or of a task could not be told.
#[derive(Debug, thiserror::Error)]
pub enum HierarchyError {
    /// A file of `/proc` could not be read; for a task's file, the task is gone.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A line does not look as the man page says.
    #[error("{file} has a line that is not understood: {line:?}")]
    Malformed {
        /// The file.
        file: &'static str,
        /// The line.
        line: String,
    },
    /// The hierarchy exists but has no mount that this process sees.
    #[error("{hierarchy} is not mounted here: mount it, or run where it is mounted")]
    NotMounted {
        /// The hierarchy's label.
        hierarchy: String,
    },
    /// It could not be mounted.
    #[error("{hierarchy} is not mounted here, and cannot be")]
    Mount {
        /// The hierarchy's label.
        hierarchy: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The mount shows only a part of the hierarchy, and the cgroup is elsewhere.
    #[error("the cgroup {path} of {hierarchy} cannot be reached: {point} shows only {root}")]
    OutOfSight {
        /// The hierarchy's label.
        hierarchy: String,
        /// The cgroup.
        path: String,
        /// The mount point.
        point: PathBuf,
        /// The cgroup shown there.
        root: String,
    },
    /// A task is in a hierarchy that did not exist when the hierarchies were read.
    #[error("process {pid} is in the cgroup hierarchy {name:?}, which appeared only now: try again")]
    Unknown {
        /// The task.
        pid: i32,
        /// The hierarchy's name.
        name: String,
    },
}

/// A mount of a cgroup file system, from one line of mountinfo.
struct MountLine {
    device: u64,
    point: PathBuf,
    root: String,
    version: Version,
    /// Comma separated super options; of a v1 mount they include the controllers.
    options: Vec<String>,
}

impl MountLine {
    fn is_visible(&self) -> bool {
        fs::metadata(&self.point).is_ok_and(|metadata| metadata.dev() == self.device)
    }

    fn shows(&self, controllers: &[String]) -> bool {
        match self.version {
            Version::V1 => !controllers.is_empty() && controllers.iter().all(|name| self.options.contains(name)),
            Version::V2 => controllers.is_empty(),
        }
    }
}

fn version_of(controllers: &[String]) -> Version {
    if controllers.is_empty() { Version::V2 } else { Version::V1 }
}

fn widest_mount(mounts: &[MountLine], controllers: &[String]) -> Option<Mount> {
    let line = mounts.iter().filter(|line| line.shows(controllers)).min_by_key(|line| line.root.len())?;
    Some(Mount { point: line.point.clone(), root: line.root.clone() })
}

/// What follows `root` in `path`, without a leading slash; `None` when `path` is elsewhere.
fn path_below<'a>(root: &str, path: &'a str) -> Option<&'a str> {
    if path.split('/').any(|component| component == "..") {
        return None;
    }
    let rest = if root == "/" { path } else { path.strip_prefix(root)? };
    match rest.strip_prefix('/') {
        Some(below) => Some(below),
        None => rest.is_empty().then_some(""),
    }
}

fn read(path: &str) -> Result<String, HierarchyError> {
    fs::read_to_string(path).map_err(|source| HierarchyError::Read { path: path.to_owned(), source })
}

/// Lines of `/proc/PID/cgroup` as (controllers, path); the path may itself hold colons.
fn parse_proc_cgroup(text: &str) -> Result<Vec<(Vec<String>, String)>, HierarchyError> {
    text.lines()
        .map(|line| {
            let mut fields = line.splitn(3, ':');
            match (fields.next(), fields.next(), fields.next()) {
                (Some(id), Some(controllers), Some(path)) if id.parse::<u32>().is_ok() && path.starts_with('/') => {
                    let controllers =
                        controllers.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
                    Ok((controllers, path.to_owned()))
                }
                _ => Err(HierarchyError::Malformed { file: "/proc/PID/cgroup", line: line.to_owned() }),
            }
        })
        .collect()
}

fn parse_mountinfo(text: &str) -> Result<Vec<MountLine>, HierarchyError> {
    let mut mounts = Vec::new();
    for line in text.lines() {
        let malformed = || HierarchyError::Malformed { file: "/proc/self/mountinfo", line: line.to_owned() };
        let (mount, file_system) = line.split_once(" - ").ok_or_else(malformed)?;
        let mut file_system = file_system.split(' ');
        let version = match file_system.next() {
            Some("cgroup") => Version::V1,
            Some("cgroup2") => Version::V2,
            Some(_) => continue,
            None => return Err(malformed()),
        };
        let options = file_system.nth(1).ok_or_else(malformed)?.split(',').map(str::to_owned).collect();
        let mut fields = mount.split(' ').skip(2);
        let (Some(device), Some(root), Some(point)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(malformed());
        };
        let device = parse_device(device).ok_or_else(malformed)?;
        mounts.push(MountLine { device, point: unescape(point).into(), root: unescape(root), version, options });
    }
    Ok(mounts)
}

fn parse_device(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Undoes mountinfo's `\040` style of writing space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        plain.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.filter(u8::is_ascii) {
            Some(code) => {
                plain.push(char::from(code));
                rest = &rest[at + 4..];
            }
            None => {
                plain.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
34 31 0:31 /pods/a /mnt/a\\040b rw shared:1 master:2 - cgroup cgroup rw,freezer
35 31 0:31 / /mnt/freezer rw - cgroup cgroup rw,freezer
36 31 0:32 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
";

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn mountinfo_yields_only_cgroup_mounts_with_their_controllers() {
        let mounts = parse_mountinfo(MOUNTS).unwrap();
        assert_eq!(mounts.len(), 5);
        assert_eq!(mounts[2].point, Path::new("/mnt/a b"));
        assert_eq!(mounts[2].root, "/pods/a");
        let find = |names: &[&str]| widest_mount(&mounts, &strings(names)).map(|mount| mount.point);
        assert_eq!(find(&["cpu", "cpuacct"]), Some("/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(find(&["name=systemd"]), Some("/sys/fs/cgroup/systemd".into()));
        assert_eq!(find(&["freezer"]), Some("/mnt/freezer".into()), "the mount of the whole hierarchy wins");
        assert_eq!(find(&[]), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find(&["rdma"]), None);
    }

    #[test]
    fn a_mountinfo_line_without_separator_is_an_error() {
        assert!(matches!(parse_mountinfo("31 23 0:28 / /sys rw"), Err(HierarchyError::Malformed { .. })));
        assert!(matches!(
            parse_mountinfo("31 23 x / /sys rw - cgroup2 none rw"),
            Err(HierarchyError::Malformed { .. })
        ));
    }

    #[test]
    fn proc_cgroup_lines_keep_colons_in_paths() {
        let lines = parse_proc_cgroup("12:cpu,cpuacct:/a\n3:name=systemd:/b:c\n0::/\n").unwrap();
        assert_eq!(lines[0], (strings(&["cpu", "cpuacct"]), "/a".to_owned()));
        assert_eq!(lines[1], (strings(&["name=systemd"]), "/b:c".to_owned()));
        assert_eq!(lines[2], (Vec::new(), "/".to_owned()));
        assert!(parse_proc_cgroup("x::/").is_err());
        assert!(parse_proc_cgroup("0:/").is_err());
    }

    #[test]
    fn a_hierarchy_that_came_into_being_meanwhile_is_passed_over() {
        let me = i32::try_from(std::process::id()).unwrap();
        let all = Hierarchies::detect().unwrap();
        for (place, member) in all.of_task(me).unwrap().memberships.iter().enumerate() {
            let mut earlier = all.clone();
            earlier.list.retain(|hierarchy| *hierarchy != member.hierarchy);
            match earlier.of_task(me) {
                Ok(set) => {
                    assert_eq!(member.path, "/");
                    let mut others = all.of_task(me).unwrap();
                    others.memberships.remove(place);
                    assert_eq!(set, others);
                }
                Err(error) => assert!(matches!(error, HierarchyError::Unknown { .. }) && member.path != "/", "{error}"),
            }
        }
    }

    #[test]
    fn a_path_is_found_below_the_mounts_root_only() {
        assert_eq!(path_below("/", "/"), Some(""));
        assert_eq!(path_below("/", "/a/b"), Some("a/b"));
        assert_eq!(path_below("/a", "/a"), Some(""));
        assert_eq!(path_below("/a", "/a/b"), Some("b"));
        assert_eq!(path_below("/a", "/ab"), None);
        assert_eq!(path_below("/a", "/"), None);
        assert_eq!(path_below("/", "/../up"), None);
    }

    #[test]
    fn a_directory_finds_its_hierarchy_by_the_longest_mount_point() {
        let hierarchy = |names: &[&str], point: &str, root: &str| Hierarchy {
            version: version_of(&strings(names)),
            controllers: strings(names),
            mount: Some(Mount { point: point.into(), root: root.into() }),
        };
        let list =
            vec![hierarchy(&[], "/sys/fs/cgroup", "/"), hierarchy(&["freezer"], "/sys/fs/cgroup/freezer", "/pods/a")];
        let hierarchies = Hierarchies { list, kept: Vec::new() };
        let (found, cgroup) = hierarchies.at_directory(Path::new("/sys/fs/cgroup/freezer/x")).unwrap();
        assert_eq!(found.name(), "freezer");
        assert_eq!(cgroup.path(), "/pods/a/x");
        let (found, cgroup) = hierarchies.at_directory(Path::new("/sys/fs/cgroup/x/y")).unwrap();
        assert_eq!((found.version, cgroup.path()), (Version::V2, "/x/y"));
        assert!(hierarchies.at_directory(Path::new("/tmp")).is_none());
    }

    #[test]
    fn escapes_of_mountinfo_are_undone() {
        assert_eq!(unescape("a\\040b\\134c"), "a b\\c");
        assert_eq!(unescape("tail\\"), "tail\\");
    }

    #[test]
    fn this_machine_is_detected() {
        let hierarchies = Hierarchies::detect().unwrap();
        let own = hierarchies.of_task(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert_eq!(own.memberships.len(), hierarchies.iter().count());
        for hierarchy in hierarchies.iter().filter(|hierarchy| hierarchy.mount.is_some()) {
            let member = own.memberships.iter().find(|member| &member.hierarchy == hierarchy).unwrap();
            if let Ok(cgroup) = member.cgroup() {
                assert!(cgroup.directory().join("cgroup.procs").exists(), "{}", cgroup.directory().display());
            }
        }
    }
}
