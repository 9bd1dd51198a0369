//! `files.img` and `fdinfo-N.img`: open file descriptions, and the descriptors that name them (`open(2)`).
//!
//! A description has one number (`id`) in the whole set; descriptors of any task, mappings and directories name it so.

use super::bpfmap::BpfmapFileEntry;
use super::event::{EventfdFileEntry, EventpollFileEntry, SignalfdEntry, TimerfdEntry};
use super::fsnotify::{FanotifyFileEntry, InotifyFileEntry};
use super::inet::InetSkEntry;
use super::memfd::MemfdFileEntry;
use super::netlink::NetlinkSkEntry;
use super::ns::NsFileEntry;
use super::packet::PacketSockEntry;
use super::pidfd::PidfdEntry;
use super::pipe::{FifoEntry, PipeEntry};
use super::regfile::{ExtFileEntry, RegFileEntry};
use super::tty::TtyFileEntry;
use super::tun::TunfileEntry;
use super::unix::UnixSkEntry;

/// Kind of an open file description; says which member of [`FileEntry`] is present.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum FdType {
    Und = 0,
    Reg = 1,
    Pipe = 2,
    Fifo = 3,
    InetSk = 4,
    UnixSk = 5,
    Eventfd = 6,
    Eventpoll = 7,
    Inotify = 8,
    Signalfd = 9,
    PacketSk = 10,
    Tty = 11,
    Fanotify = 12,
    NetlinkSk = 13,
    Ns = 14,
    Tun = 15,
    Ext = 16,
    Timerfd = 17,
    Memfd = 18,
    Bpfmap = 19,
    Pidfd = 20,
}

/// One descriptor: number `fd`, description `id`, descriptor flags `flags` (`FD_CLOEXEC` is 1).
#[derive(Clone, PartialEq, prost::Message)]
pub struct FdinfoEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(enumeration = "FdType", required, tag = "3")]
    pub r#type: i32,
    #[prost(uint32, required, tag = "4")]
    pub fd: u32,
    #[prost(string, optional, tag = "5")]
    pub xattr_security_selinux: Option<String>,
}

/// One open file description: the member that `type` names is present. The large ones are boxed, since there may be thousands.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FileEntry {
    #[prost(enumeration = "FdType", required, tag = "1")]
    pub r#type: i32,
    #[prost(uint32, required, tag = "2")]
    pub id: u32,
    #[prost(message, optional, tag = "3")]
    pub reg: Option<RegFileEntry>,
    #[prost(message, optional, boxed, tag = "4")]
    pub isk: Option<Box<InetSkEntry>>,
    #[prost(message, optional, tag = "5")]
    pub nsf: Option<NsFileEntry>,
    #[prost(message, optional, boxed, tag = "6")]
    pub psk: Option<Box<PacketSockEntry>>,
    #[prost(message, optional, boxed, tag = "7")]
    pub nlsk: Option<Box<NetlinkSkEntry>>,
    #[prost(message, optional, tag = "8")]
    pub efd: Option<EventfdFileEntry>,
    #[prost(message, optional, tag = "9")]
    pub epfd: Option<EventpollFileEntry>,
    #[prost(message, optional, tag = "10")]
    pub sgfd: Option<SignalfdEntry>,
    #[prost(message, optional, tag = "11")]
    pub tunf: Option<TunfileEntry>,
    #[prost(message, optional, tag = "12")]
    pub tfd: Option<TimerfdEntry>,
    #[prost(message, optional, tag = "13")]
    pub ify: Option<InotifyFileEntry>,
    #[prost(message, optional, tag = "14")]
    pub ffy: Option<FanotifyFileEntry>,
    #[prost(message, optional, tag = "15")]
    pub ext: Option<ExtFileEntry>,
    #[prost(message, optional, boxed, tag = "16")]
    pub usk: Option<Box<UnixSkEntry>>,
    #[prost(message, optional, tag = "17")]
    pub fifo: Option<FifoEntry>,
    #[prost(message, optional, tag = "18")]
    pub pipe: Option<PipeEntry>,
    #[prost(message, optional, tag = "19")]
    pub tty: Option<TtyFileEntry>,
    #[prost(message, optional, tag = "20")]
    pub memfd: Option<MemfdFileEntry>,
    #[prost(message, optional, tag = "21")]
    pub bpf: Option<BpfmapFileEntry>,
    #[prost(message, optional, tag = "22")]
    pub pidfd: Option<PidfdEntry>,
}
