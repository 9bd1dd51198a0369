//! Images between Ferry and CRIU, both ways, and CRIU's own decoder on what Ferry writes.
//!
//! CRIU 4.x is on no distribution that the tests install from, so these tests are ignored unless asked for:
//! `CRIU=/path/to/criu CRIT=/path/to/crit cargo nextest run -p ferry-test-bundles --test interchange --run-ignored only`.

use ferry_test_bundles::{Engine, Outcome, Place, Workload, processes, programs};
use std::process::Command;

/// Workloads that CRIU 4.2 itself survives.
const WORKLOADS: &[&str] = &[
    "sessions",
    "zombies",
    "prefork",
    "threads",
    "thread_tls",
    "registers_avx512",
    "signal_mask",
    "signals_pending",
    "itimer_real",
    "timers_posix",
    "securebits",
    "nice",
    "umask",
    "working_directory",
    "seccomp_filter",
    "anonymous_private",
    "anonymous_shared",
    "heap",
    "stack_deep",
    "holes",
    "protections",
    "many_mappings",
    "page_content_mix",
    "locked",
    "vdso_calls",
    "file_private",
    "file_shared",
    "shared_between_relatives",
    "regular_files",
    "shared_offset",
    "deleted_file",
    "duplicates",
    "pipe_content",
    "pipe_between_processes",
    "fifo",
    "epoll_set",
    "unix_listener",
    "devices",
    "terminal",
    "terminal_settings",
];

/// Workloads that together fill every kind of image; crit takes a while for each.
const DECODED: &[&str] = &[
    "zombies",
    "threads",
    "timers_posix",
    "seccomp_filter",
    "anonymous_shared",
    "file_private",
    "regular_files",
    "deleted_file",
    "fifo",
    "epoll_set",
    "unix_listener",
    "terminal_input",
    "terminal_hung_up",
];

fn from_environment(name: &str) -> Outcome<String> {
    std::env::var(name).map_err(|_| format!("set {name} to the program to exchange images with"))
}

/// Dumps each workload with one engine and restores it with the other; all that fail are told.
fn exchange(dumper: &Engine, restorer: &Engine) -> Outcome {
    let one = |name: &str| -> Outcome {
        let place = Place::new()?;
        let mut workload = Workload::start(&place, name)?;
        let (images, tree) = (workload.images()?, processes::tree(workload.pid));
        dumper.dump(&place, workload.pid, &images, &[])?;
        processes::await_end(&tree)?;
        restorer.restore(&place, &images, &[])?;
        workload.ask()?;
        workload.end()
    };
    let failed: Vec<String> =
        WORKLOADS.iter().filter_map(|name| Some(format!("{name}: {}", one(name).err()?))).collect();
    if failed.is_empty() { Ok(()) } else { Err(failed.join("\n")) }
}

#[test]
#[ignore = "needs CRIU 4.x: set CRIU to its path"]
fn criu_restores_what_ferry_dumped() -> Outcome {
    exchange(&Engine::ferry()?, &Engine::command_line(&from_environment("CRIU")?)?)
}

#[test]
#[ignore = "needs CRIU 4.x: set CRIU to its path"]
fn ferry_restores_what_criu_dumped() -> Outcome {
    exchange(&Engine::command_line(&from_environment("CRIU")?)?, &Engine::ferry()?)
}

/// A chain of two pre-dumps and a dump.
#[test]
#[ignore = "needs CRIU 4.x: set CRIU to its path"]
fn criu_restores_what_ferry_pre_dumped() -> Outcome {
    let (ferry, criu) = (Engine::ferry()?, Engine::command_line(&from_environment("CRIU")?)?);
    for name in ["rewritten_pages", "rewritten_discarded", "rewritten_files", "rewritten_huge", "rewritten_shared"] {
        let place = Place::new()?;
        let mut workload = Workload::start(&place, name)?;
        workload.pre_dump(&ferry)?;
        workload.pre_dump(&ferry)?;
        workload.incremental_round_trip(&ferry, &criu).map_err(|error| format!("{name}: {error}"))?;
        workload.end()?;
    }
    Ok(())
}

/// Pages go from one engine's dump to the other's page server, and each engine restores from what both wrote.
#[test]
#[ignore = "needs CRIU 4.x: set CRIU to its path"]
fn pages_go_to_each_others_server() -> Outcome {
    let engine = |of_criu| {
        if of_criu { Engine::command_line(&from_environment("CRIU")?) } else { Engine::ferry() }
    };
    for (dumper, server, restorer) in
        [(true, false, false), (true, false, true), (false, true, false), (false, true, true)]
    {
        for name in ["page_content_mix", "anonymous_shared", "shared_between_relatives"] {
            through_server([engine(dumper)?, engine(server)?, engine(restorer)?], name).map_err(|error| {
                format!("{name}, CRIU dumps {dumper}, serves {server}, restores {restorer}: {error}")
            })?;
        }
    }
    Ok(())
}

fn through_server([dumper, server, restorer]: [Engine; 3], name: &str) -> Outcome {
    let place = Place::new()?;
    let mut workload = Workload::start(&place, name)?;
    let (images, there, tree) = (workload.images()?, place.folder("server")?, processes::tree(workload.pid));
    // CRIU tells nobody which port it found. One that was free a moment ago most likely still is.
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
    let port = free.map_err(|error| error.to_string())?.port().to_string();
    let address = ["--address", "127.0.0.1", "--port", &port];
    // Both have begun to listen when they are in the background.
    let mut command = server.command(&place, "page-server", &there, "server.log");
    let null = std::process::Stdio::null;
    programs::succeed(command.args(address).arg("--daemon").stdout(null()).stderr(null()))?;
    dumper.dump(&place, workload.pid, &images, &[&address[..], &["--page-server"]].concat())?;
    processes::await_end(&tree)?;
    processes::wait_for("the server to end", || {
        processes::reap();
        processes::below().is_empty()
    })?;
    for file in std::fs::read_dir(&there).map_err(|error| error.to_string())?.flatten() {
        if file.file_name().to_string_lossy().ends_with(".img") {
            std::fs::copy(file.path(), images.join(file.file_name())).map_err(|error| error.to_string())?;
        }
    }
    restorer.restore(&place, &images, &[])?;
    workload.ask()?;
    workload.end()
}

#[test]
#[ignore = "needs crit of CRIU 4.x: set CRIT to its path"]
fn crit_decodes_every_image() -> Outcome {
    let (crit, engine) = (from_environment("CRIT")?, Engine::ferry()?);
    for name in DECODED {
        let place = Place::new()?;
        let mut workload = Workload::start(&place, name)?;
        let (images, tree) = (workload.images()?, processes::tree(workload.pid));
        engine.dump(&place, workload.pid, &images, &[])?;
        processes::await_end(&tree)?;
        let listing = std::fs::read_dir(&images).map_err(|error| format!("{}: {error}", images.display()))?;
        let mut decoded = 0;
        for path in listing.flatten().map(|entry| entry.path()) {
            // Pages are plain bytes.
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !file.ends_with(".img") || file.starts_with("pages-") {
                continue;
            }
            programs::succeed(Command::new(&crit).arg("decode").arg("-i").arg(&path))
                .map_err(|error| format!("{name}: {error}"))?;
            decoded += 1;
        }
        if decoded < 5 {
            return Err(format!("{name}: only {decoded} images"));
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs CRIU 4.x: set CRIU to its path"]
fn processors_are_told_alike() -> Outcome {
    let (criu, ferry) = (Engine::command_line(&from_environment("CRIU")?)?, Engine::ferry()?);
    let place = Place::new()?;
    for (writer, reader, name) in [(&criu, &ferry, "of-criu"), (&ferry, &criu, "of-ferry")] {
        let images = place.folder(name)?;
        let run = |engine: &Engine, verb: &str| {
            let mut command = engine.command(&place, "cpuinfo", &images, "cpu.log");
            programs::succeed(command.args([verb, "--cpu-cap=all"])).map(drop)
        };
        run(writer, "dump")?;
        run(reader, "check")?;
    }
    Ok(())
}
