//! Options that a bundle asks for by its annotation `org.criu.config`: the path of a configuration file as CRIU's are, one option a line,
//! without the dashes. runc hands it to CRIU at both commands, so one file serves both.
//!
//! What only permits something, or says how CRIU works, is taken: what would need it is refused where it is found. What ferry
//! would have to do and does not is refused by its name.

use std::path::{Path, PathBuf};
use std::time::Duration;

use libcontainer::oci_spec::runtime::Spec;

use crate::criu::config;
use crate::criu::options::parse_size;
use crate::failure::Failure;

/// The annotation.
const ANNOTATION: &str = "org.criu.config";

/// Options without an effect of their own.
const WITHOUT_EFFECT: [&str; 22] = [
    "allow-uprobes",
    "auto-dedup",
    "deprecated",
    "display-stats",
    "enable-fs",
    "evasive-devices",
    "ext-unix-sk",
    "file-validation",
    "force-irmap",
    "ghost-fiemap",
    "irmap-scan-path",
    "libdir",
    "link-remap",
    "log-file",
    "log-pid",
    "network-lock",
    "skip-file-rwx-check",
    "skip-in-flight",
    "tcp-close",
    "tcp-established",
    "verbosity",
    "weak-sysctls",
];

/// What the file asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserConfig {
    /// Whether file locks are saved.
    pub file_locks: bool,
    /// Whether session and terminal may be from outside.
    pub shell_job: bool,
    /// Mount points whose mounts are left out.
    pub skipped_mounts: Vec<PathBuf>,
    /// Largest deleted file to save, in bytes.
    pub ghost_limit: Option<u64>,
    /// How long the container may stand still.
    pub timeout: Option<Duration>,
}

impl UserConfig {
    /// What the bundle's config asks for; nothing, as with CRIU, if it names no file, or one that is not there.
    ///
    /// # Errors
    /// The file cannot be read, or asks for what ferry does not do.
    pub fn of(spec: &Spec) -> Result<Self, Failure> {
        let annotations = spec.annotations().as_ref();
        match annotations.and_then(|all| all.get(ANNOTATION)).filter(|path| !path.is_empty()) {
            Some(path) => Self::read(Path::new(path)),
            None => Ok(Self::default()),
        }
    }

    fn read(path: &Path) -> Result<Self, Failure> {
        let mut config = Self::default();
        for word in config::read(path)?.unwrap_or_default() {
            let word = word.to_string_lossy();
            let option = word.trim_start_matches("--");
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            config.take(name, value).map_err(|failure| {
                failure.context(format!("annotation {ANNOTATION}, file {}: {name}", path.display()))
            })?;
        }
        Ok(config)
    }

    fn take(&mut self, name: &str, value: &str) -> Result<(), Failure> {
        let (name, on) = name.strip_prefix("no-").map_or((name, true), |name| (name, false));
        match name {
            "file-locks" => self.file_locks = on,
            "shell-job" => self.shell_job = on,
            "skip-mnt" if on => self.skipped_mounts.push(value.into()),
            "ghost-limit" if on => self.ghost_limit = Some(parse_size(value)?),
            "timeout" if on => {
                let seconds = value.parse().map_err(|_| Failure::new(format!("{value:?} is no number of seconds")))?;
                self.timeout = Some(Duration::from_secs(seconds)).filter(|time| !time.is_zero());
            }
            _ if WITHOUT_EFFECT.contains(&name) => {}
            _ => return Err(Failure::new("ferry does not take this option as a runtime: leave it out")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_taken_or_refused_whole() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.conf");
        let read = |text: &str| {
            std::fs::write(&file, text).unwrap();
            UserConfig::read(&file)
        };
        assert_eq!(read("# nothing\nlog-file x\ntcp-established\nno-file-locks").unwrap(), UserConfig::default());
        let config =
            read("file-locks\nskip-mnt /a\nskip-mnt \"/b c\"\nghost-limit 2K\ntimeout 7\nno-shell-job\n").unwrap();
        assert!(config.file_locks && !config.shell_job);
        assert_eq!(config.skipped_mounts, [Path::new("/a"), Path::new("/b c")]);
        assert_eq!((config.ghost_limit, config.timeout), (Some(2048), Some(Duration::from_secs(7))));
        for (wrong, word) in
            [("lazy-pages", "lazy-pages"), ("timeout x", "seconds"), ("action-script /x", "action-script")]
        {
            assert!(read(wrong).unwrap_err().to_string().contains(word), "{wrong}");
        }
        assert_eq!(UserConfig::read(Path::new("/no/such/file")).unwrap(), UserConfig::default());
    }
}
