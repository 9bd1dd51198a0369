//! `ferry kill`: a signal to a container.

use std::process::ExitCode;

use clap::Args;
use libcontainer::oci_spec::runtime::LinuxNamespaceType;

use super::IdArgs;
use crate::cli::Global;
use crate::failure::{Failure, Outcome};
use crate::signals::SignalNumber;
use crate::state::{Container, Status};

/// Flags of `kill`.
#[derive(Debug, Args)]
pub struct KillArgs {
    /// Send it to every process of the container, not only to the first.
    #[arg(long, short)]
    pub all: bool,
    #[command(flatten)]
    pub id: IdArgs,
    /// The signal, by name or number.
    #[arg(value_name = "SIGNAL", default_value = "SIGTERM", value_parser = SignalNumber::parse)]
    pub signal: SignalNumber,
}

/// Sends the signal.
pub fn run(global: &Global, args: &KillArgs) -> Outcome {
    let container = Container::load(&global.root, &args.id.id)?;
    let failed = |error: std::io::Error| {
        Failure::from(error).context(format_args!("cannot send the signal to container {}", container.id))
    };
    // SIGKILL to the first process ends the others only where a pid namespace makes it their init.
    let all = args.all || (args.signal == SignalNumber::KILL && !has_own_pids(&container)?);
    if all {
        for pid in container.cgroup.processes()? {
            args.signal.send_if_alive(pid).map_err(failed)?;
        }
    } else {
        match container.init.filter(|_| container.status != Status::Stopped) {
            Some(init) => args.signal.send(init.pid).map_err(failed)?,
            None => return Err(Failure::new(format!("container {} is not running", container.id))),
        }
    }
    // A task frozen by cgroup v1 dies only after the thaw.
    if args.signal == SignalNumber::KILL && container.status == Status::Paused {
        container.cgroup.thaw()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn has_own_pids(container: &Container) -> Result<bool, Failure> {
    let spec = container.spec()?;
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    Ok(namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_none()))
}
