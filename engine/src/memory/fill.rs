//! Filling a task's memory with the pages of an image.
//!
//! Two ways, measured on 4 KiB pages with two threads: process_vm_writev(2), which faults each page in and zeroes it
//! first, for a little memory; `UFFDIO_COPY` (userfaultfd(2)), which places a copied page at once, 4.6–6 GB/s, for
//! a lot of it. The first needs the range to be writable and works on what is there; the second needs fresh, private
//! anonymous memory, whatever its protection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::inherit::PageWrite;
use super::parallel::in_parallel;
use crate::cancel::{Cancel, Cancelled};
use crate::images::digest::{CHUNK, chunk_length};
use crate::images::{RawImage, SourceError};
use crate::progress::Progress;
use crate::sys::process_vm::{self, MAX_RANGES};
use crate::sys::view::{FilePart, FileView};
use crate::sys::{HostPid, userfaultfd};

/// Most bytes that one thread takes at a time.
const PIECE: u64 = 1 << 20;
/// From this on, fresh memory of a mapping is filled through userfaultfd(2).
pub const WORTH_USERFAULTFD: u64 = 8 << 20;

/// Why memory could not be filled.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The kernel refused the write.
    #[error("cannot write the memory of task {pid} at {address:x}: {errno}")]
    Write {
        /// The task.
        pid: HostPid,
        /// Where.
        address: u64,
        /// Why.
        errno: Errno,
    },
    /// The page image is damaged.
    #[error(transparent)]
    Image(#[from] SourceError),
    /// The restore was given up.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

/// Pages images in memory, one behind the other, whose chunks are verified before they are first used. Offsets are in all of them
/// together.
pub struct Pages {
    images: Vec<Placed>,
    view: FileView,
    /// Told of what is taken from them.
    pub(crate) progress: Progress,
    /// Asked whether to take more of them.
    pub(crate) cancel: Cancel,
}

/// One of the images.
struct Placed {
    start: u64,
    image: RawImage,
    /// Per chunk, whether it has been verified.
    verified: Vec<AtomicBool>,
}

impl Pages {
    /// Maps `images`; also returns where each begins.
    ///
    /// # Errors
    /// [`SourceError::Read`].
    pub fn open(images: Vec<(String, RawImage)>) -> Result<(Self, Vec<u64>), SourceError> {
        let part = |(_, image): &'_ (String, RawImage)| image.region().clone();
        let regions: Vec<_> = images.iter().map(part).collect();
        let parts: Vec<_> = regions
            .iter()
            .map(|region| FilePart { file: region.file(), offset: region.offset(), length: region.len() })
            .collect();
        let (view, starts) = FileView::map(&parts).map_err(|errno| SourceError::Read {
            name: images.first().map_or_else(String::new, |(name, _)| name.clone()),
            source: errno.into(),
        })?;
        let placed = |((_, image), start): ((String, RawImage), &u64)| {
            let verified = (0..image.chunk_count()).map(|_| AtomicBool::new(false)).collect();
            Placed { start: *start, image, verified }
        };
        let images = images.into_iter().zip(&starts).map(placed).collect();
        Ok((Self { images, view, progress: Progress::default(), cancel: Cancel::default() }, starts))
    }

    /// All bytes, verified or not.
    pub fn bytes(&self) -> &[u8] {
        self.view.bytes()
    }

    /// Verifies the chunks that `length` bytes from `offset` on lie in.
    ///
    /// # Errors
    /// [`SourceError::Damaged`].
    pub fn verify(&self, offset: u64, length: u64) -> Result<(), SourceError> {
        let end = offset + length.max(1);
        self.images.iter().try_for_each(|placed| {
            let start = offset.max(placed.start);
            let end = end.min(placed.start + placed.image.len());
            if start < end { placed.verify(start - placed.start..end - placed.start, self.bytes()) } else { Ok(()) }
        })
    }

    /// A part, brought in at once and not verified: to be compared.
    pub fn peek(&self, offset: u64, length: u64) -> &[u8] {
        let range = offset as usize..(offset + length) as usize;
        self.view.populate(range.clone());
        &self.bytes()[range]
    }

    /// A part, verified, and counted as taken.
    ///
    /// # Errors
    /// [`FillError`], other than of writing.
    pub fn part(&self, offset: u64, length: u64) -> Result<&[u8], FillError> {
        self.cancel.check()?;
        self.verify(offset, length)?;
        self.progress.add(length);
        Ok(&self.bytes()[offset as usize..(offset + length) as usize])
    }
}

impl Placed {
    /// Verifies the chunks of `range` of the image; `bytes` are those of all images.
    fn verify(&self, range: std::ops::Range<u64>, bytes: &[u8]) -> Result<(), SourceError> {
        for index in range.start / CHUNK..=(range.end - 1) / CHUNK {
            let Some(seen) = self.verified.get(index as usize) else { break };
            if !seen.load(Ordering::Relaxed) {
                let start = (self.start + index * CHUNK) as usize;
                let chunk = &bytes[start..start + chunk_length(self.image.len(), index)];
                self.image.verify_chunk(index, chunk)?;
                seen.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

/// Cuts writes into pieces that threads can share.
fn cut(writes: &[PageWrite]) -> Vec<PageWrite> {
    let mut pieces = Vec::with_capacity(writes.len());
    for write in writes {
        let mut done = 0;
        while done < write.length {
            // Ends where a chunk of the image ends, so that each thread verifies what it copies.
            let offset = write.offset + done;
            let length = (PIECE - offset % PIECE).min(write.length - done);
            pieces.push(PageWrite { address: write.address + done, offset, length });
            done += length;
        }
    }
    pieces
}

/// Writes into mapped, writable memory.
///
/// # Errors
/// [`FillError`]; a part may have been written.
pub fn write(pid: HostPid, pages: &Pages, writes: &[PageWrite]) -> Result<(), FillError> {
    // What one call takes: neither too many ranges nor too many bytes for one thread.
    let pieces = cut(writes);
    let mut calls: Vec<&[PageWrite]> = Vec::new();
    let mut rest = pieces.as_slice();
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |piece: &&PageWrite| {
            bytes += piece.length;
            bytes <= PIECE || bytes == piece.length
        };
        let count = rest.iter().take(MAX_RANGES).take_while(fits).count();
        let (call, others) = rest.split_at(count);
        calls.push(call);
        rest = others;
    }
    in_parallel(total(writes), &calls, || (), |(), call| write_call(pid, pages, call))
}

fn write_call(pid: HostPid, pages: &Pages, call: &[PageWrite]) -> Result<(), FillError> {
    let mut parts = Vec::with_capacity(call.len());
    for write in call {
        parts.push((write.address, pages.part(write.offset, write.length)?));
    }
    let mut rest = parts.as_mut_slice();
    while let Some(first) = rest.first() {
        let address = first.0;
        let failed = |errno| FillError::Write { pid, address, errno };
        let mut put = process_vm::write_pieces(pid, rest).map_err(failed)?;
        if put == 0 {
            return Err(failed(Errno::EFAULT));
        }
        while let Some((address, bytes)) = rest.first_mut() {
            if put < bytes.len() {
                *address += put as u64;
                *bytes = &bytes[put..];
                break;
            }
            put -= bytes.len();
            rest = &mut rest[1..];
        }
    }
    Ok(())
}

/// Places pages where none are, through the task's own userfaultfd.
///
/// # Errors
/// [`FillError`]; a part may have been placed.
pub fn place(pid: HostPid, uffd: BorrowedFd<'_>, pages: &Pages, writes: &[PageWrite]) -> Result<(), FillError> {
    in_parallel(
        total(writes),
        &cut(writes),
        || (),
        |(), piece| {
            pages.view.populate(piece.offset as usize..(piece.offset + piece.length) as usize);
            let bytes = pages.part(piece.offset, piece.length)?;
            userfaultfd::copy(uffd.as_fd(), piece.address, bytes).map_err(|errno| FillError::Write {
                pid,
                address: piece.address,
                errno,
            })
        },
    )
}

/// The descriptor of [`place`], made by the task and taken over, and the ranges that it serves.
///
/// # Errors
/// Those of `UFFDIO_REGISTER`.
pub fn register(uffd: &OwnedFd, ranges: &[std::ops::Range<u64>]) -> nix::Result<()> {
    userfaultfd::handshake(uffd)?;
    ranges.iter().try_for_each(|range| userfaultfd::register(uffd, range.clone()))
}

fn total(writes: &[PageWrite]) -> u64 {
    writes.iter().map(|write| write.length).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_writes_and_end_with_chunks() {
        let writes = [
            PageWrite { address: 0x1000, offset: PIECE - 4096, length: 8192 },
            PageWrite { address: 0x10_0000, offset: 4 * PIECE, length: 2 * PIECE },
        ];
        let pieces = cut(&writes);
        assert_eq!(total(&pieces), total(&writes));
        assert_eq!(pieces.len(), 4);
        for piece in &pieces {
            assert_eq!(piece.offset / PIECE, (piece.offset + piece.length - 1) / PIECE);
        }
        assert_eq!((pieces[1].address, pieces[1].offset), (0x2000, PIECE));
    }
}
