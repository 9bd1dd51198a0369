//! `ferry checkpoint`: saves a running container, of ferry or of runc, and ends it.
//!
//! The order: flags, container, its status, then the dump (`save`), and last the removal of the container unless it goes on.
//! On failure the container runs on as it was found: nothing here changes it before the dump has succeeded.

mod layer;
mod save;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ferry_engine::fault::Fault;
use libcontainer::oci_spec::runtime::Spec;
use serde_json::json;

use crate::cli::Global;
use crate::failure::{Failure, Outcome};
use crate::guard::{self, Worker};
use crate::lifecycle::{IdArgs, delete, print};
use crate::state::{Container, Owner, Status, runc};
use crate::{logs, obstacles};

pub use save::DESCRIPTORS;

/// The archive's name in the bundle, where `restore` looks for it.
pub const ARCHIVE_NAME: &str = "checkpoint.tar";

/// Flags of `checkpoint`: runc's, and ferry's own archive.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// Write a folder of images, as runc does, instead of an archive.
    #[arg(long, value_name = "DIR", conflicts_with = "archive")]
    pub image_path: Option<PathBuf>,
    /// Write the archive here, - for standard output; by default checkpoint.tar in the bundle.
    #[arg(long, value_name = "FILE")]
    pub archive: Option<PathBuf>,
    /// Compress the archive.
    #[arg(long, value_enum, default_value = "none", value_name = "METHOD")]
    pub compress: Compression,
    /// How to tell what was done.
    #[arg(long, value_enum, default_value = "text", value_name = "FORMAT")]
    pub format: SummaryFormat,
    /// Only tell what would keep a checkpoint from succeeding, and what to do about it; the container runs on untouched.
    #[arg(long)]
    pub check: bool,
    /// Directory for logs and statistics; by default that of the images.
    #[arg(long, value_name = "DIR")]
    pub work_path: Option<PathBuf>,
    /// Images of an earlier --pre-dump, relative to --image-path.
    #[arg(long, value_name = "DIR")]
    pub parent_path: Option<PathBuf>,
    /// Let the container run on.
    #[arg(long)]
    pub leave_running: bool,
    /// Allow TCP connections.
    #[arg(long)]
    pub tcp_established: bool,
    /// Leave out TCP connections that are being made.
    #[arg(long)]
    pub tcp_skip_in_flight: bool,
    /// Allow open files that were removed, by giving them a name again.
    #[arg(long)]
    pub link_remap: bool,
    /// Allow connections to Unix sockets outside the container.
    #[arg(long)]
    pub ext_unix_sk: bool,
    /// Allow a session or terminal from outside the container.
    #[arg(long)]
    pub shell_job: bool,
    /// Leave the memory here, and serve it to the restored container page by page.
    #[arg(long)]
    pub lazy_pages: bool,
    /// Descriptor that gets a zero byte when pages can be served.
    #[arg(long, value_name = "FD", default_value_t = -1, hide_default_value = true)]
    pub status_fd: i32,
    /// With --lazy-pages: where its pages can be fetched.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub page_server: Option<String>,
    /// Allow file locks.
    #[arg(long)]
    pub file_locks: bool,
    /// Save the memory only, and let the container run on.
    #[arg(long)]
    pub pre_dump: bool,
    /// Leave out of the archive what the container has changed of its root file system.
    #[arg(long)]
    pub ignore_rootfs: bool,
    /// How cgroups are saved.
    #[arg(long, value_enum, value_name = "MODE")]
    pub manage_cgroups_mode: Option<CgroupsMode>,
    /// Namespace that is restored empty.
    #[arg(long, value_enum, value_name = "NAMESPACE")]
    pub empty_ns: Vec<EmptyNamespace>,
    /// Drop from earlier images what later ones hold.
    #[arg(long)]
    pub auto_dedup: bool,
    /// Let something go wrong, for tests: see ferry criu --list-faults.
    #[arg(long, value_name = "FAULT", hide = true)]
    pub fault: Vec<Fault>,
    #[command(flatten)]
    pub id: IdArgs,
}

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// Not at all.
    None,
    /// Zstandard.
    Zstd,
    /// LZ4 frames.
    Lz4,
}

/// How a summary is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SummaryFormat {
    /// One line.
    Text,
    /// One JSON object.
    Json,
}

/// How cgroups are saved and restored, in CRIU's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CgroupsMode {
    /// Restore what does not exist.
    Soft,
    /// Restore all, with properties.
    Full,
    /// Restore all, and fail where something exists.
    Strict,
    /// Leave cgroups to the runtime.
    Ignore,
}

/// Namespaces that can be restored empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EmptyNamespace {
    /// Its devices and addresses are the manager's.
    Network,
}

/// Where the images go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A folder of image files.
    Folder(PathBuf),
    /// One file, complete or not there at all.
    Archive(PathBuf, Compression),
    /// Standard output.
    Stream(Compression),
}

/// One dump, decided on.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The container, running or paused.
    pub container: &'a Container,
    /// Its config.
    pub spec: &'a Spec,
    /// Where the images go.
    pub destination: Destination,
    /// Where logs and statistics go, if not with the images.
    pub work: Option<PathBuf>,
    /// What was asked for.
    pub args: &'a CheckpointArgs,
    /// Who does it, and is watched over.
    pub worker: &'a Worker,
}

/// What a dump did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Processes saved.
    pub processes: usize,
    /// Memory saved, in bytes.
    pub memory: u64,
    /// How long the container stood still; until its end, if it was ended.
    pub pause: Duration,
    /// Bytes written.
    pub size: u64,
}

/// Saves the container.
pub fn run(global: &Global, args: &CheckpointArgs) -> Outcome {
    if args.check {
        return check(global, args);
    }
    guard::run(|worker| save_container(global, args, worker))
}

fn save_container(global: &Global, args: &CheckpointArgs, worker: &Worker) -> Outcome {
    let container = resolve(global, args)?;
    let spec = container.spec()?;
    let in_parts = [
        ("--pre-dump", args.pre_dump),
        ("--parent-path", args.parent_path.is_some()),
        ("--lazy-pages", args.lazy_pages),
        ("--page-server", args.page_server.is_some()),
    ];
    if let Some((flag, _)) = in_parts.iter().find(|(_, given)| *given && args.image_path.is_none()) {
        return Err(Failure::new(format!("{flag} goes with --image-path: archives hold one set of images, and whole")));
    }
    if args.lazy_pages && (args.pre_dump || args.page_server.is_none()) {
        return Err(Failure::new(
            "--lazy-pages needs --page-server ADDRESS:PORT, where the pages can be fetched, and no --pre-dump",
        ));
    }
    let destination = destination(args, &container.bundle);
    let plan = Plan { container: &container, spec: &spec, destination, work: args.work_path.clone(), args, worker };
    let summary = save::dump_container(&plan)?;
    if !args.leave_running
        && !args.pre_dump
        && let Err(left) = remove(&container)
    {
        // The checkpoint is complete, which is what was asked for.
        logs::say(&format!("the checkpoint is complete, but the container was not removed: {left}"));
    }
    tell(&plan, &summary)?;
    Ok(ExitCode::SUCCESS)
}

/// The container, if its status allows a checkpoint.
fn resolve(global: &Global, args: &CheckpointArgs) -> Result<Container, Failure> {
    refuse("checkpoint", &later_flags(args))?;
    let container = Container::resolve(&global.root, &args.id.id)?;
    if !matches!(container.status, Status::Running | Status::Paused) {
        return Err(Failure::new(format!(
            "container {} cannot be checkpointed: it is {}, and only a running or paused container has a state to save",
            container.id, container.status
        )));
    }
    Ok(container)
}

/// `--check`: exit status 0 when nothing is in the way, 1 otherwise.
fn check(global: &Global, args: &CheckpointArgs) -> Outcome {
    let container = resolve(global, args)?;
    let options = save::options(&container, &container.spec()?, args)?;
    let found = obstacles::find(container.init.map_or(0, |init| init.pid), &options)?;
    print(&match args.format {
        SummaryFormat::Text => obstacles::report(&format!("container {}", container.id), &found),
        SummaryFormat::Json => {
            let told = json!({
                "id": container.id,
                "can_checkpoint": found.is_empty(),
                "obstacles": obstacles::json(&found),
            });
            format!("{told}\n")
        }
    })?;
    Ok(if found.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Flags given whose part of the engine comes later. Those that only permit something are not among them: managers give them to
/// every container, and what needs them is refused where it is found.
fn later_flags(args: &CheckpointArgs) -> Vec<&'static str> {
    // Without lazy pages there is nobody to be told.
    let given = [("--status-fd", args.status_fd >= 0 && !args.lazy_pages)];
    given.into_iter().filter_map(|(name, given)| given.then_some(name)).collect()
}

/// Refuses flags by name, all at once.
///
/// # Errors
/// When there are any.
fn refuse(command: &str, flags: &[&str]) -> Result<(), Failure> {
    match flags {
        [] => Ok(()),
        [flag] => Err(Failure::new(format!("{flag} of {command} is not supported yet: leave it out"))),
        flags => Err(Failure::new(format!("{} of {command} are not supported yet: leave them out", flags.join(", ")))),
    }
}

fn destination(args: &CheckpointArgs, bundle: &Path) -> Destination {
    match (&args.image_path, &args.archive) {
        (Some(folder), _) => Destination::Folder(folder.clone()),
        (None, Some(file)) if file == Path::new("-") => Destination::Stream(args.compress),
        (None, Some(file)) => Destination::Archive(file.clone(), args.compress),
        (None, None) => Destination::Archive(bundle.join(ARCHIVE_NAME), args.compress),
    }
}

/// Removes the container that the dump has ended, as its owner would.
fn remove(container: &Container) -> Result<(), Failure> {
    match container.owner {
        Owner::Ferry => delete::destroy(container),
        Owner::Runc => runc::delete(container),
    }
}

/// Prints what was done. On standard error beside an archive on standard output, and for the callers of runc, which
/// name a folder and pass on to others what a runtime prints.
fn tell(plan: &Plan, summary: &Summary) -> Result<(), Failure> {
    let text = match plan.args.format {
        SummaryFormat::Text => sentence(plan, summary),
        SummaryFormat::Json => report(plan, summary).to_string(),
    };
    match (&plan.destination, plan.args.format) {
        (Destination::Stream(_), _) | (Destination::Folder(_), SummaryFormat::Text) => {
            logs::say(&text);
            Ok(())
        }
        _ => print(&(text + "\n")),
    }
}

fn sentence(plan: &Plan, summary: &Summary) -> String {
    let place = match &plan.destination {
        Destination::Folder(path) | Destination::Archive(path, _) => path.display().to_string(),
        Destination::Stream(_) => "standard output".to_owned(),
    };
    format!(
        "{} {}: {} process{}, {} of memory, paused {:.1} ms, {} written to {place}",
        if plan.args.pre_dump { "pre-dumped" } else { "checkpointed" },
        plan.container.id,
        summary.processes,
        if summary.processes == 1 { "" } else { "es" },
        size(summary.memory),
        summary.pause.as_secs_f64() * 1e3,
        size(summary.size),
    )
}

fn report(plan: &Plan, summary: &Summary) -> serde_json::Value {
    let path = match &plan.destination {
        Destination::Folder(path) | Destination::Archive(path, _) => Some(path),
        Destination::Stream(_) => None,
    };
    json!({
        "id": plan.container.id,
        "processes": summary.processes,
        "memory_bytes": summary.memory,
        "pause_microseconds": u64::try_from(summary.pause.as_micros()).unwrap_or(u64::MAX),
        "size_bytes": summary.size,
        "path": path,
        "left_running": plan.args.leave_running || plan.args.pre_dump,
    })
}

/// A size for people, in powers of 1024.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: CheckpointArgs,
    }

    fn parse(line: &str) -> Result<CheckpointArgs, clap::Error> {
        let words = std::iter::once("checkpoint").chain(line.split_whitespace());
        <Line as clap::Parser>::try_parse_from(words).map(|line| line.args)
    }

    #[test]
    fn images_go_to_the_bundle_unless_told_otherwise() {
        let place = |line: &str| destination(&parse(line).unwrap(), Path::new("/b"));
        assert_eq!(place("c1"), Destination::Archive("/b/checkpoint.tar".into(), Compression::None));
        assert_eq!(place("--image-path /i c1"), Destination::Folder("/i".into()));
        assert_eq!(place("--archive - --compress zstd c1"), Destination::Stream(Compression::Zstd));
        assert_eq!(place("--archive /a c1"), Destination::Archive("/a".into(), Compression::None));
        assert!(parse("--archive /a --image-path /i c1").is_err());
    }

    #[test]
    fn flags_that_come_later_are_refused_together() {
        let args = parse("--page-server h:1 --status-fd 3 --file-locks c1").unwrap();
        let told = refuse("checkpoint", &later_flags(&args)).unwrap_err().to_string();
        assert_eq!(told, "--status-fd of checkpoint is not supported yet: leave it out");
        let args = parse("--lazy-pages --page-server h:1 --status-fd 3 c1").unwrap();
        assert!(refuse("checkpoint", &later_flags(&args)).is_ok());
        assert!(refuse("checkpoint", &later_flags(&parse("--file-locks --shell-job c1").unwrap())).is_ok());
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(size(1023), "1023 bytes");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(3 << 30), "3.0 GiB");
    }
}
