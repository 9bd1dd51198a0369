//! Points of a dump at which a caller may act, as CRIU's action scripts and RPC name them.
//!
//! A listener that fails makes the dump fail; the tree then runs on as before, and a listener that was told that its network
//! is locked hears that it is unlocked.

use super::DumpError;
use crate::images::Sink;
use crate::procfs;
use crate::sys::HostPid;

/// A point of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DumpStage {
    /// Nothing is stopped.
    PreDump,
    /// The tree is stopped and, as it has a network namespace of its own, does not answer its peers.
    NetworkLock,
    /// The images are complete. The tree is still stopped, unless it is to run on and the listener does not care
    /// ([`DumpListener::sees_end`]).
    PostDump,
    /// The tree stays stopped, and its pages can be fetched: only when they are not in the images ([`DumpOptions::lazy`](super::DumpOptions)).
    StatusReady,
    /// The tree runs on, or will, and may answer its peers again.
    NetworkUnlock,
}

/// Who is told of stages, with the root of the tree.
pub trait DumpListener {
    /// Returns when the stage was dealt with.
    ///
    /// # Errors
    /// A sentence; the dump fails with it.
    fn reached(&mut self, stage: DumpStage, root: HostPid) -> Result<(), String>;

    /// Whether the tree is to be kept stopped until [`DumpStage::PostDump`] was dealt with, also when it runs on: for a copy of its
    /// files that fits the images.
    fn sees_end(&self) -> bool {
        false
    }

    /// Whether [`Self::more_external`] may name anything: objects that are refused otherwise may become external then, so
    /// the dump finds refusals only in the stopped tree.
    fn names_external(&self) -> bool {
        false
    }

    /// Further objects that a restore will be given from outside, as `files.external` of the options takes them. The tree
    /// is stopped.
    ///
    /// # Errors
    /// A sentence; the dump fails with it.
    fn more_external(&mut self) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }

    /// Adds to the checkpoint what is to be of the same instant as it ([`Sink::put_beside`]). The tree is stopped, and nothing of
    /// it is refused.
    ///
    /// # Errors
    /// A sentence; the dump fails with it.
    fn stopped(&mut self, _sink: &mut dyn Sink) -> Result<(), String> {
        Ok(())
    }
}

/// Nobody listens.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoListener;

impl DumpListener for NoListener {
    fn reached(&mut self, _: DumpStage, _: HostPid) -> Result<(), String> {
        Ok(())
    }
}

/// A listener of one dump. Dropped while the network counts as locked, it tells that it no longer is.
pub(super) struct Listening<'a> {
    listener: &'a mut dyn DumpListener,
    root: HostPid,
    locked: bool,
}

impl<'a> Listening<'a> {
    pub fn new(listener: &'a mut dyn DumpListener, root: HostPid) -> Self {
        Self { listener, root, locked: false }
    }

    pub fn reached(&mut self, stage: DumpStage) -> Result<(), DumpError> {
        self.listener.reached(stage, self.root).map_err(|problem| DumpError::Caller { problem })
    }

    pub fn sees_end(&self) -> bool {
        self.listener.sees_end()
    }

    pub fn names_external(&self) -> bool {
        self.listener.names_external()
    }

    pub fn stopped(&mut self, sink: &mut dyn Sink) -> Result<(), DumpError> {
        self.listener.stopped(sink).map_err(|problem| DumpError::Caller { problem })
    }

    pub fn more_external(&mut self) -> Result<Vec<String>, DumpError> {
        self.listener.more_external().map_err(|problem| DumpError::Caller { problem })
    }

    /// Tells that the network is locked, if the tree has a namespace of its own.
    pub fn lock_network(&mut self) -> Result<(), DumpError> {
        let own = procfs::namespace_inode(HostPid(std::process::id() as i32), "net");
        let trees = procfs::namespace_inode(self.root, "net");
        if own.is_none() || trees.is_none() || own == trees {
            return Ok(());
        }
        self.locked = true;
        self.reached(DumpStage::NetworkLock)
    }

    /// The network ends with the tree: nobody is to be told of it.
    pub fn forget_network(&mut self) {
        self.locked = false;
    }

    /// Tells that the network is unlocked, if it was locked.
    pub fn unlock_network(&mut self) -> Result<(), DumpError> {
        if std::mem::take(&mut self.locked) { self.reached(DumpStage::NetworkUnlock) } else { Ok(()) }
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.unlock_network() {
            tracing::warn!(%error, "the dump failed, and telling that the network is unlocked failed too");
        }
    }
}
