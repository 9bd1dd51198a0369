//! `ferry events`: what a container uses, as runc's JSON stream.

use std::collections::BTreeMap;
use std::fs;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Args;
use libcgroups::common::CgroupManager;
use libcgroups::stats::{BlkioDeviceStat, MemoryData, Stats};
use serde_json::{Value, json};

use super::{IdArgs, print};
use crate::cli::Global;
use crate::failure::{Failure, Outcome};
use crate::process::InitProcess;
use crate::state::{Container, Status};

/// How often the end of the container, and the kernel's count of tasks it killed for memory, are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Flags of `events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Time between two figures, such as 5s or 1m30s.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub interval: Duration,
    /// Print the figures of now, and return.
    #[arg(long)]
    pub stats: bool,
    #[command(flatten)]
    pub id: IdArgs,
}

/// Prints one object per interval and per out-of-memory kill, until the container ends.
pub fn run(global: &Global, args: &EventsArgs) -> Outcome {
    let container = Container::load(&global.root, &args.id.id)?;
    if container.status == Status::Stopped {
        return Err(Failure::new(format!("container with id {} is not running", container.id)));
    }
    if args.stats {
        print_stats(&container)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut kills = oom_kills(&container);
    let mut waited = Duration::ZERO;
    loop {
        let pause = LOOK.min(args.interval - waited);
        thread::sleep(pause);
        waited += pause;
        if !container.init.is_some_and(InitProcess::is_running) {
            return Ok(ExitCode::SUCCESS);
        }
        let kills_now = oom_kills(&container);
        for _ in kills..kills_now {
            print(&format!("{}\n", json!({"type": "oom", "id": container.id})))?;
        }
        kills = kills_now;
        if waited >= args.interval {
            waited = Duration::ZERO;
            print_stats(&container)?;
        }
    }
}

fn print_stats(container: &Container) -> Result<(), Failure> {
    let told = |failure: Failure| failure.context(format_args!("cannot read the figures of {}", container.id));
    let stats = container.cgroup.manager()?.stats().map_err(|error| told(error.into()))?;
    let data = data(&stats, container.cgroup.directories().contains_key("cpuacct"));
    print(&format!("{}\n", json!({"type": "stats", "id": container.id, "data": data})))
}

/// The figures under runc's names (types/events.go); times in nanoseconds, sizes in bytes.
fn data(stats: &Stats, v1: bool) -> Value {
    // libcgroups hands on the kernel's units: cpuacct counts in nanoseconds and, split up, in clock ticks; v2 in
    // microseconds.
    let tick = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
    let (whole, part) = if v1 { (1, tick) } else { (1000, 1000) };
    let usage = &stats.cpu.usage;
    let throttling = &stats.cpu.throttling;
    let hugetlb: BTreeMap<_, _> = stats
        .hugetlb
        .iter()
        .map(|(size, one)| (size, json!({"usage": one.usage, "max": one.max_usage, "failcnt": one.fail_count})))
        .collect();
    json!({
        "cpu": {
            "usage": {
                "total": usage.usage_total * whole,
                "percpu": usage.per_core_usage_total,
                "percpu_kernel": usage.per_core_usage_kernel,
                "percpu_user": usage.per_core_usage_user,
                "kernel": usage.usage_kernel * part,
                "user": usage.usage_user * part,
            },
            "throttling": {
                "periods": throttling.periods,
                "throttledPeriods": throttling.throttled_periods,
                "throttledTime": throttling.throttled_time,
            },
        },
        "memory": {
            "cache": stats.memory.cache,
            "usage": memory(&stats.memory.memory),
            "swap": memory(&stats.memory.memswap),
            "kernel": memory(&stats.memory.kernel),
            "kernelTCP": memory(&stats.memory.kernel_tcp),
            "raw": stats.memory.stats.iter().collect::<BTreeMap<_, _>>(),
        },
        "pids": {"current": stats.pids.current, "limit": stats.pids.limit},
        "blkio": {
            "ioServiceBytesRecursive": blkio(&stats.blkio.service_bytes),
            "ioServicedRecursive": blkio(&stats.blkio.serviced),
            "ioQueueRecursive": blkio(&stats.blkio.queued),
            "ioServiceTimeRecursive": blkio(&stats.blkio.service_time),
            "ioWaitTimeRecursive": blkio(&stats.blkio.wait_time),
            "ioMergedRecursive": blkio(&stats.blkio.merged),
            "ioTimeRecursive": blkio(&stats.blkio.time),
            "sectorsRecursive": blkio(&stats.blkio.sectors),
        },
        "hugetlb": hugetlb,
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

fn memory(data: &MemoryData) -> Value {
    json!({"limit": data.limit, "usage": data.usage, "max": data.max_usage, "failcnt": data.fail_count})
}

fn blkio(entries: &[BlkioDeviceStat]) -> Vec<Value> {
    let one = |entry: &BlkioDeviceStat| json!({"major": entry.major, "minor": entry.minor, "op": entry.op_type, "value": entry.value});
    entries.iter().map(one).collect()
}

/// Tasks of the container that the kernel has killed for want of memory: `oom_kill` of `memory.oom_control` (v1,
/// Linux 4.13) or `memory.events` (v2). Zero where neither can be read.
fn oom_kills(container: &Container) -> u64 {
    let directories = container.cgroup.directories();
    let v1 = directories.get("memory").map(|directory| directory.join("memory.oom_control"));
    let v2 = directories.get("").map(|directory| directory.join("memory.events"));
    let text = v1.or(v2).and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// A duration as Go writes it: numbers with units h, m, s, ms, us, ns.
fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text} is no duration above zero, such as 5s, 500ms or 1m30s");
    let mut total = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|character: char| !character.is_ascii_digit() && character != '.').ok_or_else(bad)?;
        let number: f64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let letters = rest.find(|character: char| character.is_ascii_digit()).unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return Err(bad()),
        };
        total += number * unit;
        rest = &rest[letters..];
    }
    Duration::try_from_secs_f64(total).ok().filter(|total| !total.is_zero()).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["", "0s", "5", "s", "-1s", "5 s", "5y"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }
}
