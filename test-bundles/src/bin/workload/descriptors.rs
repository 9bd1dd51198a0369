//! The descriptor table itself: numbers, flags, duplicates, tables shared between processes (dup(2), clone(2)).

use crate::filesystem::{open, state};
use crate::room::{Check, Room};
use crate::sys::{Fault, ensure, raw, same, sys, zeroed};
use std::path::Path;

/// Open descriptors with their flags.
fn table() -> Result<Vec<(i32, i64)>, Fault> {
    let listing = std::fs::read_dir("/proc/self/fd").map_err(|error| error.to_string())?;
    let numbers = listing.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    // The listing's own descriptor is closed by now and answers an error.
    let mut all: Vec<(i32, i64)> = numbers.filter_map(|fd| Some((fd, sys!(fcntl(fd, libc::F_GETFD)).ok()?))).collect();
    all.sort_unstable();
    Ok(all)
}

/// A check that exactly these descriptors are open.
fn keeps_table() -> Result<Check, Fault> {
    let before = table()?;
    Ok(Box::new(move || {
        same!("open descriptors and their flags", table()?, before);
        Ok(())
    }))
}

/// High and sparse numbers; 0, 1 and 2 closed. A restore itself needs a few numbers above the highest.
pub fn sparse_numbers(_: &Room) -> Result<Check, Fault> {
    let mut limit = zeroed::<libc::rlimit>();
    sys!(getrlimit(libc::RLIMIT_NOFILE, &mut limit))?;
    let highest = limit.rlim_cur.min(1_000_000) as i32 - 100;
    let null = open(Path::new("/dev/null"), libc::O_RDWR)?;
    for number in [17, 255, 256, 300, 700, highest] {
        if number <= highest {
            sys!(dup2(null, number))?;
        }
    }
    sys!(close(0))?;
    sys!(close(1))?;
    keeps_table()
}

/// FD_CLOEXEC on one number and not on its duplicate.
pub fn close_on_exec(_: &Room) -> Result<Check, Fault> {
    let null = open(Path::new("/dev/null"), libc::O_RDWR | libc::O_CLOEXEC)?;
    sys!(fcntl(null, libc::F_DUPFD, 100))?;
    sys!(fcntl(null, libc::F_DUPFD_CLOEXEC, 120))?;
    keeps_table()
}

/// Whether two descriptors share one description (kcmp(2)).
fn same_description(a: (i32, i32), b: (i32, i32)) -> Result<bool, Fault> {
    Ok(raw!(SYS_kcmp, a.0, b.0, 0, a.1, b.1)? == 0)
}

/// Which numbers are duplicates and which were opened anew, within a process and between two.
pub fn duplicates(room: &Room) -> Result<Check, Fault> {
    let first = open(Path::new("/dev/null"), libc::O_RDWR)?;
    let second = sys!(dup(first))? as i32;
    let third = open(Path::new("/dev/null"), libc::O_RDWR)?;
    let here = sys!(getpid())? as i32;
    let child = room.child("child", |_| {
        let moved = sys!(fcntl(third, libc::F_DUPFD, 200))? as i32;
        sys!(close(third))?;
        Ok(Box::new(move || {
            ensure!(sys!(fcntl(third, libc::F_GETFD)).is_err(), "what the child closed is open");
            sys!(fcntl(moved, libc::F_GETFD)).map(|_| ())
        }))
    })?;
    Ok(Box::new(move || {
        child.ask()?;
        ensure!(same_description((here, first), (here, second))?, "the duplicate is no duplicate any more");
        ensure!(!same_description((here, first), (here, third))?, "two opens have become one");
        ensure!(same_description((here, first), (child.pid, first))?, "the child's descriptor is one of its own");
        ensure!(same_description((here, third), (child.pid, 200))?, "the child's duplicate is one of its own");
        Ok(())
    }))
}

/// Eight hundred descriptors of one process, each with an offset of its own.
pub fn many_files(room: &Room) -> Result<Check, Fault> {
    let path = room.path("data");
    std::fs::write(&path, vec![7u8; 10_000]).map_err(|error| error.to_string())?;
    let mut all = Vec::new();
    for number in 0..800 {
        let descriptor = open(&path, libc::O_RDONLY)?;
        sys!(lseek(descriptor, number * 3, libc::SEEK_SET))?;
        all.push((descriptor, number * 3));
    }
    Ok(Box::new(move || {
        all.iter().try_for_each(|(descriptor, offset)| {
            same!(format!("offset of {descriptor}"), state(*descriptor)?.0, *offset);
            Ok(())
        })
    }))
}

/// Two processes with one descriptor table (CLONE_FILES): what one opens, the other sees.
pub fn shared_table(room: &Room) -> Result<Check, Fault> {
    let path = room.path("opened-by-child");
    std::fs::write(&path, "x").map_err(|error| error.to_string())?;
    let pid = raw!(SYS_clone, libc::CLONE_FILES | libc::SIGCHLD, 0, 0, 0, 0)? as i32;
    if pid == 0 {
        loop {
            crate::sys::pause();
        }
    }
    let here = sys!(getpid())? as i32;
    Ok(Box::new(move || {
        const KCMP_FILES: i32 = 2;
        same!("order of the two tables", raw!(SYS_kcmp, here, pid, KCMP_FILES, 0, 0)?, 0);
        let descriptor = open(&path, libc::O_RDONLY)?;
        let seen = std::fs::read_link(format!("/proc/{pid}/fd/{descriptor}"));
        sys!(close(descriptor))?;
        same!("what the other process has under the new number", seen.map_err(|error| error.to_string())?, path);
        Ok(())
    }))
}
