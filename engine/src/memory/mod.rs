//! Address spaces: what is mapped, which pages there are, and their contents.

pub mod bounds;
pub mod mappings;
pub mod pages;
pub mod shmem;
