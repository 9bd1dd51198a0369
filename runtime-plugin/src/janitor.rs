//! A second process that takes away what a restore leaves when ferry is killed.
//!
//! A restore that fails undoes by itself what it has made. One that is killed (SIGKILL, or a signal that ends it) cannot; the
//! kernel then ends the tasks (engine/src/restore/live.rs), and everything else is the janitor's: it is told of each thing
//! before that is made, sleeps until ferry is gone or dismisses it, and takes away what it was told of. Its own death changes
//! nothing but that.
//!
//! It is ferry's child and not its parent, so that a restored root can be a sibling of ferry's (`CLONE_PARENT`) and has the
//! caller's process for a parent. It has a session of its own: what ends ferry's process group does not meet it.
#![allow(unsafe_code, reason = "fork(2); it says why it is sound")]

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ferry_engine::files::{NameJournal, NewName};
use ferry_engine::procfs;
use ferry_engine::sys::{HostPid, pidfd};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, setsid};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, Mode, OFlags, open, statat, unlinkat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// How long tasks that were killed may take to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest message: a name, and the numbers before it.
const MESSAGE: usize = 512;

/// What is behind a name that is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file, or anything but a directory.
    File,
    /// A directory, if it is empty.
    Directory,
    /// A directory with all that is in it.
    Tree,
}

/// Something that a restore makes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Note {
    /// A folder, which comes as a descriptor, has this number from now on.
    Folder(u64),
    /// A name in a folder; if a number follows, only while it is that inode's.
    Name { folder: u64, kind: Kind, inode: Option<u64>, name: OsString },
    /// The last name was not given.
    Withdrawn,
    /// The root of the tree.
    Root(HostPid),
    /// One of the caller's steps.
    Step(u64),
    /// All is well: nothing is to go.
    Dismissed,
}

impl Note {
    fn encode(&self) -> Vec<u8> {
        let (tag, numbers, name): (u8, Vec<u64>, &[u8]) = match self {
            Self::Folder(number) => (0, vec![*number], &[]),
            Self::Name { folder, kind, inode, name } => {
                (1, vec![*folder, *kind as u64, inode.unwrap_or(0)], name.as_bytes())
            }
            Self::Withdrawn => (2, vec![], &[]),
            Self::Root(pid) => (3, vec![pid.0 as u64], &[]),
            Self::Step(step) => (4, vec![*step], &[]),
            Self::Dismissed => (5, vec![], &[]),
        };
        let numbers = numbers.iter().flat_map(|number| number.to_ne_bytes());
        [tag].into_iter().chain(numbers).chain(name.iter().copied()).collect()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (tag, rest) = bytes.split_first()?;
        let number = |index: usize| Some(u64::from_ne_bytes(rest.get(8 * index..8 * index + 8)?.try_into().ok()?));
        Some(match tag {
            0 => Self::Folder(number(0)?),
            1 => Self::Name {
                folder: number(0)?,
                kind: [Kind::File, Kind::Directory, Kind::Tree]
                    .into_iter()
                    .find(|kind| Some(*kind as u64) == number(1))?,
                inode: number(2).filter(|inode| *inode != 0),
                name: OsString::from_vec(rest.get(24..)?.to_vec()),
            },
            2 => Self::Withdrawn,
            3 => Self::Root(HostPid(i32::try_from(number(0)?).ok()?)),
            4 => Self::Step(number(0)?),
            5 => Self::Dismissed,
            _ => return None,
        })
    }
}

/// Ferry's side. When it is dropped, ferry has either succeeded or taken everything away itself: the janitor goes.
#[derive(Debug)]
pub struct Janitor {
    line: Rc<Line>,
    process: Pid,
}

/// The way to the janitor.
#[derive(Debug)]
struct Line {
    socket: OwnedFd,
    folders: std::cell::Cell<u64>,
}

impl Line {
    fn tell(&self, note: &Note, folder: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = note.encode();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let folders: Vec<BorrowedFd<'_>> = folder.into_iter().collect();
        if !folders.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&folders)) {
            return Err(Errno::NOBUFS.into());
        }
        let sent = sendmsg(&self.socket, &[io::IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
        match sent {
            // Without a janitor ferry is no worse off than before; it is only not to be killed.
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// A number for a folder, by which names in it are told.
    fn folder(&self, folder: BorrowedFd<'_>) -> io::Result<u64> {
        let number = self.folders.get();
        self.folders.set(number + 1);
        self.tell(&Note::Folder(number), Some(folder))?;
        Ok(number)
    }
}

impl Janitor {
    /// Starts one. When ferry is killed, `finish` is run with the steps that were told, after the tree has ended and before
    /// names go; what it returns, after that.
    ///
    /// # Errors
    /// When there can be no process.
    pub fn hire<After: FnOnce()>(finish: impl FnOnce(&HashSet<u64>) -> After) -> io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let ferry = pidfd::open(HostPid(Pid::this().as_raw()))?;
        // SAFETY: a command of ferry has one thread until the engine works, so the child may do whatever ferry may.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                Ok(Self { line: Rc::new(Line { socket: ours, folders: 0.into() }), process: child })
            }
            ForkResult::Child => {
                drop(ours);
                let status = i32::from(keep_watch(&theirs, &ferry, finish).is_err());
                // SAFETY: ends this process without running what ferry would run at its exit.
                unsafe { libc::_exit(status) }
            }
        }
    }

    /// One of the caller's own steps is about to be done.
    ///
    /// # Errors
    /// When the janitor cannot be told.
    #[cfg_attr(not(feature = "oci"), allow(dead_code, reason = "CRIU's commands have no steps of their own"))]
    pub fn step(&self, step: u64) -> io::Result<()> {
        self.line.tell(&Note::Step(step), None)
    }

    /// The root of the tree exists.
    ///
    /// # Errors
    /// When the janitor cannot be told.
    pub fn root(&self, pid: HostPid) -> io::Result<()> {
        self.line.tell(&Note::Root(pid), None)
    }

    /// A path, free so far, is about to be given; with an inode's number, to nothing but that. Its folder exists.
    ///
    /// # Errors
    /// When the folder cannot be opened, or the janitor not be told.
    pub fn path(&self, path: &Path, kind: Kind, inode: Option<u64>) -> io::Result<()> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        self.name(folder.as_fd(), &name, kind, inode)
    }

    /// As [`Self::path`], in a folder that is open.
    ///
    /// # Errors
    /// When the janitor cannot be told.
    pub fn name(&self, folder: BorrowedFd<'_>, name: &OsStr, kind: Kind, inode: Option<u64>) -> io::Result<()> {
        let folder = self.line.folder(folder)?;
        self.line.tell(&Note::Name { folder, kind, inode, name: name.to_owned() }, None)
    }

    /// Keeps the engine's names.
    pub fn journal(&self) -> Box<dyn NameJournal> {
        Box::new(EngineNames { line: Rc::clone(&self.line), folders: HashMap::new() })
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        let told = self.line.tell(&Note::Dismissed, None);
        if let Err(error) = told.and_then(|()| waitpid(self.process, None).map(drop).map_err(Into::into)) {
            tracing::debug!(%error, "the process that watches over the restore does not go");
        }
    }
}

struct EngineNames {
    line: Rc<Line>,
    /// The janitor's numbers of the engine's folders.
    folders: HashMap<usize, u64>,
}

impl NameJournal for EngineNames {
    fn coming(&mut self, name: NewName<'_>) -> io::Result<()> {
        let folder = match self.folders.get(&name.folder_number) {
            Some(known) => *known,
            None => {
                let number = self.line.folder(name.folder)?;
                self.folders.insert(name.folder_number, number);
                number
            }
        };
        let kind = if name.is_directory { Kind::Directory } else { Kind::File };
        let name = OsStr::from_bytes(name.name).to_owned();
        self.line.tell(&Note::Name { folder, kind, inode: None, name }, None)
    }

    fn withdrawn(&mut self) -> io::Result<()> {
        self.line.tell(&Note::Withdrawn, None)
    }
}

/// What the janitor knows.
#[derive(Default)]
struct Known {
    folders: HashMap<u64, OwnedFd>,
    names: Vec<(u64, Kind, Option<u64>, OsString)>,
    root: Option<(HostPid, OwnedFd)>,
    steps: HashSet<u64>,
    dismissed: bool,
}

/// The janitor's life.
fn keep_watch<After: FnOnce()>(
    line: &OwnedFd,
    ferry: &OwnedFd,
    finish: impl FnOnce(&HashSet<u64>) -> After,
) -> io::Result<()> {
    let _ = setsid();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None)?;
    let mut known = Known::default();
    loop {
        let mut events = [PollFd::new(line, PollFlags::IN), PollFd::new(ferry, PollFlags::IN)];
        match poll(&mut events, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_gone = !events[1].revents().is_empty();
        while let Some((note, folder)) = receive(line)? {
            known.learn(note, folder);
        }
        if known.dismissed {
            return Ok(());
        }
        if is_gone {
            break;
        }
    }
    known.end_tree();
    let after = finish(&known.steps);
    known.remove_names();
    after();
    Ok(())
}

/// The next message that is there already.
fn receive(line: &OwnedFd) -> io::Result<Option<(Note, Option<OwnedFd>)>> {
    let mut bytes = [0; MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = match recvmsg(line, &mut [io::IoSliceMut::new(&mut bytes)], &mut control, flags) {
        Ok(received) => received.bytes,
        Err(Errno::AGAIN) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let folder = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    // The end of file is an empty message; the pidfd tells of it.
    Ok(Note::decode(&bytes[..received]).map(|note| (note, folder)))
}

impl Known {
    fn learn(&mut self, note: Note, folder: Option<OwnedFd>) {
        match note {
            Note::Folder(number) => drop(folder.map(|folder| self.folders.insert(number, folder))),
            Note::Name { folder, kind, inode, name } => self.names.push((folder, kind, inode, name)),
            Note::Withdrawn => drop(self.names.pop()),
            Note::Root(pid) => self.root = pidfd::open(pid).ok().map(|task| (pid, task)),
            Note::Step(step) => drop(self.steps.insert(step)),
            Note::Dismissed => self.dismissed = true,
        }
    }

    /// Ends what is left of the tree: tasks that had been let go already when others had not. Parents are let go first, so
    /// that they lead to all of them; those that ferry still held end with ferry.
    fn end_tree(&mut self) {
        end_trees(self.root.take().into_iter().collect());
    }

    fn remove_names(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        for (folder, kind, inode, name) in self.names.drain(..).rev() {
            let Some(folder) = self.folders.get(&folder) else { continue };
            let found = statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW);
            if found.is_err() || inode.is_some_and(|inode| found.is_ok_and(|stat| stat.st_ino != inode)) {
                continue;
            }
            let removed = match kind {
                Kind::File => unlinkat(folder, &name, AtFlags::empty()).map_err(io::Error::from),
                Kind::Directory => remove_directory(folder, &name, deadline).map_err(io::Error::from),
                Kind::Tree => remove_tree(folder, &name),
            };
            if let Err(error) = removed {
                tracing::warn!(name = %name.display(), %error, "a file of the killed restore stays");
            }
        }
    }
}

/// Kills processes and all that descend from them, and waits until they are gone.
pub fn end_trees(mut tasks: Vec<(HostPid, OwnedFd)>) {
    let mut next = 0;
    while let Some((pid, task)) = tasks.get(next) {
        let found: Vec<(HostPid, OwnedFd)> =
            children(*pid).into_iter().filter_map(|child| Some((child, pidfd::open(child).ok()?))).collect();
        // They are children of this task if it still is there: its pid has been nobody else's meanwhile.
        if pidfd::wait_gone(task.as_fd(), Duration::ZERO).is_err() {
            tasks.extend(found);
        }
        next += 1;
    }
    for (_, task) in &tasks {
        let _ = pidfd::send_signal(task.as_fd(), libc::SIGKILL);
    }
    for (_, task) in &tasks {
        let _ = pidfd::wait_gone(task.as_fd(), PATIENCE);
    }
}

/// Removes a directory once nobody is in it: a cgroup is busy until the last of its tasks, which have been killed, is gone.
fn remove_directory(folder: &OwnedFd, name: &OsStr, deadline: Instant) -> Result<(), Errno> {
    loop {
        match unlinkat(folder, name, AtFlags::REMOVEDIR) {
            Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            result => return result,
        }
    }
}

fn remove_tree(folder: &OwnedFd, name: &OsStr) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let path = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name);
    std::fs::remove_dir_all(path)
}

/// The children of a process, those of all its threads.
fn children(pid: HostPid) -> Vec<HostPid> {
    let threads = procfs::threads(pid).unwrap_or_default();
    threads.iter().filter_map(|tid| procfs::children(pid, *tid).ok()).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_arrive_as_they_were_sent() {
        let name = OsString::from("ghost.cr");
        let all = [
            Note::Folder(3),
            Note::Name { folder: 3, kind: Kind::Tree, inode: Some(77), name: name.clone() },
            Note::Name { folder: 3, kind: Kind::File, inode: None, name },
            Note::Withdrawn,
            Note::Root(HostPid(4242)),
            Note::Step(1),
            Note::Dismissed,
        ];
        for note in all {
            assert_eq!(Note::decode(&note.encode()), Some(note));
        }
        assert_eq!(Note::decode(&[]), None);
    }
}
