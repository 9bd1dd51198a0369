//! Starting the first process of a container, and further ones in it, through libcontainer.
//!
//! libcontainer's own builders read the bundle's `config.json` themselves and choose the cgroup. What they do around
//! `container_main_process` is done here instead: from a config in memory, with ferry's cgroup path and state. The
//! order is that of the builders: socket for the start, `oom_score_adj`, not dumpable, then the process.

mod copy_up;
mod program;
mod tenant;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use ferry_hooks::Stage;
use libcontainer::container::ContainerStatus;
use libcontainer::notify_socket::{NOTIFY_FILE, NotifyListener, NotifySocket};
use libcontainer::oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use libcontainer::user_ns::UserNamespaceConfig;
use libcontainer::utils;
use libcontainer::validator::Validator;

pub use tenant::{Tenant, exec};

use crate::cgroups::ContainerCgroup;
use crate::failure::{Failure, sentence_of};
use crate::logs;
use crate::state::{Container, NewContainer, StateError, read_spec};

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The bundle is no bundle.
    #[error("{path} is no bundle: it has no config.json")]
    NoBundle {
        /// The directory given.
        path: PathBuf,
    },
    /// The config is valid JSON and no valid container.
    #[error("the bundle's config cannot be used: {reason}")]
    Config {
        /// What is wrong.
        reason: String,
    },
    /// The root file system is not there.
    #[error("the bundle's root file system {path} cannot be used")]
    Rootfs {
        /// As the config names it, from the bundle.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A descriptor to pass on is not open.
    #[error("file descriptor {fd} is not open, but --preserve-fds {count} passes it on")]
    NoSuchFd {
        /// The descriptor.
        fd: i32,
        /// As given.
        count: i32,
    },
    /// The state could not be written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The cgroup could not be used.
    #[error(transparent)]
    Cgroup(#[from] crate::cgroups::CgroupError),
    /// The process was not started; nothing of it is left.
    #[error("cannot start the container's process: {reason}")]
    Process {
        /// libcontainer's reasons, joined.
        reason: String,
    },
}

type Result<T> = std::result::Result<T, LaunchError>;

/// What a process gets beside what the config says.
pub struct Passed<'a> {
    /// A socket that receives the terminal's master side.
    pub console: Option<BorrowedFd<'a>>,
    /// Descriptors after standard error (and those of `LISTEN_FDS`) that are passed on.
    pub preserve_fds: i32,
    /// Whether ferry ends before the process does.
    pub detached: bool,
}

/// A bundle, read and checked.
pub struct Bundle {
    /// Its directory, absolute.
    pub directory: PathBuf,
    /// Its config, with the root file system's path made absolute.
    pub spec: Spec,
}

impl Bundle {
    /// Reads and checks the bundle in `directory`.
    ///
    /// # Errors
    /// What makes it unfit for any container.
    pub fn open(directory: &Path) -> Result<Self> {
        let config = directory.join("config.json");
        if !config.exists() {
            return Err(LaunchError::NoBundle { path: directory.to_owned() });
        }
        let directory = directory.canonicalize().map_err(|_| LaunchError::NoBundle { path: directory.to_owned() })?;
        let mut spec = read_spec(&directory.join("config.json"))?;
        check(&spec)?;
        let root = spec.root().as_ref().map(|root| directory.join(root.path()));
        let rootfs = root.ok_or_else(|| refuse("it names no root file system"))?;
        let real = rootfs.canonicalize().and_then(|real| fs::read_dir(&real).map(|_| real));
        let real = real.map_err(|source| LaunchError::Rootfs { path: rootfs, source })?;
        if let Some(root) = spec.root_mut() {
            root.set_path(real);
        }
        Ok(Self { directory, spec })
    }

    /// The config with the cgroup that was chosen for it.
    pub fn spec_with_cgroup(&self, cgroup: &ContainerCgroup) -> Spec {
        let mut spec = self.spec.clone();
        if let Some(linux) = spec.linux_mut() {
            linux.set_cgroups_path(Some(cgroup.path().to_owned()));
        }
        spec
    }

    /// Whether the config asks for a terminal.
    pub fn wants_terminal(&self) -> bool {
        self.spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false)
    }
}

fn refuse(reason: impl Into<String>) -> LaunchError {
    LaunchError::Config { reason: reason.into() }
}

/// The checks of libcontainer's builder, and those of runc that it lacks.
fn check(spec: &Spec) -> Result<()> {
    if !spec.version().starts_with("1.") {
        return Err(refuse(format!("it is of version {:?}, and only 1.x is known", spec.version())));
    }
    let linux = spec.linux().as_ref().ok_or_else(|| refuse("it has no section linux"))?;
    if linux.intel_rdt().is_some() {
        return Err(refuse("linux.intelRdt is not supported"));
    }
    let process = spec.process().as_ref().ok_or_else(|| refuse("it has no section process"))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(refuse("process.args is empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(refuse("process.cwd is no absolute path"));
    }
    let syscall = create_syscall();
    let told = |error: &dyn std::error::Error| refuse(sentence_of(error));
    Validator::validate_spec(spec).map_err(|error| told(&error))?;
    if let Some(mounts) = spec.mounts() {
        utils::validate_mount_options(mounts).map_err(|error| told(&error))?;
    }
    utils::validate_spec_for_new_user_ns(spec, &*syscall).map_err(|error| told(&error))?;
    utils::validate_spec_for_net_devices(spec, &*syscall).map_err(|error| told(&error))
}

/// Sets up the container `id` from a bundle. Its first process waits for the start.
///
/// # Errors
/// When it cannot be set up; then neither process, cgroup nor state is left.
pub fn create(
    root: &Path,
    id: &str,
    bundle: &Bundle,
    systemd: bool,
    no_pivot: bool,
    passed: &Passed,
) -> Result<Container> {
    check_preserved(passed.preserve_fds)?;
    let cgroup = ContainerCgroup::of_spec(&bundle.spec, id, systemd)?;
    let mut spec = bundle.spec_with_cgroup(&cgroup);
    let new = NewContainer::claim(root, id, &bundle.directory, &spec, cgroup, None)?;
    let copied = copy_up::take(&mut spec);
    let rootfs = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
    let has_own_network = makes_network(&spec);
    let pid = main_process(ProcessPlan {
        kind: ContainerType::InitContainer,
        spec: Rc::new(spec),
        rootfs: rootfs.clone(),
        notify: new.directory().join(NOTIFY_FILE),
        container: new.library().clone(),
        cgroup: new.cgroup(),
        no_pivot,
        passed,
    })?;
    let container = new.keep(pid, ContainerStatus::Created)?;
    let network = if has_own_network { raise_loopback(pid) } else { Ok(()) };
    let finished = network
        .map_err(|error| format!("cannot raise its loopback link: {error}"))
        .and_then(|()| copy_up::fill(&copied, &rootfs, pid).map_err(|error| format!("cannot fill its tmpfs {error}")));
    finished.map_err(|reason| {
        let left = crate::lifecycle::delete::destroy(&container).err();
        let left = left.map(|left| format!("; and the container could not be removed: {left}")).unwrap_or_default();
        LaunchError::Process { reason: reason + &left }
    })?;
    Ok(container)
}

/// Whether the container gets a network namespace that nobody has set up before.
fn makes_network(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let is_new =
        |namespace: &LinuxNamespace| namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none();
    namespaces.is_some_and(|all| all.iter().any(is_new))
}

/// Raises the loopback link of a new container, as runc does.
fn raise_loopback(pid: i32) -> io::Result<()> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    ferry_engine::namespaces::raise_loopback(pidfd.as_fd())
}

/// Every descriptor that is to be passed on must be open: what took its number later would be passed on instead.
fn check_preserved(count: i32) -> Result<()> {
    let listen: i32 = std::env::var("LISTEN_FDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    for fd in (3..).take(usize::try_from(listen + count).unwrap_or(0)) {
        if !Path::new("/proc/self/fd").join(fd.to_string()).exists() {
            return Err(LaunchError::NoSuchFd { fd, count });
        }
    }
    Ok(())
}

/// One process to start.
struct ProcessPlan<'a> {
    kind: ContainerType,
    spec: Rc<Spec>,
    rootfs: PathBuf,
    /// The socket on which the process waits for its start.
    notify: PathBuf,
    container: libcontainer::container::Container,
    cgroup: &'a ContainerCgroup,
    no_pivot: bool,
    passed: &'a Passed<'a>,
}

/// Starts the process and returns its pid; it waits on its socket.
fn main_process(plan: ProcessPlan) -> Result<i32> {
    let notify_listener = NotifyListener::new(&plan.notify).map_err(|error| failed(&error))?;
    let user_ns_config = UserNamespaceConfig::new(&plan.spec).map_err(|error| failed(&error))?;
    if let Some(score) = plan.spec.process().as_ref().and_then(|process| process.oom_score_adj()) {
        set_oom_score(score)?;
    }
    // A process of the container could otherwise trace the new one between joining the namespaces and the exec,
    // and reach the host through its descriptors.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .map_err(|error| failed(&error))?;
    let args = ContainerArgs {
        container_type: plan.kind,
        syscall: SyscallType::default(),
        spec: plan.spec,
        rootfs: plan.rootfs,
        console_socket: plan.passed.console.map(|socket| socket.as_raw_fd()),
        notify_listener,
        preserve_fds: plan.passed.preserve_fds,
        container: Some(plan.container),
        cgroup_config: plan.cgroup.config(),
        user_ns_config,
        detached: plan.passed.detached,
        executor: Box::new(program::Program),
        no_pivot: plan.no_pivot,
        stdin: None,
        stdout: None,
        stderr: None,
        as_sibling: false,
        pid_file: None,
    };
    container_main_process(&args).map(|pid| pid.as_raw()).map_err(|error| failed(&error))
}

fn failed(error: &dyn std::error::Error) -> LaunchError {
    LaunchError::Process { reason: plain(&sentence_of(error)) }
}

/// libcontainer's message without the layers that it passed through.
fn plain(reason: &str) -> String {
    const LAYERS: &[&str] =
        &["failed to wait for init ready: ", "exec process failed with error ", "error in executing process : "];
    LAYERS.iter().fold(reason.to_owned(), |reason, layer| reason.replace(layer, ""))
}

/// Children inherit the score (proc_pid_oom_score_adj(5)). Lowering it needs CAP_SYS_RESOURCE; where the host does not
/// give that to root, the container runs with the caller's score.
fn set_oom_score(score: i32) -> Result<()> {
    match fs::write("/proc/self/oom_score_adj", score.to_string()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(score, "oom_score_adj cannot be lowered without CAP_SYS_RESOURCE; it stays as it is");
            Ok(())
        }
        Err(error) => Err(LaunchError::Process { reason: format!("cannot set oom_score_adj to {score}: {error}") }),
        Ok(()) => Ok(()),
    }
}

/// Lets the first process of a created container go on, and runs the poststart hooks; one that fails is only told of.
///
/// # Errors
/// When the process does not answer, or the state cannot be written.
pub fn start(container: &Container) -> std::result::Result<(), Failure> {
    let told = |failure: Failure| failure.context(format_args!("cannot start container {}", container.id));
    let hooks = container.hooks()?;
    let mut socket = NotifySocket::new(container.directory.join(NOTIFY_FILE));
    socket.notify_container_start().map_err(|error| told(error.into()))?;
    container.save_status(ContainerStatus::Running)?;
    let state = container.hook_state(ferry_hooks::Status::Running);
    for failed in hooks.run(Stage::Poststart, &state)? {
        logs::say(&sentence_of(&failed));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_plain() {
        let told = "exec process failed with error error in executing process : executable 'x' not found in $PATH";
        assert_eq!(plain(told), "executable 'x' not found in $PATH");
    }

    #[test]
    fn a_directory_without_config_is_no_bundle() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(Bundle::open(directory.path()), Err(LaunchError::NoBundle { .. })));
        assert!(matches!(Bundle::open(&directory.path().join("missing")), Err(LaunchError::NoBundle { .. })));
    }
}
