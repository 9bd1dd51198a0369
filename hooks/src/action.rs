//! Action scripts: programs of the user that run at the events of a dump or restore, as with CRIU's `--action-script`.
//!
//! A script gets no arguments; it finds in its environment `CRTOOLS_SCRIPT_ACTION`, the event's name; `CRTOOLS_IMAGE_DIR`, the image
//! directory, when there is one; `CRTOOLS_INIT_PID`, the root task's pid as numbered on the host, once there is one. The rest of the
//! environment is ferry's. Of several scripts the one given last runs first, and all run even if one fails, as with
//! CRIU; one that fails makes the event fail.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::notify::{Event, Notifier, NotifyError};
use crate::program::{Program, ProgramError};

/// The action scripts of one operation.
#[derive(Debug, Clone, Default)]
pub struct ActionScripts {
    /// The programs, in the order in which they were given. A name without slash is looked up in `PATH`.
    pub scripts: Vec<PathBuf>,
    /// The directory of the images, best absolute; `None` when they go elsewhere.
    pub image_directory: Option<PathBuf>,
    /// How long one script may take; `None` for as long as it likes, as CRIU has it.
    pub timeout: Option<Duration>,
}

/// The scripts that failed at an event.
#[derive(Debug)]
pub struct ScriptsFailed(pub Vec<(PathBuf, ProgramError)>);

impl fmt::Display for ScriptsFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (script, error)) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}the action script {}: {error}", script.display())?;
            if let ProgramError::Start(source) | ProgramError::Wait(source) = error {
                write!(f, ": {source}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for ScriptsFailed {}

impl Notifier for ActionScripts {
    fn notify(&self, event: Event, pid: Option<i32>) -> Result<(), NotifyError> {
        if event.is_for_rpc_only() {
            return Ok(());
        }
        let pid = pid.map(|pid| OsString::from(pid.to_string()));
        let mut additions: Vec<(&str, &OsStr)> = vec![("CRTOOLS_SCRIPT_ACTION", OsStr::new(event.as_str()))];
        additions.extend(self.image_directory.as_ref().map(|directory| ("CRTOOLS_IMAGE_DIR", directory.as_os_str())));
        additions.extend(pid.as_deref().map(|pid| ("CRTOOLS_INIT_PID", pid)));
        let mut failed = Vec::new();
        for script in self.scripts.iter().rev() {
            tracing::debug!(%event, script = %script.display(), "running action script");
            let program = Program {
                path: script.clone(),
                additions: additions.clone(),
                timeout: self.timeout,
                ..Program::default()
            };
            match program.run() {
                Ok(output) => tracing::debug!(script = %script.display(), "the action script is done{output}"),
                Err(error) => failed.push((script.clone(), error)),
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        Err(NotifyError { event, source: Box::new(ScriptsFailed(failed)) })
    }
}
