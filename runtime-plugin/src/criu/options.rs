//! CRIU's options, as `criu(8)` names them, release 4.2.
//!
//! CRIU takes options before and after the command alike, so they are one flat list. Whatever an option says that ferry's
//! engine cannot do is refused by its name (see [`Options::unsupported`]), never ignored when it would change the result.
//! `docs/criu-options.md` lists what becomes of each.
//!
//! Words come in layers: configuration files, the command line or a remote request, a configuration file that
//! the request names. A later layer wins where there can be one value only, and adds where there can be several; see
//! [`Options::parse`].

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser};
use ferry_engine::fault::Fault;

use super::words;
use crate::failure::Failure;

/// One `criu` command line.
#[derive(Clone, Debug, Default, Parser)]
#[command(
    name = "criu",
    about = "Checkpoint and restore process trees, with CRIU's command line",
    after_help = "Options without a value can be negated: --no-OPTION.",
    args_override_self = true,
    disable_version_flag = true,
    disable_help_flag = true
)]
#[allow(missing_docs, reason = "the attributes say it")]
pub struct Options {
    /// What to do: dump, pre-dump, restore, check, cpuinfo, page-server
    pub command: Option<String>,
    /// A second word, for commands that take one
    #[arg(hide = true)]
    pub rest: Vec<OsString>,

    /// Print the version
    #[arg(short = 'V', long)]
    pub version: bool,
    /// Print this help
    #[arg(short = 'h', long, action = ArgAction::Help)]
    help: Option<bool>,

    /// The root of the process tree to dump
    #[arg(short = 't', long, value_name = "PID")]
    pub tree: Option<i32>,
    /// With check: tell what would keep a dump of the tree below this process from succeeding
    #[arg(long, value_name = "PID")]
    pub pid: Option<i32>,
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
    /// How much to log: -v0 (nothing), -v1 (errors), -v2 (warnings, the default), -v3, -v4 (everything); -v adds one
    #[arg(short = 'v', long, value_name = "LEVEL", num_args = 0..=1, default_missing_value = "+", require_equals = true, action = ArgAction::Append)]
    pub verbosity: Vec<String>,
    /// Print the statistics at the end
    #[arg(long)]
    pub display_stats: bool,
    /// Read options from a file, instead of the default ones
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Do not read the default configuration files
    #[arg(long)]
    pub no_default_config: bool,
    /// Close a descriptor before anything else
    #[arg(long, value_name = "FD", action = ArgAction::Append)]
    pub close: Vec<i32>,

    /// Leave the tree running after its dump
    #[arg(short = 'R', long)]
    pub leave_running: bool,
    /// Leave the tree stopped after its dump or restore
    #[arg(short = 's', long)]
    pub leave_stopped: bool,
    /// The tree belongs to a shell's job: its session and terminal are its starter's
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// Give up when the tree would stand still for longer
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// The cgroup to freeze while the tree is stopped
    #[arg(long, value_name = "PATH")]
    pub freeze_cgroup: Option<PathBuf>,

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
    /// Run the command after -- in place of this process once the tree is restored
    #[arg(long)]
    pub exec_cmd: bool,

    /// Run a program at the stages of a dump or restore
    #[arg(long, value_name = "FILE", action = ArgAction::Append)]
    pub action_script: Vec<PathBuf>,
    /// Objects outside the tree: `mnt[DEST]:KEY`, `file[MNT:INODE]`, …
    #[arg(long, value_name = "SPEC", action = ArgAction::Append)]
    pub external: Vec<String>,
    /// Descriptors of this process that take the place of external objects: `fd[N]:KEY`
    #[arg(long, value_name = "SPEC", action = ArgAction::Append)]
    pub inherit_fd: Vec<String>,
    /// Mounts whose source is outside the tree: `KEY:VALUE`, or `auto`
    #[arg(short = 'M', long, value_name = "KEY:VALUE", action = ArgAction::Append)]
    pub ext_mount_map: Vec<String>,
    /// With `mnt[]`: also mounts that are slaves of mounts outside
    #[arg(long)]
    pub enable_external_masters: bool,
    /// With `mnt[]`: also mounts that are shared with mounts outside
    #[arg(long)]
    pub enable_external_sharing: bool,
    /// Mounts to leave out
    #[arg(long, value_name = "DIR", action = ArgAction::Append)]
    pub skip_mnt: Vec<PathBuf>,
    /// File systems that can be mounted again as they are, or `all`
    #[arg(long, value_name = "FS,…", action = ArgAction::Append)]
    pub enable_fs: Vec<String>,
    /// Restore mounts as CRIU did before 4.0
    #[arg(long)]
    pub mntns_compat_mode: bool,
    /// Namespaces to make empty on restore
    #[arg(long, value_name = "NS", action = ArgAction::Append)]
    pub empty_ns: Vec<String>,
    /// A namespace to restore into: `net:PID`, `ipc:/PATH`, …
    #[arg(short = 'J', long, value_name = "NS:PID|FILE", action = ArgAction::Append)]
    pub join_ns: Vec<String>,
    /// The outside name of a network device pair: `INSIDE=OUTSIDE`
    #[arg(long, value_name = "IN=OUT", action = ArgAction::Append)]
    pub veth_pair: Vec<String>,

    /// How to treat cgroups: none, props, soft, full, strict or ignore
    #[arg(long, value_name = "MODE", num_args = 0..=1, default_missing_value = "soft", require_equals = true)]
    pub manage_cgroups: Option<String>,
    /// Where cgroups are restored: `[CONTROLLER:]/PATH`
    #[arg(long, value_name = "SPEC", action = ArgAction::Append)]
    pub cgroup_root: Vec<String>,
    /// Which properties of cgroups to save
    #[arg(long, value_name = "SPEC")]
    pub cgroup_props: Option<String>,
    /// The same, from a file
    #[arg(long, value_name = "FILE")]
    pub cgroup_props_file: Option<PathBuf>,
    /// Save this controller only; repeatable
    #[arg(long, value_name = "NAME", action = ArgAction::Append)]
    pub cgroup_dump_controller: Vec<String>,
    /// Where cgroup hierarchies are mounted already
    #[arg(long, value_name = "DIR")]
    pub cgroup_yard: Option<PathBuf>,

    /// Save and restore established TCP connections
    #[arg(long)]
    pub tcp_established: bool,
    /// Drop established TCP connections
    #[arg(long)]
    pub tcp_close: bool,
    /// Leave out connections that are being set up
    #[arg(long)]
    pub skip_in_flight: bool,
    /// How to hold back packets: iptables, nftables or skip
    #[arg(long, value_name = "METHOD")]
    pub network_lock: Option<String>,
    /// Allow one end of a unix socket pair outside the tree
    #[arg(short = 'x', long, value_name = "INODE,…", num_args = 0..=1, default_missing_value = "", require_equals = true, action = ArgAction::Append)]
    pub ext_unix_sk: Vec<String>,

    /// Largest deleted file to save, in bytes; K, M and G are understood
    #[arg(long, value_name = "SIZE")]
    pub ghost_limit: Option<String>,
    /// Find holes in deleted files by fiemap
    #[arg(long)]
    pub ghost_fiemap: bool,
    /// Save and restore file locks
    #[arg(short = 'l', long)]
    pub file_locks: bool,
    /// Link deleted files that have other names
    #[arg(long)]
    pub link_remap: bool,
    /// Use any path to a device
    #[arg(long)]
    pub evasive_devices: bool,
    /// Find the paths of inotify watches by search
    #[arg(long)]
    pub force_irmap: bool,
    /// Where to search for them
    #[arg(long, value_name = "DIR", action = ArgAction::Append)]
    pub irmap_scan_path: Vec<PathBuf>,
    /// How to tell that a file is the one that was dumped: filesize or buildid
    #[arg(long, value_name = "METHOD")]
    pub file_validation: Option<String>,
    /// Accept files whose mode has changed
    #[arg(long)]
    pub skip_file_rwx_check: bool,

    /// What of the CPU to save or compare: cpu, fpu, ins, all, none; ^ negates
    #[arg(long, value_name = "CAP,…", num_args = 0..=1, default_missing_value = "all", require_equals = true)]
    pub cpu_cap: Option<String>,
    /// Restore with this security label: `apparmor:NAME`, `selinux:LABEL`
    #[arg(long, value_name = "TYPE:NAME")]
    pub lsm_profile: Option<String>,
    /// Restore mounts with this SELinux context
    #[arg(long, value_name = "CONTEXT")]
    pub lsm_mount_context: Option<String>,
    /// Pass over settings that this kernel does not have
    #[arg(long)]
    pub weak_sysctls: bool,
    /// Accept the limits of an unprivileged user
    #[arg(long)]
    pub unprivileged: bool,
    /// Accept mappings of uprobes
    #[arg(long)]
    pub allow_uprobes: bool,
    /// Where CRIU looks for plugins
    #[arg(short = 'L', long, value_name = "DIR")]
    pub libdir: Option<PathBuf>,
    /// Let something go wrong, for tests: `POINT[:N]=error|kill|kill-parent|kill-both|ask|delay:MILLISECONDS`
    #[arg(long, value_name = "FAULT", hide = true, action = ArgAction::Append)]
    pub fault: Vec<Fault>,
    /// Print the names of all points for --fault
    #[arg(long, hide = true)]
    pub list_faults: bool,
    /// Accept what CRIU calls deprecated
    #[arg(long)]
    pub deprecated: bool,

    /// The images of an earlier dump
    #[arg(long, value_name = "DIR")]
    pub prev_images_dir: Option<PathBuf>,
    /// Track memory changes for a later dump
    #[arg(long)]
    pub track_mem: bool,
    /// Remove pages from a parent image once a child image has them
    #[arg(long)]
    pub auto_dedup: bool,
    /// How a pre-dump reads memory: splice or read
    #[arg(long, value_name = "MODE")]
    pub pre_dump_mode: Option<String>,
    /// Restore memory as it is touched
    #[arg(long)]
    pub lazy_pages: bool,
    /// Send pages to a page server
    #[arg(long)]
    pub page_server: bool,
    /// Stream images through sockets
    #[arg(long)]
    pub stream: bool,
    /// Address of a page server or a service
    #[arg(long, value_name = "ADDRESS")]
    pub address: Option<String>,
    /// Port of a page server
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// A connected socket to a page server
    #[arg(long, value_name = "FD")]
    pub ps_socket: Option<i32>,
    /// Write a zero byte here once the server listens
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<i32>,
    /// Run in the background
    #[arg(long)]
    pub daemon: bool,
    /// Encrypt connections
    #[arg(long)]
    pub tls: bool,
    #[arg(long, value_name = "FILE", hide = true)]
    pub tls_cacert: Option<PathBuf>,
    #[arg(long, value_name = "FILE", hide = true)]
    pub tls_cacrl: Option<PathBuf>,
    #[arg(long, value_name = "FILE", hide = true)]
    pub tls_cert: Option<PathBuf>,
    #[arg(long, value_name = "FILE", hide = true)]
    pub tls_key: Option<PathBuf>,
    #[arg(long, hide = true)]
    pub tls_no_cn_verify: bool,

    /// check: tell whether the kernel has this feature; `list` names all
    #[arg(long, value_name = "NAME", action = ArgAction::Append)]
    pub feature: Vec<String>,
    /// check: also what only some programs need
    #[arg(long)]
    pub extra: bool,
    /// check: also what is experimental
    #[arg(long)]
    pub experimental: bool,
    /// check: everything
    #[arg(long)]
    pub all: bool,
}

impl Options {
    /// Parses words, those of every layer in their order, without a program's name.
    ///
    /// # Errors
    /// clap's: a message for the terminal, or the help.
    pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let command = Self::command();
        let words = words::canonical(&command, words);
        let matches = command.try_get_matches_from(std::iter::once("criu".into()).chain(words))?;
        Self::from_arg_matches(&matches)
    }

    /// The log level asked for: `-vN` sets it, each `-v` adds one.
    pub fn log_level(&self) -> u32 {
        const DEFAULT: u32 = 2;
        self.verbosity.iter().fold(DEFAULT, |level, word| word.parse().unwrap_or(level + 1))
    }

    /// What this line asks for and ferry cannot do. Values are looked at too: a mode that means nothing to ferry is taken.
    ///
    /// Words that only permit something (`--tcp-close`, `--link-remap`, …) are not among it: clients give them to every
    /// container. What needs them is refused where it is found.
    pub fn unsupported(&self) -> Vec<&'static str> {
        let asked = [("--stream", self.stream), ("--tls", self.tls)];
        asked.into_iter().filter_map(|(name, given)| given.then_some(name)).collect()
    }
}

/// Parses a size with CRIU's suffixes K, M and G.
///
/// # Errors
/// It is none, or more than 64 bits hold.
pub fn parse_size(text: &str) -> Result<u64, Failure> {
    let bad = || Failure::new(format!("{text} is no size: give bytes, or a number with K, M or G"));
    let (digits, shift) = match text.chars().last() {
        Some('K' | 'k') => (&text[..text.len() - 1], 10),
        Some('M' | 'm') => (&text[..text.len() - 1], 20),
        Some('G' | 'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Options {
        Options::parse(line.split(' ').map(Into::into)).expect(line)
    }

    #[test]
    fn the_forms_that_callers_use() {
        let options = parse("dump -t 42 -D images -o dump.log -v4 --leave-running --shell-job --manage-cgroups");
        assert_eq!(options.command.as_deref(), Some("dump"));
        assert_eq!((options.tree, options.leave_running, options.shell_job), (Some(42), true, true));
        assert_eq!(options.log_level(), 4);
        assert_eq!(options.manage_cgroups.as_deref(), Some("soft"));
        let options = parse("-v restore -d -D images --manage-cgroups=ignore --external mnt[/x]:y --external z");
        assert_eq!(options.command.as_deref(), Some("restore"));
        assert_eq!((options.external.len(), options.restore_detached), (2, true));
        assert_eq!(parse("cpuinfo dump -D x").rest, ["dump"]);
    }

    #[test]
    fn verbosity_is_set_or_raised() {
        let levels = ["check", "check -v", "check -vvv", "check -v0 --no-default-config", "check -v0 -v", "-v4 check"];
        assert_eq!(levels.map(|line| parse(line).log_level()), [2, 3, 5, 0, 1, 4]);
        assert_eq!(parse("check --verbosity=1").log_level(), 1);
    }

    #[test]
    fn later_layers_win_or_add() {
        let options =
            parse("--tcp-close --ghost-limit 1M --external a dump --ghost-limit 2M --external b --no-tcp-close");
        assert_eq!((options.tcp_close, options.ghost_limit.as_deref()), (false, Some("2M")));
        assert_eq!(options.external, ["a", "b"]);
        assert!(parse("--no-shell-job dump -j").shell_job);
    }

    #[test]
    fn what_is_not_there_yet_is_named() {
        assert_eq!(parse("dump -t 1 --stream --tls").unsupported(), ["--stream", "--tls"]);
        assert!(parse("dump -t 1 --lazy-pages --page-server").unsupported().is_empty());
        assert!(parse("lazy-pages --page-server").unsupported().is_empty());
        assert!(parse("dump -t 1 --tcp-established").unsupported().is_empty());
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(
            (parse_size("12").unwrap(), parse_size("3k").unwrap(), parse_size("1G").unwrap()),
            (12, 3072, 1 << 30)
        );
        assert!(parse_size("").is_err() && parse_size("x").is_err() && parse_size("99999999999999G").is_err());
    }
}
