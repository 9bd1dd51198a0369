//! CRIU's command line, as the engine under test answers it.

use crate::programs::{ferry, run, said, shown};
use crate::{Outcome, Place};
use std::path::Path;
use std::process::Command;

/// Runs another engine than `ferry criu`: a command with CRIU's options, words separated by spaces. The tests are
/// tested so: `FERRY_CRIU_COMMAND=criu cargo nextest run -p ferry-test-bundles --test host`.
pub const OVERRIDE: &str = "FERRY_CRIU_COMMAND";

/// A command that dumps and restores process trees of the host.
pub struct Engine {
    words: Vec<String>,
}

impl Engine {
    /// `ferry criu`, or the override.
    pub fn under_test() -> Outcome<Self> {
        std::env::var(OVERRIDE).map_or_else(|_| Self::ferry(), |command| Self::command_line(&command))
    }

    /// `ferry criu`.
    pub fn ferry() -> Outcome<Self> {
        Ok(Self { words: vec![ferry()?.to_string_lossy().into_owned(), "criu".to_owned()] })
    }

    /// Another engine's command, words separated by spaces.
    pub fn command_line(command: &str) -> Outcome<Self> {
        let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        if words.is_empty() { Err("the engine's command is empty".to_owned()) } else { Ok(Self { words }) }
    }

    /// Whether this is not Ferry's engine: what only Ferry promises is then not asked for.
    pub fn is_foreign(&self) -> bool {
        std::env::var_os(OVERRIDE).is_some()
    }

    /// The engine's command for one of its verbs on an image folder.
    pub fn command(&self, place: &Place, verb: &str, images: &Path, log: &str) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).arg(verb).arg("-D").arg(images).args(["-o", log, "-v4"]);
        command.env("TMPDIR", place.temporary());
        command
    }

    fn succeed(&self, command: &mut Command, log: &Path) -> Outcome {
        let output = run(command)?;
        if output.status.success() {
            return Ok(());
        }
        let tail = std::fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = tail.lines().collect();
        let tail = lines[lines.len().saturating_sub(25)..].join("\n");
        Err(format!("{}: {}\n{}\n--- {}\n{tail}", shown(command), output.status, said(&output), log.display()))
    }

    /// Dumps the tree of `pid` into a folder.
    pub fn dump(&self, place: &Place, pid: i32, images: &Path, options: &[&str]) -> Outcome {
        let mut command = self.command(place, "dump", images, "dump.log");
        self.succeed(command.args(["-t", &pid.to_string()]).args(options), &images.join("dump.log"))
    }

    /// Saves the memory of the tree of `pid` into a folder, for a later dump.
    pub fn pre_dump(&self, place: &Place, pid: i32, images: &Path, options: &[&str]) -> Outcome {
        let mut command = self.command(place, "pre-dump", images, "dump.log");
        self.succeed(command.args(["--track-mem", "-t", &pid.to_string()]).args(options), &images.join("dump.log"))
    }

    /// Restores the tree of a folder; it runs on by itself.
    pub fn restore(&self, place: &Place, images: &Path, options: &[&str]) -> Outcome {
        let mut command = self.command(place, "restore", images, "restore.log");
        self.succeed(command.arg("-d").args(options), &images.join("restore.log"))
    }
}
