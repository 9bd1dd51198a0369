//! A container of an OCI runtime: ferry's command line, or another runtime's with the same verbs.

use crate::{Bundle, Outcome, Place, client, processes, programs};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// Set: folders of tests are not removed, so that logs can be read.
pub const KEEP: &str = "FERRY_TEST_KEEP";

/// A container; ended and deleted when dropped.
pub struct Container<'place> {
    place: &'place Place,
    runtime: PathBuf,
    root: Option<PathBuf>,
    path: String,
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// The id.
    pub id: String,
}

impl<'place> Container<'place> {
    /// Starts a container of this bundle with the runtime under test, detached.
    pub fn run(place: &'place Place, bundle: &Bundle) -> Outcome<Self> {
        Self::run_with(place, bundle, programs::runtime()?)
    }

    /// Starts a container of this bundle with some runtime, detached. The state of one that is not under test lies where it
    /// keeps it by itself, so that others find it.
    pub fn run_with(place: &'place Place, bundle: &Bundle, runtime: PathBuf) -> Outcome<Self> {
        Self::run_options(place, bundle, runtime, &[])
    }

    /// The same with options of `run`.
    pub fn run_options(place: &'place Place, bundle: &Bundle, runtime: PathBuf, options: &[&str]) -> Outcome<Self> {
        let container = Self::prepare(place, bundle, runtime)?;
        let mut command = container.command("run");
        command.arg("--detach").arg("--bundle").arg(&container.bundle).args(options).arg(&container.id);
        container.detached(&mut command)?;
        Ok(container)
    }

    /// Creates a container of this bundle with the runtime under test, and does not start it.
    pub fn create(place: &'place Place, bundle: &Bundle) -> Outcome<Self> {
        let container = Self::prepare(place, bundle, programs::runtime()?)?;
        container.detached(container.command("create").arg("--bundle").arg(&container.bundle).arg(&container.id))?;
        Ok(container)
    }

    fn prepare(place: &'place Place, bundle: &Bundle, runtime: PathBuf) -> Outcome<Self> {
        bundle.write()?;
        let root = (runtime == programs::runtime()?).then(|| place.path("state"));
        let path = client::path(place)?;
        Ok(Self { place, runtime, root, path, bundle: bundle.path.clone(), id: place.name().to_owned() })
    }

    /// The same container under another runtime's command line.
    pub fn seen_by(&self, runtime: PathBuf) -> Self {
        let (path, bundle, id) = (self.path.clone(), self.bundle.clone(), self.id.clone());
        Self { place: self.place, runtime, root: None, path, bundle, id }
    }

    /// The runtime's command line up to the verb.
    pub fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.runtime);
        match &self.root {
            Some(root) => command.arg("--root").arg(root),
            // Other runtimes look for criu, which shall be ferry.
            None => command.env("PATH", &self.path),
        };
        // runc looks for images below the folder that it is started in.
        command.arg("--log").arg(self.log()).arg(verb).env("TMPDIR", self.place.temporary()).current_dir(&self.bundle);
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

/// Runs a command that must be refused: exit status 1, and one sentence on standard error, which contains these words.
/// Returns the sentence.
pub fn refusal(command: &mut Command, words: &[&str]) -> Outcome<String> {
    let shown = programs::shown(command);
    let output = programs::run(command)?;
    let told = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.code() != Some(1) {
        return Err(format!("{shown}: {} instead of exit status 1: {told}", output.status));
    }
    if told.is_empty() || told.lines().count() != 1 {
        return Err(format!("{shown}: not one sentence: {told:?}"));
    }
    match words.iter().find(|word| !told.to_lowercase().contains(&word.to_lowercase())) {
        None => Ok(told),
        Some(word) => Err(format!("{shown}: the sentence does not say {word:?}: {told}")),
    }
}
