//! The parent of an image folder: an earlier folder, which holds the pages that an incremental dump left out.
//!
//! The folder names it by a symbolic link called `parent`, as CRIU's do. Images are hostile, and so is the link: the pages of any
//! folder that it leads to end up in the restored tree. It is followed to a folder within the image folder or beside it, through
//! no other link (openat2(2), `RESOLVE_BENEATH`, `RESOLVE_NO_SYMLINKS`).

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2, readlinkat};
use rustix::io::Errno;

use super::source::SourceError;

/// Name of the link.
pub const PARENT_LINK: &str = "parent";
/// Most sets of one chain. Far more than a chain has that somebody waits for; a link that leads back ends here.
pub const MAX_CHAIN: usize = 256;

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Opens the parent of `folder`; none if it names none.
///
/// # Errors
/// [`SourceError::Parent`], if it leads elsewhere or to nothing.
pub(super) fn open(folder: impl AsFd) -> Result<Option<OwnedFd>, SourceError> {
    let target = match readlinkat(&folder, PARENT_LINK, Vec::new()) {
        Ok(target) => target,
        Err(Errno::NOENT) => return Ok(None),
        // No link, but perhaps the folder itself.
        Err(Errno::INVAL) => {
            let opened = openat(&folder, PARENT_LINK, FOLDER | OFlags::NOFOLLOW, Mode::empty());
            return opened.map(Some).map_err(|error| refused(PARENT_LINK, &error.to_string()));
        }
        Err(error) => return Err(refused(PARENT_LINK, &error.to_string())),
    };
    follow(&folder, Path::new(OsStr::from_bytes(target.as_bytes()))).map(Some)
}

/// Opens the folder that a link with this text in `folder` would lead to.
///
/// # Errors
/// As [`open`].
pub fn follow(folder: impl AsFd, target: &Path) -> Result<OwnedFd, SourceError> {
    let shown = target.display().to_string();
    let failed = |error: Errno| match error {
        Errno::LOOP | Errno::XDEV => {
            refused(&shown, "it must lead to a folder beside the images, and through no other link")
        }
        error => refused(&shown, &error.to_string()),
    };
    if target.is_absolute() {
        return Err(refused(&shown, "it must be relative: put the folders beside each other"));
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let Ok(rest) = target.strip_prefix(".").unwrap_or(target).strip_prefix("..") else {
        return openat2(&folder, target, FOLDER, Mode::empty(), resolve).map_err(failed);
    };
    let above = openat(&folder, "..", FOLDER, Mode::empty()).map_err(failed)?;
    openat2(&above, Path::new(".").join(rest), FOLDER, Mode::empty(), resolve).map_err(failed)
}

fn refused(target: &str, problem: &str) -> SourceError {
    SourceError::Parent { problem: format!("cannot open their parent images, {target}: {problem}") }
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir, create_dir_all, write};
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_lead_beside_the_images_and_nowhere_else() {
        let place = tempfile::tempdir().unwrap();
        create_dir_all(place.path().join("c/images")).unwrap();
        create_dir_all(place.path().join("c/images/old")).unwrap();
        create_dir_all(place.path().join("c/earlier/deep")).unwrap();
        create_dir(place.path().join("outside")).unwrap();
        write(place.path().join("c/file"), "").unwrap();
        symlink("../outside", place.path().join("c/detour")).unwrap();
        symlink(place.path().join("outside"), place.path().join("c/earlier/detour")).unwrap();
        let images = std::fs::File::open(place.path().join("c/images")).unwrap();
        for good in ["../earlier", "./../earlier/", "../earlier/deep", "../earlier/deep/..", "old", "."] {
            follow(&images, Path::new(good)).unwrap_or_else(|error| panic!("{good}: {error}"));
        }
        for bad in [
            "../../outside",
            "../../c/earlier",
            "../detour",
            "../earlier/detour",
            "/proc/self/root/etc",
            "../earlier/../../outside",
            "../file",
            "../none",
            "",
        ] {
            assert!(matches!(follow(&images, Path::new(bad)), Err(SourceError::Parent { .. })), "{bad}");
        }
    }

    #[test]
    fn a_folder_names_its_parent_by_a_link_or_holds_it() {
        let place = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            create_dir(place.path().join(name)).unwrap();
            std::fs::File::open(place.path().join(name)).unwrap()
        };
        assert!(open(make("none")).unwrap().is_none());
        let linked = make("linked");
        symlink("../none", place.path().join("linked/parent")).unwrap();
        assert!(open(linked).unwrap().is_some());
        let held = make("held");
        create_dir(place.path().join("held/parent")).unwrap();
        assert!(open(held).unwrap().is_some());
        let odd = make("odd");
        write(place.path().join("odd/parent"), "").unwrap();
        assert!(open(odd).is_err());
    }
}
