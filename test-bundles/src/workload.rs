//! A workload program from outside: started on the host, asked for its verdict, dumped and restored.

use crate::processes::{self, wait_for};
use crate::{Engine, Outcome, Place, programs};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A workload's name, and why this machine cannot run it if so.
pub struct Listed {
    /// The name.
    pub name: String,
    /// What this machine lacks.
    pub missing: Option<String>,
}

/// Every workload, as the program itself lists them.
pub fn list() -> Outcome<Vec<Listed>> {
    let lines = programs::succeed(Command::new(programs::workload()?).arg("--list"))?;
    let listed = |line: &str| match line.split_once('\t') {
        None => Listed { name: line.to_owned(), missing: None },
        Some((name, missing)) => Listed { name: name.to_owned(), missing: Some(missing.to_owned()) },
    };
    Ok(lines.lines().map(listed).collect())
}

/// The folder through which a workload, wherever it runs, talks with its test.
pub struct Talk {
    dir: PathBuf,
}

impl Talk {
    /// Talks through this folder.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Waits until the workload is ready; returns its pid as it sees it.
    pub fn await_ready(&self) -> Outcome<i32> {
        let (ready, verdict) = (self.dir.join("ready"), self.dir.join("verdict"));
        // A script makes the file before it writes to it.
        let written = || std::fs::metadata(&ready).is_ok_and(|ready| ready.len() > 0);
        wait_for("the workload to be ready", || written() || verdict.exists())?;
        match std::fs::read_to_string(&ready) {
            Ok(pid) => pid.trim().parse().map_err(|_| format!("the workload wrote an odd pid: {pid}")),
            Err(_) => Err(format!("the workload did not start: {}", read(&verdict)?)),
        }
    }

    /// Has the workload look at itself.
    pub fn ask(&self) -> Outcome {
        let asked = self.dir.join("check");
        std::fs::write(&asked, "").map_err(|error| format!("{}: {error}", asked.display()))?;
        wait_for("the workload's verdict", || !asked.exists())?;
        let verdict = read(&self.dir.join("verdict"))?;
        if verdict == "ok" { Ok(()) } else { Err(format!("from inside: {verdict}")) }
    }
}

fn read(path: &Path) -> Outcome<String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// A workload that runs on the host.
pub struct Workload<'place> {
    place: &'place Place,
    talk: Talk,
    /// The pid of its root process.
    pub pid: i32,
    rounds: u32,
}

impl<'place> Workload<'place> {
    /// Starts it, in a session of its own and with /dev/null for input and output.
    pub fn start(place: &'place Place, name: &str) -> Outcome<Self> {
        let dir = place.folder("work")?;
        // Of one that was there before, and of its children.
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if ["ready", "verdict", "check"].iter().any(|kind| name.rsplit('.').next() == Some(kind)) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        if name.starts_with("terminal") {
            place.own_terminals()?;
        }
        let mut command = Command::new(programs::workload()?);
        command.arg(name).arg(&dir);
        Self::spawned(place, dir, command, |_| Ok(()))
    }

    /// Starts a shell, pre-dumps it, and has it become the workload.
    pub fn start_late(place: &'place Place, name: &str, engine: &Engine) -> Outcome<Self> {
        let (dir, images) = (place.folder("work")?, place.folder("images-1")?);
        let mut command = Command::new("setsid");
        let script = "while [ ! -e \"$2/go\" ]; do sleep 0.05; done; exec \"$0\" \"$1\" \"$2\"";
        command.args(["sh", "-c", script]).arg(programs::workload()?).arg(name).arg(&dir);
        let go = dir.join("go");
        let started = Self::spawned(place, dir, command, |pid| {
            processes::wait_for("the shell to wait", || processes::tree(pid).len() > 1)?;
            engine.pre_dump(place, pid, &images, &[])?;
            std::fs::write(&go, "").map_err(|error| format!("{}: {error}", go.display()))
        })?;
        Ok(Self { rounds: 1, ..started })
    }

    fn spawned(
        place: &'place Place,
        dir: PathBuf,
        mut command: Command,
        meanwhile: impl FnOnce(i32) -> Outcome,
    ) -> Outcome<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(|error| format!("cannot start the workload: {error}"))?;
        let talk = Talk::new(dir);
        meanwhile(child.id() as i32)?;
        let pid = talk.await_ready()?;
        if pid.unsigned_abs() != child.id() {
            return Err(format!("the workload is {pid}, started as {}", child.id()));
        }
        Ok(Self { place, talk, pid, rounds: 0 })
    }

    /// Has it look at itself.
    pub fn ask(&self) -> Outcome {
        self.talk.ask()
    }

    /// A new folder for images.
    pub fn images(&mut self) -> Outcome<PathBuf> {
        self.rounds += 1;
        self.place.folder(&format!("images-{}", self.rounds))
    }

    /// Dumps it, sees that it has gone, restores it, and has it look at itself.
    pub fn round_trip(&mut self, engine: &Engine) -> Outcome {
        let (images, tree) = (self.images()?, processes::tree(self.pid));
        engine.dump(self.place, self.pid, &images, &[]).map_err(|error| format!("dump: {error}"))?;
        processes::await_end(&tree).map_err(|error| format!("after the dump: {error}"))?;
        engine.restore(self.place, &images, &[]).map_err(|error| format!("restore: {error}"))?;
        self.ask().map_err(|error| format!("after the restore: {error}"))
    }

    /// Dumps it while it runs on, and has it look at itself.
    pub fn dump_running(&mut self, engine: &Engine) -> Outcome {
        let (images, tree) = (self.images()?, processes::tree(self.pid));
        engine.dump(self.place, self.pid, &images, &["--leave-running"]).map_err(|error| format!("dump: {error}"))?;
        let now = processes::tree(self.pid);
        if now != tree {
            return Err(format!("the tree is {now:?} after the dump, was {tree:?}"));
        }
        self.ask().map_err(|error| format!("after the dump: {error}"))
    }

    /// Saves its memory while it runs on, on top of the pre-dump before this one if there was one, and has it look at itself, which
    /// may change it.
    pub fn pre_dump(&mut self, engine: &Engine) -> Outcome {
        let previous = self.previous();
        let images = self.images()?;
        let tree = processes::tree(self.pid);
        let options: Vec<&str> = previous.iter().flat_map(|path| ["--prev-images-dir", path]).collect();
        engine.pre_dump(self.place, self.pid, &images, &options).map_err(|error| format!("pre-dump: {error}"))?;
        let now = processes::tree(self.pid);
        if now != tree {
            return Err(format!("the tree is {now:?} after the pre-dump, was {tree:?}"));
        }
        self.ask().map_err(|error| format!("after the pre-dump: {error}"))
    }

    /// As [`Self::round_trip`], on top of the last pre-dump or dump; `restorer` may be another engine.
    pub fn incremental_round_trip(&mut self, dumper: &Engine, restorer: &Engine) -> Outcome {
        let previous = self.previous().ok_or("there was no dump before")?;
        let (images, tree) = (self.images()?, processes::tree(self.pid));
        let options = ["--track-mem", "--prev-images-dir", &previous];
        dumper.dump(self.place, self.pid, &images, &options).map_err(|error| format!("dump: {error}"))?;
        processes::await_end(&tree).map_err(|error| format!("after the dump: {error}"))?;
        restorer.restore(self.place, &images, &[]).map_err(|error| format!("restore: {error}"))?;
        self.ask().map_err(|error| format!("after the restore: {error}"))
    }

    /// The last images, as a folder beside them names them.
    fn previous(&self) -> Option<String> {
        (self.rounds > 0).then(|| format!("../images-{}", self.rounds))
    }

    /// Ends it and sees that nothing is left of it.
    pub fn end(self) -> Outcome {
        processes::end_all_below();
        self.place.nothing_left()
    }
}
