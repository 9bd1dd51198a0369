//! The program of a container's process: found as runc finds it, with the words for a failure that Podman and containerd look for.
//!
//! libcontainer's own lookup wants a PATH even for a program named by its path, and takes one for not executable that others
//! than its owner may not execute.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::default::get_executor;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};

/// Checks the program while its absence can still be told, and executes it as libcontainer does.
#[derive(Clone)]
pub struct Program;

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        get_executor().exec(spec)
    }

    /// Called in the container's root and working directory.
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref();
        let name = process.and_then(|process| process.args().as_ref()?.first());
        let environment = process.and_then(|process| process.env().as_ref());
        let path = environment.into_iter().flatten().rev().find_map(|variable| variable.strip_prefix("PATH="));
        match name {
            Some(name) => find(name, path.unwrap_or_default()).map_err(ExecutorValidationError::ArgValidationError),
            None => Err(ExecutorValidationError::ArgValidationError("process.args is empty".to_owned())),
        }
    }
}

/// Looks for a program as execvp(3) does, and tells in runc's words why it cannot be executed.
fn find(name: &str, path: &str) -> Result<(), String> {
    let told = |problem: &str| Err(format!("exec: {name:?}: {problem}"));
    if name.contains('/') {
        return match mode(Path::new(name)) {
            None => told(&format!("stat {name}: no such file or directory")),
            Some(mode) if mode & 0o111 != 0 => Ok(()),
            Some(_) => told("permission denied"),
        };
    }
    let candidates = path.split(':').map(|folder| PathBuf::from(folder).join(name));
    match candidates.filter_map(|file| mode(&file)).any(|mode| mode & 0o111 != 0) {
        true => Ok(()),
        false => told("executable file not found in $PATH"),
    }
}

/// The mode of the file that is there. Whether it is executable for this user, the kernel tells.
fn mode(path: &Path) -> Option<u32> {
    path.metadata().ok().filter(|metadata| !metadata.is_dir()).map(|metadata| metadata.permissions().mode())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_in_runcs_words() {
        let folder = tempfile::tempdir().unwrap();
        let (tool, data) = (folder.path().join("tool"), folder.path().join("data"));
        for (file, mode) in [(&tool, 0o700), (&data, 0o600)] {
            std::fs::write(file, "").unwrap();
            std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let path = format!("/nowhere:{}", folder.path().display());
        assert_eq!(find("tool", &path), Ok(()));
        assert_eq!(find(&tool.to_string_lossy(), ""), Ok(()));
        assert_eq!(find("tool", "").unwrap_err(), "exec: \"tool\": executable file not found in $PATH");
        assert_eq!(find("data", &path).unwrap_err(), "exec: \"data\": executable file not found in $PATH");
        assert_eq!(
            find("/no/such", &path).unwrap_err(),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert!(find(&data.to_string_lossy(), "").unwrap_err().ends_with("permission denied"));
    }
}
