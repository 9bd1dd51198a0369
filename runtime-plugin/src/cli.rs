//! The command line of the OCI runtime: runc's global flags and commands, and what each command is.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::failure::{Failure, Outcome};
use crate::generate::{self, GenerateArgs};
use crate::go_flags;
use crate::lifecycle::{
    IdArgs, create, delete, events, exec, features, kill, list, pause, ps, spec, start, state, update,
};
use crate::logs::{self, LogFormat};
use crate::{checkpoint, restore};

/// Checkpoint, restore and migrate running containers.
#[derive(Debug, Parser)]
#[command(name = "ferry", disable_version_flag = true)]
struct CommandLine {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags before the command.
#[derive(Debug, Args)]
pub struct Global {
    /// Directory of the containers' state; on a tmpfs, so that it ends with the boot.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub root: PathBuf,
    /// Write log lines to this file; the last line at level error tells why a command failed.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Format of log lines.
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Log what is done, not only what fails.
    #[arg(long)]
    pub debug: bool,
    /// Take the bundle's cgroupsPath as slice:prefix:name of systemd.
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Accepted for callers of runc: whether cgroup errors are ignored is found out, not told.
    #[arg(long, value_name = "auto|true|false", default_value = "auto", hide = true)]
    pub rootless: String,
    /// Print the version.
    #[arg(long, short = 'v')]
    pub version: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Set up a container; its program waits for start.
    Create(create::CreateArgs),
    /// Let the program of a created container run.
    Start(IdArgs),
    /// Create a container, start it, and wait for its end.
    Run(create::RunArgs),
    /// Print the state of a container.
    State(IdArgs),
    /// Send a signal to a container.
    Kill(kill::KillArgs),
    /// Remove a stopped container.
    Delete(delete::DeleteArgs),
    /// List the containers.
    List(list::ListArgs),
    /// Run a further process in a container.
    Exec(exec::ExecArgs),
    /// List the processes of a container.
    Ps(ps::PsArgs),
    /// Freeze a container.
    Pause(IdArgs),
    /// Let a frozen container run on.
    Resume(IdArgs),
    /// Print what a container uses, until it ends.
    Events(events::EventsArgs),
    /// Change the limits of a container.
    Update(update::UpdateArgs),
    /// Save a running container, and end it.
    Checkpoint(checkpoint::CheckpointArgs),
    /// Bring a saved container back.
    Restore(restore::RestoreArgs),
    /// Write the config.json of a new bundle.
    Spec(spec::SpecArgs),
    /// Print what this runtime can do.
    Features,
    /// Write man pages or completions, for `make install`.
    #[command(hide = true)]
    Generate(GenerateArgs),
}

/// State lives under `/run/ferry`, or in the caller's runtime directory when that is not root's.
fn default_root() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) if !rustix::process::geteuid().is_root() => PathBuf::from(runtime).join("ferry"),
        _ => PathBuf::from("/run/ferry"),
    }
}

/// Runs one command; `args[0]` is the program's name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let outcome = match parse(args) {
        Ok(Some(line)) => run(line),
        Ok(None) => return ExitCode::SUCCESS,
        Err(failure) => Err(failure),
    };
    match outcome {
        Ok(status) => status,
        Err(failure) => {
            logs::fail(&failure.to_string());
            failure.status()
        }
    }
}

fn run(line: CommandLine) -> Outcome {
    let global = &line.global;
    logs::install(global.log.as_deref(), global.log_format, global.debug).map_err(|error| {
        let path = global.log.clone().unwrap_or_default();
        Failure::from(error).context(format_args!("cannot open the log file {}", path.display()))
    })?;
    match &line.command {
        Command::Create(args) => create::create(global, args),
        Command::Start(args) => start::run(global, args),
        Command::Run(args) => create::run(global, args),
        Command::State(args) => state::run(global, args),
        Command::Kill(args) => kill::run(global, args),
        Command::Delete(args) => delete::run(global, args),
        Command::List(args) => list::run(global, args),
        Command::Exec(args) => exec::run(global, args),
        Command::Ps(args) => ps::run(global, args),
        Command::Pause(args) => pause::pause(global, args),
        Command::Resume(args) => pause::resume(global, args),
        Command::Events(args) => events::run(global, args),
        Command::Update(args) => update::run(global, args),
        Command::Checkpoint(args) => checkpoint::run(global, args),
        Command::Restore(args) => restore::run(global, args),
        Command::Spec(args) => spec::run(args),
        Command::Features => features::run(),
        Command::Generate(args) => generate::run(args, CommandLine::command()),
    }
}

/// Parses the command line; `None` when it was a question that has been answered.
#[allow(clippy::print_stdout, reason = "the answer to a command belongs on standard output")]
fn parse(args: Vec<OsString>) -> Result<Option<CommandLine>, Failure> {
    // A flag given twice is no error for Go's parser, and Podman does give --leave-running twice.
    let names: Vec<String> = CommandLine::command().get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let command = names.iter().fold(CommandLine::command().args_override_self(true), |command, name| {
        command.mut_subcommand(name, |sub| sub.args_override_self(true))
    });
    let args = go_flags::normalise(args, &command);
    // `--version` answers without a command, which clap would ask for.
    if args.get(1).is_some_and(|arg| arg == "--version") {
        println!("ferry version {}\nspec: {}", env!("CARGO_PKG_VERSION"), spec::OCI_VERSION);
        return Ok(None);
    }
    match command.try_get_matches_from(args).and_then(|matches| CommandLine::from_arg_matches(&matches)) {
        Ok(line) => Ok(Some(line)),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                println!("{error}");
                Ok(None)
            }
            _ => Err(Failure::new(usage_sentence(&error))),
        },
    }
}

/// One sentence for a command line that cannot be understood.
///
/// Podman probes `restore --lsm-mount-context` without a value, and looks for `flag needs an argument`.
fn usage_sentence(error: &clap::Error) -> String {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.join(", "),
        _ => String::new(),
    };
    let argument = text(ContextKind::InvalidArg);
    let value = text(ContextKind::InvalidValue);
    let flag = argument.split([' ', '=']).next().unwrap_or_default();
    match error.kind() {
        ErrorKind::InvalidValue if value.is_empty() => format!("flag needs an argument: {flag}"),
        ErrorKind::UnknownArgument => format!("unknown flag or superfluous argument: {argument}"),
        ErrorKind::InvalidSubcommand => {
            format!("there is no command named {}; see `ferry --help`", text(ContextKind::InvalidSubcommand))
        }
        ErrorKind::MissingSubcommand => "no command given; see `ferry --help`".to_owned(),
        ErrorKind::MissingRequiredArgument => format!("missing argument: {argument}"),
        _ => {
            let rendered = error.to_string();
            let first = rendered.lines().next().unwrap_or_default();
            first.strip_prefix("error: ").unwrap_or(first).to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(line: &str) -> String {
        let args = std::iter::once("ferry").chain(line.split_whitespace()).map(OsString::from).collect();
        parse(args).unwrap_err().to_string()
    }

    #[test]
    fn the_definition_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn usage_errors_are_one_sentence() {
        assert_eq!(failure("--root"), "flag needs an argument: --root");
        assert_eq!(failure("spec --bundle"), "flag needs an argument: --bundle");
        assert_eq!(failure("spec -nonsense"), "unknown flag or superfluous argument: -n");
        assert_eq!(failure("fly"), "there is no command named fly; see `ferry --help`");
        assert_eq!(failure("--debug"), "no command given; see `ferry --help`");
    }
}
