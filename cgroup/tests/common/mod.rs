//! Cgroups and children that a test makes for itself, and removes again.
//!
//! Everything lives below `ferry-test-PID-N` in the freezer hierarchy or in cgroup2; nothing else is touched. The tests
//! need root. A design that the machine lacks is skipped, with a line that says so.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ferry_cgroup::{Cgroup, Hierarchies, Version};

/// Long enough for anything that is going to happen at all.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough that a task which runs would have shown it.
pub const A_WHILE: Duration = Duration::from_millis(40);

/// Runs the test once per design that this machine has a freezer of.
pub fn for_each_design(test: impl Fn(Version)) {
    for version in [Version::V1, Version::V2] {
        match hierarchy_root(version) {
            Some(_) => {
                println!("with {version:?}");
                test(version);
            }
            None => println!("SKIPPED: no {version:?} freezer is mounted on this machine"),
        }
    }
}

fn hierarchy_root(version: Version) -> Option<Cgroup> {
    let hierarchies = Hierarchies::detect().unwrap();
    let hierarchy = match version {
        Version::V1 => hierarchies.with_controller("freezer"),
        Version::V2 => hierarchies.unified(),
    };
    hierarchy?.cgroup("/").ok()
}

/// A cgroup directory of a test; removed with all below it when dropped.
pub struct TestCgroup {
    pub directory: PathBuf,
    pub version: Version,
}

impl TestCgroup {
    pub fn new(version: Version) -> TestCgroup {
        let root = hierarchy_root(version).expect("the caller asked for a design that is mounted");
        TestCgroup::below(root.directory(), version)
    }

    /// In the v1 hierarchy of `controller`, `None` where it is not mounted.
    pub fn in_controller(controller: &str) -> Option<TestCgroup> {
        let root = Hierarchies::detect().unwrap().with_controller(controller)?.cgroup("/").ok()?;
        let cgroup = TestCgroup::below(root.directory(), Version::V1);
        if controller == "cpuset" {
            // A new cpuset is empty, and nothing may enter it.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                fs::write(cgroup.directory.join(file), fs::read(root.directory().join(file)).unwrap()).unwrap();
            }
        }
        Some(cgroup)
    }

    fn below(root: &Path, version: Version) -> TestCgroup {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ferry-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = root.join(name);
        fs::create_dir(&directory).expect("making a cgroup needs root");
        TestCgroup { directory, version }
    }

    pub fn sub(&self, name: &str) -> PathBuf {
        let directory = self.directory.join(name);
        fs::create_dir(&directory).unwrap();
        directory
    }

    pub fn wish(&self, freeze: bool) {
        wish(&self.directory, self.version, freeze);
    }

    pub fn is_frozen(&self) -> bool {
        is_frozen(&self.directory, self.version)
    }

    pub fn add(&self, pid: i32) {
        add(&self.directory, pid);
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        remove_tree(&self.directory, self.version);
    }
}

/// Removes a cgroup and those below; waits for its tasks, which the test has killed, to be gone.
fn remove_tree(directory: &Path, version: Version) {
    let file = if version == Version::V1 { "freezer.state" } else { "cgroup.freeze" };
    if directory.join(file).exists() {
        wish(directory, version, false);
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path(), version);
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while fs::remove_dir(directory).is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
        assert!(Instant::now() < deadline, "{} stays busy", directory.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Freezes or thaws by hand, without ferry.
pub fn wish(directory: &Path, version: Version, freeze: bool) {
    let (file, text) = match (version, freeze) {
        (Version::V1, true) => ("freezer.state", "FROZEN"),
        (Version::V1, false) => ("freezer.state", "THAWED"),
        (Version::V2, true) => ("cgroup.freeze", "1"),
        (Version::V2, false) => ("cgroup.freeze", "0"),
    };
    fs::write(directory.join(file), text).unwrap();
}

/// What the kernel says, read without ferry.
pub fn is_frozen(directory: &Path, version: Version) -> bool {
    match version {
        Version::V1 => fs::read_to_string(directory.join("freezer.state")).unwrap().trim() == "FROZEN",
        Version::V2 => fs::read_to_string(directory.join("cgroup.events")).unwrap().contains("frozen 1"),
    }
}

pub fn add(directory: &Path, pid: i32) {
    fs::write(directory.join("cgroup.procs"), pid.to_string()).unwrap();
}

pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A child process whose progress can be seen; killed when dropped.
pub struct Busy {
    child: Child,
}

impl Busy {
    /// A shell that writes a line at a time, as long as someone reads.
    pub fn start(cgroup: &Path) -> Busy {
        Busy::spawn(cgroup, Command::new("sh").args(["-c", "while :; do echo; done"]))
    }

    /// This test program again, running only the (ignored) test `name` as a helper.
    pub fn helper(cgroup: &Path, name: &str) -> Busy {
        let program = std::env::current_exe().unwrap();
        Busy::spawn(
            cgroup,
            Command::new(program).args(["--exact", name, "--ignored", "--nocapture"]).env("FERRY_HELPER", cgroup),
        )
    }

    fn spawn(cgroup: &Path, command: &mut Command) -> Busy {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = child.stdout.as_ref().unwrap();
        rustix::io::ioctl_fionbio(stdout, true).unwrap();
        let busy = Busy { child };
        add(cgroup, busy.pid());
        busy
    }

    /// Sends SIGKILL.
    pub fn send_kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Sends SIGKILL and waits for the end.
    pub fn kill(&mut self) {
        self.send_kill();
        self.child.wait().unwrap();
    }

    pub fn is_dead(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// What it wrote since the last call.
    pub fn output(&mut self) -> String {
        let mut text = String::new();
        let mut buffer = [0; 65536];
        while let Ok(length @ 1..) = self.child.stdout.as_mut().unwrap().read(&mut buffer) {
            text.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        text
    }

    /// Waits until it writes something containing `text`, and returns all it wrote.
    pub fn wait_for_output(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut all = String::new();
        while !all.contains(text) {
            assert!(Instant::now() < deadline, "process {} wrote only {all:?}", self.pid());
            all.push_str(&self.output());
            std::thread::sleep(Duration::from_millis(1));
        }
        all
    }

    #[track_caller]
    pub fn assert_runs(&mut self) {
        self.output();
        self.wait_for_output("\n");
    }

    #[track_caller]
    pub fn assert_stopped(&mut self) {
        self.output();
        std::thread::sleep(A_WHILE);
        assert_eq!(self.output(), "", "process {} went on", self.pid());
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // A task frozen by v1 dies only once its cgroup is thawed, which the cgroup's guard does later.
        let _ = self.child.try_wait();
    }
}

/// The argument of a helper: the cgroup that it was started for. `None` when it is run as a plain test.
pub fn helper_argument() -> Option<PathBuf> {
    std::env::var_os("FERRY_HELPER").map(PathBuf::from)
}

pub fn wchan(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default()
}

/// The threads of a process.
pub fn threads(pid: i32) -> BTreeSet<i32> {
    fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect()
}

/// A pipe, as files.
pub fn pipe() -> (File, File) {
    let (read, write) = rustix::pipe::pipe().unwrap();
    (read.into(), write.into())
}
