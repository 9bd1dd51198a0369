//! A read-only view of a part of a file, for content that is too large to be copied.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::slice;

use nix::errno::Errno;

use super::PAGE_SIZE;

/// Bytes of a file, mapped.
pub struct FileView {
    base: *mut libc::c_void,
    mapped: usize,
    skip: usize,
    length: usize,
}

// SAFETY: the mapping belongs to the process and is only read.
unsafe impl Send for FileView {}
// SAFETY: as above.
unsafe impl Sync for FileView {}

impl FileView {
    /// Maps the `length` bytes of `file` from `offset` on, which need not be aligned.
    ///
    /// # Errors
    /// Those of mmap(2); `ENODATA` when the file is shorter.
    pub fn map(file: &File, offset: u64, length: u64) -> nix::Result<Self> {
        let end = offset.checked_add(length).ok_or(Errno::EOVERFLOW)?;
        if file.metadata().map_or(0, |metadata| metadata.len()) < end {
            return Err(Errno::ENODATA);
        }
        if length == 0 {
            return Ok(Self { base: std::ptr::null_mut(), mapped: 0, skip: 0, length: 0 });
        }
        let skip = offset % PAGE_SIZE;
        let mapped = (length + skip) as usize;
        let start = (offset - skip) as libc::off_t;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), start)
        };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { base, mapped, skip: skip as usize, length: length as usize })
    }

    /// The bytes. They are the file's as it is now: whoever may write the file may change them.
    pub fn bytes(&self) -> &[u8] {
        if self.length == 0 {
            return &[];
        }
        // SAFETY: the mapping covers the range and lives as long as `self`; it was made no longer than the file. Image
        // files are not written while they are restored; if they are, the content is wrong, as any other content would
        // be, and it is only compared and copied.
        unsafe { slice::from_raw_parts(self.base.cast::<u8>().add(self.skip), self.length) }
    }

    /// Has the kernel map the pages of `range` now, many at once; only a hint.
    pub fn populate(&self, range: std::ops::Range<usize>) {
        let start = (self.skip + range.start) & !(PAGE_SIZE as usize - 1);
        let end = (self.skip + range.end).min(self.mapped);
        if start < end {
            // SAFETY: lies within the mapping and changes no content.
            unsafe { libc::madvise(self.base.byte_add(start), end - start, libc::MADV_POPULATE_READ) };
        }
    }
}

impl Drop for FileView {
    fn drop(&mut self) {
        if self.mapped > 0 {
            // SAFETY: unmaps exactly what `map` mapped; `bytes` borrows `self`.
            unsafe { libc::munmap(self.base, self.mapped) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn shows_any_part_and_refuses_more_than_there_is() {
        let path = std::env::temp_dir().join(format!("ferry-view-{}", std::process::id()));
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let content: Vec<u8> = (0..10_000u32).map(|byte| (byte % 251) as u8).collect();
        file.write_all(&content).unwrap();
        for (offset, length) in [(0, 10_000), (512, 9000), (4096, 1), (5000, 0)] {
            let view = FileView::map(&file, offset, length).unwrap();
            assert_eq!(view.bytes(), &content[offset as usize..(offset + length) as usize]);
        }
        assert!(FileView::map(&file, 1, 10_000).is_err());
        assert!(FileView::map(&file, u64::MAX, 2).is_err());
    }
}
