//! The messages, one file per kernel object.
//!
//! Field names, numbers and types are those of CRIU 4.2's format. Two rules hold for all:
//!
//! - Text that the kernel does not promise to be UTF-8 (paths, command names, host names) is `Vec<u8>`; on the wire it is
//!   the same as a string.
//! - A `required` field is always written. When it is absent from what is read, it has its default, so readers check
//!   values and not presence.
#![allow(missing_docs, reason = "fields carry the format's names, explained where they are not a man page's word")]

pub mod apparmor;
pub mod bpfmap;
pub mod cgroup;
pub mod core;
pub mod core_aarch64;
pub mod core_x86;
pub mod cpuinfo;
pub mod creds;
pub mod event;
pub mod extension;
pub mod file_lock;
pub mod files;
pub mod fown;
pub mod fs;
pub mod fsnotify;
pub mod ghost;
pub mod ids;
pub mod inet;
pub mod inventory;
pub mod ipc;
pub mod memfd;
pub mod mm;
pub mod mnt;
pub mod net;
pub mod netlink;
pub mod ns;
pub mod packet;
pub mod pagemap;
pub mod pidfd;
pub mod pipe;
pub mod pstree;
pub mod regfile;
pub mod seccomp;
pub mod signal;
pub mod sockets;
pub mod stats;
pub mod timer;
pub mod tty;
pub mod tun;
pub mod unix;
