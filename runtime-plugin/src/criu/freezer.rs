//! `--freeze-cgroup`, `freeze_cgroup` in the RPC: the cgroup to freeze for a dump.

use std::path::Path;

use ferry_cgroup::Freezer;

use crate::failure::Failure;

/// The freezer that a caller names: by a directory, also one relative to the working directory, by a path within the freezer's
/// hierarchy, or by a container's id.
///
/// # Errors
/// When there is no such cgroup, or it cannot be frozen.
pub fn named(path: &Path) -> Result<Freezer, Failure> {
    // A relative directory is meant only if it is there; most relative paths are of the hierarchy.
    let directory = std::path::absolute(path).ok().filter(|path| path.join("cgroup.procs").exists());
    Freezer::for_path(directory.as_deref().unwrap_or(path)).map_err(Failure::from)
}
