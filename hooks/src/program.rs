//! Running one program to its end: standard input, deadline, captured output.
//!
//! The program's end is told by a pidfd (pidfd_open(2), Linux 5.3), so that one poll(2) waits for it, for room in its
//! standard input and for its output, and no thread is needed. Once the program has ended, what its own children still
//! write is not waited for. A program that does not read its input is no error.

use std::ffi::OsStr;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How much of the output is kept for a message: its end.
const KEPT: usize = 4096;

/// A program to run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Program<'a> {
    pub path: PathBuf,
    /// All arguments, `argv[0]` included; the path stands in for an empty list.
    pub args: Vec<&'a OsStr>,
    /// Its whole environment; `None` inherits this process's.
    pub environment: Option<Vec<(&'a str, &'a str)>>,
    /// Variables on top of the environment.
    pub additions: Vec<(&'a str, &'a OsStr)>,
    pub directory: Option<&'a Path>,
    pub input: &'a [u8],
    pub timeout: Option<Duration>,
}

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It could not be started.
    #[error("it cannot be started")]
    Start(#[source] io::Error),
    /// It ended with a status other than 0.
    #[error("{}{output}", describe(*.status))]
    Failed {
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote.
        output: Output,
    },
    /// It did not end in time and was killed.
    #[error("it ran longer than its timeout of {} s and was killed{output}", .timeout.as_secs_f64())]
    TimedOut {
        /// The time it was given.
        timeout: Duration,
        /// The end of what it wrote.
        output: Output,
    },
    /// The kernel refused to wait for it, or to pass data.
    #[error("it cannot be waited for; it was killed")]
    Wait(#[source] io::Error),
}

/// The end of what a program wrote to standard output and standard error.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    bytes: Vec<u8>,
    cut: bool,
}

impl Output {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        if let Some(surplus @ 1..) = self.bytes.len().checked_sub(KEPT) {
            self.bytes.drain(..surplus);
            self.cut = true;
        }
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(&self.bytes);
        match (text.trim(), self.cut) {
            ("", _) => Ok(()),
            (text, false) => write!(f, ": {text}"),
            (text, true) => write!(f, ": … {text}"),
        }
    }
}

impl Program<'_> {
    /// Runs it to its end. Returns the end of what it wrote.
    pub(crate) fn run(&self) -> Result<Output, ProgramError> {
        let mut child = self.command().spawn().map_err(ProgramError::Start)?;
        let mut output = Output::default();
        let ended = self.attend(&mut child, &mut output);
        if !matches!(ended, Ok(true)) {
            // Only its end is of interest now, and that it is no zombie.
            let _ = child.kill();
        }
        let status = child.wait().map_err(ProgramError::Wait)?;
        match ended {
            Err(error) => Err(ProgramError::Wait(error)),
            Ok(false) => Err(ProgramError::TimedOut { timeout: self.timeout.unwrap_or_default(), output }),
            Ok(true) if status.success() => Ok(output),
            Ok(true) => Err(ProgramError::Failed { status, output }),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        if let Some((name, rest)) = self.args.split_first() {
            command.arg0(name).args(rest);
        }
        if let Some(environment) = &self.environment {
            command.env_clear().envs(environment.iter().copied());
        }
        command.envs(self.additions.iter().copied());
        if let Some(directory) = self.directory {
            command.current_dir(directory);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Passes input and output until the program has ended (true) or its time is over (false).
    fn attend(&self, child: &mut Child, output: &mut Output) -> io::Result<bool> {
        let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        let deadline = self.timeout.map(|timeout| Instant::now() + timeout);
        let mut input = Some(self.input);
        let mut stdin = child.stdin.take().map(OwnedFd::from).map(std::fs::File::from);
        let mut sources: Vec<std::fs::File> =
            [child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from)]
                .into_iter()
                .flatten()
                .map(std::fs::File::from)
                .collect();
        for pipe in stdin.iter().chain(&sources) {
            rustix::io::ioctl_fionbio(pipe, true)?;
        }
        loop {
            if let (Some(pipe), Some(rest)) = (&mut stdin, input.take()) {
                input = write_some(pipe, rest)?;
            }
            if input.is_none() {
                stdin = None;
            }
            let left = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return Ok(false),
                left => left,
            };
            let ended = wait_for_any(&pidfd, stdin.as_ref(), &sources, left)?;
            sources.retain_mut(|source| read_all(source, output));
            if ended {
                return Ok(true);
            }
        }
    }
}

/// Waits until the program has ended (true), or one of its pipes is ready, or the time is over.
fn wait_for_any(
    pidfd: &OwnedFd,
    stdin: Option<&std::fs::File>,
    sources: &[std::fs::File],
    timeout: Option<Duration>,
) -> io::Result<bool> {
    let mut waited = vec![PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    waited.extend(sources.iter().map(|source| PollFd::from_borrowed_fd(source.as_fd(), PollFlags::IN)));
    waited.extend(stdin.map(|stdin| PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::OUT)));
    let timeout = timeout.map(Timespec::try_from).transpose().map_err(|_| io::ErrorKind::InvalidInput)?;
    match poll(&mut waited, timeout.as_ref()) {
        Err(rustix::io::Errno::INTR) => Ok(false),
        ready => {
            ready?;
            Ok(!waited[0].revents().is_empty())
        }
    }
}

/// Writes what the pipe takes; returns the rest, `None` when all is written or nobody reads.
fn write_some<'a>(pipe: &mut std::fs::File, mut rest: &'a [u8]) -> io::Result<Option<&'a [u8]>> {
    while !rest.is_empty() {
        match pipe.write(rest) {
            Ok(written) => rest = &rest[written..],
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(Some(rest)),
                io::ErrorKind::BrokenPipe => return Ok(None),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            },
        }
    }
    Ok(None)
}

/// Reads what is there. False at the end of the file, or when it cannot be read.
fn read_all(source: &mut std::fs::File, output: &mut Output) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return false,
            Ok(length) => output.push(&buffer[..length]),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return true,
                io::ErrorKind::Interrupted => {}
                _ => return false,
            },
        }
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("it ended with status {code}"),
        (None, Some(signal)) => format!("it was killed by signal {signal}"),
        (None, None) => format!("it ended unexpectedly ({status})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell<'a>(script: &'a str, input: &'a [u8]) -> Program<'a> {
        let args = ["sh", "-c", script].map(OsStr::new).to_vec();
        Program { path: "/bin/sh".into(), args, input, timeout: Some(Duration::from_secs(20)), ..Program::default() }
    }

    fn text(output: &Output) -> String {
        String::from_utf8(output.bytes.clone()).unwrap()
    }

    #[test]
    fn input_larger_than_a_pipe_and_output_pass_at_the_same_time() {
        let input = vec![b'x'; 1 << 20];
        // All into one pipe: what comes by two may be read in either order.
        let output = shell("count=$(tee /dev/stderr | wc -c); echo $count >&2", &input).run().unwrap();
        assert!(text(&output).trim_end().ends_with("1048576"));
        assert!(output.cut && output.bytes.len() == KEPT);
    }

    #[test]
    fn a_program_that_reads_nothing_is_no_error() {
        shell("exec true", &vec![b'x'; 1 << 20]).run().unwrap();
    }

    #[test]
    fn a_failure_tells_status_and_output() {
        let error = shell("echo out; echo oh no >&2; exit 7", b"").run().unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with("it ended with status 7: ") && message.contains("oh no"), "{message}");
        let error = shell("kill -9 $$", b"").run().unwrap_err();
        assert_eq!(error.to_string(), "it was killed by signal 9");
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed() {
        let started = Instant::now();
        let mut program = shell("echo begun; exec sleep 600", b"");
        program.timeout = Some(Duration::from_millis(200));
        let error = program.run().unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(10));
        assert_eq!(error.to_string(), "it ran longer than its timeout of 0.2 s and was killed: begun");
    }

    #[test]
    fn children_that_hold_the_output_open_are_not_waited_for() {
        let started = Instant::now();
        let output = shell("sleep 5 & echo done", b"").run().unwrap();
        assert!(started.elapsed() < Duration::from_secs(4));
        assert_eq!(text(&output), "done\n");
    }

    #[test]
    fn a_missing_program_is_told() {
        let program = Program { path: "/no/such/program".into(), ..Program::default() };
        assert!(matches!(program.run(), Err(ProgramError::Start(_))));
    }
}
