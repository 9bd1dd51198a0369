//! Which control files are saved, and how each is written.
//!
//! The names are those that CRIU saves, and of v2 also the limits, which CRIU leaves out. A file that this kernel lacks, or
//! that cannot be read, is not saved. An image may name no other files: some (`release_agent`) would let it run programs
//! on the host.
//!
//! Kernel facts (Documentation/admin-guide/cgroup-v1/, cgroup-v2.rst): `cpuset.*` of v1 must be set before a task can enter, and
//! `cgroup.type` before anything else can; `devices.list` is set through `devices.deny` and `devices.allow`, one line a write, as are the
//! per-device files; a memory limit may not exceed the one with swap, so the order depends on the values at hand.

use std::io;

use crate::directory::Cgroup;
use crate::hierarchy::Version;

/// Files of every v1 cgroup; of the latter two only owner and mode.
const EVERY_V1: [&str; 4] = ["cgroup.clone_children", "notify_on_release", "cgroup.procs", "tasks"];

/// Files of every v2 cgroup, whatever controllers it has.
const EVERY_V2: [&str; 7] = [
    "cgroup.type",
    "cgroup.subtree_control",
    "cgroup.max.descendants",
    "cgroup.max.depth",
    "cgroup.freeze",
    "cgroup.procs",
    "cgroup.threads",
];

/// Files of v1 controllers, in the order in which they are written.
const V1: [(&str, &[&str]); 9] = [
    ("cpu", &["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.rt_period_us", "cpu.rt_runtime_us"]),
    (
        "memory",
        &[
            "memory.limit_in_bytes",
            "memory.memsw.limit_in_bytes",
            "memory.swappiness",
            "memory.soft_limit_in_bytes",
            "memory.move_charge_at_immigrate",
            "memory.oom_control",
            "memory.use_hierarchy",
            "memory.kmem.limit_in_bytes",
            "memory.kmem.tcp.limit_in_bytes",
        ],
    ),
    (
        "cpuset",
        &[
            "cpuset.cpus",
            "cpuset.mems",
            "cpuset.memory_migrate",
            "cpuset.cpu_exclusive",
            "cpuset.mem_exclusive",
            "cpuset.mem_hardwall",
            "cpuset.memory_spread_page",
            "cpuset.memory_spread_slab",
            "cpuset.sched_load_balance",
            "cpuset.sched_relax_domain_level",
        ],
    ),
    (
        "blkio",
        &[
            "blkio.weight",
            "blkio.throttle.read_bps_device",
            "blkio.throttle.write_bps_device",
            "blkio.throttle.read_iops_device",
            "blkio.throttle.write_iops_device",
        ],
    ),
    ("freezer", &["freezer.state"]),
    ("net_cls", &["net_cls.classid"]),
    ("net_prio", &["net_prio.ifpriomap"]),
    ("pids", &["pids.max"]),
    ("devices", &["devices.list"]),
];

/// Files of v2 controllers; which of them there are depends on what the parent enables.
const V2: [&str; 22] = [
    "cpu.weight",
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.uclamp.min",
    "cpu.uclamp.max",
    "memory.min",
    "memory.low",
    "memory.high",
    "memory.max",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
    "memory.oom.group",
    "io.weight",
    "io.max",
    "pids.max",
    "cpuset.cpus",
    "cpuset.mems",
    "cpuset.cpus.partition",
    "rdma.max",
    "misc.max",
];

/// When a property is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// As soon as the cgroup exists: before it has children or tasks.
    Early,
    /// Once the directories are there.
    Usual,
    /// Not with the others: when the tasks are complete, see `RestoredCgroups::restore_freezer_states`.
    Freezer,
}

/// The names that may be in an image for a hierarchy with these controllers.
pub(super) fn is_known(version: Version, name: &str) -> bool {
    match version {
        Version::V1 => {
            EVERY_V1.contains(&name) || V1.iter().any(|(_, names)| names.contains(&name)) || is_hugetlb(version, name)
        }
        Version::V2 => EVERY_V2.contains(&name) || V2.contains(&name) || is_hugetlb(version, name),
    }
}

/// The names to save for a cgroup of a hierarchy with these controllers. They may not exist.
pub(super) fn names(cgroup: &Cgroup, controllers: &[String]) -> io::Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    let mut add = |more: &[&str]| names.extend(more.iter().map(|name| (*name).to_owned()));
    match cgroup.version() {
        Version::V1 => {
            for (_, files) in V1.iter().filter(|(controller, _)| controllers.iter().any(|name| name == controller)) {
                add(files);
            }
            add(&EVERY_V1);
        }
        Version::V2 => {
            add(&EVERY_V2);
            add(&V2);
        }
    }
    // One limit per size of huge page.
    if cgroup.version() == Version::V2 || controllers.iter().any(|name| name == "hugetlb") {
        let mut limits: Vec<String> =
            cgroup.files()?.into_iter().filter(|name| is_hugetlb(cgroup.version(), name)).collect();
        limits.sort();
        names.append(&mut limits);
    }
    Ok(names)
}

/// Whether a known file is one of the controller's.
pub(super) fn is_of(version: Version, controller: &str, name: &str) -> bool {
    match version {
        Version::V1 => {
            V1.iter().any(|(known, names)| *known == controller && names.contains(&name))
                || controller == "hugetlb" && is_hugetlb(version, name)
        }
        Version::V2 => name.strip_prefix(controller).is_some_and(|rest| rest.starts_with('.')),
    }
}

fn is_hugetlb(version: Version, name: &str) -> bool {
    let suffixes: &[&str] = match version {
        Version::V1 => &[".limit_in_bytes", ".rsvd.limit_in_bytes"],
        Version::V2 => &[".max", ".rsvd.max"],
    };
    let size = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_alphanumeric());
    name.strip_prefix("hugetlb.")
        .is_some_and(|rest| suffixes.iter().any(|suffix| rest.strip_suffix(suffix).is_some_and(size)))
}

/// Whether only owner and mode of the file are saved: what it lists are tasks.
pub(super) fn lists_tasks(name: &str) -> bool {
    matches!(name, "cgroup.procs" | "cgroup.threads" | "tasks")
}

/// When the property is written.
pub(super) fn turn(name: &str) -> Turn {
    match name {
        "freezer.state" | "cgroup.freeze" => Turn::Freezer,
        "cgroup.type"
        | "cgroup.subtree_control"
        | "devices.list"
        | "memory.swappiness"
        | "memory.oom_control"
        | "memory.use_hierarchy"
        | "memory.kmem.limit_in_bytes" => Turn::Early,
        name if name.starts_with("cpuset.") => Turn::Early,
        _ => Turn::Usual,
    }
}

/// What is saved for what the kernel says.
pub(super) fn saved_value(name: &str, text: &str) -> String {
    match name {
        // Only the switch can be written back, not the rest of the report.
        "memory.oom_control" => {
            text.lines().find_map(|line| line.strip_prefix("oom_kill_disable ")).unwrap_or("0").trim().to_owned()
        }
        _ => text.to_owned(),
    }
}

/// Whether a value says anything: a per-device file without a limit does not.
pub(super) fn is_worth_saving(name: &str, value: &str) -> bool {
    !is_per_device(name) || value.lines().any(|line| !line.ends_with(" max") && line != "default 100")
}

/// The writes, file and text, that change a property from `current` to `value`. Empty when nothing is to be done.
pub(super) fn writes(name: &str, current: &str, value: &str) -> Vec<(String, String)> {
    let to = |file: &str, text: &str| (file.to_owned(), text.to_owned());
    if lists_tasks(name) || saved_value(name, current) == value {
        return Vec::new();
    }
    match name {
        "devices.list" => {
            let allowed = value.lines().map(|line| to("devices.allow", line));
            std::iter::once(to("devices.deny", "a")).chain(allowed).collect()
        }
        "cgroup.subtree_control" => {
            let (now, wanted): (Vec<&str>, Vec<&str>) = (current.split(' ').collect(), value.split(' ').collect());
            let enable =
                wanted.iter().filter(|name| !name.is_empty() && !now.contains(name)).map(|name| format!("+{name}"));
            let disable =
                now.iter().filter(|name| !name.is_empty() && !wanted.contains(name)).map(|name| format!("-{name}"));
            enable.chain(disable).map(|change| to(name, &change)).collect()
        }
        // The only change that can be made; the other values follow from the tree.
        "cgroup.type" if value != "threaded" => Vec::new(),
        "net_prio.ifpriomap" => {
            // Every interface has priority 0 to begin with, and the target may have other interfaces.
            value.lines().filter(|line| !line.ends_with(" 0")).map(|line| to(name, line)).collect()
        }
        _ if is_per_device(name) => value.lines().map(|line| to(name, line)).collect(),
        _ => vec![to(name, value)],
    }
}

fn is_per_device(name: &str) -> bool {
    matches!(name, "io.max" | "io.weight" | "rdma.max" | "misc.max") || name.starts_with("blkio.throttle.")
}

/// Whether a value is what a new cgroup has anyway, so that it does no harm when the file is missing here.
pub(super) fn is_usual(name: &str, value: &str) -> bool {
    const UNLIMITED_V1: &str = "9223372036854771712";
    matches!(value, "" | "0" | "-1" | "max" | "max 100000" | UNLIMITED_V1)
        || matches!(
            (name, value),
            ("cpu.rt_period_us", "1000000") | ("cpu.weight" | "io.weight", "100" | "default 100")
        )
        || matches!(
            (name, value),
            ("cpu.uclamp.min", "0.00") | ("memory.swappiness", "60") | ("memory.use_hierarchy", "1")
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(name: &str, current: &str, value: &str) -> Vec<String> {
        writes(name, current, value).into_iter().map(|(file, text)| format!("{file}={text}")).collect()
    }

    #[test]
    fn files_that_run_programs_or_are_paths_are_not_known() {
        for name in [
            "release_agent",
            "cgroup.kill",
            "cgroup.event_control",
            "../cgroup.procs",
            "hugetlb.../x.max",
            "hugetlb..max",
        ] {
            assert!(!is_known(Version::V1, name) && !is_known(Version::V2, name), "{name}");
        }
        assert!(
            is_known(Version::V1, "hugetlb.2MB.limit_in_bytes") && !is_known(Version::V2, "hugetlb.2MB.limit_in_bytes")
        );
        assert!(is_known(Version::V2, "hugetlb.1GB.rsvd.max"));
        assert!(is_known(Version::V1, "memory.limit_in_bytes") && is_known(Version::V2, "memory.max"));
    }

    #[test]
    fn an_equal_value_is_not_written() {
        assert!(texts("cpu.shares", "1024", "1024").is_empty());
        assert_eq!(texts("cpu.shares", "1024", "512"), ["cpu.shares=512"]);
        assert!(texts("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\noom_kill 0", "1").is_empty());
        assert!(texts("cgroup.procs", "12", "").is_empty());
    }

    #[test]
    fn values_of_several_lines_take_several_writes() {
        assert_eq!(
            texts("devices.list", "a *:* rwm", "c 1:3 rwm\nb *:* m"),
            ["devices.deny=a", "devices.allow=c 1:3 rwm", "devices.allow=b *:* m"]
        );
        assert_eq!(texts("devices.list", "a *:* rwm", ""), ["devices.deny=a"]);
        assert_eq!(texts("net_prio.ifpriomap", "lo 0\neth0 0", "lo 0\neth0 5"), ["net_prio.ifpriomap=eth0 5"]);
        assert_eq!(texts("io.max", "", "8:0 rbps=1 wbps=max"), ["io.max=8:0 rbps=1 wbps=max"]);
    }

    #[test]
    fn controllers_are_switched_on_and_off_one_by_one() {
        assert_eq!(
            texts("cgroup.subtree_control", "cpu io", "cpu memory"),
            ["cgroup.subtree_control=+memory", "cgroup.subtree_control=-io"]
        );
        assert_eq!(texts("cgroup.subtree_control", "", "pids"), ["cgroup.subtree_control=+pids"]);
    }

    #[test]
    fn only_threaded_is_a_type_to_write() {
        assert_eq!(texts("cgroup.type", "domain", "threaded"), ["cgroup.type=threaded"]);
        assert!(texts("cgroup.type", "domain", "domain threaded").is_empty());
    }
}
