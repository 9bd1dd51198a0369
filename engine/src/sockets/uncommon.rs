//! Options of IPv4 and IPv6 sockets that CRIU's format has no place for: path MTU discovery, congestion control, multicast
//! settings and many more (ip(7), ipv6(7), tcp(7), udp(7), socket(7)).
//!
//! All are alike: what a socket has is compared with what a new one of its kind has, and what differs is saved as the bytes
//! that getsockopt(2) gave, which setsockopt(2) takes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, socket_with};

use crate::files::session::{Done, Session, Temporary};
use crate::images::extension::{FerryInetEntry, FerryOptionEntry};
use crate::sys::sockopt;

const SOL_SOCKET: i32 = libc::SOL_SOCKET;
const SOL_IP: i32 = libc::SOL_IP;
const SOL_IPV6: i32 = libc::SOL_IPV6;
const SOL_TCP: i32 = libc::SOL_TCP;
const SOL_UDP: i32 = libc::SOL_UDP;
/// Longest value that is saved: that of `IP_OPTIONS`.
const LONGEST: usize = 40;
/// How many options an entry may hold.
const MOST: usize = 128;

/// Of every socket, by the numbers of asm-generic/socket.h: time stamps, `SO_RXQ_OVFL`, `SO_PEEK_OFF`, `SO_SELECT_ERR_QUEUE`,
/// `SO_BUSY_POLL`, `SO_MAX_PACING_RATE`, `SO_ZEROCOPY`, `SO_PREFER_BUSY_POLL`.
const COMMON: &[i32] = &[29, 35, 37, 40, 42, 45, 46, 47, 60, 69];
/// By the numbers of linux/in.h. `IP_TOS` and `IP_TTL` are here for IPv6 sockets; those of IPv4 have a place of their own.
const IP: &[i32] = &[4, 6, 7, 10, 11, 12, 13, 18, 19, 20, 21, 24, 25, 26, 32, 33, 34, 49, 50, 51];
const IP_OF_V6: &[i32] = &[libc::IP_TOS, libc::IP_TTL];
/// By the numbers of linux/in6.h.
const IPV6: &[i32] = &[16, 17, 18, 19, 23, 25, 29, 31, 33, 51, 53, 56, 58, 60, 62, 66, 67, 70, 72, 73, 74, 75, 76, 77];
/// By the numbers of linux/tcp.h; the second is the congestion control's name.
const TCP: &[i32] = &[7, libc::TCP_CONGESTION, 8, 10, 16, 25, 27, 30, 34, 36, 37];
/// By the numbers of linux/udp.h.
const UDP: &[i32] = &[100, 101, 102, 103, 104];

fn options(family: i32, protocol: i32) -> impl Iterator<Item = (i32, i32)> {
    let v6 = family == libc::AF_INET6;
    let of = |level: i32, names: &'static [i32], applies: bool| {
        let names = if applies { names } else { &[] };
        names.iter().map(move |name| (level, *name))
    };
    of(SOL_SOCKET, COMMON, true)
        .chain(of(SOL_IP, IP, true))
        .chain(of(SOL_IP, IP_OF_V6, v6))
        .chain(of(SOL_IPV6, IPV6, v6))
        .chain(of(SOL_TCP, TCP, protocol == libc::IPPROTO_TCP))
        .chain(of(SOL_UDP, UDP, matches!(protocol, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE)))
}

/// Family, type and protocol.
type Kind = (i32, i32, i32);

/// The values of all options that apply to a kind; none for one that the kernel does not know.
type Values = Vec<Option<Vec<u8>>>;

/// What new sockets have.
#[derive(Debug, Default)]
pub struct NewSockets(HashMap<Kind, Values>);

impl NewSockets {
    fn values(&mut self, kind: Kind) -> nix::Result<&Values> {
        match self.0.entry(kind) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(unknown) => {
                let socket = open(kind)?;
                let values = options(kind.0, kind.2).map(|(level, name)| value(socket.as_fd(), level, name));
                Ok(unknown.insert(values.collect()))
            }
        }
    }
}

fn open((family, kind, protocol): Kind) -> nix::Result<OwnedFd> {
    let family = AddressFamily::from_raw(family as u16);
    let kind = SocketType::from_raw(kind as u32);
    let protocol = u32::try_from(protocol).ok().and_then(std::num::NonZeroU32::new).map(Protocol::from_raw);
    socket_with(family, kind, SocketFlags::CLOEXEC, protocol)
        .map_err(|error| nix::errno::Errno::from_raw(error.raw_os_error()))
}

fn value(fd: BorrowedFd<'_>, level: i32, name: i32) -> Option<Vec<u8>> {
    sockopt::bytes(fd, level, name, LONGEST).ok()
}

/// Reads what a socket has that a new one has not.
pub fn collect(fd: BorrowedFd<'_>, kind: (i32, i32, i32), new: &mut NewSockets) -> nix::Result<Option<FerryInetEntry>> {
    let mut entry = FerryInetEntry::default();
    for ((level, name), usual) in options(kind.0, kind.2).zip(new.values(kind)?) {
        let Some(usual) = usual else { continue };
        if let Some(value) = value(fd, level, name).filter(|value| value != usual) {
            entry.options.push(FerryOptionEntry { level: level as u32, name: name as u32, value });
        }
    }
    Ok((!entry.options.is_empty()).then_some(entry))
}

/// Whether an entry names only options of the table.
pub fn is_whole(family: i32, protocol: i32, entry: &FerryInetEntry) -> bool {
    let known = |option: &FerryOptionEntry| {
        option.value.len() <= LONGEST
            && options(family, protocol).any(|known| known == (option.level as i32, option.name as i32))
    };
    entry.options.len() <= MOST && entry.options.iter().all(known)
}

/// Sets them.
pub fn restore(session: &mut Session<'_>, socket: Temporary, entry: &FerryInetEntry) -> Done {
    for FerryOptionEntry { level, name, value } in &entry.options {
        super::options::set_bytes(session, socket, *level as i32, *name as i32, value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener, UdpSocket};

    #[test]
    fn only_what_was_changed_is_saved() {
        let mut new = NewSockets::default();
        let udp = (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDP);
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        assert_eq!(collect(socket.as_fd(), udp, &mut new), Ok(None));
        socket.set_multicast_loop_v4(false).expect("an option");
        let entry = collect(socket.as_fd(), udp, &mut new).expect("reads").expect("an option");
        let names: Vec<_> = entry.options.iter().map(|option| (option.level as i32, option.name as i32)).collect();
        assert_eq!(names, [(SOL_IP, libc::IP_MULTICAST_LOOP)]);
        assert!(is_whole(udp.0, udp.2, &entry));
        assert!(!is_whole(
            udp.0,
            udp.2,
            &FerryInetEntry {
                options: vec![FerryOptionEntry {
                    level: SOL_SOCKET as u32,
                    name: libc::SO_BINDTODEVICE as u32,
                    value: vec![]
                }],
            }
        ));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let tcp = (libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        assert_eq!(collect(listener.as_fd(), tcp, &mut new), Ok(None));
    }
}
