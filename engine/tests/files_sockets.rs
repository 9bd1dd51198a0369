//! Sockets of a live process are saved, and made again in a fresh task; what cannot be saved is refused by name.

mod files_support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram, UnixListener, UnixStream};

use ferry_engine::files::{FilesOptions, Inherited, RestoreFilesError};
use files_support::{Holder, Scratch, Tasks, images, plan, raw};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

#[test]
fn listening_and_unconnected_sockets_come_back() {
    let scratch = Scratch::new("sockets");
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    rustix::net::listen(&tcp, 7).unwrap();
    let tcp6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    tcp6.set_nonblocking(true).unwrap();
    let fresh = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    sockopt::set_tcp_nodelay(&fresh, true).unwrap();
    sockopt::set_socket_keepalive(&fresh, true).unwrap();
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    sockopt::set_socket_recv_buffer_size(&udp, 20000).unwrap();
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    client.connect(udp.local_addr().unwrap()).unwrap();
    let path = scratch.path("listener");
    let local = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o620)).unwrap();
    let name = format!("ferry-test-{}", std::process::id());
    let abstract_one = UnixDatagram::bind_addr(&UnixAddress::from_abstract_name(&name).unwrap()).unwrap();
    let unbound = UnixDatagram::unbound().unwrap();
    let idle = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let addresses = [tcp.local_addr().unwrap(), tcp6.local_addr().unwrap()];
    let udp_address = udp.local_addr().unwrap();
    let client_address = client.local_addr().unwrap();

    let descriptors: Vec<OwnedFd> = vec![
        tcp.into(),
        tcp6.into(),
        fresh,
        udp.into(),
        client.into(),
        local.into(),
        abstract_one.into(),
        unbound.into(),
        idle,
    ];
    let numbers: Vec<i32> = descriptors.iter().map(raw).collect();
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let holder = Holder::start(&borrowed);
    let mut collector = holder.collect(FilesOptions::default());
    assert_eq!(collector.refusals(), []);
    let dump = collector.finish();
    drop(holder);
    drop(descriptors);

    let tasks = Tasks::restore(&mut plan(&images(&dump), &[(None, 2)], Inherited::new()).unwrap(), &[]).unwrap();
    assert_eq!(tasks.numbers(0)[3..], numbers[..]);
    for (index, address) in addresses.into_iter().enumerate() {
        let listener = TcpListener::from(tasks.descriptor(0, numbers[index]));
        let mut stream = TcpStream::connect(address).expect("it listens");
        listener.set_nonblocking(false).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        drop(stream);
        let mut text = String::new();
        accepted.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }
    let fresh = tasks.descriptor(0, numbers[2]);
    assert!(sockopt::tcp_nodelay(&fresh).unwrap() && sockopt::socket_keepalive(&fresh).unwrap());
    let udp = UdpSocket::from(tasks.descriptor(0, numbers[3]));
    assert_eq!(udp.local_addr().unwrap(), udp_address);
    assert_eq!(sockopt::socket_recv_buffer_size(&udp).unwrap(), 40000, "the kernel tells twice of what was set");
    let client = UdpSocket::from(tasks.descriptor(0, numbers[4]));
    assert_eq!((client.local_addr().unwrap(), client.peer_addr().unwrap()), (client_address, udp_address));
    client.send(b"ping").unwrap();
    let mut bytes = [0; 16];
    assert_eq!(udp.recv_from(&mut bytes).unwrap(), (4, client_address));
    let local = UnixListener::from(tasks.descriptor(0, numbers[5]));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o620);
    let _stream = UnixStream::connect(&path).expect("it listens");
    local.accept().unwrap();
    let abstract_one = UnixDatagram::from(tasks.descriptor(0, numbers[6]));
    let unbound = UnixDatagram::from(tasks.descriptor(0, numbers[7]));
    unbound.send_to_addr(b"to a name", &UnixAddress::from_abstract_name(&name).unwrap()).unwrap();
    assert_eq!(abstract_one.recv(&mut bytes).unwrap(), 9);
}

#[test]
fn pairs_come_back_with_what_was_on_its_way() {
    let (mut left, right) = UnixStream::pair().unwrap();
    left.write_all(b"to the right").unwrap();
    (&right).write_all(&vec![7; 100_000]).unwrap();
    let (one, other) = UnixDatagram::pair().unwrap();
    for packet in ["a", "bc", "def"] {
        one.send(packet.as_bytes()).unwrap();
    }
    other.set_nonblocking(true).unwrap();
    let (mut gone, orphan) = UnixStream::pair().unwrap();
    gone.write_all(b"last words").unwrap();
    drop(gone);
    let (deaf, mute) = UnixStream::pair().unwrap();
    mute.shutdown(std::net::Shutdown::Write).unwrap();
    // The left ends are the first process's, the right ends the second's.
    let lefts: Vec<OwnedFd> = vec![left.into(), one.into(), deaf.into()];
    let rights: Vec<OwnedFd> = vec![right.into(), other.into(), mute.into(), orphan.into()];
    let borrow = |all: &[OwnedFd]| Holder::start(&all.iter().map(AsFd::as_fd).collect::<Vec<_>>());
    let holders = [borrow(&lefts), borrow(&rights)];
    let mut collector = ferry_engine::files::FilesCollector::new(holders[0].pid(), FilesOptions::default()).unwrap();
    collector.add_task(holders[0].task());
    assert_eq!(collector.refusals().len(), 3, "the other ends have not been seen yet");
    collector.add_task(holders[1].task());
    assert_eq!(collector.refusals(), []);
    let dump = collector.finish();
    let (lefts_at, rights_at): (Vec<i32>, Vec<i32>) =
        (lefts.iter().map(raw).collect(), rights.iter().map(raw).collect());
    drop((holders, lefts, rights));

    let mut plan = plan(&images(&dump), &[(None, 2), (Some(0), 3)], Inherited::new()).unwrap();
    let tasks = Tasks::restore(&mut plan, &[0]).unwrap();
    assert_eq!(tasks.numbers(0)[3..], lefts_at[..]);
    let mut bytes = vec![0; 200_000];
    let right = UnixStream::from(tasks.descriptor(1, rights_at[0]));
    assert_eq!((&right).read(&mut bytes).unwrap(), 12);
    assert_eq!(&bytes[..12], b"to the right");
    let mut left = UnixStream::from(tasks.descriptor(0, lefts_at[0]));
    left.read_exact(&mut bytes[..100_000]).unwrap();
    assert!(bytes[..100_000].iter().all(|byte| *byte == 7));
    let other = UnixDatagram::from(tasks.descriptor(1, rights_at[1]));
    for packet in ["a", "bc", "def"] {
        let length = other.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], packet.as_bytes());
    }
    assert_eq!(other.recv(&mut bytes).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    let mut deaf = UnixStream::from(tasks.descriptor(0, lefts_at[2]));
    assert_eq!(deaf.read(&mut bytes).unwrap(), 0, "the other end writes no more");
    let mut mute = UnixStream::from(tasks.descriptor(1, rights_at[2]));
    deaf.write_all(b"x").unwrap();
    assert_eq!(mute.read(&mut bytes).unwrap(), 1);
    let mut orphan = UnixStream::from(tasks.descriptor(1, rights_at[3]));
    let mut text = String::new();
    orphan.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
}

#[test]
fn a_socket_file_that_became_another_file_is_left_alone() {
    let scratch = Scratch::new("taken");
    let path = scratch.path("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let holder = Holder::start(&[listener.as_fd()]);
    let dump = holder.collect(FilesOptions::default()).finish();
    drop((holder, listener));
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"precious").unwrap();
    let error = Tasks::restore(&mut plan(&images(&dump), &[(None, 2)], Inherited::new()).unwrap(), &[]).err().unwrap();
    assert!(matches!(error, RestoreFilesError::Changed { .. }) && error.to_string().contains(&path), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn what_cannot_be_saved_is_refused_by_name_and_all_at_once() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let master = std::fs::OpenOptions::new().read(true).write(true).open("/dev/ptmx").unwrap();
    ferry_engine::sys::terminal::set_locked(master.as_fd(), false).unwrap();
    let terminal = ferry_engine::sys::terminal::open_slave(master.as_fd(), libc::O_RDWR).unwrap();
    let netlink =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None).unwrap();
    let namespace = std::fs::File::open("/proc/self/ns/net").unwrap();
    let (inside, outside) = UnixStream::pair().unwrap();
    let scratch = Scratch::new("refused");
    let linked = std::fs::File::create(scratch.path("linked")).unwrap();
    std::fs::hard_link(scratch.path("linked"), scratch.path("other")).unwrap();
    std::fs::remove_file(scratch.path("linked")).unwrap();
    let large = std::fs::File::create(scratch.path("large")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&large, &vec![1; 2 << 20], 0).unwrap();
    std::fs::remove_file(scratch.path("large")).unwrap();

    let all = [
        listener.as_fd(),
        connection.as_fd(),
        terminal.as_fd(),
        netlink.as_fd(),
        namespace.as_fd(),
        inside.as_fd(),
        linked.as_fd(),
        large.as_fd(),
    ];
    let holder = Holder::start(&all);
    for stopped in [true, false] {
        let mut collector = holder.collect(FilesOptions { stopped, ..FilesOptions::default() });
        let refusals = collector.refusals();
        for (descriptor, words) in [
            (raw(&listener), "1 connections wait to be accepted"),
            (raw(&connection), "a TCP connection"),
            (raw(&terminal), "its master side is held by a process outside"),
            (raw(&netlink), "netlink sockets"),
            (raw(&namespace), "namespace (net)"),
            (raw(&inside), "outside the tree"),
            (raw(&linked), "hard links remain"),
            (raw(&large), "more than the limit of 1048576"),
        ] {
            let object = format!("fd {descriptor}, ");
            let found = refusals.iter().find(|refusal| refusal.object.starts_with(&object));
            let found = found.unwrap_or_else(|| panic!("no refusal of {object}in {refusals:?}"));
            assert!(found.problem.contains(words), "{found}");
            assert_eq!(found.comm, "sleep");
            assert!(!found.remedy.is_empty(), "{found}");
        }
        assert_eq!(refusals.len(), all.len(), "{refusals:?}");
    }
    drop(outside);
}
