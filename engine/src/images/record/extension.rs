//! What ferry saves of threads and processes and CRIU's format has no place for.
//!
//! These are fields of `core`, socket and terminal messages with numbers far above the format's own, so that CRIU and `crit` pass over them. A
//! field is absent when it has the kernel's default. What an image without them (one of CRIU's) restores to is that default.

/// State of one thread.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FerryThreadEntry {
    /// Nanoseconds by which timers may be late (`PR_SET_TIMERSLACK`); absent for 50,000.
    #[prost(uint64, optional, tag = "1")]
    pub timer_slack: Option<u64>,
    /// As `ioprio_set(2)` takes it; absent when it follows from the nice value.
    #[prost(uint32, optional, tag = "2")]
    pub io_priority: Option<u32>,
    /// Budget of `SCHED_DEADLINE`.
    #[prost(message, optional, tag = "3")]
    pub deadline: Option<DeadlineEntry>,
    /// Processors it may run on, bit by bit, if fewer than its cpuset has.
    #[prost(bytes = "vec", optional, tag = "4")]
    pub affinity: Option<Vec<u8>>,
    /// Whether reading the time stamp counter raises SIGSEGV (`PR_SET_TSC`).
    #[prost(bool, optional, tag = "5")]
    pub tsc_faults: Option<bool>,
    /// Whether the CPUID instruction raises SIGSEGV (`ARCH_SET_CPUID`).
    #[prost(bool, optional, tag = "6")]
    pub cpuid_faults: Option<bool>,
    /// `PR_SPEC_*` controls that are not "enable", by their number (`PR_SET_SPECULATION_CTRL`).
    #[prost(message, repeated, tag = "7")]
    pub speculation: Vec<SpeculationEntry>,
}

/// Times in nanoseconds, flags as in `struct sched_attr` (`sched_setattr(2)`).
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct DeadlineEntry {
    #[prost(uint64, required, tag = "1")]
    pub runtime: u64,
    #[prost(uint64, required, tag = "2")]
    pub deadline: u64,
    #[prost(uint64, required, tag = "3")]
    pub period: u64,
    #[prost(uint64, required, tag = "4")]
    pub flags: u64,
}

/// One control of speculative execution.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SpeculationEntry {
    #[prost(uint32, required, tag = "1")]
    pub feature: u32,
    #[prost(uint32, required, tag = "2")]
    pub control: u32,
}

/// State of a whole process.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct FerryTaskEntry {
    /// `PR_MDWE_*` flags: memory that is writable cannot become executable.
    #[prost(uint32, optional, tag = "1")]
    pub mdwe: Option<u32>,
    /// Whether all its memory may be merged (`PR_SET_MEMORY_MERGE`).
    #[prost(bool, optional, tag = "2")]
    pub memory_merge: Option<bool>,
}

/// Options of level `IPPROTO_TCP` (tcp(7)); each absent for the kernel's default, which is 0.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct FerryTcpEntry {
    /// Seconds that a listener waits for data before it tells of a connection (`TCP_DEFER_ACCEPT`).
    #[prost(uint32, optional, tag = "1")]
    pub defer_accept: Option<u32>,
    /// Milliseconds after which unacknowledged data end the connection (`TCP_USER_TIMEOUT`).
    #[prost(uint32, optional, tag = "2")]
    pub user_timeout: Option<u32>,
    /// How many connections with data in their first segment may wait (`TCP_FASTOPEN`).
    #[prost(uint32, optional, tag = "3")]
    pub fastopen: Option<u32>,
}

/// State of a pseudoterminal's master side.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct FerryTtyEntry {
    /// Whether its slave side has been open and is closed everywhere, so that reading ends with `EIO`.
    #[prost(bool, optional, tag = "1")]
    pub abandoned: Option<bool>,
}

/// Options of an IPv4 or IPv6 socket that differ from those of a new one.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FerryInetEntry {
    #[prost(message, repeated, tag = "1")]
    pub options: Vec<FerryOptionEntry>,
}

/// One option, as `getsockopt(2)` gives it and `setsockopt(2)` takes it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FerryOptionEntry {
    #[prost(uint32, required, tag = "1")]
    pub level: u32,
    #[prost(uint32, required, tag = "2")]
    pub name: u32,
    #[prost(bytes = "vec", required, tag = "3")]
    pub value: Vec<u8>,
}
