//! A page server that is asked for pages: those of a stopped tree, or those of images ([`crate::remote::protocol`]).
//!
//! One peer, which says at the end that it has all it wants. A connection that ends otherwise has not brought a tree over.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::fetch::keep_alive;
use crate::cancel::{Cancel, Cancelled};
use crate::images::pstree::PstreeEntry;
use crate::images::{Content, ImageSet, Kind};
use crate::memory::images::PageImages;
use crate::memory::pages::{PageRuns, ProcessPages};
use crate::remote::protocol::{Command, GotPages, Pages, ProtocolError, TAKEN, read_header};
use crate::sys::{HostPid, PAGE_SIZE};

use super::source::PagesError;

/// Most pages of one answer; whoever wants more asks again.
const MOST: u64 = 1024;
/// How often waiting is interrupted to see whether to give up.
const GLANCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long a peer may take to read what it asked for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why pages were not taken.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum OfferError {
    /// Nobody could be waited for.
    #[error("no connection can be taken: {0}")]
    Accept(io::Error),
    /// The connection broke.
    #[error("the connection to {peer} broke before it had all pages: {source}")]
    Connection { peer: String, source: io::Error },
    /// The peer left.
    #[error("{peer} closed the connection without saying that it has all pages")]
    Left { peer: String },
    /// It is no daemon of lazy pages.
    #[error("{peer} is not understood: {source}")]
    Protocol { peer: String, source: ProtocolError },
    /// It does not ask for pages.
    #[error("{peer} sends what a server of lazy pages does not take")]
    Unexpected { peer: String },
    /// Memory could not be read.
    #[error("the memory of process {pid} cannot be read: {source}")]
    Read { pid: u32, source: io::Error },
    /// It was given up.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

/// Pages that can be asked for.
pub trait Offered {
    /// The pages at the front of `pages` of the process that images call `pid`, appended to `buffer`; how many.
    ///
    /// # Errors
    /// Memory cannot be read.
    fn read(&self, pid: u32, pages: Pages, buffer: &mut Vec<u8>) -> io::Result<u64>;
}

/// Pages of stopped processes, by the pids that their images have.
#[derive(Default)]
pub struct StoppedPages {
    processes: HashMap<u32, (HostPid, PageRuns)>,
}

impl StoppedPages {
    /// Offers `runs` of a process.
    pub fn add(&mut self, pid: u32, host: HostPid, runs: PageRuns) {
        self.processes.insert(pid, (host, runs));
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.processes.values().map(|(_, runs)| runs.pages()).sum()
    }
}

impl Offered for StoppedPages {
    fn read(&self, pid: u32, pages: Pages, buffer: &mut Vec<u8>) -> io::Result<u64> {
        let Some((host, runs)) = self.processes.get(&pid) else { return Ok(0) };
        let Some((offset, bytes)) = runs.place(&pages.range()) else { return Ok(0) };
        let before = buffer.len();
        buffer.resize(before + bytes as usize, 0);
        ProcessPages::open(*host, runs)?.read_at(offset, &mut buffer[before..])?;
        Ok(bytes / PAGE_SIZE)
    }
}

/// Pages of images.
pub struct ImagePages(HashMap<u32, PageImages>);

impl ImagePages {
    /// Finds them.
    ///
    /// # Errors
    /// [`PagesError`], about the images.
    pub fn read(images: &ImageSet) -> Result<Self, PagesError> {
        let name = Kind::Pstree.name();
        let tree: Vec<PstreeEntry> = images.entries(Kind::Pstree, &name)?.ok_or(PagesError::Missing { name })?;
        let mut processes = HashMap::new();
        for entry in &tree {
            if let Some(pages) = PageImages::read(images, &Kind::Pagemap.name_for(entry.pid), Kind::Pagemap)? {
                processes.insert(entry.pid, pages);
            }
        }
        Ok(Self(processes))
    }
}

impl Offered for ImagePages {
    fn read(&self, pid: u32, pages: Pages, buffer: &mut Vec<u8>) -> io::Result<u64> {
        let run = self.0.get(&pid).and_then(|images| Some((images, images.set.within(pages.range()).next()?)));
        let Some((images, run)) = run.filter(|(_, run)| run.range.start == pages.start()) else { return Ok(0) };
        let length = run.range.end - run.range.start;
        buffer.extend_from_slice(images.pages.part(run.offset, length).map_err(io::Error::other)?);
        Ok(length / PAGE_SIZE)
    }
}

/// Where pages are fetched.
#[derive(Debug)]
pub enum PageOffer {
    /// Whoever connects first.
    Listener(TcpListener),
    /// A peer that is connected.
    Connection(TcpStream),
}

impl PageOffer {
    /// Gives a peer pages until it has all it wants.
    ///
    /// # Errors
    /// [`OfferError`].
    pub fn serve(&self, pages: &dyn Offered, cancel: &Cancel) -> Result<(), OfferError> {
        match self {
            Self::Listener(listener) => offer(listener, pages, cancel),
            Self::Connection(stream) => offer_over(stream, "the peer", pages, cancel),
        }
    }
}

/// Waits for the peer and gives it pages until it has all it wants.
fn offer(listener: &TcpListener, pages: &dyn Offered, cancel: &Cancel) -> Result<(), OfferError> {
    while !is_readable(listener, cancel)? {}
    let (stream, peer) = listener.accept().map_err(OfferError::Accept)?;
    offer_over(&stream, &peer.to_string(), pages, cancel)
}

/// The same over a connection that is there.
fn offer_over(stream: &TcpStream, peer: &str, pages: &dyn Offered, cancel: &Cancel) -> Result<(), OfferError> {
    let peer = || peer.to_owned();
    let broken = |source: io::Error| OfferError::Connection { peer: peer(), source };
    keep_alive(stream);
    stream.set_read_timeout(Some(PATIENCE)).map_err(broken)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(broken)?;
    let (mut answers, mut buffer) = (stream, Vec::new());
    loop {
        while !is_readable(stream, cancel)? {}
        let Some(header) = read_header(&mut &*stream).map_err(broken)? else {
            return Err(OfferError::Left { peer: peer() });
        };
        let command = Command::decode(&header).map_err(|source| OfferError::Protocol { peer: peer(), source })?;
        match command {
            Command::Get { pid, pages: asked } => {
                // What is asked for lies within memory, so the first of it does.
                let few = Pages::new(asked.start(), asked.count().min(MOST)).unwrap_or(asked);
                buffer.clear();
                let count = pages.read(pid, few, &mut buffer).map_err(|source| OfferError::Read { pid, source })?;
                let got = GotPages { pid, pages: Pages::new(few.start(), count).ok() };
                answers.write_all(&got.encode()).and_then(|()| answers.write_all(&buffer)).map_err(broken)?;
            }
            Command::Close | Command::ForceClose => {
                // It has all of it, whether it hears this or not.
                let _ = answers.write_all(&TAKEN);
                return Ok(());
            }
            _ => return Err(OfferError::Unexpected { peer: peer() }),
        }
    }
}

fn is_readable(socket: impl std::os::fd::AsFd, cancel: &Cancel) -> Result<bool, OfferError> {
    cancel.check()?;
    let mut events = [PollFd::new(&socket, PollFlags::IN)];
    match poll(&mut events, Some(&GLANCE)) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(OfferError::Accept(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fetch::{FetchError, PageServer};
    use super::*;

    struct Numbered;

    impl Offered for Numbered {
        fn read(&self, pid: u32, pages: Pages, buffer: &mut Vec<u8>) -> io::Result<u64> {
            if pages.start() >= 0x10_0000 {
                return Ok(0);
            }
            buffer.extend((0..pages.bytes()).map(|byte| (pid as u64 + (pages.start() + byte) / PAGE_SIZE) as u8));
            Ok(pages.count())
        }
    }

    fn served(ask: impl FnOnce(PageServer)) -> Result<(), OfferError> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| offer(&listener, &Numbered, &Cancel::default()));
            ask(PageServer::new(TcpStream::connect(address).unwrap()).unwrap());
            serving.join().unwrap()
        })
    }

    #[test]
    fn pages_are_fetched_until_the_peer_has_enough() {
        served(|mut server| {
            let pages = server.get(7, 0x3000, 2 * PAGE_SIZE).unwrap();
            assert_eq!((pages.len(), pages[0], pages[PAGE_SIZE as usize]), (0x2000, 10, 11));
            assert_eq!(server.get(7, 0x3000, 5000 * PAGE_SIZE).unwrap().len(), 1024 * 4096, "no more than fits");
            let lacking = server.get(7, 0x10_0000, PAGE_SIZE).unwrap_err();
            assert!(matches!(lacking, FetchError::Lacking { .. }), "{lacking}");
            server.close().unwrap();
        })
        .unwrap();
    }

    #[test]
    fn a_peer_that_leaves_has_not_taken_all() {
        let left = served(|mut server| drop(server.get(7, 0x3000, PAGE_SIZE).map(<[u8]>::len))).unwrap_err();
        assert!(matches!(left, OfferError::Left { .. }), "{left}");
    }

    #[test]
    fn nobody_is_waited_for_when_it_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let cancel = Cancel::default();
        cancel.caller_gone();
        assert!(matches!(offer(&listener, &Numbered, &cancel), Err(OfferError::Cancelled(_))));
    }
}
