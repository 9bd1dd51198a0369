//! A containerd of the test's own, its `ctr`, and one container in it that runs the `service` workload through the runc-v2 shim.

use crate::service::{INSIDE, Service};
use crate::{Outcome, Place, client, image, processes, programs};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A daemon of the test's own.
pub struct Containerd<'place> {
    place: &'place Place,
    runtime: PathBuf,
    /// Where the containers' programs talk with the test.
    pub service: Service,
}

impl<'place> Containerd<'place> {
    /// Starts the daemon and gives it one image. `runtime` is the path of an OCI runtime, for the shim's option `BinaryName`.
    pub fn new(place: &'place Place, runtime: PathBuf) -> Outcome<Self> {
        let service = Service::new(place)?;
        let archive = image::archive(place, &service.bundle(place)?)?;
        let folder = place.folder("containerd")?;
        let configuration = folder.join("config.toml");
        std::fs::write(&configuration, configured(&folder)).map_err(|error| format!("config.toml: {error}"))?;
        let log = std::fs::File::create(folder.join("log")).map_err(|error| format!("log: {error}"))?;
        let mut daemon = client::command(place, &programs::installed("containerd")?)?;
        // containerd forgets folders of its own there.
        daemon.env("TMPDIR", place.folder("containerd/tmp")?);
        daemon.arg("--config").arg(&configuration).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        daemon.spawn().map_err(|error| format!("containerd: {error}"))?;
        let containerd = Self { place, runtime, service };
        processes::wait_for("containerd to answer", || {
            containerd.command().and_then(|mut command| programs::succeed(command.arg("version"))).is_ok()
        })?;
        containerd.run(&["image", "import", &archive.to_string_lossy()])?;
        Ok(containerd)
    }

    /// A command of `ctr`.
    pub fn command(&self) -> Outcome<Command> {
        let mut command = client::command(self.place, &programs::installed("ctr")?)?;
        command.arg("--address").arg(self.place.path("containerd/socket"));
        Ok(command)
    }

    /// Runs a command that must succeed; returns what it printed.
    pub fn run(&self, words: &[&str]) -> Outcome<String> {
        let log = || client::errors(&self.place.path("containerd/log"));
        programs::succeed(self.command()?.args(words)).map_err(|error| format!("{error}{}", log()))
    }

    /// Starts a container with a workload, detached. `source` is an image, or `--rootfs` and a folder.
    pub fn start(&self, name: &str, workload: &str, source: &[&str]) -> Outcome {
        let path = |name: &str| self.place.path("containerd").join(name).to_string_lossy().into_owned();
        let mount = format!("type=bind,src={},dst={INSIDE},options=rbind:rw", self.service.folder.display());
        let cgroup = format!("/{}", self.place.name());
        let runtime = self.runtime.to_string_lossy();
        let (state, fifos) = (path("runc"), path("fifos"));
        // Input and output are /dev/null: fifos would have to be read for as long as the container lives.
        let fixed = ["run", "--detach", "--null-io", "--runc-binary", &runtime, "--runc-root", &state];
        let given = ["--fifo-dir", &fifos, "--cgroup", &cgroup, "--mount", &mount];
        let words = Service::words(workload);
        self.run(&[&fixed[..], &given, source, &[name], &words].concat())?;
        self.service.await_ready()?;
        self.service.ask("its start")
    }

    /// The status of a container's task and the pid of its first process.
    pub fn task(&self, name: &str) -> Outcome<(String, i32)> {
        let list = self.run(&["tasks", "list"])?;
        let of_task = |line: &str| {
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            (words.len() == 3 && words[0] == name).then(|| (words[2].clone(), words[1].parse().ok()))
        };
        match list.lines().find_map(of_task) {
            Some((status, Some(pid))) => Ok((status, pid)),
            _ => Err(format!("no task {name}: {list}")),
        }
    }

    /// Fails unless the container runs and the program inside is well.
    pub fn is_well(&self, name: &str, event: &str) -> Outcome {
        let (status, _) = self.task(name)?;
        if status != "RUNNING" {
            return Err(format!("after {event}: the task is {status}"));
        }
        self.service.ask(event)?;
        let inside = self.run(&["tasks", "exec", "--exec-id", "look", name, "/bin/cat", "/proc/1/comm"])?;
        if inside.trim() == "workload" { Ok(()) } else { Err(format!("after {event}: exec printed {inside:?}")) }
    }

    /// Ends a container's task, unless it has ended, and removes the container.
    pub fn remove(&self, name: &str) -> Outcome {
        let (status, pid) = self.task(name)?;
        if status != "STOPPED" {
            let tree = processes::tree(pid);
            self.run(&["tasks", "kill", "--signal", "SIGKILL", name])?;
            processes::await_end(&tree)?;
        }
        processes::wait_for("the task to be stopped", || self.task(name).is_ok_and(|(status, _)| status == "STOPPED"))?;
        // The exit status of the task, which was killed, is that of the command.
        programs::run(self.command()?.args(["tasks", "delete", name]))?;
        self.run(&["containers", "delete", name]).map(|_| ())
    }

    /// Ends the daemon, whose containers must be gone; fails if anything is left.
    pub fn end(self) -> Outcome {
        let place = self.place;
        drop(self);
        place.nothing_left()
    }
}

impl Drop for Containerd<'_> {
    /// Shims outlive their daemon: all are below this process.
    fn drop(&mut self) {
        processes::end_all_below();
    }
}

/// Everything in one folder; no plug-in that needs more than a folder.
fn configured(folder: &Path) -> String {
    let folder = folder.display();
    let without = ["grpc.v1.cri", "internal.v1.opt", "snapshotter.v1.devmapper", "snapshotter.v1.btrfs"];
    let without: Vec<String> = without.iter().map(|name| format!("\"io.containerd.{name}\"")).collect();
    format!(
        "version = 2\nroot = \"{folder}/root\"\nstate = \"{folder}/state\"\ndisabled_plugins = [{}]\n\
         [grpc]\naddress = \"{folder}/socket\"\n[ttrpc]\naddress = \"{folder}/socket.ttrpc\"\n",
        without.join(", ")
    )
}
