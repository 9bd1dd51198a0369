//! A restore is all or nothing: whatever makes it fail, everything around is as it was before, and a restore from the same
//! images succeeds when nothing is in its way.

use ferry_test_bundles::workload::Talk;
use ferry_test_bundles::{
    Bundle, Container, Engine, Outcome, Place, Surroundings, Workload, processes, programs, surroundings, torture,
};
use libtest_mimic::{Arguments, Trial};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What of this program is tested.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Face {
    /// `ferry criu restore` of a tree of the host.
    Host,
    /// `ferry restore` of a container.
    Container,
}

/// A workload that has been saved and is gone, what restores it, and what is around.
struct Saved<'place> {
    place: &'place Place,
    face: Face,
    talk: Talk,
    images: PathBuf,
    /// What it was, parents first.
    pids: Vec<i32>,
    before: Surroundings,
}

impl<'place> Saved<'place> {
    fn new(place: &'place Place, face: Face, name: &str) -> Outcome<Self> {
        match face {
            Face::Host => Self::of_host(place, name),
            Face::Container => Self::of_container(place, name),
        }
    }

    fn of_host(place: &'place Place, name: &str) -> Outcome<Self> {
        let mut workload = Workload::start(place, name)?;
        workload.ask()?;
        let (images, pids) = (workload.images()?, processes::tree(workload.pid));
        Engine::ferry()?.dump(place, workload.pid, &images, &[])?;
        Self::gone(place, Face::Host, images, pids)
    }

    fn of_container(place: &'place Place, name: &str) -> Outcome<Self> {
        let (bundle, talk) = Bundle::of_workload(place, name)?;
        let container = Container::run(place, &bundle)?;
        talk.await_ready()?;
        talk.ask()?;
        let (images, pids) = (place.folder("images-1")?, processes::tree(container.pid()?));
        container.checkpoint(&["--image-path", &images.to_string_lossy()])?;
        drop(container);
        Self::gone(place, Face::Container, images, pids)
    }

    fn gone(place: &'place Place, face: Face, images: PathBuf, pids: Vec<i32>) -> Outcome<Self> {
        processes::await_end(&pids)?;
        processes::wait_for("everything below the test to end", || {
            processes::reap();
            processes::below().is_empty()
        })?;
        let before = Surroundings::look(place);
        Ok(Self { place, face, talk: Talk::new(place.path("work")), images, pids, before })
    }

    fn pid_file(&self) -> PathBuf {
        self.place.path("root.pid")
    }

    /// The restore, with further options.
    fn command(&self, options: &[&str]) -> Outcome<Command> {
        let mut command = Command::new(programs::ferry()?);
        match self.face {
            Face::Host => {
                command.args(["criu", "restore", "-d", "-o", "restore.log", "-v4", "--pidfile"]);
                command.arg(self.pid_file()).arg("-D").arg(&self.images).args(options);
            }
            Face::Container => {
                command.arg("--root").arg(self.place.path("state")).arg("--log").arg(self.place.path("runtime.log"));
                command.args(["restore", "--detach", "--pid-file"]).arg(self.pid_file());
                command.arg("--bundle").arg(self.place.path("bundle")).arg("--image-path").arg(&self.images);
                command.args(options).arg(self.place.name());
            }
        }
        command.env("TMPDIR", self.place.temporary());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(command)
    }

    /// What the last restore had to say.
    fn said(&self) -> String {
        let log = match self.face {
            Face::Host => self.images.join("restore.log"),
            Face::Container => self.place.path("runtime.log"),
        };
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    fn restore(&self, options: &[&str]) -> Outcome<ExitStatus> {
        let mut command = self.command(options)?;
        command.status().map_err(|error| format!("{}: {error}", programs::shown(&command)))
    }

    /// Waits until everything is as it was before.
    fn nothing_left(&self) -> Outcome {
        self.before.await_again(self.place)
    }

    /// A restore that fails, saying these words, and leaves nothing.
    fn fails(&self, options: &[&str], words: &[&str]) -> Outcome {
        let status = self.restore(options)?;
        if status.code() != Some(1) {
            return Err(format!("the restore ended with {status}, not with a failure: {}", self.said()));
        }
        let said = self.said();
        if let Some(word) = words.iter().find(|word| !said.contains(**word)) {
            return Err(format!("the restore did not say {word:?}: {said}"));
        }
        self.nothing_left()
    }

    /// A restore that succeeds; the tree is right from inside. Then it is ended, and nothing is left.
    fn succeeds(&self) -> Outcome {
        let status = self.restore(&[])?;
        if !status.success() {
            return Err(format!("the restore ended with {status}: {}", self.said()));
        }
        self.talk.ask()?;
        self.end()
    }

    /// Ends the restored tree.
    fn end(&self) -> Outcome {
        let pid = std::fs::read_to_string(self.pid_file()).map_err(|error| format!("the pid file: {error}"))?;
        let tree = processes::tree(pid.trim().parse().map_err(|_| format!("odd pid file {pid}"))?);
        processes::end_all_below();
        processes::await_end(&tree)?;
        std::fs::remove_file(self.pid_file()).map_err(|error| format!("the pid file: {error}"))?;
        if self.face == Face::Container {
            let mut delete = Command::new(programs::ferry()?);
            delete.arg("--root").arg(self.place.path("state")).args(["delete", "--force", self.place.name()]);
            programs::succeed(&mut delete)?;
        }
        self.nothing_left()
    }
}

/// The number of a task in the middle of the tree belongs to a session of somebody else's, whose leader has ended.
fn pid_in_use() -> Outcome {
    let place = Place::new()?;
    let mut saved = Saved::new(&place, Face::Host, "prefork")?;
    let number = *saved.pids.last().ok_or("the workload has no children")?;
    let stranger = processes::occupy(number)?;
    let free = std::mem::replace(&mut saved.before, Surroundings::look(&place));
    saved.fails(&[], &["is in use by a process group or session", &number.to_string()])?;
    processes::end_all_below();
    processes::await_end(&[stranger])?;
    saved.before = free;
    saved.succeeds()?;
    place.nothing_left()
}

/// All points of a restore at which something can be made to go wrong.
fn points() -> Outcome<Vec<String>> {
    let listed = programs::succeed(Command::new(programs::ferry()?).args(["criu", "--list-faults"]))?;
    Ok(listed.lines().filter(|point| point.starts_with("restore-")).map(str::to_owned).collect())
}

/// Every point × one way to go wrong: nothing is left, and the same images restore.
///
/// An edge of a phase is met once; a point within a phase as often as there are tasks or batches, of which some are taken.
fn matrix(face: Face, action: &str) -> Outcome {
    let place = Place::new()?;
    let saved = Saved::new(&place, face, "household")?;
    for point in points()? {
        let is_edge = ["before", "after"].iter().any(|edge| point.starts_with(&format!("restore-{edge}-")));
        let mut met = 0;
        for occurrence in [1, 2, 4, 12, 36] {
            let fault = format!("{point}:{occurrence}={action}");
            let at = |error: String| format!("{fault}: {error}");
            let status = saved.restore(&["--fault", &fault])?;
            if status.success() {
                // The point was not met so often; or it lies where nothing fails any more.
                saved.talk.ask().and_then(|()| saved.end()).map_err(at)?;
                break;
            }
            met += 1;
            let as_asked = if action == "kill" { status.signal() == Some(9) } else { status.code() == Some(1) };
            if !as_asked {
                return Err(at(format!("the restore ended with {status}: {}", saved.said())));
            }
            saved.nothing_left().map_err(at)?;
            if is_edge {
                break;
            }
        }
        let too_late = action != "kill" && ["restore-after-go", "restore-freed"].contains(&point.as_str());
        if (met == 0) != too_late {
            return Err(format!("{point}={action}: met {met} times"));
        }
        saved.succeeds().map_err(|error| format!("after {point}={action}: {error}"))?;
    }
    place.nothing_left()
}

/// A signal from outside asks a restore to end: it says so, and nothing is left.
fn asked_to_end() -> Outcome {
    let place = Place::new()?;
    let saved = Saved::new(&place, Face::Host, "household")?;
    let root = saved.pids[0];
    for (point, signal) in [
        ("restore-after-first-task", Signal::INT),
        ("restore-after-tree", Signal::HUP),
        ("restore-before-registers", Signal::TERM),
    ] {
        let at = |error: String| format!("{point}, {signal:?}: {error}");
        let mut ferry = saved
            .command(&["--fault", &format!("{point}=delay:400")])?
            .spawn()
            .map_err(|error| at(error.to_string()))?;
        processes::wait_for("the first task", || Path::new(&format!("/proc/{root}")).exists()).map_err(at)?;
        kill_process(Pid::from_child(&ferry), signal).map_err(|error| at(error.to_string()))?;
        let status = ferry.wait().map_err(|error| at(error.to_string()))?;
        if status.code() != Some(1) || !saved.said().contains("given up: it was ended by SIG") {
            return Err(at(format!("{status}: {}", saved.said())));
        }
        saved.nothing_left().map_err(at)?;
    }
    saved.succeeds()?;
    place.nothing_left()
}

/// The same while a gibibyte of memory is filled: not all of it is filled first.
fn asked_to_end_among_pages() -> Outcome {
    let place = Place::new()?;
    let saved = Saved::new(&place, Face::Host, "vast")?;
    let root = saved.pids[0];
    // In pages of 4 KiB.
    let resident = || {
        let statm = std::fs::read_to_string(format!("/proc/{root}/statm")).unwrap_or_default();
        statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0)
    };
    let mut ferry = saved.command(&[])?.spawn().map_err(|error| error.to_string())?;
    processes::wait_for("some of its memory", || resident() > 16 << 10)?;
    kill_process(Pid::from_child(&ferry), Signal::TERM).map_err(|error| error.to_string())?;
    let mut most = 0;
    let status = loop {
        most = most.max(resident());
        if let Some(status) = ferry.try_wait().map_err(|error| error.to_string())? {
            break status;
        }
        std::thread::sleep(Duration::from_micros(200));
    };
    if status.code() != Some(1) || !saved.said().contains("given up: it was ended by SIGTERM") {
        return Err(format!("{status}: {}", saved.said()));
    }
    if most > 200 << 10 {
        return Err(format!("{} MiB were filled, of 1024", most >> 8));
    }
    saved.nothing_left()?;
    saved.succeeds()?;
    place.nothing_left()
}

/// Restores that are killed at random instants, drawn uniformly from the time that one takes.
///
/// `FERRY_TORTURE_RESTORES` of them (24 when unset), with `FERRY_TORTURE_SEED`.
fn torture(face: Face) -> Outcome {
    let place = Place::new()?;
    let saved = Saved::new(&place, face, "household")?;
    let count = std::env::var("FERRY_TORTURE_RESTORES").ok().filter(|text| !text.is_empty());
    let count: u32 = count.map_or(Ok(24), |text| text.parse().map_err(|_| format!("{text} is no number")))?;
    let seed = torture::Plan::of_environment()?.seed;
    let start = Instant::now();
    let status = saved.restore(&[])?;
    let length = start.elapsed();
    if !status.success() {
        return Err(format!("a restore that is not killed ended with {status}: {}", saved.said()));
    }
    saved.end()?;
    let (mut random, mut killed) = (seed | 1, 0);
    for number in 0..count {
        let after = length.mul_f64(torture::fraction(&mut random) * 1.05);
        let at = |error: String| format!("restore {number} of seed {seed}, killed after {after:?}: {error}");
        let mut ferry = saved.command(&[])?.spawn().map_err(|error| at(error.to_string()))?;
        std::thread::sleep(after);
        // One that has ended already is not there to be killed.
        let _ = ferry.kill();
        let status = ferry.wait().map_err(|error| at(error.to_string()))?;
        let left = match status.signal() {
            Some(9) => saved.before.await_again_within(&place, Duration::from_secs(5)),
            None if status.success() => Err("it was faster".to_owned()),
            _ => return Err(at(format!("{status}: {}", saved.said()))),
        };
        // Nothing, or all: it was killed when there was no more to do.
        match left {
            Ok(()) => killed += 1,
            Err(left) => {
                saved.talk.ask().and_then(|()| saved.end()).map_err(|error| at(format!("{error}; at first {left}")))?;
            }
        }
    }
    let told =
        format!("torture: {count} restores of some {length:?}, seed {seed}: {killed} killed, nothing left of them\n");
    let _ = std::io::stdout().write_all(told.as_bytes());
    saved.succeeds()?;
    place.nothing_left()
}

/// An image and a file of the tree that are missing; then a place for the pid file that is none.
fn missing(face: Face) -> Outcome {
    let place = Place::new()?;
    let mut saved = Saved::new(&place, face, "regular_files")?;
    let images = std::fs::read_dir(&saved.images).map_err(|error| error.to_string())?.flatten();
    let core = images.map(|entry| entry.path()).find(|path| path.to_string_lossy().contains("core-"));
    let gone = [(core.ok_or("there is no core image")?, "core-"), (place.path("work/file 1"), "file 1")];
    for (path, word) in gone {
        let away = place.path("away");
        let said = |error: std::io::Error| format!("{}: {error}", path.display());
        std::fs::rename(&path, &away).map_err(said)?;
        let whole = std::mem::replace(&mut saved.before, Surroundings::look(&place));
        saved.fails(&[], &[word]).map_err(|error| format!("without {}: {error}", path.display()))?;
        std::fs::rename(&away, &path).map_err(said)?;
        saved.before = whole;
    }
    let nowhere = place.path("no/such/folder/pid");
    let option = if face == Face::Host { "--pidfile" } else { "--pid-file" };
    saved.fails(&[option, &nowhere.to_string_lossy()], &["pid file"])?;
    saved.succeeds()?;
    place.nothing_left()
}

/// Changes the bundle's config.
fn configure(place: &Place, change: impl FnOnce(&mut serde_json::Value)) -> Outcome {
    let path = place.path("bundle/config.json");
    let text = std::fs::read(&path).map_err(|error| format!("config.json: {error}"))?;
    let mut config = serde_json::from_slice(&text).map_err(|error| format!("config.json: {error}"))?;
    change(&mut config);
    std::fs::write(&path, config.to_string()).map_err(|error| format!("config.json: {error}"))
}

/// Limits of the cgroup that the tree does not fit into.
fn limits_too_small() -> Outcome {
    let place = Place::new()?;
    let mut saved = Saved::new(&place, Face::Container, "household")?;
    let usual = std::fs::read(place.path("bundle/config.json")).map_err(|error| error.to_string())?;
    let limits = [
        serde_json::json!({"pids": {"limit": 4}}),
        serde_json::json!({"memory": {"limit": 1 << 20}}),
        serde_json::json!({"cpu": {"cpus": "9999"}}),
    ];
    for limit in limits {
        configure(&place, |config| config["linux"]["resources"] = limit.clone())?;
        let whole = std::mem::replace(&mut saved.before, Surroundings::look(&place));
        saved.fails(&[], &[]).map_err(|error| format!("{limit}: {error}"))?;
        saved.before = whole;
    }
    std::fs::write(place.path("bundle/config.json"), usual).map_err(|error| error.to_string())?;
    saved.succeeds()?;
    place.nothing_left()
}

/// There is no room for the container's state.
fn no_room_for_state() -> Outcome {
    let place = Place::new()?;
    let mut saved = Saved::new(&place, Face::Container, "sessions")?;
    let state = place.path("state");
    for size in [c"size=4k", c"nr_inodes=4"] {
        rustix::mount::mount("none", &state, "tmpfs", rustix::mount::MountFlags::empty(), Some(size))
            .map_err(|error| format!("cannot mount a small file system: {error}"))?;
        let whole = std::mem::replace(&mut saved.before, Surroundings::look(&place));
        saved.fails(&[], &["No space left"]).map_err(|error| format!("{size:?}: {error}"))?;
        rustix::mount::unmount(&state, rustix::mount::UnmountFlags::empty()).map_err(|error| error.to_string())?;
        saved.before = whole;
    }
    saved.succeeds()?;
    place.nothing_left()
}

/// What hooks have made before the restore fails or is killed is taken away by the hook for the container's end.
fn hooks_undone() -> Outcome {
    let place = Place::new()?;
    let mut saved = Saved::new(&place, Face::Container, "sessions")?;
    let link = "veth-of-hook";
    let run = |line: String| serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", line]});
    let makes = run(format!("ip link add {link} type veth peer name {link}2"));
    let removes = run(format!("ip link del {link}"));
    let fails = run("exit 3".to_owned());
    for (first, fault, word) in [
        (vec![makes.clone(), fails], None, "hook"),
        (vec![makes.clone()], Some("restore-before-go=error"), "restore-before-go"),
        (vec![makes.clone()], Some("restore-before-go=kill"), ""),
    ] {
        let hooks = serde_json::json!({"createRuntime": first, "poststop": [removes.clone()]});
        configure(&place, |config| config["hooks"] = hooks)?;
        let whole = std::mem::replace(&mut saved.before, Surroundings::look(&place));
        match fault {
            Some(fault) if fault.ends_with("=kill") => {
                saved.restore(&["--fault", fault])?;
                saved.nothing_left().map_err(|error| format!("{fault}: {error}"))?;
            }
            Some(fault) => saved.fails(&["--fault", fault], &[word])?,
            None => saved.fails(&[], &[word])?,
        }
        saved.before = whole;
    }
    Ok(())
}

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trial = |name: &str, run: fn() -> Outcome| {
        Trial::test(name, move || surroundings::isolate().and_then(|()| run()).map_err(Into::into))
    };
    let trials = vec![
        trial("pid_in_use", pid_in_use),
        trial("matrix::host_error", || matrix(Face::Host, "error")),
        trial("matrix::host_kill", || matrix(Face::Host, "kill")),
        trial("matrix::container_error", || matrix(Face::Container, "error")),
        trial("matrix::container_kill", || matrix(Face::Container, "kill")),
        trial("matrix::host_ask", || matrix(Face::Host, "ask")),
        trial("matrix::container_ask", || matrix(Face::Container, "ask")),
        trial("asked_to_end", asked_to_end),
        trial("asked_to_end_among_pages", asked_to_end_among_pages),
        trial("torture::host", || torture(Face::Host)),
        trial("torture::container", || torture(Face::Container)),
        trial("missing::host", || missing(Face::Host)),
        trial("missing::container", || missing(Face::Container)),
        trial("limits_too_small", limits_too_small),
        trial("no_room_for_state", no_room_for_state),
        trial("hooks_undone", hooks_undone),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}
