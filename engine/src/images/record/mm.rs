//! `mm-PID.img`: the address space of a process: its bounds and its mappings (`proc(5)`, `PR_SET_MM_MAP`).

/// The one entry of `mm-PID.img`. `mm_saved_auxv` is the auxiliary vector as 64-bit words.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MmEntry {
    #[prost(uint64, required, tag = "1")]
    pub mm_start_code: u64,
    #[prost(uint64, required, tag = "2")]
    pub mm_end_code: u64,
    #[prost(uint64, required, tag = "3")]
    pub mm_start_data: u64,
    #[prost(uint64, required, tag = "4")]
    pub mm_end_data: u64,
    #[prost(uint64, required, tag = "5")]
    pub mm_start_stack: u64,
    #[prost(uint64, required, tag = "6")]
    pub mm_start_brk: u64,
    #[prost(uint64, required, tag = "7")]
    pub mm_brk: u64,
    #[prost(uint64, required, tag = "8")]
    pub mm_arg_start: u64,
    #[prost(uint64, required, tag = "9")]
    pub mm_arg_end: u64,
    #[prost(uint64, required, tag = "10")]
    pub mm_env_start: u64,
    #[prost(uint64, required, tag = "11")]
    pub mm_env_end: u64,
    #[prost(uint32, required, tag = "12")]
    pub exe_file_id: u32,
    #[prost(uint64, repeated, packed = "false", tag = "13")]
    pub mm_saved_auxv: Vec<u64>,
    #[prost(message, repeated, tag = "14")]
    pub vmas: Vec<VmaEntry>,
    #[prost(int32, optional, tag = "15")]
    pub dumpable: Option<i32>,
    #[prost(message, repeated, tag = "16")]
    pub aios: Vec<AioRingEntry>,
    #[prost(bool, optional, tag = "17")]
    pub thp_disabled: Option<bool>,
}

/// One mapping. `shmid` is a description's id for files, a shared memory id for shared anonymous memory, else zero.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    #[prost(uint64, required, tag = "3")]
    pub pgoff: u64,
    #[prost(uint64, required, tag = "4")]
    pub shmid: u64,
    #[prost(uint32, required, tag = "5")]
    pub prot: u32,
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    #[prost(uint32, required, tag = "7")]
    pub status: u32,
    #[prost(sint64, required, tag = "8")]
    pub fd: i64,
    #[prost(uint64, optional, tag = "9")]
    pub madv: Option<u64>,
    #[prost(uint32, optional, tag = "10")]
    pub fdflags: Option<u32>,
}

/// An `io_setup(2)` ring.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AioRingEntry {
    #[prost(uint64, required, tag = "1")]
    pub id: u64,
    #[prost(uint32, required, tag = "2")]
    pub nr_req: u32,
    #[prost(uint32, required, tag = "3")]
    pub ring_len: u32,
}

/// Bits of [`VmaEntry::status`]: what a mapping is, as far as restoring it goes.
pub mod vma_status {
    /// Has content of its own to save and restore, unlike `VSYSCALL`.
    pub const REGULAR: u32 = 1 << 0;
    /// Grows down.
    pub const STACK: u32 = 1 << 1;
    /// The page at 0xffffffffff600000 that the kernel provides.
    pub const VSYSCALL: u32 = 1 << 2;
    /// `[vdso]`.
    pub const VDSO: u32 = 1 << 3;
    /// `[heap]`.
    pub const HEAP: u32 = 1 << 5;
    /// A private mapping of a file.
    pub const FILE_PRIVATE: u32 = 1 << 6;
    /// A shared mapping of a file.
    pub const FILE_SHARED: u32 = 1 << 7;
    /// Shared anonymous memory.
    pub const ANON_SHARED: u32 = 1 << 8;
    /// Private anonymous memory.
    pub const ANON_PRIVATE: u32 = 1 << 9;
    /// A System V segment.
    pub const SYSVIPC: u32 = 1 << 10;
    /// A mapped socket ring.
    pub const SOCKET: u32 = 1 << 11;
    /// `[vvar]` and its like.
    pub const VVAR: u32 = 1 << 12;
    /// An `io_setup(2)` ring.
    pub const AIORING: u32 = 1 << 13;
    /// A mapping of a memfd.
    pub const MEMFD: u32 = 1 << 14;
    /// A shadow stack.
    pub const SHADOW_STACK: u32 = 1 << 15;
    /// Not a mapping: a range of `MADV_GUARD_INSTALL` guards. These come after all mappings.
    pub const GUARD: u32 = 1 << 16;
    /// `[uprobes]`, mapped by the kernel.
    pub const UPROBES: u32 = 1 << 17;
}
