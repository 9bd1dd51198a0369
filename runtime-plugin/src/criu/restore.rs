//! `criu restore`.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use ferry_engine::fault::Faults;
use ferry_engine::images::ImageSet;
use ferry_engine::images::folder::FolderSource;
use ferry_engine::namespaces::RestoreNamespaceOptions;
use ferry_engine::restore::{RestoreOptions, TakeTerminal, restore};
use ferry_engine::sys::{HostPid, pidfd};
use ferry_hooks::Event;

use super::listen::{Client, Listeners};
use super::options::Options;
use super::{images_dir, work_dir, write_new};
use crate::failure::Failure;

/// Restores the tree; `client` is told of stages, besides action scripts. The root's pid.
pub fn run(options: &Options, client: Option<&dyn Client>) -> Result<HostPid, Failure> {
    let images = ImageSet::open(Box::new(FolderSource::open(images_dir(options))?))?;
    let listeners = Listeners::new(options, client);
    listeners.tell(Event::PreRestore, None)?;
    let restored = restore(
        &images,
        RestoreOptions {
            notify: Some(Box::new(|stage, root| listeners.restoring(stage, root))),
            terminal_master: client.filter(|client| client.takes_terminal()).map(|client| -> TakeTerminal<'_> {
                Box::new(|master| client.take_terminal(&master).map_err(|failure| failure.to_string()))
            }),
            ..restore_options(options)?
        },
    )
    .map_err(|error| match error.is_pid_taken() {
        true => Failure::from(error).with_errno(libc::EEXIST),
        false => Failure::from(error),
    })?;
    let written = |what: &str, error: std::io::Error| {
        Failure::new(format!(
            "the tree is restored and runs as {}, but {what} cannot be written: {error}",
            restored.pid
        ))
    };
    write_new(&work_dir(options).join("stats-restore"), &restored.stats_image())
        .map_err(|error| written("stats-restore", error))?;
    if let Some(file) = &options.pidfile {
        std::fs::write(file, restored.pid.to_string()).map_err(|error| written("the pid file", error))?;
    }
    tracing::info!("Restore finished successfully. Tasks resumed.");
    if !options.restore_detached {
        await_end(restored.pid)?;
    }
    Ok(restored.pid)
}

fn await_end(root: HostPid) -> Result<(), Failure> {
    let task = pidfd::open(root)?;
    while pidfd::wait_gone(task.as_fd(), Duration::from_secs(3600)).is_err() {}
    Ok(())
}

fn restore_options<'a>(options: &Options) -> Result<RestoreOptions<'a>, Failure> {
    let mut restore = RestoreOptions {
        shell_job: options.shell_job,
        terminal: crate::console::own_terminal(options.shell_job)?,
        sibling: options.restore_sibling,
        leave_stopped: options.leave_stopped,
        faults: Faults::new(options.fault.iter().copied()),
        cgroups: super::cgroups::options(options)?,
        ..RestoreOptions::default()
    };
    restore.namespaces = RestoreNamespaceOptions {
        root: options.root.clone(),
        external_mounts: external_mounts(options)?,
        empty_net: options.empty_ns.iter().any(|kind| kind == "net"),
        ..RestoreNamespaceOptions::default()
    };
    for spec in &options.inherit_fd {
        let (key, descriptor) = inherited(spec)?;
        // A namespace is not an open file of the tree, but what a namespace of it becomes.
        if is_namespace(&descriptor) {
            restore.namespaces.external_namespaces.insert(key, descriptor);
        } else {
            restore.inherited.insert(key, descriptor);
        }
    }
    Ok(restore)
}

/// `--external mnt[KEY]:PATH` and `--ext-mount-map KEY:PATH`.
fn external_mounts(options: &Options) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let mut mounts = BTreeMap::new();
    for spec in &options.external {
        let Some(mount) = spec.strip_prefix("mnt[") else { continue };
        // `mnt[]` alone lets a dump find them by itself; a restore has nothing to add.
        let Some((key, path)) = mount.split_once("]:") else { continue };
        mounts.insert(key.to_owned(), path.into());
    }
    for spec in &options.ext_mount_map {
        let bad = || Failure::new(format!("--ext-mount-map {spec}: KEY:PATH is wanted"));
        let (key, path) = spec.split_once(':').ok_or_else(bad)?;
        if key != "auto" {
            mounts.insert(key.to_owned(), path.into());
        }
    }
    Ok(mounts)
}

/// `fd[N]:KEY`, as a descriptor of its own.
fn inherited(spec: &str) -> Result<(String, OwnedFd), Failure> {
    let bad = || Failure::new(format!("--inherit-fd {spec}: fd[NUMBER]:KEY is wanted"));
    let (number, key) = spec.strip_prefix("fd[").and_then(|rest| rest.split_once("]:")).ok_or_else(bad)?;
    let number = number.parse().map_err(|_| bad())?;
    let this = pidfd::open(HostPid(std::process::id() as i32))?;
    let descriptor = pidfd::get_fd(this.as_fd(), number)
        .map_err(|error| Failure::new(format!("--inherit-fd {spec}: descriptor {number}: {error}")))?;
    Ok((key.to_owned(), descriptor))
}

fn is_namespace(descriptor: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd())).unwrap_or_default();
    let name = link.to_string_lossy();
    ["net:[", "pid:[", "mnt:[", "uts:[", "ipc:[", "user:[", "time:[", "cgroup:["]
        .iter()
        .any(|kind| name.starts_with(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_and_mounts_are_taken_by_key() {
        let (key, descriptor) = inherited("fd[0]:pipe:[7]").unwrap();
        assert_eq!(key, "pipe:[7]");
        assert!(!is_namespace(&descriptor));
        assert!(is_namespace(&std::fs::File::open("/proc/self/ns/net").unwrap().into()));
        assert!(inherited("fd[x]:k").is_err() && inherited("7:k").is_err());
        let words = ["restore", "--external", "mnt[a]:/b", "--external", "mnt[]", "-M", "c:/d:e"];
        let options = Options::parse(words.iter().map(Into::into)).unwrap();
        let mounts = external_mounts(&options).unwrap();
        assert_eq!(mounts, [("a".into(), "/b".into()), ("c".into(), "/d:e".into())].into());
    }
}
