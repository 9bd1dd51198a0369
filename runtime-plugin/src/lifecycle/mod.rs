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
}
