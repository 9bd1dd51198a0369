//! One cgroup directory: its control files, its children and the tasks in it.
//!
//! Kernel facts (cgroups(7), Documentation/admin-guide/cgroup-v2.rst): a v1 cgroup lists its threads in `tasks`, a v2
//! one in `cgroup.threads`; both list processes in `cgroup.procs`, except that reading it in a threaded v2 cgroup fails
//! with `EOPNOTSUPP`. A task outside the reader's pid namespace is listed as 0. The lists are unsorted, may hold a task
//! twice and are not a snapshot. Subdirectories of a cgroup are cgroups, and nothing else is a directory.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::hierarchy::Version;

/// A cgroup of one hierarchy; it need not exist (any more).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cgroup {
    version: Version,
    directory: PathBuf,
    path: String,
}

impl Cgroup {
    pub(crate) fn new(version: Version, directory: PathBuf, path: String) -> Cgroup {
        Cgroup { version, directory, path }
    }

    /// The design of its hierarchy.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Its directory in the file system.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its path within the hierarchy, as in `/proc/PID/cgroup`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether the directory exists.
    pub fn exists(&self) -> bool {
        self.directory.join("cgroup.procs").exists()
    }

    /// The cgroup above, `None` at the root (of what the cgroup namespace shows).
    pub fn parent(&self) -> Option<Cgroup> {
        let (above, name) = self.path.rsplit_once('/')?;
        if name.is_empty() {
            return None;
        }
        let directory = self.directory.parent()?;
        // The mount may show less than the namespace does: above its top there is no cgroup directory.
        directory.join("cgroup.procs").exists().then(|| {
            let path = if above.is_empty() { "/" } else { above };
            Cgroup::new(self.version, directory.to_owned(), path.to_owned())
        })
    }

    /// The cgroup `name` directly below.
    pub fn child(&self, name: &str) -> Cgroup {
        let path = if self.path == "/" { format!("/{name}") } else { format!("{}/{name}", self.path) };
        Cgroup::new(self.version, self.directory.join(name), path)
    }

    /// The cgroups directly below, sorted by name. None when the directory is gone.
    ///
    /// # Errors
    /// The kernel's answer; a name that is no UTF-8 is `InvalidData`.
    pub fn children(&self) -> io::Result<Vec<Cgroup>> {
        let names = self.entries(fs::FileType::is_dir)?;
        let mut children: Vec<Cgroup> = names.iter().map(|name| self.child(name)).collect();
        children.sort();
        Ok(children)
    }

    /// The names of its control files. None when the directory is gone.
    ///
    /// # Errors
    /// As [`Cgroup::children`].
    pub fn files(&self) -> io::Result<Vec<String>> {
        self.entries(fs::FileType::is_file)
    }

    fn entries(&self, chosen: impl Fn(&fs::FileType) -> bool) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if chosen(&entry.file_type()?) {
                names.push(entry.file_name().into_string().map_err(|_| io::ErrorKind::InvalidData)?);
            }
        }
        Ok(names)
    }

    /// This cgroup and all below it, parents before children.
    ///
    /// # Errors
    /// As [`Cgroup::children`].
    pub fn subtree(&self) -> io::Result<Vec<Cgroup>> {
        let mut all = vec![self.clone()];
        let mut next = 0;
        while next < all.len() {
            let children = all[next].children()?;
            all.extend(children);
            next += 1;
        }
        Ok(all)
    }

    /// Reads a control file, without the newline at its end.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn read(&self, file: &str) -> io::Result<String> {
        let mut text = fs::read_to_string(self.directory.join(file))?;
        text.truncate(text.trim_end_matches('\n').len());
        Ok(text)
    }

    /// Writes a control file with a single write(2), as the kernel wants it.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn write(&self, file: &str, value: &str) -> io::Result<()> {
        use std::io::Write;
        fs::OpenOptions::new().write(true).open(self.directory.join(file))?.write_all(value.as_bytes())
    }

    /// Threads of this cgroup alone. Empty when it is gone.
    ///
    /// # Errors
    /// The kernel's answer; a task that this pid namespace does not see is `InvalidData`.
    pub fn own_tasks(&self) -> io::Result<BTreeSet<i32>> {
        let file = match self.version {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.threads",
        };
        self.pids(file)
    }

    /// Threads of this cgroup and of all below it.
    ///
    /// # Errors
    /// As [`Cgroup::own_tasks`].
    pub fn tasks(&self) -> io::Result<BTreeSet<i32>> {
        self.gather(Cgroup::own_tasks)
    }

    /// Processes with at least one thread in this cgroup or below it.
    ///
    /// # Errors
    /// As [`Cgroup::own_tasks`].
    pub fn processes(&self) -> io::Result<BTreeSet<i32>> {
        self.gather(|cgroup| match cgroup.pids("cgroup.procs") {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => {
                Ok(cgroup.own_tasks()?.into_iter().filter_map(process_of).collect())
            }
            processes => processes,
        })
    }

    fn gather(&self, list: impl Fn(&Cgroup) -> io::Result<BTreeSet<i32>>) -> io::Result<BTreeSet<i32>> {
        let mut all = BTreeSet::new();
        for cgroup in self.subtree()? {
            all.append(&mut list(&cgroup)?);
        }
        Ok(all)
    }

    fn pids(&self, file: &str) -> io::Result<BTreeSet<i32>> {
        let text = match self.read(file) {
            // Removed meanwhile: ENOENT at the open, ENODEV at the read.
            Err(error) if is_gone(&error) => return Ok(BTreeSet::new()),
            text => text?,
        };
        text.lines()
            .map(|line| match line.parse() {
                Ok(pid) if pid > 0 => Ok(pid),
                _ => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("it lists {line:?}: a task that cannot be seen from this pid namespace"),
                )),
            })
            .collect()
    }
}

/// Whether a control file could not be used because its cgroup was removed.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

/// The process that a thread belongs to, `None` when it is gone.
fn process_of(tid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}
