//! Where the programs under test are, and how they are run.

use crate::Outcome;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A program that cargo built beside the running test.
fn beside_the_test(name: &str) -> Outcome<PathBuf> {
    let test = std::env::current_exe().map_err(|error| format!("cannot tell where this test lies: {error}"))?;
    // target/PROFILE/deps/TEST, or target/PROFILE/TEST.
    let found = test.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| {
        format!("there is no {name} near {}: build it first (`cargo build`, or `make test`)", test.display())
    })
}

/// The `ferry` to test: `$FERRY`, or the one that cargo built beside the test.
pub fn ferry() -> Outcome<PathBuf> {
    match std::env::var_os("FERRY") {
        Some(path) => Ok(PathBuf::from(path)),
        None => beside_the_test("ferry"),
    }
}

/// The runtime whose command line the container tests use: `$FERRY_RUNTIME`, or ferry. With runc and CRIU in its place the tests
/// are tested; what only ferry promises then fails.
pub fn runtime() -> Outcome<PathBuf> {
    match std::env::var_os("FERRY_RUNTIME") {
        Some(path) => Ok(PathBuf::from(path)),
        None => ferry(),
    }
}

/// The workload program.
pub fn workload() -> Outcome<PathBuf> {
    beside_the_test("workload")
}

/// A program of the system, by its path in one of the usual folders.
pub fn installed(name: &str) -> Outcome<PathBuf> {
    let folders = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let found = folders.into_iter().map(|folder| Path::new(folder).join(name)).find(|path| path.exists());
    found.ok_or_else(|| format!("{name} is not installed: `make test` installs what the tests need"))
}

/// Runs a command to its end; its input is empty.
pub fn run(command: &mut Command) -> Outcome<Output> {
    let output = command.stdin(Stdio::null()).output();
    output.map_err(|error| format!("{}: {error}", command.get_program().display()))
}

/// Runs a command that must succeed, and returns what it printed.
pub fn succeed(command: &mut Command) -> Outcome<String> {
    let output = run(command)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{}: {}\n{}", shown(command), output.status, said(&output)))
}

/// A command's two outputs, for a message.
pub fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

/// A command line, for a message.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
