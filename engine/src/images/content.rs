//! Large plain content, read at any offset, so that sinks may copy it in any order and with several threads.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes whose number is known before they are read.
pub trait Content: Sync {
    /// Number of bytes.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` with the bytes from `offset` on, all of which lie within the content.
    ///
    /// # Errors
    /// Why they cannot be had. A part of the buffer may then be written.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl Content for [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        let part = start.and_then(|start| self.get(start..start.checked_add(buffer.len())?));
        buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl<T: Content + ?Sized> Content for &T {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, buffer)
    }
}

impl Content for Vec<u8> {
    fn len(&self) -> u64 {
        Content::len(self.as_slice())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.as_slice().read_at(offset, buffer)
    }
}

/// A part of a file.
pub struct FileContent<'a> {
    file: &'a File,
    start: u64,
    length: u64,
}

impl<'a> FileContent<'a> {
    /// The `length` bytes of `file` from `start` on.
    pub fn new(file: &'a File, start: u64, length: u64) -> Self {
        Self { file, start, length }
    }
}

impl Content for FileContent<'_> {
    fn len(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, self.start + offset)
    }
}

/// Bytes in memory, then other content: an image's records and the large tail of the last one.
pub struct WithHead<'a> {
    head: Vec<u8>,
    body: &'a dyn Content,
}

impl<'a> WithHead<'a> {
    /// `head`, then `body`.
    pub fn new(head: Vec<u8>, body: &'a dyn Content) -> Self {
        Self { head, body }
    }
}

impl Content for WithHead<'_> {
    fn len(&self) -> u64 {
        self.head.len() as u64 + self.body.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let head = self.head.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
        let (from_head, from_body) = buffer.split_at_mut(head.len().min(buffer.len()));
        from_head.copy_from_slice(&head[..from_head.len()]);
        if from_body.is_empty() {
            return Ok(());
        }
        self.body.read_at(offset.saturating_sub(self.head.len() as u64), from_body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_and_a_body_read_as_one() {
        let body = b"defgh".to_vec();
        let content = WithHead::new(b"abc".to_vec(), &body);
        assert_eq!(content.len(), 8);
        for start in 0..8usize {
            for end in start..8 {
                let mut buffer = vec![0; end - start];
                content.read_at(start as u64, &mut buffer).unwrap();
                assert_eq!(buffer, &b"abcdefgh"[start..end]);
            }
        }
        assert!(content.read_at(7, &mut [0; 2]).is_err(), "past the end");
    }
}
