//! What a page server writes: `pagemap` and `pages` images, as a dump into the same folder would have.
//!
//! Files have hidden names until all are complete, and are removed if they do not become so: what has an image's name is whole.
//! Pages images are numbered from [`FIRST`] on, as CRIU's server does it, so that they do not meet those of the dump's own folder.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use prost::Message;
use rustix::fs::{AtFlags, Mode, OFlags, openat, readlinkat, renameat, symlinkat, unlinkat};
use rustix::io::Errno;

use super::protocol::{Object, Pages};
use super::server::ReceiveError;
use crate::images::frame::MAX_ENTRIES;
use crate::images::pagemap::{PagemapEntry, PagemapHead, page_flags};
use crate::images::parent::PARENT_LINK;
use crate::images::{ImageSet, Kind};
use crate::journal::Journal;
use crate::memory::images::PageImages;
use crate::memory::pageset::PageSet;

/// Number of the first pages image.
pub const FIRST: u32 = 0x1_0001;
/// Most objects of one dump: more than a tree has.
const MAX_OBJECTS: usize = 1 << 20;
/// What is received and written at once.
const PIECE: usize = 1 << 20;

/// A folder that takes pages.
pub struct PageStore<'a> {
    folder: &'a OwnedFd,
    journal: Option<(Journal, PathBuf)>,
    parent: Option<ImageSet>,
    /// What the link to their folder says, if it is to be made.
    link: Option<PathBuf>,
    next: u32,
    objects: BTreeSet<Object>,
    open: Option<Incoming>,
    /// Names of the images that have hidden ones yet.
    hidden: Vec<String>,
    pages: u64,
    buffer: Vec<u8>,
}

/// The images of one object.
struct Incoming {
    object: Object,
    parent: Option<PageSet>,
    pagemap: BufWriter<File>,
    pagemap_name: String,
    pages: File,
    pages_name: String,
    entries: usize,
    /// Where the last run ends.
    end: u64,
}

impl<'a> PageStore<'a> {
    /// Writes into `folder`. `parent` are its earlier images, if it has any.
    pub fn new(folder: &'a OwnedFd, parent: Option<ImageSet>) -> Self {
        Self {
            folder,
            journal: None,
            parent,
            link: None,
            next: FIRST,
            objects: BTreeSet::new(),
            open: None,
            hidden: Vec::new(),
            pages: 0,
            buffer: vec![0; PIECE],
        }
    }

    /// Has what is not complete noted in `journal`; `path` is the folder's.
    #[must_use]
    pub fn noted_in(mut self, journal: Journal, path: PathBuf) -> Self {
        self.journal = Some((journal, path));
        self
    }

    /// Has the folder name `link`, a path seen from it, as that of its parent images; without, it names the one that it did.
    #[must_use]
    pub fn with_link(mut self, link: Option<PathBuf>) -> Self {
        self.link = link;
        self
    }

    /// How many objects and pages there are.
    pub fn received(&self) -> (usize, u64) {
        (self.objects.len(), self.pages)
    }

    /// Whether the parent images have pages of an object.
    pub(super) fn has_parent(&self, object: Object) -> Result<bool, ReceiveError> {
        let (kind, number) = object.image();
        Ok(self.parent.as_ref().map_or(Ok(false), |parent| parent.contains(&kind.name_for(number)))?)
    }

    /// Begins an object; whether the parent images have pages of it.
    pub(super) fn open(&mut self, object: Object) -> Result<bool, ReceiveError> {
        self.close()?;
        let (kind, number) = object.image();
        let pagemap_name = kind.name_for(number);
        if self.objects.len() == MAX_OBJECTS || !self.objects.insert(object) {
            return Err(ReceiveError::Twice { name: pagemap_name });
        }
        let parent = match &self.parent {
            Some(parent) => PageImages::read(parent, &pagemap_name, kind)?.map(|images| images.set),
            None => None,
        };
        let pages_name = Kind::Pages.name_for(self.next);
        let pages = self.create(&pages_name)?;
        let mut pagemap = BufWriter::new(self.create(&pagemap_name)?);
        let written = pagemap.write_all(&kind.magic());
        written
            .and_then(|()| write_entry(&mut pagemap, &PagemapHead { pages_id: self.next }))
            .map_err(write_failed(&pagemap_name))?;
        self.next += 1;
        let has_parent = parent.is_some();
        self.open = Some(Incoming { object, parent, pagemap, pagemap_name, pages, pages_name, entries: 0, end: 0 });
        Ok(has_parent)
    }

    /// Adds a run of the open object, whose pages come from `source`.
    pub(super) fn add(
        &mut self,
        object: Object,
        pages: Pages,
        flags: u32,
        source: &mut impl Read,
    ) -> Result<(), ReceiveError> {
        let open = self.open.as_mut().filter(|open| open.object == object);
        let open = open.ok_or(ReceiveError::NotOpen { object })?;
        let range = pages.range();
        let name = || open.pagemap_name.clone();
        if range.start < open.end || open.entries == MAX_ENTRIES {
            return Err(ReceiveError::Disorder { name: name(), start: range.start });
        }
        let (in_parent, present) = (flags & page_flags::PARENT != 0, flags & page_flags::PRESENT != 0);
        if in_parent {
            let within = open.parent.iter().flat_map(|parent| parent.within(range.clone()));
            let known: u64 = within.map(|run| run.range.end - run.range.start).sum();
            if present || known != pages.bytes() {
                return Err(ReceiveError::NotInParent { name: name(), start: range.start, count: pages.count() });
            }
        }
        let entry = PagemapEntry::new(pages.start(), pages.count(), flags);
        write_entry(&mut open.pagemap, &entry).map_err(write_failed(&open.pagemap_name))?;
        open.entries += 1;
        open.end = range.end;
        if present {
            let mut left = pages.bytes();
            while left > 0 {
                let room = &mut self.buffer[..left.min(PIECE as u64) as usize];
                let read = match source.read(room) {
                    Ok(0) => return Err(ReceiveError::connection(io::ErrorKind::UnexpectedEof.into())),
                    Ok(read) => read,
                    Err(error) => return Err(ReceiveError::connection(error)),
                };
                open.pages.write_all(&room[..read]).map_err(write_failed(&open.pages_name))?;
                left -= read as u64;
            }
            self.pages += pages.count();
        }
        Ok(())
    }

    /// Completes the images of the open object.
    fn close(&mut self) -> Result<(), ReceiveError> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        open.pagemap.flush().map_err(write_failed(&open.pagemap_name))
    }

    /// Gives everything that was received its name.
    pub(super) fn complete(&mut self) -> Result<(), ReceiveError> {
        self.close()?;
        self.make_link().map_err(|errno| write_failed(PARENT_LINK)(errno.into()))?;
        for name in &self.hidden {
            self.note(name);
        }
        let mut named = Vec::new();
        while let Some(name) = self.hidden.pop() {
            if let Err(errno) = renameat(self.folder, hidden(&name), self.folder, &name) {
                named.iter().for_each(|name: &String| self.remove(name));
                self.hidden.push(name.clone());
                return Err(write_failed(&name)(errno.into()));
            }
            named.push(name);
        }
        if let Some((journal, _)) = &self.journal {
            journal.keep_paths();
        }
        Ok(())
    }

    fn make_link(&self) -> Result<(), Errno> {
        let Some(link) = &self.link else { return Ok(()) };
        // What is no link is somebody else's.
        if readlinkat(self.folder, PARENT_LINK, Vec::new()).is_ok() {
            unlinkat(self.folder, PARENT_LINK, AtFlags::empty())?;
        }
        symlinkat(link, self.folder, PARENT_LINK)
    }

    fn create(&mut self, name: &str) -> Result<File, ReceiveError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let hidden = hidden(name);
        self.note(&hidden);
        self.remove(&hidden);
        let file = openat(self.folder, &hidden, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| write_failed(name)(errno.into()))?;
        self.hidden.push(name.to_owned());
        Ok(File::from(file))
    }

    fn note(&self, name: &str) {
        if let Some((journal, folder)) = &self.journal {
            journal.path(&folder.join(name));
        }
    }

    fn remove(&self, name: &str) {
        match unlinkat(self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => tracing::warn!(name, %error, "what was received in vain stays behind"),
        }
    }
}

impl Drop for PageStore<'_> {
    fn drop(&mut self) {
        for name in std::mem::take(&mut self.hidden) {
            self.remove(&hidden(&name));
        }
    }
}

/// No image's name begins with a dot.
fn hidden(name: &str) -> String {
    format!(".{name}.part")
}

fn write_entry(writer: &mut impl Write, message: &impl Message) -> io::Result<()> {
    let bytes = message.encode_to_vec();
    writer.write_all(&(bytes.len() as u32).to_le_bytes())?;
    writer.write_all(&bytes)
}

fn write_failed(name: &str) -> impl FnOnce(io::Error) -> ReceiveError {
    move |source| ReceiveError::Write { name: name.to_owned(), source }
}
