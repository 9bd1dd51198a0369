//! A bundle with busybox in a temporary directory, a state directory beside it, and the check that nothing is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// One bundle and one container name. Dropped, it deletes the container and asserts that nothing of it is left.
pub struct Fixture {
    /// The container's name, which no other test has.
    pub id: String,
    directory: tempfile::TempDir,
    bundle: PathBuf,
}

impl Fixture {
    /// A bundle whose program is `args`; its `/bin` has every applet of busybox, and `/tmp` can be written.
    pub fn new(name: &str, args: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let bundle = directory.path().canonicalize().unwrap().join("bundle");
        let bin = bundle.join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir_all(bundle.join("rootfs/tmp")).unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).expect("these tests need busybox-static");
        for applet in ["sh", "sleep", "cat", "ls", "true", "id", "readlink", "hostname", "echo", "kill"] {
            std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
        }
        let id = format!("ferry-test-{name}-{}", std::process::id());
        let mut fixture = Self { id, directory, bundle };
        fixture.succeeds(&["spec", "--bundle", fixture.bundle.to_str().unwrap()]);
        let args: Vec<Value> = args.iter().map(|&arg| Value::from(arg)).collect();
        fixture.change(|config| {
            config["process"]["terminal"] = Value::from(false);
            config["process"]["args"] = Value::from(args.clone());
            config["root"]["readonly"] = Value::from(false);
            config["hostname"] = Value::from("inside");
            config["annotations"] = serde_json::json!({"org.example.kind": "test"});
        });
        fixture
    }

    /// Changes the bundle's config.
    pub fn change(&mut self, change: impl FnOnce(&mut Value)) {
        let path = self.bundle.join("config.json");
        let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(path, config.to_string()).unwrap();
    }

    /// A directory for the test's own files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// The state directory.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// A command of ferry, run in the bundle.
    pub fn ferry(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferry"));
        command.arg("--root").arg(self.root()).args(args).current_dir(&self.bundle).stdin(Stdio::null());
        command
    }

    /// Runs a command that must succeed; its output.
    pub fn succeeds(&self, args: &[&str]) -> String {
        let output = self.ferry(args).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?} failed: {errors}");
        assert!(errors.is_empty(), "{args:?} complained: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with this exit status; what it says.
    pub fn fails(&self, args: &[&str], status: i32) -> String {
        let output = self.ferry(args).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {errors}");
        errors
    }

    /// Runs a command that leaves a process behind, which must not hold the test's pipes.
    pub fn detached(&self, args: &[&str]) {
        let errors = self.directory().join("stderr");
        let status =
            self.ferry(args).stdout(Stdio::null()).stderr(fs::File::create(&errors).unwrap()).status().unwrap();
        assert!(status.success(), "{args:?} failed: {}", fs::read_to_string(&errors).unwrap());
    }

    /// `run -d`.
    pub fn run_detached(&self) {
        self.detached(&["run", "--detach", &self.id]);
    }

    /// `exec` of a program that may fail; its output.
    pub fn exec(&self, program: &[&str]) -> String {
        let args: Vec<&str> = ["exec", &self.id].into_iter().chain(program.iter().copied()).collect();
        String::from_utf8(self.ferry(&args).output().unwrap().stdout).unwrap()
    }

    /// `state`.
    pub fn state(&self) -> Value {
        serde_json::from_str(&self.succeeds(&["state", &self.id])).unwrap()
    }

    /// `list -q`.
    pub fn listed(&self) -> String {
        self.succeeds(&["list", "-q"])
    }

    /// The name of the command that the container's first process runs.
    pub fn command_of(&self, state: &Value) -> String {
        let exe = fs::read_link(format!("/proc/{}/exe", state["pid"])).unwrap_or_default();
        let name = exe.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name != "busybox" {
            return name;
        }
        fs::read_to_string(format!("/proc/{}/comm", state["pid"])).unwrap_or_default().trim().to_owned()
    }

    fn assert_nothing_is_left(&self) {
        let cgroups = find_cgroups(Path::new("/sys/fs/cgroup"), &self.id);
        assert!(cgroups.is_empty(), "cgroups are left: {cgroups:?}");
        let bundle = self.bundle.to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounts: Vec<&str> = mounts.lines().filter(|line| line.contains(bundle)).collect();
        assert!(mounts.is_empty(), "mounts are left: {mounts:?}");
        let processes: Vec<PathBuf> = fs::read_dir("/proc")
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| fs::read_link(path.join("exe")).is_ok_and(|exe| exe.starts_with(bundle)))
            .collect();
        assert!(processes.is_empty(), "processes are left: {processes:?}");
        let state: Vec<_> = fs::read_dir(self.root()).map(|entries| entries.flatten().collect()).unwrap_or_default();
        assert!(state.is_empty(), "state is left: {state:?}");
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.ferry(&["delete", "--force", &self.id]).output();
        if !std::thread::panicking() {
            self.assert_nothing_is_left();
        }
    }
}

fn find_cgroups(directory: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            found.extend(find_cgroups(&path, name));
            if entry.file_name().to_string_lossy().contains(name) {
                found.push(path);
            }
        }
    }
    found
}

/// Waits for a condition.
pub fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    let mut condition = condition;
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "gave up waiting: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
