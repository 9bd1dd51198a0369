//! A test's own folder, and the question whether anything is left of a test elsewhere.

use crate::processes;
use crate::{Outcome, container};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A folder that nobody else uses, removed at the end of the test. Its name, which containers and cgroups of the test carry,
/// is found nowhere else on the machine.
pub struct Place {
    name: String,
    path: PathBuf,
}

impl Place {
    /// Makes the folder, and makes this process the one that orphans below it come to.
    pub fn new() -> Outcome<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        processes::adopt_orphans()?;
        let name = format!("ferry-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(&name);
        let _ = std::fs::remove_dir_all(&path);
        let place = Self { name, path };
        place.folder("")?;
        place.folder("tmp")?;
        Ok(place)
    }

    /// Gives this thread, and whatever it starts, pseudoterminals of its own: a restore needs the numbers that a dump had, which
    /// tests that run at the same time must not take.
    pub fn own_terminals(&self) -> Outcome {
        use nix::mount::{MsFlags, mount};
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: nix::Error| format!("cannot {what}: {error}")
        };
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(failed("have mounts of its own"))?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(failed("make mounts private"))?;
        let options = Some("newinstance,ptmxmode=0666,mode=0620");
        mount(Some("devpts"), "/dev/pts", Some("devpts"), MsFlags::empty(), options).map_err(failed("mount a devpts"))
    }

    /// The name that makes everything of this test known.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.path.clone() } else { self.path.join(name) }
    }

    /// Makes a folder in the folder that every user may write to (workloads change their user).
    pub fn folder(&self, name: &str) -> Outcome<PathBuf> {
        let path = self.path(name);
        let made = std::fs::create_dir_all(&path);
        made.and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(path)
    }

    /// The folder that the programs under test are given for temporary files.
    pub fn temporary(&self) -> PathBuf {
        self.path("tmp")
    }

    /// Fails if anything of this test is left: processes, mounts, cgroups, temporary files.
    pub fn nothing_left(&self) -> Outcome {
        processes::wait_for("the test's processes to end", || {
            processes::reap();
            processes::below().is_empty()
        })
        .map_err(|error| format!("{error}: {}", processes::describe(&processes::below())))?;
        let left = [self.mounts(), self.cgroups(), files(&self.temporary()), self.elsewhere()].concat();
        if left.is_empty() { Ok(()) } else { Err(format!("left behind: {}", left.join(", "))) }
    }

    /// Mounts of this mount namespace that carry the test's name.
    fn mounts(&self) -> Vec<String> {
        let all = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let of_test = |point: &&str| point.contains(&self.name);
        all.lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(of_test)
            .map(|point| format!("mount {point}"))
            .collect()
    }

    /// Folders of any cgroup hierarchy that carry the test's name.
    pub(crate) fn cgroups(&self) -> Vec<String> {
        let folders = |path: &Path| {
            let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
            entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path())
                .collect::<Vec<_>>()
        };
        let mut open = vec![PathBuf::from("/sys/fs/cgroup")];
        let mut found = Vec::new();
        while let Some(path) = open.pop() {
            for folder in folders(&path) {
                if folder.to_string_lossy().contains(&self.name) {
                    found.push(format!("cgroup {}", folder.display()));
                }
                open.push(folder);
            }
        }
        found
    }

    /// Entries that carry the test's name in the folders where programs leave things.
    fn elsewhere(&self) -> Vec<String> {
        let named = |path: &String| path.contains(&self.name) && *path != self.path.to_string_lossy();
        ["/tmp", "/run", "/dev/shm", "/var/tmp", "/run/ferry", "/run/runc", "/run/youki"]
            .into_iter()
            .flat_map(|folder| files(Path::new(folder)))
            .filter(named)
            .collect()
    }
}

/// The paths of a folder's entries.
fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().to_string_lossy().into_owned()).collect()
}

impl Drop for Place {
    /// Ends what a failed test left, then removes its cgroups, mounts and files.
    fn drop(&mut self) {
        processes::end_all_below();
        for _ in 0..4 {
            for mount in self.mounts() {
                let point = mount.trim_start_matches("mount ");
                let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
            }
            for cgroup in self.cgroups().iter().rev() {
                let _ = std::fs::remove_dir(cgroup.trim_start_matches("cgroup "));
            }
        }
        if std::thread::panicking() || std::env::var_os(container::KEEP).is_some() {
            return;
        }
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
