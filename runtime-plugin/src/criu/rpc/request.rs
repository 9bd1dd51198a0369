//! The options of a request, as the words of the command line that means the same.
//!
//! So a request has its place between configuration files, and everything after it is one path for both. What is set to
//! false takes back what a configuration file said. Each value is one word together with its option's name: nothing in a
//! request can become an option of its own.

use std::ffi::OsString;
use std::os::fd::OwnedFd;

use ferry_engine::sys::HostPid;

use super::message::{CgroupMode, RequestOptions, RequestType};
use super::notify::Wants;
use super::peer::Peer;
use crate::criu::config;
use crate::criu::options::Options;
use crate::failure::Failure;

/// The file that a request's log goes to when it names none.
const DEFAULT_LOG: &str = "criu.log";

/// `CLONE_NEWNET`, the only namespace that can be left empty.
const EMPTY_NETWORK: u32 = 0x4000_0000;

/// A request, ready to be carried out.
#[derive(Debug)]
pub struct Prepared {
    /// What to do.
    pub options: Options,
    /// What the client wants to be told of.
    pub wants: Wants,
    /// What to run in place of this process after a restore.
    pub exec: Vec<String>,
    /// The folders that `options` name by these descriptors.
    _folders: Vec<OwnedFd>,
}

/// Turns the options of a request into what the command line would have made of them.
///
/// # Errors
/// Something in it is wrong, or cannot be had; with `EBADRQC`.
pub fn prepare(kind: RequestType, asked: &RequestOptions, peer: &Peer) -> Result<Prepared, Failure> {
    prepare_any(kind, asked, peer).map_err(|failure| match failure.errno() {
        Some(_) => failure,
        None => failure.with_errno(libc::EBADRQC),
    })
}

fn prepare_any(kind: RequestType, asked: &RequestOptions, peer: &Peer) -> Result<Prepared, Failure> {
    let mut words = Words::default();
    let folders = add_folders(&mut words, kind, asked, peer)?;
    add_log(&mut words, asked)?;
    add_switches(&mut words, asked);
    add_values(&mut words, asked)?;
    add_objects(&mut words, asked)?;
    if !peer.is_starter() && (asked.rst_sibling == Some(true) || !asked.inherit_fd.is_empty()) {
        return Err(Failure::new("rst_sibling and inherit_fd are for criu swrk only: a service is nobody's child"));
    }
    if !peer.is_starter() && asked.ps.as_ref().is_some_and(|server| server.fd.is_some()) {
        return Err(Failure::new("the fd of ps is for criu swrk only: a service has no descriptors of its clients"));
    }
    if asked.images_dir_fd < 0 && asked.images_dir.is_none() && kind != RequestType::Check {
        return Err(Failure::new("the request names no images folder: give images_dir_fd or images_dir"));
    }
    if !peer.is_trusted() {
        for (name, given) in [
            ("images_dir", asked.images_dir.is_some()),
            ("config_file", asked.config_file.is_some()),
            ("freeze_cgroup", asked.freeze_cgroup.is_some()),
            ("cgroup_props_file", asked.cgroup_props_file.is_some()),
            ("cgroup_yard", asked.cgroup_yard.is_some()),
        ] {
            if given {
                return Err(peer.refused(&format!("may not use {name}"), "leave it out, or ask as root"));
            }
        }
    }
    let mut all = config::defaults(&[])?;
    all.append(&mut words.0);
    if let Some(file) = asked.config_file.as_deref().filter(|file| !file.is_empty()) {
        // runc names its file whether there is one or not.
        all.extend(config::read(file.as_ref())?.unwrap_or_default());
    }
    let mut options = Options::parse(all).map_err(|error| {
        let text = error.to_string();
        Failure::new(text.lines().next().unwrap_or_default().trim_start_matches("error: "))
    })?;
    if options.log_file.is_none() && asked.log_to_stderr != Some(true) {
        options.log_file = Some(DEFAULT_LOG.into());
    }
    options.tree = Some(asked.pid.unwrap_or(peer.pid.0));
    options.restore_detached = true;
    // Nothing is printed, whatever a configuration file says.
    options.display_stats = false;
    Ok(Prepared {
        options,
        wants: Wants {
            events: asked.notify_scripts == Some(true),
            terminals: asked.notify_scripts == Some(true) && asked.orphan_pts_master == Some(true),
        },
        exec: asked.exec_cmd.clone(),
        _folders: folders,
    })
}

impl Prepared {
    /// The root of the tree to dump.
    pub fn root(&self) -> HostPid {
        HostPid(self.options.tree.unwrap_or_default())
    }
}

/// Options with their values.
#[derive(Default)]
struct Words(Vec<OsString>);

impl Words {
    /// An option that has a value.
    fn value(&mut self, name: &str, value: impl Into<OsString>) {
        let mut word = OsString::from(format!("--{name}="));
        word.push(value.into());
        self.0.push(word);
    }

    /// An option that has a value, if there is one.
    fn optional(&mut self, name: &str, value: Option<&String>) {
        if let Some(value) = value {
            self.value(name, value);
        }
    }

    /// An option without value, or its opposite.
    fn switch(&mut self, name: &str, on: Option<bool>) {
        match on {
            Some(true) => self.0.push(format!("--{name}").into()),
            Some(false) => self.0.push(format!("--no-{name}").into()),
            None => {}
        }
    }
}

/// The folders of images and of logs, by the client's own descriptors.
fn add_folders(
    words: &mut Words,
    kind: RequestType,
    asked: &RequestOptions,
    peer: &Peer,
) -> Result<Vec<OwnedFd>, Failure> {
    let mut kept = Vec::new();
    if asked.images_dir_fd >= 0 {
        let (path, descriptor) = peer.folder("images_dir_fd", asked.images_dir_fd)?;
        words.value("images-dir", path);
        kept.push(descriptor);
    } else if let Some(path) = &asked.images_dir {
        words.value("images-dir", path);
    }
    if let Some(number) = asked.work_dir_fd.filter(|number| *number >= 0 || kind != RequestType::Check) {
        let (path, descriptor) = peer.folder("work_dir_fd", number)?;
        words.value("work-dir", path);
        kept.push(descriptor);
    }
    Ok(kept)
}

fn add_log(words: &mut Words, asked: &RequestOptions) -> Result<(), Failure> {
    if let Some(file) = &asked.log_file {
        if file.contains('/') {
            return Err(Failure::new(format!("log_file {file:?}: No subdirs are allowed in log_file name")));
        }
        words.value("log-file", file);
    }
    words.value("verbosity", asked.log_level.unwrap_or(2).clamp(0, 4).to_string());
    Ok(())
}

fn add_switches(words: &mut Words, asked: &RequestOptions) {
    let switches = [
        ("leave-running", asked.leave_running),
        ("leave-stopped", asked.leave_stopped),
        ("tcp-established", asked.tcp_established),
        ("tcp-close", asked.tcp_close),
        ("skip-in-flight", asked.tcp_skip_in_flight),
        ("evasive-devices", asked.evasive_devices),
        ("shell-job", asked.shell_job),
        ("file-locks", asked.file_locks),
        ("track-mem", asked.track_mem),
        ("auto-dedup", asked.auto_dedup),
        ("link-remap", asked.link_remap),
        ("restore-sibling", asked.rst_sibling),
        ("lazy-pages", asked.lazy_pages),
        ("enable-external-sharing", asked.ext_sharing),
        ("enable-external-masters", asked.ext_masters),
        ("tls", asked.tls),
    ];
    for (name, on) in switches {
        words.switch(name, on);
    }
}

fn add_values(words: &mut Words, asked: &RequestOptions) -> Result<(), Failure> {
    words.optional("root", asked.root.as_ref());
    words.optional("prev-images-dir", asked.parent_img.as_ref());
    words.optional("freeze-cgroup", asked.freeze_cgroup.as_ref());
    words.optional("lsm-profile", asked.lsm_profile.as_ref());
    words.optional("lsm-mount-context", asked.lsm_mount_context.as_ref());
    words.optional("cgroup-props", asked.cgroup_props.as_ref());
    words.optional("cgroup-props-file", asked.cgroup_props_file.as_ref());
    words.optional("cgroup-yard", asked.cgroup_yard.as_ref());
    if let Some(limit) = asked.ghost_limit {
        words.value("ghost-limit", limit.to_string());
    }
    if let Some(seconds) = asked.timeout.filter(|seconds| *seconds > 0) {
        words.value("timeout", seconds.to_string());
    }
    if let Some(mode) = cgroup_mode(asked)? {
        words.value("manage-cgroups", mode);
    }
    if let Some(bits) = asked.cpu_cap {
        let named = [(1, "fpu"), (2, "cpu"), (4, "ins")].into_iter().filter(|(bit, _)| bits & bit != 0);
        let names: Vec<&str> = std::iter::once("none").chain(named.map(|(_, name)| name)).collect();
        words.value("cpu-cap", names.join(","));
    }
    match asked.empty_ns {
        None | Some(0) => {}
        Some(EMPTY_NETWORK) => words.value("empty-ns", "net"),
        Some(other) => return Err(Failure::new(format!("empty_ns {other:#x}: only a network namespace can be empty"))),
    }
    match asked.network_lock {
        None => {}
        Some(1) => words.value("network-lock", "iptables"),
        Some(2) => words.value("network-lock", "nftables"),
        Some(3) => words.value("network-lock", "skip"),
        Some(other) => return Err(Failure::new(format!("network_lock {other} is no method of locking"))),
    }
    match asked.pre_dump_mode {
        None => {}
        Some(1) => words.value("pre-dump-mode", "splice"),
        Some(2) => words.value("pre-dump-mode", "read"),
        Some(other) => return Err(Failure::new(format!("pre_dump_mode {other} is no mode of reading memory"))),
    }
    Ok(())
}

fn cgroup_mode(asked: &RequestOptions) -> Result<Option<&'static str>, Failure> {
    let Some(mode) = asked.manage_cgroups_mode else {
        return Ok(asked.manage_cgroups.map(|managed| if managed { "soft" } else { "ignore" }));
    };
    let bad = || Failure::new(format!("manage_cgroups_mode {mode} is no mode of cgroups"));
    Ok(Some(match CgroupMode::try_from(mode).map_err(|_| bad())? {
        CgroupMode::Ignore => "ignore",
        CgroupMode::None => "none",
        CgroupMode::Props => "props",
        CgroupMode::Soft | CgroupMode::Default => "soft",
        CgroupMode::Full => "full",
        CgroupMode::Strict => "strict",
    }))
}

/// Options that may be given many times.
fn add_objects(words: &mut Words, asked: &RequestOptions) -> Result<(), Failure> {
    for mount in &asked.ext_mnt {
        if mount.key.is_empty() || mount.value.is_empty() {
            return Err(Failure::new(format!(
                "ext_mnt {:?}: {:?}: both a key and a value are wanted",
                mount.key, mount.value
            )));
        }
        words.value("external", format!("mnt[{}]:{}", mount.key, mount.value));
    }
    if asked.auto_ext_mnt == Some(true) {
        words.value("external", "mnt[]");
    }
    for external in &asked.external {
        words.value("external", external);
    }
    for inherited in &asked.inherit_fd {
        words.value("inherit-fd", format!("fd[{}]:{}", inherited.fd, inherited.key));
    }
    for pair in &asked.veths {
        words.value("veth-pair", format!("{}={}", pair.key, pair.value));
    }
    for namespace in &asked.join_ns {
        let more = namespace.extra_opt.as_ref().map(|more| format!(",{more}")).unwrap_or_default();
        words.value("join-ns", format!("{}:{}{more}", namespace.ns, namespace.ns_file));
    }
    for root in &asked.cg_root {
        match &root.ctrl {
            Some(controller) => words.value("cgroup-root", format!("{controller}:{}", root.path)),
            None => words.value("cgroup-root", &root.path),
        }
    }
    for controller in &asked.cgroup_dump_controller {
        words.value("cgroup-dump-controller", controller);
    }
    for mount in &asked.skip_mnt {
        words.value("skip-mnt", mount);
    }
    for file_system in &asked.enable_fs {
        words.value("enable-fs", file_system);
    }
    let sockets: Vec<String> = asked.unix_sk_ino.iter().map(|socket| socket.inode.to_string()).collect();
    if asked.ext_unix_sk == Some(true) {
        words.value("ext-unix-sk", sockets.join(","));
    }
    if let Some(server) = &asked.ps {
        // Where pages stay here and are asked for, the port is the one to listen at.
        let sent_away = asked.lazy_pages != Some(true);
        if sent_away {
            words.0.push("--page-server".into());
        }
        words.optional("address", server.address.as_ref());
        if let Some(port) = server.port.filter(|port| *port != 0) {
            let port = u16::try_from(port).map_err(|_| Failure::new(format!("ps: {port} is no port")))?;
            words.value("port", port.to_string());
        }
        if let Some(number) = server.fd.filter(|_| sent_away) {
            words.value("ps-socket", number.to_string());
        }
    }
    Ok(())
}
