//! Hierarchies that no mount here shows: mounted for this process alone, or found in a folder of mounts (a *yard*).
//!
//! A mount that is attached nowhere (fsopen(2), fsmount(2), Linux 5.2) is reached through its descriptor, `/proc/self/fd/N`, and goes
//! with it. A named hierarchy of version 1 exists from its first mount on, and as long as it has cgroups or mounts.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

use super::{Hierarchies, Hierarchy, HierarchyError, Mount, Version, version_of};

/// The name that CRIU's yards have for version 2.
const UNIFIED: &str = "unified";

impl Hierarchies {
    /// The hierarchies of the host, each reached only through its folder in `yard`: called as its controllers, with commas between
    /// them, as its name, or `unified`.
    ///
    /// # Errors
    /// As [`Hierarchies::detect`].
    pub fn in_yard(yard: &Path) -> Result<Hierarchies, HierarchyError> {
        let mut hierarchies = Self::detect()?;
        for hierarchy in &mut hierarchies.list {
            let name = hierarchy.name();
            let folder = match hierarchy.version {
                Version::V2 => UNIFIED,
                Version::V1 => name.strip_prefix("name=").unwrap_or(&name),
            };
            let point = yard.join(folder);
            hierarchy.mount = point.is_dir().then(|| Mount { point, root: "/".to_owned() });
        }
        Ok(hierarchies)
    }

    /// Sees to it that the hierarchy with these controllers (none, or an empty one, for version 2) can be reached.
    ///
    /// # Errors
    /// [`HierarchyError::Mount`]: the kernel does not mount it.
    pub fn provide(&mut self, controllers: &[String]) -> Result<(), HierarchyError> {
        let controllers: Vec<String> = controllers.iter().filter(|name| !name.is_empty()).cloned().collect();
        let is_it = |one: &&mut Hierarchy| match controllers.first() {
            None => one.version == Version::V2,
            Some(first) => one.has_controller(first),
        };
        let known = self.list.iter_mut().find(is_it);
        if known.as_ref().is_some_and(|known| known.mount.is_some()) {
            return Ok(());
        }
        let wanted = Hierarchy { version: version_of(&controllers), controllers, mount: None };
        let hierarchy = wanted.label();
        let mount = mount(&wanted).map_err(|source| HierarchyError::Mount { hierarchy, source })?;
        let point = format!("/proc/self/fd/{}", mount.as_raw_fd()).into();
        let mount_here = Some(Mount { point, root: "/".to_owned() });
        match known {
            Some(known) => known.mount = mount_here,
            None => self.list.push(Hierarchy { mount: mount_here, ..wanted }),
        }
        self.kept.push(Arc::new(mount));
        Ok(())
    }
}

fn mount(hierarchy: &Hierarchy) -> io::Result<OwnedFd> {
    let fs_type = if hierarchy.version == Version::V1 { "cgroup" } else { "cgroup2" };
    let context = fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for controller in &hierarchy.controllers {
        // Names may come from an image.
        let name = controller.strip_prefix("name=").unwrap_or(controller);
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if name.is_empty() || !name.bytes().all(plain) {
            return Err(io::Error::other("its name is none of a hierarchy"));
        }
        if name.len() < controller.len() {
            fsconfig_set_flag(context.as_fd(), "none")?;
            fsconfig_set_string(context.as_fd(), "name", name)?;
        } else {
            fsconfig_set_flag(context.as_fd(), name)?;
        }
    }
    fsconfig_create(context.as_fd())?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}
