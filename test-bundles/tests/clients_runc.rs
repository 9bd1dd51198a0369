//! runc checkpoints and restores its containers with ferry as the only `criu`, and so does ferry in runc's place, by the same command line.

use ferry_test_bundles::service::Service;
use ferry_test_bundles::{Bundle, Container, Engine, Outcome, Place, processes, programs};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Output;

/// A container of runc, or of ferry in its place, that runs the service, with folders for images and logs.
struct OfRunc<'place> {
    container: Container<'place>,
    service: Service,
    images: PathBuf,
    logs: PathBuf,
    /// Whether the runtime calls `criu`, which has a log.
    has_engine: bool,
}

impl<'place> OfRunc<'place> {
    fn run(place: &'place Place, runtime: &Path, change: impl FnOnce(&mut Bundle)) -> Outcome<Self> {
        let service = Service::new(place)?;
        let mut bundle = service.bundle(place)?;
        change(&mut bundle);
        let container = Container::run_with(place, &bundle, runtime.to_owned())?;
        service.await_ready()?;
        let (images, logs) = (place.path("images"), place.folder("logs")?);
        let has_engine = runtime != programs::ferry()?;
        let of_runc = Self { container, service, images, logs, has_engine };
        of_runc.is_well("its start")?;
        Ok(of_runc)
    }

    fn folders(&self) -> [String; 4] {
        let (images, logs) = (self.images.display().to_string(), self.logs.display().to_string());
        ["--image-path".to_owned(), images, "--work-path".to_owned(), logs]
    }

    fn options<'a>(folders: &'a [String], options: &[&'a str]) -> Vec<&'a str> {
        folders.iter().map(String::as_str).chain(options.iter().copied()).collect()
    }

    /// Checkpoints the container, which is gone then.
    fn checkpoint(&self, options: &[&str]) -> Outcome {
        let folders = self.folders();
        self.container.checkpoint(&Self::options(&folders, options))?;
        match self.container.state() {
            Ok(state) => Err(format!("runc still knows the container: {state}")),
            Err(_) => Ok(()),
        }
    }

    /// Checkpoints the container, whose processes stay the same.
    fn checkpoint_running(&self, options: &[&str]) -> Outcome {
        let (tree, folders) = (processes::tree(self.container.pid()?), self.folders());
        let options = [&["--leave-running"], options].concat();
        self.container.verb("checkpoint", &Self::options(&folders, &options))?;
        let now = processes::tree(self.container.pid()?);
        if now == tree { Ok(()) } else { Err(format!("the processes are {now:?}, were {tree:?}")) }
    }

    /// Restores the container, and sees that it is what it was.
    fn restore(&self, options: &[&str]) -> Outcome {
        let folders = self.folders();
        self.container.restore(&Self::options(&folders, options))?;
        self.is_well("the restore")
    }

    fn is_well(&self, event: &str) -> Outcome {
        self.container.is("running")?;
        self.service.ask(event)?;
        let inside = self.container.exec(&["cat", "/proc/1/comm"])?;
        if inside.trim() == "workload" { Ok(()) } else { Err(format!("after {event}: exec printed {inside:?}")) }
    }

    fn log(&self, name: &str) -> Outcome<String> {
        let path = self.logs.join(name);
        std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// What a refused checkpoint tells people: the last error of the engine's log, which the runtime then names, or what the runtime
    /// itself says.
    fn reason(&self, output: &Output) -> Outcome<String> {
        let said = programs::said(output);
        if output.status.success() {
            return Err(format!("nothing was refused: {said}"));
        }
        if !self.has_engine {
            return Ok(said);
        }
        if !said.contains(&*self.logs.join("dump.log").to_string_lossy()) {
            return Err(format!("the log is not named: {said}"));
        }
        let log = self.log("dump.log")?;
        Ok(log.lines().rfind(|line| line.contains("Error")).unwrap_or_default().to_owned())
    }

    fn end(self) -> Outcome {
        self.container.end()
    }
}

/// Tests for runc and for ferry in its place.
macro_rules! with_both_runtimes {
    ($($test:ident),*) => {
        mod runc_is_the_runtime {
            $(#[test] fn $test() -> super::Outcome { super::$test(&super::programs::installed("runc")?) })*
        }
        mod ferry_is_the_runtime {
            $(#[test] fn $test() -> super::Outcome { super::$test(&super::programs::ferry()?) })*
        }
    };
}

with_both_runtimes!(
    checkpoint_and_restore,
    leave_running,
    paused_before,
    read_only_root,
    hooks,
    options_of_the_user,
    what_is_refused_is_told,
    every_reason_is_told,
    pre_dump,
    page_server
);

/// A root file system that the program may write to.
fn writable(bundle: &mut Bundle) {
    bundle.writable();
}

/// `--image-path` and `--work-path`, twice in a row; logs and statistics are where they belong.
fn checkpoint_and_restore(runtime: &Path) -> Outcome {
    let place = Place::new()?;
    let of_runc = OfRunc::run(&place, runtime, writable)?;
    for round in ["first", "second"] {
        of_runc.checkpoint(&[]).map_err(|error| format!("{round} checkpoint: {error}"))?;
        of_runc.restore(&[]).map_err(|error| format!("{round} restore: {error}"))?;
        let logs: &[&str] = if of_runc.has_engine { &["dump.log", "restore.log"] } else { &[] };
        for name in ["stats-dump", "stats-restore"].iter().chain(logs) {
            let path = of_runc.logs.join(name);
            std::fs::remove_file(&path).map_err(|error| format!("{round}: {}: {error}", path.display()))?;
        }
        std::fs::remove_dir_all(&of_runc.images).map_err(|error| format!("images: {error}"))?;
    }
    of_runc.end()
}

/// The memory goes to a page server, and the rest to the image folder; what the server wrote is brought there before the restore.
fn page_server(runtime: &Path) -> Outcome {
    let place = Place::new()?;
    let of_runc = OfRunc::run(&place, runtime, writable)?;
    let folder = place.folder("server")?;
    let mut command = Engine::ferry()?.command(&place, "page-server", &folder, "server.log");
    let output = programs::succeed(command.args(["--address", "127.0.0.1", "--daemon"]))?;
    let address = output.trim().strip_prefix("Listening at ").ok_or(format!("the server said {output:?}"))?;
    of_runc.checkpoint(&["--page-server", address])?;
    // Its end is awaited: the server is an orphan, and so a child of this process.
    processes::wait_for("the page server to end", || {
        processes::reap();
        processes::below().is_empty()
    })?;
    let written = std::fs::read_dir(&folder).map_err(|error| error.to_string())?.flatten();
    for name in written.map(|file| file.file_name()).filter(|name| name.to_string_lossy().ends_with(".img")) {
        if of_runc.images.join(&name).exists() {
            return Err(format!("both folders have {}", name.display()));
        }
        std::fs::copy(folder.join(&name), of_runc.images.join(&name)).map_err(|error| error.to_string())?;
    }
    of_runc.restore(&[])?;
    of_runc.end()
}

/// The container runs on, and its images are good: it is restored from them once it has been ended.
fn leave_running(runtime: &Path) -> Outcome {
    let place = Place::new()?;
    let of_runc = OfRunc::run(&place, runtime, writable)?;
    of_runc.checkpoint_running(&[])?;
    of_runc.is_well("checkpoint --leave-running")?;
    let tree = processes::tree(of_runc.container.pid()?);
    programs::succeed(of_runc.container.command("kill").arg(&of_runc.container.id).arg("KILL"))?;
    processes::await_end(&tree)?;
    of_runc.container.verb("delete", &[])?;
    of_runc.restore(&[])?;
    of_runc.end()
}

/// A paused container stays paused while it is checkpointed, and runs when it is restored.
fn paused_before(runtime: &Path) -> Outcome {
    let place = Place::new()?;
    let of_runc = OfRunc::run(&place, runtime, writable)?;
    of_runc.container.verb("pause", &[])?;
    of_runc.checkpoint_running(&[])?;
    of_runc.container.is("paused")?;
    std::fs::remove_dir_all(&of_runc.images).map_err(|error| format!("images: {error}"))?;
    of_runc.checkpoint(&[])?;
    of_runc.restore(&[])?;
    of_runc.end()
}

/// A root file system that is read-only, with a tmpfs in it.
fn read_only_root(runtime: &Path) -> Outcome {
    let place = Place::new()?;
    let of_runc = OfRunc::run(&place, runtime, |bundle| {
        let temporary = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]});
        if let Some(mounts) = bundle.config["mounts"].as_array_mut() {
            mounts.push(temporary);
        }
    })?;
    of_runc.checkpoint(&[])?;
    of_runc.restore(&[])?;
    let refused = of_runc.container.exec(&["touch", "/etc/file"]);
    if !refused.as_ref().is_err_and(|error| error.contains("Read-only")) {
        return Err(format!("the root can be written to: {refused:?}"));
    }
    of_runc.end()
}

/// The annotation `org.criu.config` names a file of options, which win over runc's own.
#[test]
fn configuration_of_the_user() -> Outcome {
    let place = Place::new()?;
    let file = place.path("criu.conf");
    std::fs::write(&file, "log-file of-the-user.log\n").map_err(|error| format!("{}: {error}", file.display()))?;
    let of_runc = OfRunc::run(&place, &programs::installed("runc")?, |bundle| {
        bundle.writable();
        bundle.config["annotations"] = json!({"org.criu.config": file});
    })?;
    of_runc.checkpoint(&[])?;
    of_runc.log("of-the-user.log").map_err(|error| format!("after the checkpoint: {error}"))?;
    std::fs::remove_file(of_runc.logs.join("of-the-user.log")).map_err(|error| error.to_string())?;
    of_runc.restore(&[])?;
    of_runc.log("of-the-user.log").map_err(|error| format!("after the restore: {error}"))?;
    of_runc.end()
}

/// Options of the user's configuration: locks are saved, and a mount that is left out is not there after the restore, while others are.
fn options_of_the_user(runtime: &Path) -> Outcome {
    let place = Place::new()?;
    let file = place.path("criu.conf");
    let options = "file-locks # of one file\nskip-mnt /left/out\ntcp-established\n";
    std::fs::write(&file, options).map_err(|error| format!("{}: {error}", file.display()))?;
    let of_runc = OfRunc::run(&place, runtime, |bundle| {
        bundle.writable();
        bundle.config["annotations"] = json!({"org.criu.config": file});
        bundle.config["process"]["args"] = json!(Service::words("file_lock"));
        for point in ["/left/out", "/kept"] {
            let mount = json!({"destination": point, "type": "tmpfs", "source": "tmpfs"});
            bundle.config["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(mount.clone()));
        }
    })?;
    of_runc.checkpoint(&[])?;
    of_runc.restore(&[])?;
    let mounts = of_runc.container.exec(&["cat", "/proc/mounts"])?;
    if mounts.contains(" /left/out ") || !mounts.contains(" /kept ") {
        return Err(format!("the mounts are\n{mounts}"));
    }
    of_runc.end()
}

/// Hooks run where runc runs them: createRuntime with the restored process's pid, poststop when the checkpoint has ended it.
fn hooks(runtime: &Path) -> Outcome {
    let place = Place::new()?;
    let note = |name: &str| {
        let script = format!("cat >> {}", place.path(name).display());
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    let of_runc = OfRunc::run(&place, runtime, |bundle| {
        bundle.writable();
        bundle.config["hooks"] = json!({"createRuntime": note("created"), "poststop": note("stopped")});
    })?;
    std::fs::remove_file(place.path("created")).map_err(|error| format!("createRuntime: {error}"))?;
    of_runc.checkpoint(&[])?;
    if !place.path("stopped").exists() {
        return Err("poststop did not run after the checkpoint".to_owned());
    }
    of_runc.restore(&[])?;
    let told = std::fs::read_to_string(place.path("created")).map_err(|error| format!("createRuntime: {error}"))?;
    let state: serde_json::Value = serde_json::from_str(&told).map_err(|error| format!("{error}: {told}"))?;
    if state["pid"].as_i64() != Some(of_runc.container.pid()?.into()) {
        return Err(format!("createRuntime was told {told}, the pid is {}", of_runc.container.pid()?));
    }
    of_runc.end()
}

/// What cannot be saved leaves the container as it was, and people are told which descriptor of which process it is and what to do.
fn what_is_refused_is_told(runtime: &Path) -> Outcome {
    let place = Place::new()?;
    let of_runc = OfRunc::run(&place, runtime, |bundle| {
        bundle.writable();
        bundle.config["process"]["args"] = json!(Service::words("file_lock"));
    })?;
    let folders = of_runc.folders();
    let output = of_runc.container.try_verb("checkpoint", &OfRunc::options(&folders, &[]))?;
    says(&of_runc.reason(&output)?, &["pid 1 (workload)", "fd ", "/work/locked", "--file-locks"])?;
    of_runc.is_well("a refused checkpoint")?;
    of_runc.checkpoint(&["--file-locks"])?;
    of_runc.restore(&["--file-locks"])?;
    of_runc.end()
}

/// The same for what no option helps with; several objects are told at once.
fn every_reason_is_told(runtime: &Path) -> Outcome {
    for (workload, words) in [
        ("inotify", &["inotify", "have the program close it before the checkpoint"][..]),
        ("tcp_connected", &["fd 4, socket:[", "fd 5, socket:[", "a TCP connection", "close the connection"]),
    ] {
        let place = Place::new()?;
        let of_runc = OfRunc::run(&place, runtime, |bundle| {
            bundle.writable();
            bundle.config["process"]["args"] = json!(Service::words(workload));
        })?;
        let tree = processes::tree(of_runc.container.pid()?);
        let folders = of_runc.folders();
        let output = of_runc.container.try_verb("checkpoint", &OfRunc::options(&folders, &[]))?;
        says(&of_runc.reason(&output)?, &[&["pid 1 (workload): fd "], words].concat())?;
        if processes::tree(of_runc.container.pid()?) != tree {
            return Err(format!("the processes of {workload} are others after a refused checkpoint"));
        }
        of_runc.is_well("a refused checkpoint")?;
        of_runc.end()?;
    }
    Ok(())
}

fn says(sentence: &str, words: &[&str]) -> Outcome {
    match words.iter().find(|word| !sentence.contains(**word)) {
        None => Ok(()),
        Some(word) => Err(format!("the reason does not say {word:?}: {sentence:?}")),
    }
}

/// `--pre-dump` leaves the container running, and the checkpoint after it has pages only that changed since.
fn pre_dump(runtime: &Path) -> Outcome {
    let place = Place::new()?;
    let of_runc = OfRunc::run(&place, runtime, writable)?;
    let tree = processes::tree(of_runc.container.pid()?);
    let (earlier, logs) = (place.path("earlier").display().to_string(), of_runc.logs.display().to_string());
    of_runc.container.verb("checkpoint", &["--pre-dump", "--image-path", &earlier, "--work-path", &logs])?;
    if processes::tree(of_runc.container.pid()?) != tree {
        return Err("the processes are others after a pre-dump".to_owned());
    }
    of_runc.is_well("a pre-dump")?;
    of_runc.checkpoint(&["--parent-path", "../earlier"])?;
    if std::fs::read_link(of_runc.images.join("parent")).ok() != Some("../earlier".into()) {
        return Err("the images do not name their parent".to_owned());
    }
    of_runc.restore(&[])?;
    of_runc.end()
}
