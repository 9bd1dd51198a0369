//! Checkpoint archives: one tar file, in Podman's layout, compressed or not.
//!
//! The images lie under `checkpoint/`; beside them `config.dump` (who the container is), `spec.dump` (its OCI config) and
//! `stats-dump`. An archive is written in one pass. A file appears under its name only when it is complete.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use ferry_engine::images::{ArchiveSource, Spool};
use ferry_engine::journal::Journal;
use rustix::fs::{CWD, Mode, OFlags};

use crate::checkpoint::Compression;
use crate::failure::Failure;

/// The first bytes of a Zstandard frame (RFC 8878, section 3.1.1).
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The first bytes of an LZ4 frame (LZ4 frame format, "Magic Number").
const LZ4_MAGIC: [u8; 4] = [0x04, 0x22, 0x4d, 0x18];
/// The level that is faster than most disks.
const ZSTD_LEVEL: i32 = 1;
/// The most that a compressed archive may unpack to.
const UNPACKED_LIMIT: u64 = 1 << 40;

/// A file that is to become `path` once it is complete; dropped before, it leaves nothing.
pub struct NewFile {
    path: PathBuf,
    partial: PathBuf,
    journal: Journal,
    complete: bool,
}

impl NewFile {
    /// Creates the file beside `path`, readable by its owner only: an archive holds the memory of a program. It is noted until it
    /// is complete.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create(path: &Path, journal: &Journal) -> Result<(Self, File), Failure> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".{}.partial", std::process::id()));
        let partial = PathBuf::from(partial);
        journal.path(&partial);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(CWD, &partial, flags, Mode::from(0o600)).map_err(|error| {
            Failure::from(io::Error::from(error)).context(format!("cannot create {}", path.display()))
        })?;
        Ok((Self { path: path.to_owned(), partial, journal: journal.clone(), complete: false }, file.into()))
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn finish(mut self) -> Result<(), Failure> {
        fs::rename(&self.partial, &self.path)
            .map_err(|error| Failure::from(error).context(format!("cannot create {}", self.path.display())))?;
        self.complete = true;
        self.journal.keep_paths();
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.complete {
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// A writer that compresses on the way.
pub enum Compressor<W: Write> {
    /// As it is.
    None(BufWriter<W>),
    /// Zstandard.
    Zstd(zstd::stream::write::Encoder<'static, W>),
    /// LZ4 frames.
    Lz4(lz4_flex::frame::FrameEncoder<W>),
}

impl<W: Write> Compressor<W> {
    /// Compresses into `target`.
    ///
    /// # Errors
    /// When the compressor cannot be set up.
    pub fn new(method: Compression, target: W) -> io::Result<Self> {
        Ok(match method {
            Compression::None => Self::None(BufWriter::with_capacity(1 << 20, target)),
            Compression::Zstd => Self::Zstd(zstd::stream::write::Encoder::new(target, ZSTD_LEVEL)?),
            Compression::Lz4 => Self::Lz4(lz4_flex::frame::FrameEncoder::new(target)),
        })
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// Those of the target.
    pub fn finish(self) -> io::Result<()> {
        match self {
            Self::None(mut writer) => writer.flush(),
            Self::Zstd(encoder) => encoder.finish()?.flush(),
            Self::Lz4(encoder) => encoder.finish().map_err(io::Error::other)?.flush(),
        }
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(writer) => writer.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
            Self::Lz4(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::None(writer) => writer.flush(),
            Self::Zstd(encoder) => encoder.flush(),
            Self::Lz4(encoder) => encoder.flush(),
        }
    }
}

/// Counts what passes through.
pub struct Counter<W> {
    target: W,
    /// Bytes so far.
    pub bytes: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl<W> Counter<W> {
    /// Counts what goes to `target`.
    pub fn new(target: W) -> Self {
        Self { target, bytes: Default::default() }
    }
}

impl<W: Write> Write for Counter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.target.write(bytes)?;
        self.bytes.fetch_add(written as u64, std::sync::atomic::Ordering::Relaxed);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.target.flush()
    }
}

/// Opens an archive in a file, of whichever compression.
///
/// # Errors
/// When it cannot be read, or is no checkpoint archive.
pub fn open(path: &Path) -> Result<ArchiveSource, Failure> {
    let cannot = |error: io::Error| Failure::from(error).context(format!("cannot open the archive {}", path.display()));
    let mut file = File::open(path).map_err(cannot)?;
    let mut magic = [0; 4];
    let compressed = file.read_exact(&mut magic).is_ok() && matches!(magic, ZSTD_MAGIC | LZ4_MAGIC);
    file.rewind().map_err(cannot)?;
    let source = if compressed { unpack(magic, BufReader::new(file))? } else { ArchiveSource::open(file)? };
    Ok(source)
}

/// Reads an archive from a stream, which it keeps in an unlinked temporary file.
///
/// # Errors
/// As [`open`].
pub fn read(mut stream: impl Read) -> Result<ArchiveSource, Failure> {
    let mut magic = [0; 4];
    stream.read_exact(&mut magic).map_err(|error| Failure::from(error).context("cannot read the archive"))?;
    unpack(magic, io::Cursor::new(magic).chain(stream))
}

fn unpack(magic: [u8; 4], stream: impl Read) -> Result<ArchiveSource, Failure> {
    let spool = Spool::Folder(std::env::temp_dir());
    let source = match magic {
        ZSTD_MAGIC => ArchiveSource::spool(zstd::stream::read::Decoder::new(stream)?, &spool, UNPACKED_LIMIT)?,
        LZ4_MAGIC => ArchiveSource::spool(lz4_flex::frame::FrameDecoder::new(stream), &spool, UNPACKED_LIMIT)?,
        _ => ArchiveSource::spool(stream, &spool, UNPACKED_LIMIT)?,
    };
    Ok(source)
}
