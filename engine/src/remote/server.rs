//! The page server: takes the pages of one dump, over one connection.
//!
//! All or nothing: unless the dump said that it had sent everything, and all of it could be written, nothing is left.

use std::io::{self, Write};

use super::connection::Connection;
use super::protocol::{Command, Object, ProtocolError, TAKEN, read_header};
use super::store::PageStore;
use crate::images::SourceError;
use crate::memory::images::PageImagesError;

/// What a dump that is to fail is answered at its end.
const NOT_TAKEN: [u8; 4] = [0xff; 4];

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are what the sentences name")]
pub enum ReceiveError {
    /// The connection is no good any more.
    #[error("the connection to the dump broke off: {source}; nothing is kept of what it sent")]
    Connection { source: io::Error },
    /// It ended, but not as a dump that is complete ends it.
    #[error("the dump ended before it had sent all of its pages; nothing is kept")]
    Unfinished,
    /// The peer does not speak the protocol.
    #[error("whoever connected is no dump, or its data is damaged: {0}; nothing is kept")]
    Protocol(#[from] ProtocolError),
    /// Pages are asked for.
    #[error("whoever connected asks for pages, but this server only takes them")]
    Asked,
    /// Pages of something that was not named before.
    #[error("pages of {object} come before it is opened: the dump's data is damaged; nothing is kept")]
    NotOpen { object: Object },
    /// An object twice.
    #[error(
        "the pages of {name} are sent twice, or there are too many objects: the dump's data is damaged; nothing is kept"
    )]
    Twice { name: String },
    /// Runs that overlap, or are not in order.
    #[error("the run of pages at {start:x} of {name} is out of place: the dump's data is damaged; nothing is kept")]
    Disorder { name: String, start: u64 },
    /// Pages are left to earlier images that lack them.
    #[error(
        "{count} pages at {start:x} of {name} are left to earlier images, which lack them: give the folder of those with --prev-images-dir"
    )]
    NotInParent { name: String, start: u64, count: u64 },
    /// The folder does not take an image.
    #[error("cannot write image {name}: {source}")]
    Write { name: String, source: io::Error },
    /// The earlier images are not accepted.
    #[error("the earlier images: {0}")]
    Parent(#[from] SourceError),
    /// Their pages are not.
    #[error("the earlier images: {0}")]
    ParentPages(#[from] PageImagesError),
}

impl ReceiveError {
    pub(super) fn connection(source: io::Error) -> Self {
        Self::Connection { source }
    }
}

/// Takes pages until the dump says that it has sent all; the images have their names then, and the dump knows.
///
/// # Errors
/// [`ReceiveError`]; what was received is gone once the store is dropped.
pub fn receive(connection: &mut Connection, store: &mut PageStore<'_>) -> Result<(), ReceiveError> {
    loop {
        let header = read_header(connection).map_err(ReceiveError::connection)?.ok_or(ReceiveError::Unfinished)?;
        match Command::decode(&header)? {
            Command::Open { object, answered } => {
                let has_parent = store.open(object)?;
                if answered {
                    connection.write_all(&[has_parent.into()]).map_err(ReceiveError::connection)?;
                }
            }
            Command::HasParent { object } => {
                let answer = u32::from(store.has_parent(object)?).to_le_bytes();
                connection.write_all(&answer).map_err(ReceiveError::connection)?;
            }
            Command::Add { object, pages, flags } => store.add(object, pages, flags, connection)?,
            Command::Get { .. } => return Err(ReceiveError::Asked),
            end @ (Command::Close | Command::ForceClose) => {
                if let Err(error) = store.complete() {
                    let _ = connection.write_all(&NOT_TAKEN);
                    return Err(error);
                }
                // The images are complete, whether the dump hears of it or not.
                match connection.write_all(&TAKEN) {
                    Ok(()) if end == Command::Close => connection.await_end(),
                    Ok(()) => {}
                    Err(error) => tracing::warn!(%error, "the dump does not hear that its pages were taken"),
                }
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use super::*;
    use crate::cancel::Cancel;
    use crate::images::pagemap::{PagemapEntry, page_flags};
    use crate::images::{
        FolderOptions, FolderSink, FolderSource, ImageSet, Kind, MANIFEST_NAME, Manifest, Sink, SinkError,
    };
    use crate::memory::images::PageImages;
    use crate::memory::parent::ParentMemory;
    use crate::remote::protocol::Pages;
    use crate::remote::sink::PageServerSink;
    use crate::sys::{NsPid, PAGE_SIZE};

    /// Receives into `folder` what `send` sends.
    fn served<T>(folder: &Path, send: impl FnOnce(OwnedFd) -> T) -> (Result<(), ReceiveError>, T) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let folder: OwnedFd = std::fs::File::open(folder).unwrap().into();
        let server = std::thread::spawn(move || {
            let parent = crate::images::Source::parent(&FolderSource::new(folder.try_clone().unwrap())).unwrap();
            let parent = parent.map(|source| ImageSet::open(source).unwrap());
            let mut store = PageStore::new(&folder, parent);
            receive(&mut Connection::from_dump(theirs.into(), "the test".into(), Cancel::default()), &mut store)
        });
        let sent = send(ours.into());
        (server.join().unwrap(), sent)
    }

    fn sink(folder: &Path, socket: OwnedFd) -> PageServerSink<FolderSink> {
        let local = FolderSink::open(folder, FolderOptions::default()).unwrap();
        PageServerSink::new(local, Connection::over(socket, "the test".into(), Cancel::default()), false)
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn unite(folder: &Path, into: &Path) {
        for name in names(folder).iter().filter(|name| *name != "parent") {
            std::fs::copy(folder.join(name), into.join(name)).unwrap();
        }
    }

    fn open(folder: &Path) -> ImageSet {
        ImageSet::open(Box::new(FolderSource::open(folder).unwrap())).unwrap()
    }

    fn pages(count: usize) -> Vec<u8> {
        (0..count * PAGE_SIZE as usize).map(|at| (at ^ (at >> 12)) as u8).collect()
    }

    #[test]
    fn pages_sent_away_and_brought_back_are_one_set_again() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let large = [0x10_0000..0x10_0000 + 3000 * PAGE_SIZE, 0x7fff_0000_0000..0x7fff_0000_1000];
        let entries = PagemapEntry::of_runs(&large, &[]);
        let (received, sent) = served(there.path(), |socket| {
            let mut sink = sink(here.path(), socket);
            sink.put_pages("pagemap-7.img", 1, &entries, &pages(3001))?;
            sink.put_pages("pagemap-shmem-9.img", 2, &PagemapEntry::of_runs(&[0..0x2000], &[]), &pages(2))?;
            sink.put_pages("pagemap-8.img", 3, &[], &Vec::new())?;
            sink.put("iptables-7.img", b"record")?;
            sink.finish(Manifest::new("6.18", 4096))
        });
        received.unwrap();
        let manifest = sent.unwrap();
        assert_eq!(manifest.elsewhere.len(), 3);
        assert_eq!(names(here.path()), [MANIFEST_NAME, "iptables-7.img"]);
        let theirs = ["pagemap-7.img", "pagemap-8.img", "pagemap-shmem-9.img", "pages-65537.img", "pages-65538.img"];
        assert_eq!(names(there.path())[..5], theirs);
        let apart = PageImages::read(&open(here.path()), "pagemap-7.img", Kind::Pagemap).err().unwrap();
        assert!(apart.to_string().contains("copy the images"), "{apart}");
        unite(there.path(), here.path());
        let set = open(here.path());
        let united = PageImages::read(&set, "pagemap-7.img", Kind::Pagemap).unwrap().unwrap();
        assert_eq!(united.set.bytes(), 3001 * PAGE_SIZE);
        assert_eq!(united.pages.peek(3000 * PAGE_SIZE, PAGE_SIZE), &pages(3001)[3000 * PAGE_SIZE as usize..]);
        set.check_understood().unwrap();
        // Another's pagemap, and pages of another length.
        std::fs::copy(there.path().join("pagemap-8.img"), here.path().join("pagemap-7.img")).unwrap();
        let other = PageImages::read(&set, "pagemap-7.img", Kind::Pagemap).err().unwrap();
        assert!(other.to_string().contains("of another dump"), "{other}");
        std::fs::write(here.path().join("pages-65538.img"), "short").unwrap();
        let short = PageImages::read(&set, "pagemap-shmem-9.img", Kind::ShmemPagemap).err().unwrap();
        assert!(short.to_string().contains("8192 were dumped"), "{short}");
    }

    #[test]
    fn pages_are_left_to_a_parent_that_the_server_has() {
        let place = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let path = place.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let (here, there) = (folder("here-1"), folder("there-1"));
        let entries = PagemapEntry::of_runs(&[0x1000..0x4000], &[]);
        let (received, sent) = served(&there, |socket| {
            let mut sink = sink(&here, socket);
            sink.put_pages("pagemap-7.img", 1, &entries, &pages(3))?;
            sink.finish(Manifest::new("6.18", 4096))
        });
        received.unwrap();
        sent.unwrap();
        let mut parent = ParentMemory::open(&open(&here)).unwrap();
        let unwritten = [0x2000..0x9000];
        assert_eq!(parent.has_of(NsPid(7), &[0x1000..0x3000], &unwritten), [0x2000..0x3000]);
        let next = folder("there-2");
        std::os::unix::fs::symlink("../there-1", next.join("parent")).unwrap();
        let run = |mixed: &[PagemapEntry], parent: &mut ParentMemory| {
            served(&next, |socket| {
                let mut sink = sink(&folder("here-2"), socket);
                sink.agree_on(parent)?;
                sink.put_pages("pagemap-7.img", 1, mixed, &pages(1))?;
                sink.finish(Manifest::new("6.18", 4096))
            })
        };
        let mixed = PagemapEntry::of_runs(&[0x1000..0x2000], &[0x2000..0x4000]);
        let (received, sent) = run(&mixed, &mut parent);
        received.unwrap();
        sent.unwrap();
        assert!(!parent.has_of(NsPid(7), &[0x1000..0x3000], &unwritten).is_empty());
        assert_eq!(std::fs::metadata(next.join("pages-65537.img")).unwrap().len(), PAGE_SIZE);
        // What the parent lacks.
        let (received, sent) = run(&PagemapEntry::of_runs(&[0x1000..0x2000], &[0x2000..0x5000]), &mut parent);
        assert!(matches!(received, Err(ReceiveError::NotInParent { start: 0x2000, count: 3, .. })), "{received:?}");
        assert!(matches!(sent, Err(SinkError::PageServer { .. })), "{sent:?}");
        // A server without a parent.
        std::fs::remove_file(next.join("parent")).unwrap();
        let (_, sent) = run(&mixed, &mut parent);
        assert!(matches!(sent, Err(SinkError::NoParent { .. })), "{sent:?}");
        assert!(parent.has_of(NsPid(7), &[0x1000..0x3000], &unwritten).is_empty(), "all would be sent");
    }

    #[test]
    fn whatever_is_wrong_leaves_nothing() {
        let process = Object::Process(7);
        let open = Command::Open { object: process, answered: false }.encode().to_vec();
        let add = |start, count, flags| {
            Command::Add { object: process, pages: Pages::new(start, count).unwrap(), flags }.encode().to_vec()
        };
        let present = page_flags::PRESENT;
        let close = Command::Close.encode().to_vec();
        let get = Command::Get { pid: 7, pages: Pages::new(0x1000, 1).unwrap() }.encode().to_vec();
        for (what, stream, word) in [
            ("nothing", vec![], "before it had sent all"),
            ("noise", vec![b"GET / HTTP/1.1\r\nHost: nobody.example\r\n\r\n".to_vec()], "no dump"),
            ("a torn header", vec![open.clone(), vec![6; 9]], "broke off"),
            ("no end", vec![open.clone(), add(0x1000, 1, present), pages(1)], "before it had sent all"),
            ("torn pages", vec![open.clone(), add(0x1000, 4, present), pages(2)], "broke off"),
            ("no name", vec![add(0x1000, 1, present), pages(1), close.clone()], "before it is opened"),
            ("twice", vec![open.clone(), open.clone(), close.clone()], "sent twice"),
            (
                "overlap",
                vec![open.clone(), add(0x2000, 1, present), pages(1), add(0x1000, 2, present), pages(2)],
                "out of place",
            ),
            ("no parent", vec![open.clone(), add(0x1000, 1, page_flags::PARENT), close.clone()], "--prev-images-dir"),
            ("both", vec![open.clone(), add(0x1000, 1, present | page_flags::PARENT), pages(1)], "--prev-images-dir"),
            ("a question", vec![get], "only takes"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let (received, ()) = served(folder.path(), |socket| {
                let mut stream_to = UnixStream::from(socket);
                // It may be closed before all is sent.
                let _ = stream_to.write_all(&stream.concat());
                let _ = stream_to.shutdown(std::net::Shutdown::Write);
                let _ = stream_to.read_to_end(&mut Vec::new());
            });
            let sentence = received.expect_err(what).to_string();
            assert!(sentence.contains(word), "{what}: {sentence}");
            assert_eq!(names(folder.path()), [""; 0], "{what}");
        }
    }

    #[test]
    fn a_dump_that_loses_its_server_says_so() {
        let here = tempfile::tempdir().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut sink = sink(here.path(), ours.into());
        sink.put("core-7.img", b"record").unwrap();
        drop(theirs);
        let entries = PagemapEntry::of_runs(&[0x1000..0x2000], &[]);
        let sentence = sink.put_pages("pagemap-7.img", 1, &entries, &pages(1)).unwrap_err().to_string();
        assert!(sentence.contains("pagemap-7.img") && sentence.contains("broke off"), "{sentence}");
        drop(sink);
        assert_eq!(names(here.path()), [""; 0]);
    }
}
