//! System V IPC of an IPC namespace (`sysvipc(7)`).
//!
//! Tails: after an [`IpcSemEntry`] its values (16 bits each, padded to 8 bytes); after an [`IpcMsgEntry`] `qnum` framed
//! [`IpcMsg`]s, each followed by its text padded to 8 bytes; after an [`IpcShmEntry`] the segment padded to 4 bytes, unless
//! `in_pagemaps`.

/// What the three kinds share (`struct ipc_perm`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcDescEntry {
    #[prost(uint32, required, tag = "1")]
    pub key: u32,
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    #[prost(uint32, required, tag = "3")]
    pub gid: u32,
    #[prost(uint32, required, tag = "4")]
    pub cuid: u32,
    #[prost(uint32, required, tag = "5")]
    pub cgid: u32,
    #[prost(uint32, required, tag = "6")]
    pub mode: u32,
    #[prost(uint32, required, tag = "7")]
    pub id: u32,
}

/// `/proc/sys/kernel` and `/proc/sys/fs/mqueue` values of the namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcVarEntry {
    #[prost(uint32, repeated, packed = "false", tag = "1")]
    pub sem_ctls: Vec<u32>,
    #[prost(uint32, required, tag = "2")]
    pub msg_ctlmax: u32,
    #[prost(uint32, required, tag = "3")]
    pub msg_ctlmnb: u32,
    #[prost(uint32, required, tag = "4")]
    pub msg_ctlmni: u32,
    #[prost(uint32, required, tag = "5")]
    pub auto_msgmni: u32,
    #[prost(uint64, required, tag = "6")]
    pub shm_ctlmax: u64,
    #[prost(uint64, required, tag = "7")]
    pub shm_ctlall: u64,
    #[prost(uint32, required, tag = "8")]
    pub shm_ctlmni: u32,
    #[prost(uint32, required, tag = "9")]
    pub shm_rmid_forced: u32,
    #[prost(uint32, required, tag = "10")]
    pub mq_queues_max: u32,
    #[prost(uint32, required, tag = "11")]
    pub mq_msg_max: u32,
    #[prost(uint32, required, tag = "12")]
    pub mq_msgsize_max: u32,
    #[prost(uint32, optional, tag = "13")]
    pub mq_msg_default: Option<u32>,
    #[prost(uint32, optional, tag = "14")]
    pub mq_msgsize_default: Option<u32>,
    #[prost(uint32, optional, tag = "15")]
    pub msg_next_id: Option<u32>,
    #[prost(uint32, optional, tag = "16")]
    pub sem_next_id: Option<u32>,
    #[prost(uint32, optional, tag = "17")]
    pub shm_next_id: Option<u32>,
}

/// A message queue.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcMsgEntry {
    #[prost(message, required, tag = "1")]
    pub desc: IpcDescEntry,
    #[prost(uint32, required, tag = "2")]
    pub qbytes: u32,
    #[prost(uint32, required, tag = "3")]
    pub qnum: u32,
}

/// A message.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcMsg {
    #[prost(uint64, required, tag = "1")]
    pub mtype: u64,
    #[prost(uint32, required, tag = "2")]
    pub msize: u32,
}

/// A semaphore set.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcSemEntry {
    #[prost(message, required, tag = "1")]
    pub desc: IpcDescEntry,
    #[prost(uint32, required, tag = "2")]
    pub nsems: u32,
}

/// A shared memory segment.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcShmEntry {
    #[prost(message, required, tag = "1")]
    pub desc: IpcDescEntry,
    #[prost(uint64, required, tag = "2")]
    pub size: u64,
    #[prost(bool, optional, tag = "3")]
    pub in_pagemaps: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    pub hugetlb_flag: Option<u32>,
}

impl IpcShmEntry {
    /// Bytes that follow the entry, padding included.
    pub fn tail_length(&self) -> u64 {
        if self.in_pagemaps() { 0 } else { self.size.checked_next_multiple_of(4).unwrap_or(u64::MAX) }
    }
}

impl IpcSemEntry {
    /// Bytes that follow the entry, padding included.
    pub fn tail_length(&self) -> u64 {
        (u64::from(self.nsems) * 2).next_multiple_of(8)
    }
}

impl IpcMsg {
    /// Bytes that follow the entry, padding included.
    pub fn tail_length(&self) -> u64 {
        u64::from(self.msize).next_multiple_of(8)
    }
}
