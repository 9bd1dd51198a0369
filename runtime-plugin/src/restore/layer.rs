//! What a container had changed of its root file system: from the archive into the bundle's, or back.
//!
//! The changes are verified before the engine begins, made when it has found no obstacle, and kept when all of the container is
//! there again and does not run yet. Until then a failure undoes them, and so does the janitor when ferry is killed.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use ferry_engine::file_tree::{Applied, Changes, DELETED_FILES, ROOTFS_DIFF};
use ferry_engine::images::{ImageSet, RawRegion};
use ferry_engine::restore::{RestorePhase, Stage};

use super::remains::Remains;
use crate::failure::{Failure, sentence_of};

/// The members of an archive that hold changes.
#[derive(Default)]
pub struct Members {
    /// The files that were made or changed.
    pub diff: Option<RawRegion>,
    /// The list of those deleted.
    pub deleted: Option<RawRegion>,
}

/// Changes on their way into a root file system.
pub struct Layer {
    changes: Option<Changes>,
    rootfs: PathBuf,
    applied: RefCell<Option<Applied>>,
}

impl Layer {
    /// Verifies the changes; none with `ignore`.
    pub fn read(images: &ImageSet, members: Members, rootfs: &Path, ignore: bool) -> Result<Self, Failure> {
        let changes = if ignore {
            None
        } else {
            let diff = images.member(ROOTFS_DIFF, members.diff)?;
            let deleted = images.member(DELETED_FILES, members.deleted)?;
            Some(Changes::read(diff.as_ref(), deleted.as_ref())?)
        };
        Ok(Self { changes, rootfs: rootfs.to_owned(), applied: RefCell::default() })
    }

    /// Makes the changes before the first task is made.
    pub fn at_phase(&self, phase: RestorePhase, remains: &Remains) -> Result<(), String> {
        if let (RestorePhase::FirstTask, Some(changes)) = (phase, &self.changes) {
            remains.layer().map_err(|error| sentence_of(&error))?;
            let applied = changes
                .apply(&self.rootfs)
                .map_err(|error| format!("{}; --ignore-rootfs leaves these changes out", sentence_of(&error)))?;
            self.applied.replace(Some(applied));
        }
        Ok(())
    }

    /// Keeps the changes once nothing can fail any more.
    pub fn at_stage(&self, stage: Stage) -> Result<(), String> {
        match (stage, self.applied.take()) {
            (Stage::PreResume, Some(applied)) => applied.keep().map_err(|error| sentence_of(&error)),
            (_, applied) => {
                self.applied.replace(applied);
                Ok(())
            }
        }
    }
}
