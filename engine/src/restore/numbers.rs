//! Whether the numbers that a tree had are free in ferry's own pid namespace.
//!
//! Directly after a dump they may not be. A task that has ended keeps its number until its parent has waited for it, and there are inits
//! that look for orphans every two seconds only; and when nobody finds the task any more (kill(2) says ESRCH), the
//! parent's wait4(2) is still about to give the number back. Both pass, and are waited for.

use std::fs::File;
use std::os::fd::AsFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::error::RestoreError;
use crate::procfs::Stat;
use crate::sys::owner::is_number_in_use;
use crate::sys::{HostPid, NsPid};

/// How long tasks that have ended may keep numbers, all of them together.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often they are looked at.
const GLANCE: Duration = Duration::from_millis(2);

/// The numbers of ferry's pid namespace.
pub struct Numbers {
    probe: File,
    deadline: Instant,
}

impl Numbers {
    /// From now on, patience runs out.
    ///
    /// # Errors
    /// There is no `/dev/null`.
    pub fn new() -> Result<Self, RestoreError> {
        let failed = |error: std::io::Error| RestoreError::Own {
            step: "open /dev/null",
            errno: Errno::from_raw(error.raw_os_error().unwrap_or_default()),
        };
        Ok(Self { probe: File::open("/dev/null").map_err(failed)?, deadline: Instant::now() + PATIENCE })
    }

    /// Why no task can have this number, if that stays so.
    pub fn problem(&self, pid: NsPid) -> Option<String> {
        while is_number_in_use(self.probe.as_fd(), pid.0) {
            let there = kill(Pid::from_raw(pid.0), None) != Err(Errno::ESRCH);
            let ended = Stat::read(HostPid(pid.0)).is_ok_and(|stat| matches!(stat.state, 'Z' | 'X'));
            if there && !ended || Instant::now() >= self.deadline {
                return Some(taken(pid, there));
            }
            sleep(GLANCE);
        }
        None
    }
}

fn taken(pid: NsPid, by_task: bool) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let who = match (by_task, comm.trim_end()) {
        (false, _) => "a process group or session whose leader has ended".to_owned(),
        (true, "") => "another task".to_owned(),
        (true, comm) => format!("another task ({comm})"),
    };
    format!("pid {pid} is in use by {who}: restore when it is gone, or into a pid namespace")
}
