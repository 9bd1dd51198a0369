//! Trees that are hard to bring to a stand: tasks that never rest, tasks that come and go, and vfork(2).

use crate::Workload;
use crate::memory::{PAGE, READ_WRITE, map_file};
use crate::room::{Check, Room, fork};
use crate::sys::{Fault, c_path, errno, raw, sys, timespec, wait_for, zeroed};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Workloads of the tests of freezing alone: the general ones cannot end well with them, or not in time.
pub const FOR_FREEZING: &[Workload] = &[
    Workload { name: "fork_bomb", setup: fork_bomb, missing: || None },
    Workload { name: "vfork_loop", setup: vfork_loop, missing: || None },
    Workload { name: "vfork_stuck", setup: vfork_stuck, missing: || None },
];

/// Counters in a file that every process of a workload maps: what a test reads there is what the tasks have done, to the last
/// step.
#[derive(Clone, Copy)]
struct Counters(&'static [AtomicU64]);

impl Counters {
    /// Those in `counters` of the workload's folder: one page.
    fn map(room: &Room) -> Result<Self, Fault> {
        let path = room.path("counters");
        std::fs::write(&path, vec![0; PAGE]).map_err(|error| format!("{}: {error}", path.display()))?;
        let file = sys!(open(c_path(&path).as_ptr(), libc::O_RDWR | libc::O_CLOEXEC))? as i32;
        let memory = map_file(PAGE, READ_WRITE, libc::MAP_SHARED, file, 0)?;
        sys!(close(file))?;
        // SAFETY: the mapping is a page of integers and stays for ever.
        Ok(Self(unsafe { std::slice::from_raw_parts(memory as *const AtomicU64, PAGE / 8) }))
    }

    fn step(self, slot: usize) {
        self.0[slot].fetch_add(1, Ordering::Relaxed);
    }

    fn get(self, slot: usize) -> u64 {
        self.0[slot].load(Ordering::Relaxed)
    }

    /// A check that each of the first `count` goes on.
    fn all_go_on(self, count: usize) -> Check {
        Box::new(move || {
            let before: Vec<u64> = (0..count).map(|slot| self.get(slot)).collect();
            wait_for("every counter to go on", || (0..count).all(|slot| self.get(slot) > before[slot]))
        })
    }
}

fn sleep(length: Duration) {
    let length = timespec(length);
    // SAFETY: nanosleep reads one timespec, which outlives the call.
    unsafe { libc::nanosleep(&length, std::ptr::null_mut()) };
}

/// Three processes with two threads each that count as fast as they can.
pub fn spinning(room: &Room) -> Result<Check, Fault> {
    const THREADS: usize = 2;
    let counters = Counters::map(room)?;
    for child in 0..3 {
        fork(move || {
            for thread in 1..THREADS {
                std::thread::spawn(move || {
                    loop {
                        counters.step(child * THREADS + thread);
                    }
                });
            }
            loop {
                counters.step(child * THREADS);
            }
        })?;
    }
    Ok(counters.all_go_on(3 * THREADS))
}

/// What the child of a vfork(2) does: it sleeps in its parent's memory for so many milliseconds, and ends.
extern "C" fn linger(milliseconds: *mut libc::c_void) -> libc::c_int {
    sleep(Duration::from_millis(milliseconds as u64));
    // SAFETY: ends this process alone, without running anything of its parent's.
    unsafe { libc::_exit(0) }
}

/// Waits in vfork(2) for a child that lingers: clone(2) with its flags, so that the child has a stack of its own.
fn vfork(milliseconds: u64) -> Result<(), Fault> {
    let mut stack = vec![0u8; 16 << 10];
    let top = stack.as_mut_ptr_range().end as usize & !15;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let child = sys!(clone(linger, top as *mut libc::c_void, flags, milliseconds as *mut libc::c_void))? as i32;
    sys!(waitpid(child, std::ptr::null_mut(), 0)).map(drop)
}

/// A child that is nearly always in vfork(2), for ten milliseconds at a time.
fn vfork_loop(room: &Room) -> Result<Check, Fault> {
    let counters = Counters::map(room)?;
    fork(move || {
        while vfork(10).is_ok() {
            counters.step(0);
        }
        1
    })?;
    Ok(counters.all_go_on(1))
}

/// A child that is in vfork(2) for ever.
fn vfork_stuck(room: &Room) -> Result<Check, Fault> {
    let child = room.family("stuck", |room| {
        let _ = std::fs::write(room.path("stuck.ready"), std::process::id().to_string());
        let _ = vfork(1_000_000_000);
    })?;
    let is_there = move || Path::new(&format!("/proc/{}/task/{}/children", child.pid, child.pid)).exists();
    Ok(Box::new(move || wait_for("the child", is_there)))
}

/// Processes that make processes as fast as the limit of their cgroup lets them: four bombers, whose children end at once,
/// sleep a little, make a thread, an orphan or a child of vfork(2). The counters are the births of each bomber, and in the next
/// slot the births that the kernel refused.
fn fork_bomb(room: &Room) -> Result<Check, Fault> {
    const BOMBERS: usize = 4;
    let counters = Counters::map(room)?;
    // Orphans come to the root, and nobody waits for them.
    sys!(prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))?;
    for bomber in 0..BOMBERS {
        fork(move || {
            for number in 0.. {
                match fork(move || short_life(number)) {
                    Ok(_) => counters.step(bomber),
                    Err(_) if errno() == libc::EAGAIN => counters.step(BOMBERS),
                    Err(_) => return 1,
                }
                sleep(Duration::from_millis(4));
                // Not at once, so that zombies stand around.
                if number % 4 == 0 {
                    while raw!(SYS_wait4, -1, 0, libc::WNOHANG, 0).is_ok_and(|pid| pid > 0) {}
                }
            }
            0
        })?;
    }
    let mut ignored = zeroed::<libc::sigaction>();
    ignored.sa_sigaction = libc::SIG_IGN;
    sys!(sigaction(libc::SIGCHLD, &ignored, std::ptr::null_mut()))?;
    Ok(counters.all_go_on(BOMBERS))
}

fn short_life(number: u64) -> i32 {
    match number % 5 {
        0 => {}
        1 => sleep(Duration::from_millis(3 + number % 7)),
        2 => {
            // The limit may not allow it.
            let _ = std::thread::Builder::new().spawn(|| sleep(Duration::from_millis(2)));
            sleep(Duration::from_millis(1));
        }
        3 => {
            let _ = fork(|| {
                sleep(Duration::from_millis(5));
                0
            });
        }
        _ => drop(vfork(1)),
    }
    0
}
