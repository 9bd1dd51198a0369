//! How a workload talks to the harness: files in one folder.
//!
//! The root process writes `ready` (its pid) when the object under test exists and has passed its own check once. Then it
//! waits until `check` appears, checks again from inside, puts the result into `verdict` (`ok` or `bad: what`) and removes
//! `check`, which says that the verdict is there. So it can be asked any number of times. Child processes have files
//! of their own (`NAME.check` …) and are asked by the root. Nothing else, no descriptor and no mapping, connects them, unless
//! the workload makes it: what a workload proves does not depend on objects it is not about.

use crate::sys::{Fault, Verdict, pause, sys, wait_for};
use std::path::{Path, PathBuf};

/// Looks at the object under test from inside; leaves it as it was found, so that it can look again.
pub type Check = Box<dyn FnMut() -> Verdict>;

/// One process's place in the folder.
#[derive(Clone)]
pub struct Room {
    dir: PathBuf,
    name: String,
}

impl Room {
    /// The root process's place.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), name: String::new() }
    }

    /// A path in the folder for the workload's own files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The same place as seen by a process whose root directory is the folder.
    pub fn at_root(&self) -> Self {
        Self { dir: PathBuf::from("/"), name: self.name.clone() }
    }

    fn mark(&self, kind: &str) -> PathBuf {
        if self.name.is_empty() { self.dir.join(kind) } else { self.dir.join(format!("{}.{kind}", self.name)) }
    }

    fn put(&self, kind: &str, content: &str) {
        let (file, temporary) = (self.mark(kind), self.mark(&format!("{kind}.new")));
        let written = std::fs::write(&temporary, content).and_then(|()| std::fs::rename(&temporary, &file));
        if written.is_err() {
            std::process::exit(3);
        }
    }

    /// Says that this process is ready, then answers checks for ever.
    pub fn serve(&self, setup: Result<Check, Fault>) -> ! {
        let mut check = match setup.and_then(|mut check| check().map(|()| check)) {
            Ok(check) => check,
            Err(fault) => {
                self.put("verdict", &format!("bad: before the dump: {fault}"));
                std::process::exit(1);
            }
        };
        // SAFETY: getpid has no arguments and cannot fail.
        self.put("ready", &unsafe { libc::getpid() }.to_string());
        let asked = self.mark("check");
        loop {
            if asked.exists() {
                match check() {
                    Ok(()) => self.put("verdict", "ok"),
                    Err(fault) => self.put("verdict", &format!("bad: {fault}")),
                }
                let _ = std::fs::remove_file(&asked);
            }
            pause();
        }
    }

    /// Asks the process of this place, and waits for its verdict.
    pub fn ask(&self) -> Verdict {
        let (asked, verdict) = (self.mark("check"), self.mark("verdict"));
        std::fs::write(&asked, "").map_err(|error| format!("{}: {error}", asked.display()))?;
        wait_for(&format!("the verdict of {}", self.name), || !asked.exists())?;
        match std::fs::read_to_string(&verdict) {
            Ok(answer) if answer == "ok" => Ok(()),
            Ok(answer) => Err(format!("{}: {answer}", self.name)),
            Err(error) => Err(format!("{}: {error}", verdict.display())),
        }
    }

    /// The pid that the process of this place gave when it was ready.
    fn pid(&self) -> Result<i32, Fault> {
        let (ready, verdict) = (self.mark("ready"), self.mark("verdict"));
        wait_for(&format!("{} to be ready", self.name), || ready.exists() || verdict.exists())?;
        if verdict.exists() {
            return Err(format!("{}: {}", self.name, std::fs::read_to_string(&verdict).unwrap_or_default()));
        }
        let text = std::fs::read_to_string(&ready).map_err(|error| error.to_string())?;
        text.parse().map_err(|_| format!("{}: odd pid {text}", self.name))
    }

    /// Starts a process that sets something up and answers checks under `name`; returns when it is ready.
    pub fn child(&self, name: &str, setup: impl FnOnce(&Room) -> Result<Check, Fault>) -> Result<Child, Fault> {
        self.family(name, |room| room.serve(setup(room)))
    }

    /// Starts a process that runs `body`, in which it, or a process it starts, serves under `name`.
    pub fn family(&self, name: &str, body: impl FnOnce(&Room)) -> Result<Child, Fault> {
        let room = Room { dir: self.dir.clone(), name: name.to_owned() };
        let forked = sys!(fork())? as i32;
        if forked == 0 {
            body(&room);
            std::process::exit(0);
        }
        let pid = room.pid()?;
        Ok(Child { pid, forked, room })
    }
}

/// A process that this one started.
pub struct Child {
    /// Its pid, as it told.
    pub pid: i32,
    /// The pid of the process that was forked for it: the same, unless that one only passed the work on.
    pub forked: i32,
    room: Room,
}

impl Child {
    /// Asks it for its verdict.
    pub fn ask(&self) -> Verdict {
        self.room.ask()
    }
}

/// A check that asks each of these children.
pub fn ask_all(children: Vec<Child>) -> Check {
    Box::new(move || children.iter().try_for_each(Child::ask))
}

/// Forks a process that runs `body` and exits with what it returns.
pub fn fork(body: impl FnOnce() -> i32) -> Result<i32, Fault> {
    let pid = sys!(fork())? as i32;
    if pid == 0 {
        std::process::exit(body());
    }
    Ok(pid)
}
