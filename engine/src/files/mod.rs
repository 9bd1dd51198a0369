//! Descriptors and what they name: both halves, dump and restore, object by object.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `collect` | the walk over descriptor tables: [`FilesCollector`]; which descriptors share a description |
//! | `table`, `fdinfo`, `owner` | what the kernel says of every descriptor alike |
//! | `regular`, `ghost`, `pipe`, `event` … | one kind of object each: its dump and its restore |
//! | `tty/` | terminals |
//! | `plan`, `restore`, `session` | who makes which description at restore, when, and the batches that do it: [`RestorePlan`] |
//!
//! Sockets have their own folder, `sockets/`.
//!
//! A dump looks from outside: `/proc/PID/fd`, `/proc/PID/fdinfo`, and duplicates by pidfd_getfd(2). A restore makes
//! each open file description once, in the lowest common ancestor of its holders, and lets clone(2) hand it down.

mod collect;
mod epoll;
mod event;
pub(crate) mod fdinfo;
mod ghost;
mod ghost_restore;
mod lock;
pub(crate) mod names;
mod owner;
mod pipe;
mod plan;
mod regular;
mod restore;
pub(crate) mod session;
mod table;
pub(crate) mod tty;

use std::collections::BTreeSet;
use std::path::PathBuf;

pub use collect::{FilesCollector, FilesDump};
pub use names::{NameJournal, NewName};
pub use plan::{Inherited, Obstacle, RestoreFilesError, RestorePlan, RestoreTask, Terminals};
pub use restore::FoundFile;
pub use tty::{Controlled, OpenMaster};

/// How descriptors are to be saved.
#[derive(Clone, Debug)]
pub struct FilesOptions {
    /// Whether the tree is stopped and contents are read; otherwise only what would keep a dump from succeeding is sought,
    /// and tasks and descriptors that vanish meanwhile are passed over.
    pub stopped: bool,
    /// Largest deleted file whose content is saved, in bytes of storage.
    pub ghost_limit: u64,
    /// Objects that a restore will be given from outside: `file[MNT:INO]`, `pipe[INO]`, `socket[INO]` (mount ids in
    /// hexadecimal, inodes of files in hexadecimal and of the others in decimal, as CRIU writes them).
    pub external: BTreeSet<String>,
    /// Whether the other ends of pipes and the files that the root task has at descriptors 0 to 2 may lie outside the tree.
    pub outside_stdio: bool,
    /// Whether the other end of any pipe may lie outside the tree. It is closed in the restored tree, unless the restore is
    /// given another.
    pub outside_pipes: bool,
    /// The inode of the socket to whose other end the tree may be connected to ask for this very dump. Such a connection
    /// has the answer in it when it is restored, and nobody at its other end.
    pub requested_by: Option<u32>,
    /// Whether the master side of one terminal may be held outside the tree.
    pub outside_terminal: bool,
    /// Whether file locks are saved.
    pub file_locks: bool,
    /// The number that images give to the tree's network namespace, which sockets name.
    pub network_namespace_id: Option<u32>,
    /// Mount points whose mounts are left out: files there lie outside.
    pub skipped_mounts: Vec<PathBuf>,
    /// Whether nobody can name an object as external, so that remedies do not speak of it.
    pub of_bundle: bool,
}

impl Default for FilesOptions {
    fn default() -> Self {
        Self {
            stopped: true,
            ghost_limit: 1 << 20,
            external: BTreeSet::new(),
            outside_stdio: false,
            outside_pipes: false,
            requested_by: None,
            outside_terminal: false,
            file_locks: false,
            network_namespace_id: None,
            skipped_mounts: Vec::new(),
            of_bundle: false,
        }
    }
}

/// Why one object cannot be saved, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub problem: String,
    pub remedy: String,
}

impl Problem {
    pub fn new(problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { problem: problem.into(), remedy: remedy.into() }
    }

    /// The kernel did not say what had to be known.
    pub fn unreadable(what: &str, error: impl std::fmt::Display) -> Self {
        Self::new(format!("{what} cannot be read: {error}"), "")
    }
}
