//! Writing an archive in one pass.
//!
//! Sizes are known before the bytes are written, so that the archive goes to anything that takes bytes: a file, a
//! compressor, a pipe.

use std::io::{self, Write};
use std::sync::mpsc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{IMAGE_PREFIX, RECORD};
use crate::images::content::Content;
use crate::images::digest::{CHUNK, ChunkDigester, ChunkDigests, chunk_count, chunk_length};
use crate::images::manifest::{ImageDigest, MANIFEST_NAME, Manifest};
use crate::images::sink::{Ledger, Sink, SinkError, chunked_digest, record_digest};

/// Content of at least this is read by a thread of its own, while the one before is written.
const LARGE: u64 = 4 * CHUNK;
/// Chunks that are read ahead.
const READ_AHEAD: usize = 3;

/// Writes an image set into a tar archive.
///
/// An archive is complete only when [`ArchiveSink::close`] has written its end.
pub struct ArchiveSink<W: Write + Send> {
    writer: W,
    modified: u64,
    images: Ledger,
    members: Ledger,
}

impl<W: Write + Send> ArchiveSink<W> {
    /// Begins an archive with the images' folder.
    ///
    /// # Errors
    /// [`SinkError::Write`].
    pub fn new(writer: W) -> Result<Self, SinkError> {
        let modified = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut archive = Self { writer, modified, images: Ledger::default(), members: Ledger::default() };
        archive.header(IMAGE_PREFIX, 0, tar::EntryType::Directory)?;
        Ok(archive)
    }

    /// Writes a member beside the images. Those written before the set is finished are in its manifest.
    ///
    /// # Errors
    /// [`SinkError`].
    pub fn put_member(&mut self, name: &str, content: &[u8]) -> Result<(), SinkError> {
        self.members.admit(name)?;
        let digest = self.write(name, content)?;
        self.members.note(name, digest);
        Ok(())
    }

    /// Writes a member beside the images, that is read as it is written.
    ///
    /// # Errors
    /// [`SinkError`].
    pub fn put_member_raw(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError> {
        self.members.admit(name)?;
        let digest = self.copy(name, content)?;
        self.members.note(name, digest);
        Ok(())
    }

    /// Writes the end of the archive and gives the writer back, flushed.
    ///
    /// # Errors
    /// [`SinkError::Write`].
    pub fn close(mut self) -> Result<W, SinkError> {
        let end = [0; 2 * RECORD as usize];
        self.writer.write_all(&end).and_then(|()| self.writer.flush()).map_err(|source| write_error("end", source))?;
        Ok(self.writer)
    }

    fn header(&mut self, path: &str, length: u64, kind: tar::EntryType) -> Result<(), SinkError> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind == tar::EntryType::Directory { 0o700 } else { 0o600 });
        header.set_mtime(self.modified);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(length);
        header
            .set_path(path)
            .and_then(|()| {
                header.set_cksum();
                self.writer.write_all(header.as_bytes())
            })
            .map_err(|source| write_error(path, source))
    }

    fn padding(&mut self, path: &str, length: u64) -> Result<(), SinkError> {
        let padding = length.next_multiple_of(RECORD) - length;
        self.writer.write_all(&[0; RECORD as usize][..padding as usize]).map_err(|source| write_error(path, source))
    }

    fn write(&mut self, path: &str, content: &[u8]) -> Result<ImageDigest, SinkError> {
        let digest = record_digest(content);
        self.header(path, digest.length, tar::EntryType::Regular)?;
        self.writer.write_all(content).map_err(|source| write_error(path, source))?;
        self.padding(path, digest.length)?;
        Ok(digest)
    }

    fn copy(&mut self, path: &str, content: &dyn Content) -> Result<ImageDigest, SinkError> {
        let length = content.len();
        self.header(path, length, tar::EntryType::Regular)?;
        let digests = copy_in_order(path, content, &mut self.writer)?;
        self.padding(path, length)?;
        Ok(chunked_digest(length, digests))
    }
}

fn write_error(name: &str, source: io::Error) -> SinkError {
    SinkError::Write { name: name.to_owned(), source }
}

fn image_path(name: &str) -> String {
    [IMAGE_PREFIX, name].concat()
}

impl<W: Write + Send> Sink for ArchiveSink<W> {
    fn put(&mut self, name: &str, content: &[u8]) -> Result<(), SinkError> {
        self.images.admit(name)?;
        let digest = self.write(&image_path(name), content)?;
        self.images.note(name, digest);
        Ok(())
    }

    fn put_raw(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError> {
        self.images.admit(name)?;
        let digest = self.copy(&image_path(name), content)?;
        self.images.note(name, digest);
        Ok(())
    }

    fn finish(&mut self, mut manifest: Manifest) -> Result<Manifest, SinkError> {
        manifest.members = self.members.images.clone();
        let (manifest, bytes) = self.images.close(manifest)?;
        self.write(&image_path(MANIFEST_NAME), &bytes)?;
        Ok(manifest)
    }
}

/// Copies `content` to `writer` from its beginning to its end. When it is large, a second thread reads and digests the next chunks
/// while this one writes.
fn copy_in_order(name: &str, content: &dyn Content, writer: &mut dyn Write) -> Result<ChunkDigests, SinkError> {
    let length = content.len();
    let digester = ChunkDigester::new(length);
    let read = |index: u64, buffer: &mut Vec<u8>| {
        buffer.resize(chunk_length(length, index), 0);
        content.read_at(index * CHUNK, buffer).map_err(|source| SinkError::Content {
            name: name.to_owned(),
            offset: index * CHUNK,
            source,
        })?;
        digester.record(index, buffer);
        Ok(())
    };
    let mut write = |chunk: &[u8]| writer.write_all(chunk).map_err(|source| write_error(name, source));
    if length < LARGE {
        let mut buffer = Vec::new();
        for index in 0..chunk_count(length) {
            read(index, &mut buffer)?;
            write(&buffer)?;
        }
        return Ok(digester.finish());
    }
    std::thread::scope(|scope| {
        let (full_in, full) = mpsc::sync_channel::<Result<Vec<u8>, SinkError>>(READ_AHEAD);
        let (empty, empty_out) = mpsc::sync_channel(READ_AHEAD + 2);
        scope.spawn(move || {
            for index in 0..chunk_count(length) {
                // A buffer that came back, or a new one while not all are out. When the other side is gone, so is the need.
                let mut buffer = empty_out.try_recv().unwrap_or_default();
                let chunk = read(index, &mut buffer).map(|()| buffer);
                let failed = chunk.is_err();
                if full_in.send(chunk).is_err() || failed {
                    return;
                }
            }
        });
        for chunk in full {
            let chunk = chunk?;
            write(&chunk)?;
            let _ = empty.try_send(chunk);
        }
        Ok::<(), SinkError>(())
    })?;
    Ok(digester.finish())
}
