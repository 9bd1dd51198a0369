//! Bundles whose config differs from the one that the container was checkpointed with.

use ferry_test_bundles::container::refusal;
use ferry_test_bundles::{Bundle, Container, Outcome, Place, processes};
use serde_json::{Value, json};

/// What is the host's may differ: the source of a bind mount, and the cgroup.
#[test]
fn what_is_the_hosts_is_taken_from_the_bundle() -> Outcome {
    let place = Place::new()?;
    let (mut bundle, container) = checkpointed(&place)?;
    let other = place.folder("other")?;
    std::fs::write(other.join("name"), "other").map_err(|error| format!("name: {error}"))?;
    bind(&mut bundle)["source"] = json!(other);
    bundle.config["linux"]["cgroupsPath"] = json!(format!("/{}/deeper", place.name()));
    bundle.write()?;
    container.restore(&[])?;
    let seen = container.exec(&["sh", "-c", "cat /work/name"])?;
    let groups = format!("/proc/{}/cgroup", container.pid()?);
    let groups = std::fs::read_to_string(&groups).map_err(|error| format!("{groups}: {error}"))?;
    if seen != "other" || !groups.contains(&format!("/{}/deeper", place.name())) {
        return Err(format!("the container sees {seen:?} in its mount, and is in {groups}"));
    }
    processes::wait_for("the program to go on", || other.join("now").exists())?;
    container.end()
}

/// What is the container's comes from the images; a config that says otherwise is refused, and everything told at once.
#[test]
fn what_is_the_containers_is_not() -> Outcome {
    let place = Place::new()?;
    let (mut bundle, container) = checkpointed(&place)?;
    let whole = bundle.config.clone();
    let mounts = |bundle: &mut Bundle| bundle.config["mounts"].as_array_mut().map(std::mem::take).unwrap_or_default();
    let mut changed = mounts(&mut bundle);
    changed.pop();
    changed.push(json!({"destination": "/new", "type": "tmpfs", "source": "tmpfs"}));
    bundle.config["mounts"] = Value::Array(changed);
    let namespaces = json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]);
    bundle.config["linux"]["namespaces"] = namespaces;
    bundle.write()?;
    let mut restore = container.command("restore");
    restore.args(["--detach", "--bundle"]).arg(&container.bundle).arg(&container.id);
    let words = ["spec.dump", "/work", "/new", "network namespace is the host's in it"];
    refusal(&mut restore, &words)?;
    if container.state().is_ok() {
        return Err("the refused container has a state".to_owned());
    }
    bundle.config = whole;
    bundle.write()?;
    container.restore(&[])?;
    container.end()
}

/// Images in a folder have no config beside them: what they need from outside and do not get is told by the engine.
#[test]
fn a_folder_tells_what_it_lacks() -> Outcome {
    let place = Place::new()?;
    let folder = place.folder("images")?.to_string_lossy().into_owned();
    let (mut bundle, container) = started(&place)?;
    container.checkpoint(&["--image-path", &folder])?;
    let whole = bundle.config.clone();
    bundle.config["mounts"].as_array_mut().map(Vec::pop);
    bundle.write()?;
    let mut restore = container.command("restore");
    restore.args(["--detach", "--image-path", &folder, "--bundle"]).arg(&container.bundle).arg(&container.id);
    let told = refusal(&mut restore, &["/work", "config.json"])?;
    if told.contains("--external") {
        return Err(format!("the remedy is an option that this command lacks: {told}"));
    }
    bundle.config = whole;
    bundle.write()?;
    container.restore(&["--image-path", &folder])?;
    container.end()
}

/// The bind mount of the test, the last of the config.
fn bind(bundle: &mut Bundle) -> &mut Value {
    let mounts = bundle.config["mounts"].as_array_mut();
    mounts.and_then(|mounts| mounts.last_mut()).expect("the bundle has mounts")
}

/// A container that says over and over that it runs, in a folder of the host.
fn started(place: &Place) -> Outcome<(Bundle, Container<'_>)> {
    let work = place.folder("work")?;
    let mut bundle = Bundle::new(place, &["sh", "-c", "while :; do echo > /work/now; sleep 0.05; done"])?;
    bundle.bind(&work, "/work", &["rw"]);
    let container = Container::run(place, &bundle)?;
    processes::wait_for("the program to run", || work.join("now").exists())?;
    Ok((bundle, container))
}

fn checkpointed(place: &Place) -> Outcome<(Bundle, Container<'_>)> {
    let (bundle, container) = started(place)?;
    container.checkpoint(&[])?;
    Ok((bundle, container))
}
