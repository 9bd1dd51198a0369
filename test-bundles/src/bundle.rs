//! OCI bundles made for tests: a root file system of few programs with their libraries, and a `config.json` as `runc spec`
//! writes it, less the terminal.

use crate::workload::Talk;
use crate::{Outcome, Place, capabilities, programs};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A bundle's folder and configuration; written out by [`Bundle::write`].
pub struct Bundle {
    /// The folder.
    pub path: PathBuf,
    /// What becomes `config.json`.
    pub config: Value,
}

impl Bundle {
    /// A bundle whose root file system holds busybox under all its names.
    pub fn new(place: &Place, arguments: &[&str]) -> Outcome<Self> {
        let path = place.folder("bundle")?;
        for folder in ["bin", "proc", "sys", "dev", "tmp", "etc", "work", "var/run"] {
            place.folder(&format!("bundle/rootfs/{folder}"))?;
        }
        let bundle = Self { path, config: config(place.name(), arguments) };
        let busybox = bundle.root("bin/busybox");
        std::fs::copy(programs::installed("busybox")?, &busybox)
            .map_err(|error| format!("{}: {error}", busybox.display()))?;
        for name in
            ["sh", "sleep", "cat", "ls", "ps", "echo", "true", "kill", "nc", "wget", "mount", "touch", "rm", "grep"]
        {
            std::os::unix::fs::symlink("busybox", bundle.root("bin").join(name))
                .map_err(|error| format!("{name}: {error}"))?;
        }
        Ok(bundle)
    }

    /// A bundle whose first process is a workload, `/bin/workload` beside busybox, with every capability that this machine has,
    /// and the folder to talk with it, which is `/work` inside.
    pub fn of_workload(place: &Place, name: &str) -> Outcome<(Self, Talk)> {
        let (program, work) = (programs::workload()?, place.folder("work")?);
        let mut bundle = Self::new(place, &["/bin/workload", name, "/work"])?;
        bundle.add_program(&program)?;
        let inside = bundle.root("bin/workload");
        std::fs::copy(&program, &inside).map_err(|error| format!("{}: {error}", inside.display()))?;
        bundle.privileged().bind(&work, "/work", &["rw"]);
        Ok((bundle, Talk::new(work)))
    }

    /// A path in the root file system, from outside.
    pub fn root(&self, name: &str) -> PathBuf {
        self.path.join("rootfs").join(name.trim_start_matches('/'))
    }

    /// Copies a program into the root file system, at the path it has here, with the libraries it is linked to.
    pub fn add_program(&self, program: &Path) -> Outcome {
        self.add_file(program)?;
        let libraries = programs::run(Command::new("ldd").arg(program))?;
        for word in String::from_utf8_lossy(&libraries.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
            self.add_file(Path::new(word))?;
        }
        Ok(())
    }

    /// Copies a file into the root file system, at the path it has here.
    pub fn add_file(&self, file: &Path) -> Outcome {
        let target = self.root(&file.to_string_lossy());
        let folder = target.parent().unwrap_or(&self.path);
        let copied = std::fs::create_dir_all(folder).and_then(|()| std::fs::copy(file, &target));
        copied.map(|_| ()).map_err(|error| format!("{} into the bundle: {error}", file.display()))
    }

    /// Writes a file of the root file system.
    pub fn put(&self, name: &str, content: &str) -> Outcome {
        let target = self.root(name);
        let written = std::fs::create_dir_all(target.parent().unwrap_or(&self.path))
            .and_then(|()| std::fs::write(&target, content));
        written.map_err(|error| format!("{}: {error}", target.display()))
    }

    /// Makes the root file system writable inside.
    pub fn writable(&mut self) -> &mut Self {
        self.config["root"]["readonly"] = json!(false);
        self
    }

    /// Gives the container's first process every capability that this machine has, and lets it gain privileges.
    pub fn privileged(&mut self) -> &mut Self {
        let all = capabilities::available();
        for set in ["bounding", "effective", "permitted"] {
            self.config["process"]["capabilities"][set] = json!(all);
        }
        self.config["process"]["noNewPrivileges"] = json!(false);
        self
    }

    /// Binds a folder or file of the host into the container.
    pub fn bind(&mut self, source: &Path, destination: &str, options: &[&str]) -> &mut Self {
        let options: Vec<&str> = [&["rbind"], options].concat();
        let mount = json!({"destination": destination, "type": "bind", "source": source, "options": options});
        if let Some(mounts) = self.config["mounts"].as_array_mut() {
            mounts.push(mount);
        }
        self
    }

    /// Writes `config.json`.
    pub fn write(&self) -> Outcome {
        let text = serde_json::to_vec_pretty(&self.config).map_err(|error| error.to_string())?;
        std::fs::write(self.path.join("config.json"), text).map_err(|error| format!("config.json: {error}"))
    }
}

/// The configuration that `runc spec` writes, for these arguments; the cgroup is named for the test.
fn config(name: &str, arguments: &[&str]) -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": arguments,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "ferry-test",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "cgroupsPath": format!("/{name}"),
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                            "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}
