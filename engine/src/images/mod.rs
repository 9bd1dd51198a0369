//! The image set: what a dump writes and a restore reads, in CRIU 4.2's format.
//!
//! - `record/`: the messages, one file per kernel object, reached as `images::core::CoreEntry` and so on;
//! - [`kind`]: which images there are, their names and magic numbers;
//! - [`frame`]: entries within an image: encoding, and decoding with bounds;
//! - [`sink`]: where a dump writes to: a [`folder`] or a tar [`archive`]; [`content`] is what is read while it is written;
//! - [`source`]: where a restore reads from: the same two; [`set`] verifies and decodes; [`parent`]: where pages are that an incremental
//!   dump left out;
//! - [`layout`]: which messages make up each kind;
//! - [`digest`], [`manifest`]: `ferry.json`, by which damage is noticed; [`elsewhere`]: what it says of pages that a page server has.
//!
//! An image is one or two magic words, then entries: a length of 32 bits (little-endian, as every machine that CRIU
//! supports here), the protobuf message, and for some kinds a tail of plain bytes whose length the message says.
//! Raw images (pages, archives, netlink dumps) have no magic at all.

pub mod archive;
pub mod content;
pub(crate) mod copy;
pub mod digest;
pub mod elsewhere;
pub mod folder;
pub mod frame;
pub mod kind;
pub mod layout;
pub mod manifest;
pub mod parent;
mod record;
pub mod set;
pub mod sink;
pub mod source;

pub use archive::{ArchiveSink, ArchiveSource, Spool};
pub use content::{Content, FileContent, WithHead};
pub use folder::{FolderOptions, FolderSink, FolderSource};
pub use frame::{DecodeError, Encoder, Reader, decode_all, decode_one, encode};
pub use kind::{ImageName, Kind, Naming};
pub use manifest::{Digest, ImageDigest, MANIFEST_NAME, Manifest, ManifestError};
pub use record::{
    apparmor, bpfmap, cgroup, core, core_aarch64, core_x86, cpuinfo, creds, event, extension, file_lock, files, fown,
    fs, fsnotify, ghost, ids, inet, inventory, ipc, memfd, mm, mnt, net, netlink, ns, packet, pagemap, pidfd, pipe,
    pstree, regfile, seccomp, signal, sockets, stats, timer, tty, tun, unix,
};
pub use set::ImageSet;
pub use sink::{Sink, SinkError};
pub use source::{RawImage, RawRegion, Source, SourceError};
