//! Earlier images, which an incremental dump or pre-dump leaves pages to: `--prev-images-dir`, `--parent-path`, `parent_img`.
//!
//! A restore follows their link only to a folder within the image folder or beside it, so nothing else is dumped with.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use ferry_engine::dump::DumpOptions;
use ferry_engine::images::{FolderSource, ImageSet, parent};
use ferry_engine::memory::parent::ParentMemory;

use crate::failure::Failure;

/// Has the dump into `folder` leave pages to the images in `previous`, a path seen from `folder`. Returns the text of the link
/// that is to lead there.
///
/// # Errors
/// When there are none, or a restore would not find them.
pub fn take(folder: &Path, previous: &Path, options: &mut DumpOptions) -> Result<PathBuf, Failure> {
    let named = |failure: Failure| failure.context(told(previous));
    let (link, opened) = follow(folder, previous).map_err(named)?;
    let source = FolderSource::new(opened);
    let images = ImageSet::open(Box::new(source)).map_err(|error| named(error.into()))?;
    options.parent = Some(Arc::new(ParentMemory::open(&images).map_err(|error| named(error.into()))?));
    options.track_memory = true;
    Ok(link)
}

/// The text of a link in `folder` to the earlier images in `previous`, which are there.
///
/// # Errors
/// As [`take`].
pub fn link(folder: &Path, previous: &Path) -> Result<PathBuf, Failure> {
    follow(folder, previous).map(|(link, _)| link).map_err(|failure| failure.context(told(previous)))
}

fn told(previous: &Path) -> String {
    format!("the previous images, {}", previous.display())
}

fn follow(folder: &Path, previous: &Path) -> Result<(PathBuf, OwnedFd), Failure> {
    let opened = File::open(folder)?;
    let link = link_to(folder, previous)?;
    let target = parent::follow(&opened, &link)?;
    Ok((link, target))
}

/// How a link in `folder` names the folder of previous images: as the caller did, or by the short way where that leads round.
fn link_to(folder: &Path, previous: &Path) -> Result<PathBuf, Failure> {
    let name = previous.strip_prefix("..").unwrap_or(previous);
    if name != Path::new("") && name.components().all(|part| matches!(part, Component::Normal(_))) {
        return Ok(previous.to_owned());
    }
    let (folder, target) = (fs::canonicalize(folder)?, fs::canonicalize(folder.join(previous))?);
    if target == folder {
        return Err(Failure::new("they are in the folder that is to be written to"));
    }
    let beside = folder.parent().and_then(|above| target.strip_prefix(above).ok());
    beside.map(|name| Path::new("..").join(name)).ok_or_else(|| {
        Failure::new(format!(
            "a restore would not find them: put both folders below {}",
            folder.parent().unwrap_or(&folder).display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_beside_the_images_is_named_from_there() {
        let place = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let path = place.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let (images, earlier) = (folder("a/images"), folder("a/earlier"));
        let link = |previous: &Path| link_to(&images, previous).map_err(|failure| failure.to_string());
        assert_eq!(link(Path::new("../earlier")).unwrap(), Path::new("../earlier"));
        assert_eq!(link(&earlier).unwrap(), Path::new("../earlier"));
        assert_eq!(link(Path::new("../../a/earlier")).unwrap(), Path::new("../earlier"));
        assert!(link(&folder("b")).unwrap_err().contains("would not find them"));
        assert!(link(&images).is_err());
    }
}
