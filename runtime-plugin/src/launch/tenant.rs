//! A further process in a running container: `exec`.
//!
//! It joins the namespaces that the first process has now, its cgroup and its root, and gets the container's seccomp
//! filter, as with runc. libcontainer tells why the program could not be executed through a pipe that closes on exec.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::notify_socket::NotifySocket;
use libcontainer::oci_spec::runtime::{Linux, LinuxBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, Process, Spec};
use libcontainer::process::args::ContainerType;

use super::{LaunchError, Passed, ProcessPlan, Result, check_preserved, failed, main_process, plain};
use crate::cgroups::ContainerCgroup;
use crate::state::Container;

/// A process to start in a container.
pub struct Tenant<'a> {
    /// The container, running (or paused, if the caller allows that).
    pub container: &'a Container,
    /// The container's config.
    pub spec: Spec,
    /// The process.
    pub process: Process,
    /// A cgroup below the container's own.
    pub sub_cgroup: Option<PathBuf>,
    /// Its terminal and descriptors.
    pub passed: Passed<'a>,
}

/// Starts the process and returns its pid, when its program has been executed.
///
/// # Errors
/// When it was not; nothing of it is left then.
pub fn exec(tenant: Tenant) -> Result<i32> {
    let Tenant { container, mut spec, process, sub_cgroup, passed } = tenant;
    check_preserved(passed.preserve_fds)?;
    let Some(init) = container.init else {
        return Err(LaunchError::Process { reason: format!("container {} has no process", container.id) });
    };
    let cgroup = match sub_cgroup {
        Some(below) => ContainerCgroup::at(container.cgroup.path().join(below), &container.id, false)?,
        None => container.cgroup.clone(),
    };
    let linux = linux_of_tenant(spec.linux().as_ref(), init.pid, cgroup.path())?;
    spec.set_process(Some(process)).set_linux(Some(linux));
    let socket = SocketFile::new(&container.directory);
    let (mut reasons, exec_notify) = io::pipe().map_err(|error| failed(&error))?;
    let pid = main_process(ProcessPlan {
        kind: ContainerType::TenantContainer { exec_notify_fd: exec_notify.as_raw_fd() },
        spec: Rc::new(spec),
        rootfs: container.rootfs.clone(),
        notify: socket.path.clone(),
        container: container.library()?,
        cgroup: &cgroup,
        no_pivot: false,
        passed: &passed,
    })?;
    NotifySocket::new(&socket.path).notify_container_start().map_err(|error| failed(&error))?;
    // Only the process holds the other end now, and it closes on exec.
    drop(exec_notify);
    let mut reason = String::new();
    reasons.read_to_string(&mut reason).map_err(|error| failed(&error))?;
    if reason.is_empty() { Ok(pid) } else { Err(LaunchError::Process { reason: plain(&reason) }) }
}

/// The namespaces of the container's config, as those of its first process; what is set once per container is left
/// out.
fn linux_of_tenant(linux: Option<&Linux>, init: i32, cgroup: &Path) -> Result<Linux> {
    let namespaces = linux.and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    let mut joined = Vec::with_capacity(namespaces.len());
    for namespace in namespaces {
        let path = format!("/proc/{init}/ns/{}", proc_name(namespace.typ()));
        let namespace = LinuxNamespaceBuilder::default().typ(namespace.typ()).path(path).build();
        joined.push(namespace.map_err(|error| failed(&error))?);
    }
    let mut builder = LinuxBuilder::default().namespaces(joined).cgroups_path(cgroup);
    if let Some(personality) = linux.and_then(|linux| linux.personality().clone()) {
        builder = builder.personality(personality);
    }
    if let Some(seccomp) = linux.and_then(|linux| linux.seccomp().clone()) {
        builder = builder.seccomp(seccomp);
    }
    builder.build().map_err(|error| failed(&error))
}

/// The name of a namespace's link in `/proc/PID/ns` (namespaces(7)).
fn proc_name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    }
}

/// The socket's file, which libcontainer does not remove.
struct SocketFile {
    path: PathBuf,
}

impl SocketFile {
    fn new(directory: &Path) -> Self {
        Self { path: directory.join(format!("exec-{}.sock", std::process::id())) }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
