//! CRIU's command line over ferry's engine.

use std::ffi::OsString;
use std::process::ExitCode;

/// The CRIU release whose command line, protocol and image format this face follows.
const CRIU_VERSION: &str = "4.2";

/// Runs one `criu` command; `args[0]` is the program's name.
#[allow(clippy::print_stdout, reason = "the answer to a command belongs on standard output")]
pub fn main(args: Vec<OsString>) -> ExitCode {
    let command = clap::Command::new("criu").disable_version_flag(true).arg(
        clap::Arg::new("version").long("version").short('V').action(clap::ArgAction::SetTrue).help("print the version"),
    );
    match command.try_get_matches_from(args) {
        Ok(matches) if matches.get_flag("version") => {
            println!("Version: {CRIU_VERSION}");
            println!("Ferry {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(_) => {
            crate::logs::say("no criu command given; see `criu --help`");
            ExitCode::FAILURE
        }
        Err(error) => {
            let asked = !error.use_stderr();
            let _ = error.print();
            if asked { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}
