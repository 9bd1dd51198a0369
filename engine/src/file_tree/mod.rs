//! Trees of files as tar archives: what a tmpfs holds, and what a container has changed of its root.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `pack` | files as entries of an archive |
//! | `tape` | an archive whose content stays in its files until it is asked for |
//! | `overlay` | what the upper layer of an overlay changes |
//! | `unpack` | filling a new folder from an archive |
//! | `apply`, `undo` | changing a folder that is in use as an archive says, and back |
//!
//! An archive read is taken for hostile: every name is resolved below the folder that it belongs in, past no link.

mod apply;
mod overlay;
mod pack;
mod tape;
mod undo;
mod unpack;

pub use apply::{Applied, ApplyError, Changes};
pub use overlay::{Overlay, OverlayChanges, OverlayError};
pub(crate) use pack::pack;
pub use tape::Tape;
pub use undo::take_back;
pub(crate) use unpack::unpack;

/// The archive member that holds the files that a container has made or changed.
pub const ROOTFS_DIFF: &str = "rootfs-diff.tar";
/// The archive member that lists what a container has deleted: a JSON array of absolute paths.
pub const DELETED_FILES: &str = "deleted.files";
