//! `ferry create` and `ferry run`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::{IdArgs, delete};
use crate::cli::Global;
use crate::console::{Console, Terminal};
use crate::failure::{Failure, Outcome};
use crate::foreground;
use crate::launch::{self, Bundle, Passed};
use crate::pid_file::PidFile;
use crate::state::Container;

/// Flags of `create`, which `run` has too.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Directory of the bundle; the current one by default.
    #[arg(long, short, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// Unix socket that receives the master side of the container's terminal.
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Unix socket that receives a pidfd of the container's first process.
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// File to write the first process's pid to.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Use chroot instead of pivot_root, for a root file system on a ramdisk.
    #[arg(long)]
    pub no_pivot: bool,
    /// Accepted for callers of runc: the caller's session keyring is always kept.
    #[arg(long, hide = true)]
    pub no_new_keyring: bool,
    /// Pass this many more descriptors on, after the standard ones and those of LISTEN_FDS.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: i32,
    #[command(flatten)]
    pub id: IdArgs,
}

/// Flags of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Return when the program has started.
    #[arg(long, short)]
    pub detach: bool,
    /// Keep the container after it has ended.
    #[arg(long)]
    pub keep: bool,
    /// Leave processes that lose their parent to the caller.
    #[arg(long)]
    pub no_subreaper: bool,
    #[command(flatten)]
    pub create: CreateArgs,
}

/// `ferry create`: everything but the program itself.
pub fn create(global: &Global, args: &CreateArgs) -> Outcome {
    let (container, _) = set_up(global, args, true)?;
    announce(args, &container).map_err(|failure| undo(&container, failure))?;
    Ok(ExitCode::SUCCESS)
}

/// `ferry run`: create and start; without `--detach` also wait, and delete.
pub fn run(global: &Global, args: &RunArgs) -> Outcome {
    if !args.detach && !args.no_subreaper {
        foreground::become_subreaper();
    }
    let (container, terminal) = set_up(global, &args.create, args.detach)?;
    let started = announce(&args.create, &container).and_then(|()| run_started(args, &container, terminal));
    let status = started.map_err(|failure| undo(&container, failure))?;
    if !args.detach && !args.keep {
        delete::destroy(&container)?;
    }
    Ok(status)
}

fn run_started(args: &RunArgs, container: &Container, terminal: Option<Terminal>) -> Outcome {
    let init = container.init.ok_or_else(|| Failure::new("the container has no process"))?;
    if args.detach {
        launch::start(container)?;
        return Ok(ExitCode::SUCCESS);
    }
    let signals = foreground::Signals::block()?;
    launch::start(container)?;
    foreground::wait(init.pid, signals, terminal)
}

/// Creates the container with its terminal; the master side comes back when ferry stays in the foreground.
fn set_up(global: &Global, args: &CreateArgs, detached: bool) -> Result<(Container, Option<Terminal>), Failure> {
    let bundle = Bundle::open(args.bundle.as_deref().unwrap_or(".".as_ref()))?;
    let console = Console::open(bundle.wants_terminal(), detached, args.console_socket.as_deref())?;
    let passed = Passed { console: console.socket(), preserve_fds: args.preserve_fds, detached };
    let systemd = global.systemd_cgroup;
    let container = launch::create(&global.root, &args.id.id, &bundle, systemd, args.no_pivot, &passed)?;
    match console.terminal() {
        Ok(terminal) => Ok((container, terminal)),
        Err(error) => Err(undo(&container, error.into())),
    }
}

/// Tells the caller which process it is.
fn announce(args: &CreateArgs, container: &Container) -> Result<(), Failure> {
    let Some(init) = container.init else { return Ok(()) };
    if let Some(socket) = &args.pidfd_socket {
        crate::console::send_pidfd(socket, init.pid)?;
    }
    if let Some(file) = &args.pid_file {
        PidFile::write(file, init.pid, None)?.keep();
    }
    Ok(())
}

/// Takes the container away again after a later step failed.
fn undo(container: &Container, failure: Failure) -> Failure {
    match delete::destroy(container) {
        Ok(()) => failure,
        Err(left) => Failure::new(format!("{failure}; and the container could not be removed: {left}")),
    }
}
