//! Writing an archive in one pass.
//!
//! Sizes are known before the bytes are written, so that the archive goes to anything that takes bytes: a file, a
//! compressor, a pipe.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::OFlags;

use super::{IMAGE_PREFIX, RECORD};
use crate::images::content::Content;
use crate::images::copy::{copy_in_order, copy_into_file, default_threads};
use crate::images::manifest::{ImageDigest, MANIFEST_NAME, Manifest};
use crate::images::sink::{Ledger, Sink, SinkError, chunked_digest, record_digest, write_error};

/// Writes an image set into a tar archive.
///
/// An archive is complete only when [`ArchiveSink::close`] has written its end.
pub struct ArchiveSink<W: Write + Send> {
    writer: W,
    /// The writer once more, if it is a file that several threads may write to at once. Both share one position.
    file: Option<File>,
    modified: u64,
    images: Ledger,
    members: Ledger,
}

impl ArchiveSink<File> {
    /// Begins an archive in a file, at its position. If the file can be written at any offset, large content is copied with
    /// several threads.
    ///
    /// # Errors
    /// [`SinkError::Write`].
    pub fn in_file(file: File) -> Result<Self, SinkError> {
        // On Linux `pwrite(2)` to a file opened for appending ignores the offset.
        let appends = rustix::fs::fcntl_getfl(&file).is_ok_and(|flags| flags.contains(OFlags::APPEND));
        let again = file.try_clone().and_then(|mut again| again.stream_position().map(|_| again)).ok();
        Self::begin(file, again.filter(|_| !appends))
    }
}

impl<W: Write + Send> ArchiveSink<W> {
    /// Begins an archive with the images' folder.
    ///
    /// # Errors
    /// [`SinkError::Write`].
    pub fn new(writer: W) -> Result<Self, SinkError> {
        Self::begin(writer, None)
    }

    fn begin(writer: W, file: Option<File>) -> Result<Self, SinkError> {
        let modified = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut archive = Self { writer, file, modified, images: Ledger::default(), members: Ledger::default() };
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
        let digests = match &mut self.file {
            None => copy_in_order(path, content, &mut self.writer)?,
            Some(file) => {
                let start = file.stream_position().map_err(|source| write_error(path, source))?;
                let digests = copy_into_file(path, content, file, start, default_threads())?;
                file.seek(SeekFrom::Start(start + length)).map_err(|source| write_error(path, source))?;
                digests
            }
        };
        self.padding(path, length)?;
        Ok(chunked_digest(length, digests))
    }
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

    fn put_beside(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError> {
        self.put_member_raw(name, content)
    }

    fn finish(&mut self, mut manifest: Manifest) -> Result<Manifest, SinkError> {
        manifest.members = self.members.images.clone();
        let (manifest, bytes) = self.images.close(manifest)?;
        self.write(&image_path(MANIFEST_NAME), &bytes)?;
        Ok(manifest)
    }
}
