//! What sock_diag(7) tells of sockets that no other call does: of local ones peers, files, queue lengths, shut directions; of
//! UDP sockets shut directions.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;

use crate::namespaces::netlink::{Message, Netlink};
use crate::namespaces::{NamespaceKind, visit};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Size of `struct unix_diag_msg`.
const BODY: usize = 16;
/// Files, peers and queue lengths (`UDIAG_SHOW_VFS`, `_PEER`, `_RQLEN`).
const SHOW: u32 = 2 | 4 | 16;
const UNIX_DIAG_VFS: u16 = 1;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;
/// Size of `struct inet_diag_msg`, whose last word is the inode, and of `struct inet_diag_req_v2`.
const INET_BODY: usize = 72;
const INET_REQUEST: usize = 56;
const INET_DIAG_SHUTDOWN: u16 = 8;

/// One local socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// A number of [`super::state`].
    pub state: u32,
    /// Inode of the socket at the other end; 0 if there is none.
    pub peer: u32,
    /// The file it is bound to: lower half of the inode, and the kernel's form of the device.
    pub file: Option<(u32, u32)>,
    /// Bytes that wait to be read, or, if it listens, connections that wait to be accepted.
    pub waiting: u32,
    /// How many connections may wait, if it listens.
    pub backlog: u32,
    /// 1 if it reads no more, 2 if it writes no more, 3 for both.
    pub shut: u32,
}

/// The local sockets of a network namespace, by inode.
#[derive(Debug, Default)]
pub struct UnixSockets(HashMap<u32, UnixSocket>);

impl UnixSockets {
    /// Lists those of the namespace that the task behind `pidfd` is in.
    ///
    /// # Errors
    /// Those of setns(2) and of netlink.
    pub fn collect(pidfd: BorrowedFd<'_>) -> io::Result<Self> {
        let mut request = vec![0; 24];
        request[0] = libc::AF_UNIX as u8;
        request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        request[12..16].copy_from_slice(&SHOW.to_ne_bytes());
        let messages =
            visit(pidfd, &[NamespaceKind::Net], || Netlink::diagnostics()?.dump(SOCK_DIAG_BY_FAMILY, &request))
                .and_then(|list| list)?;
        let socket = |message: &Message| {
            let pair = |kind| {
                let value: &[u8; 8] = message.attribute(BODY, kind)?.try_into().ok()?;
                let words = u64::from_ne_bytes(*value).to_le();
                Some((words as u32, (words >> 32) as u32))
            };
            let queue = pair(UNIX_DIAG_RQLEN).unwrap_or_default();
            let peer = message.attribute(BODY, UNIX_DIAG_PEER).and_then(|value| value.try_into().ok());
            let socket = UnixSocket {
                state: u32::from(*message.payload.get(2)?),
                peer: peer.map_or(0, u32::from_ne_bytes),
                file: pair(UNIX_DIAG_VFS),
                waiting: queue.0,
                backlog: queue.1,
                shut: message
                    .attribute(BODY, UNIX_DIAG_SHUTDOWN)
                    .and_then(|value| value.first())
                    .map_or(0, |shut| u32::from(*shut)),
            };
            Some((message.word(4)?, socket))
        };
        Ok(Self(messages.iter().filter_map(socket).collect()))
    }

    /// The socket with this inode.
    pub fn get(&self, inode: u32) -> Option<UnixSocket> {
        self.0.get(&inode).copied()
    }
}

/// Directions in which bound or connected UDP sockets of a network namespace are shut, by inode; only those that are.
#[derive(Debug, Default)]
pub struct ShutSockets(HashMap<u32, u32>);

impl ShutSockets {
    /// Asks for those of one family and protocol, in the namespace that the task behind `pidfd` is in.
    ///
    /// # Errors
    /// Those of setns(2) and of netlink.
    pub fn collect(pidfd: BorrowedFd<'_>, family: i32, protocol: u32) -> io::Result<Self> {
        let mut request = vec![0; INET_REQUEST];
        request[..2].copy_from_slice(&[family as u8, protocol as u8]);
        request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        let messages =
            visit(pidfd, &[NamespaceKind::Net], || Netlink::diagnostics()?.dump(SOCK_DIAG_BY_FAMILY, &request))
                .and_then(|list| list)?;
        let shut = |message: &Message| {
            let shut = u32::from(*message.attribute(INET_BODY, INET_DIAG_SHUTDOWN)?.first()?);
            (shut != 0).then_some((message.word(INET_BODY - 4)?, shut))
        };
        Ok(Self(messages.iter().filter_map(shut).collect()))
    }

    /// 1 if the socket with this inode reads no more, 2 if it writes no more, 3 for both; none for neither.
    pub fn get(&self, inode: u32) -> Option<u32> {
        self.0.get(&inode).copied()
    }
}
