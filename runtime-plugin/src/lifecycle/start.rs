//! `ferry start`: lets the program of a created container run.

use std::process::ExitCode;

use super::IdArgs;
use crate::cli::Global;
use crate::failure::{Failure, Outcome};
use crate::launch;
use crate::state::{Container, Status};

/// Starts the container; its poststart hooks have run when this returns.
pub fn run(global: &Global, args: &IdArgs) -> Outcome {
    let container = Container::load(&global.root, &args.id)?;
    match container.status {
        Status::Created => launch::start(&container)?,
        Status::Stopped => return Err(Failure::new("cannot start a container that has stopped")),
        Status::Running => return Err(Failure::new("cannot start an already running container")),
        other => return Err(Failure::new(format!("cannot start a container in the {other} state"))),
    }
    Ok(ExitCode::SUCCESS)
}
