//! How long dump and restore take, for workloads of different kinds: medians of several rounds.
//!
//! `make bench` measures ferry; `FERRY_CRIU_COMMAND=criu make bench` another engine. Images go to the temporary folder
//! (`TMPDIR=/dev/shm` keeps the disk out of it). Every round's workload checks itself afterwards; a damaged one is an error, no figure.

use ferry_test_bundles::{Engine, Outcome, Place, Workload, processes};
use std::io::Write;
use std::time::{Duration, Instant};

const ROUNDS: usize = 7;
const WORKLOADS: &[&str] =
    &["heap", "large_memory", "anonymous_shared", "prefork", "threads", "many_mappings", "many_files"];

/// One round: dump while it runs on, dump that ends it, restore.
fn round(name: &str) -> Outcome<[Duration; 3]> {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, name)?;
    let timed = |step: &dyn Fn() -> Outcome| {
        let start = Instant::now();
        step().map(|()| start.elapsed())
    };
    let (live, images, pid) = (workload.images()?, workload.images()?, workload.pid);
    let running = timed(&|| engine.dump(&place, pid, &live, &["--leave-running"]))?;
    let tree = processes::tree(pid);
    let stopping = timed(&|| engine.dump(&place, pid, &images, &[]))?;
    processes::await_end(&tree)?;
    let restore = timed(&|| engine.restore(&place, &images, &[]))?;
    workload.ask()?;
    workload.end()?;
    Ok([running, stopping, restore])
}

fn median(mut all: Vec<Duration>) -> f64 {
    all.sort_unstable();
    all[all.len() / 2].as_secs_f64() * 1000.0
}

fn main() {
    let mut out = std::io::stdout();
    let mut failed = false;
    let _ = writeln!(
        out,
        "{:<20}{:>16}{:>16}{:>16}   milliseconds, medians of {ROUNDS}",
        "", "live dump", "stop dump", "restore"
    );
    for name in WORKLOADS {
        match (0..ROUNDS).map(|_| round(name)).collect::<Outcome<Vec<_>>>() {
            Ok(rounds) => {
                let [live, stop, restore] =
                    [0, 1, 2].map(|column| median(rounds.iter().map(|round| round[column]).collect()));
                let _ = writeln!(out, "{name:<20}{live:>16.1}{stop:>16.1}{restore:>16.1}");
            }
            Err(error) => {
                failed = true;
                let _ = writeln!(out, "{name:<20}failed: {error}");
            }
        }
    }
    std::process::exit(i32::from(failed));
}
