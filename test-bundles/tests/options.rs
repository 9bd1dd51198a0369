//! Options of `ferry criu` that change what happens: scripts, configuration files, descriptors, namespaces, statistics.

use ferry_test_bundles::{Engine, Outcome, Place, Workload, processes, programs};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn read(path: &Path) -> Outcome<String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, text: &str) -> Outcome {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn same<T: PartialEq + std::fmt::Debug>(now: T, expected: T) -> Outcome {
    if now == expected { Ok(()) } else { Err(format!("{now:?}, not {expected:?}")) }
}

/// A shell script in the test's folder.
fn script(place: &Place, name: &str, body: &str) -> Outcome<PathBuf> {
    let path = place.path(name);
    write(&path, &format!("#!/bin/sh\n{body}\n"))?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

/// `State:` of a process: R, S, T, t, Z …
fn state(pid: i32) -> Outcome<String> {
    let status = read(Path::new(&format!("/proc/{pid}/status")))?;
    let line = status.lines().find_map(|line| line.strip_prefix("State:\t"));
    line.map(|line| line[..1].to_owned()).ok_or_else(|| "no state".to_owned())
}

/// A script that writes a line of what it is told and of the state of the root.
fn reporter(place: &Place, name: &str) -> Outcome<(PathBuf, PathBuf)> {
    let report = place.path(&format!("{name}.txt"));
    let body = format!(
        "state=$(sed -n 's/^State:.\\(.\\).*/\\1/p' /proc/$CRTOOLS_INIT_PID/status 2>/dev/null)\n\
         [ -d \"$CRTOOLS_IMAGE_DIR\" ] || exit 9\n\
         echo {name} $CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID $state >> {}",
        report.display()
    );
    Ok((script(place, name, &body)?, report))
}

#[test]
fn scripts_are_told_of_a_dump_and_a_restore_in_order() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "prefork")?;
    let (images, tree) = (workload.images()?, processes::tree(workload.pid));
    let (script, report) = reporter(&place, "s")?;
    let options = ["--action-script", &script.to_string_lossy()];
    engine.dump(&place, workload.pid, &images, &options)?;
    processes::await_end(&tree)?;
    let pid = workload.pid;
    // It is free before the dump: asleep, but for the moments in which it looks whether it is asked something.
    let lines = read(&report)?.replace(&format!("s pre-dump {pid} R"), &format!("s pre-dump {pid} S"));
    // A task that ferry traces is t, whatever it slept in.
    same(
        lines.lines().collect::<Vec<_>>(),
        [format!("s pre-dump {pid} S"), format!("s post-dump {pid} t")].to_vec().iter().map(String::as_str).collect(),
    )?;
    std::fs::remove_file(&report).map_err(|error| error.to_string())?;
    engine.restore(&place, &images, &options)?;
    workload.ask()?;
    let stages: Vec<String> =
        read(&report)?.lines().map(|line| line.split(' ').nth(1).unwrap_or_default().to_owned()).collect();
    same(stages, ["pre-restore", "post-restore", "pre-resume", "post-resume"].map(str::to_owned).to_vec())?;
    workload.end()
}

#[test]
fn a_tree_that_runs_on_is_stopped_until_the_last_script_of_its_dump() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "heap")?;
    let images = workload.images()?;
    let ((one, report), (two, _)) = (reporter(&place, "one")?, reporter(&place, "two")?);
    let options =
        ["--leave-running", "--action-script", &one.to_string_lossy(), "--action-script", &two.to_string_lossy()];
    engine.dump(&place, workload.pid, &images, &options)?;
    same(read(&report)?.lines().last().map(str::to_owned), Some(format!("one post-dump {} t", workload.pid)))?;
    workload.ask()?;
    workload.end()
}

#[test]
fn a_failing_script_ends_the_dump_and_the_tree_runs_on() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "prefork")?;
    let tree = processes::tree(workload.pid);
    for stage in ["pre-dump", "post-dump"] {
        let body = format!("echo tells why >&2\n[ $CRTOOLS_SCRIPT_ACTION != {stage} ]");
        let script = script(&place, stage, &body)?;
        let images = workload.images()?;
        let problem = engine.dump(&place, workload.pid, &images, &["--action-script", &script.to_string_lossy()]);
        let problem = problem.err().ok_or("the dump was not ended")?;
        if !problem.contains("tells why") || !problem.contains(stage) {
            return Err(problem);
        }
        same(processes::tree(workload.pid), tree.clone())?;
        workload.ask()?;
    }
    workload.round_trip(&engine)?;
    workload.end()
}

#[test]
fn a_failing_script_ends_the_restore_and_nothing_is_left() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "prefork")?;
    let (images, tree) = (workload.images()?, processes::tree(workload.pid));
    engine.dump(&place, workload.pid, &images, &[])?;
    processes::await_end(&tree)?;
    for stage in ["pre-restore", "post-restore", "pre-resume"] {
        let script = script(&place, stage, &format!("[ $CRTOOLS_SCRIPT_ACTION != {stage} ]"))?;
        let problem = engine.restore(&place, &images, &["--action-script", &script.to_string_lossy()]);
        problem.err().filter(|problem| problem.contains(stage)).ok_or("the restore was not ended")?;
        same(tree.iter().filter(|pid| !processes::is_gone(**pid)).count(), 0)?;
    }
    engine.restore(&place, &images, &[])?;
    workload.ask()?;
    workload.end()
}

#[test]
fn configuration_files_come_before_the_command_line() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "heap")?;
    let home = place.folder("home/.criu")?;
    let (first, _) = reporter(&place, "first")?;
    let told = |name: &str| place.path(&format!("{name}.txt")).exists();
    write(
        &home.join("default.conf"),
        &format!("# one a line\naction-script \"{}\"\nleave-stopped\n", first.display()),
    )?;
    let (second, _) = reporter(&place, "second")?;
    write(&place.path("env.conf"), &format!("\taction-script {} # more\nno-leave-stopped", second.display()))?;
    write(&place.path("named.conf"), "log-file named.log\nleave-running")?;
    let dump = |images: &Path, words: &[&str]| {
        let mut command = engine.command(&place, "dump", images, "dump.log");
        command.args(["-t", &workload.pid.to_string(), "-R"]).args(words).env("HOME", place.path("home"));
        command.env("CRIU_CONFIG_FILE", place.path("env.conf"));
        programs::succeed(&mut command).map(drop)
    };
    let images = place.folder("a")?;
    dump(&images, &[])?;
    same((told("first"), told("second"), state(workload.pid)? == "T"), (true, true, false))?;
    for name in ["first", "second"] {
        std::fs::remove_file(place.path(&format!("{name}.txt"))).map_err(|error| error.to_string())?;
    }
    // With a file that is named the default one is not read, and the command line has the last word on the log.
    let images = place.folder("b")?;
    dump(&images, &["--config", &place.path("named.conf").to_string_lossy()])?;
    same((told("first"), told("second")), (false, true))?;
    same((images.join("dump.log").exists(), images.join("named.log").exists()), (true, false))?;
    write(&place.path("wrong.conf"), "log-file a b")?;
    let problem = dump(&images, &["--config", &place.path("wrong.conf").to_string_lossy()]).err().unwrap_or_default();
    if !problem.contains("wrong.conf, line 1") {
        return Err(format!("the wrong line is not told: {problem}"));
    }
    workload.images()?;
    workload.ask()?;
    workload.end()
}

/// A program that reads a line from its input, in a session of its own, and what it does with it.
fn reader(place: &Place) -> Outcome<std::process::Child> {
    let body = "trap '' HUP\nwhile read line; do echo \"got $line\" >> $1; done";
    let program = script(place, "reader", body)?;
    // Without what the test was started with.
    let close = "for fd in /proc/self/fd/*; do fd=${fd##*/}; [ $fd -gt 2 ] && eval \"exec $fd>&-\"; done; exec setsid \"$0\" \"$@\"";
    let mut command = Command::new("bash");
    command
        .args(["-c", close])
        .arg(&program)
        .arg(place.path("got.txt"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().map_err(|error| format!("bash: {error}"))
}

#[test]
fn an_inherited_pipe_takes_the_place_of_an_external_one() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut child = reader(&place)?;
    let pid = child.id() as i32;
    let input = child.stdin.take().ok_or("no input")?;
    processes::wait_for("the reader to read", || {
        std::fs::read_link(format!("/proc/{pid}/exe"))
            .is_ok_and(|exe| !exe.ends_with("bash") && !exe.ends_with("setsid"))
            && state(pid).is_ok_and(|state| state == "S")
    })?;
    let link = std::fs::read_link(format!("/proc/{pid}/fd/0")).map_err(|error| error.to_string())?;
    let pipe = link.to_string_lossy().into_owned();
    let images = place.folder("images")?;
    let external = pipe.replace(":[", "[");
    engine.dump(&place, pid, &images, &["--external", &external])?;
    processes::await_end(&[pid])?;
    drop(input);
    // The new input is a file with the line in it.
    write(&place.path("input.txt"), "after all\n")?;
    let mut command = engine.command(&place, "restore", &images, "restore.log");
    let restore = format!("exec \"$0\" \"$@\" -d --inherit-fd 'fd[7]:{pipe}' 7<{}", place.path("input.txt").display());
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    command = Command::new("sh");
    programs::succeed(command.arg("-c").arg(restore).args(words))?;
    processes::wait_for("the line", || read(&place.path("got.txt")).is_ok_and(|text| text == "got after all\n"))?;
    processes::end_all_below();
    place.nothing_left()
}

#[test]
fn a_tree_joins_the_namespaces_that_it_is_given() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let holder = Command::new("unshare").args(["--net", "--uts", "--ipc", "sleep", "1000"]).spawn();
    let holder = holder.map_err(|error| format!("unshare: {error}"))?.id() as i32;
    let inode = |pid: i32, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap_or_default();
    let own = std::process::id() as i32;
    processes::wait_for("new namespaces", || inode(holder, "ipc") != inode(own, "ipc"))?;
    let mut workload = Workload::start(&place, "prefork")?;
    let (images, tree) = (workload.images()?, processes::tree(workload.pid));
    engine.dump(&place, workload.pid, &images, &[])?;
    processes::await_end(&tree)?;
    let (net, uts) = (format!("net:{holder}"), format!("uts:/proc/{holder}/ns/uts"));
    engine.restore(&place, &images, &["--join-ns", &net, "-J", &uts])?;
    workload.ask()?;
    for pid in &tree {
        same(inode(*pid, "net"), inode(holder, "net"))?;
        same(inode(*pid, "uts"), inode(holder, "uts"))?;
        same(inode(*pid, "ipc"), inode(own, "ipc"))?;
    }
    workload.end()
}

#[test]
fn a_restored_root_is_the_child_of_the_command_that_is_given() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "heap")?;
    let images = workload.images()?;
    engine.dump(&place, workload.pid, &images, &["--display-stats"])?;
    processes::await_end(&[workload.pid])?;
    let mut command = engine.command(&place, "restore", &images, "restore.log");
    let child = place.path("child.txt");
    let note = format!("cat /proc/$$/task/$$/children > {}; exec sleep 1000", child.display());
    command.args(["--exec-cmd", "--", "sh", "-c", &note]);
    let parent = command.spawn().map_err(|error| error.to_string())?.id() as i32;
    processes::wait_for("the command", || read(&child).is_ok_and(|text| !text.is_empty()))?;
    same(read(&child)?.split_whitespace().any(|pid| pid == workload.pid.to_string()), true)?;
    let comm = PathBuf::from(format!("/proc/{parent}/comm"));
    processes::wait_for("the command's own program", || read(&comm).is_ok_and(|name| name == "sleep\n"))?;
    workload.ask()?;
    workload.end()
}

#[test]
fn what_no_command_takes_is_refused_by_name() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let images = place.folder("images")?;
    for (verb, words, told) in [
        ("dump", &["-t", "1", "--stream"][..], "--stream"),
        ("pre-dump", &["-t", "1", "--lazy-pages"], "--lazy-pages is not for pre-dump"),
        ("dump", &["-t", "1", "--inherit-fd", "fd[0]:x"], "--inherit-fd is for restore only"),
        ("dump", &["-t", "1", "more"], "more is one word too many"),
        ("restore", &["-S"], "--restore-sibling"),
        ("restore", &["-J", "mnt:1"], "--join-ns mnt:1"),
        ("restore", &["--manage-cgroups=hard"], "\"hard\""),
        ("pre-dump", &[], "--tree PID"),
        ("restore", &["--prev-images-dir", "x"], "--prev-images-dir is for dump"),
        ("nonsense", &[], "nonsense"),
    ] {
        let output = programs::run(engine.command(&place, verb, &images, "log").args(words))?;
        let said = programs::said(&output);
        if output.status.success() || !said.contains(told) {
            return Err(format!("{verb} {words:?}: {said}"));
        }
    }
    Ok(())
}

#[test]
fn the_log_has_its_place_and_its_pid() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "heap")?;
    let (images, work) = (workload.images()?, place.folder("elsewhere")?);
    let words = ["-W", &work.to_string_lossy(), "--log-pid", "--leave-running"];
    engine.dump(&place, workload.pid, &images, &words)?;
    let names: Vec<String> = std::fs::read_dir(&work)
        .map_err(|error| error.to_string())?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    same(names.iter().filter(|name| name.starts_with("dump.log.")).count(), 1)?;
    same((names.iter().any(|name| name == "stats-dump"), images.join("stats-dump").exists()), (true, false))?;
    workload.ask()?;
    workload.end()
}

#[test]
fn a_dump_tells_of_its_processor_and_a_restore_compares_it() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "heap")?;
    let (without, images) = (workload.images()?, workload.images()?);
    engine.dump(&place, workload.pid, &without, &["--leave-running"])?;
    engine.dump(&place, workload.pid, &images, &["--cpu-cap"])?;
    processes::await_end(&[workload.pid])?;
    same((without.join("cpuinfo.img").exists(), images.join("cpuinfo.img").exists()), (false, true))?;
    let problem = engine.restore(&place, &without, &["--cpu-cap"]).err().unwrap_or_default();
    same(problem.contains("do not tell of the processor"), true)?;
    engine.restore(&place, &images, &["--cpu-cap=cpu"])?;
    workload.ask()?;
    workload.end()
}

/// Directly after a dump, the tree's processes may wait for their parent yet, who looks for them now and then: a restore waits too.
#[test]
fn a_restore_waits_for_pids_to_be_free() -> Outcome {
    let place = Place::new()?;
    let mut workload = Workload::start(&place, "threads")?;
    let (images, engine) = (workload.images()?, Engine::ferry()?);
    engine.dump(&place, workload.pid, &images, &[])?;
    let ended = rustix::process::Pid::from_raw(workload.pid).ok_or("no pid")?;
    let parent = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(500));
        rustix::process::waitpid(Some(ended), rustix::process::WaitOptions::empty()).is_ok()
    });
    engine.restore(&place, &images, &[])?;
    if !matches!(parent.join(), Ok(true)) {
        return Err("the dumped process was not there any more: this test shows nothing".to_owned());
    }
    workload.ask()?;
    workload.end()
}
