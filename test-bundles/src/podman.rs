//! Podman with a store, a state and a configuration of its own, and one container in it that runs the `service` workload.

use crate::service::{INSIDE, Service};
use crate::{Outcome, Place, client, image, processes, programs};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A Podman of the test's own.
pub struct Podman<'place> {
    place: &'place Place,
    runtime: PathBuf,
    /// Where the containers' programs talk with the test.
    pub service: Service,
}

/// The container's name.
pub const NAME: &str = "service";

/// Lock files instead of the segment of shared memory that every Podman of a machine uses.
const CONFIGURATION: &str = "[engine]\nlock_type = \"file\"\nevents_logger = \"file\"\n";

impl<'place> Podman<'place> {
    /// Makes the store, with one image in it. `runtime` is the path of an OCI runtime.
    pub fn new(place: &'place Place, runtime: PathBuf) -> Outcome<Self> {
        let service = Service::new(place)?;
        let archive = image::archive(place, &service.bundle(place)?)?;
        let configuration = place.path("containers.conf");
        std::fs::write(&configuration, CONFIGURATION)
            .map_err(|error| format!("{}: {error}", configuration.display()))?;
        place.folder("podman")?;
        let podman = Self { place, runtime, service };
        podman.run(&["load", "--quiet", "--input", &archive.to_string_lossy()])?;
        Ok(podman)
    }

    /// A command of this Podman's.
    pub fn command(&self) -> Outcome<Command> {
        let mut command = client::command(self.place, &programs::installed("podman")?)?;
        let store = |name: &str| self.place.path("podman").join(name);
        command.arg("--root").arg(store("root")).arg("--runroot").arg(store("run")).arg("--tmpdir").arg(store("tmp"));
        command.args(["--cgroup-manager", "cgroupfs", "--storage-driver", "overlay", "--runtime"]).arg(&self.runtime);
        command.arg("--runtime-flag").arg(format!("root={}", store("state").display()));
        command.env("CONTAINERS_CONF", self.place.path("containers.conf"));
        Ok(command)
    }

    /// Runs a command that must succeed; returns what it printed.
    pub fn run(&self, words: &[&str]) -> Outcome<String> {
        programs::succeed(self.command()?.args(words)).map_err(|error| format!("{error}{}", self.reasons()))
    }

    /// What the engine's logs say went wrong: runtimes only name the file.
    pub fn reasons(&self) -> String {
        let containers = std::fs::read_dir(self.place.path("podman/root/overlay-containers")).into_iter().flatten();
        let folders = containers.flatten().map(|entry| entry.path().join("userdata"));
        let logs = folders.flat_map(|folder| ["dump.log", "restore.log"].map(|name| folder.join(name)));
        logs.map(|log| client::errors(&log)).collect()
    }

    /// Starts the container with a workload, detached.
    pub fn start(&self, workload: &str, options: &[&str]) -> Outcome {
        let mut command = self.command()?;
        command.args(["run", "--detach", "--name", NAME, "--network", "none", "--log-driver", "k8s-file"]);
        command.args(["--ulimit", "nofile=1024:4096", "--ulimit", "nproc=1000:1000"]);
        command.arg("--cgroup-parent").arg(format!("/{}", self.place.name()));
        command.arg("--volume").arg(format!("{}:{INSIDE}", self.service.folder.display()));
        command.args(options).arg(image::NAME).args(Service::words(workload));
        programs::succeed(&mut command)?;
        self.service.await_ready()?;
        self.service.ask("its start")
    }

    /// The container's status and the pid of its first process.
    pub fn inspect(&self) -> Outcome<(String, i32)> {
        let told = self.run(&["inspect", "--format", "{{.State.Status}} {{.State.Pid}}", NAME])?;
        let words = told.trim().split_once(' ').and_then(|(status, pid)| Some((status.to_owned(), pid.parse().ok()?)));
        words.ok_or_else(|| format!("inspect told {told:?}"))
    }

    /// Checkpoints the container, and sees that all its processes have ended; returns what was printed.
    pub fn checkpoint(&self, options: &[&str]) -> Outcome<String> {
        let (_, pid) = self.inspect()?;
        let tree = processes::tree(pid);
        let told = self.run(&[&["container", "checkpoint"], options, &[NAME]].concat())?;
        processes::await_end(&tree).map_err(|error| format!("after the checkpoint: {error}"))?;
        Ok(told)
    }

    /// Restores the container in place, or from an archive with `--import`; it must then run, with everything as it was and
    /// with its output in the log. Returns what was printed.
    pub fn restore(&self, options: &[&str]) -> Outcome<String> {
        let imports = options.iter().any(|option| option.starts_with("--import"));
        let name: &[&str] = if imports { &[] } else { &[NAME] };
        let told = self.run(&[&["container", "restore"], options, name].concat())?;
        let step = format!("restore {}", options.join(" "));
        self.is_well(&step)?;
        Ok(told)
    }

    /// Fails unless the container runs, every verb sees it so, and the program inside is well.
    pub fn is_well(&self, event: &str) -> Outcome {
        let (status, pid) = self.inspect()?;
        if status != "running" || pid == 0 {
            return Err(format!("after {event}: the container is {status}, its pid {pid}"));
        }
        self.service.ask(event)?;
        let inside = self.run(&["exec", NAME, "cat", "/proc/1/comm"])?;
        if inside.trim() != "workload" {
            return Err(format!("after {event}: exec printed {inside:?}"));
        }
        Ok(())
    }

    /// The last number that the service has printed, according to the container's log.
    pub fn logged(&self) -> Outcome<u64> {
        let tail = self.run(&["logs", "--tail", "1", NAME])?;
        let number = tail.trim().strip_prefix("count ").and_then(|number| number.parse().ok());
        number.ok_or_else(|| format!("the last line of the log is {tail:?}"))
    }

    /// Where the container's images are, while there are any.
    pub fn images(&self) -> Outcome<PathBuf> {
        let id = self.run(&["inspect", "--format", "{{.ID}}", NAME])?;
        Ok(self.place.path("podman/root/overlay-containers").join(id.trim()).join("userdata/checkpoint"))
    }

    /// Removes the container, running or not.
    pub fn remove(&self) -> Outcome {
        self.run(&["rm", "--force", "--time", "0", NAME]).map(|_| ())
    }

    /// Removes everything; fails if anything is left.
    pub fn end(self) -> Outcome {
        self.remove()?;
        let place = self.place;
        drop(self);
        place.nothing_left()
    }
}

impl Drop for Podman<'_> {
    /// The container goes the way that Podman has for it, the store's own mount and the cgroup above the container by hand: Podman
    /// keeps both for ever.
    fn drop(&mut self) {
        if let Ok(mut command) = self.command() {
            let quiet = command.args(["rm", "--all", "--force", "--time", "0"]).stdin(Stdio::null());
            let _ = quiet.stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        // conmon ends last, after a `podman container cleanup` that it starts.
        let _ = processes::wait_for("conmon to end", || {
            processes::reap();
            processes::below().is_empty()
        });
        let overlay = self.place.path("podman/root/overlay");
        let _ = rustix::mount::unmount(&overlay, rustix::mount::UnmountFlags::DETACH);
        let hierarchies = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        for parent in hierarchies.map(|entry| entry.path().join(self.place.name())) {
            remove_empty(&parent);
        }
    }
}

/// Removes a cgroup and what is below it, as far as it is empty.
fn remove_empty(cgroup: &Path) {
    let entries = std::fs::read_dir(cgroup).into_iter().flatten().flatten();
    entries.filter(|entry| entry.path().is_dir()).for_each(|entry| remove_empty(&entry.path()));
    let _ = std::fs::remove_dir(cgroup);
}
