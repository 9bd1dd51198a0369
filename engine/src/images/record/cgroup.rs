//! `cgroup.img`: the control groups of the tree, and which sets of them tasks are in (`cgroups(7)`).

/// The one entry of `cgroup.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CgroupEntry {
    #[prost(message, repeated, tag = "1")]
    pub sets: Vec<CgSetEntry>,
    #[prost(message, repeated, tag = "2")]
    pub controllers: Vec<CgControllerEntry>,
}

/// A set of cgroups that tasks are in, named by `cg_set`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CgSetEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(message, repeated, tag = "2")]
    pub ctls: Vec<CgMemberEntry>,
}

/// Membership in one hierarchy. `cgns_prefix` is the length of the part of `path` outside the cgroup namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CgMemberEntry {
    #[prost(string, required, tag = "1")]
    pub name: String,
    #[prost(bytes = "vec", required, tag = "2")]
    pub path: Vec<u8>,
    #[prost(uint32, optional, tag = "3")]
    pub cgns_prefix: Option<u32>,
}

/// One hierarchy: its controllers and the tree below the container's cgroup.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CgControllerEntry {
    #[prost(string, repeated, tag = "1")]
    pub cnames: Vec<String>,
    #[prost(message, repeated, tag = "2")]
    pub dirs: Vec<CgroupDirEntry>,
    #[prost(bool, optional, tag = "3")]
    pub is_threaded: Option<bool>,
}

/// A cgroup.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CgroupDirEntry {
    #[prost(bytes = "vec", required, tag = "1")]
    pub dir_name: Vec<u8>,
    #[prost(message, repeated, tag = "2")]
    pub children: Vec<CgroupDirEntry>,
    #[prost(message, repeated, tag = "3")]
    pub properties: Vec<CgroupPropEntry>,
    #[prost(message, optional, tag = "4")]
    pub dir_perms: Option<CgroupPerms>,
}

/// A control file and its value.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CgroupPropEntry {
    #[prost(string, required, tag = "1")]
    pub name: String,
    #[prost(string, required, tag = "2")]
    pub value: String,
    #[prost(message, optional, tag = "3")]
    pub perms: Option<CgroupPerms>,
}

/// Owner and mode.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CgroupPerms {
    #[prost(uint32, required, tag = "1")]
    pub mode: u32,
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    #[prost(uint32, required, tag = "3")]
    pub gid: u32,
}
