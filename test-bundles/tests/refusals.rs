//! What bad input gets: one clear sentence, exit status 1, nothing changed and nothing left behind.

use ferry_test_bundles::container::refusal;
use ferry_test_bundles::{Bundle, Container, Engine, Outcome, Place, Workload, processes, programs};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::process::Command;

/// A container that sleeps.
fn sleeper(place: &Place) -> Outcome<(Bundle, Container<'_>)> {
    let bundle = Bundle::new(place, &["sleep", "100000"])?;
    let container = Container::run(place, &bundle)?;
    Ok((bundle, container))
}

/// ferry's command line without any container.
fn ferry(place: &Place) -> Outcome<Command> {
    let mut command = Command::new(programs::ferry()?);
    command.arg("--root").arg(place.path("state")).env("TMPDIR", place.temporary()).current_dir(place.path(""));
    Ok(command)
}

#[test]
fn unknown_container() -> Outcome {
    let place = Place::new()?;
    for verb in ["checkpoint", "state", "start", "delete", "pause", "resume"] {
        refusal(ferry(&place)?.args([verb, "no-such-container"]), &["no-such-container", "does not exist"])
            .map_err(|error| format!("{verb}: {error}"))?;
    }
    // As with runc: exec's own status is the command's, so its failures are 255.
    let exec = programs::run(ferry(&place)?.args(["exec", "no-such-container", "true"]))?;
    if exec.status.code() != Some(255) || !programs::said(&exec).contains("no-such-container") {
        return Err(format!("exec: {}: {}", exec.status, programs::said(&exec)));
    }
    place.nothing_left()
}

#[test]
fn missing_bundle() -> Outcome {
    let place = Place::new()?;
    for verb in ["run", "create", "restore"] {
        refusal(ferry(&place)?.args([verb, "--bundle", "/no/such/bundle", place.name()]), &["/no/such/bundle"])
            .map_err(|error| format!("{verb}: {error}"))?;
    }
    place.nothing_left()
}

#[test]
fn nothing_to_restore_from() -> Outcome {
    let place = Place::new()?;
    let bundle = Bundle::new(&place, &["sleep", "100000"])?;
    bundle.write()?;
    refusal(ferry(&place)?.args(["restore", "--bundle"]).arg(&bundle.path).arg(place.name()), &["checkpoint"])?;
    let empty = place.folder("empty")?;
    let mut command = ferry(&place)?;
    command.args(["restore", "--image-path"]).arg(&empty).arg("--bundle").arg(&bundle.path).arg(place.name());
    refusal(&mut command, &["inventory.img", "missing"])?;
    place.nothing_left()
}

#[test]
fn checkpoint_before_start() -> Outcome {
    let place = Place::new()?;
    let bundle = Bundle::new(&place, &["sleep", "100000"])?;
    let container = Container::create(&place, &bundle)?;
    refusal(container.command("checkpoint").arg(&container.id), &[&container.id, "created"])?;
    container.is("created")?;
    container.verb("start", &[])?;
    container.is("running")?;
    container.end()
}

#[test]
fn checkpoint_after_the_end() -> Outcome {
    let place = Place::new()?;
    let (_, container) = sleeper(&place)?;
    let tree = processes::tree(container.pid()?);
    programs::succeed(container.command("kill").arg(&container.id).arg("KILL"))?;
    processes::await_end(&tree)?;
    container.is("stopped")?;
    refusal(container.command("checkpoint").arg(&container.id), &[&container.id, "stopped"])?;
    container.verb("delete", &[])?;
    drop(container);
    place.nothing_left()
}

#[test]
fn an_id_that_is_taken() -> Outcome {
    let place = Place::new()?;
    let (bundle, container) = sleeper(&place)?;
    let archive = place.path("kept.tar").to_string_lossy().into_owned();
    container.verb("checkpoint", &["--leave-running", "--archive", &archive])?;
    let pid = container.pid()?;
    for words in [&["run", "--detach"][..], &["create"], &["restore", "--detach", "--archive", &archive]] {
        let mut command = container.command(words[0]);
        command.args(&words[1..]).arg("--bundle").arg(&bundle.path).arg(&container.id);
        refusal(&mut command, &[&container.id, "exist"]).map_err(|error| format!("{}: {error}", words[0]))?;
    }
    container.is("running")?;
    if container.pid()? != pid {
        return Err("the container is another one".to_owned());
    }
    container.end()
}

#[test]
fn flags_that_come_later_are_refused_by_name() -> Outcome {
    let place = Place::new()?;
    let (_, container) = sleeper(&place)?;
    // The memory goes to a page server only from a folder, which is not given here.
    for flags in [&["--lazy-pages"][..], &["--page-server", "127.0.0.1:9"]] {
        refusal(container.command("checkpoint").args(flags).arg(&container.id), &[flags[0]])
            .map_err(|error| format!("{}: {error}", flags[0]))?;
        container.is("running")?;
    }
    container.end()
}

/// Changes a field of `ferry.json` and renews the digest that seals the file.
fn forge(images: &Path, field: &str, value: &str) -> Outcome {
    let path = images.join("ferry.json");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let seal = text.rfind(",\n  \"sha256\"").ok_or("ferry.json has no seal")?;
    let mark = format!("\"{field}\": ");
    let start = text.find(&mark).ok_or_else(|| format!("ferry.json has no {field}"))? + mark.len();
    let end = start + text[start..].find(",\n").ok_or("odd ferry.json")?;
    let content = format!("{}{value}{}", &text[..start], &text[end..seal]);
    let digest: String = Sha256::digest(content.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(&path, format!("{content},\n  \"sha256\": \"{digest}\"\n}}\n")).map_err(|error| error.to_string())
}

/// A dumped workload whose images are then changed: the restore is refused in these words.
fn spoiled(name: &str, words: &[&str], spoil: impl FnOnce(&Place, &Path) -> Outcome) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, name)?;
    let (images, tree) = (workload.images()?, processes::tree(workload.pid));
    engine.dump(&place, workload.pid, &images, &[])?;
    processes::await_end(&tree)?;
    spoil(&place, &images)?;
    refusal(engine.command(&place, "restore", &images, "restore.log").arg("-d"), words)?;
    place.nothing_left()
}

#[test]
fn images_of_a_newer_version() -> Outcome {
    spoiled("heap", &["version 99", "newer"], |_, images| forge(images, "format", "99"))
}

#[test]
fn images_of_another_architecture() -> Outcome {
    spoiled("heap", &["s390x"], |_, images| forge(images, "architecture", "\"s390x\""))
}

#[test]
fn an_open_file_that_changed() -> Outcome {
    spoiled("regular_files", &["file 2", "bytes now"], |place, _| {
        std::fs::write(place.path("work/file 2"), "shorter").map_err(|error| error.to_string())
    })
}

#[test]
fn an_open_file_that_is_missing() -> Outcome {
    spoiled("regular_files", &["file 2"], |place, _| {
        std::fs::remove_file(place.path("work/file 2")).map_err(|error| error.to_string())
    })
}

#[test]
fn a_mapped_file_that_changed() -> Outcome {
    spoiled("file_private", &["mapped", "bytes now"], |place, _| {
        std::fs::write(place.path("work/mapped"), vec![1; 100_000]).map_err(|error| error.to_string())
    })
}

#[test]
fn an_image_that_is_missing() -> Outcome {
    spoiled("heap", &["pages-1.img"], |_, images| {
        std::fs::remove_file(images.join("pages-1.img")).map_err(|error| error.to_string())
    })
}

#[test]
fn a_pid_in_use() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "heap")?;
    let (images, tree) = (workload.images()?, processes::tree(workload.pid));
    engine.dump(&place, workload.pid, &images, &["--leave-running"])?;
    let pid = workload.pid.to_string();
    refusal(engine.command(&place, "restore", &images, "restore.log").arg("-d"), &[&pid, "use"])?;
    let now = processes::tree(workload.pid);
    if now != tree {
        return Err(format!("the tree is {now:?} after the refusal, was {tree:?}"));
    }
    workload.ask()?;
    workload.end()
}

#[test]
fn a_process_that_does_not_exist() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let images = place.folder("images")?;
    // Above the highest pid that the kernel gives.
    refusal(engine.command(&place, "dump", &images, "dump.log").args(["-t", "4194305"]), &["4194305"])?;
    place.nothing_left()
}

#[test]
fn too_little_permission() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "heap")?;
    let images = workload.images()?;
    let dump = engine.command(&place, "dump", &images, "dump.log");
    // The build folder may be closed to other users: theirs is a copy.
    let copy = place.path("ferry");
    std::fs::copy(programs::ferry()?, &copy).map_err(|error| error.to_string())?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set", "-all"]).arg(&copy);
    command.args(dump.get_args()).args(["-t", &workload.pid.to_string()]);
    refusal(&mut command, &["permi"])?;
    workload.ask()?;
    workload.end()
}

#[test]
fn everything_unsupported_is_listed_at_once() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "several_unsupported")?;
    let images = workload.images()?;
    let mut command = engine.command(&place, "dump", &images, "dump.log");
    let output = programs::run(command.args(["-t", &workload.pid.to_string()]))?;
    let told = programs::said(&output).to_lowercase();
    if output.status.code() != Some(1) {
        return Err(format!("the dump ended with {}: {told}", output.status));
    }
    for word in ["inotify", "memfd", "pidfd"] {
        if !told.contains(word) {
            return Err(format!("the refusal does not name {word}: {told}"));
        }
    }
    workload.ask()?;
    workload.end()
}
