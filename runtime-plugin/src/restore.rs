//! `ferry restore`: brings a container back from an archive or a folder of images.
//!
//! The order: flags, bundle, source; then the name and the cgroup with its limits; the tree (`load`); and the state
//! that makes every other command work on the container. On failure neither process, cgroup nor state is left.

mod config;
mod layer;
mod load;
mod mountpoints;
mod remains;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use ferry_engine::fault::Fault;
use ferry_engine::sys::HostPid;
use libcontainer::container::ContainerStatus;
use libcontainer::oci_spec::runtime::Spec;
use remains::Remains;

use crate::cgroups::ContainerCgroup;
use crate::checkpoint::{ARCHIVE_NAME, CgroupsMode, EmptyNamespace, SummaryFormat};
use crate::cli::Global;
use crate::console::{Console, send_pidfd};
use crate::criu::lsm;
use crate::failure::{Failure, Outcome};
use crate::foreground;
use crate::launch::Bundle;
use crate::lifecycle::{IdArgs, delete, print};
use crate::pid_file::PidFile;
use crate::state::{Container, NewContainer, hooks_of};
use mountpoints::Mountpoints;

/// The folder in the current directory that runc's checkpoint writes when it is not told where.
const RUNC_FOLDER: &str = "checkpoint";

/// Flags of `restore`: runc's, those that conmon adds, and ferry's own archive.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Read a folder of images, as runc writes it.
    #[arg(long, value_name = "DIR", conflicts_with = "archive")]
    pub image_path: Option<PathBuf>,
    /// Read this archive, - for standard input; by default checkpoint.tar in the bundle.
    #[arg(long, value_name = "FILE")]
    pub archive: Option<PathBuf>,
    /// How to tell what was done.
    #[arg(long, value_enum, default_value = "text", value_name = "FORMAT")]
    pub format: SummaryFormat,
    /// Leave the root file system as the bundle has it, whatever the archive says that the container has changed of it.
    #[arg(long)]
    pub ignore_rootfs: bool,
    /// Unix socket that receives the master side of the container's terminal.
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Unix socket that receives a pidfd of the container's first process.
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// Directory for logs and statistics; by default that of the images.
    #[arg(long, value_name = "DIR")]
    pub work_path: Option<PathBuf>,
    /// Accepted for callers of runc: images name their parent themselves.
    #[arg(long, value_name = "DIR", hide = true)]
    pub parent_path: Option<PathBuf>,
    /// Allow TCP connections.
    #[arg(long)]
    pub tcp_established: bool,
    /// Restore TCP connections as closed.
    #[arg(long)]
    pub tcp_close: bool,
    /// Allow connections to Unix sockets outside the container.
    #[arg(long)]
    pub ext_unix_sk: bool,
    /// Allow a session or terminal from outside the container.
    #[arg(long)]
    pub shell_job: bool,
    /// Allow file locks.
    #[arg(long)]
    pub file_locks: bool,
    /// How cgroups are restored.
    #[arg(long, value_enum, value_name = "MODE")]
    pub manage_cgroups_mode: Option<CgroupsMode>,
    /// Directory of the bundle; the current one by default.
    #[arg(long, short, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// Return when the container runs.
    #[arg(long, short)]
    pub detach: bool,
    /// File to write the first process's pid to.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Leave processes that lose their parent to the caller.
    #[arg(long)]
    pub no_subreaper: bool,
    /// Accepted for callers of runc: the root is restored as it was.
    #[arg(long, hide = true)]
    pub no_pivot: bool,
    /// Accepted for callers of runc: the caller's session keyring is always kept.
    #[arg(long, hide = true)]
    pub no_new_keyring: bool,
    /// Accepted for conmon: descriptors come from the images.
    #[arg(long, value_name = "N", default_value_t = 0, hide = true)]
    pub preserve_fds: i32,
    /// Keep the container after it has ended.
    #[arg(long)]
    pub keep: bool,
    /// Namespace that is restored empty.
    #[arg(long, value_enum, value_name = "NAMESPACE")]
    pub empty_ns: Vec<EmptyNamespace>,
    /// Free the images' memory while it is restored.
    #[arg(long)]
    pub auto_dedup: bool,
    /// Start before the memory is there. ferry criu lazy-pages brings it, whose socket is in --work-path or else --image-path.
    #[arg(long)]
    pub lazy_pages: bool,
    /// Profile of a security module, as TYPE:NAME.
    #[arg(long, value_name = "TYPE:NAME")]
    pub lsm_profile: Option<String>,
    /// SELinux context of mounts.
    #[arg(long, value_name = "CONTEXT")]
    pub lsm_mount_context: Option<String>,
    /// Let something go wrong, for tests: see ferry criu --list-faults.
    #[arg(long, value_name = "FAULT", hide = true)]
    pub fault: Vec<Fault>,
    #[command(flatten)]
    pub id: IdArgs,
}

/// Where the images come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder of image files.
    Folder(PathBuf),
    /// One file; how it is compressed is seen from its content.
    Archive(PathBuf),
    /// Standard input.
    Stream,
}

/// One restore, decided on.
pub struct Plan<'a> {
    /// Its cgroup.
    pub cgroup: ContainerCgroup,
    /// The bundle.
    pub bundle: &'a Bundle,
    /// Where the images come from.
    pub source: Source,
    /// Where logs and statistics go, if not with the images.
    pub work: Option<PathBuf>,
    /// What is told of everything that the restore leaves if it is cut short.
    pub remains: &'a Remains,
    /// Where the master side of its terminal goes.
    pub console: &'a Console,
    /// What was asked for.
    pub args: &'a RestoreArgs,
}

/// Restores the container.
pub fn run(global: &Global, args: &RestoreArgs) -> Outcome {
    lsm::check(args.lsm_profile.as_deref())?;
    let bundle = Bundle::open(args.bundle.as_deref().unwrap_or(".".as_ref()))?;
    let source = source(args, &bundle.directory)?;
    let console = Console::open(bundle.wants_terminal(), args.detach, args.console_socket.as_deref())?;
    if !args.detach && !args.no_subreaper {
        foreground::become_subreaper();
    }
    let container = bring_back(global, args, &bundle, source, &console)?;
    let status = stay(args, &container, console).map_err(|failure| match delete::destroy(&container) {
        Ok(()) => failure,
        Err(left) => Failure::new(format!("{failure}; and the container could not be removed: {left}")),
    })?;
    if !args.detach && !args.keep {
        delete::destroy(&container)?;
    }
    Ok(status)
}

/// Makes the name and the cgroup, the tree, and the state of the container that runs. Whatever ends it before its end, ferry's
/// death too, nothing of that is left.
fn bring_back(
    global: &Global,
    args: &RestoreArgs,
    bundle: &Bundle,
    source: Source,
    console: &Console,
) -> Result<Container, Failure> {
    // Whoever has the name has the cgroup too, which is the lesser news.
    NewContainer::look(&global.root, &args.id.id)?;
    let cgroup = ContainerCgroup::of_spec(&bundle.spec, &args.id.id, global.systemd_cgroup)?;
    let spec = bundle.spec_with_cgroup(&cgroup);
    let remains = Remains::watch(args, bundle, &cgroup, &hooks_of(&spec, &bundle.directory)?)?;
    let plan = Plan { cgroup, bundle, source, work: args.work_path.clone(), remains: &remains, console, args };
    let made = make(global, &plan, &spec);
    if made.is_err() {
        remains.undo_hooks();
    }
    made
}

/// Makes all of the container. What it has made until it fails, it takes away.
fn make(global: &Global, plan: &Plan, spec: &Spec) -> Result<Container, Failure> {
    let (args, bundle, janitor) = (plan.args, plan.bundle, plan.remains.janitor());
    let cgroup = plan.cgroup.clone();
    let mut new = NewContainer::claim(&global.root, &args.id.id, &bundle.directory, spec, cgroup, Some(janitor))?;
    plan.remains.cgroup()?;
    new.cgroup().create(spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()))?;
    let rootfs = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
    let mountpoints = Mountpoints::make(spec, &bundle.directory, &rootfs, Some(janitor))?;
    let mut pid_file = None;
    // The last steps that may fail, when all is there and nothing runs yet.
    let mut complete = |root: HostPid| -> Result<(), Failure> {
        new.record(root.0, ContainerStatus::Running)?;
        if let Some(file) = &args.pid_file {
            pid_file = Some(PidFile::write(file, root.0, Some(janitor))?);
        }
        match &args.pidfd_socket {
            Some(socket) => Ok(send_pidfd(socket, root.0)?),
            None => Ok(()),
        }
    };
    load::restore_tree(plan, &mut complete)?;
    let container = new.keep_recorded()?;
    mountpoints.keep();
    pid_file.into_iter().for_each(PidFile::keep);
    Ok(container)
}

/// What was named; else the archive in the bundle; else the folder that runc would take.
fn source(args: &RestoreArgs, bundle: &Path) -> Result<Source, Failure> {
    let (given, source) = match (&args.image_path, &args.archive) {
        (Some(folder), _) => (folder.clone(), Source::Folder(folder.clone())),
        (None, Some(file)) if file == Path::new("-") => return Ok(Source::Stream),
        (None, Some(file)) => (file.clone(), Source::Archive(file.clone())),
        (None, None) => {
            let archive = bundle.join(ARCHIVE_NAME);
            let folder = Path::new(RUNC_FOLDER);
            if !archive.exists() && folder.is_dir() {
                (folder.to_owned(), Source::Folder(folder.to_owned()))
            } else {
                (archive.clone(), Source::Archive(archive))
            }
        }
    };
    match (&source, given.is_dir()) {
        _ if !given.exists() => Err(Failure::new(format!(
            "there is no checkpoint at {}: give --archive FILE or --image-path DIR",
            given.display()
        ))),
        (Source::Folder(_), false) => {
            Err(Failure::new(format!("{} is no folder of images: give it as --archive", given.display())))
        }
        (Source::Archive(_), true) => {
            Err(Failure::new(format!("{} is a folder: give it as --image-path", given.display())))
        }
        _ => Ok(source),
    }
}

/// Waits for the container's end, unless it is to run on alone.
fn stay(args: &RestoreArgs, container: &Container, console: Console) -> Outcome {
    let init = container.init.ok_or_else(|| Failure::new("the container has no process"))?;
    if args.detach {
        if args.format == SummaryFormat::Json {
            print(&format!("{}\n", serde_json::json!({"id": container.id, "pid": init.pid})))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    std::io::stdout().flush()?;
    let signals = foreground::Signals::block()?;
    foreground::wait(init.pid, signals, console.terminal()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: RestoreArgs,
    }

    fn parse(line: &str) -> RestoreArgs {
        let words = std::iter::once("restore").chain(line.split_whitespace());
        <Line as clap::Parser>::try_parse_from(words).unwrap().args
    }

    #[test]
    fn the_source_must_be_what_it_is_called() {
        let bundle = tempfile::tempdir().unwrap();
        let folder = bundle.path().display().to_string();
        let told = |line: &str| source(&parse(line), bundle.path()).unwrap_err().to_string();
        assert!(told("--archive /no/such/file c1").contains("there is no checkpoint at /no/such/file"));
        assert!(told(&format!("--archive {folder} c1")).contains("is a folder"));
        assert_eq!(source(&parse("--archive - c1"), bundle.path()).unwrap(), Source::Stream);
        let archive = bundle.path().join(ARCHIVE_NAME);
        std::fs::write(&archive, "").unwrap();
        assert_eq!(source(&parse("c1"), bundle.path()).unwrap(), Source::Archive(archive.clone()));
        assert!(told(&format!("--image-path {} c1", archive.display())).contains("is no folder"));
    }

    #[test]
    fn the_flags_of_every_caller_are_known() {
        parse(
            "--bundle /b --pid-file /p --no-pivot --no-new-keyring --detach --image-path /i --work-path /b --file-locks c1",
        );
        parse("--image-path /i --work-path /w --detach --pid-file /p --no-subreaper --bundle /b c1");
        parse("--tcp-close --lsm-mount-context=x --manage-cgroups-mode ignore --empty-ns network --lazy-pages c1");
    }
}
