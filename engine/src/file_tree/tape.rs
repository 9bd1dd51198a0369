//! An uncompressed archive whose headers are in memory, and whose content is read from its files when it is asked for.
//!
//! So its length is known before a byte of content is read, and any part of it can be had at any time: it goes into
//! a checkpoint as images do. Holes of files are left out, in the old form of GNU tar, which every reader knows.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use tar::{Builder, EntryType, GnuExtSparseHeader, Header};

use super::pack::Packer;
use super::unpack::open_beneath;
use crate::images::Content;

/// Bytes of a record; content is padded to it.
const RECORD: u64 = 512;

/// An archive of files below a folder, which must not change while it is read.
pub struct Tape {
    root: OwnedFd,
    layout: Layout,
}

/// Where the bytes of the archive come from.
#[derive(Default)]
pub(super) struct Layout {
    /// Headers and padding, in order.
    head: Vec<u8>,
    /// Sorted by their start, without gaps.
    pieces: Vec<Piece>,
    files: Vec<Origin>,
    length: u64,
}

/// A file with content.
struct Origin {
    path: PathBuf,
    inode: u64,
}

/// Bytes of the archive from `start` on, up to the next piece.
struct Piece {
    start: u64,
    holder: Holder,
}

/// Who has the bytes of a piece.
#[derive(Clone, Copy)]
enum Holder {
    /// `head`, from here on.
    Head(usize),
    /// A file, from this offset on.
    File(usize, u64),
}

impl Write for Layout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !matches!(self.pieces.last(), Some(Piece { holder: Holder::Head(_), .. })) {
            self.pieces.push(Piece { start: self.length, holder: Holder::Head(self.head.len()) });
        }
        self.head.extend_from_slice(bytes);
        self.length += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Layout {
    /// Content of a file, and padding.
    fn content(&mut self, path: &Path, inode: u64, parts: &[Range<u64>]) -> io::Result<()> {
        let file = self.files.len();
        self.files.push(Origin { path: path.to_owned(), inode });
        for part in parts.iter().filter(|part| !part.is_empty()) {
            self.pieces.push(Piece { start: self.length, holder: Holder::File(file, part.start) });
            self.length += part.end - part.start;
        }
        let padding = self.length.next_multiple_of(RECORD) - self.length;
        self.write_all(&[0; RECORD as usize][..padding as usize])
    }
}

/// Something that writes entries into a layout.
pub(super) fn packer() -> Packer<Layout> {
    Packer::new(Layout::default(), |archive, path, mut header, mut file| {
        let metadata = file.metadata()?;
        let parts = parts_with_data(&mut file, metadata.len())?;
        match parts.as_slice() {
            [whole] if *whole == (0..metadata.len()) => {
                header.set_size(metadata.len());
                archive.append_data(&mut header, path, io::empty())?;
            }
            parts => sparse(archive, path, header, parts, metadata.len())?,
        }
        archive.get_mut().content(path, metadata.ino(), &parts)
    })
}

/// Writes the header of a file with holes (GNU tar's manual, "Old GNU Format").
fn sparse(
    archive: &mut Builder<Layout>,
    path: &Path,
    mut header: Header,
    parts: &[Range<u64>],
    length: u64,
) -> io::Result<()> {
    header.set_entry_type(EntryType::GNUSparse);
    header.set_size(parts.iter().map(|part| part.end - part.start).sum());
    // A part of no length at the end tells how long the file is.
    let mut parts = parts.to_vec();
    if parts.last().is_none_or(|last| last.end < length) {
        parts.push(length..length);
    }
    let gnu = header.as_gnu_mut().ok_or_else(|| io::Error::other("not a GNU header"))?;
    gnu.set_real_size(length);
    let (first, rest) = parts.split_at(parts.len().min(gnu.sparse.len()));
    gnu.set_is_extended(!rest.is_empty());
    for (slot, part) in gnu.sparse.iter_mut().zip(first) {
        slot.set_offset(part.start);
        slot.set_length(part.end - part.start);
    }
    let mut extended = Vec::new();
    let mut rest = rest.chunks(GnuExtSparseHeader::new().sparse().len()).peekable();
    while let Some(parts) = rest.next() {
        let mut more = GnuExtSparseHeader::new();
        for (slot, part) in more.sparse_mut().iter_mut().zip(parts) {
            slot.set_offset(part.start);
            slot.set_length(part.end - part.start);
        }
        more.set_is_extended(rest.peek().is_some());
        extended.extend_from_slice(more.as_bytes());
    }
    archive.append_data(&mut header, path, extended.as_slice())
}

/// The parts of a file that are no holes (lseek(2), `SEEK_DATA`); the whole file where the file system does not tell.
fn parts_with_data(file: &mut File, length: u64) -> io::Result<Vec<Range<u64>>> {
    let mut parts = Vec::new();
    let mut offset = 0;
    while offset < length {
        let start = match rustix::fs::seek(&*file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(rustix::io::Errno::INVAL) => return Ok(vec![0..length]),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&*file, rustix::fs::SeekFrom::Hole(start))?;
        // Readers expect all parts but the last to be whole records.
        let start = (start / RECORD * RECORD).max(offset);
        let end = end.next_multiple_of(RECORD).min(length);
        if start >= end {
            break;
        }
        parts.push(start..end);
        offset = end;
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(if length == 0 { vec![0..0] } else { parts })
}

impl Tape {
    /// The archive that the packer has written, of files below `root`.
    pub(super) fn new(root: OwnedFd, packer: Packer<Layout>) -> io::Result<Self> {
        Ok(Self { root, layout: packer.archive.into_inner()? })
    }

    fn open(&self, file: &Origin) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOATIME;
        let opened = File::from(open_beneath(self.root.as_fd(), &file.path, flags)?);
        if opened.metadata()?.ino() != file.inode {
            return Err(io::Error::other("another file has this name now"));
        }
        Ok(opened)
    }

    fn read_piece(&self, index: usize, skip: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self.layout.pieces[index].holder {
            Holder::Head(at) => {
                let at = at + skip as usize;
                buffer.copy_from_slice(&self.layout.head[at..at + buffer.len()]);
                Ok(())
            }
            Holder::File(file, offset) => {
                let file = &self.layout.files[file];
                let read = self.open(file).and_then(|opened| opened.read_exact_at(buffer, offset + skip));
                read.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", file.path.display())))
            }
        }
    }
}

impl Content for Tape {
    fn len(&self) -> u64 {
        self.layout.length
    }

    fn read_at(&self, offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        let pieces = &self.layout.pieces;
        let mut index = pieces.partition_point(|piece| piece.start <= offset).saturating_sub(1);
        let mut offset = offset;
        while !buffer.is_empty() {
            let start = pieces.get(index).map(|piece| piece.start).ok_or(io::ErrorKind::UnexpectedEof)?;
            let end = pieces.get(index + 1).map_or(self.layout.length, |next| next.start);
            let here = (end - offset).min(buffer.len() as u64) as usize;
            if here == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (part, rest) = buffer.split_at_mut(here);
            self.read_piece(index, offset - start, part)?;
            buffer = rest;
            offset += here as u64;
            index += 1;
        }
        Ok(())
    }
}

/// A path of this process that leads to an open folder, whatever its name is now.
pub(super) fn path_of(folder: &OwnedFd) -> PathBuf {
    Path::new("/proc/self/fd").join(folder.as_fd().as_raw_fd().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file_tree::unpack::unpack;
    use flate2::write::GzEncoder;
    use std::fs;

    fn folder() -> (tempfile::TempDir, OwnedFd) {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let fd = File::open(folder.path()).unwrap().into();
        (folder, fd)
    }

    /// The tape of a folder, its bytes put together from reads of this size.
    fn bytes(root: &OwnedFd, step: usize) -> io::Result<Vec<u8>> {
        let mut packer = packer();
        packer.folder(root, Path::new(""), 0)?;
        let tape = Tape::new(root.try_clone()?, packer)?;
        let mut all = vec![0; tape.len() as usize];
        for (part, offset) in all.chunks_mut(step).zip((0..).step_by(step)) {
            tape.read_at(offset, part)?;
        }
        assert!(tape.read_at(tape.len() - 1, &mut [0; 2]).is_err(), "past the end");
        Ok(all)
    }

    #[test]
    fn files_with_many_holes_come_back() {
        let (from, from_fd) = folder();
        let file = File::create(from.path().join("holes")).unwrap();
        for part in 0..40u64 {
            file.write_all_at(&vec![part as u8 + 1; 5000], part << 16).unwrap();
        }
        for (name, length) in [("all-hole", 1 << 20), ("hole-at-the-end", 100_000), ("empty", 0)] {
            let file = File::create(from.path().join(name)).unwrap();
            if name == "hole-at-the-end" {
                file.write_all_at(b"x", 0).unwrap();
            }
            file.set_len(length).unwrap();
        }
        fs::write(from.path().join("plain"), vec![9; 70_001]).unwrap();
        let archive = bytes(&from_fd, 1 << 20).unwrap();
        assert!(archive.len() < 600_000, "{} bytes with the holes", archive.len());
        assert_eq!(archive, bytes(&from_fd, 777).unwrap());
        let mut packed = GzEncoder::new(Vec::new(), flate2::Compression::none());
        packed.write_all(&archive).unwrap();
        let (to, to_fd) = folder();
        unpack(&packed.finish().unwrap()[..], &to_fd).unwrap();
        for name in ["holes", "all-hole", "hole-at-the-end", "empty", "plain"] {
            assert!(
                fs::read(from.path().join(name)).unwrap() == fs::read(to.path().join(name)).unwrap(),
                "{name} is another"
            );
        }
    }

    #[test]
    fn a_file_that_changes_meanwhile_is_told() {
        let (from, from_fd) = folder();
        let path = from.path().join("file");
        fs::write(&path, vec![1; 4096]).unwrap();
        let mut packer = packer();
        packer.folder(&from_fd, Path::new(""), 0).unwrap();
        let tape = Tape::new(from_fd, packer).unwrap();
        File::create(&path).unwrap().set_len(5).unwrap();
        let told = tape.read_at(0, &mut vec![0; tape.len() as usize]).unwrap_err().to_string();
        assert!(told.starts_with("file: "), "{told}");
        fs::rename(&path, from.path().join("other")).unwrap();
        fs::write(&path, vec![1; 4096]).unwrap();
        let told = tape.read_at(0, &mut vec![0; tape.len() as usize]).unwrap_err().to_string();
        assert!(told.contains("another file"), "{told}");
    }
}
