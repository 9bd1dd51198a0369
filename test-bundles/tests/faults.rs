//! Whatever goes wrong with a dump, and whenever: the tree that was to be dumped is unharmed, and can be dumped afterwards.
//!
//! One trial per action walks through every point of a dump that the engine names (`ferry criu --list-faults`).

use ferry_test_bundles::processes::{self, wait_for};
use ferry_test_bundles::victim::Victim;
use ferry_test_bundles::workload::Talk;
use ferry_test_bundles::{Bundle, Container, Engine, Outcome, Place, Workload, programs, surroundings, torture};
use libtest_mimic::{Arguments, Trial};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

/// The victim of most tests.
const VICTIM: &str = "survivor";

/// Points at which the images are complete: the dump cannot fail any more, and the tree is ended.
const COMPLETE: [&str; 3] = ["dump-after-save", "dump-before-finish", "dump-after-finish"];

/// What only a pre-dump meets.
const OF_PRE_DUMPS: &str = "dump-descriptor";

/// The points of a dump.
fn points() -> Outcome<Vec<String>> {
    let listed = programs::succeed(Command::new(programs::ferry()?).args(["criu", "--list-faults"]))?;
    let points: Vec<String> = listed.lines().filter(|point| point.starts_with("dump-")).map(str::to_owned).collect();
    if points.len() < 20 { Err(format!("the engine names only {points:?}")) } else { Ok(points) }
}

/// A dump of the victim, with these options, on its way.
fn start_dump(place: &Place, pid: i32, images: &Path, options: &[&str]) -> Outcome<Child> {
    let engine = Engine::ferry()?;
    let log = place.path("dump.log");
    let mut command = engine.command(place, "dump", images, &log.to_string_lossy());
    command.args(["-t", &pid.to_string()]).args(options);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().map_err(|error| format!("{}: {error}", programs::shown(&command)))
}

/// The same, to its end; what it printed.
fn dump(place: &Place, pid: i32, images: &Path, options: &[&str]) -> Outcome<(ExitStatus, String)> {
    finish(start_dump(place, pid, images, options)?)
}

fn finish(child: Child) -> Outcome<(ExitStatus, String)> {
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    Ok((output.status, String::from_utf8_lossy(&output.stderr).into_owned()))
}

fn is_empty(folder: &Path) -> Outcome {
    let names: Vec<String> = std::fs::read_dir(folder)
        .map_err(|error| format!("{}: {error}", folder.display()))?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    if names.is_empty() { Ok(()) } else { Err(format!("the failed dump left {}", names.join(", "))) }
}

/// Every point with one action. After each fault the victim is looked at, then dumped and restored without it.
fn matrix(action: &str) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut victim = Victim::start(&place, VICTIM)?;
    for point in points()?.iter().filter(|point| !COMPLETE.contains(&point.as_str()) && *point != OF_PRE_DUMPS) {
        let at = |error: String| format!("{point}={action}: {error}");
        let images = victim.images()?;
        let (status, told) = dump(&place, victim.workload.pid, &images, &["--fault", &format!("{point}={action}")])?;
        if status.success() {
            return Err(at("the dump succeeded: was the point not met?".to_owned()));
        }
        victim.alone().map_err(at)?;
        victim.unharmed().map_err(at)?;
        is_empty(&images).map_err(at)?;
        if status.code().is_some() && (told.lines().count() != 1 || !told.contains("run on")) {
            return Err(at(format!("not one sentence that says what became of the tree: {told:?}")));
        }
        victim.round_trip(&engine).map_err(|error| at(format!("afterwards: {error}")))?;
    }
    victim.end()
}

/// The points of a pre-dump at which something of it is in the processes, that of the userfaultfd twice: in the first process and in the
/// second.
fn pre_dump(action: &str) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut victim = Victim::start(&place, VICTIM)?;
    let second = format!("{OF_PRE_DUMPS}:2");
    for point in ["dump-mapping", "dump-area", OF_PRE_DUMPS, &second, "dump-unmapping", "dump-left", "dump-pages"] {
        let at = |error: String| format!("{point}={action}: {error}");
        let images = victim.images()?;
        let mut command = engine.command(&place, "pre-dump", &images, &place.path("dump.log").to_string_lossy());
        command.args(["-t", &victim.workload.pid.to_string(), "--fault", &format!("{point}={action}")]);
        let output = programs::run(&mut command)?;
        if output.status.success() {
            return Err(at("the pre-dump succeeded: was the point not met?".to_owned()));
        }
        victim.alone().map_err(at)?;
        victim.unharmed().map_err(at)?;
        is_empty(&images).map_err(at)?;
    }
    victim.round_trip(&engine)?;
    victim.end()
}

/// Points at which the images are complete: whoever dies, the tree is ended and comes back from them.
fn complete(action: &str) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut victim = Victim::start(&place, VICTIM)?;
    for point in COMPLETE {
        let at = |error: String| format!("{point}={action}: {error}");
        let (images, tree) = (victim.images()?, processes::tree(victim.workload.pid));
        dump(&place, victim.workload.pid, &images, &["--fault", &format!("{point}={action}")])?;
        if point == "dump-after-finish" || action == "kill-parent" {
            processes::await_end(&tree).map_err(at)?;
            victim.alone().map_err(at)?;
            engine.restore(&place, &images, &[]).map_err(at)?;
            victim.workload.ask().map_err(at)?;
        } else {
            // It failed between the completion and the end: both exist, and the tree is as it was.
            victim.alone().map_err(at)?;
            victim.workload.ask().map_err(at)?;
        }
    }
    victim.end()
}

/// A signal in the middle of a dump: it says so, and has done no harm.
fn asked_to_end(signal: Signal, name: &str) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut victim = Victim::start(&place, VICTIM)?;
    for point in ["dump-stopped", "dump-batch", "dump-before-memory", "dump-records"] {
        let at = |error: String| format!("{point}: {error}");
        let images = victim.images()?;
        let child = start_dump(&place, victim.workload.pid, &images, &["--fault", &format!("{point}=delay:400")])?;
        await_tracer(victim.workload.pid)?;
        let ferry = Pid::from_raw(child.id() as i32).ok_or("no pid")?;
        kill_process(ferry, signal).map_err(|error| at(error.to_string()))?;
        let (status, told) = finish(child)?;
        if status.code() != Some(1) || !told.contains(name) || !told.contains("run on") {
            return Err(at(format!("{status}: {told}")));
        }
        victim.alone().map_err(at)?;
        victim.unharmed().map_err(at)?;
        is_empty(&images).map_err(at)?;
    }
    victim.round_trip(&engine)?;
    victim.end()
}

/// Waits until somebody traces the process.
fn await_tracer(pid: i32) -> Outcome {
    wait_for("the dump to stop the tree", || is_traced(pid))
}

fn is_traced(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
}

/// The tree may stand still for a second, and the dump takes longer, wherever: it says so, and has done no harm. Once the tree runs
/// on, the dump has all its time.
fn timeout() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut victim = Victim::start(&place, VICTIM)?;
    for point in ["dump-call", "dump-batch", "dump-pages", "dump-records"] {
        let at = |error: String| format!("{point}: {error}");
        let images = victim.images()?;
        let options = ["--timeout", "1", "--fault", &format!("{point}=delay:1100")];
        let (status, told) = dump(&place, victim.workload.pid, &images, &options)?;
        if status.code() != Some(1) || !told.contains("longer than the 1s") || !told.contains("run on") {
            return Err(at(format!("{status}: {told}")));
        }
        victim.alone().map_err(at)?;
        victim.unharmed().map_err(at)?;
        is_empty(&images).map_err(at)?;
    }
    let options = ["--timeout", "1", "--fault", "dump-records=delay:1100", "--leave-running"];
    let images = victim.images()?;
    engine.dump(&place, victim.workload.pid, &images, &options)?;
    victim.unharmed()?;
    victim.round_trip(&engine)?;
    victim.end()
}

/// A signal in the middle of copying a gibibyte: the process does not stand still until all of it is copied.
fn asked_to_end_among_pages() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut workload = Workload::start(&place, "vast")?;
    let images = workload.images()?;
    let pages = |images: &Path| images.join("pages-1.img").exists();
    // How long a dump takes from its first page on.
    let child = start_dump(&place, workload.pid, &images, &["--leave-running"])?;
    wait_for("the first page", || pages(&images))?;
    let start = Instant::now();
    wait_for("the dump to let it go", || !is_traced(workload.pid))?;
    let usual = start.elapsed();
    finish(child)?;
    std::fs::remove_dir_all(&images).map_err(|error| error.to_string())?;
    let images = workload.images()?;
    let child = start_dump(&place, workload.pid, &images, &[])?;
    wait_for("the first page", || pages(&images))?;
    let ferry = Pid::from_raw(child.id() as i32).ok_or("no pid")?;
    let start = Instant::now();
    kill_process(ferry, Signal::TERM).map_err(|error| error.to_string())?;
    wait_for("the dump to let it go", || !is_traced(workload.pid))?;
    let took = start.elapsed();
    let (status, told) = finish(child)?;
    if status.code() != Some(1) || !told.contains("SIGTERM") || !told.contains("run on") {
        return Err(format!("{status}: {told}"));
    }
    if took > usual / 3 {
        return Err(format!("it stood still for {took:?} more; copying all of it takes {usual:?}"));
    }
    is_empty(&images)?;
    workload.ask()?;
    workload.round_trip(&engine)?;
    workload.end()
}

/// The images do not fit where they are to go: first nothing does, then all but the memory.
fn disk_full() -> Outcome {
    surroundings::isolate()?;
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut victim = Victim::start(&place, VICTIM)?;
    for size in [c"size=4k", c"size=512k"] {
        let folder = place.folder("small")?;
        rustix::mount::mount("none", &folder, "tmpfs", rustix::mount::MountFlags::empty(), Some(size))
            .map_err(|error| format!("cannot mount a small file system: {error}"))?;
        let images = place.folder("small/images")?;
        let mut command = engine.command(&place, "dump", &images, &place.path("dump.log").to_string_lossy());
        command.args(["-t", &victim.workload.pid.to_string()]).env("TMPDIR", &folder);
        let output = programs::run(&mut command)?;
        let told = programs::said(&output);
        if output.status.code() != Some(1) || !told.contains("No space left on device") {
            return Err(format!("{size:?}: {}: {told}", output.status));
        }
        victim.alone()?;
        victim.unharmed().map_err(|error| format!("{size:?}: {error}"))?;
        is_empty(&images).map_err(|error| format!("{size:?}: {error}"))?;
        rustix::mount::unmount(&folder, rustix::mount::UnmountFlags::empty()).map_err(|error| error.to_string())?;
    }
    victim.round_trip(&engine)?;
    victim.end()
}

/// The target is killed while it is dumped: the dump fails, does not hang, and leaves nothing.
fn target_dies() -> Outcome {
    for point in ["dump-before-freeze", "dump-after-freeze", "dump-batch", "dump-before-memory", "dump-records"] {
        let place = Place::new()?;
        let mut workload = Workload::start(&place, VICTIM)?;
        let (images, tree) = (workload.images()?, processes::tree(workload.pid));
        let child = start_dump(&place, workload.pid, &images, &["--fault", &format!("{point}=delay:400")])?;
        if point == "dump-before-freeze" {
            std::thread::sleep(std::time::Duration::from_millis(150));
        } else {
            await_tracer(workload.pid)?;
        }
        for pid in &tree {
            kill_process(Pid::from_raw(*pid).ok_or("no pid")?, Signal::KILL).map_err(|error| error.to_string())?;
        }
        let (status, told) = finish(child)?;
        // Once its memory has been read nothing is missing.
        if status.code() != Some(1) && point != "dump-records" {
            return Err(format!("{point}: {status}: {told}"));
        }
        processes::await_end(&tree).map_err(|error| format!("{point}: {error}"))?;
        if status.code() == Some(1) {
            is_empty(&images).map_err(|error| format!("{point}: {error}: {told}"))?;
        }
        workload.end()?;
    }
    Ok(())
}

/// The target changes all the time: it has threads, starts programs, or becomes another program itself. Whatever a dump
/// meets, it succeeds and harms nothing.
fn target_changes() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut workload = Workload::start(&place, "churn")?;
    for round in 0..10 {
        let images = workload.images()?;
        let at = |error: String| format!("threads, round {round}: {error}");
        engine.dump(&place, workload.pid, &images, &["--leave-running"]).map_err(at)?;
        workload.ask().map_err(at)?;
    }
    workload.round_trip(&engine)?;
    processes::end_all_below();
    let script = place.path("changes.sh");
    for (name, text) in [("forks", "while :; do /bin/true || exit 1; done"), ("execs", "exec sh \"$0\"")] {
        std::fs::write(&script, text).map_err(|error| error.to_string())?;
        // Without what the test's own parents left open (make's job server is a pipe).
        let close =
            "for fd in /proc/self/fd/*; do fd=${fd##*/}; [ $fd -gt 2 ] && eval \"exec $fd>&-\"; done; exec sh \"$0\"";
        let mut command = Command::new("setsid");
        command.args(["bash", "-c", close]).arg(&script).current_dir("/");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let pid = child.map_err(|error| format!("{name}: {error}"))?.id() as i32;
        // Until then its session may be one of another pid namespace, which is 0 and no pid to rustix.
        let id = nix::unistd::Pid::from_raw(pid);
        wait_for("the script to lead a session", || nix::unistd::getsid(Some(id)) == Ok(id))?;
        for round in 0..10 {
            let images = workload.images()?;
            let at = |error: String| format!("{name}, round {round}: {error}");
            engine.dump(&place, pid, &images, &["--leave-running"]).map_err(at)?;
            if processes::is_gone(pid) {
                return Err(at("the script has ended".to_owned()));
            }
        }
        let images = workload.images()?;
        engine.dump(&place, pid, &images, &[])?;
        wait_for("the script to end", || processes::is_gone(pid))?;
        engine.restore(&place, &images, &[]).map_err(|error| format!("{name}: {error}"))?;
        processes::end_all_below();
    }
    workload.end()
}

/// A container with the victim in it.
struct Contained<'place> {
    place: &'place Place,
    container: Container<'place>,
    talk: Talk,
    tree: Vec<i32>,
}

impl<'place> Contained<'place> {
    fn run(place: &'place Place) -> Outcome<Self> {
        let (bundle, talk) = Bundle::of_workload(place, VICTIM)?;
        let container = Container::run(place, &bundle)?;
        talk.await_ready()?;
        talk.ask()?;
        let tree = processes::tree(container.pid()?);
        Ok(Self { place, container, talk, tree })
    }

    /// It runs, is not frozen, is as it was from inside, and nothing of a checkpoint is in its bundle.
    fn unharmed(&self) -> Outcome {
        let others = || processes::below().into_iter().filter(|pid| !self.tree.contains(pid)).count();
        wait_for("ferry's processes to end", || {
            processes::reap();
            others() == 0
        })?;
        self.container.is("running")?;
        let now = processes::tree(self.container.pid()?);
        if now != self.tree {
            return Err(format!("the container's processes are {now:?}, were {:?}", self.tree));
        }
        self.talk.ask()?;
        let left: Vec<String> = std::fs::read_dir(&self.container.bundle)
            .map_err(|error| error.to_string())?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.contains("checkpoint") || name.contains("partial"))
            .collect();
        if left.is_empty() { Ok(()) } else { Err(format!("left in the bundle: {}", left.join(", "))) }
    }

    /// Checkpointed and restored as if nothing had been.
    fn end(self) -> Outcome {
        self.container.checkpoint(&[])?;
        self.container.restore(&[])?;
        self.talk.ask()?;
        self.container.end()
    }
}

/// `ferry checkpoint` of a container, whose cgroup is frozen meanwhile, with one action at some points.
fn container(action: &str) -> Outcome {
    let place = Place::new()?;
    let contained = Contained::run(&place)?;
    for point in ["dump-after-freeze", "dump-batch", "dump-unmap", "dump-after-memory", "dump-records"] {
        let at = |error: String| format!("{point}={action}: {error}");
        let output = contained.container.try_verb("checkpoint", &["--fault", &format!("{point}={action}")])?;
        if output.status.success() {
            return Err(at("the checkpoint succeeded".to_owned()));
        }
        contained.unharmed().map_err(at)?;
    }
    contained.end()
}

/// The archive cannot be written: nobody reads it, or its file system is full. The last of it is written when the container's
/// memory has been saved long ago, and the container must not have been ended by then.
fn archive_cannot_be_written() -> Outcome {
    let place = Place::new()?;
    let contained = Contained::run(&place)?;
    let (read_end, write_end) = std::io::pipe().map_err(|error| error.to_string())?;
    drop(read_end);
    let mut command = contained.container.command("checkpoint");
    command.args(["--archive", "-"]).arg(&contained.container.id).stdin(Stdio::null()).stdout(write_end);
    let output = command.stderr(Stdio::piped()).output().map_err(|error| error.to_string())?;
    drop(command);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() != Some(1) || !told.contains("Broken pipe") {
        return Err(format!("a closed pipe: {}: {told}", output.status));
    }
    contained.unharmed().map_err(|error| format!("a closed pipe: {error}"))?;
    let small = contained.place.folder("small")?;
    let archive = small.join("x.tar").to_string_lossy().into_owned();
    // How much a checkpoint takes, and then a little less than that.
    contained.container.verb("checkpoint", &["--leave-running", "--archive", &archive])?;
    let length = std::fs::metadata(&archive).map_err(|error| error.to_string())?.len();
    std::fs::remove_file(&archive).map_err(|error| error.to_string())?;
    for room in [length - (16 << 10), length / 2, 64 << 10] {
        let room = room & !4095;
        let options = std::ffi::CString::new(format!("size={room}")).map_err(|error| error.to_string())?;
        rustix::mount::mount("none", &small, "tmpfs", rustix::mount::MountFlags::empty(), Some(options.as_c_str()))
            .map_err(|error| format!("cannot mount a small file system: {error}"))?;
        let output = contained.container.try_verb("checkpoint", &["--archive", &archive])?;
        let told = programs::said(&output);
        let names: Vec<_> = std::fs::read_dir(&small).into_iter().flatten().flatten().collect();
        rustix::mount::unmount(&small, rustix::mount::UnmountFlags::empty()).map_err(|error| error.to_string())?;
        if output.status.code() != Some(1) || !told.contains("No space left on device") || !names.is_empty() {
            return Err(format!("{room} bytes of {length}: {}: {told}; left {names:?}", output.status));
        }
        contained.unharmed().map_err(|error| format!("{room} bytes of {length}: {error}"))?;
    }
    contained.end()
}

fn main() {
    let mut arguments = Arguments::from_args();
    // A test adopts and reaps orphans: one at a time in a process.
    arguments.test_threads = Some(1);
    let mut trials = Vec::new();
    for action in ["error", "kill", "kill-parent", "kill-both"] {
        trials.push(Trial::test(format!("every_point::{action}"), move || matrix(action).map_err(Into::into)));
        trials.push(Trial::test(format!("complete::{action}"), move || complete(action).map_err(Into::into)));
        trials.push(Trial::test(format!("pre_dump::{action}"), move || pre_dump(action).map_err(Into::into)));
        trials.push(Trial::test(format!("container::{action}"), move || container(action).map_err(Into::into)));
    }
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT"), (Signal::HUP, "SIGHUP")] {
        trials.push(Trial::test(format!("signal::{name}"), move || asked_to_end(signal, name).map_err(Into::into)));
    }
    let mut plain = |name: &str, run: fn() -> Outcome| {
        trials.push(Trial::test(name, move || run().map_err(Into::into)));
    };
    plain("timeout", timeout);
    plain("asked_to_end_among_pages", asked_to_end_among_pages);
    plain("disk_full", disk_full);
    plain("archive_cannot_be_written", archive_cannot_be_written);
    plain("target_dies", target_dies);
    plain("target_changes", target_changes);
    plain("torture", || torture::torture(&torture::Plan::of_environment()?));
    plain("torture_both", || {
        torture::torture(&torture::Plan { whom: torture::Whom::Both, ..torture::Plan::of_environment()? })
    });
    libtest_mimic::run(&arguments, trials).exit();
}
