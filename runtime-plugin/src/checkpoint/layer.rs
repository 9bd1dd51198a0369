//! What a container has changed of its root file system, where its root is an overlay: into the archive, while it stands still.

use std::path::Path;

use ferry_engine::dump::{DumpListener, DumpStage};
use ferry_engine::file_tree::{DELETED_FILES, Overlay, ROOTFS_DIFF};
use ferry_engine::images::Sink;
use ferry_engine::sys::HostPid;

use crate::failure::{Failure, sentence_of};

/// The upper layer of the container's root, if it has one and is to be saved.
pub struct Layer {
    overlay: Option<Overlay>,
}

impl Layer {
    /// Finds the layer of a container's first process.
    pub fn find(pid: i32, ignore: bool) -> Result<Self, Failure> {
        if ignore {
            return Ok(Self { overlay: None });
        }
        let overlay = Overlay::of(HostPid(pid)).map_err(|error| {
            Failure::new(format!("{}; --ignore-rootfs leaves these changes out", sentence_of(&error)))
        })?;
        Ok(Self { overlay })
    }
}

impl DumpListener for Layer {
    fn reached(&mut self, _: DumpStage, _: HostPid) -> Result<(), String> {
        Ok(())
    }

    fn stopped(&mut self, sink: &mut dyn Sink) -> Result<(), String> {
        let Some(overlay) = &self.overlay else { return Ok(()) };
        let changes = overlay.changes().map_err(|error| sentence_of(&error))?;
        let name = |path: &Path| match path.to_str() {
            Some(path) => Ok(format!("/{path}")),
            None => Err(format!("the deleted file /{} cannot be listed: its name is no UTF-8", path.display())),
        };
        let deleted: Vec<String> = changes.deleted.iter().map(|path| name(path)).collect::<Result<_, _>>()?;
        let list = serde_json::to_vec(&deleted).map_err(|error| sentence_of(&error))?;
        sink.put_beside(ROOTFS_DIFF, &changes.tape)
            .and_then(|()| sink.put_beside(DELETED_FILES, &list))
            .map_err(|error| sentence_of(&error))
    }
}
