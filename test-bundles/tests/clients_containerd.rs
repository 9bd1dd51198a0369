//! containerd checkpoints and restores containers through its runc-v2 shim, with ferry as the shim's `BinaryName` and as the
//! only `criu`.

use ferry_test_bundles::containerd::Containerd;
use ferry_test_bundles::{Outcome, Place, client, image, processes, programs};
use std::path::PathBuf;

/// `ctr tasks checkpoint` of a container that goes on, and of one that ends.
fn tasks(runtime: PathBuf) -> Outcome {
    let place = Place::new()?;
    let containerd = Containerd::new(&place, runtime)?;
    let rootfs = place.path("bundle/rootfs").to_string_lossy().into_owned();
    containerd.start("running", "service", &["--rootfs", &rootfs])?;
    let (images, work) = (place.path("images"), place.path("logs"));
    let tree = processes::tree(containerd.task("running")?.1);
    let checkpoint = |options: &[&str]| {
        let (images, work) = (images.to_string_lossy(), work.to_string_lossy());
        let fixed = ["tasks", "checkpoint", "--image-path", &images, "--work-path", &work];
        containerd.run(&[&fixed[..], options, &["running"]].concat())
    };
    checkpoint(&[])?;
    containerd.is_well("running", "tasks checkpoint")?;
    if processes::tree(containerd.task("running")?.1) != tree {
        return Err("the processes are others after a checkpoint".to_owned());
    }
    if !images.join("inventory.img").exists() || !work.join("stats-dump").exists() {
        return Err("images or statistics are not where they were asked for".to_owned());
    }
    std::fs::remove_dir_all(&images).map_err(|error| format!("{}: {error}", images.display()))?;
    checkpoint(&["--exit"])?;
    processes::await_end(&tree)?;
    containerd.remove("running")?;
    containerd.end()
}

/// `ctr containers checkpoint` into containerd's store, and `ctr containers restore` from it under other names.
fn containers(runtime: PathBuf) -> Outcome {
    let place = Place::new()?;
    let containerd = Containerd::new(&place, runtime)?;
    containerd.start("first", "service", &[image::NAME])?;
    let inside = |name: &str, script: &str| {
        containerd.run(&["tasks", "exec", "--exec-id", "shell", name, "/bin/sh", "-c", script])
    };
    inside("first", "echo kept > /etc/kept; rm /bin/grep")?;
    let reference = "localhost/first:checkpoint";
    containerd.run(&["containers", "checkpoint", "--rw", "--image", "--task", "first", reference])?;
    containerd.is_well("first", "containers checkpoint")?;
    containerd.remove("first")?;
    for name in ["second", "third"] {
        containerd.run(&["containers", "restore", "--rw", "--live", name, reference])?;
        containerd.is_well(name, "containers restore")?;
        let kept = inside(name, "cat /etc/kept; ls /bin/grep 2>&1 || true")?;
        if kept != "kept\nls: /bin/grep: No such file or directory\n" {
            return Err(format!("the root file system of {name} shows {kept:?}"));
        }
        containerd.remove(name)?;
    }
    containerd.end()
}

/// A task that cannot be saved runs on, and people are told why: by `ctr` itself, or in the log that it names.
fn refused(runtime: PathBuf, by_ctr: bool) -> Outcome {
    let place = Place::new()?;
    let containerd = Containerd::new(&place, runtime)?;
    let (rootfs, work) = (place.path("bundle/rootfs"), place.path("logs"));
    containerd.start("refused", "inotify", &["--rootfs", &rootfs.to_string_lossy()])?;
    let tree = processes::tree(containerd.task("refused")?.1);
    let mut command = containerd.command()?;
    command.args(["tasks", "checkpoint", "--image-path"]).arg(place.path("images")).arg("--work-path").arg(&work);
    let output = programs::run(command.arg("refused"))?;
    let told = programs::said(&output);
    let reason = match by_ctr {
        true => told.clone(),
        false if told.contains("dump.log") => client::errors(&work.join("dump.log")),
        false => String::new(),
    };
    let words = ["pid 1 (workload): fd ", "inotify", "have the program close it"];
    if output.status.success() || !words.iter().all(|word| reason.contains(word)) {
        return Err(format!("{}: {told}, because of {reason:?}", output.status));
    }
    if processes::tree(containerd.task("refused")?.1) != tree {
        return Err("the processes are others after a refused checkpoint".to_owned());
    }
    containerd.is_well("refused", "a refused checkpoint")?;
    containerd.remove("refused")?;
    containerd.end()
}

#[test]
fn ferry_is_the_runtime_and_refuses() -> Outcome {
    refused(programs::ferry()?, true)
}

#[test]
fn runc_is_the_runtime_and_ferry_refuses() -> Outcome {
    refused(programs::installed("runc")?, false)
}

#[test]
fn ferry_is_the_runtime_of_tasks() -> Outcome {
    tasks(programs::ferry()?)
}

#[test]
fn ferry_is_the_runtime_of_containers() -> Outcome {
    containers(programs::ferry()?)
}

#[test]
fn runc_is_the_runtime_of_tasks() -> Outcome {
    tasks(programs::installed("runc")?)
}

#[test]
fn runc_is_the_runtime_of_containers() -> Outcome {
    containers(programs::installed("runc")?)
}
