//! `fs-PID.img`: working directory, root and umask (`clone(2)`, `CLONE_FS`).

/// `cwd_id` and `root_id` are descriptions in `files.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FsEntry {
    #[prost(uint32, required, tag = "1")]
    pub cwd_id: u32,
    #[prost(uint32, required, tag = "2")]
    pub root_id: u32,
    #[prost(uint32, optional, tag = "3")]
    pub umask: Option<u32>,
}
