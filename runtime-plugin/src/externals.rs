//! What of a container lies outside of it, as its OCI config tells: mounts whose content is the host's.
//!
//! A bind mount of the config is taken from the bundle again when the container is restored; a masked file shows
//! `/dev/null`. Neither is saved. Both halves ask here, so that they name the same mounts by the same keys.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use ferry_cgroup::{Hierarchies, Version};
use ferry_engine::namespaces::NamespaceKind;
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};

use crate::cgroups::ContainerCgroup;

/// Mounts that come from outside: where they are in the container, and what the host has there.
///
/// `rootfs` is the container's root as the host sees it, by which symbolic links on the way are followed.
pub fn mounts(spec: &Spec, bundle: &Path, rootfs: &Path, cgroup: &ContainerCgroup) -> BTreeMap<PathBuf, PathBuf> {
    let mut outside = BTreeMap::new();
    for mount in spec.mounts().iter().flatten().filter(|mount| is_bind(mount)) {
        if let Some(source) = mount.source() {
            outside.insert(place(rootfs, mount.destination()), bundle.join(source));
        }
    }
    // Each v1 hierarchy shows the container its own cgroup, at a folder that is called as the hierarchy's mount point is.
    let unified = |controller: &str| controller.is_empty();
    for mount in spec.mounts().iter().flatten().filter(|mount| mount.typ().as_deref() == Some("cgroup")) {
        for (_, directory) in cgroup.directories().iter().filter(|(controller, _)| !unified(controller)) {
            let depth = cgroup.path().components().filter(|part| matches!(part, Component::Normal(_))).count();
            if let Some(hierarchy) = directory.ancestors().nth(depth).and_then(Path::file_name) {
                outside.insert(place(rootfs, mount.destination()).join(hierarchy), directory.clone());
            }
        }
    }
    // A hierarchy in which the container has no cgroup of its own is shown whole, as a runtime that made it would do. It may
    // have been another runtime, which had one.
    let hierarchies = Hierarchies::detect();
    for hierarchy in hierarchies.iter().flat_map(Hierarchies::iter).filter(|one| one.version == Version::V1) {
        let Some(whole) = &hierarchy.mount else { continue };
        let Some(name) = whole.point.file_name() else { continue };
        for mount in spec.mounts().iter().flatten().filter(|mount| mount.typ().as_deref() == Some("cgroup")) {
            let point = place(rootfs, mount.destination()).join(name);
            outside.entry(point).or_insert_with(|| whole.point.clone());
        }
    }
    if let Some(linux) = spec.linux() {
        for masked in linux.masked_paths().iter().flatten() {
            let destination = place(rootfs, Path::new(masked));
            outside.entry(destination).or_insert_with(|| PathBuf::from("/dev/null"));
        }
        // Where nodes cannot be made, runtimes bind the host's.
        for device in linux.devices().iter().flatten() {
            outside.entry(device.path().clone()).or_insert_with(|| device.path().clone());
        }
    }
    for device in DEFAULT_DEVICES {
        outside.entry(device.into()).or_insert_with(|| device.into());
    }
    outside
}

/// Devices that every container has (runtime-spec, "Default Devices").
const DEFAULT_DEVICES: [&str; 6] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];

/// Namespaces that the config names by a path: they are somebody else's, and are joined again. Only those that the engine can
/// leave out are told.
pub fn namespaces(spec: &Spec) -> Vec<(NamespaceKind, PathBuf)> {
    let given = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    given
        .iter()
        .filter_map(|namespace| {
            let kind = match namespace.typ() {
                LinuxNamespaceType::Network => NamespaceKind::Net,
                LinuxNamespaceType::Pid => NamespaceKind::Pid,
                _ => return None,
            };
            Some((kind, namespace.path().clone()?))
        })
        .collect()
}

/// The key that a namespace from outside is asked for by when the container is restored; runc's names.
pub fn namespace_key(kind: NamespaceKind) -> &'static str {
    match kind {
        NamespaceKind::Pid => "extRootPidNS",
        _ => "extRootNetNS",
    }
}

/// Whether a mount shows something that the host has elsewhere.
pub fn is_bind(mount: &Mount) -> bool {
    let by_option = mount.options().iter().flatten().any(|option| matches!(option.as_str(), "bind" | "rbind"));
    by_option || mount.typ().as_deref() == Some("bind")
}

/// `path` of the container with the links on its way followed inside `rootfs`, as the runtime mounted it.
pub fn place(rootfs: &Path, path: &Path) -> PathBuf {
    const MOST_LINKS: usize = 40;
    let mut todo: Vec<std::ffi::OsString> = components(path);
    todo.reverse();
    let mut done = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = todo.pop() {
        if name == ".." {
            done.pop();
            continue;
        }
        let next = done.join(&name);
        let on_host = rootfs.join(next.strip_prefix("/").unwrap_or(&next));
        match std::fs::read_link(&on_host) {
            Ok(target) if links < MOST_LINKS => {
                links += 1;
                if target.is_absolute() {
                    done = PathBuf::from("/");
                }
                todo.extend(components(&target).into_iter().rev());
            }
            _ => done = next,
        }
    }
    done
}

fn components(path: &Path) -> Vec<std::ffi::OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_inside_the_root() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("run")).unwrap();
        std::os::unix::fs::symlink("/run", root.path().join("var")).unwrap();
        std::os::unix::fs::symlink("../../../run", root.path().join("up")).unwrap();
        std::os::unix::fs::symlink("loop", root.path().join("loop")).unwrap();
        assert_eq!(place(root.path(), Path::new("/var/lock")), Path::new("/run/lock"));
        assert_eq!(place(root.path(), Path::new("/up/x")), Path::new("/run/x"));
        assert_eq!(place(root.path(), Path::new("/a/../b")), Path::new("/b"));
        let _ = place(root.path(), Path::new("/loop"));
    }

    #[test]
    fn binds_masks_and_devices_are_outside() {
        let spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/data", "type": "bind", "source": "data", "options": ["rbind"]},
                {"destination": "/etc/hosts", "type": "none", "source": "/etc/hosts", "options": ["bind"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"},
                {"destination": "/proc", "type": "proc", "source": "proc"}
            ],
            "linux": {"maskedPaths": ["/proc/kcore"]}
        }))
        .unwrap();
        let directories = [("memory".to_owned(), PathBuf::from("/sys/fs/cgroup/memory/a/b"))].into();
        let cgroup = ContainerCgroup::with_directories("/a/b".into(), "c1", directories);
        let outside = mounts(&spec, Path::new("/bundle"), Path::new("/nowhere"), &cgroup);
        assert_eq!(outside[Path::new("/sys/fs/cgroup/memory")], Path::new("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(outside[Path::new("/data")], Path::new("/bundle/data"));
        assert_eq!(outside[Path::new("/etc/hosts")], Path::new("/etc/hosts"));
        assert_eq!(outside[Path::new("/proc/kcore")], Path::new("/dev/null"));
        assert!(!outside.contains_key(Path::new("/proc")));
    }
}
