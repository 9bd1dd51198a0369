//! Sockets: both halves, dump and restore (socket(7)).
//!
//! | file | what it owns |
//! | --- | --- |
//! | `options` | what all families share: the options of `SOL_SOCKET` |
//! | `inet` | IPv4 and IPv6: listening TCP, TCP that is not connected, UDP |
//! | `uncommon` | options of those that CRIU's format has no place for |
//! | `multicast` | which groups a socket is in |
//! | `unix` | local sockets: listening, bound, pairs |
//! | `queue` | packets that wait in a receive queue |
//! | `diag` | what sock_diag(7) tells of local sockets |
//!
//! A dump looks at a duplicate; nothing that it does changes the socket. Connections whose other end is outside the tree are
//! refused by name.

mod diag;
pub(crate) mod inet;
mod multicast;
mod options;
mod queue;
mod uncommon;
pub(crate) mod unix;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::BorrowedFd;

use diag::{ShutSockets, UnixSockets};

use crate::files::Problem;
use crate::files::fdinfo::FdInfo;
use crate::images::files::{FdType, FileEntry};
use crate::images::fown::FownEntry;
use crate::images::inet::InetSkEntry;
use crate::images::sockets::SkPacketEntry;
use crate::images::unix::UnixSkEntry;
use crate::images::{DecodeError, Encoder, Kind, Reader};
use crate::sys::{HostPid, sockopt};

/// States that images name by the numbers of TCP's (include/net/tcp_states.h), whatever the family.
pub(crate) mod state {
    /// Connected.
    pub const ESTABLISHED: u32 = 1;
    /// Neither connected nor listening.
    pub const CLOSE: u32 = 7;
    /// Listening.
    pub const LISTEN: u32 = 10;
}

/// What the dump knows of the tree's sockets.
pub(crate) struct Sockets<H> {
    /// The tree's network namespace: its inode, and its number in images.
    namespace: u64,
    namespace_id: Option<u32>,
    /// The other end of connections by which the tree asked for the dump.
    requested_by: Option<u32>,
    unix: Option<UnixSockets>,
    /// Local sockets that are connected: inode, peer, and who has them.
    ends: BTreeMap<u32, (u32, H)>,
    packets: Vec<queue::Packet>,
    new: uncommon::NewSockets,
    /// The tree's first task.
    root: HostPid,
    /// Multicast groups of the network namespace, read for the first socket that can be in one: most trees have none.
    groups: Option<Vec<multicast::Group>>,
    /// UDP sockets that are shut, by family and protocol.
    shut: HashMap<(i32, u32), ShutSockets>,
}

/// One socket, as the walk over descriptors found it.
pub(crate) struct Found<'a> {
    pub id: u32,
    pub inode: u32,
    pub info: FdInfo<'a>,
    pub duplicate: BorrowedFd<'a>,
    pub pidfd: BorrowedFd<'a>,
    pub fown: FownEntry,
}

impl<H> Sockets<H> {
    /// Begins with the network namespace of the tree's first task. `requested_by` is as in `FilesOptions`.
    ///
    /// # Errors
    /// Those of stat(2): the process may be gone.
    pub fn of(root: HostPid, namespace_id: Option<u32>, requested_by: Option<u32>) -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let namespace = std::fs::metadata(format!("/proc/{root}/ns/net"))?.ino();
        Ok(Self {
            namespace,
            namespace_id,
            requested_by,
            unix: None,
            ends: BTreeMap::new(),
            packets: Vec::new(),
            new: uncommon::NewSockets::default(),
            root,
            groups: None,
            shut: HashMap::new(),
        })
    }

    /// Reads a socket; with `content`, what waits in its queue as well.
    pub fn collect(
        &mut self,
        found: Found<'_>,
        find_file: &unix::FindFile<'_>,
        holder: H,
        content: bool,
    ) -> Result<FileEntry, Problem> {
        let Found { id, inode, info, duplicate, pidfd, fown } = found;
        let entry = |kind: FdType| FileEntry { r#type: kind as i32, id, ..FileEntry::default() };
        match self.family(duplicate)? {
            family @ (libc::AF_INET | libc::AF_INET6) => {
                let isk = inet::collect_inet(id, inode, family, &info, duplicate, fown)?;
                let groups = match self.groups.take() {
                    Some(groups) => groups,
                    None => multicast::groups(self.root)
                        .map_err(|error| Problem::unreadable("the multicast groups of its namespace", error))?,
                };
                let lost = inet::check_losses(&isk, duplicate, &groups, content);
                self.groups = Some(groups);
                lost?;
                let kind = (family, isk.r#type as i32, isk.proto as i32);
                let ferry = uncommon::collect(duplicate, kind, &mut self.new)
                    .map_err(|errno| Problem::unreadable("the options of a new socket", errno))?;
                let shutdown = self.shut_directions(&isk, family, pidfd)?;
                let isk = InetSkEntry { ns_id: self.namespace_id, ferry, shutdown, ..isk };
                Ok(FileEntry { isk: Some(isk.into()), ..entry(FdType::InetSk) })
            }
            libc::AF_UNIX => {
                let listed = self.unix.as_ref().and_then(|list| list.get(inode));
                let socket = match listed {
                    Some(socket) => socket,
                    // The first, or one that a running task has made since the last list.
                    None => {
                        let list = UnixSockets::collect(pidfd)
                            .map_err(|error| Problem::unreadable("the list of sockets", error))?;
                        let socket = list.get(inode);
                        self.unix = Some(list);
                        socket.ok_or_else(|| Problem::new("the kernel does not list this local socket", "try again"))?
                    }
                };
                let mut usk = unix::collect_unix(id, inode, socket, &info, duplicate, fown, find_file)?;
                if usk.peer != 0 && Some(usk.peer) == self.requested_by {
                    unix::expect_answer(&mut usk);
                }
                if unix::is_connected(&usk) {
                    self.ends.insert(inode, (usk.peer, holder));
                }
                // An end whose other end is closed shows no length, whatever waits in it.
                let half_closed = unix::is_connected(&usk) && usk.peer == 0;
                if content && usk.state != state::LISTEN && (socket.waiting > 0 || half_closed) {
                    let packets = queue::collect_queue(id, duplicate, unix::is_stream(&usk), socket.waiting)?;
                    self.packets.extend(packets);
                }
                let usk = UnixSkEntry { ns_id: self.namespace_id, ..usk };
                Ok(FileEntry { usk: Some(usk.into()), ..entry(FdType::UnixSk) })
            }
            family => Err(unsupported(family)),
        }
    }

    /// In which directions a UDP socket is shut (shutdown(2)).
    fn shut_directions(
        &mut self,
        isk: &InetSkEntry,
        family: i32,
        pidfd: BorrowedFd<'_>,
    ) -> Result<Option<i32>, Problem> {
        if isk.r#type != libc::SOCK_DGRAM as u32 {
            return Ok(None);
        }
        let list = match self.shut.entry((family, isk.proto)) {
            Entry::Occupied(list) => list.into_mut(),
            Entry::Vacant(place) => place.insert(
                ShutSockets::collect(pidfd, family, isk.proto)
                    .map_err(|error| Problem::unreadable("the list of sockets", error))?,
            ),
        };
        Ok(list.get(isk.ino).map(|shut| shut as i32))
    }

    /// The family of a socket, after a check that it is in the tree's network namespace.
    fn family(&self, duplicate: BorrowedFd<'_>) -> Result<i32, Problem> {
        let inode = sockopt::network_namespace(duplicate)
            .map_err(|errno| Problem::unreadable("its network namespace", errno))?;
        if inode != self.namespace {
            return Err(Problem::new(
                format!("the socket belongs to another network namespace ({inode}) than the tree ({})", self.namespace),
                "have the program close it",
            ));
        }
        sockopt::number(duplicate, libc::SOL_SOCKET, libc::SO_DOMAIN)
            .map_err(|errno| Problem::unreadable("its family", errno))
    }

    /// The holders of sockets whose other end is held by somebody outside the tree, with the inode.
    pub fn half_outside(&self) -> impl Iterator<Item = (u32, &H)> {
        self.ends
            .iter()
            .filter(|(inode, (peer, _))| *peer != 0 && self.ends.get(peer).is_none_or(|(back, _)| back != *inode))
            .map(|(inode, (_, holder))| (*inode, holder))
    }

    /// The image of all queues.
    pub fn image(&self) -> Vec<u8> {
        let mut encoder = Encoder::new(Kind::SkQueues);
        for (entry, bytes) in &self.packets {
            encoder.entry(entry).tail(bytes);
        }
        encoder.finish()
    }
}

/// Reads `sk-queues.img`: packets by the description that they wait for.
pub(crate) fn decode_queues(bytes: &[u8]) -> Result<HashMap<u32, Vec<Vec<u8>>>, DecodeError> {
    let name = Kind::SkQueues.name();
    let mut reader = Reader::new(&name, Kind::SkQueues, bytes)?;
    let mut queues: HashMap<u32, Vec<Vec<u8>>> = HashMap::new();
    while let Some(entry) = reader.next_entry::<SkPacketEntry>()? {
        queues.entry(entry.id_for).or_default().push(reader.tail(entry.length.into())?.to_vec());
    }
    Ok(queues)
}

/// What people call a family that is not saved yet.
fn unsupported(family: i32) -> Problem {
    let name = match family {
        libc::AF_NETLINK => "netlink",
        libc::AF_PACKET => "packet",
        libc::AF_VSOCK => "vsock",
        libc::AF_ALG => "crypto (AF_ALG)",
        libc::AF_BLUETOOTH => "Bluetooth",
        libc::AF_XDP => "XDP",
        _ => return Problem::new(format!("sockets of family {family} cannot be saved"), "have the program close it"),
    };
    Problem::new(format!("{name} sockets cannot be saved yet"), "have the program close it before the checkpoint")
}
