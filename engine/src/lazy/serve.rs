//! The daemon's work: bringing missing pages, those that somebody waits for first.
//!
//! What the kernel does (userfaultfd(2), fs/userfaultfd.c), on which the order here rests:
//!
//! - Whoever touches a missing page waits until one is placed, or is woken to look again.
//! - Whoever forks, moves, unmaps or discards waits until the event is read. Until then nothing can be placed in that memory (`EAGAIN`), so
//!   a page of before cannot end up in what comes after: on `EAGAIN`, events are read and the placing is thought over.
//! - Faults are read before other events, although those may have happened first. So all events are read before a page is chosen.
//! - A placing must lie in one mapping, and programs part mappings: one that fails with `ENOENT` is tried with less, and a page
//!   that it fails for is gone.
//! - Nobody says that a process has ended or executes another program. Placing fails with `ESRCH` then.
//!
//! Invariant: what an address space misses is exactly its [`Missing`]; any other page that faults is one of zeros.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::handshake::{self, Told};
use super::missing::{Found, Missing};
use super::source::{PagesError, TreePages};
use crate::cancel::{Cancel, Cancelled};
use crate::sys::userfaultfd::{self, Event};
use crate::sys::{HostPid, PAGE_SIZE};

/// What is brought for a page that somebody waits for: its neighbours are likely to be touched next.
const FAULT: u64 = 64 << 10;
/// What is brought unasked at a time: little while pages are asked for, more and more when they are not.
const FEWEST: u64 = 64 << 10;
const MOST: u64 = 1 << 20;
/// How long the kernel may lack memory for a page.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who is to know of the descriptors, so that somebody has them when this process dies.
pub trait Holder {
    /// There is another one, of a process (none if only its parent is known).
    ///
    /// # Errors
    /// It cannot be told.
    fn hold(&mut self, number: u64, process: Option<HostPid>, descriptor: BorrowedFd<'_>) -> io::Result<()>;

    /// One is not needed any more.
    ///
    /// # Errors
    /// It cannot be told.
    fn release(&mut self, number: u64) -> io::Result<()>;
}

/// Why not all pages were brought.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum ServeError {
    /// The restore failed, or is none.
    #[error("the restore ended before all processes ran: {source}")]
    Restore { source: io::Error },
    /// Pages could not be had.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// Pages could not be placed.
    #[error("pid {pid}: cannot bring the page at {address:x}: {errno}")]
    Place { pid: u32, address: u64, errno: Errno },
    /// Events could not be read.
    #[error("pid {pid}: cannot hear of its page faults: {errno}")]
    Event { pid: u32, errno: Errno },
    /// Nobody would hold the descriptors.
    #[error("the process that watches over the daemon cannot be told: {source}")]
    Holder { source: io::Error },
    /// The kernel refuses to wait.
    #[error("cannot wait for page faults: {source}")]
    Wait { source: io::Error },
    /// It was given up.
    #[error("bringing pages was given up: {0}")]
    Cancelled(#[from] Cancelled),
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Served {
    /// Address spaces, those of children included.
    pub spaces: u64,
    /// Faults that were answered with pages of the tree.
    pub faults: u64,
    /// Bytes that were brought.
    pub bytes: u64,
}

/// One address space.
struct Space {
    number: u64,
    /// The process in the images.
    pid: u32,
    descriptor: OwnedFd,
    missing: Missing,
    /// Pages that somebody waits for.
    waiting: Vec<u64>,
    /// Where to go on bringing unasked.
    next: u64,
    /// Nothing can be placed any more.
    gone: bool,
}

/// What became of a placing.
enum Placed {
    /// As far as it was possible; something is done at any rate.
    Done,
    /// Not before events are read.
    Later,
}

/// Serves one restore until none of its processes misses a page.
///
/// # Errors
/// [`ServeError`]. Processes that miss pages then wait for them as long as somebody holds their descriptors, and see zeros after that.
pub fn serve(
    restore: &UnixStream,
    pages: &mut TreePages,
    holder: &mut dyn Holder,
    cancel: &Cancel,
) -> Result<Served, ServeError> {
    let mut server = Server { pages, holder, spaces: Vec::new(), served: Served::default(), turn: 0, window: FEWEST };
    for _ in 0..server.pages.tasks() {
        cancel.check()?;
        let told = handshake::receive(restore).map_err(|source| ServeError::Restore { source })?;
        if let Told::Process { pid, host, descriptor } = told {
            let missing = server.pages.missing(pid)?;
            server.add(pid, host, descriptor, missing)?;
        }
    }
    server.run(restore, cancel)?;
    Ok(server.served)
}

struct Server<'a> {
    pages: &'a mut TreePages,
    holder: &'a mut dyn Holder,
    spaces: Vec<Space>,
    served: Served,
    /// Whose turn it is to be brought pages unasked.
    turn: usize,
    window: u64,
}

impl Server<'_> {
    fn add(
        &mut self,
        pid: u32,
        host: Option<HostPid>,
        descriptor: OwnedFd,
        missing: Missing,
    ) -> Result<(), ServeError> {
        let number = self.served.spaces;
        self.served.spaces += 1;
        tracing::debug!(pid, number, bytes = missing.bytes(), "an address space misses pages");
        self.holder.hold(number, host, descriptor.as_fd()).map_err(|source| ServeError::Holder { source })?;
        self.spaces.push(Space { number, pid, descriptor, missing, waiting: Vec::new(), next: 0, gone: false });
        Ok(())
    }

    fn run(&mut self, restore: &UnixStream, cancel: &Cancel) -> Result<(), ServeError> {
        let mut all_run = false;
        let mut stuck = false;
        loop {
            cancel.check()?;
            let works = all_run && self.spaces.iter().any(|space| !space.missing.is_empty());
            let waits = self.spaces.iter().any(|space| !space.waiting.is_empty());
            let timeout = match (works || waits, stuck) {
                (true, false) => Duration::ZERO,
                (true, true) => Duration::from_millis(1),
                (false, _) => Duration::from_millis(200),
            };
            let (ready, said) = self.poll(restore, !all_run, timeout)?;
            if said {
                handshake::hear_end(restore).map_err(|source| ServeError::Restore { source })?;
                all_run = true;
            }
            for number in ready {
                self.hear(number)?;
            }
            let mut asked = false;
            stuck = false;
            for index in 0..self.spaces.len() {
                asked |= !self.spaces[index].waiting.is_empty();
                stuck |= !self.bring_asked(index)?;
            }
            self.window = if asked { FEWEST } else { (self.window * 2).min(MOST) };
            if all_run {
                if !stuck {
                    stuck = !self.bring_unasked()?;
                }
                self.drop_finished()?;
                if self.spaces.is_empty() {
                    return Ok(());
                }
            }
        }
    }

    /// Waits until something is to be heard: the numbers of the spaces that it is of, and whether the restore says something.
    fn poll(&self, restore: &UnixStream, hear_restore: bool, wait: Duration) -> Result<(Vec<u64>, bool), ServeError> {
        let mut events: Vec<PollFd<'_>> =
            self.spaces.iter().map(|space| PollFd::new(&space.descriptor, PollFlags::IN)).collect();
        if hear_restore {
            events.push(PollFd::new(restore, PollFlags::IN));
        }
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
        match poll(&mut events, Some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(ServeError::Wait { source: error.into() }),
        }
        let ready = self.spaces.iter().zip(&events).filter(|(_, event)| event.revents().intersects(PollFlags::IN));
        let said = hear_restore && events.last().is_some_and(|event| !event.revents().is_empty());
        Ok((ready.map(|(space, _)| space.number).collect(), said))
    }

    /// Reads all events of a space.
    fn hear(&mut self, number: u64) -> Result<(), ServeError> {
        let Some(index) = self.spaces.iter().position(|space| space.number == number) else { return Ok(()) };
        loop {
            let space = &mut self.spaces[index];
            let event = userfaultfd::read_event(&space.descriptor)
                .map_err(|errno| ServeError::Event { pid: space.pid, errno })?;
            match event {
                None => return Ok(()),
                Some(Event::Fault { page }) => {
                    if !space.waiting.contains(&page) {
                        space.waiting.push(page);
                    }
                }
                Some(Event::Removed { range } | Event::Unmapped { range }) => space.missing.remove(&range),
                Some(Event::Moved { from, to, length }) => space.missing.move_range(from, to, length),
                Some(Event::Fork { child }) => {
                    let (pid, missing) = (space.pid, space.missing.of_child());
                    self.add(pid, None, child, missing)?;
                }
            }
        }
    }

    /// Brings the pages that are waited for; whether none has to wait for events.
    fn bring_asked(&mut self, index: usize) -> Result<bool, ServeError> {
        for page in std::mem::take(&mut self.spaces[index].waiting) {
            let space = &mut self.spaces[index];
            let placed = match space.missing.at(page) {
                Some(found) => {
                    self.served.faults += 1;
                    self.bring(index, &found, FAULT)?
                }
                None => space.place_zeros(page)?,
            };
            if let Placed::Later = placed {
                self.spaces[index].waiting.push(page);
            }
        }
        Ok(self.spaces[index].waiting.is_empty())
    }

    /// Brings some pages to the space whose turn it is; whether it did not have to wait for events.
    fn bring_unasked(&mut self) -> Result<bool, ServeError> {
        let count = self.spaces.len();
        let mut next = (0..count).map(|step| (self.turn + step) % count);
        let index = next.find(|index| !self.spaces[*index].missing.is_empty());
        let Some(index) = index else { return Ok(true) };
        self.turn = index + 1;
        let space = &self.spaces[index];
        let Some(found) = space.missing.next(space.next) else { return Ok(true) };
        let placed = self.bring(index, &found, self.window)?;
        self.spaces[index].next = found.range.start;
        Ok(matches!(placed, Placed::Done))
    }

    /// Brings pages from the front of `found`, at most `most` bytes.
    fn bring(&mut self, index: usize, found: &Found, most: u64) -> Result<Placed, ServeError> {
        let space = &mut self.spaces[index];
        let length = most.min(found.range.end - found.range.start);
        let content = self.pages.content(space.pid, found.image, length)?;
        let start = found.range.start;
        let mut tried = content.len();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (placed, obstacle) = userfaultfd::place(&space.descriptor, start, &content[..tried]);
            if placed > 0 {
                self.served.bytes += placed as u64;
                space.missing.remove(&(start..start + placed as u64));
                return Ok(Placed::Done);
            }
            match obstacle {
                None => return Ok(Placed::Done),
                Some(Errno::EAGAIN) => return Ok(Placed::Later),
                // Only where somebody else places pages too.
                Some(Errno::EEXIST) => {
                    space.missing.remove(&(start..start + PAGE_SIZE));
                    return space.wake(start);
                }
                Some(Errno::ENOENT) if tried > PAGE_SIZE as usize => {
                    tried = (tried / 2).next_multiple_of(PAGE_SIZE as usize);
                }
                Some(Errno::ENOENT) => {
                    space.missing.remove(&(start..start + PAGE_SIZE));
                    return space.wake(start);
                }
                Some(Errno::ESRCH) => {
                    space.end();
                    return Ok(Placed::Done);
                }
                // A cgroup's limit may let go of something meanwhile.
                Some(Errno::ENOMEM) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                Some(errno) => return Err(ServeError::Place { pid: space.pid, address: start, errno }),
            }
        }
    }

    /// Lets go of the spaces that miss nothing any more.
    fn drop_finished(&mut self) -> Result<(), ServeError> {
        let is_finished = |space: &Space| space.gone || (space.missing.is_empty() && space.waiting.is_empty());
        for space in self.spaces.extract_if(.., |space| is_finished(space)) {
            tracing::debug!(pid = space.pid, number = space.number, gone = space.gone, "an address space is complete");
            self.holder.release(space.number).map_err(|source| ServeError::Holder { source })?;
        }
        Ok(())
    }
}

impl Space {
    fn end(&mut self) {
        self.missing = Missing::default();
        self.waiting.clear();
        self.gone = true;
    }

    fn place_zeros(&mut self, page: u64) -> Result<Placed, ServeError> {
        match userfaultfd::place_zeros(&self.descriptor, page) {
            Ok(()) => Ok(Placed::Done),
            Err(Errno::EAGAIN) => Ok(Placed::Later),
            Err(Errno::ESRCH) => {
                self.end();
                Ok(Placed::Done)
            }
            // It is there meanwhile, or nothing is mapped there any more: whoever waits is to see for itself.
            Err(Errno::EEXIST | Errno::ENOENT) => self.wake(page),
            Err(errno) => Err(ServeError::Place { pid: self.pid, address: page, errno }),
        }
    }

    fn wake(&mut self, page: u64) -> Result<Placed, ServeError> {
        userfaultfd::wake(&self.descriptor, page)
            .map(|()| Placed::Done)
            .map_err(|errno| ServeError::Event { pid: self.pid, errno })
    }
}
