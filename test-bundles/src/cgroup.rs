//! Cgroups that a test makes on the host, of both designs, and freezes by hand.

use crate::{Outcome, Place, processes};
use std::path::{Path, PathBuf};

/// The two designs of freezers (cgroups(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Design {
    /// `freezer.state` of the freezer controller.
    V1,
    /// `cgroup.freeze` of the unified hierarchy.
    V2,
}

impl Design {
    /// Those that this machine has mounted, with the folder that shows the hierarchy.
    pub fn available() -> Vec<(Design, PathBuf)> {
        let all = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut found: Vec<(Design, PathBuf)> = Vec::new();
        for line in all.lines() {
            let (Some((mount, kind)), Some(point)) = (line.split_once(" - "), line.split(' ').nth(4)) else { continue };
            let whole = mount.split(' ').nth(3) == Some("/");
            let words: Vec<&str> = kind.split(' ').collect();
            let design = match words[..] {
                ["cgroup2", ..] => Design::V2,
                ["cgroup", _, options, ..] if options.split(',').any(|option| option == "freezer") => Design::V1,
                _ => continue,
            };
            if whole && found.iter().all(|(known, _)| *known != design) {
                found.push((design, PathBuf::from(point)));
            }
        }
        found
    }
}

/// A cgroup that carries the test's name; thawed when dropped, so that what is in it can end. The place removes it.
pub struct Cgroup {
    design: Design,
    directory: PathBuf,
}

impl Cgroup {
    /// Makes it at the top of the hierarchy at `root`.
    pub fn new(place: &Place, design: Design, root: &Path) -> Outcome<Self> {
        Self::make(design, root.join(place.name()))
    }

    /// Makes one below this.
    pub fn below(&self, name: &str) -> Outcome<Self> {
        Self::make(self.design, self.directory.join(name))
    }

    fn make(design: Design, directory: PathBuf) -> Outcome<Self> {
        std::fs::create_dir(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        Ok(Self { design, directory })
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn write(&self, file: &str, text: &str) -> Outcome {
        let path = self.directory.join(file);
        std::fs::write(&path, text).map_err(|error| format!("{text:?} into {}: {error}", path.display()))
    }

    /// Moves a process and all below it in, parents first, so that what is born meanwhile is born in it.
    pub fn enter(&self, root: i32) -> Outcome {
        for pid in processes::tree(root) {
            match self.write("cgroup.procs", &pid.to_string()) {
                Err(error) if !processes::is_gone(pid) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Freezes it as a person would, and waits for the kernel's word.
    pub fn freeze(&self) -> Outcome {
        let (file, text) = if self.design == Design::V1 { ("freezer.state", "FROZEN") } else { ("cgroup.freeze", "1") };
        self.write(file, text)?;
        processes::wait_for("the cgroup to be frozen", || self.is_frozen())
    }

    /// Thaws it.
    pub fn thaw(&self) -> Outcome {
        let (file, text) = if self.design == Design::V1 { ("freezer.state", "THAWED") } else { ("cgroup.freeze", "0") };
        self.write(file, text)
    }

    /// Ends every process that the test has started, and removes the cgroup with those below it.
    pub fn end(self) -> Outcome {
        processes::end_all_below();
        remove(&self.directory)
    }

    /// What the kernel says.
    pub fn is_frozen(&self) -> bool {
        let read = |file| std::fs::read_to_string(self.directory.join(file)).unwrap_or_default();
        match self.design {
            Design::V1 => read("freezer.state").trim() == "FROZEN",
            Design::V2 => read("cgroup.events").lines().any(|line| line == "frozen 1"),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // It may be removed already.
        let _ = self.thaw();
    }
}

/// Removes a cgroup and those below it; its tasks must have ended.
fn remove(directory: &Path) -> Outcome {
    let below = std::fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove(&entry.path())?;
    }
    let mut last = String::new();
    processes::wait_for("a cgroup to be empty", || {
        let removed = std::fs::remove_dir(directory).map_err(|error| last = error.to_string());
        removed.is_ok() || !directory.exists()
    })
    .map_err(|error| format!("{error}: {}: {last}", directory.display()))
}
