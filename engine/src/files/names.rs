//! Names that a restore gives in file systems: for as long as it runs (deleted files), or if it succeeds (sockets).
//!
//! Every path is resolved by openat2(2) with `RESOLVE_IN_ROOT` from the tree's root: neither `..` nor a link leads out of it.
//! The folder of each name is held open: when the tree has failed, its mounts have come apart, and a path would lead
//! elsewhere (fs/namespace.c, `disconnect_mount`). Whoever is to clean up after ferry itself is told of each name before it is
//! given, with the open folder.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, openat2, statat, unlinkat};
use rustix::io::Errno;

use crate::sys::HostPid;

/// A name that a restore is about to give.
#[derive(Clone, Copy, Debug)]
pub struct NewName<'a> {
    /// The folder, opened with `O_PATH`.
    pub folder: BorrowedFd<'a>,
    /// Its number; names in one folder come with the same.
    pub folder_number: usize,
    /// The name in it.
    pub name: &'a [u8],
    /// Whether it is a directory's.
    pub is_directory: bool,
}

/// Keeps record of names, so that they can be taken away if ferry dies.
pub trait NameJournal {
    /// The name, free so far, is about to be given. It is to be removed if the restore does not succeed.
    ///
    /// # Errors
    /// When the record cannot be kept; the restore fails then.
    fn coming(&mut self, name: NewName<'_>) -> io::Result<()>;

    /// The last name told was not given.
    ///
    /// # Errors
    /// As of [`Self::coming`].
    fn withdrawn(&mut self) -> io::Result<()>;
}

/// How long a name stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stay {
    /// Until the restore ends, however it ends.
    Passing,
    /// If the restore succeeds.
    Lasting,
}

struct Name {
    folder: usize,
    name: Vec<u8>,
    is_directory: bool,
    stay: Stay,
}

/// The names given so far. Dropped before [`Self::finish`], it takes them all away.
#[derive(Default)]
pub(super) struct Names {
    root: Option<OwnedFd>,
    folders: Vec<(Vec<u8>, OwnedFd)>,
    given: Vec<Name>,
    journal: Option<Box<dyn NameJournal>>,
}

impl Names {
    /// Names in the mounts that `task` sees.
    pub fn of(task: HostPid, journal: Option<Box<dyn NameJournal>>) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(format!("/proc/{task}/root"), flags, Mode::empty())?;
        Ok(Self { root: Some(root), folders: Vec::new(), given: Vec::new(), journal })
    }

    /// The number of the folder of `path`, which exists, and the name in it.
    fn folder<'a>(&mut self, path: &'a [u8]) -> io::Result<(usize, &'a [u8])> {
        let (folder, name) = split(path);
        if name.is_empty() || name == b"." || name == b".." {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file's name"));
        }
        if let Some(number) = self.folders.iter().position(|(known, _)| known == folder) {
            return Ok((number, name));
        }
        let root = self.root.as_ref().ok_or_else(|| io::Error::other("the tree has no root yet"))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let whole = if folder.is_empty() { &b"/"[..] } else { folder };
        let opened = openat2(root, whole, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        self.folders.push((folder.to_vec(), opened));
        Ok((self.folders.len() - 1, name))
    }

    /// The folder of `path`, and the name in it.
    pub fn find<'a>(&mut self, path: &'a [u8]) -> io::Result<(BorrowedFd<'_>, &'a [u8])> {
        let (folder, name) = self.folder(path)?;
        Ok((self.folders[folder].1.as_fd(), name))
    }

    /// Whether the folder of `path` exists.
    pub fn has_folder(&mut self, path: &[u8]) -> io::Result<bool> {
        match self.folder(path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives `path`, whose folder exists, with `make`, which gets the folder and the name and fails if there is such a name.
    ///
    /// # Errors
    /// Those of `make`; `EEXIST` when there is such a name already.
    pub fn give<T>(
        &mut self,
        path: &[u8],
        is_directory: bool,
        make: impl FnOnce(BorrowedFd<'_>, &[u8]) -> io::Result<T>,
    ) -> io::Result<T> {
        let Some(name) = self.announce(path, is_directory, Stay::Passing)? else {
            return Err(Errno::EXIST.into());
        };
        match make(self.folders[name.folder].1.as_fd(), &name.name) {
            Ok(made) => {
                self.given.push(name);
                Ok(made)
            }
            Err(error) => {
                // It may be somebody else's by now.
                self.journal.as_mut().map_or(Ok(()), |journal| journal.withdrawn())?;
                Err(error)
            }
        }
    }

    /// A task of the tree may give `path` later. Names that exist already, and those of which the folder is missing, are left
    /// alone.
    pub fn expect(&mut self, path: &[u8], stay: Stay) -> io::Result<()> {
        if self.has_folder(path)?
            && let Some(name) = self.announce(path, false, stay)?
        {
            self.given.push(name);
        }
        Ok(())
    }

    /// Tells the journal of a name, if it is free.
    fn announce(&mut self, path: &[u8], is_directory: bool, stay: Stay) -> io::Result<Option<Name>> {
        let (folder, name) = self.folder(path)?;
        let opened = self.folders[folder].1.as_fd();
        match statat(opened, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Ok(_) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        if let Some(journal) = &mut self.journal {
            journal.coming(NewName { folder: opened, folder_number: folder, name, is_directory })?;
        }
        Ok(Some(Name { folder, name: name.to_vec(), is_directory, stay }))
    }

    /// Removes a name that was there before the restore and served it.
    pub fn remove_old(&mut self, path: &[u8]) -> io::Result<()> {
        let (folder, name) = self.find(path)?;
        Ok(unlinkat(folder, name, AtFlags::empty())?)
    }

    /// Takes away the names that were for the time being; the others stay.
    ///
    /// # Errors
    /// The path that could not be removed first, and why, after all others have been.
    pub fn finish(&mut self) -> Result<(), (Vec<u8>, io::Error)> {
        self.given.retain(|name| name.stay == Stay::Passing);
        self.remove()
    }

    fn remove(&mut self) -> Result<(), (Vec<u8>, io::Error)> {
        let mut first = Ok(());
        for name in std::mem::take(&mut self.given).into_iter().rev() {
            let (path, folder) = &self.folders[name.folder];
            let flags = if name.is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            match unlinkat(folder, &name.name, flags) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) if first.is_ok() => first = Err(([path, &b"/"[..], &name.name].concat(), error.into())),
                Err(_) => {}
            }
        }
        first
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        // A restore that failed leaves no files but those that were there before, so that it can be tried again.
        if let Err((path, error)) = self.remove() {
            tracing::warn!(path = %String::from_utf8_lossy(&path), %error, "a file of the failed restore stays");
        }
    }
}

/// The folder of a path, without its last slash, and the name in it.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let slash = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    (&path[..slash], path.get(slash + 1..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    struct Listed(Rc<RefCell<Vec<String>>>);

    impl NameJournal for Listed {
        fn coming(&mut self, name: NewName<'_>) -> io::Result<()> {
            let text = String::from_utf8_lossy(name.name).into_owned();
            self.0.borrow_mut().push(text);
            Ok(())
        }

        fn withdrawn(&mut self) -> io::Result<()> {
            self.0.borrow_mut().pop();
            Ok(())
        }
    }

    fn here(journal: Rc<RefCell<Vec<String>>>) -> Names {
        Names::of(HostPid(std::process::id() as i32), Some(Box::new(Listed(journal)))).unwrap()
    }

    fn make(folder: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
        Ok(rustix::fs::openat(folder, name, flags, Mode::RUSR).map(drop)?)
    }

    #[test]
    fn names_go_with_a_failed_restore_and_lasting_ones_stay_with_a_successful_one() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| [place.path().to_str().unwrap(), "/", name].concat().into_bytes();
        std::fs::write(place.path().join("old"), "").unwrap();
        for succeeds in [false, true] {
            let told = Rc::default();
            let mut names = here(Rc::clone(&told));
            assert_eq!(names.give(&path("old"), false, make).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            names.give(&path("passing"), false, make).unwrap();
            names.expect(&path("lasting"), Stay::Lasting).unwrap();
            names.expect(&path("old"), Stay::Lasting).unwrap();
            names.expect(&path("no/such"), Stay::Lasting).unwrap();
            std::fs::write(place.path().join("lasting"), "").unwrap();
            assert!(names.give(&path("failing"), false, |_, _| Err::<(), _>(io::Error::other("no"))).is_err());
            assert_eq!(*told.borrow(), ["passing", "lasting"]);
            if succeeds {
                names.finish().unwrap();
            }
            drop(names);
            let mut left: Vec<_> =
                std::fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            left.sort();
            assert_eq!(left, if succeeds { vec!["lasting", "old"] } else { vec!["old"] });
        }
    }

    #[test]
    fn a_path_is_cut_at_its_last_slash() {
        assert_eq!(split(b"/a/b"), (&b"/a"[..], &b"b"[..]));
        assert_eq!(split(b"/a"), (&b""[..], &b"a"[..]));
    }
}
