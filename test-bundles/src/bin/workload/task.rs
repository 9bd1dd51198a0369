//! What else belongs to one process: limits, scheduling, names, directories, prctl(2) settings.

use crate::room::{Check, Room, ask_all};
use crate::sys::{Fault, Verdict, c_path, ensure, raw, same, sys, text, wait_for, zeroed};
use std::path::Path;

/// A check that `read` goes on telling what it tells now.
fn keeps<T: PartialEq + std::fmt::Debug + 'static>(
    what: &'static str,
    read: impl Fn() -> Result<T, Fault> + 'static,
) -> Result<Check, Fault> {
    let before = read()?;
    Ok(Box::new(move || {
        same!(what, read()?, before);
        Ok(())
    }))
}

/// Resource limits, soft and hard.
pub fn resource_limits(_: &Room) -> Result<Check, Fault> {
    for (resource, soft, hard) in [
        (libc::RLIMIT_NOFILE, 123, 4000),
        (libc::RLIMIT_CORE, 0, 777_777),
        (libc::RLIMIT_STACK, 5 << 20, 60 << 20),
        (libc::RLIMIT_FSIZE, 1 << 40, 1 << 41),
        (libc::RLIMIT_AS, 1 << 43, 1 << 44),
        (libc::RLIMIT_NICE, 0, 0),
        (libc::RLIMIT_MSGQUEUE, 1000, 2000),
        (libc::RLIMIT_CPU, 1 << 20, 1 << 30),
    ] {
        let mut now = zeroed::<libc::rlimit>();
        sys!(getrlimit(resource, &mut now))?;
        let limit = libc::rlimit { rlim_cur: soft.min(now.rlim_max), rlim_max: hard.min(now.rlim_max) };
        sys!(setrlimit(resource, &limit))?;
    }
    keeps("limits", || text("/proc/self/limits"))
}

/// The scheduling of the calling thread: policy, priority, nice value.
fn scheduling() -> Result<(i64, i32, i64), Fault> {
    let mut parameter = zeroed::<libc::sched_param>();
    sys!(sched_getparam(0, &mut parameter))?;
    // The raw call answers 20 minus the nice value.
    Ok((sys!(sched_getscheduler(0))?, parameter.sched_priority, raw!(SYS_getpriority, libc::PRIO_PROCESS, 0)?))
}

/// A child scheduled so that keeps it; the root process stays as it was.
fn scheduled(room: &Room, policy: i32, priority: i32, nice: i32) -> Result<Check, Fault> {
    let child = room.child("scheduled", |_| {
        let parameter = libc::sched_param { sched_priority: priority };
        sys!(sched_setscheduler(0, policy, &parameter))?;
        raw!(SYS_setpriority, libc::PRIO_PROCESS, 0, nice)?;
        keeps("scheduling", scheduling)
    })?;
    let (mut child, mut root) = (ask_all(vec![child]), keeps("scheduling of the root", scheduling)?);
    Ok(Box::new(move || {
        child()?;
        root()
    }))
}

/// The nice value.
pub fn nice(room: &Room) -> Result<Check, Fault> {
    scheduled(room, libc::SCHED_OTHER, 0, 7)
}

/// SCHED_BATCH with a nice value.
pub fn sched_batch(room: &Room) -> Result<Check, Fault> {
    scheduled(room, libc::SCHED_BATCH, 0, 3)
}

/// SCHED_IDLE.
pub fn sched_idle(room: &Room) -> Result<Check, Fault> {
    scheduled(room, libc::SCHED_IDLE, 0, 0)
}

/// SCHED_FIFO with a real-time priority.
pub fn sched_fifo(room: &Room) -> Result<Check, Fault> {
    scheduled(room, libc::SCHED_FIFO, 5, 0)
}

/// The CPUs that a process may run on.
pub fn affinity(_: &Room) -> Result<Check, Fault> {
    let mut set = zeroed::<libc::cpu_set_t>();
    // SAFETY: 0 is below CPU_SETSIZE.
    unsafe { libc::CPU_SET(0, &mut set) };
    sys!(sched_setaffinity(0, size_of_val(&set), &set))?;
    keeps("affinity", || {
        let mut set = [0u64; 16];
        raw!(SYS_sched_getaffinity, 0, size_of_val(&set), set.as_mut_ptr())?;
        Ok(set)
    })
}

/// The execution domain: here without address randomisation.
pub fn personality(_: &Room) -> Result<Check, Fault> {
    let own = 0x0040_0000u64 | 0x0004_0000; // READ_IMPLIES_EXEC is left out; ADDR_COMPAT_LAYOUT would do no harm
    sys!(personality(own))?;
    keeps("personality", || sys!(personality(0xFFFF_FFFF)))
}

/// The process's name.
pub fn names(room: &Room) -> Result<Check, Fault> {
    let child = room.child("odd", |_| {
        sys!(prctl(libc::PR_SET_NAME, c"a) R 1 (b".as_ptr()))?;
        keeps("name", || text("/proc/self/comm"))
    })?;
    let full = room.child("full", |_| {
        sys!(prctl(libc::PR_SET_NAME, c"fifteen-letters".as_ptr()))?;
        keeps("name", || text("/proc/self/comm"))
    })?;
    Ok(ask_all(vec![child, full]))
}

/// The file mode creation mask, differently in parent and child.
pub fn umask(room: &Room) -> Result<Check, Fault> {
    let set = |mask: u32| -> Verdict { sys!(umask(mask)).map(|_| ()) };
    let read = || crate::sys::status_field("self", "Umask");
    set(0o077)?;
    let child = room.child("child", |_| {
        set(0o1)?;
        keeps("umask", read)
    })?;
    let (mut child, mut root) = (ask_all(vec![child]), keeps("umask", read)?);
    Ok(Box::new(move || {
        child()?;
        root()
    }))
}

/// Where a link of /proc/self leads.
fn link(name: &str) -> Result<String, Fault> {
    let target = std::fs::read_link(format!("/proc/self/{name}")).map_err(|error| format!("{name}: {error}"))?;
    Ok(target.to_string_lossy().into_owned())
}

fn enter(path: &Path) -> Verdict {
    sys!(chdir(c_path(path).as_ptr())).map(|_| ())
}

fn make_dir(path: &Path) -> Verdict {
    std::fs::create_dir(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// The working directory.
pub fn working_directory(room: &Room) -> Result<Check, Fault> {
    let dir = room.path("a directory");
    make_dir(&dir)?;
    enter(&dir)?;
    keeps("working directory", || link("cwd"))
}

/// A working directory that was removed.
pub fn deleted_working_directory(room: &Room) -> Result<Check, Fault> {
    let dir = room.path("removed");
    make_dir(&dir)?;
    let child = room.child("inside", |_| {
        enter(&dir)?;
        std::fs::remove_dir(&dir).map_err(|error| error.to_string())?;
        let path = dir.clone();
        Ok(Box::new(move || {
            let cwd = link("cwd")?;
            ensure!(cwd.ends_with("removed (deleted)"), "the working directory is {cwd}");
            ensure!(!path.exists(), "{} is back", path.display());
            Ok(())
        }))
    })?;
    Ok(ask_all(vec![child]))
}

/// A root directory of its own (chroot(2)), and a working directory in it.
pub fn root_directory(room: &Room) -> Result<Check, Fault> {
    let dir = room.path("inner");
    make_dir(&dir)?;
    let top = room.path("");
    let child = room.family("inside", |room| {
        let setup = || -> Result<Check, Fault> {
            sys!(chroot(c_path(&top).as_ptr()))?;
            enter(Path::new("/inner"))?;
            Ok(Box::new(|| {
                let mut name = [0u8; 256];
                let length = raw!(SYS_getcwd, name.as_mut_ptr(), name.len())? as usize;
                same!("working directory in the root", &name[..length], &b"/inner\0"[..]);
                ensure!(Path::new("/inner").exists(), "the root directory is not the one of before");
                ensure!(!Path::new("/proc").exists(), "the root directory is the host's");
                Ok(())
            }))
        };
        let check = setup();
        room.at_root().serve(check)
    })?;
    let pid = child.pid;
    let outside = keeps("root as seen from outside", move || {
        std::fs::read_link(format!("/proc/{pid}/root")).map_err(|error| error.to_string())
    })?;
    let (mut child, mut outside) = (ask_all(vec![child]), outside);
    Ok(Box::new(move || {
        outside()?;
        child()
    }))
}

/// The executable, which /proc/self/exe tells.
pub fn executable(_: &Room) -> Result<Check, Fault> {
    keeps("executable", || link("exe"))
}

/// What /proc tells of a process's start: arguments, environment, auxiliary vector, the bounds of its parts.
pub fn proc_files(_: &Room) -> Result<Check, Fault> {
    keeps("arguments, environment, auxiliary vector, bounds", || {
        let stat = text("/proc/self/stat")?;
        let fields: Vec<String> = stat.rsplit(") ").next().unwrap_or("").split(' ').map(str::to_owned).collect();
        ensure!(fields.len() >= 49, "odd /proc/self/stat: {stat}");
        // proc(5), less the two fields before the state: start_code, end_code, start_stack (26-28); from start_data to env_end (45-51).
        let bounds = [&fields[23..26], &fields[42..49]].concat();
        Ok((text("/proc/self/cmdline")?, text("/proc/self/environ")?, std::fs::read("/proc/self/auxv").ok(), bounds))
    })
}

/// /proc/self/oom_score_adj, raised (which needs no privilege).
pub fn oom_score(_: &Room) -> Result<Check, Fault> {
    std::fs::write("/proc/self/oom_score_adj", "321").map_err(|error| error.to_string())?;
    keeps("oom_score_adj", || text("/proc/self/oom_score_adj"))
}

/// A prctl(2) setting of one word that is set and read with these numbers.
fn setting(room: &Room, name: &'static str, set: i32, get: i32, value: u64) -> Result<Check, Fault> {
    let child = room.child(name, |_| {
        sys!(prctl(set, value, 0, 0, 0))?;
        keeps(name, move || {
            let mut through_pointer = 0i32;
            let answer = match get {
                libc::PR_GET_PDEATHSIG | libc::PR_GET_CHILD_SUBREAPER => {
                    sys!(prctl(get, &raw mut through_pointer, 0, 0, 0))?
                }
                _ => sys!(prctl(get, 0, 0, 0, 0))?,
            };
            Ok((answer, through_pointer))
        })
    })?;
    Ok(ask_all(vec![child]))
}

/// PR_SET_DUMPABLE: a process that may not be traced by others.
pub fn dumpable(room: &Room) -> Result<Check, Fault> {
    setting(room, "dumpable", libc::PR_SET_DUMPABLE, libc::PR_GET_DUMPABLE, 0)
}

/// PR_SET_PDEATHSIG: the setting, and that the signal comes when the parent ends.
pub fn parent_death_signal(room: &Room) -> Result<Check, Fault> {
    let setting = setting(room, "pdeathsig", libc::PR_SET_PDEATHSIG, libc::PR_GET_PDEATHSIG, libc::SIGUSR2 as u64)?;
    let mut setting = setting;
    let mut round = 0;
    let room = room.clone();
    let start = move |round: u32| {
        let parent = room.child(&format!("parent{round}"), |room| {
            let child = room.child(&format!("bereaved{round}"), |_| {
                sys!(prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
                Ok(Box::new(|| Ok(())) as Check)
            })?;
            Ok(Box::new(move || child.ask()) as Check)
        })?;
        let family = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", parent.pid));
        let child =
            family.map_err(|error| error.to_string())?.trim().parse::<i32>().map_err(|error| error.to_string())?;
        Ok::<_, Fault>((parent, child))
    };
    let mut pair = None;
    Ok(Box::new(move || {
        setting()?;
        if let Some((parent, child)) = pair.take() {
            let parent: crate::room::Child = parent;
            sys!(kill(parent.pid, libc::SIGKILL))?;
            sys!(waitpid(parent.pid, std::ptr::null_mut(), 0))?;
            wait_for("the orphan to die", || {
                text(format!("/proc/{child}/stat")).map_or(true, |stat| stat.contains(") Z "))
            })?;
        }
        round += 1;
        pair = Some(start(round)?);
        Ok(())
    }))
}

/// PR_SET_TIMERSLACK.
pub fn timer_slack(room: &Room) -> Result<Check, Fault> {
    setting(room, "timerslack", libc::PR_SET_TIMERSLACK, libc::PR_GET_TIMERSLACK, 333_333)
}

/// PR_SET_CHILD_SUBREAPER.
pub fn child_subreaper(room: &Room) -> Result<Check, Fault> {
    setting(room, "subreaper", libc::PR_SET_CHILD_SUBREAPER, libc::PR_GET_CHILD_SUBREAPER, 1)
}

/// The I/O priority (ioprio_set(2)).
pub fn io_priority(_: &Room) -> Result<Check, Fault> {
    raw!(SYS_ioprio_set, 1, 0, 2 << 13 | 6)?;
    keeps("I/O priority", || raw!(SYS_ioprio_get, 1, 0))
}
