//! Process trees: sessions, groups, zombies, orphans (setsid(2), setpgid(2), wait(2)).

use crate::room::{Check, Child, Room, ask_all, fork};
use crate::sys::{Fault, Verdict, ensure, raw, same, status_field, sys, text, wait_for, zeroed};

/// A process's place in the tree.
#[derive(Debug, PartialEq)]
struct Place {
    pid: i64,
    parent: i64,
    group: i64,
    session: i64,
}

/// The caller's place. The parent is left out where it may lie outside the checkpoint.
fn place(with_parent: bool) -> Result<Place, Fault> {
    let parent = if with_parent { sys!(getppid())? } else { 0 };
    Ok(Place { pid: sys!(getpid())?, parent, group: sys!(getpgid(0))?, session: sys!(getsid(0))? })
}

/// A check that the caller's place is what it is now.
fn stays_here(with_parent: bool) -> Result<Check, Fault> {
    let before = place(with_parent)?;
    Ok(Box::new(move || {
        same!("place in the tree", place(with_parent)?, before);
        Ok(())
    }))
}

/// Children in the parent's group, in a group of their own, in a group led by a sibling, and in a session of their own.
pub fn sessions(room: &Room) -> Result<Check, Fault> {
    let plain = room.child("plain", |_| stays_here(true))?;
    let leader = room.child("group-leader", |_| {
        sys!(setpgid(0, 0))?;
        stays_here(true)
    })?;
    let group = leader.pid;
    let member = room.child("group-member", move |_| {
        sys!(setpgid(0, group))?;
        stays_here(true)
    })?;
    let session = room.child("session-leader", |room| {
        sys!(setsid())?;
        let inner = room.child("session-member", |_| stays_here(true))?;
        let own = room.child("session-group", |_| {
            sys!(setpgid(0, 0))?;
            stays_here(true)
        })?;
        let mut here = stays_here(true)?;
        Ok(Box::new(move || {
            inner.ask()?;
            own.ask()?;
            here()
        }))
    })?;
    let mut children = ask_all(vec![plain, leader, member, session]);
    let mut here = stays_here(false)?;
    Ok(Box::new(move || {
        children()?;
        here()
    }))
}

/// Fails unless `pid` is a zombie child that ended this way (waitid(2): CLD_EXITED, CLD_KILLED …).
fn still_zombie(pid: i32, code: i32, status: i32) -> Verdict {
    let mut info = zeroed::<libc::siginfo_t>();
    sys!(waitid(libc::P_PID, pid as u32, &mut info, libc::WEXITED | libc::WNOWAIT | libc::WNOHANG))?;
    // SAFETY: waitid filled the structure in for a child, or left it zero.
    let (got, got_status) = unsafe { (info.si_pid(), info.si_status()) };
    same!("zombie's pid", got, pid);
    same!("zombie's way to end", info.si_code, code);
    same!("zombie's status", got_status, status);
    Ok(())
}

/// Children that have ended and were not waited for: by exit, by signal.
pub fn zombies(_: &Room) -> Result<Check, Fault> {
    let exited = fork(|| 7)?;
    let killed = fork(|| {
        loop {
            crate::sys::pause();
        }
    })?;
    sys!(kill(killed, libc::SIGKILL))?;
    let own_group = fork(|| if raw!(SYS_setpgid, 0, 0).is_ok() { 3 } else { 99 })?;
    for pid in [exited, killed, own_group] {
        wait_for("the child's end", || text(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z ")))?;
    }
    Ok(Box::new(move || {
        still_zombie(exited, libc::CLD_EXITED, 7)?;
        still_zombie(killed, libc::CLD_KILLED, libc::SIGKILL)?;
        still_zombie(own_group, libc::CLD_EXITED, 3)?;
        same!("group of the zombie", sys!(getpgid(own_group))?, i64::from(own_group));
        Ok(())
    }))
}

/// Makes this process inherit orphans, so that they stay in the tree.
fn adopt_orphans() -> Verdict {
    sys!(prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)).map(|_| ())
}

/// Waits for the process that only passed the work on.
fn reap(child: &Child) -> Verdict {
    sys!(waitpid(child.forked, std::ptr::null_mut(), 0)).map(|_| ())
}

/// A daemon: its session's leader has gone, and so has its first parent.
pub fn orphans(room: &Room) -> Result<Check, Fault> {
    adopt_orphans()?;
    let root = sys!(getpid())?;
    let daemon = room.family("daemon", |room| {
        let leader = raw!(SYS_setsid).unwrap_or(-1);
        let _ = fork(|| {
            let orphaned = wait_for("the leader to go", || raw!(SYS_getppid).is_ok_and(|parent| parent == root));
            room.serve(orphaned.and_then(|()| {
                same!("session", sys!(getsid(0))?, leader);
                let mut here = stays_here(true)?;
                let child = room.child("daemon-child", |_| stays_here(true))?;
                Ok(Box::new(move || {
                    child.ask()?;
                    here()
                }) as Check)
            }))
        });
    })?;
    reap(&daemon)?;
    Ok(ask_all(vec![daemon]))
}

/// A process group whose leader has gone.
pub fn dead_group_leader(room: &Room) -> Result<Check, Fault> {
    adopt_orphans()?;
    let root = sys!(getpid())?;
    let member = room.family("member", |room| {
        let _ = raw!(SYS_setpgid, 0, 0);
        let leader = raw!(SYS_getpid).unwrap_or(-1);
        let _ = fork(|| {
            let orphaned = wait_for("the leader to go", || raw!(SYS_getppid).is_ok_and(|parent| parent == root));
            room.serve(orphaned.and_then(|()| {
                same!("group", sys!(getpgid(0))?, leader);
                stays_here(true)
            }))
        });
    })?;
    reap(&member)?;
    Ok(ask_all(vec![member]))
}

fn chain(room: &Room, depth: u32) -> Result<Check, Fault> {
    let mut here = stays_here(depth < 8)?;
    if depth == 0 {
        return Ok(here);
    }
    let child = room.child(&format!("level{depth}"), |room| chain(room, depth - 1))?;
    Ok(Box::new(move || {
        child.ask()?;
        here()
    }))
}

/// A chain of eight processes, each the child of the one before.
pub fn deep_tree(room: &Room) -> Result<Check, Fault> {
    chain(room, 8)
}

/// A server's pre-forked workers: twenty children, each with memory of its own over what it inherited.
pub fn prefork(room: &Room) -> Result<Check, Fault> {
    let inherited = crate::sys::pattern(1, 256 << 10);
    let mut children = Vec::new();
    for number in 0..20u64 {
        let mut memory = inherited.clone();
        children.push(room.child(&format!("worker{number}"), move |_| {
            let own = crate::sys::pattern(number + 2, 64 << 10);
            let at = number as usize * 4096;
            memory[at..at + own.len()].copy_from_slice(&own);
            let mut here = stays_here(true)?;
            let inherited = crate::sys::pattern(1, 256 << 10);
            Ok(Box::new(move || {
                let want = [&inherited[..at], &own[..], &inherited[at + own.len()..]].concat();
                ensure!(memory == want, "the worker's memory has changed");
                here()
            }))
        })?);
    }
    Ok(ask_all(children))
}

/// A child that SIGSTOP has stopped.
pub fn stopped_child(room: &Room) -> Result<Check, Fault> {
    let child = room.child("stopped", |_| stays_here(true))?;
    let is_stopped = move |pid: i32| text(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") T "));
    sys!(kill(child.pid, libc::SIGSTOP))?;
    wait_for("the child to stop", || is_stopped(child.pid))?;
    Ok(Box::new(move || {
        ensure!(is_stopped(child.pid), "the stopped child is not stopped");
        sys!(kill(child.pid, libc::SIGCONT))?;
        child.ask()?;
        sys!(kill(child.pid, libc::SIGSTOP))?;
        wait_for("the child to stop again", || is_stopped(child.pid))
    }))
}

/// A child of three threads that SIGSTOP has stopped, and for which more signals wait that would stop it: for the whole process
/// and for one of its threads. The one that continues it takes all of them back, so that it must not stop again.
pub fn stopped_child_pending(room: &Room) -> Result<Check, Fault> {
    const WAITS: u64 = 1 << (libc::SIGTSTP - 1) | 1 << (libc::SIGTTOU - 1);
    let child = room.child("stopped", |_| {
        for _ in 0..2 {
            std::thread::spawn(|| {
                loop {
                    std::thread::park();
                }
            });
        }
        stays_here(true)
    })?;
    let pid = child.pid;
    let threads = move || -> Result<Vec<i32>, Fault> {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|error| error.to_string())?;
        Ok(tasks.flatten().filter_map(|task| task.file_name().to_string_lossy().parse().ok()).collect())
    };
    let is_stopped = move || {
        let stopped = |tid: &i32| text(format!("/proc/{pid}/task/{tid}/stat")).is_ok_and(|stat| stat.contains(") T "));
        threads().is_ok_and(|threads| threads.len() == 3 && threads.iter().all(stopped))
    };
    let waiting = move || -> Result<u64, Fault> {
        let field = status_field(&pid.to_string(), "ShdPnd")?;
        u64::from_str_radix(field.trim(), 16).map_err(|error| error.to_string())
    };
    let stop = move || -> Verdict {
        sys!(kill(pid, libc::SIGSTOP))?;
        wait_for("every thread of the child to stop", is_stopped)?;
        for signal in [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTOU] {
            sys!(kill(pid, signal))?;
        }
        for tid in threads()? {
            raw!(SYS_tgkill, pid, tid, libc::SIGSTOP)?;
        }
        Ok(())
    };
    stop()?;
    Ok(Box::new(move || {
        ensure!(is_stopped(), "a thread of the stopped child is not stopped");
        same!("stopping signals that wait", waiting()? & WAITS, WAITS);
        sys!(kill(pid, libc::SIGCONT))?;
        child.ask()?;
        same!("stopping signals that wait after SIGCONT", waiting()? & WAITS, 0);
        stop()
    }))
}
