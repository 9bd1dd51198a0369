//! The image set: what a dump writes and a restore reads, in CRIU 4.2's format.
//!
//! - `record/`: the messages, one file per kernel object, reached as `images::core::CoreEntry` and so on;
//! - [`kind`]: which images there are, their names and magic numbers;
//! - [`frame`]: entries within an image: encoding, and decoding with bounds.
//!
//! An image is one or two magic words, then entries: a length of 32 bits (little-endian, as every machine that CRIU
//! supports here), the protobuf message, and for some kinds a tail of plain bytes whose length the message says.
//! Raw images (pages, archives, netlink dumps) have no magic at all.

pub mod frame;
pub mod kind;
mod record;

pub use frame::{DecodeError, Encoder, Reader, decode_all, decode_one, encode};
pub use kind::{ImageName, Kind, Naming};
pub use record::{
    apparmor, bpfmap, cgroup, core, core_aarch64, core_x86, cpuinfo, creds, event, file_lock, files, fown, fs,
    fsnotify, ghost, ids, inet, inventory, ipc, memfd, mm, mnt, net, netlink, ns, packet, pagemap, pidfd, pipe, pstree,
    regfile, seccomp, signal, sockets, stats, timer, tty, tun, unix,
};
