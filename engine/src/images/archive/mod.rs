//! The checkpoint archive: a tar in Podman's layout.
//!
//! Images lie under `checkpoint/`, other members (`config.dump`, `spec.dump`, `rootfs-diff.tar`, …) beside it. Compression is
//! the caller's: what is written goes through any `Write`, what is read comes from any `Read`.

mod read;
#[cfg(test)]
mod tests;
mod write;

pub use read::{ArchiveSource, Spool};
pub use write::ArchiveSink;

/// Folder of the images within an archive.
pub const IMAGE_PREFIX: &str = "checkpoint/";

/// Bytes of a tar record; members are padded to it.
const RECORD: u64 = 512;
