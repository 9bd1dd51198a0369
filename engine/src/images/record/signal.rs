//! Signal actions and pending signals (`sigaction(2)`, `ptrace(2)` `PTRACE_PEEKSIGINFO`).

/// What a signal does (`struct kernel_sigaction`). SIGKILL and SIGSTOP have no entry, so that a process has 62.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SaEntry {
    #[prost(uint64, required, tag = "1")]
    pub sigaction: u64,
    #[prost(uint64, required, tag = "2")]
    pub flags: u64,
    #[prost(uint64, required, tag = "3")]
    pub restorer: u64,
    #[prost(uint64, required, tag = "4")]
    pub mask: u64,
    #[prost(bool, optional, tag = "5")]
    pub compat_sigaction: Option<bool>,
    #[prost(uint64, optional, tag = "6")]
    pub mask_extended: Option<u64>,
}

/// One pending signal: the kernel's 128-byte `siginfo_t` as it is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SiginfoEntry {
    #[prost(bytes = "vec", required, tag = "1")]
    pub siginfo: Vec<u8>,
}

/// Pending signals, oldest first.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SignalQueueEntry {
    #[prost(message, repeated, tag = "1")]
    pub signals: Vec<SiginfoEntry>,
}
