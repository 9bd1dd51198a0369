//! Owner of a descriptor's signals (`fcntl(2)`, `F_SETOWN`, `F_SETSIG`).

/// Owner and signal; `pid_type` is the kernel's `enum pid_type` (0 is a process).
#[derive(Clone, PartialEq, prost::Message)]
pub struct FownEntry {
    #[prost(uint32, required, tag = "1")]
    pub uid: u32,
    #[prost(uint32, required, tag = "2")]
    pub euid: u32,
    #[prost(uint32, required, tag = "3")]
    pub signum: u32,
    #[prost(uint32, required, tag = "4")]
    pub pid_type: u32,
    #[prost(uint32, required, tag = "5")]
    pub pid: u32,
}
