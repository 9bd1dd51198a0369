//! Checkpoint and restore of Linux process trees.
//!
//! `dump` freezes a tree and writes what the kernel knows of it into an image set; `restore` makes
//! the tree again. The crate reads no environment, prints nothing and keeps no mutable statics.

pub mod agent;
pub mod cancel;
pub mod cgroups;
pub mod cpuinfo;
pub mod dump;
pub mod error;
pub mod fault;
pub mod file_tree;
pub mod files;
pub mod freeze;
pub mod images;
pub mod journal;
pub mod lazy;
pub mod memory;
pub mod namespaces;
pub mod preflight;
pub mod procfs;
pub mod progress;
pub mod remote;
pub mod restore;
mod sockets;
pub mod sys;
pub mod task;
pub mod track;
pub mod tree;
