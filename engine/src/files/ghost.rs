//! Deleted files that are still open or mapped: their content travels in the image set.
//!
//! CRIU calls them ghosts. A restore makes the file anew, under its old name if that is free, lets every task open it,
//! and removes the name at the end, so that the file is deleted again.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FileType, SeekFrom, Statx, StatxTimestamp, seek};

use super::Problem;
use crate::images::ghost::{GhostChunkEntry, GhostFileEntry, RemapFilePathEntry, RemapType, Timeval};
use crate::images::{Encoder, Kind};

/// From this size on, and for files with holes, content is saved extent by extent.
const CHUNKS_FROM: u64 = 1 << 20;
/// `st_blocks` counts these, whatever the file system's block.
const BLOCK: u64 = 512;

/// The deleted files found so far.
#[derive(Default)]
pub struct Ghosts {
    /// Number of the ghost file, by device and inode.
    known: HashMap<(u32, u32, u64), u32>,
    /// `remap-fpath.img`.
    pub remaps: Vec<RemapFilePathEntry>,
    /// `ghost-file-N.img`.
    pub images: Vec<(String, Vec<u8>)>,
}

impl Ghosts {
    /// Saves the deleted file that `source` (a link of proc(5)) leads to, once, and ties description `id` to it.
    pub fn dump(&mut self, id: u32, source: &str, stat: &Statx, limit: u64, content: bool) -> Result<(), Problem> {
        let inode = (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
        let next = self.known.len() as u32 + 1;
        let number = match self.known.get(&inode) {
            Some(number) => *number,
            None => {
                check_limit(stat, limit)?;
                if content {
                    let image = image(source, stat).map_err(|error| Problem::unreadable("its content", error))?;
                    self.images.push((Kind::GhostFile.name_for(next), image));
                }
                self.known.insert(inode, next);
                next
            }
        };
        let remap_type = Some(RemapType::Ghost as i32);
        self.remaps.push(RemapFilePathEntry { orig_id: id, remap_id: number, remap_type });
        Ok(())
    }
}

fn check_limit(stat: &Statx, limit: u64) -> Result<(), Problem> {
    let stored = stat.stx_blocks * BLOCK;
    match FileType::from_raw_mode(stat.stx_mode.into()) {
        FileType::RegularFile if stored > limit => Err(Problem::new(
            format!("a deleted file of {stored} bytes, more than the limit of {limit}"),
            format!("allow it with --ghost-limit {stored}"),
        )),
        FileType::RegularFile | FileType::Directory | FileType::Fifo => Ok(()),
        FileType::CharacterDevice | FileType::BlockDevice => Ok(()),
        other => Err(Problem::new(format!("a deleted {other:?} cannot be made again"), "have the program close it")),
    }
}

fn time(stamp: &StatxTimestamp) -> Option<Timeval> {
    Some(Timeval { tv_sec: stamp.tv_sec as u64, tv_usec: u64::from(stamp.tv_nsec) / 1000 })
}

fn image(source: &str, stat: &Statx) -> io::Result<Vec<u8>> {
    let file_type = FileType::from_raw_mode(stat.stx_mode.into());
    let regular = file_type == FileType::RegularFile;
    let device = matches!(file_type, FileType::CharacterDevice | FileType::BlockDevice);
    let chunks = regular && (stat.stx_size >= CHUNKS_FROM || stat.stx_blocks * BLOCK < stat.stx_size);
    let entry = GhostFileEntry {
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mode: stat.stx_mode.into(),
        dev: Some(kernel_device(stat.stx_dev_major, stat.stx_dev_minor)),
        ino: Some(stat.stx_ino),
        rdev: device.then(|| rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor) as u32),
        atim: time(&stat.stx_atime),
        mtim: time(&stat.stx_mtime),
        chunks: chunks.then_some(true),
        size: chunks.then_some(stat.stx_size),
        symlnk_target: None,
    };
    let mut encoder = Encoder::new(Kind::GhostFile);
    encoder.entry(&entry);
    if regular {
        let file = File::open(source)?;
        let size = stat.stx_size;
        if chunks {
            extents(&file, size, &mut encoder)?
        } else {
            encoder.tail(&read(&file, 0, size)?)
        };
    }
    Ok(encoder.finish())
}

/// The kernel's own form of a device number (`dev_t` within the kernel): twenty bits of minor.
pub fn kernel_device(major: u32, minor: u32) -> u32 {
    major << 20 | minor
}

fn extents<'a>(file: &File, size: u64, encoder: &'a mut Encoder) -> io::Result<&'a mut Encoder> {
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            // A file system without holes has one extent.
            Err(rustix::io::Errno::INVAL) => at,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start)).unwrap_or(size).min(size);
        encoder.entry(&GhostChunkEntry { len: end - start, off: start }).tail(&read(file, start, end - start)?);
        at = end;
    }
    Ok(encoder)
}

fn read(file: &File, at: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}
