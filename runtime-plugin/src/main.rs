//! The `ferry` command: one binary, two faces.
//!
//! Called as `criu`, or as `ferry criu …`, it speaks CRIU's command line (`criu`); otherwise it is an OCI
//! runtime (`cli`), if it was built with the `oci` feature.

#[cfg(feature = "oci")]
mod archive;
#[cfg(feature = "oci")]
mod cgroups;
#[cfg(feature = "oci")]
mod checkpoint;
#[cfg(feature = "oci")]
mod cli;
#[cfg(feature = "oci")]
mod console;
mod criu;
mod ending;
#[cfg(feature = "oci")]
mod externals;
mod failure;
#[cfg(feature = "oci")]
mod foreground;
#[cfg(feature = "oci")]
mod generate;
#[cfg(feature = "oci")]
mod go_flags;
mod guard;
mod guardian;
mod janitor;
#[cfg(feature = "oci")]
mod launch;
mod lazy_watch;
#[cfg(feature = "oci")]
mod lifecycle;
#[cfg_attr(not(feature = "oci"), allow(dead_code, reason = "only the OCI face installs a logger"))]
mod logs;
mod obstacles;
mod own_terminal;
mod pid_file;
mod previous;
#[cfg(feature = "oci")]
mod process;
#[cfg(feature = "oci")]
mod progress;
#[cfg(feature = "oci")]
mod restore;
#[cfg(feature = "oci")]
mod signals;
#[cfg(feature = "oci")]
mod state;
#[cfg(feature = "oci")]
mod user_config;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args: Vec<OsString> = std::env::args_os().collect();
    let called_as_criu = args.first().and_then(|name| Path::new(name).file_name()) == Some(OsStr::new("criu"));
    if called_as_criu {
        return criu::main(args);
    }
    if args.get(1).is_some_and(|first| first == "criu") {
        args.remove(0);
        return criu::main(args);
    }
    oci(args)
}

#[cfg(feature = "oci")]
fn oci(args: Vec<OsString>) -> ExitCode {
    cli::main(args)
}

#[cfg(not(feature = "oci"))]
fn oci(_: Vec<OsString>) -> ExitCode {
    logs::say("this ferry was built without the container lifecycle; it answers to `ferry criu …` only");
    ExitCode::FAILURE
}
