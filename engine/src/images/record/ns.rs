//! Small namespaces (UTS, PID, time, user) and descriptors of namespaces (`namespaces(7)`).

/// A description of a namespace file; `ns_cflag` is its `CLONE_NEW*` flag.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NsFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub ns_id: u32,
    #[prost(uint32, required, tag = "3")]
    pub ns_cflag: u32,
    #[prost(uint32, required, tag = "4")]
    pub flags: u32,
}

/// Host and domain name.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UtsnsEntry {
    #[prost(bytes = "vec", required, tag = "1")]
    pub nodename: Vec<u8>,
    #[prost(bytes = "vec", required, tag = "2")]
    pub domainname: Vec<u8>,
}

/// An externally provided pid namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PidnsEntry {
    #[prost(string, optional, tag = "1")]
    pub ext_key: Option<String>,
}

/// Clock readings inside the time namespace at the dump.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TimensEntry {
    #[prost(message, required, tag = "1")]
    pub monotonic: Timespec,
    #[prost(message, required, tag = "2")]
    pub boottime: Timespec,
}

/// Seconds and nanoseconds.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Timespec {
    #[prost(uint64, required, tag = "1")]
    pub tv_sec: u64,
    #[prost(uint64, required, tag = "2")]
    pub tv_nsec: u64,
}

/// Id maps of a user namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UsernsEntry {
    #[prost(message, repeated, tag = "1")]
    pub uid_map: Vec<UidGidExtent>,
    #[prost(message, repeated, tag = "2")]
    pub gid_map: Vec<UidGidExtent>,
}

/// `count` ids from `first` inside are `lower_first` on outside.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UidGidExtent {
    #[prost(uint32, required, tag = "1")]
    pub first: u32,
    #[prost(uint32, required, tag = "2")]
    pub lower_first: u32,
    #[prost(uint32, required, tag = "3")]
    pub count: u32,
}
