//! Namespaces and what lies in them: both halves, dump and restore (namespaces(7)).
//!
//! | file | what it owns |
//! | --- | --- |
//! | `collect` | the dump: [`Collected`] |
//! | `plan` | the restore: [`RestorePlan`] |
//! | `kind` | the kinds of namespaces and how images number them |
//! | `mountinfo` | [`MountTable`]: the mounts that a process sees |
//! | `mounts/`, `net/`, `ipc`, `uts`, `time` | one kind each, both halves |
//! | `sysctl` | settings |
//! | `external` | what lies outside, as command lines name it |
//! | `enter` | a thread that looks at a namespace from inside |
//!
//! A tree may live in ferry's own namespace of a kind, which is then neither saved nor made, or all of it in one other,
//! which its root's is. Anything else is refused.

mod collect;
mod enter;
mod external;
mod ipc;
mod kind;
mod mountinfo;
mod mounts;
mod net;
mod plan;
mod sysctl;
mod time;
mod uts;

pub use collect::{CollectNamespacesError, Collected, DumpNamespacesError, NamespaceOptions};
pub(crate) use enter::visit;
pub use kind::{NamespaceIds, NamespaceKind};
pub use mountinfo::{Device, ImagePath, Mount, MountTable};
pub use mounts::{FindMounts, RestoreMountsError};
pub(crate) use net::netlink;
pub use net::raise_loopback;
pub use plan::{NamespaceObstacle, PlanNamespacesError, RestoreNamespaceOptions, RestoreNamespacesError, RestorePlan};
