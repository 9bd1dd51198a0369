//! Pipes and FIFOs (`pipe(7)`), and what is in them.
//!
//! `pipes-data.img` and `fifo-data.img` are [`PipeDataEntry`]s each followed by its bytes.

use super::fown::FownEntry;

/// One end of a pipe; both ends share `pipe_id`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PipeEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub pipe_id: u32,
    #[prost(uint32, required, tag = "3")]
    pub flags: u32,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
}

/// One description of a FIFO; `regf_id` is the [`super::regfile::RegFileEntry`] with its path.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FifoEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub pipe_id: u32,
    #[prost(uint32, optional, tag = "3")]
    pub regf_id: Option<u32>,
}

/// Content of pipe `pipe_id`: `bytes` bytes follow. `size` is its capacity (`F_GETPIPE_SZ`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct PipeDataEntry {
    #[prost(uint32, required, tag = "1")]
    pub pipe_id: u32,
    #[prost(uint32, required, tag = "2")]
    pub bytes: u32,
    #[prost(uint32, optional, tag = "3")]
    pub size: Option<u32>,
}

impl PipeDataEntry {
    /// Bytes that follow the entry.
    pub fn tail_length(&self) -> u64 {
        self.bytes.into()
    }
}
