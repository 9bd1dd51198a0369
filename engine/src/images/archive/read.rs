//! Reading an archive, ours or Podman's.
//!
//! A file is indexed and used in place; a stream (standard input, a decompressor) is copied once into an unlinked file. Either way
//! a member is afterwards a part of a file, fit for `mmap(2)`.
//!
//! Headers are walked here, record by record, because every archive is taken for hostile: nothing is allocated or skipped by
//! what a header claims before it is checked, and only regular files at most one folder deep are accepted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use tar::EntryType;

use super::{IMAGE_PREFIX, RECORD};
use crate::images::source::{RawRegion, Source, SourceError};

/// Most members of an archive.
const MAX_MEMBERS: usize = 1 << 20;
/// Longest extended header that is read; it holds a path and attributes.
const MAX_EXTENDED: u64 = 1 << 20;
/// Most bytes that may follow the end: GNU tar pads to 10 KiB, and a decompressor checks its sums when it is read to its end.
const MAX_TRAILER: u64 = 1 << 20;
/// Bytes of a stream that are copied at a time.
const COPY: u64 = 256 << 10;
/// Members start at page boundaries in a spool file.
const PAGE: u64 = 4096;

/// Where the members of a stream are kept while they are used.
#[derive(Clone, Debug)]
pub enum Spool {
    /// In memory (`memfd_create(2)`).
    Memory,
    /// In a nameless file in this folder (`O_TMPFILE`).
    Folder(PathBuf),
}

/// The images and members of an archive.
pub struct ArchiveSource {
    file: Arc<File>,
    images: BTreeMap<String, Place>,
    members: BTreeMap<String, Place>,
}

/// Where a member lies in the file.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    length: u64,
}

impl ArchiveSource {
    /// Indexes an uncompressed archive in a file that can be read at any offset. The file must not change while it is used.
    ///
    /// # Errors
    /// [`SourceError`], for anything that an archive of ours has not.
    pub fn open(file: File) -> Result<Self, SourceError> {
        let metadata = file.metadata().map_err(SourceError::archive)?;
        let mut tape = InPlace { file: &file, position: 0, length: metadata.len() };
        let (images, members) = index(&mut tape)?;
        Ok(Self { file: Arc::new(file), images, members })
    }

    /// Reads an archive from a stream to its end, and keeps at most `limit` bytes of it.
    ///
    /// # Errors
    /// [`SourceError`], for anything that an archive of ours has not, and if there is more than `limit`.
    pub fn spool(mut stream: impl Read, spool: &Spool, limit: u64) -> Result<Self, SourceError> {
        let file = spool_file(spool).map_err(SourceError::archive)?;
        let mut tape = Copied { stream: &mut stream, position: 0, file: &file, end: 0, limit };
        let (images, members) = index(&mut tape)?;
        let trailer = io::copy(&mut stream.take(MAX_TRAILER), &mut io::sink()).map_err(SourceError::archive)?;
        if trailer == MAX_TRAILER {
            return Err(SourceError::Trailer);
        }
        Ok(Self { file: Arc::new(file), images, members })
    }

    /// Names of the members beside the images (`config.dump`), in order.
    pub fn members(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// A member beside the images.
    pub fn member(&self, name: &str) -> Option<RawRegion> {
        self.members.get(name).map(|place| self.region(place))
    }

    fn region(&self, place: &Place) -> RawRegion {
        RawRegion::new(Arc::clone(&self.file), place.offset, place.length)
    }
}

impl Source for ArchiveSource {
    fn names(&self) -> Result<Vec<String>, SourceError> {
        Ok(self.images.keys().cloned().collect())
    }

    fn find(&self, name: &str) -> Result<Option<RawRegion>, SourceError> {
        Ok(self.images.get(name).map(|place| self.region(place)))
    }
}

fn spool_file(spool: &Spool) -> io::Result<File> {
    let file = match spool {
        Spool::Memory => rustix::fs::memfd_create("ferry-archive", MemfdFlags::CLOEXEC)?,
        Spool::Folder(folder) => {
            rustix::fs::open(folder, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?
        }
    };
    Ok(file.into())
}

/// Bytes of an archive in order, and where those of a member can be read later.
trait Tape {
    /// Offset in the archive of what comes next, for messages.
    fn position(&self) -> u64;
    /// Fills the buffer; `false` if the archive ends before its first byte.
    fn read(&mut self, buffer: &mut [u8]) -> Result<bool, SourceError>;
    /// Passes over `length` bytes and says at which offset of the file they can be read.
    fn place(&mut self, length: u64) -> Result<u64, SourceError>;
}

/// An archive in a file, left where it is.
struct InPlace<'a> {
    file: &'a File,
    position: u64,
    length: u64,
}

impl Tape for InPlace<'_> {
    fn position(&self) -> u64 {
        self.position
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<bool, SourceError> {
        if self.position == self.length {
            return Ok(false);
        }
        let offset = self.place(buffer.len() as u64)?;
        self.file.read_exact_at(buffer, offset).map_err(SourceError::archive)?;
        Ok(true)
    }

    fn place(&mut self, length: u64) -> Result<u64, SourceError> {
        let offset = self.position;
        let end = offset.checked_add(length).filter(|&end| end <= self.length);
        self.position = end.ok_or(SourceError::Truncated { offset: self.length })?;
        Ok(offset)
    }
}

/// An archive in a stream, whose members are copied to a file.
struct Copied<'a, R> {
    stream: &'a mut R,
    position: u64,
    file: &'a File,
    end: u64,
    limit: u64,
}

impl<R: Read> Tape for Copied<'_, R> {
    fn position(&self) -> u64 {
        self.position
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<bool, SourceError> {
        let mut got = 0;
        while got < buffer.len() {
            match self.stream.read(&mut buffer[got..]) {
                Ok(0) if got == 0 => return Ok(false),
                Ok(0) => return Err(SourceError::Truncated { offset: self.position }),
                Ok(part) => {
                    got += part;
                    self.position += part as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(SourceError::archive(error)),
            }
        }
        Ok(true)
    }

    fn place(&mut self, length: u64) -> Result<u64, SourceError> {
        let offset = self.end.next_multiple_of(PAGE);
        let end = offset.checked_add(length).filter(|&end| end <= self.limit);
        self.end = end.ok_or(SourceError::ArchiveTooLarge { limit: self.limit })?;
        let mut buffer = vec![0; length.min(COPY) as usize];
        let mut done = 0;
        while done < length {
            let part = &mut buffer[..(length - done).min(COPY) as usize];
            if !self.read(part)? {
                return Err(SourceError::Truncated { offset: self.position });
            }
            self.file.write_all_at(part, offset + done).map_err(SourceError::archive)?;
            done += part.len() as u64;
        }
        Ok(offset)
    }
}

type Index = BTreeMap<String, Place>;

/// Walks the archive and finds its images and its other members.
fn index(tape: &mut dyn Tape) -> Result<(Index, Index), SourceError> {
    let (mut images, mut members) = (Index::new(), Index::new());
    let mut extended = Extended::default();
    while let Some(header) = next_header(tape)? {
        let offset = tape.position();
        let length = header.entry_size().map_err(|_| SourceError::Header { offset })?;
        match header.entry_type() {
            EntryType::XHeader => extended.read_pax(tape, length)?,
            EntryType::GNULongName => extended.read_long_name(tape, length)?,
            EntryType::XGlobalHeader => drop(read_extended(tape, length)?),
            kind => {
                let Extended { path, length: real_length } = std::mem::take(&mut extended);
                let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
                let length = real_length.unwrap_or(length);
                let Some(name) = checked_name(&path, kind)? else { continue };
                let place = Place { offset: tape.place(length)?, length };
                tape.pad(length)?;
                let (group, name) = match name.strip_prefix(IMAGE_PREFIX) {
                    Some(image) => (&mut images, image),
                    None => (&mut members, name),
                };
                if group.insert(name.to_owned(), place).is_some() {
                    return Err(SourceError::Duplicate { name: name.to_owned() });
                }
            }
        }
        if images.len() + members.len() > MAX_MEMBERS {
            return Err(SourceError::TooManyMembers);
        }
    }
    // A plain image folder that somebody packed.
    if images.is_empty() && members.contains_key("inventory.img") {
        std::mem::swap(&mut images, &mut members);
    }
    Ok((images, members))
}

impl dyn Tape + '_ {
    /// Passes over what pads a member of this length.
    fn pad(&mut self, length: u64) -> Result<(), SourceError> {
        let padding = (RECORD - length % RECORD) % RECORD;
        let mut buffer = [0; RECORD as usize];
        if padding != 0 && !self.read(&mut buffer[..padding as usize])? {
            return Err(SourceError::Truncated { offset: self.position() });
        }
        Ok(())
    }
}

/// The next header, or `None` at the archive's end mark, which is two empty records. An archive that ends without it is
/// truncated.
fn next_header(tape: &mut dyn Tape) -> Result<Option<tar::Header>, SourceError> {
    let offset = tape.position();
    let mut header = tar::Header::new_old();
    let mut read = || {
        let there = tape.read(header.as_mut_bytes())?;
        if there { Ok(header.as_bytes().iter().all(|&byte| byte == 0)) } else { Err(SourceError::Truncated { offset }) }
    };
    if read()? {
        return if read()? { Ok(None) } else { Err(SourceError::Header { offset }) };
    }
    let bytes = header.as_bytes();
    // The sum is taken with the field that holds it, 148 to 155, as spaces.
    let sum: u32 =
        (0..).zip(bytes).map(|(at, &byte)| u32::from(if (148..156).contains(&at) { b' ' } else { byte })).sum();
    if header.cksum().ok() == Some(sum) { Ok(Some(header)) } else { Err(SourceError::Header { offset }) }
}

/// What extended headers say about the next member.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    length: Option<u64>,
}

impl Extended {
    /// Lines of `LENGTH KEY=VALUE`. Only the path and the size matter here.
    fn read_pax(&mut self, tape: &mut dyn Tape, length: u64) -> Result<(), SourceError> {
        let offset = tape.position();
        let content = read_extended(tape, length)?;
        for extension in tar::PaxExtensions::new(&content) {
            let extension = extension.map_err(|_| SourceError::Header { offset })?;
            match extension.key_bytes() {
                b"path" => self.path = Some(extension.value_bytes().to_vec()),
                b"size" => {
                    let size = extension.value().ok().and_then(|value| value.parse().ok());
                    self.length = Some(size.ok_or(SourceError::Header { offset })?);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A path that ends with a zero byte.
    fn read_long_name(&mut self, tape: &mut dyn Tape, length: u64) -> Result<(), SourceError> {
        let mut path = read_extended(tape, length)?;
        if path.last() == Some(&0) {
            path.pop();
        }
        self.path = Some(path);
        Ok(())
    }
}

fn read_extended(tape: &mut dyn Tape, length: u64) -> Result<Vec<u8>, SourceError> {
    let offset = tape.position();
    if length > MAX_EXTENDED {
        return Err(SourceError::Header { offset });
    }
    let mut content = vec![0; length as usize];
    if length != 0 && !tape.read(&mut content)? {
        return Err(SourceError::Truncated { offset });
    }
    tape.pad(length)?;
    Ok(content)
}

/// The name of a regular member; `None` for a folder, which is only checked.
fn checked_name(path: &[u8], kind: EntryType) -> Result<Option<&str>, SourceError> {
    let shown = || String::from_utf8_lossy(path).into_owned();
    let name = str::from_utf8(path).map_err(|_| SourceError::Name { name: shown() })?;
    let name = name.strip_prefix("./").unwrap_or(name);
    let folder = kind == EntryType::Directory;
    let name = if folder { name.strip_suffix('/').unwrap_or(name) } else { name };
    if folder && (name.is_empty() || name == ".") {
        return Ok(None);
    }
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) || name.contains('\0') {
        return Err(SourceError::Name { name: shown() });
    }
    match kind {
        EntryType::Regular | EntryType::Continuous | EntryType::Directory => {}
        EntryType::Link | EntryType::Symlink => return Err(SourceError::Link { name: shown() }),
        _ => return Err(SourceError::NotRegular { name: shown() }),
    }
    if name.split('/').count() > if folder { 1 } else { 2 } {
        return Err(SourceError::Nested { name: shown() });
    }
    Ok((!folder).then_some(name))
}
