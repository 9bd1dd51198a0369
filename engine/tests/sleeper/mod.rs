//! A child process to try things on.

use std::process::{Child, Command, Stdio};

use ferry_engine::sys::HostPid;

/// A process that sleeps until the test is over.
pub struct Sleeper(Child);

impl Sleeper {
    /// Starts it, and waits until it sleeps.
    pub fn start() -> (Self, HostPid) {
        let child = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().expect("sleep starts");
        let pid = HostPid(child.id() as i32);
        // The child has become `sleep` when its vdso and executable are in place and it sleeps.
        while !std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default().contains("nanosleep") {
            std::thread::yield_now();
        }
        (Self(child), pid)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `/proc/PID/maps`.
pub fn maps(pid: HostPid) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps are readable")
}

/// Where its vdso lies.
pub fn vdso(pid: HostPid) -> std::ops::Range<u64> {
    let maps = maps(pid);
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).expect("a vdso");
    let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
    u64::from_str_radix(start, 16).expect("hex")..u64::from_str_radix(end, 16).expect("hex")
}
