//! Mount namespaces (mount_namespaces(7)).
//!
//! | file | what it owns |
//! | --- | --- |
//! | `record` | a mount as images have it |
//! | `source` | where each mount comes from when it is made again |
//! | `outside` | mounts from outside that are found without being named |
//! | `collect` | the dump: records, refusals, content of tmpfs |
//! | `order` | in which order mounts are made |
//! | `restore`, `script` | the restore, by calls of the root task |

mod collect;
mod context;
mod order;
mod outside;
mod record;
mod restore;
mod script;
mod source;

pub(super) use collect::Mounts;
pub use outside::FindMounts;
pub use restore::{MountPlan, RestoreMountsError};

/// Something about mounts that stands in the way: of a dump, or of a restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    /// Which mount.
    pub object: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}
