//! Files that tell a caller the pid of what was started for it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::janitor::{Janitor, Kind};

/// A pid file. Unless it is kept, it is gone again when this is dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    kept: bool,
}

impl PidFile {
    /// Writes it in one step, so that a manager that waits for it never reads half of it. The janitor takes it away if ferry is
    /// killed.
    ///
    /// # Errors
    /// When the file cannot be written; then there is none.
    pub fn write(path: &Path, pid: i32, janitor: Option<&Janitor>) -> Result<Self, Failure> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let draft = path.with_file_name(format!(".{name}"));
        let write = || -> io::Result<()> {
            if let Some(janitor) = janitor {
                janitor.path(&draft, Kind::File, None)?;
            }
            fs::write(&draft, pid.to_string())?;
            if let Some(janitor) = janitor {
                janitor.path(path, Kind::File, Some(fs::metadata(&draft)?.ino()))?;
            }
            fs::rename(&draft, path)
        };
        match write() {
            Ok(()) => Ok(Self { path: path.to_owned(), kept: false }),
            Err(error) => {
                let _ = fs::remove_file(&draft);
                Err(Failure::from(error).context(format_args!("cannot write the pid file {}", path.display())))
            }
        }
    }

    /// Leaves the file there.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_is_replaced_and_goes_unless_it_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        fs::write(&path, "something longer").unwrap();
        PidFile::write(&path, 42, None).unwrap().keep();
        assert_eq!(fs::read_to_string(&path).unwrap(), "42");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        drop(PidFile::write(&path, 43, None).unwrap());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(PidFile::write(&directory.path().join("no/pid"), 44, None).is_err());
    }
}
