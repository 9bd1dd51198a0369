//! The bar of a long checkpoint and restore: on a terminal only, gone at the end.

use ferry_test_bundles::{Bundle, Container, Outcome, Place};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

/// Runs a command whose standard error is a terminal; returns what it has written there.
fn on_terminal(command: &mut Command) -> Outcome<String> {
    let failed = |what: &str, error: std::io::Error| format!("{what}: {error}");
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).map_err(|error| failed("a terminal", error.into()))?;
    grantpt(&master).and_then(|()| unlockpt(&master)).map_err(|error| failed("a terminal", error.into()))?;
    let size = Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&master, size).map_err(|error| failed("its size", error.into()))?;
    let name = ptsname(&master, Vec::new()).map_err(|error| failed("its name", error.into()))?;
    let slave =
        File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(name.to_string_lossy().as_ref());
    let slave = slave.map_err(|error| failed("its other side", error))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(slave);
    let mut child = command.spawn().map_err(|error| failed("the command", error))?;
    // The command keeps the other side until it is dropped.
    command.stderr(Stdio::null());
    let mut master = File::from(master);
    let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match master.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => text.extend_from_slice(&buffer[..length]),
            // Nobody has the other side any more.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("reading the terminal", error)),
        }
    }
    let status = child.wait().map_err(|error| failed("the command", error))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    if status.success() { Ok(text) } else { Err(format!("{status}: {text}")) }
}

/// Fails unless the text is a bar, drawn in place and erased at last.
fn is_bar(text: &str, what: &str) -> Outcome {
    let drawn = text.contains(&format!("\r{what}: ")) && text.contains(" of memory, ") && text.contains('[');
    if drawn && text.ends_with("\r\x1b[K") && !text.contains('\n') { Ok(()) } else { Err(format!("no bar: {text:?}")) }
}

#[test]
fn a_bar_is_drawn_on_a_terminal_when_it_takes_long() -> Outcome {
    let place = Place::new()?;
    // A terminal as standard error would be one from outside for the container.
    let bundle = Bundle::new(&place, &["sleep", "100000"])?;
    let container = Container::run(&place, &bundle)?;
    let checkpoint = |options: &[&str]| {
        let mut command = container.command("checkpoint");
        command.args(["--leave-running"]).args(options).arg(&container.id);
        command
    };
    let quick = on_terminal(&mut checkpoint(&[]))?;
    if !quick.is_empty() {
        return Err(format!("a quick checkpoint prints {quick:?}"));
    }
    let slow = ["--fault", "dump-pages=delay:700"];
    is_bar(&on_terminal(&mut checkpoint(&slow))?, "checkpoint")?;
    let output = ferry_test_bundles::programs::run(&mut checkpoint(&slow))?;
    if !output.status.success() || !output.stderr.is_empty() {
        return Err(format!("without a terminal: {}", String::from_utf8_lossy(&output.stderr)));
    }
    container.checkpoint(&[])?;
    let mut restore = container.command("restore");
    restore.args(["--detach", "--fault", "restore-before-first-task=delay:700", "--bundle"]);
    is_bar(&on_terminal(restore.arg(&container.bundle).arg(&container.id))?, "restore")?;
    container.is("running")?;
    container.end()
}
