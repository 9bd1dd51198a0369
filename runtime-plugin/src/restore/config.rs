//! Whether a bundle's config fits the checkpoint that is restored in it.
//!
//! A restored container is what it was: its mounts and namespaces come from the images. The config tells what the host has for
//! those from outside, where its cgroup is, and which hooks run. So a config that asks for another container than the one
//! that was saved would be disobeyed without a word; it is refused, with everything that differs.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use ferry_engine::images::{ImageSet, RawRegion};
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};

use crate::externals;
use crate::failure::Failure;

/// The config of the container when it was saved, in the archive.
pub const SAVED: &str = "spec.dump";

/// Checks the bundle's config against the archive's, if it has one.
///
/// # Errors
/// When they differ in what a restore takes from neither or from both.
pub fn check(images: &ImageSet, saved: Option<RawRegion>, bundle: &Spec) -> Result<(), Failure> {
    let Some(saved) = images.member(SAVED, saved)? else { return Ok(()) };
    let saved: Spec = serde_json::from_slice(&saved.region().to_vec(SAVED)?)
        .map_err(|error| Failure::from(error).context(format!("{SAVED} of the archive is damaged")))?;
    let differences = differences(&saved, bundle);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "the bundle's config.json is not of the container in the archive: {}; take the archive's {SAVED}, with the paths of this host",
        differences.join("; ")
    )))
}

/// What a restore with the config `bundle` could not make of the container that had `saved`.
fn differences(saved: &Spec, bundle: &Spec) -> Vec<String> {
    let (had, has) = (mounts(saved), mounts(bundle));
    let mut found = Vec::new();
    for (point, mount) in &had {
        if externals::is_bind(mount) && !has.get(point).is_some_and(|mount| externals::is_bind(mount)) {
            found.push(format!("it does not say what of the host is mounted at {}", point.display()));
        }
    }
    for (point, mount) in &has {
        match had.get(point) {
            None => found.push(format!("it has a mount at {}, and the container had none", point.display())),
            Some(before) if externals::is_bind(mount) && !externals::is_bind(before) => found.push(format!(
                "it mounts something of the host at {}, and the container had a {} of its own there",
                point.display(),
                before.typ().as_deref().unwrap_or("file system")
            )),
            Some(_) => {}
        }
    }
    let (had, has) = (namespaces(saved), namespaces(bundle));
    for (kind, name) in KINDS {
        let (had, has) = (holder(&had, *kind), holder(&has, *kind));
        if had != has {
            found.push(format!("the {name} namespace is {has} in it, and was {had}"));
        }
    }
    found
}

/// Mounts by where they are; of several at one place the last, which is what is seen.
fn mounts(spec: &Spec) -> BTreeMap<PathBuf, &Mount> {
    let normal = |path: &Path| -> PathBuf { path.components().filter(|part| *part != Component::CurDir).collect() };
    spec.mounts().iter().flatten().map(|mount| (normal(mount.destination()), mount)).collect()
}

/// The kinds that a restore takes from images, or joins.
const KINDS: &[(LinuxNamespaceType, &str)] = &[
    (LinuxNamespaceType::Mount, "mount"),
    (LinuxNamespaceType::Pid, "pid"),
    (LinuxNamespaceType::Network, "network"),
    (LinuxNamespaceType::Ipc, "ipc"),
    (LinuxNamespaceType::Uts, "uts"),
    (LinuxNamespaceType::User, "user"),
];

/// Kinds of namespaces that are not the host's, and whether they are given by path.
fn namespaces(spec: &Spec) -> Vec<(LinuxNamespaceType, bool)> {
    let all = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    all.iter().map(|namespace| (namespace.typ(), namespace.path().is_some())).collect()
}

fn holder(namespaces: &[(LinuxNamespaceType, bool)], kind: LinuxNamespaceType) -> &'static str {
    match namespaces.iter().find(|(other, _)| *other == kind) {
        None => "the host's",
        Some((_, false)) => "the container's own",
        Some((_, true)) => "one that somebody else has made",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(change: impl FnOnce(&mut Value)) -> Spec {
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind"]}
            ],
            "linux": {"cgroupsPath": "/a", "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "mount"}]}
        });
        change(&mut spec);
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn what_is_the_hosts_may_differ() {
        let other = spec(|spec| {
            spec["mounts"][1]["source"] = json!("/elsewhere");
            spec["mounts"][1]["destination"] = json!("/data/");
            spec["linux"]["cgroupsPath"] = json!("/b");
            spec["hooks"] = json!({});
        });
        assert!(differences(&spec(|_| ()), &other).is_empty());
        // The container has it from the images.
        assert!(
            differences(&spec(|_| ()), &spec(|spec| drop(spec["mounts"].as_array_mut().unwrap().remove(0)))).is_empty()
        );
    }

    #[test]
    fn what_is_the_containers_may_not() {
        let other = spec(|spec| {
            spec["mounts"][0] =
                json!({"destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"]});
            spec["mounts"][1]["destination"] = json!("/new");
            spec["linux"]["namespaces"] =
                json!([{"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "mount"}, {"type": "uts"}]);
        });
        assert_eq!(
            differences(&spec(|_| ()), &other),
            [
                "it does not say what of the host is mounted at /data",
                "it has a mount at /new, and the container had none",
                "it mounts something of the host at /proc, and the container had a proc of its own there",
                "the pid namespace is one that somebody else has made in it, and was the container's own",
                "the network namespace is the host's in it, and was the container's own",
                "the uts namespace is the container's own in it, and was the host's",
            ]
        );
    }
}
