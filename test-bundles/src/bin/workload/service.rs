//! A small service, as containers run them: something of everything, alive all the time. The clients of ferry are tested with it.

use crate::filesystem::{open, state};
use crate::memory::{READ_WRITE, SHARED, fill, holds, map};
use crate::room::{Check, Room};
use crate::sys::{Fault, Verdict, ensure, pattern, same, sys, text, wait_for};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const TICK: Duration = Duration::from_millis(10);
const MEMORY: usize = 4 << 20;

/// A thread that counts: into memory, into a file, and to standard output. It never stops, and nothing of it may step back.
/// The file has no name: what it holds belongs to a checkpoint, whatever the service does after it.
fn count() -> Result<(Arc<AtomicU64>, i32), Fault> {
    let counter = Arc::new(AtomicU64::new(0));
    let shared = counter.clone();
    let path = std::env::temp_dir().join(format!("ferry-count-{}", std::process::id()));
    let file = open(&path, libc::O_RDWR | libc::O_CREAT | libc::O_EXCL)?;
    std::fs::remove_file(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    std::thread::spawn(move || {
        loop {
            let number = shared.fetch_add(1, Ordering::SeqCst) + 1;
            let line = format!("{number}\n");
            let written = sys!(write(file, line.as_ptr().cast(), line.len()));
            // Whoever reads the output may be gone, which is not this program's fault.
            let _ = writeln!(std::io::stdout(), "count {number}");
            if written != Ok(line.len() as i64) {
                std::process::exit(4);
            }
            std::thread::sleep(TICK);
        }
    });
    Ok((counter, file))
}

/// Fails unless the file has each number once, in order; returns the last.
fn counted(file: i32) -> Result<u64, Fault> {
    let content = text(format!("/proc/self/fd/{file}"))?;
    let lines: Vec<&str> = content.split_inclusive('\n').filter(|line| line.ends_with('\n')).collect();
    for (line, number) in lines.iter().zip(1u64..) {
        same!("a line of the counter's file", line.trim(), number.to_string());
    }
    Ok(lines.len() as u64)
}

/// Asks a peer at the other end of a socket, which answers each byte with the next.
fn echo(socket: i32, byte: u8) -> Verdict {
    let mut answer = 0u8;
    same!("bytes sent", sys!(write(socket, (&raw const byte).cast(), 1))?, 1);
    same!("bytes received", sys!(read(socket, (&raw mut answer).cast(), 1))?, 1);
    same!("the child's answer", answer, byte.wrapping_add(1));
    Ok(())
}

/// A counting thread, a child behind a socket pair, memory private and shared, an open file, a listener.
pub fn service(room: &Room) -> Result<Check, Fault> {
    let (private, shared) = (pattern(7, MEMORY), map(MEMORY, READ_WRITE, SHARED)?);
    let want = pattern(8, MEMORY);
    fill(shared, &want);
    let data: PathBuf = room.path("data");
    std::fs::write(&data, pattern(9, 100_000)).map_err(|error| error.to_string())?;
    let file = open(&data, libc::O_RDWR)?;
    sys!(lseek(file, 54_321, libc::SEEK_SET))?;
    let before = state(file)?;
    let mut ends = [0i32; 2];
    sys!(socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()))?;
    let child = crate::room::fork(|| {
        let mut byte = 0u8;
        let _ = sys!(close(ends[0]));
        while sys!(read(ends[1], (&raw mut byte).cast(), 1)) == Ok(1) {
            byte = byte.wrapping_add(1);
            let _ = sys!(write(ends[1], (&raw const byte).cast(), 1));
        }
        0
    })?;
    sys!(close(ends[1]))?;
    let listener = std::os::unix::net::UnixListener::bind(room.path("socket")).map_err(|error| error.to_string())?;
    let path = room.path("socket");
    let (counter, lines) = count()?;
    let (here, mut last) = (sys!(getpid())?, 0);
    Ok(Box::new(move || {
        same!("the pid", sys!(getpid())?, here);
        let now = counter.load(Ordering::SeqCst);
        ensure!(now >= last, "the counter stepped back from {last} to {now}");
        last = now;
        wait_for("the counter to go on", || counter.load(Ordering::SeqCst) > now + 1)?;
        ensure!(counted(lines)? >= now, "the counter's file ends before {now}");
        ensure!(private == pattern(7, MEMORY), "private memory has changed");
        holds("shared memory", shared, &want)?;
        same!("the open file", state(file)?, before);
        echo(ends[0], now as u8)?;
        same!("signals to the child", sys!(kill(child, 0))?, 0);
        let client = std::os::unix::net::UnixStream::connect(&path).map_err(|error| error.to_string())?;
        let (server, _) = listener.accept().map_err(|error| error.to_string())?;
        drop((client, server));
        Ok(())
    }))
}
