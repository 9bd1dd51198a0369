//! Copying large content to where it goes, and digesting each chunk while it is in the cache.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;

use xxhash_rust::xxh3::Xxh3Default;

use super::content::Content;
use super::digest::{CHUNK, ChunkDigester, ChunkDigests, chunk_count, chunk_length};
use super::sink::{SinkError, write_error};

/// Content of less than this is not worth a thread.
const SMALL: u64 = 8 * CHUNK;
/// What is read and written at once: it stays in a core's own cache from one to the other.
const PIECE: usize = 256 << 10;
/// Chunks that are read ahead of a writer.
const READ_AHEAD: usize = 3;
/// Most threads that are of use; the kernel's copying into one file is the limit.
const MAX_THREADS: usize = 4;

/// How many threads to copy with on this machine.
pub(super) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

/// Copies `content` into `file` from `start` on, with several threads, each of which takes the next chunk that nobody has.
pub(super) fn copy_into_file(
    name: &str,
    content: &dyn Content,
    file: &File,
    start: u64,
    threads: usize,
) -> Result<ChunkDigests, SinkError> {
    let length = content.len();
    let threads = if length < SMALL { 1 } else { threads.clamp(1, MAX_THREADS) };
    file.set_len(start + length).map_err(|source| write_error(name, source))?;
    let digester = ChunkDigester::new(length);
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let copy = || {
        let mut buffer = vec![0; PIECE.min(chunk_length(length, 0))];
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= chunk_count(length) {
                break;
            }
            let mut pieces = Xxh3Default::new();
            let end = index * CHUNK + chunk_length(length, index) as u64;
            for offset in (index * CHUNK..end).step_by(PIECE) {
                let piece = &mut buffer[..PIECE.min((end - offset) as usize)];
                let copied = content
                    .read_at(offset, piece)
                    .map_err(|source| SinkError::Content { name: name.to_owned(), offset, source })
                    .and_then(|()| {
                        file.write_all_at(piece, start + offset).map_err(|source| write_error(name, source))
                    });
                if copied.is_err() {
                    failed.store(true, Ordering::Relaxed);
                    return copied;
                }
                pieces.update(piece);
            }
            digester.record_pieces(index, &pieces);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(copy)).collect();
        let results = std::iter::once(copy()).chain(others.into_iter().map(|other| match other.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }));
        results.collect::<Vec<_>>().into_iter().collect::<Result<(), _>>()
    })?;
    Ok(digester.finish())
}

/// Copies `content` to `writer` from its beginning to its end. When it is large, a second thread reads and digests the next chunks
/// while this one writes.
pub(crate) fn copy_in_order(
    name: &str,
    content: &dyn Content,
    writer: &mut dyn Write,
) -> Result<ChunkDigests, SinkError> {
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
    if length < SMALL {
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
