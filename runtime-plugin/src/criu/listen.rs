//! Who is told what a `criu` command does: action scripts, and the client of an RPC request.
//!
//! The client is asked first, as with CRIU. Whoever fails makes the command fail, and the engine undo it.

use std::os::fd::OwnedFd;

use ferry_engine::dump::{DumpListener, DumpStage};
use ferry_engine::restore::Stage;
use ferry_engine::sys::HostPid;
use ferry_hooks::{ActionScripts, Event, Notifier};

use super::options::Options;
use super::{Failure, images_dir};

/// The client of an RPC request.
pub trait Client: Notifier {
    /// The inode of the socket that it is connected to.
    fn connection(&self) -> Option<u32>;

    /// Whether it takes the master side of a terminal whose master is outside the tree.
    fn takes_terminal(&self) -> bool;

    /// Hands it the master side of such a terminal, made again.
    ///
    /// # Errors
    /// A sentence: the client refused, or is gone.
    fn take_terminal(&self, master: &OwnedFd) -> Result<(), Failure>;

    /// Whether it may name external objects.
    fn names_external(&self) -> bool;

    /// The tree to dump is stopped. Objects of it that the client names as external.
    ///
    /// # Errors
    /// A sentence: the client refused, or is gone, or may not dump this tree.
    fn tree_stopped(&self) -> Result<Vec<String>, Failure>;
}

/// Everyone who is told.
pub struct Listeners<'a> {
    scripts: ActionScripts,
    client: Option<&'a dyn Client>,
    /// What gets a zero byte when pages can be fetched.
    status_descriptor: Option<i32>,
}

impl<'a> Listeners<'a> {
    /// The scripts that `options` name, and `client`.
    pub fn new(options: &Options, client: Option<&'a dyn Client>) -> Self {
        let folder = images_dir(options);
        let scripts = ActionScripts {
            scripts: options.action_script.clone(),
            image_directory: Some(std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())),
            timeout: None,
        };
        Self { scripts, client, status_descriptor: options.status_fd }
    }

    /// Tells everyone.
    ///
    /// # Errors
    /// A sentence that names the event.
    pub fn tell(&self, event: Event, root: Option<HostPid>) -> Result<(), Failure> {
        let pid = root.map(|root| root.0);
        if let Some(client) = self.client {
            client.notify(event, pid)?;
        }
        if !self.scripts.scripts.is_empty() {
            self.scripts.notify(event, pid)?;
        }
        Ok(())
    }

    /// Tells everyone of a stage of a restore.
    ///
    /// # Errors
    /// As [`Self::tell`].
    pub fn restoring(&self, stage: Stage, root: HostPid) -> Result<(), String> {
        let event = match stage {
            Stage::SetupNamespaces => Event::SetupNamespaces,
            Stage::PostSetupNamespaces => Event::PostSetupNamespaces,
            Stage::PostRestore => Event::PostRestore,
            Stage::NetworkUnlock => Event::NetworkUnlock,
            Stage::PreResume => Event::PreResume,
            Stage::PostResume => Event::PostResume,
        };
        self.tell(event, Some(root)).map_err(|failure| failure.to_string())
    }
}

impl DumpListener for Listeners<'_> {
    fn reached(&mut self, stage: DumpStage, root: HostPid) -> Result<(), String> {
        let event = match stage {
            DumpStage::PreDump => Event::PreDump,
            DumpStage::NetworkLock => Event::NetworkLock,
            DumpStage::PostDump => Event::PostDump,
            DumpStage::StatusReady => {
                if let Some(number) = self.status_descriptor {
                    super::tell_ready(number).map_err(|failure| failure.to_string())?;
                }
                Event::StatusReady
            }
            DumpStage::NetworkUnlock => Event::NetworkUnlock,
        };
        self.tell(event, Some(root)).map_err(|failure| failure.to_string())
    }

    fn sees_end(&self) -> bool {
        self.client.is_some() || !self.scripts.scripts.is_empty()
    }

    fn names_external(&self) -> bool {
        self.client.is_some_and(Client::names_external)
    }

    fn more_external(&mut self) -> Result<Vec<String>, String> {
        self.client.map_or(Ok(Vec::new()), |client| client.tree_stopped().map_err(|failure| failure.to_string()))
    }
}
