//! The state of runc's containers, read so that they can be checkpointed in place.
//!
//! runc writes `ROOT/ID/state.json` with its own config format (libcontainer/container_linux.go, fields stable since
//! 1.0): the first process and its start time, the directory of each cgroup controller, the root file system, and
//! the bundle as the label `bundle=…`. A container that was created and not started has a FIFO `exec.fifo` there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use super::{Container, Owner, Result, Status, read_json};
use crate::cgroups::ContainerCgroup;
use crate::failure::Failure;
use crate::process::InitProcess;

/// Where runc keeps its state when root does not say otherwise.
pub const DEFAULT_ROOT: &str = "/run/runc";

/// The parts of runc's state that matter here.
#[derive(Deserialize)]
struct State {
    id: String,
    init_process_pid: i32,
    init_process_start: u64,
    created: String,
    #[serde(default)]
    cgroup_paths: BTreeMap<String, PathBuf>,
    config: Config,
}

#[derive(Deserialize)]
struct Config {
    rootfs: PathBuf,
    #[serde(default)]
    labels: Vec<String>,
    #[serde(default)]
    version: String,
}

/// The container `id` in the state directory `root`; `None` when it is not there.
///
/// # Errors
/// When its state cannot be read.
pub fn find(root: &Path, id: &str) -> Result<Option<Container>> {
    let directory = root.join(id);
    let file = directory.join("state.json");
    if !file.exists() {
        return Ok(None);
    }
    let state: State = read_json(&file)?;
    let cgroup = ContainerCgroup::with_directories(PathBuf::from(&state.id), &state.id, state.cgroup_paths);
    let init = InitProcess { pid: state.init_process_pid, start_time: state.init_process_start };
    let status = if !init.is_running() {
        Status::Stopped
    } else if directory.join("exec.fifo").exists() {
        Status::Created
    } else if cgroup.is_frozen() {
        Status::Paused
    } else {
        Status::Running
    };
    let mut annotations = BTreeMap::new();
    let mut bundle = PathBuf::new();
    for label in &state.config.labels {
        match label.split_once('=') {
            Some(("bundle", path)) => bundle = PathBuf::from(path),
            Some((name, value)) => drop(annotations.insert(name.to_owned(), value.to_owned())),
            None => {}
        }
    }
    Ok(Some(Container {
        owner: Owner::Runc,
        id: state.id,
        directory,
        bundle,
        rootfs: state.config.rootfs,
        init: Some(init),
        status,
        created: state.created,
        annotations,
        oci_version: state.config.version,
        cgroup,
        cgroup_parents: Vec::new(),
    }))
}

/// Lets runc delete its container, whose processes have ended: its state, cgroup and poststop hooks are its own.
///
/// # Errors
/// When runc is not in `PATH`, or fails; its message is passed on.
pub fn delete(container: &Container) -> std::result::Result<(), Failure> {
    let root = container.directory.parent().unwrap_or(Path::new(DEFAULT_ROOT));
    let output = Command::new("runc").arg("--root").arg(root).args(["delete", &container.id]).output();
    let output =
        output.map_err(|error| Failure::from(error).context("cannot run runc, which the container belongs to"))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!("runc could not delete its container {}: {}", container.id, message.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_container_is_read_with_its_labels() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("c1");
        std::fs::create_dir(&directory).unwrap();
        let state = r#"{"id":"c1","init_process_pid":1,"init_process_start":18446744073709551615,
            "created":"2026-01-02T03:04:05.6Z","rootless":false,"cgroup_paths":{"freezer":"/sys/fs/cgroup/freezer/c1"},
            "config":{"rootfs":"/b/rootfs","labels":["bundle=/b","a=b=c"],"version":"1.0.2"}}"#;
        std::fs::write(directory.join("state.json"), state).unwrap();
        let container = find(root.path(), "c1").unwrap().unwrap();
        assert_eq!((container.status, container.owner), (Status::Stopped, Owner::Runc));
        assert_eq!((container.bundle.as_path(), container.rootfs.as_path()), (Path::new("/b"), Path::new("/b/rootfs")));
        assert_eq!(container.annotations.get("a").map(String::as_str), Some("b=c"));
        assert!(find(root.path(), "c2").unwrap().is_none());
    }
}
