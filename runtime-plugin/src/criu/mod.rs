//! CRIU's command line over ferry's engine.
//!
//! What callers rely on: `criu --version` prints `Version: X`; `check` prints `Looks good.`; a command that failed exits
//! with 1 and its log's last line with level `Error` says why.

mod cgroups;
pub mod config;
mod dump;
mod freezer;
mod listen;
mod log;
pub mod options;
mod restore;
mod rpc;
mod words;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ferry_engine::fault::Point;
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
            // With a log file the terminal would stay silent otherwise.
            if options.log_file.is_some() {
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
        return Err(Failure::new("no command given: use dump, restore or check; see criu --help"));
    };
    match command {
        "dump" | "restore" => {
            install_log(options)?;
            let unsupported = options.unsupported();
            if !unsupported.is_empty() {
                return Err(Failure::new(format!("ferry does not support {} yet", unsupported.join(", "))));
            }
            if command == "dump" {
                return guard::run(|worker| dump::run(options, None, worker).map(|()| ExitCode::SUCCESS));
            }
            restore::run(options, None)?;
            Ok(ExitCode::SUCCESS)
        }
        "check" => check(options),
        "swrk" => rpc::swrk(options),
        "service" => rpc::service(options),
        "pre-dump" | "page-server" | "lazy-pages" | "exec" | "dedup" | "cpuinfo" => {
            Err(Failure::new(format!("ferry does not support the command {command} yet")))
        }
        other => Err(Failure::new(format!("unknown command {other}: use dump, restore or check; see criu --help"))),
    }
}

/// Sends the log where `-o` says: into the work folder, which is the image folder unless given.
fn install_log(options: &Options) -> Result<(), Failure> {
    let file = options.log_file.as_ref().map(|file| {
        let mut file = file.clone();
        if options.log_pid {
            file.as_mut_os_string().push(format!(".{}", std::process::id()));
        }
        work_dir(options).join(file)
    });
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

/// Where logs and statistics go.
fn work_dir(options: &Options) -> PathBuf {
    options.work_dir.clone().unwrap_or_else(|| images_dir(options).to_owned())
}

/// Where images are.
fn images_dir(options: &Options) -> &Path {
    options.images_dir.as_deref().unwrap_or(Path::new("."))
}

/// Features that `criu check --feature` is asked for, and whether this engine and kernel have them.
///
/// `check` alone tells whether what every dump needs is there: ptrace on others' tasks and `/proc/PID/map_files`.
#[allow(clippy::print_stdout, reason = "the answer to a command belongs on standard output")]
fn check(options: &Options) -> Outcome {
    if let Some(feature) = options.feature.last() {
        let present = match feature.as_str() {
            "mnt_id"
            | "aio_remap"
            | "fdinfo_lock"
            | "seccomp_filters"
            | "seccomp_suspend"
            | "loginuid"
            | "cgroupns"
            | "sk_unix_file"
            | "rseq"
            | "get_rseq_conf"
            | "clone3_set_tid"
            | "pagemap_scan"
            | "move_mount_set_group" => true,
            "timens" => Path::new("/proc/self/ns/time").exists(),
            _ => false,
        };
        return if present { Ok(ExitCode::SUCCESS) } else { Ok(ExitCode::FAILURE) };
    }
    ferry_engine::preflight::check_host()?;
    println!("Looks good.");
    Ok(ExitCode::SUCCESS)
}
