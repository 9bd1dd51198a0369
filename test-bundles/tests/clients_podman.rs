//! Podman checkpoints and restores containers, with ferry as the OCI runtime and as the only `criu`.

use ferry_test_bundles::podman::{NAME, Podman};
use ferry_test_bundles::{Outcome, Place, processes, programs};
use std::path::PathBuf;

/// Every way that `podman container checkpoint` and `restore` work on a container in place.
fn in_place(runtime: PathBuf) -> Outcome {
    let place = Place::new()?;
    let podman = Podman::new(&place, runtime)?;
    podman.start("service", &[])?;
    podman.is_well("its start")?;
    let tree = processes::tree(podman.inspect()?.1);
    podman.run(&["container", "checkpoint", "--leave-running", NAME])?;
    podman.is_well("checkpoint --leave-running")?;
    if processes::tree(podman.inspect()?.1) != tree {
        return Err("the processes are others after checkpoint --leave-running".to_owned());
    }
    podman.checkpoint(&[])?;
    let logged = podman.logged()?;
    podman.restore(&[])?;
    processes::wait_for("the log to go on", || podman.logged().is_ok_and(|now| now > logged))?;
    statistics(&podman)?;
    podman.end()
}

/// `--print-stats` prints JSON and nothing else, with times above zero; `--keep` keeps the images.
fn statistics(podman: &Podman) -> Outcome {
    let told = |text: String, time: &str| -> Outcome {
        let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| format!("{error} in {text}"))?;
        let numbers = &value["container_statistics"][0]["criu_statistics"];
        if numbers[time].as_u64().is_some_and(|time| time > 0) {
            return Ok(());
        }
        Err(format!("no {time} in the statistics: {text}"))
    };
    told(podman.checkpoint(&["--keep", "--print-stats"])?, "frozen_time")?;
    told(podman.restore(&["--keep", "--print-stats"])?, "restore_time")?;
    let images = podman.images()?;
    match images.join("inventory.img").exists() {
        true => Ok(()),
        false => Err(format!("--keep did not keep {}", images.display())),
    }
}

/// Archives by every compression go into a store that does not know the container any more.
fn archives(runtime: PathBuf) -> Outcome {
    let place = Place::new()?;
    let podman = Podman::new(&place, runtime)?;
    podman.start("service", &[])?;
    podman.run(&["exec", NAME, "sh", "-c", "echo kept > /etc/kept; rm /bin/grep; mkdir /var/new"])?;
    let look = "cat /etc/kept; ls /bin/grep 2>&1; ls -d /var/new";
    let seen = "kept\nls: /bin/grep: No such file or directory\n/var/new\n";
    for compression in ["zstd", "gzip", "none"] {
        let archive = place.path(&format!("{compression}.tar")).to_string_lossy().into_owned();
        podman.checkpoint(&["--compress", compression, "--export", &archive])?;
        podman.remove()?;
        podman.restore(&["--import", &archive]).map_err(|error| format!("{compression}: {error}"))?;
        let now = podman.run(&["exec", NAME, "sh", "-c", look])?;
        if now != seen {
            return Err(format!("{compression}: the root file system shows {now:?}, not {seen:?}"));
        }
    }
    podman.end()
}

/// `--pre-checkpoint`, `--with-previous` and `--import-previous`, through archives.
fn after_a_pre_checkpoint(runtime: PathBuf) -> Outcome {
    let place = Place::new()?;
    let podman = Podman::new(&place, runtime)?;
    podman.start("service", &[])?;
    let archive = |name: &str| place.path(name).to_string_lossy().into_owned();
    let (earlier, archive) = (archive("earlier.tar"), archive("archive.tar"));
    let tree = processes::tree(podman.inspect()?.1);
    podman.run(&["container", "checkpoint", "--pre-checkpoint", "--export", &earlier, NAME])?;
    podman.is_well("the pre-checkpoint")?;
    if processes::tree(podman.inspect()?.1) != tree {
        return Err("the processes are others after the pre-checkpoint".to_owned());
    }
    podman.checkpoint(&["--with-previous", "--export", &archive])?;
    podman.remove()?;
    podman.restore(&["--import-previous", &earlier, "--import", &archive])?;
    podman.end()
}

/// `--ignore-rootfs` leaves out what the container has written; `--file-locks` keeps its locks.
fn without_files_with_locks(runtime: PathBuf) -> Outcome {
    let place = Place::new()?;
    let podman = Podman::new(&place, runtime)?;
    podman.start("file_lock", &[])?;
    podman.run(&["exec", NAME, "sh", "-c", "echo gone > /etc/gone"])?;
    let archive = place.path("archive.tar").to_string_lossy().into_owned();
    let refused = programs::run(podman.command()?.args(["container", "checkpoint", NAME]))?;
    let told = programs::said(&refused) + &podman.reasons();
    if refused.status.success() || !["pid 1", "/work/locked", "--file-locks"].iter().all(|word| told.contains(word)) {
        return Err(format!("a lock is no reason to refuse: {told}"));
    }
    podman.is_well("a refused checkpoint")?;
    podman.checkpoint(&["--file-locks", "--ignore-rootfs", "--export", &archive])?;
    podman.remove()?;
    podman.restore(&["--file-locks", "--import", &archive])?;
    let now = podman.run(&["exec", NAME, "sh", "-c", "ls /etc/gone 2>&1 || true"])?;
    if !now.contains("No such file") {
        return Err(format!("--ignore-rootfs did not: {now}"));
    }
    podman.end()
}

/// What no option helps with: Podman shows what the runtime says, which is the reason or the name of the log that has it; the container
/// runs on.
fn refused(runtime: PathBuf) -> Outcome {
    let place = Place::new()?;
    let by_runtime = runtime == programs::ferry()?;
    let podman = Podman::new(&place, runtime)?;
    podman.start("inotify", &[])?;
    let tree = processes::tree(podman.inspect()?.1);
    let output = programs::run(podman.command()?.args(["container", "checkpoint", NAME]))?;
    let told = programs::said(&output);
    let reason = match by_runtime {
        true => told.clone(),
        false if told.contains("dump.log") => podman.reasons(),
        false => String::new(),
    };
    let words = ["pid 1 (workload): fd ", "inotify", "have the program close it"];
    if output.status.success() || !words.iter().all(|word| reason.contains(word)) {
        return Err(format!("{}: {told}, because of {reason:?}", output.status));
    }
    if processes::tree(podman.inspect()?.1) != tree {
        return Err("the processes are others after a refused checkpoint".to_owned());
    }
    podman.is_well("a refused checkpoint")?;
    podman.end()
}

/// A read-only root; the libraries of the program are in a tmpfs that begins with what the image has there.
fn read_only(runtime: PathBuf) -> Outcome {
    let place = Place::new()?;
    let podman = Podman::new(&place, runtime)?;
    podman.start("service", &["--read-only", "--tmpfs", "/lib"])?;
    podman.checkpoint(&[])?;
    podman.restore(&[])?;
    let inside = podman.run(&["exec", NAME, "sh", "-c", "touch /etc/file 2>&1; touch /lib/file && echo written"])?;
    if inside != "touch: /etc/file: Read-only file system\nwritten\n" {
        return Err(format!("the file systems are others: {inside}"));
    }
    podman.end()
}

/// `--tty`: the terminal's master side goes to the new conmon, through which output reaches the log again.
fn terminal(runtime: PathBuf) -> Outcome {
    let place = Place::new()?;
    let podman = Podman::new(&place, runtime)?;
    podman.start("service", &["--tty"])?;
    podman.checkpoint(&[])?;
    let logged = podman.logged()?;
    podman.restore(&[])?;
    processes::wait_for("the log to go on", || podman.logged().is_ok_and(|now| now > logged))?;
    podman.end()
}

#[test]
fn ferry_is_the_runtime_in_place() -> Outcome {
    in_place(programs::ferry()?)
}

#[test]
fn ferry_is_the_runtime_through_archives() -> Outcome {
    archives(programs::ferry()?)
}

#[test]
fn ferry_is_the_runtime_after_a_pre_checkpoint() -> Outcome {
    after_a_pre_checkpoint(programs::ferry()?)
}

#[test]
fn runc_is_the_runtime_after_a_pre_checkpoint() -> Outcome {
    after_a_pre_checkpoint(programs::installed("runc")?)
}

#[test]
fn ferry_is_the_runtime_without_files_with_locks() -> Outcome {
    without_files_with_locks(programs::ferry()?)
}

#[test]
fn ferry_is_the_runtime_and_refuses() -> Outcome {
    refused(programs::ferry()?)
}

#[test]
fn runc_is_the_runtime_and_ferry_refuses() -> Outcome {
    refused(programs::installed("runc")?)
}

#[test]
fn ferry_is_the_runtime_read_only() -> Outcome {
    read_only(programs::ferry()?)
}

#[test]
fn runc_is_the_runtime_read_only() -> Outcome {
    read_only(programs::installed("runc")?)
}

#[test]
fn ferry_is_the_runtime_of_a_terminal() -> Outcome {
    terminal(programs::ferry()?)
}

#[test]
fn runc_is_the_runtime_of_a_terminal() -> Outcome {
    terminal(programs::installed("runc")?)
}

#[test]
fn runc_is_the_runtime_in_place() -> Outcome {
    in_place(programs::installed("runc")?)
}

#[test]
fn runc_is_the_runtime_through_archives() -> Outcome {
    archives(programs::installed("runc")?)
}

#[test]
fn runc_is_the_runtime_without_files_with_locks() -> Outcome {
    without_files_with_locks(programs::installed("runc")?)
}
