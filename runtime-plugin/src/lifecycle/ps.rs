//! `ferry ps`: the processes of a container, in the layout of `ps -ef` or as a JSON list of pids.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, ExitCode};

use chrono::{DateTime, Local, TimeDelta};
use clap::Args;

use super::{IdArgs, TableFormat, print};
use crate::cli::Global;
use crate::failure::{Failure, Outcome};
use crate::process::Stat;
use crate::state::Container;

/// Flags of `ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// How to print them.
    #[arg(long, short, value_name = "FORMAT", value_enum, default_value = "table")]
    pub format: TableFormat,
    #[command(flatten)]
    pub id: IdArgs,
    /// Options for ps(1), whose output is then filtered; without any, ferry prints what `ps -ef` would.
    #[arg(value_name = "PS-OPTIONS", trailing_var_arg = true, allow_hyphen_values = true)]
    pub options: Vec<String>,
}

/// Prints the processes in the container's cgroup.
pub fn run(global: &Global, args: &PsArgs) -> Outcome {
    let container = Container::load(&global.root, &args.id.id)?;
    let pids = container.cgroup.processes()?;
    let text = match args.format {
        TableFormat::Json => serde_json::to_string(&pids)? + "\n",
        TableFormat::Table if args.options.is_empty() => table(&pids),
        TableFormat::Table => filtered(&pids, &args.options)?,
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// The columns of `ps -ef`.
fn table(pids: &BTreeSet<i32>) -> String {
    let mut text = row(["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
    let clock = Clock::read();
    for &pid in pids {
        let Some(stat) = Stat::read(pid) else { continue };
        let uid = fs::metadata(format!("/proc/{pid}")).map(|metadata| metadata.uid()).unwrap_or_default();
        let user = user_name(uid).unwrap_or_else(|| uid.to_string());
        let seconds = stat.cpu_ticks / clock.ticks_per_second;
        let age = clock.uptime.saturating_sub(stat.start_time / clock.ticks_per_second).max(1);
        text.push_str(&row([
            &user,
            &pid.to_string(),
            &stat.parent.to_string(),
            &(seconds * 100 / age).min(99).to_string(),
            &clock.started(&stat),
            &terminal_name(stat.terminal),
            &format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
            &command_line(pid, &stat),
        ]));
    }
    text
}

fn row(cells: [&str; 8]) -> String {
    let [user, pid, parent, percent, started, terminal, time, command] = cells;
    format!("{user:<8} {pid:>7} {parent:>7} {percent:>2} {started:<5} {terminal:<8} {time:>8} {command}\n")
}

fn command_line(pid: i32, stat: &Stat) -> String {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = raw.split(|&byte| byte == 0).map(String::from_utf8_lossy).collect();
    let line = words.join(" ").trim_end().to_owned();
    // A kernel thread or zombie has none.
    if line.is_empty() { format!("[{}]", stat.command) } else { line }
}

/// The terminal's name from its device number, in the encoding of proc_pid_stat(5).
fn terminal_name(device: i32) -> String {
    let device = device.cast_unsigned();
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00);
    match major {
        0 => "?".to_owned(),
        4 => format!("tty{minor}"),
        // 136 to 143 are the pseudoterminals (Documentation/admin-guide/devices.txt).
        136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
        _ => format!("{major}:{minor}"),
    }
}

/// The name of a user in `/etc/passwd`.
pub fn user_name(uid: u32) -> Option<String> {
    nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten().map(|user| user.name)
}

/// What turns ticks since boot into times of day.
struct Clock {
    ticks_per_second: u64,
    /// Seconds since boot.
    uptime: u64,
    now: DateTime<Local>,
}

impl Clock {
    fn read() -> Self {
        let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let uptime = uptime.split(['.', ' ']).next().and_then(|text| text.parse().ok()).unwrap_or(0);
        Self { ticks_per_second: rustix::param::clock_ticks_per_second().max(1), uptime, now: Local::now() }
    }

    /// The hour of today, or the day.
    fn started(&self, stat: &Stat) -> String {
        let age = self.uptime.saturating_sub(stat.start_time / self.ticks_per_second);
        let started = i64::try_from(age).ok().and_then(TimeDelta::try_seconds).map(|age| self.now - age);
        match started {
            Some(started) if started.date_naive() == self.now.date_naive() => started.format("%H:%M").to_string(),
            Some(started) => started.format("%b%d").to_string(),
            None => "?".to_owned(),
        }
    }
}

/// The lines of ps(1), which the caller's options make part of the command, that are about these processes.
fn filtered(pids: &BTreeSet<i32>, options: &[String]) -> Result<String, Failure> {
    let output = Command::new("ps").args(options).output();
    let output = output.map_err(|error| Failure::from(error).context("cannot run ps, which the options are for"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(format!("ps failed: {}", message.trim())));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header.split_ascii_whitespace().position(|title| title == "PID");
    let column = column.ok_or_else(|| Failure::new("the output of ps with these options has no column PID"))?;
    let is_theirs = |line: &&str| {
        let pid = line.split_ascii_whitespace().nth(column).and_then(|text| text.parse().ok());
        pid.is_some_and(|pid: i32| pids.contains(&pid))
    };
    Ok(std::iter::once(header).chain(lines.filter(is_theirs)).map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_have_their_usual_names() {
        assert_eq!(terminal_name(0), "?");
        assert_eq!(terminal_name(34816), "pts/0");
        assert_eq!(terminal_name(0x8801), "pts/1");
        assert_eq!(terminal_name(0x0401), "tty1");
    }

    #[test]
    fn this_process_has_a_line() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let text = table(&BTreeSet::from([pid]));
        let line = text.lines().nth(1).unwrap();
        assert_eq!(line.split_ascii_whitespace().nth(1), Some(pid.to_string().as_str()));
    }
}
