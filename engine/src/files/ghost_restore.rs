//! Making deleted files again, from outside: ferry reaches the tree's mounts through `/proc/PID/root`.
//!
//! Every path is resolved by openat2(2) with `RESOLVE_IN_ROOT`: neither `..` nor a link leads out of the tree's root.

use std::collections::HashMap;
use std::collections::btree_map::{BTreeMap, Entry};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chownat, fchmod, ftruncate, mkdirat,
    mknodat, openat2, unlinkat, utimensat,
};

use super::plan::{RestoreFilesError, inconsistent};
use crate::images::files::FileEntry;
use crate::images::ghost::{GhostChunkEntry, GhostFileEntry, RemapFilePathEntry, RemapType};
use crate::images::{ImageName, Kind, Reader, decode_all};
use crate::sys::HostPid;

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
    /// What is to be removed at the end, in this order: a path, and whether it is a directory.
    temporary: Vec<(Vec<u8>, bool)>,
    root: Option<OwnedFd>,
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

    /// Makes all files, in the mounts that `task` sees. [`Self::remove`] takes their names away again.
    pub fn make(&mut self, task: HostPid) -> Result<(), RestoreFilesError> {
        if self.ghosts.is_empty() && self.links.is_empty() {
            return Ok(());
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(format!("/proc/{task}/root"), flags, Mode::empty()).map_err(|error| {
            RestoreFilesError::Ghost { path: "/".into(), step: "open the tree's root", source: error.into() }
        })?;
        for (number, ghost) in &self.ghosts {
            let own = ghost.path.clone();
            let other = [&ghost.path[..], format!(".cr.{number:x}.ghost").as_bytes()].concat();
            let failed = |(step, source)| RestoreFilesError::Ghost {
                path: String::from_utf8_lossy(&ghost.path).into_owned(),
                step,
                source,
            };
            let made = match ghost.make(root.as_fd(), &own, &mut self.temporary) {
                Err((_, error)) if error.kind() == io::ErrorKind::AlreadyExists => {
                    ghost.make(root.as_fd(), &other, &mut self.temporary).map(|()| other)
                }
                result => result.map(|()| own),
            };
            self.made.insert(*number, made.map_err(failed)?);
        }
        self.root = Some(root);
        Ok(())
    }

    /// Takes every name away that [`Self::make`] gave, and those that the dump had left for the restore's use. What cannot be
    /// removed is told in the error, after the rest has been.
    pub fn finish(&mut self) -> Result<(), RestoreFilesError> {
        self.temporary.extend(self.links.drain().map(|(_, path)| (path, false)));
        // Several descriptions may have been tied to one link.
        self.temporary.sort();
        self.temporary.dedup();
        self.remove()
    }

    fn remove(&mut self) -> Result<(), RestoreFilesError> {
        let mut first = Ok(());
        let Some(root) = self.root.take() else { return first };
        for (path, directory) in std::mem::take(&mut self.temporary).into_iter().rev() {
            let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            let removed = parent(root.as_fd(), &path).and_then(|(parent, name)| Ok(unlinkat(parent, name, flags)?));
            if let (Err(source), true) = (removed, first.is_ok()) {
                let path = String::from_utf8_lossy(&path).into_owned();
                first = Err(RestoreFilesError::Ghost { path, step: "remove it again", source });
            }
        }
        first
    }
}

impl Drop for GhostPlan {
    fn drop(&mut self) {
        // A restore that failed leaves no files but those that were there before, so that it can be tried again; there is
        // nobody left to tell if that fails too.
        let _ = self.remove();
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

    fn make(
        &self,
        root: BorrowedFd<'_>,
        path: &[u8],
        temporary: &mut Vec<(Vec<u8>, bool)>,
    ) -> Result<(), (&'static str, io::Error)> {
        let step = |step: &'static str| move |error: rustix::io::Errno| (step, io::Error::from(error));
        make_parents(root, path, temporary).map_err(|error| ("make its directory", error))?;
        let (directory, name) = parent(root, path).map_err(|error| ("find its directory", error))?;
        let entry = &self.entry;
        let file_type = FileType::from_raw_mode(entry.mode);
        let mode = Mode::from_raw_mode(entry.mode);
        let is_directory = file_type == FileType::Directory;
        let create = step("create it");
        match file_type {
            FileType::RegularFile => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&directory, name, flags, Mode::RUSR | Mode::WUSR).map_err(create)?;
                temporary.push((path.to_vec(), false));
                ftruncate(&file, self.size).map_err(step("set its size"))?;
                let file = std::fs::File::from(file);
                for (offset, bytes) in &self.extents {
                    file.write_all_at(bytes, *offset).map_err(|error| ("write its content", error))?;
                }
                let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
                rustix::fs::fchown(&file, Some(uid), Some(gid)).map_err(step("set its owner"))?;
                fchmod(&file, mode).map_err(step("set its mode"))?;
            }
            FileType::Directory => {
                mkdirat(&directory, name, mode).map_err(create)?;
                temporary.push((path.to_vec(), true));
            }
            FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice => {
                mknodat(&directory, name, file_type, mode, entry.rdev.unwrap_or(0).into()).map_err(create)?;
                temporary.push((path.to_vec(), false));
            }
            _ => return Err(("create it", io::Error::other("files of this type cannot be made"))),
        }
        if file_type != FileType::RegularFile {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            chownat(&directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(step("set its owner"))?;
            // chmod(2) has no way not to follow a link; the name was made just now and is none.
            rustix::fs::chmodat(&directory, name, mode, AtFlags::empty()).map_err(step("set its mode"))?;
        }
        if let (Some(accessed), Some(modified), false) = (&entry.atim, &entry.mtim, is_directory) {
            let time = |time: &crate::images::ghost::Timeval| Timespec {
                tv_sec: time.tv_sec as i64,
                tv_nsec: (time.tv_usec % 1_000_000) as i64 * 1000,
            };
            let times = Timestamps { last_access: time(accessed), last_modification: time(modified) };
            utimensat(&directory, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(step("set its times"))?;
        }
        Ok(())
    }
}

/// The directory of `path`, opened within `root`, and the name in it.
fn parent<'a>(root: BorrowedFd<'_>, path: &'a [u8]) -> io::Result<(OwnedFd, &'a [u8])> {
    let slash = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let (directory, name) = (&path[..slash], &path[slash + 1..]);
    if name.is_empty() || name == b"." || name == b".." {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file's name"));
    }
    let directory = if directory.is_empty() { &b"/"[..] } else { directory };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok((openat2(root, directory, flags, Mode::empty(), ResolveFlags::IN_ROOT)?, name))
}

/// Makes the directories on the way to `path` that are not there.
fn make_parents(root: BorrowedFd<'_>, path: &[u8], temporary: &mut Vec<(Vec<u8>, bool)>) -> io::Result<()> {
    let mut missing = Vec::new();
    let mut at = path;
    loop {
        match parent(root, at) {
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound && missing.len() < DEEPEST => {
                let slash = at.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                at = &at[..slash];
                missing.push(at);
            }
            Err(error) => return Err(error),
        }
    }
    for directory in missing.into_iter().rev() {
        let (above, name) = parent(root, directory)?;
        mkdirat(above, name, Mode::from_raw_mode(0o755))?;
        temporary.push((directory.to_vec(), true));
    }
    Ok(())
}
