//! Process descriptors (`pidfd_open(2)`).

use super::fown::FownEntry;

/// A pidfd; `nspid` is the process as the root task sees it, or -1 if it is gone.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PidfdEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub ino: u32,
    #[prost(uint32, required, tag = "3")]
    pub flags: u32,
    #[prost(int32, required, tag = "4")]
    pub nspid: i32,
    #[prost(message, required, tag = "5")]
    pub fown: FownEntry,
}
