//! What the clients of ferry (runc, Podman, containerd) have in common: a PATH in which ferry is the only `criu`.

use crate::{Outcome, Place, programs};
use std::path::Path;
use std::process::Command;

/// Set: the path of another `criu` for the clients. The tests are tested so.
pub const OVERRIDE: &str = "FERRY_CLIENTS_CRIU";

/// The PATH for clients: before all a folder in which `criu` is ferry, then the system's.
pub fn path(place: &Place) -> Outcome<String> {
    let folder = place.folder("path")?;
    let criu = folder.join("criu");
    if !criu.exists() {
        let engine = std::env::var_os(OVERRIDE).map_or_else(programs::ferry, |path| Ok(path.into()))?;
        std::os::unix::fs::symlink(engine, &criu).map_err(|error| format!("{}: {error}", criu.display()))?;
    }
    Ok(format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()))
}

/// A command of a client's program, with that PATH and no variable of the caller's, which may ask for another configuration.
pub fn command(place: &Place, program: &Path) -> Outcome<Command> {
    let mut command = Command::new(program);
    command.env_clear().env("TMPDIR", place.temporary()).env("HOME", place.path("")).env("PATH", path(place)?);
    Ok(command)
}

/// The last lines of a log that tell of an error, for a message.
pub fn errors(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let errors: Vec<&str> = text.lines().filter(|line| line.to_lowercase().contains("error")).collect();
    let last = &errors[errors.len().saturating_sub(3)..];
    last.iter().map(|line| format!("\n{}: {line}", log.display())).collect()
}
