//! Containers in bundles: workloads inside, a shell's counter through twenty cycles, the lifecycle around a restore.

use ferry_test_bundles::{Bundle, Container, Outcome, Place, expectations, processes, programs, workload};
use libtest_mimic::{Arguments, Trial};
use std::path::Path;

/// Workloads that say more in a container than on the host, or whose objects come from its namespaces and mounts.
const INSIDE: &[&str] = &[
    "sessions",
    "stopped_child",
    "zombies",
    "orphans",
    "stopped_child",
    "prefork",
    "threads",
    "registers_general",
    "registers_sse",
    "restart_nanosleep",
    "restart_futex",
    "signals_pending",
    "timers_posix",
    "user_ids",
    "capabilities",
    "no_new_privs",
    "resource_limits",
    "working_directory",
    "root_directory",
    "executable",
    "seccomp_filter",
    "anonymous_private",
    "anonymous_shared",
    "file_private",
    "file_shared",
    "copy_on_write",
    "vdso_calls",
    "regular_files",
    "deleted_file",
    "directory",
    "pipe_between_processes",
    "fifo",
    "eventfd",
    "epoll_set",
    "tcp_listener",
    "unix_listener",
    "unix_abstract_listener",
    "devices",
];

/// Run, checkpoint, restore, checkpoint, restore; the lifecycle's verbs in between.
fn inside(name: &str) -> Outcome {
    let place = Place::new()?;
    let (bundle, talk) = Bundle::of_workload(&place, name)?;
    let container = Container::run(&place, &bundle)?;
    talk.await_ready()?;
    talk.ask().map_err(|error| format!("before the checkpoint: {error}"))?;
    for round in ["first", "second"] {
        container.checkpoint(&[]).map_err(|error| format!("{round} checkpoint: {error}"))?;
        container.restore(&[]).map_err(|error| format!("{round} restore: {error}"))?;
        talk.ask().map_err(|error| format!("after the {round} restore: {error}"))?;
    }
    container.end()
}

/// A checkpoint that leaves the container running, from which nothing changes for it.
fn leave_running() -> Outcome {
    let place = Place::new()?;
    let (bundle, talk) = Bundle::of_workload(&place, "prefork")?;
    let container = Container::run(&place, &bundle)?;
    talk.await_ready()?;
    let tree = processes::tree(container.pid()?);
    container.verb("checkpoint", &["--leave-running"])?;
    talk.ask()?;
    container.is("running")?;
    let now = processes::tree(container.pid()?);
    if now != tree {
        return Err(format!("the container's processes are {now:?}, were {tree:?}"));
    }
    container.end()
}

/// A process of the container that is in a cgroup below the container's is there again, and the cgroup is as it was.
fn cgroups_below() -> Outcome {
    let place = Place::new()?;
    let (bundle, talk) = Bundle::of_workload(&place, "prefork")?;
    let container = Container::run(&place, &bundle)?;
    talk.await_ready()?;
    let (pid, member) = (container.pid()?, processes::tree(container.pid()?)[1]);
    let told = |error: std::io::Error| error.to_string();
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(told)?;
    let of = |controller: &str| {
        cgroups.lines().find_map(|line| line.split_once(':')?.1.strip_prefix(controller)?.strip_prefix(':'))
    };
    // Version 1 where it is in use, else version 2.
    let (below, property) = match of("pids") {
        Some(path) => (format!("/sys/fs/cgroup/pids{path}/below"), "pids.max"),
        None => (format!("/sys/fs/cgroup{}/below", of("").unwrap_or_default()), "cgroup.max.descendants"),
    };
    let below = Path::new(&below);
    std::fs::create_dir(below).map_err(|error| format!("{}: {error}", below.display()))?;
    std::fs::write(below.join(property), "77").map_err(told)?;
    std::fs::write(below.join("cgroup.procs"), member.to_string()).map_err(told)?;
    let is_there = |round: &str| -> Outcome {
        let member = processes::tree(container.pid()?)[1].to_string();
        let read = |name: &str| std::fs::read_to_string(below.join(name)).map_err(|error| format!("{name}: {error}"));
        if read(property)?.trim() != "77" || !read("cgroup.procs")?.lines().any(|pid| pid == member) {
            return Err(format!(
                "{round}: {property} is {:?}, not 77, or {member} is not in the cgroup",
                read(property)?
            ));
        }
        Ok(())
    };
    is_there("before")?;
    for round in ["first", "second"] {
        container.checkpoint(&[])?;
        container.restore(&[])?;
        talk.ask()?;
        is_there(round)?;
    }
    container.checkpoint(&[])?;
    container.restore(&["--manage-cgroups-mode", "ignore"])?;
    talk.ask()?;
    if below.exists() {
        return Err("the mode ignore makes cgroups".into());
    }
    container.end()
}

/// What the shell inside has written so far, one number a line.
fn counted(file: &Path) -> Outcome<Vec<u64>> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    // The last line may be half written.
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().map(|line| line.parse().map_err(|_| format!("odd line {line:?}"))).collect()
}

/// Fails unless the counter counts one by one, and goes on.
fn goes_on(file: &Path) -> Outcome<usize> {
    let before = counted(file)?.len();
    processes::wait_for("the counter to go on", || counted(file).is_ok_and(|all| all.len() > before + 2))?;
    let all = counted(file)?;
    match all.iter().zip(1..).find(|(got, want)| **got != *want) {
        None => Ok(all.len()),
        Some((got, want)) => Err(format!("the counter shows {got} where {want} comes")),
    }
}

/// Twenty cycles of a `runc spec` busybox container with a shell that counts: the same pids, no number lost or twice.
fn twenty_cycles() -> Outcome {
    let place = Place::new()?;
    let work = place.folder("work")?;
    let count = "sleep 100000 & i=0; while :; do i=$((i+1)); echo $i >> /work/count; sleep 0.05; done";
    let mut bundle = Bundle::new(&place, &["sh", "-c", count])?;
    bundle.bind(&work, "/work", &["rw"]);
    let container = Container::run(&place, &bundle)?;
    let file = work.join("count");
    processes::wait_for("the first number", || file.exists())?;
    let mut last = goes_on(&file)?;
    let pids = || -> Outcome<Vec<String>> {
        let listing = container.exec(&["ps", "-o", "pid,comm"])?;
        // The shell and its background process; the listing itself and the loop's `sleep` have new pids all the time.
        let lasting = |line: &&str| line.starts_with("1 ") || line.starts_with("2 ");
        Ok(listing.lines().map(str::trim).filter(lasting).map(str::to_owned).collect())
    };
    let before = pids()?;
    if before != ["1 sh", "2 sleep"] {
        return Err(format!("processes inside are {before:?}"));
    }
    for cycle in 1..=20 {
        let step = || -> Outcome<usize> {
            container.checkpoint(&[])?;
            let stopped = counted(&file)?;
            container.restore(&[])?;
            let now = goes_on(&file)?;
            if now <= stopped.len() {
                return Err("the counter stands".to_owned());
            }
            // The shell's next `sleep` is called after its maker until it has become itself.
            processes::wait_for(&format!("the processes inside to be {before:?}"), || {
                pids().is_ok_and(|after| after == before)
            })?;
            Ok(now)
        };
        let now = step().map_err(|error| format!("cycle {cycle}: {error}"))?;
        if now <= last {
            return Err(format!("cycle {cycle}: the counter stepped back from {last} to {now}"));
        }
        last = now;
    }
    container.end()
}

/// Every verb of the lifecycle works on the running container.
fn every_verb_works(container: &Container) -> Outcome {
    let echoed = container.exec(&["sh", "-c", "echo inside; cat /proc/1/comm"])?;
    if echoed != "inside\nsleep\n" {
        return Err(format!("exec printed {echoed:?}"));
    }
    let list = programs::succeed(&mut container.command("list"))?;
    if !list.contains(&container.id) {
        return Err(format!("list does not show the container: {list}"));
    }
    container.verb("pause", &[])?;
    container.is("paused")?;
    container.verb("resume", &[])?;
    container.is("running")?;
    let processes = container.verb("ps", &[])?;
    if !processes.contains("sleep") {
        return Err(format!("ps does not show the program: {processes}"));
    }
    Ok(())
}

/// The lifecycle without any checkpoint.
fn lifecycle() -> Outcome {
    let place = Place::new()?;
    let bundle = Bundle::new(&place, &["sleep", "100000"])?;
    let container = Container::run(&place, &bundle)?;
    container.is("running")?;
    every_verb_works(&container)?;
    container.end()
}

/// After a restore every verb works on the container as before.
fn lifecycle_after_restore() -> Outcome {
    let place = Place::new()?;
    let bundle = Bundle::new(&place, &["sleep", "100000"])?;
    let container = Container::run(&place, &bundle)?;
    container.checkpoint(&[])?;
    if container.state().is_ok() {
        return Err("the checkpointed container still has a state".to_owned());
    }
    let pid_file = place.path("pid");
    container.restore(&["--pid-file", &pid_file.to_string_lossy()])?;
    let pid = std::fs::read_to_string(&pid_file).map_err(|error| format!("pid file: {error}"))?;
    if pid.trim() != container.pid()?.to_string() {
        return Err(format!("the pid file says {pid}, the state {}", container.pid()?));
    }
    every_verb_works(&container)?;
    container.end()
}

/// A plain folder of images (`--image-path`), as runc writes it, instead of the archive; and an archive elsewhere.
fn image_folder_and_archive() -> Outcome {
    let place = Place::new()?;
    let (bundle, talk) = Bundle::of_workload(&place, "pipe_content")?;
    let container = Container::run(&place, &bundle)?;
    talk.await_ready()?;
    let folder = place.folder("images")?.to_string_lossy().into_owned();
    container.checkpoint(&["--image-path", &folder])?;
    if !Path::new(&folder).join("inventory.img").exists() {
        return Err("the image folder has no inventory.img".to_owned());
    }
    container.restore(&["--image-path", &folder])?;
    talk.ask()?;
    let archive = place.path("elsewhere.tar").to_string_lossy().into_owned();
    container.checkpoint(&["--archive", &archive])?;
    container.restore(&["--archive", &archive])?;
    talk.ask()?;
    container.end()
}

/// A writable root file system, tmpfs content, bind mounts and the hostname come back.
fn mounts_and_names() -> Outcome {
    let place = Place::new()?;
    let work = place.folder("work")?;
    let script = "hostname changed; echo in-tmpfs > /dev/shm/file; mkdir /dev/shm/dir; ln -s file /dev/shm/dir/link; \
                  echo in-rootfs > /tmp/file; touch /work/ready; while :; do sleep 1000; done";
    let mut bundle = Bundle::new(&place, &["sh", "-c", script])?;
    bundle.writable().privileged().bind(&work, "/work", &["rw"]);
    let container = Container::run(&place, &bundle)?;
    processes::wait_for("the script", || work.join("ready").exists())?;
    let look = "hostname; cat /dev/shm/file /tmp/file; ls -l /dev/shm/dir | grep -o 'link.*'; ls /dev; cat /proc/self/mountinfo";
    let seen = || -> Outcome<Vec<String>> {
        let text = container.exec(&["sh", "-c", look])?;
        // Of a mount's line: mount point, options, type. Numbers and devices are new each time.
        let told = |line: &str| match line.split_once(" - ") {
            None => line.to_owned(),
            Some((first, second)) => {
                let first: Vec<&str> = first.split(' ').collect();
                let kind = second.split(' ').next().unwrap_or("");
                // A masked file is covered by any empty device.
                if first[4].starts_with("/proc/") && kind != "proc" {
                    return format!("{} masked", first[4]);
                }
                format!("{} {} {kind}", first[4], first[5])
            }
        };
        // Mounts need not be listed in the same order.
        let mut all: Vec<String> = text.lines().map(told).collect();
        all.sort_unstable();
        Ok(all)
    };
    let before = seen()?;
    if !["changed", "in-tmpfs", "in-rootfs"].iter().all(|line| before.iter().any(|seen| seen == line)) {
        return Err(format!("odd output of the container: {before:?}"));
    }
    for _ in 0..2 {
        container.checkpoint(&[])?;
        container.restore(&[])?;
        let after = seen()?;
        if after != before {
            let differ: Vec<_> = before.iter().zip(&after).filter(|(a, b)| a != b).take(5).collect();
            return Err(format!("{} lines before, {} after; first differences {differ:?}", before.len(), after.len()));
        }
    }
    container.end()
}

/// Every name of the table above is a workload that is not refused.
fn names_are_workloads() -> Outcome {
    let all = workload::list()?;
    let unknown =
        |name: &&&str| !all.iter().any(|listed| listed.name == **name) || expectations::refusal(name).is_some();
    match INSIDE.iter().find(unknown) {
        None => Ok(()),
        Some(name) => Err(format!("{name} is no workload that a container can survive with")),
    }
}

/// `ferry spec` writes a configuration that ferry itself runs, once the terminal is switched off.
fn runc_spec() -> Outcome {
    let place = Place::new()?;
    let mut bundle = Bundle::new(&place, &["sh"])?;
    let mut command = std::process::Command::new(programs::ferry()?);
    programs::succeed(command.args(["spec", "--bundle"]).arg(&bundle.path))?;
    let text = std::fs::read(bundle.path.join("config.json")).map_err(|error| format!("config.json: {error}"))?;
    let own = bundle.config["linux"]["cgroupsPath"].clone();
    bundle.config = serde_json::from_slice(&text).map_err(|error| format!("config.json: {error}"))?;
    bundle.config["process"]["terminal"] = serde_json::json!(false);
    bundle.config["process"]["args"] = serde_json::json!(["sleep", "100000"]);
    bundle.config["linux"]["cgroupsPath"] = own;
    let container = Container::run(&place, &bundle)?;
    container.checkpoint(&[])?;
    container.restore(&[])?;
    container.end()
}

/// A test that is not about one workload.
type Alone = (&'static str, fn() -> Outcome);

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let alone: [Alone; 9] = [
        ("names_are_workloads", names_are_workloads),
        ("leave_running", leave_running),
        ("cgroups_below", cgroups_below),
        ("twenty_cycles", twenty_cycles),
        ("lifecycle", lifecycle),
        ("lifecycle_after_restore", lifecycle_after_restore),
        ("image_folder_and_archive", image_folder_and_archive),
        ("mounts_and_names", mounts_and_names),
        ("runc_spec", runc_spec),
    ];
    let mut trials: Vec<Trial> =
        alone.into_iter().map(|(name, run)| Trial::test(name, move || run().map_err(Into::into))).collect();
    for name in INSIDE {
        trials.push(Trial::test(format!("inside::{name}"), move || inside(name).map_err(Into::into)));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
