//! A container of an OCI runtime: ferry's command line, or another runtime's with the same verbs.

use crate::{Bundle, Outcome, Place, processes, programs};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// Set: folders of tests are not removed, so that logs can be read.
pub const KEEP: &str = "FERRY_TEST_KEEP";

/// A container; ended and deleted when dropped.
pub struct Container<'place> {
    place: &'place Place,
    runtime: PathBuf,
    bundle: PathBuf,
    /// The id.
    pub id: String,
}

impl<'place> Container<'place> {
    /// Starts a container of this bundle with the runtime under test, detached.
    pub fn run(place: &'place Place, bundle: &Bundle) -> Outcome<Self> {
        Self::run_with(place, bundle, programs::runtime()?)
    }

    /// Starts a container of this bundle with some runtime, detached.
    pub fn run_with(place: &'place Place, bundle: &Bundle, runtime: PathBuf) -> Outcome<Self> {
        bundle.write()?;
        let container = Self { place, runtime, bundle: bundle.path.clone(), id: place.name().to_owned() };
        let mut command = container.command("run");
        command.args(["--detach", "--bundle"]).arg(&container.bundle).arg(&container.id);
        container.detached(&mut command)?;
        Ok(container)
    }

    /// The same container under another runtime's command line, with that one's own state folder.
    pub fn seen_by(&self, runtime: PathBuf) -> Self {
        Self { place: self.place, runtime, bundle: self.bundle.clone(), id: self.id.clone() }
    }

    /// The state folder given to the runtime.
    pub fn state_folder(&self) -> PathBuf {
        self.place.path("state")
    }

    /// The runtime's command line up to the verb.
    pub fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.runtime);
        command.arg("--root").arg(self.state_folder()).arg("--log").arg(self.log());
        // runc looks for images below the folder that it is started in.
        command.arg(verb).env("TMPDIR", self.place.temporary()).current_dir(&self.bundle);
        command
    }

    /// Runs a command that starts processes which outlive it and inherit its input and output: /dev/null for all three, since
    /// a pipe of ours would be held open. What the runtime has to say comes from its log.
    fn detached(&self, command: &mut Command) -> Outcome {
        let shown = programs::shown(command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = command.status().map_err(|error| format!("{shown}: {error}"))?;
        if status.success() {
            return Ok(());
        }
        Err(format!("{shown}: {status}\n{}", std::fs::read_to_string(self.log()).unwrap_or_default()))
    }

    fn log(&self) -> PathBuf {
        self.place.path("runtime.log")
    }

    /// Runs a verb on the container that must succeed; returns what it printed.
    pub fn verb(&self, verb: &str, options: &[&str]) -> Outcome<String> {
        programs::succeed(self.command(verb).args(options).arg(&self.id))
    }

    /// Runs a verb on the container, however it ends.
    pub fn try_verb(&self, verb: &str, options: &[&str]) -> Outcome<Output> {
        programs::run(self.command(verb).args(options).arg(&self.id))
    }

    /// Runs a command inside; returns what it printed.
    pub fn exec(&self, words: &[&str]) -> Outcome<String> {
        programs::succeed(self.command("exec").arg(&self.id).args(words))
    }

    /// What `state` tells.
    pub fn state(&self) -> Outcome<serde_json::Value> {
        serde_json::from_str(&self.verb("state", &[])?).map_err(|error| format!("state is no JSON: {error}"))
    }

    /// Fails unless `state` tells this status.
    pub fn is(&self, status: &str) -> Outcome {
        let state = self.state()?;
        if state["status"] == status {
            Ok(())
        } else {
            Err(format!("the container is {}, not {status}", state["status"]))
        }
    }

    /// The host's pid of the container's first process.
    pub fn pid(&self) -> Outcome<i32> {
        let pid = self.state()?["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        pid.filter(|pid| *pid > 0).ok_or_else(|| "state tells no pid".to_owned())
    }

    /// Checkpoints the container and sees that it has gone.
    pub fn checkpoint(&self, options: &[&str]) -> Outcome<String> {
        let tree = processes::tree(self.pid()?);
        let told = self.verb("checkpoint", options)?;
        processes::await_end(&tree).map_err(|error| format!("after the checkpoint: {error}"))?;
        Ok(told)
    }

    /// Restores the container, detached, and sees that it runs.
    pub fn restore(&self, options: &[&str]) -> Outcome {
        let mut command = self.command("restore");
        command.args(["--detach", "--bundle"]).arg(&self.bundle).args(options).arg(&self.id);
        self.detached(&mut command)?;
        self.is("running")
    }

    /// Kills and deletes the container; fails if anything of it is left.
    pub fn end(self) -> Outcome {
        let tree = processes::tree(self.pid()?);
        programs::succeed(self.command("kill").arg(&self.id).arg("KILL"))?;
        processes::await_end(&tree)?;
        self.verb("delete", &[])?;
        let place = self.place;
        drop(self);
        place.nothing_left()
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self.try_verb("delete", &["--force"]);
    }
}
