//! Freezing of cgroups and saving of cgroup trees, on v1, v2 and hybrid hosts.
//!
//! | module | what it owns |
//! | --- | --- |
//! | [`hierarchy`] | which hierarchies exist, where they are mounted, and which cgroup a task is in |
//! | [`directory`] | one cgroup directory: control files, children, the tasks in it |
//! | [`freezer`] | freezing a container's cgroup and giving it back as it was found |
//! | [`tree`] | saving a container's cgroups with their properties, making them again, moving tasks into them |
//!
//! The crate knows nothing of checkpoint images: it hands out plain structs. It keeps no state of its own, reads no
//! environment and prints nothing. Pids and tids are `i32`, numbered as in the `/proc` this process sees.

pub mod directory;
pub mod freezer;
pub mod hierarchy;
pub mod tree;

pub use directory::Cgroup;
pub use freezer::{FreezeError, Freezer, Frozen, State};
pub use hierarchy::{CgroupSet, Hierarchies, Hierarchy, HierarchyError, Membership, Version};
pub use tree::restore::{RestoreError, RestoredCgroups};
pub use tree::{CgroupTree, ChosenProperties, Mode, OWN_SET, SaveError, SetTable};
