//! A process tree that nobody may harm: how it looks from outside, to be compared with how it looked before.

use crate::processes::{self, wait_for};
use crate::{Engine, Outcome, Place, Workload};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What /proc says of a tree, without what changes all the time. By file name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look(BTreeMap<String, String>);

/// Fields of /proc/PID/status that a program at rest keeps.
const FIELDS: [&str; 9] =
    ["Name", "TracerPid", "SigBlk", "SigIgn", "SigCgt", "Seccomp", "Seccomp_filters", "Threads", "NoNewPrivs"];

impl Look {
    /// Looks at the process and all below it.
    pub fn at(root: i32) -> Self {
        let mut found = BTreeMap::new();
        for pid in processes::tree(root) {
            let process = PathBuf::from(format!("/proc/{pid}"));
            // A descriptor that is read while threads run may be one that is just being opened by the program's own checks.
            for (name, content) in [
                ("maps", text(&process.join("maps"))),
                ("fd", links(&process.join("fd"))),
                ("timers", timers(&process)),
            ] {
                found.insert(format!("{pid}/{name}"), content);
            }
            for tid in names(&process.join("task")) {
                let task = process.join("task").join(&tid);
                found.insert(format!("{pid}/task/{tid}"), status(&task));
            }
        }
        Self(found)
    }

    /// What differs, for people.
    pub fn changes(&self, now: &Self) -> Vec<String> {
        let mut all: Vec<&String> = self.0.keys().chain(now.0.keys()).collect();
        all.sort();
        all.dedup();
        let differs = |name: &&&String| self.0.get(**name) != now.0.get(**name);
        all.iter()
            .filter(differs)
            .map(|name| format!("{name}: was {}, is {}", shown(self.0.get(*name)), shown(now.0.get(*name))))
            .collect()
    }
}

fn shown(content: Option<&String>) -> String {
    content.map_or_else(|| "not there".to_owned(), |content| format!("{content:?}"))
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn links(folder: &Path) -> String {
    let target = |name: &String| fs::read_link(folder.join(name)).unwrap_or_default().display().to_string();
    names(folder).iter().map(|name| format!("{name} -> {}\n", target(name))).collect()
}

/// /proc/PID/timers.
fn timers(process: &Path) -> String {
    text(&process.join("timers"))
}

/// The fields that stay, and whether the thread is in a stop.
fn status(task: &Path) -> String {
    let status = text(&task.join("status"));
    let field = |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
    let mut kept: Vec<String> = Vec::new();
    for (name, value) in status.lines().filter_map(field) {
        if FIELDS.contains(&name.as_str()) {
            kept.push(format!("{name}={value}"));
        } else if name == "State" {
            kept.push(format!("stopped={}", value.starts_with('T') || value.starts_with('t')));
        }
    }
    kept.join(" ")
}

/// A workload that survives whatever happens to those who dump it.
pub struct Victim<'place> {
    place: &'place Place,
    /// The workload.
    pub workload: Workload<'place>,
    before: Look,
}

impl<'place> Victim<'place> {
    /// Starts it.
    pub fn start(place: &'place Place, name: &str) -> Outcome<Self> {
        let workload = Workload::start(place, name)?;
        // What its first checks allocate is there from now on.
        workload.ask()?;
        workload.ask()?;
        let before = Look::at(workload.pid);
        Ok(Self { place, workload, before })
    }

    /// Fails unless it is as it was, from outside and from inside.
    pub fn unharmed(&mut self) -> Outcome {
        let mut changes = Vec::new();
        // A moment's difference is the program's own work: it opens files for its checks.
        let same = wait_for("the tree to look as before", || {
            changes = self.before.changes(&Look::at(self.workload.pid));
            changes.is_empty()
        });
        same.map_err(|error| format!("{error}: {}", changes.join("\n")))?;
        self.workload.ask()
    }

    /// Dumps it, restores it, and goes on with what was restored.
    pub fn round_trip(&mut self, engine: &Engine) -> Outcome {
        self.workload.round_trip(engine)?;
        self.restored()
    }

    /// It has been restored: what it looks like now is what it is to look like.
    pub fn restored(&mut self) -> Outcome {
        self.workload.ask()?;
        self.before = Look::at(self.workload.pid);
        Ok(())
    }

    /// Waits until no process below the test's is anything but the victim: whoever dumped it is gone.
    pub fn alone(&self) -> Outcome {
        self.others_gone(&processes::tree(self.workload.pid))
    }

    /// The same, of a victim that may be gone too.
    pub fn others_gone(&self, tree: &[i32]) -> Outcome {
        let others = || {
            processes::reap();
            processes::below().into_iter().filter(|pid| !tree.contains(pid)).collect::<Vec<_>>()
        };
        wait_for("ferry's processes to end", || others().is_empty())
            .map_err(|error| format!("{error}: {}", processes::describe(&others())))
    }

    /// Ends it; nothing may be left.
    pub fn end(self) -> Outcome {
        self.workload.end()
    }

    /// A new and empty folder for images.
    pub fn images(&mut self) -> Outcome<PathBuf> {
        self.workload.images()
    }

    /// The test's folder.
    pub fn place(&self) -> &'place Place {
        self.place
    }
}
