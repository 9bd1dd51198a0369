//! A read-only view of parts of files, one behind the other, for content that is too large to be copied.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::slice;

use nix::errno::Errno;

use super::PAGE_SIZE;

/// A part of a file.
#[derive(Clone, Copy, Debug)]
pub struct FilePart<'a> {
    /// The file.
    pub file: &'a File,
    /// Where the part begins, which need not be aligned.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl FilePart<'_> {
    /// How far into its first page it begins.
    fn skip(&self) -> u64 {
        self.offset % PAGE_SIZE
    }

    /// Bytes of the pages that it lies in.
    fn mapped(&self) -> u64 {
        if self.length == 0 { 0 } else { (self.length + self.skip()).next_multiple_of(PAGE_SIZE) }
    }

    /// Checks that the file holds it.
    fn check(&self) -> nix::Result<()> {
        let end = self.offset.checked_add(self.length).ok_or(Errno::EOVERFLOW)?;
        let length = self.file.metadata().map_or(0, |metadata| metadata.len());
        if length < end { Err(Errno::ENODATA) } else { Ok(()) }
    }
}

/// Bytes of files, mapped.
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
    /// Maps the parts; also returns where in the view each begins. What is between them means nothing.
    ///
    /// # Errors
    /// Those of mmap(2); `ENODATA` when a file is shorter than its part says.
    pub fn map(parts: &[FilePart<'_>]) -> nix::Result<(Self, Vec<u64>)> {
        let mut total = 0u64;
        for part in parts {
            part.check()?;
            total = total.checked_add(part.mapped()).ok_or(Errno::ENOMEM)?;
        }
        let skip = parts.iter().find(|part| part.length > 0).map_or(0, FilePart::skip);
        if total == 0 {
            let nothing = Self { base: std::ptr::null_mut(), mapped: 0, skip: 0, length: 0 };
            return Ok((nothing, vec![0; parts.len()]));
        }
        let mapped = usize::try_from(total).map_err(|_| Errno::ENOMEM)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let mut view = Self { base, mapped, skip: skip as usize, length: 0 };
        let mut starts = Vec::with_capacity(parts.len());
        let mut at = 0;
        for part in parts {
            let start = (at + part.skip()).saturating_sub(skip);
            starts.push(start);
            if part.length == 0 {
                continue;
            }
            view.length = (start + part.length) as usize;
            let (length, offset) = (part.length + part.skip(), part.offset - part.skip());
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            let descriptor = part.file.as_raw_fd();
            // SAFETY: lies within the mapping made above, which nobody else knows of; `mapped` counted its pages.
            let mapped = unsafe {
                let target = base.byte_add(at as usize);
                libc::mmap(target, length as usize, libc::PROT_READ, flags, descriptor, offset as libc::off_t)
            };
            if mapped == libc::MAP_FAILED {
                return Err(Errno::last());
            }
            at += part.mapped();
        }
        Ok((view, starts))
    }

    /// The bytes. They are the file's as it is now: whoever may write the file may change them.
    pub fn bytes(&self) -> &[u8] {
        if self.length == 0 {
            return &[];
        }
        // SAFETY: mappings cover the range without a gap and live as long as `self`; they were made no longer than the files. Image
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
            let (view, starts) = FileView::map(&[FilePart { file: &file, offset, length }]).unwrap();
            assert_eq!(view.bytes(), &content[offset as usize..(offset + length) as usize]);
            assert_eq!(starts, [0]);
        }
        for (offset, length) in [(1, 10_000), (u64::MAX, 2)] {
            assert!(FileView::map(&[FilePart { file: &file, offset, length }]).is_err());
        }
        let parts = [(512, 9000), (0, 0), (4096, 4096), (100, 1)];
        let files = parts.map(|(offset, length)| FilePart { file: &file, offset, length });
        let (view, starts) = FileView::map(&files).unwrap();
        for ((offset, length), start) in parts.into_iter().zip(starts).filter(|((_, length), _)| *length > 0) {
            let seen = &view.bytes()[start as usize..(start + length) as usize];
            assert_eq!(seen, &content[offset as usize..(offset + length) as usize]);
        }
    }
}
