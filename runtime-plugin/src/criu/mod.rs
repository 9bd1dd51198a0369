//! CRIU's command line over ferry's engine.
//!
//! What callers rely on: `criu --version` prints `Version: X`; `check` prints `Looks good.`; a command that failed exits
//! with 1 and its log's last line with level `Error` says why.

mod cgroup_props;
mod cgroups;
mod check;
pub mod config;
mod cpuinfo;
mod dump;
mod freezer;
mod lazy;
mod listen;
mod log;
pub mod lsm;
pub mod options;
mod outside;
mod page_server;
pub mod remote;
mod restore;
mod rpc;
mod stats;
mod words;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ferry_engine::fault::Point;
use ferry_engine::sys::descriptor;
use options::{Options, parse_size};

use crate::failure::{Failure, Outcome};
use crate::guard;

/// The CRIU release whose command line, protocol and image format this face follows.
const CRIU_VERSION: &str = "4.2";

/// Runs one `criu` command; `args[0]` is the program's name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    match options(args).map(|options| (run(&options), options)) {
        Ok((Ok(code), _)) => code,
        Ok((Err(failure), options)) => {
            let sentence = failure.to_string();
            tracing::error!("{sentence}");
            // With a log file, or before there is a log, the terminal would stay silent otherwise.
            if options.log_file.is_some() || !tracing::dispatcher::has_been_set() {
                crate::logs::say(&format!("Error: {sentence}"));
            }
            failure.status()
        }
        Err(code) => code,
    }
}

/// What clap knows of this command line.
#[cfg(feature = "oci")]
pub fn definition() -> clap::Command {
    <Options as clap::CommandFactory>::command()
}

/// The options of a command line and of the configuration files before it; the status to exit with when there are none.
fn options(mut args: Vec<OsString>) -> Result<Options, ExitCode> {
    args.drain(..args.len().min(1));
    let told = |failure: Failure| {
        crate::logs::say(&format!("Error: {failure}"));
        failure.status()
    };
    // Help is given also where a configuration file is wrong.
    let helps = args.iter().take_while(|word| *word != "--").any(|word| word == "-h" || word == "--help");
    let mut words = if helps { Vec::new() } else { config::defaults(&args).map_err(told)? };
    words.append(&mut args);
    Options::parse(words).map_err(|error| {
        let asked = !error.use_stderr();
        let _ = error.print();
        if asked { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    })
}

#[allow(clippy::print_stdout, reason = "the answer to a command belongs on standard output")]
fn run(options: &Options) -> Outcome {
    if options.version {
        println!("Version: {CRIU_VERSION}");
        println!("Ferry {}", env!("CARGO_PKG_VERSION"));
        return Ok(ExitCode::SUCCESS);
    }
    if options.list_faults {
        Point::all().for_each(|point| println!("{point}"));
        return Ok(ExitCode::SUCCESS);
    }
    let Some(command) = options.command.as_deref() else {
        return Err(Failure::new("no command given: use dump, pre-dump, restore or check; see criu --help"));
    };
    let takes_more = options.exec_cmd || matches!(command, "cpuinfo" | "swrk" | "service" | "page-server");
    if let (Some(word), false) = (options.rest.first(), takes_more) {
        return Err(Failure::new(format!("{} is one word too many for {command}", word.to_string_lossy())));
    }
    for descriptor in &options.close {
        nix::unistd::close(*descriptor)
            .map_err(|errno| Failure::new(format!("--close {descriptor}: it cannot be closed: {errno}")))?;
    }
    match command {
        "dump" => {
            let options = begin(options)?;
            guard::run(|worker| dump::run(&options, None, worker).map(|()| ExitCode::SUCCESS))
        }
        "pre-dump" => {
            let options = begin(options)?;
            guard::run(|worker| dump::run_pre_dump(&options, worker).map(|()| ExitCode::SUCCESS))
        }
        "restore" => {
            let options = begin(options)?;
            restore::run(&options, None)?;
            if options.exec_cmd { exec(&options.rest) } else { Ok(ExitCode::SUCCESS) }
        }
        "check" => check::run(options),
        "cpuinfo" => {
            install_log(options)?;
            cpuinfo::run(options)
        }
        "swrk" => rpc::swrk(options),
        "service" => rpc::service(options),
        "exec" => Err(Failure::new("the command exec is not part of CRIU 4 any more, nor of ferry")),
        "show" => Err(Failure::new("the command show is not part of CRIU 4 any more: crit decode shows images")),
        "lazy-pages" => lazy::run(&begin(options)?),
        "page-server" if options.lazy_pages => lazy::serve_images(&begin(options)?),
        "page-server" => page_server::run(options),
        "dedup" => Err(Failure::new(format!("ferry does not support the command {command} yet"))),
        other => {
            Err(Failure::new(format!("unknown command {other}: use dump, pre-dump, restore or check; see criu --help")))
        }
    }
}

/// What stands before every dump and restore: the log, the work folder, and what these options cannot mean. Relative paths are from the
/// work folder then, as with CRIU, but for the folder of the images.
fn begin(options: &Options) -> Result<Options, Failure> {
    let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    let mut options = options.clone();
    options.images_dir = Some(absolute(images_dir(&options).to_owned()));
    options.work_dir = Some(absolute(work_dir(&options)));
    let work_dir = work_dir(&options);
    install_log(&options)?;
    std::env::set_current_dir(&work_dir)
        .map_err(|error| Failure::from(error).context(format!("cannot change to {}", work_dir.display())))?;
    let unsupported = options.unsupported();
    if !unsupported.is_empty() {
        return Err(Failure::new(format!("ferry does not support {} yet", unsupported.join(", "))));
    }
    let of_restores = [
        ("--inherit-fd", !options.inherit_fd.is_empty()),
        ("--join-ns", !options.join_ns.is_empty()),
        ("--mntns-compat-mode", options.mntns_compat_mode),
        ("--exec-cmd", options.exec_cmd),
    ];
    let misplaced = of_restores.iter().find(|(_, given)| *given && options.command.as_deref() != Some("restore"));
    if let Some((name, _)) = misplaced {
        return Err(Failure::new(format!("{name} is for restore only")));
    }
    if options.lazy_pages && options.command.as_deref() == Some("pre-dump") {
        return Err(Failure::new("--lazy-pages is not for pre-dump: it is memory that a pre-dump writes"));
    }
    if options.prev_images_dir.is_some() && options.command.as_deref() == Some("restore") {
        return Err(Failure::new(
            "--prev-images-dir is for dump and pre-dump only: a restore follows the link to the parent images",
        ));
    }
    if options.page_server && options.command.as_deref() == Some("restore") {
        return Err(Failure::new("--page-server is for dump and pre-dump only: a restore reads images of one folder"));
    }
    if options.restore_sibling && !options.restore_detached {
        return Err(Failure::new("--restore-sibling is for --restore-detached only"));
    }
    if options.exec_cmd && (options.restore_detached || options.rest.is_empty()) {
        return Err(Failure::new("--exec-cmd wants a command after --, and no --restore-detached"));
    }
    Ok(options)
}

/// Becomes the command that was given; the restored root is its child.
fn exec(command: &[OsString]) -> Outcome {
    let Some((program, arguments)) = command.split_first() else { return Ok(ExitCode::SUCCESS) };
    let error = std::process::Command::new(program).args(arguments).exec();
    Err(Failure::from(error).context(format!("the tree runs, but {} cannot be started", program.to_string_lossy())))
}

/// The log file that `-o` names.
fn log_path(options: &Options) -> Option<PathBuf> {
    let mut file = options.log_file.clone()?;
    if options.log_pid {
        file.as_mut_os_string().push(format!(".{}", std::process::id()));
    }
    Some(work_dir(options).join(file))
}

/// Sends the log where `-o` says: into the work folder, which is the image folder unless given.
fn install_log(options: &Options) -> Result<(), Failure> {
    let file = log_path(options);
    log::install(file.as_deref(), options.log_level()).map_err(|error| {
        let path = file.unwrap_or_default();
        Failure::new(format!("cannot create the log file {}: {error}", path.display()))
    })
}

/// Writes a file that takes the place of whatever has its name, a link included.
fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).open(path)?.write_all(content)
}

/// Tells whoever waits that somebody can connect to the process `pid`, by `--pidfile` and `--status-fd`.
fn ready(options: &Options, pid: u32) -> Result<(), Failure> {
    if let Some(file) = &options.pidfile {
        write_new(file, pid.to_string().as_bytes())
            .map_err(|error| Failure::from(error).context(format!("--pidfile {}", file.display())))?;
    }
    options.status_fd.map_or(Ok(()), tell_ready)
}

/// Writes the byte that says that others may begin.
///
/// # Errors
/// The descriptor is none that can be written to.
pub fn tell_ready(number: i32) -> Result<(), Failure> {
    let told = descriptor::take(number).map_err(io::Error::from);
    told.and_then(|status| File::from(status).write_all(&[0]))
        .map_err(|error| Failure::from(error).context(format!("--status-fd {number}: nothing can be written there")))
}

/// Where logs and statistics go.
fn work_dir(options: &Options) -> PathBuf {
    options.work_dir.clone().unwrap_or_else(|| images_dir(options).to_owned())
}

/// Where images are.
fn images_dir(options: &Options) -> &Path {
    options.images_dir.as_deref().unwrap_or(Path::new("."))
}
