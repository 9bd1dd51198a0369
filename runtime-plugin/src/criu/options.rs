//! CRIU's options, as `criu(8)` names them.
//!
//! CRIU takes options before and after the command alike, so they are one flat list. Options whose engine part is not
//! there yet are accepted by name and refused by name (see [`Options::unsupported`]), never ignored when they would change
//! the result.

use std::path::PathBuf;

use clap::Parser;

/// One `criu` command line.
#[derive(Debug, Default, Parser)]
#[command(
    name = "criu",
    about = "Checkpoint and restore process trees, with CRIU's command line",
    disable_version_flag = true
)]
pub struct Options {
    /// What to do: dump, restore, check
    pub command: Option<String>,
    /// A second word, for commands that take one
    #[arg(trailing_var_arg = true, hide = true)]
    pub rest: Vec<String>,

    /// Print the version
    #[arg(short = 'V', long)]
    pub version: bool,

    /// The root of the process tree to dump
    #[arg(short = 't', long, value_name = "PID")]
    pub tree: Option<i32>,
    /// Where image files are
    #[arg(short = 'D', long, value_name = "DIR")]
    pub images_dir: Option<PathBuf>,
    /// Where logs and statistics go, if not to the image folder
    #[arg(short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Log file, in the work folder
    #[arg(short = 'o', long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Append the pid to the name of the log file
    #[arg(long)]
    pub log_pid: bool,
    /// How much to log: 0 (nothing) to 4 (everything)
    #[arg(short = 'v', long, value_name = "LEVEL", num_args = 0..=1, default_missing_value = "v", require_equals = false, action = clap::ArgAction::Append)]
    pub verbosity: Vec<String>,

    /// Leave the tree running after its dump
    #[arg(short = 'R', long)]
    pub leave_running: bool,
    /// Leave the tree stopped after its dump or restore
    #[arg(short = 's', long)]
    pub leave_stopped: bool,
    /// The tree belongs to a shell's job: its session and terminal are its starter's
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// Do not wait for the restored tree
    #[arg(short = 'd', long)]
    pub restore_detached: bool,
    /// Make the restored root a sibling of this process
    #[arg(short = 'S', long)]
    pub restore_sibling: bool,
    /// Write the restored root's pid here
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Root file system of the restored tree
    #[arg(short = 'r', long, value_name = "DIR")]
    pub root: Option<PathBuf>,

    /// Run a program at the stages of a dump or restore
    #[arg(long, value_name = "FILE")]
    pub action_script: Vec<PathBuf>,
    /// Objects outside the tree: `mnt[DEST]:KEY`, `file[MNT:INODE]`, …
    #[arg(long, value_name = "SPEC")]
    pub external: Vec<String>,
    /// Descriptors of this process that take the place of external objects: `fd[N]:KEY`
    #[arg(long, value_name = "SPEC")]
    pub inherit_fd: Vec<String>,
    /// Mounts whose source is outside the tree: `KEY:VALUE`
    #[arg(short = 'M', long, value_name = "KEY:VALUE")]
    pub ext_mount_map: Vec<String>,
    /// Namespaces to make empty on restore
    #[arg(long, value_name = "NS")]
    pub empty_ns: Vec<String>,
    /// Largest deleted file to save, in bytes; K, M and G are understood
    #[arg(long, value_name = "SIZE")]
    pub ghost_limit: Option<String>,
    /// Give up after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// The cgroup to freeze while the tree is stopped
    #[arg(long, value_name = "PATH")]
    pub freeze_cgroup: Option<PathBuf>,
    /// How to treat cgroups
    #[arg(long, value_name = "MODE", num_args = 0..=1, default_missing_value = "soft", require_equals = true)]
    pub manage_cgroups: Option<String>,
    /// Save and restore established TCP connections
    #[arg(long)]
    pub tcp_established: bool,
    /// Drop established TCP connections
    #[arg(long)]
    pub tcp_close: bool,
    /// Leave out connections that are being set up
    #[arg(long)]
    pub skip_in_flight: bool,
    /// Allow one end of a unix socket pair outside the tree
    #[arg(short = 'x', long, num_args = 0..=1, default_missing_value = "", require_equals = true)]
    pub ext_unix_sk: Option<String>,
    /// Save and restore file locks
    #[arg(short = 'l', long)]
    pub file_locks: bool,
    /// Link deleted files that have other names
    #[arg(long)]
    pub link_remap: bool,
    /// Use any path to a device
    #[arg(long)]
    pub evasive_devices: bool,
    /// Verify an already saved image, or a feature of the kernel
    #[arg(long, value_name = "NAME")]
    pub feature: Option<String>,

    // Accepted because callers pass them; nothing of ours depends on them.
    #[arg(long, hide = true, action = clap::ArgAction::Count)]
    no_default_config: u8,
    #[arg(long, value_name = "MODE", hide = true)]
    pre_dump_mode: Option<String>,
    #[arg(long, value_name = "FILE", hide = true)]
    config: Option<PathBuf>,
    #[arg(long, value_name = "METHOD", hide = true)]
    network_lock: Option<String>,
    #[arg(long, value_name = "NAME", hide = true)]
    cgroup_props: Option<String>,
    #[arg(short = 'L', long, value_name = "DIR", hide = true)]
    libdir: Option<PathBuf>,
    #[arg(long, hide = true)]
    display_stats: bool,
    #[arg(long, value_name = "CAP", num_args = 0..=1, require_equals = true, hide = true)]
    cpu_cap: Option<String>,
    #[arg(long, value_name = "METHOD", hide = true)]
    file_validation: Option<String>,
    #[arg(long, hide = true)]
    enable_external_masters: bool,
    #[arg(long, hide = true)]
    enable_external_sharing: bool,
    #[arg(long, hide = true)]
    force_irmap: bool,
    #[arg(long, hide = true)]
    mntns_compat_mode: bool,

    // Parts of CRIU that ferry's engine does not have yet.
    #[arg(long, value_name = "DIR")]
    prev_images_dir: Option<PathBuf>,
    /// Track memory changes for a later dump
    #[arg(long)]
    track_mem: bool,
    /// Remove pages from a parent image once a child image has them
    #[arg(long)]
    auto_dedup: bool,
    /// Restore memory as it is touched
    #[arg(long)]
    lazy_pages: bool,
    /// Send pages to a page server
    #[arg(long)]
    page_server: bool,
    /// Stream images through sockets
    #[arg(long)]
    stream: bool,
    #[arg(long, value_name = "ADDRESS")]
    address: Option<String>,
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    #[arg(long, value_name = "NS")]
    join_ns: Vec<String>,
    #[arg(long, value_name = "SPEC")]
    veth_pair: Vec<String>,
    #[arg(long, value_name = "SPEC")]
    cgroup_root: Vec<String>,
    #[arg(long, value_name = "PROFILE")]
    lsm_profile: Option<String>,
    #[arg(long, value_name = "CONTEXT")]
    lsm_mount_context: Option<String>,
    #[arg(long, value_name = "FD")]
    status_fd: Option<i32>,
    #[arg(long)]
    exec_cmd: bool,
}

impl Options {
    /// Parses a command line; `args[0]` is the program's name.
    pub fn parse_args(args: Vec<std::ffi::OsString>) -> Result<Self, clap::Error> {
        Self::try_parse_from(args.into_iter().map(split_verbosity))
    }

    /// The log level asked for: `-vN` sets it, `-v`, `-vv` … are 1, 2 ….
    pub fn log_level(&self) -> u32 {
        const DEFAULT: u32 = 2;
        // The first letter is the option's own.
        let level = |value: &String| value.parse().unwrap_or(1 + value.len() as u32);
        self.verbosity.last().map_or(DEFAULT, level)
    }

    /// Options on this line that need an engine part that is not there yet.
    pub fn unsupported(&self) -> Vec<&'static str> {
        let asked = [
            ("--prev-images-dir", self.prev_images_dir.is_some()),
            ("--track-mem", self.track_mem),
            ("--auto-dedup", self.auto_dedup),
            ("--lazy-pages", self.lazy_pages),
            ("--page-server", self.page_server),
            ("--stream", self.stream),
            ("--address", self.address.is_some()),
            ("--port", self.port.is_some()),
            ("--join-ns", !self.join_ns.is_empty()),
            ("--veth-pair", !self.veth_pair.is_empty()),
            ("--cgroup-root", !self.cgroup_root.is_empty()),
            ("--lsm-profile", self.lsm_profile.is_some()),
            ("--lsm-mount-context", self.lsm_mount_context.is_some()),
            ("--status-fd", self.status_fd.is_some()),
            ("--exec-cmd", self.exec_cmd),
            ("--tcp-close", self.tcp_close),
            ("--skip-in-flight", self.skip_in_flight),
            ("--ext-unix-sk", self.ext_unix_sk.is_some()),
            ("--link-remap", self.link_remap),
        ];
        asked.into_iter().filter_map(|(name, given)| given.then_some(name)).collect()
    }
}

/// `-v4` and `-vvv` are one word each, and `-v` takes no other.
fn split_verbosity(word: std::ffi::OsString) -> std::ffi::OsString {
    let Some(text) = word.to_str() else { return word };
    match text.strip_prefix("-v") {
        Some("") => "-v1".into(),
        _ => word,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Options {
        Options::parse_args(line.split(' ').map(Into::into).collect()).expect(line)
    }

    #[test]
    fn the_forms_that_callers_use() {
        let options = parse("criu dump -t 42 -D images -o dump.log -v4 --leave-running --shell-job --manage-cgroups");
        assert_eq!(options.command.as_deref(), Some("dump"));
        assert_eq!((options.tree, options.leave_running, options.shell_job), (Some(42), true, true));
        assert_eq!(options.log_level(), 4);
        assert_eq!(options.manage_cgroups.as_deref(), Some("soft"));
        let options = parse("criu -v restore -d -D images --manage-cgroups=ignore --external mnt[/x]:y --external z");
        assert_eq!(options.command.as_deref(), Some("restore"));
        assert_eq!((options.external.len(), options.restore_detached), (2, true));
        assert_eq!(parse("criu check -vvv").log_level(), 3);
        assert_eq!(parse("criu check -v").log_level(), 1);
        assert_eq!(parse("criu check -v0 --no-default-config --feature userns").log_level(), 0);
    }

    #[test]
    fn what_is_not_there_yet_is_named() {
        assert_eq!(parse("criu dump -t 1 --lazy-pages --track-mem").unsupported(), ["--track-mem", "--lazy-pages"]);
        assert!(parse("criu dump -t 1 --tcp-established").unsupported().is_empty());
    }
}
