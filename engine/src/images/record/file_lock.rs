//! `filelocks.img`: POSIX, BSD and lease locks (`fcntl(2)`, `flock(2)`, `/proc/locks`).

/// A lock held through descriptor `fd` of process `pid`. `len` of zero is to the end of the file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FileLockEntry {
    #[prost(uint32, required, tag = "1")]
    pub flag: u32,
    #[prost(uint32, required, tag = "2")]
    pub r#type: u32,
    #[prost(int32, required, tag = "3")]
    pub pid: i32,
    #[prost(int32, required, tag = "4")]
    pub fd: i32,
    #[prost(int64, required, tag = "5")]
    pub start: i64,
    #[prost(int64, required, tag = "6")]
    pub len: i64,
}
