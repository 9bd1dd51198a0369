//! The cgroup of a container: where it is, its limits, who is in it, and its removal.
//!
//! libcgroups puts a container into one directory of the same path in every v1 controller hierarchy that it knows,
//! or into one directory of cgroup2 when that is mounted at `/sys/fs/cgroup`; on a hybrid host, where both exist, it
//! uses v1 alone. The directories are found here in the same way. Freezing is ferry-cgroup's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use ferry_cgroup::{Cgroup, FreezeError, Freezer, Hierarchies, HierarchyError, Mode, State};
use ferry_engine::cgroups::CgroupOptions;
use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, CgroupSetup, ControllerOpt, DEFAULT_CGROUP_ROOT,
};
use libcgroups::v1::util::{V1MountPointError, list_supported_mount_points};
use libcontainer::oci_spec::runtime::{LinuxResources, Spec};
use nix_029::unistd::Pid;

use crate::checkpoint::CgroupsMode;
use crate::signals::SignalNumber;

/// How long processes that were killed may take to leave their cgroup.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long freezing may take.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why something could not be done with a container's cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// `cgroupsPath` of the bundle cannot be used.
    #[error("the bundle's cgroupsPath {path:?} cannot be used: {reason}")]
    BadPath {
        /// As written in the bundle.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// The host's cgroups could not be found out.
    #[error("cannot find out how cgroups are mounted on this host")]
    Setup(#[from] libcgroups::common::GetCgroupSetupError),
    /// The mounts of v1 controllers could not be read.
    #[error("cannot find out where cgroup v1 controllers are mounted")]
    Mounts(#[from] V1MountPointError),
    /// The host's hierarchies could not be read.
    #[error(transparent)]
    Hierarchy(#[from] HierarchyError),
    /// The library could not make sense of the path or the host.
    #[error("cannot use the cgroup {path}")]
    Manager {
        /// The container's cgroup.
        path: PathBuf,
        /// The library's reason.
        #[source]
        source: Box<libcgroups::common::CreateCgroupSetupError>,
    },
    /// Limits could not be set, or a process not be added.
    #[error("cannot {action} the cgroup {path}")]
    Apply {
        /// What was tried.
        action: String,
        /// The container's cgroup.
        path: PathBuf,
        /// The library's reason.
        #[source]
        source: Box<libcgroups::common::AnyManagerError>,
    },
    /// Another container, or a process put there by hand, is in it.
    #[error("the cgroup {directory} is in use by process {pid}: give the container another cgroupsPath")]
    InUse {
        /// The directory with processes in it.
        directory: PathBuf,
        /// One of them.
        pid: i32,
    },
    /// A directory or control file could not be used.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Processes did not leave.
    #[error("process {pid} is still in the cgroup {directory}, {} s after it was killed", EXIT_TIMEOUT.as_secs())]
    Busy {
        /// The directory.
        directory: PathBuf,
        /// The first of them.
        pid: i32,
    },
    /// Freezing or thawing failed.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// There is no freezer.
    #[error("the cgroup {path} has no freezer, in cgroup v1 or v2")]
    NoFreezer {
        /// The container's cgroup.
        path: PathBuf,
    },
}

type Result<T> = std::result::Result<T, CgroupError>;

/// The cgroup of one container, in all the hierarchies it has a part in.
#[derive(Clone, Debug)]
pub struct ContainerCgroup {
    /// The path within each hierarchy; what libcgroups is given.
    path: PathBuf,
    /// Whether systemd makes the cgroup, and `path` is its slice:prefix:name.
    systemd: bool,
    /// The container's name, of which systemd makes the unit's.
    container: String,
    /// The directory per controller; the name is empty for cgroup2.
    directories: BTreeMap<String, PathBuf>,
}

/// Hierarchies of v1 without a controller (`name=systemd`), with their mount points, from /proc/self/mountinfo. Containers of
/// runc see their cgroup in these too.
fn named_hierarchies(mountinfo: &str) -> impl Iterator<Item = (String, PathBuf)> + '_ {
    mountinfo.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mount_point = Path::new(mount.split(' ').nth(4)?);
        let options = file_system.strip_prefix("cgroup ")?.rsplit(' ').next()?;
        let name = options.split(',').find(|option| option.starts_with("name="))?;
        (mount_point.parent() == Some(Path::new(DEFAULT_CGROUP_ROOT)))
            .then(|| (name.to_owned(), mount_point.to_owned()))
    })
}

impl ContainerCgroup {
    /// The cgroup that a bundle asks for: its `cgroupsPath`, or `/ferry-ID`, which has no parent that two containers would
    /// have to agree on removing.
    ///
    /// # Errors
    /// When the path leads upwards, or the host's cgroups cannot be read.
    pub fn of_spec(spec: &Spec, container: &str, systemd: bool) -> Result<Self> {
        let asked = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
        let path = match asked {
            None => PathBuf::from(format!("/ferry-{container}")),
            Some(path) if systemd => unit_path(&path, is_unified()?)?,
            Some(path) => absolute(&path)?,
        };
        Self::at(path, container, systemd)
    }

    /// The cgroup at a path that `path` gave.
    ///
    /// # Errors
    /// When the host's cgroups cannot be read.
    pub fn at(path: PathBuf, container: &str, systemd: bool) -> Result<Self> {
        let mut directories = BTreeMap::new();
        // A unit of systemd has no directory before systemd makes it; `of_running` finds it then.
        if let Ok(below) = path.strip_prefix("/") {
            if is_unified()? {
                directories.insert(String::new(), Path::new(DEFAULT_CGROUP_ROOT).join(below));
            } else {
                for (controller, mount_point) in list_supported_mount_points()? {
                    directories.insert(controller.to_string(), mount_point.join(below));
                }
                let mounts = Path::new("/proc/self/mountinfo");
                let text = fs::read_to_string(mounts).map_err(|source| io_error("read", mounts, source))?;
                directories.extend(named_hierarchies(&text).map(|(name, mount_point)| (name, mount_point.join(below))));
            }
        }
        Ok(Self { path, systemd, container: container.to_owned(), directories })
    }

    /// The cgroup of a unit of systemd, on a host with cgroup2 alone, found through a process in it.
    ///
    /// # Errors
    /// When the host's cgroups cannot be read. A process that is gone leaves the directory unknown.
    pub fn of_unit(path: PathBuf, container: &str, pid: i32) -> Result<Self> {
        let mut cgroup = Self::at(path, container, true)?;
        if let Ok(set) = Hierarchies::detect()?.of_task(pid)
            && let Some(membership) = set.unified()
        {
            cgroup.directories.insert(String::new(), membership.cgroup()?.directory().to_owned());
        }
        Ok(cgroup)
    }

    /// The cgroup of a container whose directories another runtime has written down.
    pub fn with_directories(path: PathBuf, container: &str, directories: BTreeMap<String, PathBuf>) -> Self {
        Self { path, systemd: false, container: container.to_owned(), directories }
    }

    /// The path within each hierarchy, as the bundle's `cgroupsPath` would give it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory per v1 controller (`memory`, `freezer` …), or the one of cgroup2 under the empty name. They
    /// need not exist.
    pub fn directories(&self) -> &BTreeMap<String, PathBuf> {
        &self.directories
    }

    /// How its cgroups are saved, or restored as this container's: `mode` says what becomes of those that it has below its own,
    /// and of properties.
    ///
    /// # Errors
    /// When the hierarchies cannot be read.
    pub fn options(&self, mode: Option<CgroupsMode>) -> Result<CgroupOptions> {
        let hierarchies = Hierarchies::detect()?;
        let root = |(controller, directory): (&String, &PathBuf)| {
            let (_, cgroup) = hierarchies.at_directory(directory)?;
            Some((Some(controller.clone()), cgroup.path().to_owned()))
        };
        let mode = match mode {
            None | Some(CgroupsMode::Soft) => Mode::Soft,
            Some(CgroupsMode::Full) => Mode::Full,
            Some(CgroupsMode::Strict) => Mode::Strict,
            Some(CgroupsMode::Ignore) => Mode::Ignore,
        };
        let roots = self.directories.iter().filter_map(root).collect();
        Ok(CgroupOptions { mode, roots, confined: true, ..CgroupOptions::default() })
    }

    /// What libcontainer needs to know to put a process in.
    pub fn config(&self) -> CgroupConfig {
        CgroupConfig {
            cgroup_path: self.path.clone(),
            systemd_cgroup: self.systemd,
            container_name: self.container.clone(),
        }
    }

    /// libcgroups' view of it.
    ///
    /// # Errors
    /// When the library cannot use the path.
    pub fn manager(&self) -> Result<AnyCgroupManager> {
        libcgroups::common::create_cgroup_manager(self.config())
            .map_err(|source| CgroupError::Manager { path: self.path.clone(), source: Box::new(source) })
    }

    /// Makes the directories, with the limits of `resources`, before any process is in them: for a restore, whose
    /// tasks come into being under their limits.
    ///
    /// # Errors
    /// When a directory cannot be made, or the kernel does not accept a limit.
    pub fn create(&self, resources: Option<&LinuxResources>) -> Result<()> {
        for (controller, directory) in &self.directories {
            fs::create_dir_all(directory).map_err(|source| io_error("create", directory, source))?;
            match controller.as_str() {
                "" => enable_controllers(directory)?,
                "cpuset" => inherit_cpuset(directory)?,
                _ => {}
            }
        }
        match resources {
            Some(resources) => self.apply(resources),
            None => Ok(()),
        }
    }

    /// Sets limits; what `resources` leaves out stays.
    ///
    /// # Errors
    /// What the kernel does not accept.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        let wish = ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
        self.manager()?.apply(&wish).map_err(|source| self.apply_error("set the limits of", source))
    }

    /// Puts a process into it, in every hierarchy; directories that are missing are made.
    ///
    /// # Errors
    /// When the process is gone, or a limit forbids it.
    pub fn add(&self, pid: i32) -> Result<()> {
        let action = format!("add process {pid} to");
        self.manager()?.add_task(Pid::from_raw(pid)).map_err(|source| self.apply_error(&action, source))
    }

    fn apply_error(&self, action: &str, source: libcgroups::common::AnyManagerError) -> CgroupError {
        CgroupError::Apply { action: action.to_owned(), path: self.path.clone(), source: Box::new(source) }
    }

    /// Makes sure that nobody is in it, and tells which of the directories above it do not exist yet: those are the
    /// ones that `remove` takes away with it.
    ///
    /// # Errors
    /// When a process is in it.
    pub fn claim(&self) -> Result<Vec<PathBuf>> {
        let mut missing = Vec::new();
        for cgroup in self.cgroups()? {
            if let Some(&pid) = processes(&cgroup)?.first() {
                return Err(CgroupError::InUse { directory: cgroup.directory().to_owned(), pid });
            }
            let above = cgroup.directory().ancestors().skip(1);
            missing.extend(above.take_while(|directory| !directory.exists()).map(Path::to_owned));
        }
        Ok(missing)
    }

    /// Every process in it and below it.
    ///
    /// # Errors
    /// When a list cannot be read.
    pub fn processes(&self) -> Result<BTreeSet<i32>> {
        let mut pids = BTreeSet::new();
        for cgroup in self.cgroups()? {
            pids.extend(processes(&cgroup)?);
        }
        Ok(pids)
    }

    /// The freezer; on v1 that of the freezer controller.
    ///
    /// # Errors
    /// When it has none, or does not exist.
    pub fn freezer(&self) -> Result<Freezer> {
        let directory = self.directories.get("freezer").or_else(|| self.directories.get(""));
        let directory = directory.ok_or_else(|| CgroupError::NoFreezer { path: self.path.clone() })?;
        Ok(Freezer::for_path(directory)?)
    }

    /// Whether its tasks are frozen, by whomever. A cgroup that does not exist is not.
    pub fn is_frozen(&self) -> bool {
        self.freezer().and_then(|freezer| Ok(freezer.state()?)).is_ok_and(|state| state != State::Thawed)
    }

    /// Freezes it, and leaves it so.
    ///
    /// # Errors
    /// When it does not freeze in time; it runs on then.
    pub fn freeze(&self) -> Result<()> {
        self.freezer()?.freeze(|_| true, FREEZE_TIMEOUT)?.keep();
        Ok(())
    }

    /// Thaws it, whoever froze it.
    ///
    /// # Errors
    /// When the freezer cannot be written.
    pub fn thaw(&self) -> Result<()> {
        Ok(self.freezer()?.thaw()?)
    }

    /// Kills every process in it, and waits until they are gone.
    ///
    /// # Errors
    /// When a process does not end in time.
    pub fn kill(&self) -> Result<()> {
        let deadline = Instant::now() + EXIT_TIMEOUT;
        loop {
            let pids = self.processes()?;
            let Some(&first) = pids.first() else { return Ok(()) };
            for &pid in &pids {
                SignalNumber::KILL.send_if_alive(pid).map_err(|source| CgroupError::Io {
                    action: "kill a process of",
                    path: self.path.clone(),
                    source,
                })?;
            }
            // v1 lets a frozen task die only when it is thawed (Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst).
            if self.is_frozen() {
                self.thaw()?;
            }
            if Instant::now() > deadline {
                return Err(CgroupError::Busy { directory: self.path.clone(), pid: first });
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Removes it with what is below it, and those of `made` that are empty then: the directories above that `claim`
    /// found missing.
    ///
    /// # Errors
    /// When processes are in it, or the kernel refuses.
    pub fn remove(&self, made: &[PathBuf]) -> Result<()> {
        if self.systemd && is_unified()? {
            // The unit is systemd's, which also removes its directory.
            self.manager()?.remove().map_err(|source| self.apply_error("remove", source))?;
        }
        for cgroup in self.cgroups()? {
            for below in cgroup.subtree().map_err(|source| io_error("list", cgroup.directory(), source))?.iter().rev() {
                remove_directory(below.directory())?;
            }
        }
        // Deepest first. Another container may have come to live there meanwhile, which is no failure.
        let mut made: Vec<&PathBuf> = made.iter().collect();
        made.sort_by_key(|directory| std::cmp::Reverse(directory.components().count()));
        for directory in made {
            let _ = fs::remove_dir(directory);
        }
        Ok(())
    }

    fn cgroups(&self) -> Result<Vec<Cgroup>> {
        let hierarchies = Hierarchies::detect()?;
        Ok(self.directories.values().filter_map(|directory| Some(hierarchies.at_directory(directory)?.1)).collect())
    }
}

/// Gives `directory` of cgroup2 every controller that its parents can pass on (cgroups(7), `cgroup.subtree_control`).
fn enable_controllers(directory: &Path) -> Result<()> {
    let root = Path::new(DEFAULT_CGROUP_ROOT);
    let mut above: Vec<&Path> = directory.ancestors().skip(1).take_while(|above| above.starts_with(root)).collect();
    above.reverse();
    for parent in above {
        let file = parent.join("cgroup.controllers");
        let controllers = fs::read_to_string(&file).map_err(|source| io_error("read", &file, source))?;
        for controller in controllers.split_ascii_whitespace() {
            // A controller that the parent cannot pass on has no limit set below, or `apply` says which it was.
            let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    Ok(())
}

/// A new v1 cpuset has no CPUs and no memory nodes, and takes no tasks until it has (cpuset(7)): give it its parent's.
fn inherit_cpuset(directory: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let read = |path: &Path| fs::read_to_string(path).map_err(|source| io_error("read", path, source));
        let mut chain: Vec<&Path> = directory.ancestors().take_while(|above| above.join(file).exists()).collect();
        chain.reverse();
        for pair in chain.windows(2) {
            let (parent, child) = (pair[0].join(file), pair[1].join(file));
            if read(&child)?.trim().is_empty() {
                let value = read(&parent)?;
                fs::write(&child, value.trim()).map_err(|source| io_error("write", &child, source))?;
            }
        }
    }
    Ok(())
}

/// Whether cgroup2 alone is mounted at `/sys/fs/cgroup`; the condition on which libcgroups uses it.
fn is_unified() -> Result<bool> {
    Ok(matches!(libcgroups::common::get_cgroup_setup()?, CgroupSetup::Unified))
}

/// A path from the root of the hierarchies, as the runtime specification allows to read a relative one.
fn absolute(path: &Path) -> Result<PathBuf> {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                return Err(CgroupError::BadPath { path: path.to_owned(), reason: "it contains .." });
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if clean == Path::new("/") {
        return Err(CgroupError::BadPath { path: path.to_owned(), reason: "it is the root of all cgroups" });
    }
    Ok(clean)
}

/// systemd's `slice:prefix:name`. Where systemd does not manage the hierarchies (v1), the directories are named as it
/// would name them.
fn unit_path(path: &Path, unified: bool) -> Result<PathBuf> {
    let text = path.to_string_lossy();
    let parts: Vec<&str> = text.split(':').collect();
    let &[slice, prefix, name] = parts.as_slice() else {
        return Err(CgroupError::BadPath { path: path.to_owned(), reason: "systemd needs the form slice:prefix:name" });
    };
    if unified {
        return Ok(path.to_owned());
    }
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    absolute(&Path::new(slice).join(format!("{prefix}-{name}.scope")))
}

fn processes(cgroup: &Cgroup) -> Result<BTreeSet<i32>> {
    cgroup.processes().map_err(|source| io_error("list the processes of", cgroup.directory(), source))
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::Io { action, path: path.to_owned(), source }
}

/// rmdir(2) of a cgroup whose last task has just been reaped can still say EBUSY for a moment.
fn remove_directory(directory: &Path) -> Result<()> {
    let deadline = Instant::now() + EXIT_TIMEOUT;
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(source) => return Err(io_error("remove the cgroup", directory, source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_without_controller_have_names() {
        let mountinfo = "30 25 0:26 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,name=systemd\n\
                         31 25 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                         32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                         33 25 0:29 / /tmp/test/x rw - cgroup none rw,name=x\n";
        let all: Vec<_> = named_hierarchies(mountinfo).collect();
        assert_eq!(all, [("name=systemd".to_owned(), PathBuf::from("/sys/fs/cgroup/systemd"))]);
    }

    #[test]
    fn paths_stay_below_the_root() {
        assert_eq!(absolute(Path::new("a//b/./c")).unwrap(), Path::new("/a/b/c"));
        assert_eq!(absolute(Path::new("/a")).unwrap(), Path::new("/a"));
        assert!(absolute(Path::new("/a/../b")).is_err());
        assert!(absolute(Path::new("/")).is_err());
    }

    #[test]
    fn units_become_directories_where_systemd_does_not_rule() {
        let unit = Path::new("user.slice:libpod:1234");
        assert_eq!(unit_path(unit, false).unwrap(), Path::new("/user.slice/libpod-1234.scope"));
        assert_eq!(unit_path(unit, true).unwrap(), unit);
        assert!(unit_path(Path::new("/plain"), false).is_err());
    }
}
