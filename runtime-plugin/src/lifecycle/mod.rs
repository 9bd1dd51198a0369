//! The commands of the container lifecycle, one file each.

pub mod create;
pub mod delete;
pub mod events;
pub mod exec;
pub mod features;
pub mod kill;
pub mod list;
pub mod pause;
pub mod ps;
pub mod spec;
pub mod start;
pub mod state;
pub mod update;

use std::path::Path;

use clap::Args;

use crate::failure::Failure;

/// The one argument of most commands.
#[derive(Debug, Args)]
pub struct IdArgs {
    /// The container's name.
    #[arg(value_name = "CONTAINER-ID", value_parser = container_id)]
    pub id: String,
}

/// How a command shows what it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum TableFormat {
    /// Columns for people.
    Table,
    /// One JSON document.
    Json,
}

/// A container's name, checked where it is parsed: it becomes a directory's name.
///
/// # Errors
/// A sentence for people.
pub fn container_id(text: &str) -> Result<String, String> {
    let allowed = |character: char| character.is_ascii_alphanumeric() || "_+-.".contains(character);
    if text.is_empty() || text == "." || text == ".." || !text.chars().all(allowed) {
        return Err("a container's name consists of letters, digits and _ + - . only".to_owned());
    }
    Ok(text.to_owned())
}

/// Writes a pid file in one step, so that a manager that waits for it never reads half of it.
///
/// # Errors
/// When the file cannot be written.
pub fn write_pid_file(path: &Path, pid: i32) -> Result<(), Failure> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let draft = path.with_file_name(format!(".{name}"));
    let written = std::fs::write(&draft, pid.to_string()).and_then(|()| std::fs::rename(&draft, path));
    written.map_err(|error| Failure::from(error).context(format_args!("cannot write the pid file {}", path.display())))
}

/// Prints what was asked for. A reader that has gone away is no failure.
///
/// # Errors
/// What write(2) says otherwise.
pub fn print(text: &str) -> Result<(), Failure> {
    use std::io::{ErrorKind, Write};
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::from(error).context("cannot write to standard output"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_containers_cannot_leave_the_state_directory() {
        assert!(container_id("redis-1.a_b+C").is_ok());
        for bad in ["", ".", "..", "a/b", "a b", "é"] {
            assert!(container_id(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_pid_file_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        std::fs::write(&path, "something longer").unwrap();
        write_pid_file(&path, 42).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "42");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
