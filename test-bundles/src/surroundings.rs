//! What a machine shows of a program besides its output: everything that a command which fails or is killed must not leave.
//!
//! A test moves into namespaces of its own first, so that what it sees is its own doing and can be compared line by line,
//! however busy the machine is: mounts, network links, sockets and System V objects are listed whole, and the folders where
//! programs leave things are empty file systems. Processes are those below the test, cgroups those that carry its name.

#![allow(unsafe_code)] // unshare(2), which the safe wrappers call unsafe for descriptors, and one ioctl(2)

use crate::processes::{self, PATIENCE};
use crate::{Outcome, Place};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Folders where programs leave things.
const FOLDERS: [&str; 4] = ["/tmp", "/run", "/dev/shm", "/var/tmp"];

/// Moves the calling thread, and what it starts, into mount, network and IPC namespaces of its own, with new file systems on
/// the folders where programs leave things. To be called once, before the test makes its place.
pub fn isolate() -> Outcome {
    let said = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
    // SAFETY: changes what this thread sees, no memory and no descriptor.
    if unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC) } != 0 {
        return Err(said("namespaces for the test")(std::io::Error::last_os_error()));
    }
    raise_loopback().map_err(said("the loopback link"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|error| said("keep mounts to the test")(error.into()))?;
    for folder in FOLDERS.iter().filter(|folder| Path::new(folder).is_dir()) {
        mount("tmpfs", *folder, "tmpfs", MountFlags::empty(), Some(c"mode=1777"))
            .map_err(|error| format!("a file system of the test's own on {folder}: {error}"))?;
    }
    Ok(())
}

/// Switches the loopback link of a new network namespace on (netdevice(7)).
fn raise_loopback() -> std::io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: a structure of integers and bytes, for which zero is a value.
    let mut request = unsafe { std::mem::zeroed::<libc::ifreq>() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: the request is as the kernel wants it for this call, and outlives it.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// One look at the surroundings: a line for each thing that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surroundings(BTreeSet<String>);

impl Surroundings {
    /// What is there now.
    pub fn look(place: &Place) -> Self {
        processes::reap();
        let mut seen = BTreeSet::new();
        seen.extend(processes::below().iter().map(|pid| process(*pid)));
        seen.extend(lines("/proc/thread-self/mountinfo", "mount", |line| Some(line.to_owned())));
        seen.extend(lines("/proc/thread-self/net/dev", "network link", |line| {
            line.split_once(':').map(|(name, _)| name.trim().to_owned())
        }));
        // The first columns are counters and addresses of the kernel.
        seen.extend(lines("/proc/thread-self/net/unix", "local socket", |line| {
            line.split_whitespace().nth(7).map(str::to_owned)
        }));
        for kind in ["tcp", "tcp6", "udp", "udp6"] {
            seen.extend(lines(&format!("/proc/thread-self/net/{kind}"), kind, |line| {
                line.split_whitespace().nth(1).filter(|word| word.contains(':')).map(str::to_owned)
            }));
        }
        for kind in ["shm", "msg", "sem"] {
            seen.extend(
                lines(&format!("/proc/sysvipc/{kind}"), kind, |line| Some(line.to_owned())).into_iter().skip(1),
            );
        }
        seen.extend(place.cgroups());
        let mut devices = BTreeSet::new();
        for folder in FOLDERS {
            files(Path::new(folder), &mut seen, &mut devices);
        }
        seen.extend(lines("/proc/locks", "lock", |line| {
            let device = line.split_whitespace().find(|word| word.matches(':').count() == 2)?;
            devices
                .iter()
                .any(|own| device.starts_with(own))
                .then(|| line.split_once(' ').map_or(line, |(_, rest)| rest).to_owned())
        }));
        Self(seen)
    }

    /// Waits until everything is as it was: the ends of processes take their time.
    ///
    /// # Errors
    /// What is there that was not, and what has gone.
    pub fn await_again(&self, place: &Place) -> Outcome {
        self.await_again_within(place, PATIENCE)
    }

    /// The same, with another patience than that of the tests.
    ///
    /// # Errors
    /// As of [`Self::await_again`].
    pub fn await_again_within(&self, place: &Place, patience: Duration) -> Outcome {
        let start = Instant::now();
        loop {
            let now = Self::look(place);
            if now == *self {
                return Ok(());
            }
            if start.elapsed() > patience {
                return Err(self.differences(&now).join("; "));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What differs in `now`.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let left = now.0.difference(&self.0).map(|line| format!("left: {line}"));
        left.chain(self.0.difference(&now.0).map(|line| format!("gone: {line}"))).collect()
    }
}

fn process(pid: i32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let (name, rest) = stat.rsplit_once(") ").unwrap_or_default();
    // Its start time tells it from a later one with the same pid (proc_pid_stat(5), field 22).
    format!("process {name}) started at {}", rest.split(' ').nth(19).unwrap_or_default())
}

/// What `take` finds in each line of a file of the kernel's.
fn lines(file: &str, what: &str, take: impl Fn(&str) -> Option<String>) -> BTreeSet<String> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().filter_map(take).map(|line| format!("{what} {line}")).collect()
}

/// Everything below a folder, but for logs and statistics, which commands are told to write.
fn files(folder: &Path, seen: &mut BTreeSet<String>, devices: &mut BTreeSet<String>) {
    let mut open = vec![PathBuf::from(folder)];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let Ok(found) = entry.metadata() else { continue };
            devices.insert(format!("{:02x}:{:02x}:", rustix::fs::major(found.dev()), rustix::fs::minor(found.dev())));
            let is = found.file_type();
            if is.is_dir() {
                open.push(path.clone());
            } else if name.ends_with(".log") || name.starts_with("stats-") {
                continue;
            }
            let kind = match () {
                () if is.is_dir() => "folder",
                () if is.is_socket() => "socket",
                () if is.is_fifo() => "fifo",
                () if is.is_symlink() => "link",
                () if is.is_file() => "file",
                () => "device",
            };
            let size = if is.is_file() { found.len() } else { 0 };
            let mode = found.permissions().mode();
            seen.insert(format!("{kind} {} mode {mode:o} owner {} size {size}", path.display(), found.uid()));
        }
    }
}
