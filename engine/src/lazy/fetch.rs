//! Asking a page server for pages ([`crate::remote::protocol`]).

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use rustix::net::sockopt;

use crate::remote::protocol::{Command, GotPages, HEADER, Pages, ProtocolError, TAKEN, read_header};
use crate::sys::PAGE_SIZE;

/// How long an answer may take. A page server only reads memory.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why no pages came.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum FetchError {
    /// The connection broke.
    #[error("the page server {peer} cannot be heard any more: {source}")]
    Connection { peer: String, source: io::Error },
    /// It is no page server.
    #[error("the page server {peer} is not understood: {source}")]
    Protocol { peer: String, source: ProtocolError },
    /// It does not have them.
    #[error("the page server {peer} has no page at {address:x} of pid {pid}: is it one of the same dump?")]
    Lacking { peer: String, pid: u32, address: u64 },
}

/// A connection to a page server.
#[derive(Debug)]
pub struct PageServer {
    stream: TcpStream,
    peer: String,
    buffer: Vec<u8>,
}

impl PageServer {
    /// Takes over a connection.
    ///
    /// # Errors
    /// It is none.
    pub fn new(stream: TcpStream) -> Result<Self, FetchError> {
        let peer = stream.peer_addr().map_or_else(|_| "behind the socket given".to_owned(), |peer| peer.to_string());
        let server = Self { stream, peer, buffer: Vec::new() };
        server.prepare().map_err(|source| server.broken(source))?;
        Ok(server)
    }

    fn prepare(&self) -> io::Result<()> {
        self.stream.set_read_timeout(Some(PATIENCE))?;
        self.stream.set_write_timeout(Some(PATIENCE))?;
        keep_alive(&self.stream);
        Ok(())
    }

    fn broken(&self, source: io::Error) -> FetchError {
        let source = match source.kind() {
            io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "it does not answer"),
            _ => source,
        };
        FetchError::Connection { peer: self.peer.clone(), source }
    }

    /// Pages at `address` of a process: one at least, and at most `length` bytes.
    ///
    /// # Errors
    /// [`FetchError`].
    pub fn get(&mut self, pid: u32, address: u64, length: u64) -> Result<&[u8], FetchError> {
        let wrong = |source| FetchError::Protocol { peer: self.peer.clone(), source };
        let asked = Pages::new(address, length / PAGE_SIZE).map_err(wrong)?;
        let ask = || -> io::Result<[u8; HEADER]> {
            (&self.stream).write_all(&Command::Get { pid, pages: asked }.encode())?;
            read_header(&mut &self.stream)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        };
        let header = ask().map_err(|error| self.broken(error))?;
        let got = GotPages::decode(&header, pid, asked).map_err(wrong)?;
        let Some(pages) = got.pages else {
            return Err(FetchError::Lacking { peer: self.peer.clone(), pid, address });
        };
        // No more than was asked for, as the decoding has it.
        self.buffer.resize(pages.bytes() as usize, 0);
        let read = (&self.stream).read_exact(&mut self.buffer);
        read.map_err(|error| self.broken(error))?;
        Ok(&self.buffer)
    }

    /// Says that all has been taken. Only then the tree may be ended where it comes from.
    ///
    /// # Errors
    /// [`FetchError::Connection`].
    pub fn close(self) -> Result<(), FetchError> {
        let mut status = TAKEN;
        (&self.stream)
            .write_all(&Command::Close.encode())
            .and_then(|()| (&self.stream).read_exact(&mut status))
            .map_err(|error| self.broken(error))
    }
}

/// Has the kernel notice within a minute that the other machine is gone.
pub(super) fn keep_alive(stream: &TcpStream) {
    let set = || -> rustix::io::Result<()> {
        sockopt::set_socket_keepalive(stream, true)?;
        sockopt::set_tcp_keepidle(stream, Duration::from_secs(20))?;
        sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10))?;
        sockopt::set_tcp_keepcnt(stream, 4)?;
        sockopt::set_tcp_nodelay(stream, true)
    };
    // A socket that knows none of it is none of TCP.
    let _ = set();
}
