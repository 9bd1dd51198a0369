//! `ferry exec`: a further process in a running container.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use libcontainer::oci_spec::runtime::{Capability, Process, Spec};

use super::IdArgs;
use crate::cli::Global;
use crate::console::{Console, send_pidfd};
use crate::failure::{Failure, Outcome};
use crate::foreground;
use crate::launch::{self, Passed, Tenant};
use crate::pid_file::PidFile;
use crate::state::{Container, Status};

/// The exit status when the process could not be started, which tells it from a process that exits with 1.
const NOT_STARTED: u8 = 255;

/// Flags of `exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Unix socket that receives the master side of the terminal.
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Unix socket that receives a pidfd of the process.
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// Working directory in the container.
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// Set a variable of the environment.
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Give the process a terminal.
    #[arg(long, short)]
    pub tty: bool,
    /// Run as this user.
    #[arg(long, short, value_name = "UID[:GID]", value_parser = user)]
    pub user: Option<(u32, Option<u32>)>,
    /// Further groups of the user.
    #[arg(long, short = 'g', value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// File with the process as in a config's section process; the other flags do not count then.
    #[arg(long, short, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Return when the program has started.
    #[arg(long, short)]
    pub detach: bool,
    /// File to write the process's pid to.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Label of SELinux.
    #[arg(long, value_name = "LABEL")]
    pub process_label: Option<String>,
    /// Profile of AppArmor.
    #[arg(long, value_name = "PROFILE")]
    pub apparmor: Option<String>,
    /// Set no_new_privs.
    #[arg(long)]
    pub no_new_privs: bool,
    /// Add a capability.
    #[arg(long, short, value_name = "CAP_NAME")]
    pub cap: Vec<String>,
    /// Pass this many more descriptors on, after the standard ones and those of LISTEN_FDS.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: i32,
    /// Run in an existing cgroup below the container's.
    #[arg(long, value_name = "PATH")]
    pub cgroup: Vec<String>,
    /// Also in a paused container, whose new process then waits too.
    #[arg(long)]
    pub ignore_paused: bool,
    #[command(flatten)]
    pub id: IdArgs,
    /// The program and its arguments.
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<String>,
}

/// Runs the process; its exit status is the command's.
pub fn run(global: &Global, args: &ExecArgs) -> Outcome {
    start_and_wait(global, args).map_err(|failure| failure.with_status(NOT_STARTED))
}

fn start_and_wait(global: &Global, args: &ExecArgs) -> Outcome {
    let container = Container::load(&global.root, &args.id.id)?;
    match container.status {
        Status::Running | Status::Created => {}
        Status::Paused if args.ignore_paused => {}
        Status::Paused => {
            return Err(Failure::new("cannot exec in a paused container (use --ignore-paused to override)"));
        }
        other => return Err(Failure::new(format!("cannot exec in a {other} container"))),
    }
    let spec = container.spec()?;
    let process = process(args, &spec)?;
    let console = Console::open(process.terminal().unwrap_or(false), args.detach, args.console_socket.as_deref())?;
    let passed = Passed { console: console.socket(), preserve_fds: args.preserve_fds, detached: args.detach };
    let sub_cgroup = sub_cgroup(&args.cgroup)?;
    let pid = launch::exec(Tenant { container: &container, spec, process, sub_cgroup, passed })?;
    if let Some(socket) = &args.pidfd_socket {
        send_pidfd(socket, pid)?;
    }
    if let Some(file) = &args.pid_file {
        PidFile::write(file, pid, None)?.keep();
    }
    if args.detach {
        return Ok(ExitCode::SUCCESS);
    }
    foreground::wait(pid, foreground::Signals::block()?, console.terminal()?)
}

/// The process of the file, or that of the container's config changed by the flags.
fn process(args: &ExecArgs, spec: &Spec) -> Result<Process, Failure> {
    let process = match &args.process {
        Some(path) => read_process(path)?,
        None => {
            let process =
                spec.process().clone().ok_or_else(|| Failure::new("the container's config has no process"))?;
            changed(args, process)?
        }
    };
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Failure::new("no program given: exec args cannot be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(Failure::new(format!("the working directory {} is no absolute path", process.cwd().display())));
    }
    Ok(process)
}

fn read_process(path: &PathBuf) -> Result<Process, Failure> {
    let told = |failure: Failure| failure.context(format_args!("cannot read the process file {}", path.display()));
    let text = fs::read(path).map_err(|error| told(error.into()))?;
    serde_json::from_slice(&text).map_err(|error| told(error.into()))
}

fn changed(args: &ExecArgs, mut process: Process) -> Result<Process, Failure> {
    process.set_args(Some(args.args.clone())).set_terminal(Some(args.tty));
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(args.env.iter().cloned());
    process.set_env(Some(env));
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    if let Some(profile) = &args.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if let Some(label) = &args.process_label {
        process.set_selinux_label(Some(label.clone()));
    }
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    let mut user = process.user().clone();
    if let Some((uid, gid)) = args.user {
        user.set_uid(uid);
        if let Some(gid) = gid {
            user.set_gid(gid);
        }
    }
    if !args.additional_gids.is_empty() {
        let mut groups = user.additional_gids().clone().unwrap_or_default();
        groups.extend(&args.additional_gids);
        user.set_additional_gids(Some(groups));
    }
    process.set_user(user);
    add_capabilities(&mut process, &args.cap)?;
    Ok(process)
}

/// Adds to the sets that runc adds to: never to the inheritable one, to the ambient one only if that is in use.
fn add_capabilities(process: &mut Process, names: &[String]) -> Result<(), Failure> {
    if names.is_empty() {
        return Ok(());
    }
    let mut added = Vec::new();
    for name in names {
        let value = serde_json::Value::String(name.to_ascii_uppercase());
        let capability: Capability =
            serde_json::from_value(value).map_err(|_| Failure::new(format!("there is no capability {name}")))?;
        added.push(capability);
    }
    let mut sets = process.capabilities().clone().unwrap_or_default();
    let with = |set: &Option<std::collections::HashSet<Capability>>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(added.iter().copied());
        Some(set)
    };
    let (bounding, effective, permitted) = (with(sets.bounding()), with(sets.effective()), with(sets.permitted()));
    let ambient = if sets.inheritable().is_some() { with(sets.ambient()) } else { sets.ambient().clone() };
    sets.set_bounding(bounding).set_effective(effective).set_permitted(permitted).set_ambient(ambient);
    process.set_capabilities(Some(sets));
    Ok(())
}

fn user(text: &str) -> Result<(u32, Option<u32>), String> {
    let number = |text: &str| text.parse().map_err(|_| format!("{text} is no user or group number"));
    match text.split_once(':') {
        Some((uid, gid)) => Ok((number(uid)?, Some(number(gid)?))),
        None => Ok((number(text)?, None)),
    }
}

/// One path for all hierarchies; libcgroups knows no path per controller.
fn sub_cgroup(paths: &[String]) -> Result<Option<PathBuf>, Failure> {
    match paths {
        [] => Ok(None),
        [path] if path.contains(':') || path.split('/').any(|part| part == "..") => {
            Err(Failure::new(format!("--cgroup {path} is not supported: give one path below the container's cgroup")))
        }
        [path] => Ok(Some(path.trim_start_matches('/').into())),
        _ => Err(Failure::new("--cgroup can be given once")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers() {
        assert_eq!(user("7"), Ok((7, None)));
        assert_eq!(user("7:8"), Ok((7, Some(8))));
        assert!(user("daemon").is_err() && user("7:").is_err());
    }

    #[test]
    fn capabilities_are_added_where_runc_adds_them() {
        let mut process: Process = serde_json::from_str(
            r#"{"cwd":"/","user":{"uid":0,"gid":0},"args":["a"],"capabilities":{"bounding":["CAP_KILL"]}}"#,
        )
        .unwrap();
        add_capabilities(&mut process, &["cap_sys_admin".to_owned()]).unwrap();
        let sets = process.capabilities().clone().unwrap();
        assert_eq!(sets.bounding().as_ref().unwrap().len(), 2);
        assert!(sets.effective().as_ref().unwrap().contains(&Capability::SysAdmin));
        assert!(add_capabilities(&mut process, &["CAP_FLY".to_owned()]).is_err());
    }
}
