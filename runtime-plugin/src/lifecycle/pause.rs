//! `ferry pause` and `ferry resume`.

use std::process::ExitCode;

use super::IdArgs;
use crate::cli::Global;
use crate::failure::{Failure, Outcome};
use crate::state::{Container, Status};

/// Freezes every process of the container.
pub fn pause(global: &Global, args: &IdArgs) -> Outcome {
    let container = Container::load(&global.root, &args.id)?;
    match container.status {
        Status::Running | Status::Created => container.cgroup.freeze()?,
        other => return Err(Failure::new(format!("cannot pause container {}: it is {other}", container.id))),
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets them run on.
pub fn resume(global: &Global, args: &IdArgs) -> Outcome {
    let container = Container::load(&global.root, &args.id)?;
    match container.status {
        Status::Paused => container.cgroup.thaw()?,
        // A created container has no status of its own for being frozen.
        Status::Created if container.cgroup.is_frozen() => container.cgroup.thaw()?,
        other => return Err(Failure::new(format!("cannot resume container {}: it is {other}", container.id))),
    }
    Ok(ExitCode::SUCCESS)
}
