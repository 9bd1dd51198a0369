//! A dump's pages go to a page server, and everything else to another sink.
//!
//! Nothing is complete before the server has said that it has everything; only then the manifest is written.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Read, Write};

use super::connection::Connection;
use super::protocol::{Command, Object, Pages, ProtocolError, TAKEN};
use crate::dump::Dumped;
use crate::images::content::Content;
use crate::images::copy::copy_in_order;
use crate::images::elsewhere::PagesElsewhere;
use crate::images::pagemap::{PagemapEntry, page_flags};
use crate::images::sink::chunked_digest;
use crate::images::{ImageName, Kind, Manifest, Sink, SinkError};
use crate::memory::parent::ParentMemory;

/// Headers and small runs are gathered up to so many bytes; what is larger is sent as it is.
const GATHERED: usize = 256 << 10;

/// The sink. Dropped before it is finished, it leaves nothing, and the server nothing either.
pub struct PageServerSink<S> {
    /// For everything but pages.
    local: S,
    connection: Connection,
    /// Others have the connection open too.
    inherited: bool,
    sent: BTreeMap<String, PagesElsewhere>,
}

impl<S: Sink> PageServerSink<S> {
    /// Sends pages over `connection`, which is `inherited` if other processes have it too.
    pub fn new(local: S, connection: Connection, inherited: bool) -> Self {
        Self { local, connection, inherited, sent: BTreeMap::new() }
    }

    /// Asks the server which of the pages of earlier images its own earlier images have, and forgets the others: they will be sent.
    ///
    /// # Errors
    /// [`SinkError::PageServer`].
    pub fn agree_on(&mut self, parent: &mut ParentMemory) -> Result<(), SinkError> {
        parent.retain(|kind, number| {
            let name = kind.name_for(number);
            let object = object_of(kind, number).map_err(self.failed(&name))?;
            self.has_parent(object).map_err(self.failed(&name))
        })
    }

    fn has_parent(&self, object: Object) -> io::Result<bool> {
        let mut answer = [0; 4];
        (&self.connection).write_all(&Command::HasParent { object }.encode())?;
        (&self.connection).read_exact(&mut answer)?;
        Ok(u32::from_le_bytes(answer) != 0)
    }

    fn failed(&self, name: &str) -> impl Fn(io::Error) -> SinkError + use<S> {
        let (name, peer) = (name.to_owned(), self.connection.peer().to_owned());
        move |source| SinkError::PageServer { name: name.clone(), peer: peer.clone(), source: told(source) }
    }

    /// Sends one pagemap and its pages; returns what the manifest says of them.
    fn send(&self, name: &str, entries: &[PagemapEntry], pages: &dyn Content) -> Result<PagesElsewhere, SinkError> {
        let failed = self.failed(name);
        let image = ImageName::parse(name).and_then(|image| Some((image.kind, image.number?)));
        let (kind, number) = image.ok_or_else(|| SinkError::Name { name: name.to_owned() })?;
        let object = object_of(kind, number).map_err(&failed)?;
        let mut writer = BufWriter::with_capacity(GATHERED, &self.connection);
        let answered = entries.iter().any(PagemapEntry::is_in_parent);
        writer.write_all(&Command::Open { object, answered }.encode()).map_err(&failed)?;
        if answered {
            let mut has_parent = [0];
            writer.flush().and_then(|()| (&self.connection).read_exact(&mut has_parent)).map_err(&failed)?;
            if has_parent == [0] {
                return Err(SinkError::NoParent { name: name.to_owned(), peer: self.connection.peer().to_owned() });
            }
        }
        let mut framed = Framed { writer, object, entries: entries.iter(), left: 0 };
        let digests = copy_in_order(name, pages, &mut framed).map_err(|error| match error {
            SinkError::Write { source, .. } => failed(source),
            other => other,
        })?;
        framed.finish().map_err(&failed)?;
        Ok(PagesElsewhere::new(entries, chunked_digest(pages.len(), digests)))
    }
}

fn object_of(kind: Kind, number: u64) -> io::Result<Object> {
    let unknown = || io::Error::new(io::ErrorKind::InvalidInput, format!("{kind:?} {number} cannot be named to it"));
    Object::of_image(kind, number).ok_or_else(unknown)
}

/// What people can do something with, in place of what the system says.
fn told(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => {
            io::Error::new(error.kind(), format!("the connection broke off ({error}); its own log may tell why"))
        }
        _ => error,
    }
}

/// Takes the contents of pages one after another, and puts before each run what it is.
struct Framed<'a, W: Write> {
    writer: W,
    object: Object,
    entries: std::slice::Iter<'a, PagemapEntry>,
    /// Bytes that are left of the run at hand.
    left: usize,
}

impl<W: Write> Framed<'_, W> {
    /// Writes headers up to that of the next run whose pages follow; whether there is one.
    fn next_run(&mut self) -> io::Result<bool> {
        for entry in self.entries.by_ref() {
            let pages = Pages::new(entry.vaddr, entry.pages()).map_err(invalid)?;
            let flags = entry.kind();
            self.writer.write_all(&Command::Add { object: self.object, pages, flags }.encode())?;
            if flags & page_flags::PRESENT != 0 {
                self.left = usize::try_from(pages.bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Writes what follows the last pages.
    fn finish(mut self) -> io::Result<()> {
        if self.left > 0 || self.next_run()? {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the pages end before their list does"));
        }
        self.writer.flush()
    }
}

fn invalid(error: ProtocolError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

impl<W: Write> Write for Framed<'_, W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.left == 0 && !self.next_run()? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "there are more pages than are listed"));
        }
        let written = self.writer.write(&buffer[..self.left.min(buffer.len())])?;
        self.left -= written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

impl<S: Sink> Sink for PageServerSink<S> {
    fn put(&mut self, name: &str, content: &[u8]) -> Result<(), SinkError> {
        self.local.put(name, content)
    }

    fn put_raw(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError> {
        self.local.put_raw(name, content)
    }

    /// The server chooses the number of the pages image.
    fn put_pages(
        &mut self,
        pagemap: &str,
        _number: u32,
        entries: &[PagemapEntry],
        pages: &dyn Content,
    ) -> Result<(), SinkError> {
        if self.sent.contains_key(pagemap) {
            return Err(SinkError::Duplicate { name: pagemap.to_owned() });
        }
        let sent = self.send(pagemap, entries, pages)?;
        self.sent.insert(pagemap.to_owned(), sent);
        Ok(())
    }

    fn put_beside(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError> {
        self.local.put_beside(name, content)
    }

    fn finish(&mut self, mut manifest: Manifest) -> Result<Manifest, SinkError> {
        let failed = self.failed("all processes");
        let end = if self.inherited { Command::ForceClose } else { Command::Close };
        let mut answer = [0; TAKEN.len()];
        (&self.connection).write_all(&end.encode()).map_err(&failed)?;
        (&self.connection).read_exact(&mut answer).map_err(&failed)?;
        if answer != TAKEN {
            return Err(SinkError::NotTaken { peer: self.connection.peer().to_owned() });
        }
        manifest.set_elsewhere(std::mem::take(&mut self.sent));
        self.local.finish(manifest)
    }

    fn seal(&mut self, dumped: &Dumped) -> Result<(), SinkError> {
        self.local.seal(dumped)
    }
}
