//! The terminal of a container's process: who gets its master side, and passing bytes through it.
//!
//! libcontainer opens the pseudoterminal inside the container and sends the master side over a Unix socket: to the
//! caller's `--console-socket` when ferry detaches, or to ferry itself, which then stands between the caller's
//! terminal and the container's.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

/// How long the last output may take to arrive after the process has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// Why a process cannot have the terminal it asks for.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Nobody would hold the master side.
    #[error("cannot allocate tty if ferry will detach without setting console socket: give --console-socket")]
    NoSocket,
    /// There would be nothing to send.
    #[error("cannot use console socket if ferry will not detach or allocate tty")]
    NoTerminal,
    /// The caller's socket cannot be used.
    #[error("cannot connect to the socket {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The socket between ferry and the container failed.
    #[error("cannot pass the terminal on")]
    Pass(#[from] io::Error),
}

impl From<rustix::io::Errno> for ConsoleError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Pass(error.into())
    }
}

/// Where the master side goes.
#[derive(Debug)]
pub enum Console {
    /// The process has no terminal.
    None,
    /// To the caller.
    Caller(UnixStream),
    /// To ferry: what is written to the first socket is read from the second.
    Here(UnixStream, UnixStream),
}

impl Console {
    /// Decides from what the config asks for and what the caller gave; the rules are runc's.
    ///
    /// # Errors
    /// When these do not fit together, or the socket cannot be reached.
    pub fn open(wanted: bool, detached: bool, socket: Option<&Path>) -> Result<Self, ConsoleError> {
        match (wanted, detached, socket) {
            (true, true, None) => Err(ConsoleError::NoSocket),
            (false, _, Some(_)) | (true, false, Some(_)) => Err(ConsoleError::NoTerminal),
            (false, _, None) => Ok(Self::None),
            (true, true, Some(path)) => Ok(Self::Caller(connect(path)?)),
            (true, false, None) => {
                let (container, here) = UnixStream::pair()?;
                Ok(Self::Here(container, here))
            }
        }
    }

    /// The socket that the container sends to.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::None => None,
            Self::Caller(socket) | Self::Here(socket, _) => Some(socket.as_fd()),
        }
    }

    /// Sends the master side of a terminal that was made again, as the container sends that of a new one.
    ///
    /// # Errors
    /// When nobody takes it.
    pub fn pass(&self, master: &OwnedFd) -> Result<(), ConsoleError> {
        self.socket().map_or(Ok(()), |socket| send(socket, b"/dev/ptmx", master.as_fd()))
    }

    /// Receives the master side, once the process has been created, if it comes to ferry.
    ///
    /// # Errors
    /// When the container has not sent it.
    pub fn terminal(self) -> Result<Option<Terminal>, ConsoleError> {
        let Self::Here(container, here) = self else { return Ok(None) };
        drop(container);
        let master = receive(&here)?;
        Ok(Some(Terminal { master: File::from(master) }))
    }
}

fn connect(path: &Path) -> Result<UnixStream, ConsoleError> {
    UnixStream::connect(path).map_err(|source| ConsoleError::Connect { path: path.to_owned(), source })
}

fn receive(socket: &UnixStream) -> Result<OwnedFd, ConsoleError> {
    let mut name = [0; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(socket, &mut [IoSliceMut::new(&mut name)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message
            && let Some(descriptor) = descriptors.next()
        {
            return Ok(descriptor);
        }
    }
    Err(ConsoleError::Pass(io::Error::other("the container sent no descriptor")))
}

/// Sends a pidfd of `pid` to the socket at `path`, with the name `pidfd` as runc does.
///
/// # Errors
/// When the socket cannot be reached, or the process is gone.
pub fn send_pidfd(path: &Path, pid: i32) -> Result<(), ConsoleError> {
    let socket = connect(path)?;
    let pid = rustix::process::Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    send(socket.as_fd(), b"pidfd", pidfd.as_fd())
}

/// Sends a descriptor with a name.
fn send(socket: BorrowedFd<'_>, name: &[u8], descriptor: BorrowedFd<'_>) -> Result<(), ConsoleError> {
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(socket, &[IoSlice::new(name)], &mut ancillary, SendFlags::empty())?;
    Ok(())
}

/// The master side of a container's terminal, held by ferry.
#[derive(Debug)]
pub struct Terminal {
    master: File,
}

impl Terminal {
    /// Begins to pass bytes between ferry's standard streams and the terminal.
    pub fn relay(self) -> Relay {
        let callers = Caller::take_over();
        let (done, output_done) = mpsc::channel();
        if let (Ok(to_container), Ok(from_container)) = (self.master.try_clone(), self.master.try_clone()) {
            thread::spawn(move || copy(io::stdin(), to_container));
            thread::spawn(move || {
                copy(from_container, io::stdout());
                let _ = done.send(());
            });
        }
        let relay = Relay { master: self.master, callers, output_done };
        relay.resize();
        relay
    }
}

/// Bytes going both ways, until `finish`.
#[derive(Debug)]
pub struct Relay {
    master: File,
    callers: Option<Caller>,
    output_done: mpsc::Receiver<()>,
}

impl Relay {
    /// Gives the container's terminal the size of the caller's.
    pub fn resize(&self) {
        if let Ok(size) = tcgetwinsize(io::stdin()) {
            let _ = tcsetwinsize(&self.master, size);
        }
    }

    /// Waits for the last output, and gives the caller's terminal back as it was.
    pub fn finish(self) {
        let _ = self.output_done.recv_timeout(LAST_OUTPUT);
        drop(self.callers);
    }
}

/// The caller's terminal in raw mode; as it was when dropped.
#[derive(Debug)]
struct Caller(Termios);

impl Caller {
    fn take_over() -> Option<Self> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return None;
        }
        let found = tcgetattr(&stdin).ok()?;
        let mut raw = found.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Drain, &raw).ok()?;
        Some(Self(found))
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Until either side ends. Reading a master whose slave side is closed everywhere is EIO (pty(7)).
fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 8192];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
