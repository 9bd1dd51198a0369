//! `core-TID.img`: the state of one thread; the leader's also holds what the whole process shares.

use super::core_aarch64::ThreadInfoAarch64;
use super::core_x86::ThreadInfoX86;
use super::creds::CredsEntry;
use super::extension::{FerryTaskEntry, FerryThreadEntry};
use super::ids::TaskKobjIdsEntry;
use super::seccomp::SeccompMode;
use super::signal::{SaEntry, SignalQueueEntry};
use super::timer::TaskTimersEntry;

/// One thread. `tc` and `ids` belong to the process and are present for its leader only.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CoreEntry {
    #[prost(enumeration = "March", required, tag = "1")]
    pub mtype: i32,
    #[prost(message, optional, tag = "2")]
    pub thread_info: Option<ThreadInfoX86>,
    #[prost(message, optional, tag = "8")]
    pub ti_aarch64: Option<ThreadInfoAarch64>,
    #[prost(message, optional, tag = "3")]
    pub tc: Option<TaskCoreEntry>,
    #[prost(message, optional, tag = "4")]
    pub ids: Option<TaskKobjIdsEntry>,
    #[prost(message, optional, tag = "5")]
    pub thread_core: Option<ThreadCoreEntry>,
}

/// Machine of the registers; others than x86-64 and aarch64 have state that this crate does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum March {
    Unknown = 0,
    X86_64 = 1,
    Arm = 2,
    Aarch64 = 3,
    Ppc64 = 4,
    S390 = 5,
    Mips = 6,
    LoongArch64 = 7,
    Riscv64 = 8,
}

/// State of a whole process.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskCoreEntry {
    #[prost(uint32, required, tag = "1")]
    pub task_state: u32,
    #[prost(uint32, required, tag = "2")]
    pub exit_code: u32,
    #[prost(uint32, required, tag = "3")]
    pub personality: u32,
    #[prost(uint32, required, tag = "4")]
    pub flags: u32,
    #[prost(uint64, required, tag = "5")]
    pub blk_sigset: u64,
    #[prost(bytes = "vec", required, tag = "6")]
    pub comm: Vec<u8>,
    #[prost(message, optional, tag = "7")]
    pub timers: Option<TaskTimersEntry>,
    #[prost(message, optional, tag = "8")]
    pub rlimits: Option<TaskRlimitsEntry>,
    #[prost(uint32, optional, tag = "9")]
    pub cg_set: Option<u32>,
    #[prost(message, optional, tag = "10")]
    pub signals_s: Option<SignalQueueEntry>,
    #[prost(enumeration = "SeccompMode", optional, tag = "11")]
    pub old_seccomp_mode: Option<i32>,
    #[prost(uint32, optional, tag = "12")]
    pub old_seccomp_filter: Option<u32>,
    #[prost(uint32, optional, tag = "13")]
    pub loginuid: Option<u32>,
    #[prost(int32, optional, tag = "14")]
    pub oom_score_adj: Option<i32>,
    #[prost(message, repeated, tag = "15")]
    pub sigactions: Vec<SaEntry>,
    #[prost(bool, optional, tag = "18")]
    pub child_subreaper: Option<bool>,
    #[prost(uint64, optional, tag = "20")]
    pub blk_sigset_extended: Option<u64>,
    #[prost(uint32, optional, tag = "21")]
    pub stop_signo: Option<u32>,
    #[prost(uint32, optional, tag = "22")]
    pub membarrier_registration_mask: Option<u32>,
    #[prost(message, optional, tag = "1000")]
    pub ferry: Option<FerryTaskEntry>,
}

/// Resource limits, in the order of the `RLIMIT_*` numbers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskRlimitsEntry {
    #[prost(message, repeated, tag = "1")]
    pub rlimits: Vec<RlimitEntry>,
}

/// One limit (`getrlimit(2)`); `u64::MAX` is no limit.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RlimitEntry {
    #[prost(uint64, required, tag = "1")]
    pub cur: u64,
    #[prost(uint64, required, tag = "2")]
    pub max: u64,
}

/// State of one thread, whatever the machine.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ThreadCoreEntry {
    #[prost(uint64, required, tag = "1")]
    pub futex_rla: u64,
    #[prost(uint32, required, tag = "2")]
    pub futex_rla_len: u32,
    #[prost(sint32, optional, tag = "3")]
    pub sched_nice: Option<i32>,
    #[prost(uint32, optional, tag = "4")]
    pub sched_policy: Option<u32>,
    #[prost(uint32, optional, tag = "5")]
    pub sched_prio: Option<u32>,
    #[prost(uint64, optional, tag = "6")]
    pub blk_sigset: Option<u64>,
    #[prost(message, optional, tag = "7")]
    pub sas: Option<ThreadSasEntry>,
    #[prost(uint32, optional, tag = "8")]
    pub pdeath_sig: Option<u32>,
    #[prost(message, optional, tag = "9")]
    pub signals_p: Option<SignalQueueEntry>,
    #[prost(message, optional, tag = "10")]
    pub creds: Option<CredsEntry>,
    #[prost(enumeration = "SeccompMode", optional, tag = "11")]
    pub seccomp_mode: Option<i32>,
    #[prost(uint32, optional, tag = "12")]
    pub seccomp_filter: Option<u32>,
    #[prost(bytes = "vec", optional, tag = "13")]
    pub comm: Option<Vec<u8>>,
    #[prost(uint64, optional, tag = "14")]
    pub blk_sigset_extended: Option<u64>,
    #[prost(message, optional, tag = "15")]
    pub rseq_entry: Option<RseqEntry>,
    #[prost(uint32, optional, tag = "16")]
    pub cg_set: Option<u32>,
    #[prost(message, optional, tag = "1000")]
    pub ferry: Option<FerryThreadEntry>,
}

/// Alternate signal stack (`sigaltstack(2)`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct ThreadSasEntry {
    #[prost(uint64, required, tag = "1")]
    pub ss_sp: u64,
    #[prost(uint64, required, tag = "2")]
    pub ss_size: u64,
    #[prost(uint32, required, tag = "3")]
    pub ss_flags: u32,
}

/// Restartable sequence registration (`PTRACE_GET_RSEQ_CONFIGURATION`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct RseqEntry {
    #[prost(uint64, required, tag = "1")]
    pub rseq_abi_pointer: u64,
    #[prost(uint32, required, tag = "2")]
    pub rseq_abi_size: u32,
    #[prost(uint32, required, tag = "3")]
    pub signature: u32,
    #[prost(uint64, optional, tag = "4")]
    pub rseq_cs_pointer: Option<u64>,
}

/// Values of [`TaskCoreEntry::task_state`].
pub mod task_state {
    /// Running or sleeping.
    pub const ALIVE: u32 = 1;
    /// Exited and not yet reaped.
    pub const DEAD: u32 = 2;
    /// Stopped by a job control signal.
    pub const STOPPED: u32 = 3;
    /// Exited, with threads still there.
    pub const ZOMBIE: u32 = 6;
}
