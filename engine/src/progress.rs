//! How far a dump or restore has come with the memory of its tree, and that it goes no further once it is given up.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cancel::Cancel;
use crate::dump::{DumpOptions, Dumped};
use crate::images::pagemap::PagemapEntry;
use crate::images::{Content, Manifest, Sink, SinkError};

/// How images of pages are called, before their number.
const PAGES: &str = "pages-";

/// Told of the bytes that are done, and of how many there are; by several threads, at every chunk of memory.
type Tell = dyn Fn(u64, u64) + Send + Sync;

/// Whom to tell; nobody by default. Clones tell of the same operation.
#[derive(Clone, Default)]
pub struct Progress(Option<Arc<Told>>);

struct Told {
    tell: Box<Tell>,
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// Calls `tell` with the bytes that are done and how many there are. Chunks have 1 MiB at most.
    pub fn new(tell: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(Told { tell: Box::new(tell), done: AtomicU64::new(0), total: AtomicU64::new(0) })))
    }

    /// Says how many bytes there are.
    pub(crate) fn expect(&self, total: u64) {
        if let Some(told) = &self.0 {
            told.total.store(total, Ordering::Relaxed);
        }
    }

    /// Says that so many more are done.
    pub(crate) fn add(&self, bytes: u64) {
        if let Some(told) = &self.0 {
            let done = told.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            (told.tell)(done, told.total.load(Ordering::Relaxed));
        }
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Progress(told)" } else { "Progress(untold)" })
    }
}

/// Tells of the pages that go through it into a sink, and lets nothing through once the dump is given up.
pub(crate) struct Metered<'a> {
    sink: &'a mut dyn Sink,
    progress: &'a Progress,
    cancel: &'a Cancel,
}

impl<'a> Metered<'a> {
    /// Nothing has gone through; `total` bytes will.
    pub fn new(sink: &'a mut dyn Sink, options: &'a DumpOptions, total: u64) -> Self {
        options.progress.expect(total);
        Self { sink, progress: &options.progress, cancel: &options.cancel }
    }
}

impl Sink for Metered<'_> {
    fn put(&mut self, name: &str, content: &[u8]) -> Result<(), SinkError> {
        self.sink.put(name, content)
    }

    fn put_raw(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError> {
        let (progress, cancel) = (name.starts_with(PAGES).then_some(self.progress), self.cancel);
        self.sink.put_raw(name, &MeteredContent { content, progress, cancel })
    }

    fn put_pages(
        &mut self,
        pagemap: &str,
        number: u32,
        entries: &[PagemapEntry],
        pages: &dyn Content,
    ) -> Result<(), SinkError> {
        let pages = MeteredContent { content: pages, progress: Some(self.progress), cancel: self.cancel };
        self.sink.put_pages(pagemap, number, entries, &pages)
    }

    fn put_beside(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError> {
        self.sink.put_beside(name, &MeteredContent { content, progress: None, cancel: self.cancel })
    }

    fn finish(&mut self, manifest: Manifest) -> Result<Manifest, SinkError> {
        self.sink.finish(manifest)
    }

    fn seal(&mut self, dumped: &Dumped) -> Result<(), SinkError> {
        self.sink.seal(dumped)
    }
}

/// Reading it fails with the [`Cancelled`](crate::cancel::Cancelled) once the dump is given up.
pub(crate) struct MeteredContent<'a> {
    content: &'a dyn Content,
    progress: Option<&'a Progress>,
    cancel: &'a Cancel,
}

impl<'a> MeteredContent<'a> {
    /// Content of which nobody is told.
    pub fn untold(content: &'a dyn Content, cancel: &'a Cancel) -> Self {
        Self { content, progress: None, cancel }
    }
}

impl Content for MeteredContent<'_> {
    fn len(&self) -> u64 {
        self.content.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.cancel.check().map_err(io::Error::other)?;
        self.content.read_at(offset, buffer)?;
        if let Some(progress) = self.progress {
            progress.add(buffer.len() as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::Cancelled;
    use crate::images::{FolderOptions, FolderSink};
    use std::sync::Mutex;

    #[test]
    fn every_byte_of_pages_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let told: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
        let heard = told.clone();
        let progress = Progress::new(move |done, total| heard.lock().unwrap().push((done, total)));
        let mut sink = FolderSink::open(folder.path(), FolderOptions::default()).unwrap();
        let options = DumpOptions { progress, ..DumpOptions::default() };
        let mut metered = Metered::new(&mut sink, &options, 20 << 20);
        metered.put("pagemap-1.img", &[1; 100]).unwrap();
        metered.put_raw("tmpfs-dev-1.tar.gz.img", &vec![1; 100]).unwrap();
        metered.put_raw("pages-1.img", &vec![1; 20 << 20]).unwrap();
        let mut told = told.lock().unwrap().clone();
        told.sort_unstable();
        assert!(told.len() >= 20, "{} calls", told.len());
        assert_eq!(told.last(), Some(&(20 << 20, 20 << 20)));
        assert!(told.windows(2).all(|pair| pair[0].0 < pair[1].0), "{told:?}");
    }

    #[test]
    fn given_up_between_two_chunks() {
        let folder = tempfile::tempdir().unwrap();
        let cancel = Cancel::default();
        let (ended, chunks) = (cancel.clone(), Arc::new(AtomicU64::new(0)));
        let seen = chunks.clone();
        let progress = Progress::new(move |_, _| {
            seen.fetch_add(1, Ordering::Relaxed);
            ended.signal(libc::SIGTERM);
        });
        let options = DumpOptions { progress, cancel, ..DumpOptions::default() };
        let mut sink = FolderSink::open(folder.path(), FolderOptions::default()).unwrap();
        let failed = Metered::new(&mut sink, &options, 0).put_raw("pages-1.img", &vec![1; 20 << 20]).unwrap_err();
        let SinkError::Content { source, .. } = failed else { panic!("{failed}") };
        let why = source.get_ref().and_then(|why| why.downcast_ref::<Cancelled>());
        assert_eq!(why, Some(&Cancelled::Signal { signal: libc::SIGTERM }));
        // One by each thread at most.
        assert!(chunks.load(Ordering::Relaxed) <= 4, "{chunks:?} chunks");
    }
}
