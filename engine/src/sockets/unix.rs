//! Local sockets (unix(7)): listening, bound, not connected, and pairs whose two ends are in the tree.
//!
//! A pair is made by socketpair(2). Its ends may be of different tasks, and one of them may be closed already.

use std::os::fd::BorrowedFd;

use super::diag::UnixSocket;
use super::options::{collect_options, restore_options, widen_send_buffer};
use super::queue::restore_queue;
use super::state;
use crate::files::Problem;
use crate::files::fdinfo::FdInfo;
use crate::files::names::Stay;
use crate::files::session::{Done, Session, SessionError, Temporary};
use crate::images::fown::FownEntry;
use crate::images::sockets::SkShutdown;
use crate::images::unix::{FilePermsEntry, UnixSkEntry};
use crate::sys::sockopt;

const O_NONBLOCK: u32 = libc::O_NONBLOCK as u32;
/// Where the name begins in `struct sockaddr_un`, and how long it may be.
const PATH: usize = 2;
const PATH_MAX: usize = 108;

/// The file that a name leads to, when it is the one that the socket was bound to.
pub struct SocketFile {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// The directory that a relative name was resolved in.
    pub directory: Option<Vec<u8>>,
}

/// Finds the file of a name: inode's lower half and device as [`UnixSocket::file`] has them.
pub type FindFile<'a> = dyn Fn(&[u8], (u32, u32)) -> Option<SocketFile> + 'a;

/// Reads a socket.
pub fn collect_unix(
    id: u32,
    inode: u32,
    socket: UnixSocket,
    info: &FdInfo<'_>,
    fd: BorrowedFd<'_>,
    fown: FownEntry,
    find_file: &FindFile<'_>,
) -> Result<UnixSkEntry, Problem> {
    let kind =
        sockopt::number(fd, libc::SOL_SOCKET, libc::SO_TYPE).map_err(|errno| Problem::unreadable("its type", errno))?;
    let address = sockopt::address(fd, false).map_err(|errno| Problem::unreadable("its name", errno))?;
    let name = address.get(PATH..).unwrap_or_default().to_vec();
    let mut entry = UnixSkEntry {
        id,
        ino: inode,
        r#type: kind as u32,
        state: socket.state,
        flags: info.flags,
        backlog: socket.backlog,
        peer: socket.peer,
        fown,
        opts: collect_options(fd, libc::AF_UNIX)?,
        name,
        ..UnixSkEntry::default()
    };
    entry.shutdown = (socket.shut != 0).then_some(socket.shut as i32);
    let connected = socket.state == state::ESTABLISHED;
    if socket.state == state::LISTEN && socket.waiting > 0 {
        return Err(Problem::new(
            format!("{} connections wait to be accepted", socket.waiting),
            "try again when the program has accepted them",
        ));
    }
    if connected && !entry.name.is_empty() {
        return Err(Problem::new(
            "a connection through a named local socket, which cannot be saved yet",
            "have the program or its peer close the connection before the checkpoint",
        ));
    }
    if connected && socket.peer == 0 && socket.shut != SkShutdown::Both as u32 {
        return Err(Problem::new(
            "a connection that its listener has not accepted yet",
            "try again when the program has accepted it",
        ));
    }
    if let Some(file) = socket.file.filter(|_| !connected && entry.name.first().is_some_and(|byte| *byte != 0)) {
        let name: Vec<u8> = entry.name.iter().copied().take_while(|byte| *byte != 0).collect();
        match find_file(&name, file) {
            Some(SocketFile { mode, uid, gid, directory }) => {
                entry.file_perms = Some(FilePermsEntry { mode, uid, gid });
                entry.name_dir = directory;
            }
            None if name.starts_with(b"/") => {
                entry.deleted = Some(true);
                entry.file_perms = Some(FilePermsEntry { mode: libc::S_IFSOCK | 0o755, uid: 0, gid: 0 });
            }
            None => {
                return Err(Problem::new(
                    "its file is not in the program's working directory, to which its name is relative",
                    "have the program bind it by an absolute name",
                ));
            }
        }
    }
    Ok(entry)
}

/// Mark of a connection by which its holder asked for the dump that it is in (`uflags`).
const ASKED_FOR_DUMP: u32 = 1 << 1;

/// What is in such a connection when it is restored: CRIU's answer that the dump succeeded (type 1, success, `restored`).
const RESTORED: [u8; 8] = [0x08, 0x01, 0x10, 0x01, 0x1a, 0x02, 0x08, 0x01];

/// Makes of a connection to the one who dumps a socket that has the answer in it when it is restored.
pub fn expect_answer(entry: &mut UnixSkEntry) {
    (entry.state, entry.peer, entry.uflags) = (state::CLOSE, 0, entry.uflags | ASKED_FOR_DUMP);
}

/// Whether an entry can be used at all.
pub fn is_whole(entry: &UnixSkEntry) -> bool {
    entry.name.len() <= PATH_MAX && entry.name_dir.as_ref().is_none_or(|path| !path.contains(&0))
}

/// Whether the socket is one end of a pair, or was.
pub fn is_connected(entry: &UnixSkEntry) -> bool {
    entry.state == state::ESTABLISHED
}

/// Whether it is a stream, whose packets have no bounds.
pub fn is_stream(entry: &UnixSkEntry) -> bool {
    entry.r#type == libc::SOCK_STREAM as u32
}

/// Why a socket cannot be restored, if so.
pub fn obstacle(entry: &UnixSkEntry) -> Option<&'static str> {
    match entry.state {
        state::ESTABLISHED if !entry.name.is_empty() => {
            Some("connections through named local sockets cannot be restored yet")
        }
        state::ESTABLISHED | state::CLOSE | state::LISTEN => match entry.peer {
            0 => None,
            _ if is_connected(entry) => None,
            _ => Some(
                "a local socket that is not connected has a peer: the images are of a kind that ferry does not know",
            ),
        },
        _ => Some("local sockets in this state cannot be restored yet"),
    }
}

fn type_and_flags(entry: &UnixSkEntry, cloexec: bool) -> u64 {
    let cloexec = if cloexec { libc::SOCK_CLOEXEC as u32 } else { 0 };
    (entry.r#type | entry.flags & O_NONBLOCK | cloexec).into()
}

/// Makes a socket that is not connected; binds it, and has it listen, as it was.
pub fn restore_single(session: &mut Session<'_>, entry: &UnixSkEntry, cloexec: bool) -> Done<Temporary> {
    if entry.uflags & ASKED_FOR_DUMP != 0 {
        let [asked, answered] = restore_pair(session, End { entry, packets: &[RESTORED.to_vec()], cloexec }, None)?;
        session.close(answered)?;
        return Ok(asked);
    }
    let arguments = [libc::AF_UNIX as u64, type_and_flags(entry, cloexec), 0];
    let socket = session.make("make it", libc::SYS_socket, &arguments, &[], &[])?;
    restore_options(session, socket, &entry.opts)?;
    if !entry.name.is_empty() {
        bind(session, socket, entry)?;
    }
    if entry.state == state::LISTEN {
        session.must("have it listen", libc::SYS_listen, &[socket.number().into(), entry.backlog.into()])?;
    }
    shut(session, socket, entry)?;
    Ok(socket)
}

/// The file that binding the socket makes, and how long it stays. None for a socket without.
pub(crate) fn bound_file(entry: &UnixSkEntry) -> Option<(Vec<u8>, Stay)> {
    if is_connected(entry) || entry.name.first().is_none_or(|byte| *byte == 0) {
        return None;
    }
    let name = entry.name.iter().copied().take_while(|byte| *byte != 0);
    let folder = entry.name_dir.iter().flat_map(|folder| folder.iter().copied().chain([b'/']));
    let path = if entry.name[0] == b'/' { name.collect() } else { folder.chain(name).collect() };
    let stay = if entry.deleted == Some(true) { Stay::Passing } else { Stay::Lasting };
    Some((path, stay))
}

fn bind(session: &mut Session<'_>, socket: Temporary, entry: &UnixSkEntry) -> Done {
    let address = [&(libc::AF_UNIX as u16).to_ne_bytes()[..], &entry.name].concat();
    let before = [socket.number().into()];
    let call = |session: &mut Session<'_>| {
        session.must_around("bind it", libc::SYS_bind, &before, &address, &[address.len() as u64])
    };
    if entry.name[0] == 0 {
        return call(session);
    }
    let name: Vec<u8> = entry.name.iter().copied().take_while(|byte| *byte != 0).chain([0]).collect();
    let here = match &entry.name_dir {
        Some(directory) => {
            let here = session.open(b".", (libc::O_PATH | libc::O_DIRECTORY) as u32)?;
            session.must_with("enter its directory", libc::SYS_chdir, &[], &[directory, &[0][..]].concat())?;
            Some(here)
        }
        None => None,
    };
    remove_old_file(session, &name)?;
    call(session)?;
    let at = libc::AT_FDCWD as u64;
    if let Some(FilePermsEntry { mode, uid, gid }) = &entry.file_perms {
        session.must_around(
            "set its file's owner",
            libc::SYS_fchownat,
            &[at],
            &name,
            &[(*uid).into(), (*gid).into(), libc::AT_SYMLINK_NOFOLLOW as u64],
        )?;
        session.must_around("set its file's mode", libc::SYS_fchmodat, &[at], &name, &[u64::from(mode & 0o7777)])?;
    }
    if entry.deleted == Some(true) {
        session.must_around("remove its file", libc::SYS_unlinkat, &[at], &name, &[0])?;
    }
    if let Some(here) = here {
        session.must("leave its directory", libc::SYS_fchdir, &[here.number().into()])?;
        session.close(here)?;
    }
    Ok(())
}

/// Removes what the socket left at its name when it was saved; anything but a socket stays, and is an error.
fn remove_old_file(session: &mut Session<'_>, name: &[u8]) -> Done {
    let at = libc::AT_FDCWD as u64;
    let stat = session.try_ask(
        libc::SYS_newfstatat,
        &[at],
        name,
        size_of::<libc::stat>(),
        &[libc::AT_SYMLINK_NOFOLLOW as u64],
    )?;
    let Some(stat) = stat else { return Ok(()) };
    let at_mode = std::mem::offset_of!(libc::stat, st_mode);
    let mode = stat.get(at_mode..at_mode + 4).map_or(0, |mode| u32::from_ne_bytes(mode.try_into().unwrap_or_default()));
    if mode & libc::S_IFMT != libc::S_IFSOCK {
        return Err(SessionError::Changed {
            id: session.id(),
            problem: format!(
                "another file has the name that it was bound to, {}: move that file away",
                String::from_utf8_lossy(&name[..name.len() - 1])
            ),
        });
    }
    session.must_around("remove its old file", libc::SYS_unlinkat, &[at], name, &[0])
}

fn shut(session: &mut Session<'_>, socket: Temporary, entry: &UnixSkEntry) -> Done {
    match entry.shutdown.filter(|how| (1..=3).contains(how)) {
        // shutdown(2) counts from 0.
        Some(how) => session.must("shut it", libc::SYS_shutdown, &[socket.number().into(), how as u64 - 1]),
        None => Ok(()),
    }
}

/// One end of a pair: its record, and what waits in its receive queue.
pub struct End<'a> {
    pub entry: &'a UnixSkEntry,
    pub packets: &'a [Vec<u8>],
    pub cloexec: bool,
}

/// Makes a pair with what waits in both ends; an end that is closed is made too, for the caller to close.
pub fn restore_pair(session: &mut Session<'_>, first: End<'_>, second: Option<End<'_>>) -> Done<[Temporary; 2]> {
    let kind = u64::from(first.entry.r#type);
    let ends = session.pair("make it", libc::SYS_socketpair, &[libc::AF_UNIX as u64, kind, 0], &[])?;
    for end in ends {
        widen_send_buffer(session, end)?;
    }
    let stream = is_stream(first.entry);
    restore_queue(session, ends[1], stream, first.packets)?;
    if let Some(second) = &second {
        restore_queue(session, ends[0], stream, second.packets)?;
    }
    for (end, socket) in [Some(first), second].into_iter().zip(ends) {
        let Some(End { entry, cloexec, .. }) = end else { continue };
        session.about(entry.id);
        restore_options(session, socket, &entry.opts)?;
        if entry.flags & O_NONBLOCK != 0 {
            session.set_flags(socket, O_NONBLOCK)?;
        }
        if cloexec {
            session.set_cloexec(socket, true)?;
        }
        // An end whose other end is closed is shut by the closing.
        if entry.peer != 0 {
            shut(session, socket, entry)?;
        }
    }
    Ok(ends)
}
