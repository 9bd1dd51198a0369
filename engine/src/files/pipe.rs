//! Pipes and FIFOs (pipe(7), fifo(7)) with what is in them.
//!
//! tee(2) copies a pipe's content without taking it. poll(2) tells whether the other side is held by anyone at all:
//! `POLLHUP` at the read end when there is no writer, `POLLERR` at the write end when there is no reader.

use std::collections::btree_map::{BTreeMap, Entry};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, tee};

use super::Problem;
use super::session::{Done, Session, Temporary};
use crate::images::pipe::PipeDataEntry;
use crate::images::{Encoder, Kind};

const O_ACCMODE: u32 = libc::O_ACCMODE as u32;
const O_RDWR: u32 = libc::O_RDWR as u32;
const O_WRONLY: u32 = libc::O_WRONLY as u32;
const O_DIRECT: u32 = libc::O_DIRECT as u32;
const O_NONBLOCK: u32 = libc::O_NONBLOCK as u32;

/// Whether a description with these flags can read, and write.
pub fn directions(flags: u32) -> (bool, bool) {
    let mode = flags & O_ACCMODE;
    (mode != O_WRONLY, mode == O_WRONLY || mode == O_RDWR)
}

/// One pipe of the tree.
struct Pipe<H> {
    readers: bool,
    writers: bool,
    /// Whether anyone at all holds the side that the first description seen is not.
    other_side: bool,
    content: Option<(PipeDataEntry, Vec<u8>)>,
    /// Who to name in a refusal.
    holder: H,
}

/// The pipes, or the FIFOs, found so far, by inode; `H` says who holds one.
pub struct Pipes<H> {
    found: BTreeMap<u32, Pipe<H>>,
    /// Where content is copied to, made once.
    copy: Option<(OwnedFd, std::fs::File)>,
}

impl<H> Default for Pipes<H> {
    fn default() -> Self {
        Self { found: BTreeMap::new(), copy: None }
    }
}

impl<H: Clone> Pipes<H> {
    /// Notes an end of a pipe that has been met before; tells whether it has.
    pub fn note_end(&mut self, inode: u32, flags: u32) -> bool {
        let (reads, writes) = directions(flags);
        let Some(pipe) = self.found.get_mut(&inode) else { return false };
        pipe.readers |= reads;
        pipe.writers |= writes;
        true
    }

    /// Notes one description of pipe `inode`, and takes a copy of the content with the first that can read.
    pub fn collect(
        &mut self,
        inode: u32,
        flags: u32,
        duplicate: BorrowedFd<'_>,
        holder: H,
        content: bool,
    ) -> Result<(), Problem> {
        let (reads, writes) = directions(flags);
        if flags & O_DIRECT != 0 && rustix::io::ioctl_fionread(duplicate).is_ok_and(|waiting| waiting > 0) {
            return Err(Problem::new(
                "it is in packet mode (O_DIRECT) and holds packets, whose bounds images cannot tell",
                "have the program read them, then try again",
            ));
        }
        if let Entry::Vacant(vacant) = self.found.entry(inode) {
            let other_side = if reads && writes { false } else { has_other_side(duplicate)? };
            vacant.insert(Pipe { readers: false, writers: false, other_side, content: None, holder });
        }
        let needs_content = content && reads && self.found.get(&inode).is_some_and(|pipe| pipe.content.is_none());
        let copied = if needs_content { Some(self.copy_content(inode, duplicate)?) } else { None };
        self.note_end(inode, flags);
        if let Some(pipe) = self.found.get_mut(&inode) {
            pipe.content = pipe.content.take().or(copied);
        }
        Ok(())
    }

    fn copy_content(&mut self, inode: u32, source: BorrowedFd<'_>) -> Result<(PipeDataEntry, Vec<u8>), Problem> {
        let failed = |error: rustix::io::Errno| Problem::unreadable("its content", error);
        let size = fcntl_getpipe_size(source).map_err(failed)?;
        let waiting = rustix::io::ioctl_fionread(source).map_err(failed)?;
        let mut bytes = Vec::new();
        if waiting > 0 {
            if self.copy.is_none() {
                let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(failed)?;
                self.copy = Some((write, read.into()));
            }
            let Some((write, read)) = &mut self.copy else { return Err(Problem::new("its content was lost", "")) };
            if fcntl_getpipe_size(&*write).map_err(failed)? != size {
                fcntl_setpipe_size(&*write, size).map_err(failed)?;
            }
            let copied = tee(source, write.as_fd(), size, SpliceFlags::NONBLOCK).map_err(failed)? as u64;
            bytes = vec![0; copied as usize];
            read.read_exact(&mut bytes).map_err(|error| Problem::unreadable("its content", error))?;
        }
        Ok((PipeDataEntry { pipe_id: inode, bytes: bytes.len() as u32, size: Some(size as u32) }, bytes))
    }

    /// The holders of pipes whose other side is held by somebody outside the tree, with the inode.
    pub fn half_outside(&self) -> impl Iterator<Item = (u32, &H)> {
        self.found
            .iter()
            .filter(|(_, pipe)| pipe.other_side && pipe.readers != pipe.writers)
            .map(|(inode, pipe)| (*inode, &pipe.holder))
    }

    /// The image of all contents.
    pub fn image(&self, kind: Kind) -> Vec<u8> {
        let mut encoder = Encoder::new(kind);
        for (entry, bytes) in self.found.values().filter_map(|pipe| pipe.content.as_ref()) {
            encoder.entry(entry).tail(bytes);
        }
        encoder.finish()
    }
}

/// Whether anyone holds the side of the pipe that `end` is not.
fn has_other_side(end: BorrowedFd<'_>) -> Result<bool, Problem> {
    let mut polled = [PollFd::new(&end, PollFlags::IN | PollFlags::OUT)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
        .map_err(|error| Problem::unreadable("its other side", error))?;
    Ok(!polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

/// Content of one pipe, as an image has it.
#[derive(Clone, Debug)]
pub struct PipeContent {
    /// Capacity, if it was saved.
    pub size: Option<u32>,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Both ends of a new pipe, with its content; `flags` are those of the read and of the write end.
pub fn restore_pipe(
    session: &mut Session<'_>,
    flags: [u32; 2],
    content: Option<&PipeContent>,
    cloexec: bool,
) -> Done<[Temporary; 2]> {
    let status = |flags: u32| flags & (O_DIRECT | O_NONBLOCK);
    let common = status(flags[0]) & status(flags[1]);
    let both = common | (flags[1] & O_DIRECT) | if cloexec { libc::O_CLOEXEC as u32 } else { 0 };
    let ends = session.pair("make it", libc::SYS_pipe2, &[], &[both.into()])?;
    if let Some(content) = content {
        restore_content(session, ends[1], content)?;
    }
    for (end, flags) in ends.into_iter().zip(flags) {
        if status(flags) != both & (O_DIRECT | O_NONBLOCK) {
            session.set_flags(end, status(flags))?;
        }
    }
    Ok(ends)
}

fn restore_content(session: &mut Session<'_>, write: Temporary, content: &PipeContent) -> Done {
    /// What a pipe holds unless it was asked otherwise (pipe(7)).
    const DEFAULT: u32 = 65536;
    if let Some(size) = content.size.filter(|size| *size != DEFAULT) {
        session.must(
            "set its capacity",
            libc::SYS_fcntl,
            &[write.number().into(), libc::F_SETPIPE_SZ as u64, size.into()],
        )?;
    }
    session.write(write, &content.bytes)
}

/// Opens a FIFO at `path` without waiting for its other side, and fills in its content if it is the first to open it.
pub fn restore_fifo(
    session: &mut Session<'_>,
    path: &[u8],
    flags: u32,
    content: Option<&PipeContent>,
    cloexec: bool,
) -> Done<Temporary> {
    // fifo(7): opening for both never blocks, and lets the real opening find its other side.
    let holder = session.open(path, O_RDWR | O_NONBLOCK | libc::O_CLOEXEC as u32)?;
    let cloexec = if cloexec { libc::O_CLOEXEC as u32 } else { 0 };
    let fifo = session.open(path, super::regular::open_flags(flags) | cloexec)?;
    if let Some(content) = content {
        restore_content(session, holder, content)?;
    }
    session.close(holder)?;
    Ok(fifo)
}
