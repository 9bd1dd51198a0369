//! Sockets without connections to elsewhere: listening ones, local pairs, UDP (socket(7), tcp(7), ip(7), unix(7)).

use crate::room::{Check, Room};
use crate::sys::{Fault, Verdict, ensure, errno, same, sys, zeroed};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;

fn option(socket: i32, level: i32, name: i32) -> Result<i32, Fault> {
    let (mut value, mut length) = (0i32, 4u32);
    sys!(getsockopt(socket, level, name, (&raw mut value).cast(), &mut length))?;
    Ok(value)
}

fn set_option(socket: i32, level: i32, name: i32, value: i32) -> Verdict {
    sys!(setsockopt(socket, level, name, (&raw const value).cast(), 4)).map(|_| ())
}

/// Options that a listening socket keeps, and those that its connections inherit.
const TCP_OPTIONS: [(i32, i32, i32); 8] = [
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT, 1),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (libc::SOL_SOCKET, libc::SO_RCVBUF, 50_000),
    (libc::SOL_SOCKET, libc::SO_SNDBUF, 60_000),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 3),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
];

/// Accepts what `connect` opened, and lets a few bytes go there and back.
fn serve_one(listener: i32, mut client: impl Read + Write, accepts_at_once: bool) -> Verdict {
    client.write_all(b"ping").map_err(|error| format!("client's write: {error}"))?;
    let mut poll = libc::pollfd { fd: listener, events: libc::POLLIN, revents: 0 };
    same!("listener with a connection is ready", sys!(poll(&mut poll, 1, 5000))?, 1);
    ensure!(accepts_at_once, "no listener");
    let server = sys!(accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC))? as i32;
    // SAFETY: accept4 has just made this descriptor for us.
    let mut server = unsafe { std::fs::File::from_raw_fd(server) };
    let mut bytes = [0u8; 4];
    server.read_exact(&mut bytes).map_err(|error| format!("server's read: {error}"))?;
    server.write_all(&bytes).map_err(|error| format!("server's write: {error}"))?;
    client.read_exact(&mut bytes).map_err(|error| format!("client's read: {error}"))?;
    same!("what came back", bytes, *b"ping");
    Ok(())
}

fn tcp(address: &str, domain: i32, only_v6: Option<i32>) -> Result<Check, Fault> {
    let socket = sys!(socket(domain, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0))? as i32;
    for (level, name, value) in TCP_OPTIONS {
        set_option(socket, level, name, value)?;
    }
    if let Some(value) = only_v6 {
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, value)?;
    }
    let resolved = address.to_socket_addrs().map_err(|error| error.to_string())?.next().ok_or("no address")?;
    match resolved {
        std::net::SocketAddr::V4(v4) => {
            let mut name = zeroed::<libc::sockaddr_in>();
            name.sin_family = libc::AF_INET as u16;
            name.sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
            sys!(bind(socket, (&raw const name).cast(), size_of_val(&name) as u32))?;
        }
        std::net::SocketAddr::V6(v6) => {
            let mut name = zeroed::<libc::sockaddr_in6>();
            name.sin6_family = libc::AF_INET6 as u16;
            name.sin6_addr.s6_addr = v6.ip().octets();
            sys!(bind(socket, (&raw const name).cast(), size_of_val(&name) as u32))?;
        }
    }
    sys!(listen(socket, 33))?;
    let mut name = zeroed::<libc::sockaddr_in6>();
    sys!(getsockname(socket, (&raw mut name).cast(), &mut (size_of_val(&name) as u32)))?;
    // The port stands at the same place in both kinds of address.
    let port = u16::from_be(name.sin6_port);
    let options = move || -> Result<Vec<i32>, Fault> {
        let mut values: Vec<i32> =
            TCP_OPTIONS.into_iter().map(|(level, name, _)| option(socket, level, name)).collect::<Result<_, _>>()?;
        values.push(option(socket, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)?);
        if only_v6.is_some() {
            values.push(option(socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)?);
        }
        values.push(sys!(fcntl(socket, libc::F_GETFL))? as i32);
        Ok(values)
    };
    let backlog = move || -> Result<u32, Fault> {
        // For a listening socket tcpi_sacked is the length of the queue that listen(2) asked for.
        let mut info = zeroed::<libc::tcp_info>();
        sys!(getsockopt(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &mut (size_of_val(&info) as u32)
        ))?;
        Ok(info.tcpi_sacked)
    };
    let before = (options()?, backlog()?);
    let target = match resolved {
        std::net::SocketAddr::V4(_) => ("127.0.0.1", port),
        std::net::SocketAddr::V6(_) => ("::1", port),
    };
    Ok(Box::new(move || {
        same!("options, backlog", (options()?, backlog()?), before);
        let client = TcpStream::connect(target).map_err(|error| format!("connecting to port {port}: {error}"))?;
        // A connection that is reset leaves nothing behind that would be in the way of the next dump.
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        let descriptor = std::os::fd::AsRawFd::as_raw_fd(&client);
        sys!(setsockopt(
            descriptor,
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of_val(&linger) as u32
        ))?;
        serve_one(socket, client, true)
    }))
}

/// TCP over IPv4.
pub fn tcp_listener(_: &Room) -> Result<Check, Fault> {
    tcp("127.0.0.1:0", libc::AF_INET, None)
}

/// TCP over IPv6, IPv6 only.
pub fn tcp6_listener(_: &Room) -> Result<Check, Fault> {
    tcp("[::1]:0", libc::AF_INET6, Some(1))
}

fn listen_unix(kind: i32, name: &[u8], backlog: i32) -> Result<i32, Fault> {
    let socket = sys!(socket(libc::AF_UNIX, kind, 0))? as i32;
    let mut address = zeroed::<libc::sockaddr_un>();
    address.sun_family = libc::AF_UNIX as u16;
    for (to, from) in address.sun_path.iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    let terminator = usize::from(name.first() != Some(&0));
    sys!(bind(socket, (&raw const address).cast(), (2 + name.len() + terminator) as u32))?;
    sys!(listen(socket, backlog))?;
    Ok(socket)
}

fn bytes(path: &Path) -> Vec<u8> {
    std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec()
}

/// A unix socket bound to a path.
pub fn unix_listener(room: &Room) -> Result<Check, Fault> {
    let path = room.path("sock");
    let socket = listen_unix(libc::SOCK_STREAM | libc::SOCK_NONBLOCK, &bytes(&path), 5)?;
    Ok(Box::new(move || {
        let client = UnixStream::connect(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        serve_one(socket, client, true)
    }))
}

/// Two listening unix sockets of one name: the file of the younger was replaced by that of the older.
pub fn unix_listener_replaced(room: &Room) -> Result<Check, Fault> {
    let (path, aside) = (room.path("sock"), room.path("aside"));
    let text = |error: std::io::Error| error.to_string();
    let older = listen_unix(libc::SOCK_STREAM | libc::SOCK_NONBLOCK, &bytes(&path), 5)?;
    std::fs::rename(&path, &aside).map_err(text)?;
    let younger = listen_unix(libc::SOCK_STREAM | libc::SOCK_NONBLOCK, &bytes(&path), 5)?;
    std::fs::rename(&aside, &path).map_err(text)?;
    Ok(Box::new(move || {
        same!("the younger listens", option(younger, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)?, 1);
        let client = UnixStream::connect(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        serve_one(older, client, true)
    }))
}

/// A unix socket bound to a name of the abstract namespace.
pub fn unix_abstract_listener(_: &Room) -> Result<Check, Fault> {
    let name = format!("ferry-workload-{}\u{0}with-zero", std::process::id());
    let socket = listen_unix(libc::SOCK_STREAM, [b"\0", name.as_bytes()].concat().as_slice(), 5)?;
    Ok(Box::new(move || {
        use std::os::linux::net::SocketAddrExt;
        let address = SocketAddr::from_abstract_name(&name).map_err(|error| error.to_string())?;
        let client = UnixStream::connect_addr(&address).map_err(|error| format!("the abstract name: {error}"))?;
        serve_one(socket, client, true)
    }))
}

/// Options of unix sockets, a socket of packets, mode and owner of the socket file.
pub fn unix_listener_options(room: &Room) -> Result<Check, Fault> {
    let path = room.path("packets");
    let socket = listen_unix(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, &bytes(&path), 7)?;
    set_option(socket, libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
    set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, 70_000)?;
    set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, 80_000)?;
    sys!(chmod(crate::sys::c_path(&path).as_ptr(), 0o640))?;
    sys!(chown(crate::sys::c_path(&path).as_ptr(), 5, 6))?;
    let told = move || -> Result<Vec<i32>, Fault> {
        let names = [libc::SO_PASSCRED, libc::SO_RCVBUF, libc::SO_SNDBUF, libc::SO_TYPE, libc::SO_ACCEPTCONN];
        names.into_iter().map(|name| option(socket, libc::SOL_SOCKET, name)).collect()
    };
    let before = told()?;
    Ok(Box::new(move || {
        use std::os::unix::fs::MetadataExt;
        same!("options", told()?, before);
        let file = std::fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        same!("mode and owner of the socket file", (file.mode() & 0o777, file.uid(), file.gid()), (0o640, 5, 6));
        Ok(())
    }))
}

/// Four bytes through a connection, one way.
pub fn ping(mut one: impl Write, mut other: impl Read) -> Verdict {
    one.write_all(b"ping").map_err(|error| error.to_string())?;
    let mut bytes = [0u8; 4];
    other.read_exact(&mut bytes).map_err(|error| error.to_string())?;
    same!("what came through", bytes, *b"ping");
    Ok(())
}

/// A connected pair of stream sockets.
pub fn unix_connected(_: &Room) -> Result<Check, Fault> {
    let (one, other) = UnixStream::pair().map_err(|error| error.to_string())?;
    Ok(Box::new(move || {
        ping(&one, &other)?;
        ping(&other, &one)
    }))
}

/// A connected pair of datagram sockets.
pub fn unix_datagram(_: &Room) -> Result<Check, Fault> {
    let (one, other) = std::os::unix::net::UnixDatagram::pair().map_err(|error| error.to_string())?;
    Ok(Box::new(move || {
        one.send(b"datagram").map_err(|error| error.to_string())?;
        let mut bytes = [0u8; 20];
        same!("length of the datagram", other.recv(&mut bytes).map_err(|error| error.to_string())?, 8);
        Ok(())
    }))
}

/// A UDP socket that talks to itself.
pub fn udp(_: &Room) -> Result<Check, Fault> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
    let address = socket.local_addr().map_err(|error| error.to_string())?;
    Ok(Box::new(move || {
        socket.send_to(b"datagram", address).map_err(|error| error.to_string())?;
        let mut bytes = [0u8; 20];
        same!("length of the datagram", socket.recv(&mut bytes).map_err(|error| error.to_string())?, 8);
        Ok(())
    }))
}

/// UDP sockets that are connected to each other, one of which sends no more.
pub fn udp_shut(_: &Room) -> Result<Check, Fault> {
    let text = |error: std::io::Error| error.to_string();
    let (one, other) = (UdpSocket::bind("127.0.0.1:0").map_err(text)?, UdpSocket::bind("127.0.0.1:0").map_err(text)?);
    one.connect(other.local_addr().map_err(text)?).map_err(text)?;
    other.connect(one.local_addr().map_err(text)?).map_err(text)?;
    sys!(shutdown(one.as_raw_fd(), libc::SHUT_WR))?;
    sys!(shutdown(other.as_raw_fd(), libc::SHUT_RD))?;
    Ok(Box::new(move || {
        other.send(b"datagram").map_err(text)?;
        let mut bytes = [0u8; 20];
        same!("length of the datagram", one.recv(&mut bytes).map_err(text)?, 8);
        let sent = one.send(b"more").map_err(|error| error.raw_os_error());
        same!("sending on the socket that sends no more", sent, Err(Some(libc::EPIPE)));
        let mut poll = libc::pollfd { fd: other.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        same!("the socket that reads no more is ready", sys!(poll(&mut poll, 1, 0))?, 1);
        Ok(())
    }))
}

/// Options that images of CRIU have no place for, of a datagram socket and of a listener.
pub fn socket_options(_: &Room) -> Result<Check, Fault> {
    let text = |error: std::io::Error| error.to_string();
    let datagrams = UdpSocket::bind("127.0.0.1:0").map_err(text)?;
    let six = UdpSocket::bind("[::1]:0").map_err(text)?;
    let listener = TcpListener::bind("127.0.0.1:0").map_err(text)?;
    let options = [
        (datagrams.as_raw_fd(), libc::SOL_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
        (datagrams.as_raw_fd(), libc::SOL_IP, libc::IP_RECVTTL, 1),
        (datagrams.as_raw_fd(), libc::SOL_IP, libc::IP_MULTICAST_TTL, 7),
        (datagrams.as_raw_fd(), libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1),
        (six.as_raw_fd(), libc::SOL_IPV6, libc::IPV6_UNICAST_HOPS, 9),
        (six.as_raw_fd(), libc::SOL_IPV6, libc::IPV6_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
        (listener.as_raw_fd(), libc::SOL_TCP, libc::TCP_SYNCNT, 3),
        (listener.as_raw_fd(), libc::SOL_TCP, libc::TCP_NOTSENT_LOWAT, 4321),
    ];
    for (socket, level, name, value) in options {
        set_option(socket, level, name, value)?;
    }
    let reno = b"reno";
    let socket = listener.as_raw_fd();
    sys!(setsockopt(socket, libc::SOL_TCP, libc::TCP_CONGESTION, reno.as_ptr().cast(), 4))?;
    Ok(Box::new(move || {
        let _ = (&datagrams, &six, &listener);
        for (socket, level, name, wanted) in options {
            same!(format!("option {name} of level {level}"), option(socket, level, name)?, wanted);
        }
        let (mut name, mut length) = ([0u8; 16], 16);
        sys!(getsockopt(socket, libc::SOL_TCP, libc::TCP_CONGESTION, name.as_mut_ptr().cast(), &mut length))?;
        same!("congestion control", &name[..5], b"reno\0");
        Ok(())
    }))
}

/// A datagram that waits to be read.
pub fn udp_waiting(_: &Room) -> Result<Check, Fault> {
    let text = |error: std::io::Error| error.to_string();
    let socket = UdpSocket::bind("127.0.0.1:0").map_err(text)?;
    let own = socket.local_addr().map_err(text)?;
    socket.send_to(b"waits", own).map_err(text)?;
    Ok(Box::new(move || {
        let mut bytes = [0; 20];
        let (length, _) = socket.recv_from(&mut bytes).map_err(|error| error.to_string())?;
        same!("datagram", &bytes[..length], b"waits");
        socket.send_to(b"waits", own).map(drop).map_err(|error| error.to_string())
    }))
}

/// A member of a multicast group.
pub fn multicast(_: &Room) -> Result<Check, Fault> {
    let text = |error: std::io::Error| error.to_string();
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(text)?;
    let group = std::net::Ipv4Addr::new(239, 1, 2, 3);
    socket.join_multicast_v4(&group, &std::net::Ipv4Addr::LOCALHOST).map_err(text)?;
    Ok(Box::new(move || {
        let again = socket.join_multicast_v4(&group, &std::net::Ipv4Addr::LOCALHOST);
        ensure!(again.is_err() && errno() == libc::EADDRINUSE, "it is no member any more");
        Ok(())
    }))
}
