//! What a restore tells the daemon that brings the pages, byte for byte as CRIU 4.2 does.
//!
//! Over a stream socket of the name [`SOCKET`] in the work folder, for each process of the tree in any order: 32 bits, its pid as the
//! images have it, or that pid negated if it has exited; for one that lives, one byte that carries its userfaultfd (`SCM_RIGHTS`).
//! When no process has to wait for the restore any more, 32 bits, [`FINISHED`].
//!
//! Who may be ended if pages cannot be brought is not told by CRIU. Its tasks send their descriptors themselves, so the kernel says
//! who they are (`SCM_CREDENTIALS`, unix(7)); ferry says it in the same way for them. CRIU's daemon does not see that.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, UCred,
    recvmsg, sendmsg, sockopt,
};

use crate::sys::{HostPid, NsPid};

/// The name of the socket.
pub const SOCKET: &str = "lazy-pages.socket";
/// All processes run.
const FINISHED: u32 = 0x5253_5446;

/// The way from a restore to the daemon.
#[derive(Debug)]
pub struct Daemon(UnixStream);

impl Daemon {
    /// Connects to the daemon whose socket is in `folder`.
    ///
    /// # Errors
    /// Those of connect(2): there is none.
    pub fn connect(folder: &Path) -> io::Result<Self> {
        let (path, _open) = short_path(folder)?;
        UnixStream::connect(path).map(Self)
    }

    /// Tells of a process that has exited.
    ///
    /// # Errors
    /// The daemon is gone.
    pub fn exited(&self, pid: NsPid) -> io::Result<()> {
        (&self.0).write_all(&(-pid.0).to_ne_bytes())
    }

    /// Hands over the userfaultfd of a process.
    ///
    /// # Errors
    /// The daemon is gone.
    pub fn hand_over(&self, pid: NsPid, host: HostPid, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        (&self.0).write_all(&pid.0.to_ne_bytes())?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1), ScmCredentials(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        let process = rustix::process::Pid::from_raw(host.0).ok_or(io::ErrorKind::InvalidInput)?;
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        let told = control.push(SendAncillaryMessage::ScmRights(&descriptors))
            && control.push(SendAncillaryMessage::ScmCredentials(UCred { pid: process, uid, gid }));
        if !told {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        sendmsg(&self.0, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Tells that all processes run.
    ///
    /// # Errors
    /// The daemon is gone.
    pub fn finished(&self) -> io::Result<()> {
        (&self.0).write_all(&FINISHED.to_ne_bytes())
    }
}

/// What a restore tells of one process.
#[derive(Debug)]
pub enum Told {
    /// It has exited.
    Exited,
    /// It lives.
    Process {
        /// Its pid in the images.
        pid: u32,
        /// Which process it is, if the kernel says so.
        host: Option<HostPid>,
        /// Its userfaultfd.
        descriptor: OwnedFd,
    },
}

/// The socket in `folder`, however long the path of that is: addresses have 108 bytes (unix(7)).
fn short_path(folder: &Path) -> io::Result<(PathBuf, OwnedFd)> {
    let folder = open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok((PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd())), folder))
}

/// Makes the socket in `folder`, in place of an earlier one.
///
/// # Errors
/// The name cannot be had.
pub fn listen(folder: &Path) -> io::Result<UnixListener> {
    let (path, _open) = short_path(folder)?;
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    sockopt::set_socket_passcred(&listener, true)?;
    Ok(listener)
}

/// Hears of the next process.
///
/// # Errors
/// The restore is gone, or speaks otherwise.
pub fn receive(restore: &UnixStream) -> io::Result<Told> {
    let mut number = [0; 4];
    let mut stream = restore;
    stream.read_exact(&mut number)?;
    let number = i32::from_ne_bytes(number);
    if number <= 0 {
        return Ok(Told::Exited);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(restore, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let (mut descriptor, mut host) = (None, None);
    for message in control.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptor = descriptors.next(),
            RecvAncillaryMessage::ScmCredentials(said) => host = Some(HostPid(said.pid.as_raw_nonzero().get())),
            _ => {}
        }
    }
    match descriptor {
        Some(descriptor) if received.bytes == 1 => Ok(Told::Process { pid: number as u32, host, descriptor }),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("pid {number} comes without its userfaultfd"))),
    }
}

/// Whether the restore says that all processes run; to be asked when there is something to read.
///
/// # Errors
/// It is gone, or says something else.
pub fn hear_end(restore: &UnixStream) -> io::Result<()> {
    let mut number = [0; 4];
    let mut stream = restore;
    stream.read_exact(&mut number)?;
    match u32::from_ne_bytes(number) {
        FINISHED => Ok(()),
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("it says {other:#x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_arrive_with_who_they_are_of() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("x".repeat(200));
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join(SOCKET), "an earlier one").unwrap();
        let listener = listen(&folder).unwrap();
        let daemon = Daemon::connect(&folder).unwrap();
        let me = HostPid(std::process::id() as i32);
        let (read, _write) = std::io::pipe().unwrap();
        daemon.exited(NsPid(7)).unwrap();
        daemon.hand_over(NsPid(8), me, read.as_fd()).unwrap();
        daemon.finished().unwrap();
        let restore = listener.accept().unwrap().0;
        assert!(matches!(receive(&restore).unwrap(), Told::Exited));
        let Told::Process { pid, host, descriptor } = receive(&restore).unwrap() else { panic!("it lives") };
        assert_eq!((pid, host), (8, Some(me)));
        let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_eq!(inode(descriptor.as_fd()), inode(read.as_fd()));
        hear_end(&restore).unwrap();
        drop(daemon);
        assert!(receive(&restore).is_err());
    }
}
