//! The processes that a test has started: found by descent, ended by pid, reaped.
//!
//! A test process is a child subreaper (prctl(2), PR_SET_CHILD_SUBREAPER), so that whatever it starts stays below it, and a
//! restored tree, whose parent has gone, comes back to it.

#![allow(unsafe_code)] // clone3(2) with a pid of the test's choice, which no wrapper has

use crate::Outcome;
use rustix::process::{Pid, Signal, WaitOptions};
use std::time::{Duration, Instant};

/// How long anything may take that ought to happen at once.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Makes this process inherit the orphans below it.
pub fn adopt_orphans() -> Outcome {
    let own = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(own)).map_err(|error| format!("cannot become a subreaper: {error}"))
}

/// Waits until a condition holds.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) -> Outcome {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > PATIENCE {
            return Err(format!("waited in vain for {what}"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// The children of a process, those of all its threads.
fn children(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()).collect()
}

/// The process with this pid and all below it, parents first.
pub fn tree(pid: i32) -> Vec<i32> {
    let mut all = vec![pid];
    let mut next = 0;
    while next < all.len() {
        all.extend(children(all[next]));
        next += 1;
    }
    all
}

/// Every process below this one.
pub fn below() -> Vec<i32> {
    tree(rustix::process::getpid().as_raw_nonzero().get()).split_off(1)
}

/// Takes note of every child that has ended.
pub fn reap() {
    while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
}

/// The name of a process; none of one that has gone.
pub fn name(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

/// Kills a process, and waits for its end.
pub fn kill(pid: i32) -> Outcome {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
        .map_err(|errno| format!("cannot kill {pid}: {errno}"))?;
    await_end(&[pid])
}

/// Whether the pid is free: no process, not even one that waits to be reaped.
pub fn is_gone(pid: i32) -> bool {
    reap();
    !std::path::Path::new(&format!("/proc/{pid}")).exists()
}

/// Waits until all these pids are free.
pub fn await_end(pids: &[i32]) -> Outcome {
    let alive = || pids.iter().copied().filter(|pid| !is_gone(*pid)).collect::<Vec<_>>();
    wait_for("the end of processes", || alive().is_empty()).map_err(|error| format!("{error}: {}", describe(&alive())))
}

/// Ends every process below this one, by pid, and reaps all.
pub fn end_all_below() {
    for _ in 0..1000 {
        let all = below();
        for pid in all.iter().rev().filter_map(|pid| Pid::from_raw(*pid)) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        reap();
        if all.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Pids with their names and states, for a message.
pub fn describe(pids: &[i32]) -> String {
    let one = |pid: &i32| match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.chars().take(60).collect::<String>(),
        Err(_) => format!("{pid} (gone)"),
    };
    pids.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// What each thread of these processes is doing, for a message: its state, where it waits, and its signals.
pub fn describe_threads(pids: &[i32]) -> String {
    let threads = pids.iter().flat_map(|pid| std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten());
    let one = |task: std::fs::DirEntry| {
        let text = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let status = text("status");
        let wanted = |line: &&str| ["State", "SigBlk", "SigPnd", "ShdPnd"].iter().any(|name| line.starts_with(name));
        let state = status.lines().filter(wanted).collect::<Vec<_>>().join(" ");
        format!("{:?}: {state} in {:?}, call {:?}", task.file_name(), text("wchan"), text("syscall").trim_end())
    };
    threads.flatten().map(one).collect::<Vec<_>>().join("\n")
}

/// Keeps a pid from being given to a process, without a process that has it: a session of that number, whose leader has
/// ended and in which another process lives, which is returned. It is this process's child, as all orphans below it are.
pub fn occupy(pid: i32) -> Outcome<i32> {
    #[repr(C)]
    struct Arguments {
        words: [u64; 11],
    }
    let numbers = [pid];
    let mut arguments = Arguments { words: [0; 11] };
    arguments.words[4] = libc::SIGCHLD as u64;
    arguments.words[8] = numbers.as_ptr() as u64;
    arguments.words[9] = 1;
    // SAFETY: clone3(2) like fork(2): no memory is shared, and the child makes system calls only.
    let leader = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<Arguments>()) };
    match leader {
        0 => {
            // SAFETY: as above; both processes end here without running anything of the parent's.
            unsafe {
                libc::setsid();
                if libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) == 0 {
                    loop {
                        libc::pause();
                    }
                }
                libc::_exit(0)
            }
        }
        1.. => {
            let mut member = None;
            wait_for("the session's leader to end", || {
                member = member.or_else(|| children(leader as i32).first().copied());
                reap();
                !std::path::Path::new(&format!("/proc/{pid}")).exists()
            })?;
            member.or_else(|| below().last().copied()).ok_or_else(|| "the session is empty".to_owned())
        }
        _ => Err(format!("cannot have pid {pid}: {}", std::io::Error::last_os_error())),
    }
}
