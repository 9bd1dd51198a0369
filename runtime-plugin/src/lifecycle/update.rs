//! `ferry update`: other limits for a running container.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use libcontainer::oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::IdArgs;
use crate::cli::Global;
use crate::failure::{Failure, Outcome};
use crate::state::{Container, Status};

/// Flags of `update`.
#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// File with the limits as in a config's section linux.resources, or - for standard input; other flags do not
    /// count then.
    #[arg(long, short, value_name = "FILE")]
    pub resources: Option<PathBuf>,
    /// Weight of block I/O, from 10 to 1000.
    #[arg(long, value_name = "N")]
    pub blkio_weight: Option<u16>,
    /// Period of the CPU quota, in microseconds.
    #[arg(long, value_name = "N")]
    pub cpu_period: Option<u64>,
    /// CPU time per period, in microseconds; -1 for no limit.
    #[arg(long, value_name = "N")]
    pub cpu_quota: Option<i64>,
    /// CPU time that can be saved up, in microseconds.
    #[arg(long, value_name = "N")]
    pub cpu_burst: Option<u64>,
    /// Weight of CPU time.
    #[arg(long, value_name = "N")]
    pub cpu_share: Option<u64>,
    /// Period of the realtime quota, in microseconds.
    #[arg(long, value_name = "N")]
    pub cpu_rt_period: Option<u64>,
    /// Realtime per period, in microseconds.
    #[arg(long, value_name = "N")]
    pub cpu_rt_runtime: Option<i64>,
    /// CPUs that may be used.
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes that may be used.
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// 1 to run only when the CPU is idle.
    #[arg(long, value_name = "0|1")]
    pub cpu_idle: Option<i64>,
    /// Accepted for callers of runc; the kernel has this limit no more.
    #[arg(long, hide = true)]
    pub kernel_memory: Option<String>,
    /// Accepted for callers of runc; the kernel has this limit no more.
    #[arg(long, hide = true)]
    pub kernel_memory_tcp: Option<String>,
    /// Memory in bytes, or with a unit such as 512m; -1 for no limit.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory: Option<i64>,
    /// Memory that is left to the container when the host runs short.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory_reservation: Option<i64>,
    /// Memory and swap together; -1 for no limit.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory_swap: Option<i64>,
    /// Number of processes and threads; -1 for no limit.
    #[arg(long, value_name = "N")]
    pub pids_limit: Option<i64>,
    /// Not supported.
    #[arg(long, value_name = "SCHEMA", hide = true)]
    pub l3_cache_schema: Option<String>,
    /// Not supported.
    #[arg(long, value_name = "SCHEMA", hide = true)]
    pub mem_bw_schema: Option<String>,
    #[command(flatten)]
    pub id: IdArgs,
}

/// Sets the limits that were given; the others stay.
pub fn run(global: &Global, args: &UpdateArgs) -> Outcome {
    let container = Container::load(&global.root, &args.id.id)?;
    if container.status == Status::Stopped {
        return Err(Failure::new(format!("container {} is not running", container.id)));
    }
    if args.l3_cache_schema.is_some() || args.mem_bw_schema.is_some() {
        return Err(Failure::new("--l3-cache-schema and --mem-bw-schema are not supported"));
    }
    let change = match &args.resources {
        Some(path) => read(path)?,
        None => asked(args),
    };
    let resources: LinuxResources = serde_json::from_value(change.clone())
        .map_err(|error| Failure::from(error).context("the limits cannot be read"))?;
    container.cgroup.apply(&resources)?;
    record(&container, change)?;
    Ok(ExitCode::SUCCESS)
}

fn read(path: &Path) -> Result<Value, Failure> {
    let told = |failure: Failure| failure.context(format_args!("cannot read limits from {}", path.display()));
    let text = if path == Path::new("-") { io::read_to_string(io::stdin()) } else { fs::read_to_string(path) };
    serde_json::from_str(&text.map_err(|error| told(error.into()))?).map_err(|error| told(error.into()))
}

/// The flags as a section linux.resources.
fn asked(args: &UpdateArgs) -> Value {
    let mut memory = Map::new();
    put(&mut memory, "limit", args.memory);
    put(&mut memory, "reservation", args.memory_reservation);
    put(&mut memory, "swap", args.memory_swap);
    let mut cpu = Map::new();
    put(&mut cpu, "period", args.cpu_period);
    put(&mut cpu, "quota", args.cpu_quota);
    put(&mut cpu, "burst", args.cpu_burst);
    put(&mut cpu, "shares", args.cpu_share);
    put(&mut cpu, "realtimePeriod", args.cpu_rt_period);
    put(&mut cpu, "realtimeRuntime", args.cpu_rt_runtime);
    put(&mut cpu, "cpus", args.cpuset_cpus.clone());
    put(&mut cpu, "mems", args.cpuset_mems.clone());
    put(&mut cpu, "idle", args.cpu_idle);
    let mut resources = Map::new();
    for (name, section) in [("memory", memory), ("cpu", cpu)] {
        if !section.is_empty() {
            resources.insert(name.to_owned(), Value::Object(section));
        }
    }
    put(&mut resources, "blockIO", args.blkio_weight.map(|weight| json!({"weight": weight})));
    put(&mut resources, "pids", args.pids_limit.map(|limit| json!({"limit": limit})));
    Value::Object(resources)
}

fn put(section: &mut Map<String, Value>, name: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        section.insert(name.to_owned(), value.into());
    }
}

/// Writes the change into the config on record, so that a checkpoint takes the limits as they are now.
fn record(container: &Container, change: Value) -> Result<(), Failure> {
    let mut spec = container.spec()?;
    if let Some(linux) = spec.linux_mut() {
        let mut resources = match linux.resources() {
            Some(resources) => serde_json::to_value(resources)?,
            None => json!({}),
        };
        merge(&mut resources, change);
        linux.set_resources(Some(serde_json::from_value(resources)?));
    }
    Ok(container.save_spec(&spec)?)
}

fn merge(into: &mut Value, change: Value) {
    match (into, change) {
        (Value::Object(into), Value::Object(change)) => {
            for (name, value) in change {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, change) => *into = change,
    }
}

/// Bytes, with an optional unit (k, m, g, t; powers of 1024; with or without b or ib), or -1.
fn size(text: &str) -> Result<i64, String> {
    let bad = || format!("{text} is no size, such as 1048576, 512m or 2g");
    if text == "-1" {
        return Ok(-1);
    }
    let lower = text.to_ascii_lowercase();
    let digits = lower.find(|character: char| !character.is_ascii_digit()).unwrap_or(lower.len());
    let number: i64 = lower[..digits].parse().map_err(|_| bad())?;
    let shift = match lower[digits..].trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    number.checked_mul(1 << shift).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("-1"), Ok(-1));
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("512m"), Ok(512 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        for bad in ["", "m", "1x", "-5", "99999999999t"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_what_is_given_changes() {
        let mut found = json!({"memory": {"limit": 1, "swap": 2}, "pids": {"limit": 3}});
        merge(&mut found, json!({"memory": {"limit": 9}}));
        assert_eq!(found, json!({"memory": {"limit": 9, "swap": 2}, "pids": {"limit": 3}}));
    }
}
