//! What it takes to change a folder back.
//!
//! What is replaced or deleted is stored in a folder of its own below the root, where renaming can bring it, until the changes are
//! kept. Only renaming a folder of an overlay's lower layers fails (`EXDEV`): its files are moved one by one then.
//!
//! Each step is written into a file of the store before it is taken, so that another process can undo the changes when the one
//! that made them was killed. When that file goes, the changes are kept.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, Timespec, fremovexattr, fstat, futimens, mkdirat, open, openat,
    renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use super::pack::{self, for_each};
use super::tape::path_of;
use super::unpack::{Attributes, damaged, open_beneath, times};

/// A change that was made, or was about to be.
enum Step {
    /// This is new.
    Made(PathBuf),
    /// This is in the store under the number.
    Moved(PathBuf, usize),
    /// This folder was so.
    Folder(PathBuf, Attributes),
}

/// The changes of a folder so far.
pub(super) struct Journal {
    pub(super) root: PathBuf,
    pub(super) folder: OwnedFd,
    steps: Vec<Step>,
    noted: HashSet<PathBuf>,
    store: OsString,
    /// What the steps are written to; there is no store without it.
    log: Option<File>,
    moved: usize,
}

/// The name of the file with the steps, in the store.
const LOG: &str = "steps";

/// Undoes what `ferry`, a process that was killed, has changed in the folder `root` and not kept.
///
/// # Errors
/// The first problem; everything else is undone.
pub fn take_back(root: &Path, ferry: u32) -> io::Result<()> {
    let folder = open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut journal = Journal::new(root, folder, ferry);
    let store = match journal.open_store() {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => return Ok(()),
        store => store?,
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let log = match openat(&store, LOG, flags, Mode::empty()) {
        Ok(log) => File::from(log),
        // The changes were being kept.
        Err(Errno::NOENT) => return std::fs::remove_dir_all(path_of(&journal.folder).join(&journal.store)),
        Err(error) => return Err(error.into()),
    };
    let mut text = Vec::new();
    (&log).read_to_end(&mut text)?;
    let fields: Vec<&[u8]> = text.split(|byte| *byte == 0).collect();
    journal.steps = fields.chunks_exact(3).map_while(|fields| Step::parse(fields[0], fields[1], fields[2])).collect();
    journal.log = Some(log);
    journal.undo()
}

impl Step {
    /// Three fields, each with a zero byte after it; the last is the path.
    fn to_bytes(&self) -> Vec<u8> {
        let (kind, more, path) = match self {
            Self::Made(path) => ("made", String::new(), path),
            Self::Moved(path, number) => ("moved", number.to_string(), path),
            Self::Folder(path, was) => {
                let time = (was.modified.tv_sec, was.modified.tv_nsec);
                let was = (was.mode, was.uid, was.gid, time, &was.extended);
                ("folder", serde_json::to_string(&was).unwrap_or_default(), path)
            }
        };
        [kind.as_bytes(), b"\0", more.as_bytes(), b"\0", path.as_os_str().as_bytes(), b"\0"].concat()
    }

    fn parse(kind: &[u8], more: &[u8], path: &[u8]) -> Option<Self> {
        let path = PathBuf::from(OsStr::from_bytes(path));
        match kind {
            b"made" => Some(Self::Made(path)),
            b"moved" => Some(Self::Moved(path, str::from_utf8(more).ok()?.parse().ok()?)),
            b"folder" => {
                let (mode, uid, gid, (tv_sec, tv_nsec), extended) = serde_json::from_slice(more).ok()?;
                let modified = Timespec { tv_sec, tv_nsec };
                Some(Self::Folder(path, Attributes { mode, uid, gid, modified, extended }))
            }
            _ => None,
        }
    }
}

impl Journal {
    /// Of changes that the process `ferry` makes.
    pub(super) fn new(root: &Path, folder: OwnedFd, ferry: u32) -> Self {
        let store = format!(".ferry-restore-{ferry}").into();
        let (root, steps, noted) = (root.to_owned(), Vec::new(), HashSet::new());
        Self { root, folder, steps, noted, store, log: None, moved: 0 }
    }

    fn push(&mut self, step: Step) -> io::Result<()> {
        if let Some(log) = &mut self.log {
            log.write_all(&step.to_bytes())?;
        }
        self.steps.push(step);
        Ok(())
    }

    /// Refuses paths of the store.
    pub(super) fn refuse_own(&self, path: &Path) -> io::Result<()> {
        if path.starts_with(&self.store) { Err(damaged("a name that ferry uses for itself")) } else { Ok(()) }
    }

    /// The folder that `path` is in.
    pub(super) fn parent(&self, path: &Path) -> io::Result<OwnedFd> {
        let parent = path.parent().unwrap_or(Path::new(""));
        open_beneath(self.folder.as_fd(), parent, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// The folder that `path` is in, if there is one that no link leads to, and the last name of the path.
    pub(super) fn parent_if_there<'a>(&self, path: &'a Path) -> io::Result<Option<(OwnedFd, &'a OsStr)>> {
        let Some(name) = path.file_name() else { return Ok(None) };
        match self.parent(path) {
            Ok(parent) => Ok(Some((parent, name))),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// The folder where things are stored, made before the first change.
    pub(super) fn store(&mut self) -> io::Result<OwnedFd> {
        if self.log.is_some() {
            return self.open_store();
        }
        self.note_folder(Path::new(""))?;
        mkdirat(&self.folder, &self.store, Mode::RWXU)?;
        let store = self.open_store()?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let log = self.log.insert(File::from(openat(&store, LOG, flags, Mode::RUSR | Mode::WUSR)?));
        let steps: Vec<u8> = self.steps.iter().flat_map(Step::to_bytes).collect();
        log.write_all(&steps)?;
        Ok(store)
    }

    fn open_store(&self) -> io::Result<OwnedFd> {
        open_beneath(self.folder.as_fd(), Path::new(&self.store), OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Remembers how a folder is before it is changed.
    pub(super) fn note_folder(&mut self, path: &Path) -> io::Result<()> {
        if self.noted.insert(path.to_owned()) {
            let folder = open_beneath(self.folder.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            self.push(Step::Folder(path.to_owned(), attributes_of(&folder)?))?;
        }
        Ok(())
    }

    /// Says that `path` is about to be made.
    pub(super) fn made(&mut self, path: &Path) -> io::Result<()> {
        self.note_folder(path.parent().unwrap_or(Path::new("")))?;
        self.store()?;
        self.noted.insert(path.to_owned());
        self.push(Step::Made(path.to_owned()))
    }

    /// Stores what is at `path`.
    pub(super) fn set_aside(&mut self, path: &Path) -> io::Result<()> {
        self.note_folder(path.parent().unwrap_or(Path::new("")))?;
        let store = self.store()?;
        let Some((parent, name)) = self.parent_if_there(path)? else { return Ok(()) };
        let number = self.moved;
        self.moved += 1;
        self.push(Step::Moved(path.to_owned(), number))?;
        move_tree(&parent, name, &store, number.to_string().as_ref())
    }

    /// Makes a folder be as it should, unless it is; further attributes stay.
    pub(super) fn set_folder(&mut self, folder: &OwnedFd, path: &Path, wanted: &Attributes) -> io::Result<()> {
        self.note_folder(path)?;
        if !is_so(&attributes_of(folder)?, wanted) {
            self.store()?;
        }
        set_if_other(folder, wanted)
    }

    /// Removes what is stored.
    pub(super) fn keep(self) -> io::Result<()> {
        if self.log.is_none() {
            return Ok(());
        }
        let root = attributes_of(&self.folder)?;
        unlinkat(self.open_store()?, LOG, AtFlags::empty())?;
        std::fs::remove_dir_all(path_of(&self.folder).join(&self.store))?;
        Ok(futimens(&self.folder, &times(root.modified))?)
    }

    /// Undoes all changes, as far as it can; the first problem is told.
    pub(super) fn undo(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        let steps = std::mem::take(&mut self.steps);
        // The root's own attributes come last: taking the store away changes its time.
        let (of_root, steps): (Vec<Step>, Vec<Step>) =
            steps.into_iter().partition(|step| matches!(step, Step::Folder(path, _) if path.as_os_str().is_empty()));
        for step in steps.iter().rev() {
            result = result.and(self.undo_step(step));
        }
        if self.log.take().is_some() {
            result = result.and(std::fs::remove_dir_all(path_of(&self.folder).join(&self.store)));
        }
        for step in of_root.iter().rev() {
            result = result.and(self.undo_step(step));
        }
        result
    }

    fn undo_step(&self, step: &Step) -> io::Result<()> {
        match step {
            Step::Made(path) => {
                let Some((parent, name)) = self.parent_if_there(path)? else { return Ok(()) };
                remove(&parent, name)
            }
            Step::Moved(path, number) => {
                let Some((parent, name)) = self.parent_if_there(path)? else { return Ok(()) };
                let store = self.open_store()?;
                match move_tree(&store, number.to_string().as_ref(), &parent, name) {
                    // It had not been moved yet.
                    Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Ok(()),
                    result => result,
                }
            }
            Step::Folder(path, attributes) => {
                let folder = match open_beneath(self.folder.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY) {
                    // Somebody else had made it, and has taken it away since.
                    Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => return Ok(()),
                    folder => folder?,
                };
                take_others(&folder, attributes)?;
                set_if_other(&folder, attributes)
            }
        }
    }
}

fn remove(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => std::fs::remove_dir_all(path_of(parent).join(name)),
        Err(error) => Err(error.into()),
    }
}

fn attributes_of(folder: &OwnedFd) -> io::Result<Attributes> {
    let stat = fstat(folder)?;
    Ok(Attributes {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
        extended: pack::attributes(folder.as_fd())?,
    })
}

fn is_so(found: &Attributes, wanted: &Attributes) -> bool {
    let time = |of: &Attributes| (of.modified.tv_sec, of.modified.tv_nsec);
    found.same_but_for_time(wanted) && time(found) == time(wanted)
}

/// Sets what differs. Attributes that are not wanted stay.
fn set_if_other(folder: &OwnedFd, wanted: &Attributes) -> io::Result<()> {
    let found = attributes_of(folder)?;
    if !found.same_but_for_time(wanted) {
        wanted.set(folder)?;
    }
    if !is_so(&found, wanted) {
        futimens(folder, &times(wanted.modified))?;
    }
    Ok(())
}

/// Removes the attributes that are not wanted.
fn take_others(folder: &OwnedFd, wanted: &Attributes) -> io::Result<()> {
    for (name, _) in pack::attributes(folder.as_fd())? {
        if wanted.extended.iter().all(|(wanted, _)| *wanted != name) {
            fremovexattr(folder, name.as_str())?;
        }
    }
    Ok(())
}

/// Moves what is `name` in `from` to `new` in `to`, into a folder that is there if need be.
fn move_tree(from: &OwnedFd, name: &OsStr, to: &OwnedFd, new: &OsStr) -> io::Result<()> {
    let problem = match renameat_with(from, name, to, new, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(()),
        Err(problem @ (Errno::XDEV | Errno::EXIST)) => problem,
        Err(error) => return Err(error.into()),
    };
    let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(problem.into());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let source = openat(from, name, flags, Mode::empty())?;
    match mkdirat(to, new, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let target = openat(to, new, flags, Mode::empty())?;
    let attributes = attributes_of(&source)?;
    let mut inside = Vec::new();
    for_each(&source, Path::new(""), 0, |name, _| {
        inside.push(OsStr::from_bytes(name.to_bytes()).to_owned());
        Ok(())
    })?;
    for name in &inside {
        move_tree(&source, name, &target, name)?;
    }
    set_if_other(&target, &attributes)?;
    Ok(unlinkat(from, name, AtFlags::REMOVEDIR)?)
}
