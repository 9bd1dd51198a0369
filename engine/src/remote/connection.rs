//! The connection between a dump and a page server: made, accepted or inherited, and never waited for without end.
//!
//! A peer that is silent must not hold up a tree that stands still, nor a command that is to end: every wait is looked at in between
//! (`TICK`), and one end gives up when the other neither takes nor sends anything for a while. Writing to a connection
//! that is closed makes no signal.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::cancel::Cancel;

/// How long connecting to one address may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a dump waits for a server that neither takes bytes nor answers.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often somebody who waits looks whether to go on.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    peer: String,
    cancel: Cancel,
    patience: Option<Duration>,
}

impl Connection {
    /// Connects to a page server. The connection is given up when `cancel` says so, or when the server is silent for too long.
    ///
    /// # Errors
    /// The last address's, if it has several.
    pub fn open(host: &str, port: u16, cancel: Cancel) -> io::Result<Self> {
        let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (host, port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(stream) => {
                    // What is to be sent together is gathered before it is sent.
                    stream.set_nodelay(true)?;
                    return Ok(Self::over(stream.into(), address.to_string(), cancel));
                }
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// Uses a socket that somebody else has connected to a page server; `peer` names it for people.
    pub fn over(socket: OwnedFd, peer: String, cancel: Cancel) -> Self {
        Self { socket, peer, cancel, patience: Some(PATIENCE) }
    }

    /// Uses a socket whose other end is a dump, which may be silent for as long as it likes.
    pub fn from_dump(socket: OwnedFd, peer: String, cancel: Cancel) -> Self {
        // A host that vanished is noticed in the end. Other sockets than TCP have no need of it.
        let _ = rustix::net::sockopt::set_socket_keepalive(&socket, true);
        Self { socket, peer, cancel, patience: None }
    }

    /// Who is at the other end, for people.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Waits until the peer ends the connection, but not for long: whoever connected is to be the one who ends it, as its end of a
    /// TCP connection is the one that stays reserved for a while.
    pub fn await_end(&mut self) {
        const LONG: Duration = Duration::from_secs(5);
        self.patience = Some(LONG);
        let _ = self.read(&mut [0]);
    }

    /// Runs a call that would wait, until it need not.
    fn patiently(&self, ready: PollFlags, mut call: impl FnMut() -> Result<usize, Errno>) -> io::Result<usize> {
        let start = Instant::now();
        loop {
            self.cancel.check().map_err(io::Error::other)?;
            match call() {
                Err(Errno::AGAIN) => {}
                Err(Errno::INTR) => continue,
                other => return Ok(other?),
            }
            if self.patience.is_some_and(|patience| start.elapsed() > patience) {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it is silent, and was for half a minute"));
            }
            wait(&self.socket, ready)?;
        }
    }
}

/// Waits for one tick at most.
fn wait(socket: &OwnedFd, ready: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(socket, ready)], Some(&TICK)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

impl Read for &Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.patiently(PollFlags::IN, || recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT).map(|(read, _)| read))
    }
}

impl Write for &Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.patiently(PollFlags::OUT, || send(&self.socket, buffer, SendFlags::DONTWAIT | SendFlags::NOSIGNAL))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket to which one dump connects.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
}

impl Listener {
    /// Listens at an address, every one of this host if there is none, and at a port, any one if it is 0.
    ///
    /// # Errors
    /// Those of finding the address, and of bind(2).
    pub fn open(host: Option<&str>, port: u16) -> io::Result<Self> {
        let listener = match host {
            Some(host) => TcpListener::bind((host, port))?,
            None => TcpListener::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), port))?,
        };
        Ok(Self { listener })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits for the dump. Nobody else can connect then.
    ///
    /// # Errors
    /// That `cancel` says so, and those of accept(2).
    pub fn accept(self, cancel: Cancel) -> io::Result<Connection> {
        self.listener.set_nonblocking(true)?;
        loop {
            cancel.check().map_err(io::Error::other)?;
            match self.listener.accept() {
                Ok((stream, address)) => {
                    stream.set_nodelay(true)?;
                    return Ok(Connection::from_dump(stream.into(), address.to_string(), cancel));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let ready = &mut [PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN)];
                    if let Err(errno) = poll(ready, Some(&TICK))
                        && errno != Errno::INTR
                    {
                        return Err(errno.into());
                    }
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl From<OwnedFd> for Listener {
    fn from(socket: OwnedFd) -> Self {
        Self { listener: socket.into() }
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        listener.listener.into()
    }
}
