//! `criu check`: whether this host, and ferry on it, can do what is asked for.
//!
//! A feature is there when the kernel has it and ferry uses it: callers ask in order to know whether a dump will succeed. What
//! every kernel has that ferry runs on is not probed.

use std::path::Path;
use std::process::ExitCode;

use super::dump;
use super::options::Options;
use crate::failure::{Failure, Outcome};
use crate::obstacles;

/// A feature's name, and whether it is there.
type Feature = (&'static str, fn() -> bool);

/// CRIU's names of features, in its order, and whether ferry has them.
const FEATURES: [Feature; 45] = [
    ("mnt_id", yes),
    ("mem_dirty_track", yes),
    ("aio_remap", yes),
    ("timerfd", yes),
    ("tun", no),
    ("tun_ns", no),
    ("userns", no),
    ("fdinfo_lock", yes),
    ("seccomp_suspend", yes),
    ("seccomp_filters", yes),
    ("loginuid", yes),
    ("cgroupns", yes),
    ("autofs", no),
    ("tcp_half_closed", no),
    ("compat_cr", no),
    ("uffd", ferry_engine::lazy::is_possible),
    ("uffd-noncoop", ferry_engine::lazy::is_possible),
    ("can_map_vdso", yes),
    ("sk_ns", no),
    ("sk_unix_file", yes),
    ("net_diag_raw", no),
    ("nsid", no),
    ("link_nsid", no),
    ("kcmp_epoll", yes),
    ("timens", has_time_namespaces),
    ("external_net_ns", yes),
    ("clone3_set_tid", yes),
    ("newifindex", no),
    ("nftables", no),
    ("has_ipt_legacy", no),
    ("pidfd_store", yes),
    ("ns_pid", no),
    ("apparmor_stacking", no),
    ("network_lock_nftables", no),
    ("sockopt_buf_lock", yes),
    ("memfd_hugetlb", no),
    ("move_mount_set_group", yes),
    ("openat2", yes),
    ("get_rseq_conf", yes),
    ("ipv6_freebind", no),
    ("pagemap_scan", yes),
    ("timer_cr_ids", no),
    ("overlayfs_maps", no),
    ("breakpoints", no),
    ("pagemap_scan_guard_pages", no),
];

fn yes() -> bool {
    true
}

fn no() -> bool {
    false
}

fn has_time_namespaces() -> bool {
    Path::new("/proc/self/ns/time").exists()
}

/// Runs `criu check`.
///
/// # Errors
/// What the host lacks; a feature that nobody knows.
#[allow(clippy::print_stdout, reason = "the answer to a command belongs on standard output")]
pub fn run(options: &Options) -> Outcome {
    if options.feature.iter().any(|name| name == "list") {
        let names: Vec<&str> = FEATURES.iter().map(|(name, _)| *name).collect();
        println!("{}", names.join(" "));
        return Ok(ExitCode::SUCCESS);
    }
    if !options.feature.is_empty() {
        let mut all = true;
        for feature in &options.feature {
            all &= has(feature)?;
        }
        return Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if let Some(pid) = options.pid {
        let found = obstacles::find(pid, &dump::dump_options(options)?)?;
        print!("{}", obstacles::report(&format!("process {pid}"), &found));
        return Ok(if found.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    ferry_engine::preflight::check_host()?;
    let missing: Vec<&str> = FEATURES.iter().filter(|(_, present)| !present()).map(|(name, _)| *name).collect();
    if (options.extra || options.experimental || options.all) && !missing.is_empty() {
        println!("Looks good but some features are missing, which some processes need: {}", missing.join(" "));
        return Ok(ExitCode::FAILURE);
    }
    println!("Looks good.");
    Ok(ExitCode::SUCCESS)
}

fn has(feature: &str) -> Result<bool, Failure> {
    let known = FEATURES.iter().find(|(name, _)| *name == feature);
    let unknown = || Failure::new(format!("unknown feature {feature}: --feature list names all"));
    known.map(|(_, present)| present()).ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_told_and_unknown_ones_are_an_error() {
        assert_eq!((has("mnt_id").unwrap(), has("userns").unwrap()), (true, false));
        assert!(has("nonsense").unwrap_err().to_string().contains("list"));
    }
}
