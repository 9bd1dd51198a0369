//! IPv4 and IPv6 sockets (ip(7), ipv6(7), tcp(7), udp(7)): TCP that listens or is not connected, and UDP.
//!
//! `TCP_INFO` of a listening socket tells how many connections wait (`tcpi_unacked`) and how many may (`tcpi_sacked`).

use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::multicast::{self, Group};
use super::options::{collect_options, restore_options, set_number};
use super::{state, uncommon};
use crate::files::Problem;
use crate::files::fdinfo::FdInfo;
use crate::files::session::{Done, Session, Temporary};
use crate::images::extension::FerryTcpEntry;
use crate::images::fown::FownEntry;
use crate::images::inet::{InetSkEntry, IpOptsEntry, TcpOptsEntry};
use crate::sys::sockopt;

const O_NONBLOCK: u32 = libc::O_NONBLOCK as u32;
/// Offsets in `struct tcp_info`.
const TCPI_UNACKED: usize = 24;
const TCPI_SACKED: usize = 28;
/// Number that libc lacks.
const UDP_CORK: i32 = 1;

/// An address and its port.
#[derive(Default)]
struct Endpoint {
    port: u32,
    /// As it lies in memory.
    words: Vec<u32>,
}

/// Parses a `sockaddr_in` or `sockaddr_in6`.
fn endpoint(address: &[u8], family: i32) -> Option<Endpoint> {
    let range = if family == libc::AF_INET { 4..8 } else { 8..24 };
    let port = u16::from_be_bytes(address.get(2..4)?.try_into().ok()?).into();
    let words = address.get(range)?.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap_or_default()));
    Some(Endpoint { port, words: words.collect() })
}

fn socket_address(family: u32, port: u32, words: &[u32]) -> Vec<u8> {
    let mut bytes = (family as u16).to_ne_bytes().to_vec();
    bytes.extend((port as u16).to_be_bytes());
    if family == libc::AF_INET6 as u32 {
        bytes.extend([0; 4]);
    }
    bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    let len = if family == libc::AF_INET6 as u32 { 28 } else { 16 };
    bytes.resize(len, 0);
    bytes
}

/// Reads a socket; `stat` is its inode.
pub fn collect_inet(
    id: u32,
    inode: u32,
    family: i32,
    info: &FdInfo<'_>,
    fd: BorrowedFd<'_>,
    fown: FownEntry,
) -> Result<InetSkEntry, Problem> {
    let failed = |what: &'static str| move |errno: nix::errno::Errno| Problem::unreadable(what, errno);
    let number = |level, name| sockopt::number(fd, level, name).map_err(failed("its options"));
    let kind = number(libc::SOL_SOCKET, libc::SO_TYPE)?;
    let proto = number(libc::SOL_SOCKET, libc::SO_PROTOCOL)?;
    let mut entry = InetSkEntry {
        id,
        ino: inode,
        family: family as u32,
        r#type: kind as u32,
        proto: proto as u32,
        state: state::CLOSE,
        flags: info.flags,
        fown,
        opts: collect_options(fd, family)?,
        ip_opts: Some(collect_ip_options(fd, family).map_err(failed("its options"))?),
        tcp_opts: Some(TcpOptsEntry::default()),
        ..InetSkEntry::default()
    };
    match (kind, proto) {
        (libc::SOCK_STREAM, libc::IPPROTO_TCP) => {
            let tcp = sockopt::bytes(fd, libc::SOL_TCP, libc::TCP_INFO, 256).map_err(failed("its state"))?;
            let word = |at: usize| {
                tcp.get(at..at + 4).map_or(0, |word| u32::from_ne_bytes(word.try_into().unwrap_or_default()))
            };
            entry.state = tcp.first().copied().unwrap_or_default().into();
            match entry.state {
                state::CLOSE => {}
                state::LISTEN if word(TCPI_UNACKED) > 0 => {
                    return Err(Problem::new(
                        format!("{} connections wait to be accepted", word(TCPI_UNACKED)),
                        "try again when the program has accepted them",
                    ));
                }
                state::LISTEN => entry.backlog = word(TCPI_SACKED),
                _ => {
                    return Err(Problem::new(
                        "a TCP connection, which cannot be saved yet",
                        "have the program or its peers close the connection before the checkpoint",
                    ));
                }
            }
            entry.tcp_opts = Some(collect_tcp_options(fd).map_err(failed("its options"))?);
        }
        (libc::SOCK_DGRAM, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE) => {
            if number(libc::SOL_UDP, UDP_CORK)? != 0 {
                return Err(Problem::new(
                    "a datagram is being put together (UDP_CORK)",
                    "try again when it has been sent",
                ));
            }
        }
        _ => {
            return Err(Problem::new(
                format!("sockets of type {kind} and protocol {proto} cannot be saved yet"),
                "have the program close it before the checkpoint",
            ));
        }
    }
    let own = sockopt_name(fd, family, false).map_err(failed("its address"))?;
    entry.src_port = own.port;
    entry.src_addr = own.words;
    let peer = sockopt_name(fd, family, true).map_err(failed("its peer"))?;
    if peer.port != 0 && kind == libc::SOCK_DGRAM {
        entry.state = state::ESTABLISHED;
    }
    entry.dst_port = peer.port;
    entry.dst_addr = peer.words;
    if family == libc::AF_INET6 {
        entry.v6only = Some(number(libc::SOL_IPV6, libc::IPV6_V6ONLY)? != 0);
        let link_local =
            |words: &[u32]| words.first().is_some_and(|word| u32::from_be(*word) & 0xffc0_0000 == 0xfe80_0000);
        if link_local(&entry.src_addr) || link_local(&entry.dst_addr) {
            return Err(Problem::new(
                "it is bound to a link-local address, which cannot be saved yet",
                "have the program close it",
            ));
        }
    }
    Ok(entry)
}

/// getsockname(2) or getpeername(2); all zero when there is no such end.
fn sockopt_name(fd: BorrowedFd<'_>, family: i32, peer: bool) -> nix::Result<Endpoint> {
    let words = if family == libc::AF_INET { 1 } else { 4 };
    match sockopt::address(fd, peer) {
        Ok(address) => endpoint(&address, family).ok_or(nix::errno::Errno::EINVAL),
        Err(nix::errno::Errno::ENOTCONN) => Ok(Endpoint { port: 0, words: vec![0; words] }),
        Err(errno) => Err(errno),
    }
}

fn collect_ip_options(fd: BorrowedFd<'_>, family: i32) -> nix::Result<IpOptsEntry> {
    let on = |level, name| sockopt::number(fd, level, name).map(|value| (value != 0).then_some(true));
    if family == libc::AF_INET6 {
        return Ok(IpOptsEntry {
            freebind: on(libc::SOL_IPV6, libc::IPV6_FREEBIND).unwrap_or(None),
            pktinfo: on(libc::SOL_IPV6, libc::IPV6_RECVPKTINFO)?,
            ..IpOptsEntry::default()
        });
    }
    let number = |name| sockopt::number(fd, libc::SOL_IP, name).map(|value| (value != 0).then_some(value as u32));
    Ok(IpOptsEntry {
        freebind: on(libc::SOL_IP, libc::IP_FREEBIND)?,
        pktinfo: on(libc::SOL_IP, libc::IP_PKTINFO)?,
        tos: number(libc::IP_TOS)?,
        ttl: number(libc::IP_TTL)?,
        ..IpOptsEntry::default()
    })
}

fn collect_tcp_options(fd: BorrowedFd<'_>) -> nix::Result<TcpOptsEntry> {
    let number = |name| sockopt::number(fd, libc::SOL_TCP, name).map(|value| Some(value as u32));
    let on = |name| sockopt::number(fd, libc::SOL_TCP, name).map(|value| (value != 0).then_some(true));
    Ok(TcpOptsEntry {
        cork: on(libc::TCP_CORK)?,
        nodelay: on(libc::TCP_NODELAY)?,
        keepcnt: number(libc::TCP_KEEPCNT)?,
        keepidle: number(libc::TCP_KEEPIDLE)?,
        keepintvl: number(libc::TCP_KEEPINTVL)?,
        ferry: collect_tcp_extension(fd)?,
    })
}

/// What CRIU's format has no place for, if any of it is not the default.
fn collect_tcp_extension(fd: BorrowedFd<'_>) -> nix::Result<Option<FerryTcpEntry>> {
    let set = |name| sockopt::number(fd, libc::SOL_TCP, name).map(|value| (value != 0).then_some(value as u32));
    let entry = FerryTcpEntry {
        defer_accept: set(libc::TCP_DEFER_ACCEPT)?,
        user_timeout: set(libc::TCP_USER_TIMEOUT)?,
        fastopen: set(libc::TCP_FASTOPEN)?,
    };
    Ok((entry != FerryTcpEntry::default()).then_some(entry))
}

/// Whether an entry's numbers can be used at all.
pub fn is_whole(entry: &InetSkEntry) -> bool {
    let words = match entry.family as i32 {
        libc::AF_INET => 1,
        libc::AF_INET6 => 4,
        _ => return false,
    };
    let addresses = [(&entry.src_addr, entry.src_port), (&entry.dst_addr, entry.dst_port)];
    let (family, protocol) = (entry.family as i32, entry.proto as i32);
    addresses.iter().all(|(address, port)| address.len() == words && *port <= u16::MAX.into())
        && entry.ferry.as_ref().is_none_or(|ferry| uncommon::is_whole(family, protocol, ferry))
}

/// Why a socket cannot be restored, if so.
pub fn obstacle(entry: &InetSkEntry) -> Option<&'static str> {
    match (entry.r#type as i32, entry.proto as i32, entry.state) {
        (libc::SOCK_STREAM, libc::IPPROTO_TCP, state::CLOSE | state::LISTEN) => None,
        (libc::SOCK_DGRAM, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE, _) => None,
        (libc::SOCK_STREAM, libc::IPPROTO_TCP, _) => Some("TCP connections cannot be restored yet"),
        _ => Some("sockets of this type and protocol cannot be restored yet"),
    }
}

/// State that is not kept.
pub fn check_losses(entry: &InetSkEntry, fd: BorrowedFd<'_>, groups: &[Group], stopped: bool) -> Result<(), Problem> {
    if let Some(group) = multicast::membership(fd, entry.family as i32, groups) {
        return Err(Problem::new(
            format!("it is a member of multicast group {group}, which cannot be saved yet"),
            "have the program leave it",
        ));
    }
    // While the tree runs this changes all the time.
    if stopped && entry.r#type == libc::SOCK_DGRAM as u32 && has_datagram(fd) {
        return Err(Problem::new(
            "it has received a datagram that the program has not read yet",
            "try again when it has",
        ));
    }
    Ok(())
}

fn has_datagram(fd: BorrowedFd<'_>) -> bool {
    let mut wanted = [PollFd::from_borrowed_fd(fd, PollFlags::IN | PollFlags::RDHUP)];
    let ready = poll(&mut wanted, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap_or(0) != 0;
    let events = wanted[0].revents();
    // What was shut down for reading is always ready.
    ready
        && events.contains(PollFlags::IN)
        && (!events.contains(PollFlags::RDHUP) || rustix::io::ioctl_fionread(fd).is_ok_and(|length| length > 0))
}

/// Makes a socket, binds it, and has it listen or connects it as it was.
pub fn restore_inet(session: &mut Session<'_>, entry: &InetSkEntry, cloexec: bool) -> Done<Temporary> {
    let cloexec = if cloexec { libc::SOCK_CLOEXEC as u32 } else { 0 };
    let kind = entry.r#type | entry.flags & O_NONBLOCK | cloexec;
    let arguments = [entry.family.into(), kind.into(), entry.proto.into()];
    let socket = session.make("make it", libc::SYS_socket, &arguments, &[], &[])?;
    let reuse = |session: &mut Session<'_>, value: bool| {
        set_number(session, socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, value.into())
    };
    if let Some(v6only) = entry.v6only {
        set_number(session, socket, libc::SOL_IPV6, libc::IPV6_V6ONLY, v6only.into())?;
    }
    restore_options(session, socket, &entry.opts)?;
    restore_ip_options(session, socket, entry)?;
    if let Some(options) = &entry.ferry {
        uncommon::restore(session, socket, options)?;
    }
    if entry.src_port != 0 {
        // Connections of the time before may linger on the port (TIME_WAIT).
        reuse(session, true)?;
        let address = socket_address(entry.family, entry.src_port, &entry.src_addr);
        let before = [socket.number().into()];
        session.must_around("bind it", libc::SYS_bind, &before, &address, &[address.len() as u64])?;
    }
    if entry.state == state::LISTEN {
        session.must("have it listen", libc::SYS_listen, &[socket.number().into(), entry.backlog.into()])?;
    }
    if entry.state == state::ESTABLISHED && entry.dst_port != 0 {
        let address = socket_address(entry.family, entry.dst_port, &entry.dst_addr);
        let before = [socket.number().into()];
        session.must_around("connect it", libc::SYS_connect, &before, &address, &[address.len() as u64])?;
    }
    if let Some(how) = entry.shutdown.filter(|how| (1..=3).contains(how)) {
        // shutdown(2) counts from 0. Of a socket that is not connected it complains, and shuts it all the same.
        let arguments = [socket.number().into(), how as u64 - 1];
        if entry.state == state::ESTABLISHED {
            session.must("shut it", libc::SYS_shutdown, &arguments)?;
        } else {
            session.try_call(libc::SYS_shutdown, &arguments)?;
        }
    }
    reuse(session, entry.opts.reuseaddr == Some(true))?;
    Ok(socket)
}

fn restore_ip_options(session: &mut Session<'_>, socket: Temporary, entry: &InetSkEntry) -> Done {
    let v6 = entry.family == libc::AF_INET6 as u32;
    if let Some(ip) = &entry.ip_opts {
        let choose = |v4, for_v6| if v6 { (libc::SOL_IPV6, for_v6) } else { (libc::SOL_IP, v4) };
        for (value, (level, name)) in [
            (ip.freebind.map(u32::from), choose(libc::IP_FREEBIND, libc::IPV6_FREEBIND)),
            (ip.pktinfo.map(u32::from), choose(libc::IP_PKTINFO, libc::IPV6_RECVPKTINFO)),
            (ip.tos, (libc::SOL_IP, libc::IP_TOS)),
            (ip.ttl, (libc::SOL_IP, libc::IP_TTL)),
        ] {
            if let Some(value) = value {
                set_number(session, socket, level, name, value)?;
            }
        }
    }
    let tcp = entry.tcp_opts.as_ref().filter(|_| entry.proto == libc::IPPROTO_TCP as u32);
    if let Some(tcp) = tcp {
        let more = tcp.ferry.unwrap_or_default();
        for (value, name) in [
            (tcp.cork.map(u32::from), libc::TCP_CORK),
            (tcp.nodelay.map(u32::from), libc::TCP_NODELAY),
            (tcp.keepcnt, libc::TCP_KEEPCNT),
            (tcp.keepidle, libc::TCP_KEEPIDLE),
            (tcp.keepintvl, libc::TCP_KEEPINTVL),
            (more.defer_accept, libc::TCP_DEFER_ACCEPT),
            (more.user_timeout, libc::TCP_USER_TIMEOUT),
            (more.fastopen, libc::TCP_FASTOPEN),
        ] {
            if let Some(value) = value {
                set_number(session, socket, libc::SOL_TCP, name, value)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_the_kernels() {
        let address = socket_address(libc::AF_INET as u32, 0x1234, &[u32::from_ne_bytes([127, 0, 0, 1])]);
        assert_eq!(address[2..8], [0x12, 0x34, 127, 0, 0, 1]);
        assert_eq!(address.len(), size_of::<libc::sockaddr_in>());
        let back = endpoint(&address, libc::AF_INET).expect("an endpoint");
        assert_eq!((back.port, back.words), (0x1234, vec![u32::from_ne_bytes([127, 0, 0, 1])]));
        let words = [1, 2, 3, 4];
        let address = socket_address(libc::AF_INET6 as u32, 7, &words);
        assert_eq!(address.len(), size_of::<libc::sockaddr_in6>());
        assert_eq!(endpoint(&address, libc::AF_INET6).expect("an endpoint").words, words);
    }
}
