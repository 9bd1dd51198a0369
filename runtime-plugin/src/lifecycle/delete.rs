//! `ferry delete`, and the removal of a container that other commands end with.

use std::fs;
use std::io;
use std::process::ExitCode;

use clap::Args;

use super::IdArgs;
use crate::cli::Global;
use crate::failure::{Failure, Outcome, sentence_of};
use crate::logs;
use crate::state::{Container, StateError, Status};

/// Flags of `delete`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// Kill what still runs, and say nothing of a container that is not there.
    #[arg(long, short)]
    pub force: bool,
    #[command(flatten)]
    pub id: IdArgs,
}

/// Deletes a stopped or never started container, with `--force` any.
pub fn run(global: &Global, args: &DeleteArgs) -> Outcome {
    let container = match Container::load(&global.root, &args.id.id) {
        Ok(container) => container,
        Err(StateError::Missing { .. }) if args.force => return Ok(ExitCode::SUCCESS),
        Err(error) => return Err(error.into()),
    };
    match container.status {
        Status::Stopped | Status::Created => {}
        _ if args.force => {}
        other => {
            return Err(Failure::new(format!(
                "cannot delete container {} that is not stopped: {other}; kill it first, or use --force",
                container.id
            )));
        }
    }
    destroy(&container)?;
    Ok(ExitCode::SUCCESS)
}

/// Ends what is left of the container's processes and removes its cgroup and state; then its poststop hooks run, of
/// which one that fails is only told of.
///
/// # Errors
/// When something could not be removed. What comes before it is done.
pub fn destroy(container: &Container) -> Result<(), Failure> {
    let hooks = container.hooks();
    container.cgroup.kill()?;
    container.cgroup.remove(&container.cgroup_parents)?;
    match fs::remove_dir_all(&container.directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            let path = container.directory.display();
            return Err(Failure::from(error).context(format_args!("cannot remove the state directory {path}")));
        }
        _ => {}
    }
    for failed in hooks?.run_after_stop(&container.hook_state(ferry_hooks::Status::Stopped)) {
        logs::say(&sentence_of(&failed));
    }
    Ok(())
}
