//! Making deleted files again, from outside: ferry reaches the tree's mounts through `/proc/PID/root`.
//!
//! The names that they have meanwhile are [`super::names`]' part.

use std::collections::btree_map::{BTreeMap, Entry};
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chmodat, chownat, fchmod, fchown, ftruncate,
    mkdirat, mknodat, openat, utimensat,
};

use super::names::{Names, split};
use super::plan::{RestoreFilesError, inconsistent};
use crate::images::files::FileEntry;
use crate::images::ghost::{GhostChunkEntry, GhostFileEntry, RemapFilePathEntry, RemapType};
use crate::images::{ImageName, Kind, Reader, decode_all};

/// Reads an image of the set, if it is there.
type GetImage<'a> = dyn FnMut(&str) -> Result<Option<Vec<u8>>, RestoreFilesError> + 'a;

/// How often a parent directory is looked for before giving up.
const DEEPEST: usize = 256;

/// A deleted file, as its image says.
struct Ghost {
    path: Vec<u8>,
    entry: GhostFileEntry,
    size: u64,
    /// Content: offset in the file, bytes.
    extents: Vec<(u64, Vec<u8>)>,
}

/// All deleted files of a set, and where they are while the restore runs.
#[derive(Default)]
pub struct GhostPlan {
    ghosts: BTreeMap<u32, Ghost>,
    /// Number of the ghost that a description names.
    by_description: HashMap<u32, u32>,
    /// Other names for descriptions: hard links that the dump left.
    links: HashMap<u32, Vec<u8>>,
    made: HashMap<u32, Vec<u8>>,
}

impl GhostPlan {
    /// Reads `remap-fpath.img` and the images that it names.
    pub fn read(get: &mut GetImage<'_>, entries: &HashMap<u32, FileEntry>) -> Result<Self, RestoreFilesError> {
        let mut plan = Self::default();
        let name = Kind::RemapFpath.name();
        let Some(bytes) = get(&name)? else { return Ok(plan) };
        let path = |id: u32| {
            let reg = entries.get(&id).and_then(|entry| entry.reg.as_ref());
            let path = reg.map(|reg| reg.name.clone()).filter(|path| path.starts_with(b"/") && !path.contains(&0));
            path.ok_or_else(|| inconsistent(format!("{name} names description {id}, which is no file")))
        };
        for remap in decode_all::<RemapFilePathEntry>(&name, Kind::RemapFpath, &bytes)? {
            match remap.remap_type() {
                RemapType::Linked => {
                    plan.links.insert(remap.orig_id, path(remap.remap_id)?);
                }
                RemapType::Ghost => {
                    let number = remap.remap_id & !(1 << 31);
                    if let Entry::Vacant(vacant) = plan.ghosts.entry(number) {
                        vacant.insert(Ghost::read(get, number, path(remap.orig_id)?)?);
                    }
                    plan.by_description.insert(remap.orig_id, number);
                }
                RemapType::Procfs => {
                    return Err(inconsistent(format!(
                        "{} belongs to a process that had ended, which ferry cannot restore",
                        String::from_utf8_lossy(&path(remap.orig_id)?)
                    )));
                }
            }
        }
        Ok(plan)
    }

    /// The name under which the file of a description is found now, if it is not its own.
    pub fn path(&self, id: u32) -> Option<&[u8]> {
        let made = self.by_description.get(&id).and_then(|number| self.made.get(number));
        made.or_else(|| self.links.get(&id)).map(Vec::as_slice)
    }

    /// Whether the description's file has no name of its own.
    pub fn is_remapped(&self, id: u32) -> bool {
        self.by_description.contains_key(&id) || self.links.contains_key(&id)
    }

    /// Whether names are to be given, or taken away at the end.
    pub fn needs_names(&self) -> bool {
        !self.ghosts.is_empty() || !self.links.is_empty()
    }

    /// Makes all files, under names that go when the restore ends.
    pub fn make(&mut self, names: &mut Names) -> Result<(), RestoreFilesError> {
        for (number, ghost) in &self.ghosts {
            let own = ghost.path.clone();
            let other = [&ghost.path[..], format!(".cr.{number:x}.ghost").as_bytes()].concat();
            let failed = |(step, source)| RestoreFilesError::Ghost {
                path: String::from_utf8_lossy(&ghost.path).into_owned(),
                step,
                source,
            };
            let made = match ghost.make(names, &own) {
                Err((_, error)) if error.kind() == io::ErrorKind::AlreadyExists => {
                    ghost.make(names, &other).map(|()| other)
                }
                result => result.map(|()| own),
            };
            self.made.insert(*number, made.map_err(failed)?);
        }
        Ok(())
    }

    /// Removes the names that the dump had left for the restore's use, which are of none any more.
    pub fn remove_links(&mut self, names: &mut Names) {
        // Several descriptions may have been tied to one link.
        let links: BTreeSet<Vec<u8>> = self.links.drain().map(|(_, path)| path).collect();
        for path in links {
            if let Err(error) = names.remove_old(&path) {
                tracing::warn!(path = %String::from_utf8_lossy(&path), %error, "a link that the dump had made stays");
            }
        }
    }
}

impl Ghost {
    fn read(get: &mut GetImage<'_>, number: u32, path: Vec<u8>) -> Result<Self, RestoreFilesError> {
        let name = ImageName { kind: Kind::GhostFile, number: Some(number.into()) }.to_string();
        let bytes = get(&name)?.ok_or_else(|| inconsistent(format!("{name} is missing")))?;
        let mut reader = Reader::new(&name, Kind::GhostFile, &bytes)?;
        let entry: GhostFileEntry = reader.expect_entry()?;
        let mut extents = Vec::new();
        let size;
        if entry.chunks == Some(true) {
            size = entry.size.ok_or_else(|| inconsistent(format!("{name} has no size")))?;
            while let Some(chunk) = reader.next_entry::<GhostChunkEntry>()? {
                let end = chunk.off.checked_add(chunk.len).filter(|end| *end <= size);
                if end.is_none() {
                    return Err(inconsistent(format!("{name} has content beyond the file's end")));
                }
                extents.push((chunk.off, reader.tail(chunk.len)?.to_vec()));
            }
        } else {
            let rest = reader.rest().to_vec();
            size = rest.len() as u64;
            extents.push((0, rest));
        }
        Ok(Self { path, entry, size, extents })
    }

    fn make(&self, names: &mut Names, path: &[u8]) -> Result<(), (&'static str, io::Error)> {
        let step = |step: &'static str| move |error: rustix::io::Errno| (step, io::Error::from(error));
        make_parents(names, path).map_err(|error| ("make its directory", error))?;
        let entry = &self.entry;
        let file_type = FileType::from_raw_mode(entry.mode);
        let mode = Mode::from_raw_mode(entry.mode);
        let is_directory = file_type == FileType::Directory;
        let create = |folder: BorrowedFd<'_>, name: &[u8]| match file_type {
            FileType::RegularFile => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                Ok(Some(File::from(openat(folder, name, flags, Mode::RUSR | Mode::WUSR)?)))
            }
            FileType::Directory => Ok(mkdirat(folder, name, mode).map(|()| None)?),
            FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice => {
                Ok(mknodat(folder, name, file_type, mode, entry.rdev.unwrap_or(0).into()).map(|()| None)?)
            }
            _ => Err(io::Error::other("files of this type cannot be made")),
        };
        let file = names.give(path, is_directory, create).map_err(|error| ("create it", error))?;
        let (folder, name) = names.find(path).map_err(|error| ("find it again", error))?;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        match file {
            Some(file) => {
                ftruncate(&file, self.size).map_err(step("set its size"))?;
                for (offset, bytes) in &self.extents {
                    file.write_all_at(bytes, *offset).map_err(|error| ("write its content", error))?;
                }
                fchown(&file, Some(uid), Some(gid)).map_err(step("set its owner"))?;
                fchmod(&file, mode).map_err(step("set its mode"))?;
            }
            None => {
                chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(step("set its owner"))?;
                // chmod(2) has no way not to follow a link; the name was made just now and is none.
                chmodat(folder, name, mode, AtFlags::empty()).map_err(step("set its mode"))?;
            }
        }
        if let (Some(accessed), Some(modified), false) = (&entry.atim, &entry.mtim, is_directory) {
            let time = |time: &crate::images::ghost::Timeval| Timespec {
                tv_sec: time.tv_sec as i64,
                tv_nsec: (time.tv_usec % 1_000_000) as i64 * 1000,
            };
            let times = Timestamps { last_access: time(accessed), last_modification: time(modified) };
            utimensat(folder, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(step("set its times"))?;
        }
        Ok(())
    }
}

/// Makes the directories on the way to `path` that are not there.
fn make_parents(names: &mut Names, path: &[u8]) -> io::Result<()> {
    let mut missing = Vec::new();
    let mut at = path;
    while !names.has_folder(at)? {
        if missing.len() == DEEPEST {
            return Err(io::ErrorKind::NotFound.into());
        }
        at = split(at).0;
        missing.push(at);
    }
    let mode = Mode::from_raw_mode(0o755);
    missing
        .into_iter()
        .rev()
        .try_for_each(|directory| names.give(directory, true, |folder, name| Ok(mkdirat(folder, name, mode)?)))
}
