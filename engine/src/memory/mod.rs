//! Address spaces: what is mapped, which pages there are, and their contents.
//!
//! A dump collects with [`mappings`], [`pages`], [`shmem`], [`staging`] and [`reader`]; a restore reads [`layout`] and [`pageset`] from the images,
//! computes what to do in [`inherit`], and does it with [`fill`], [`bounds`] and [`vdso`].

pub mod bounds;
pub mod fill;
pub mod inherit;
pub mod layout;
pub mod mappings;
pub mod pages;
pub mod pageset;
pub mod reader;
pub mod shmem;
pub mod staging;
pub mod vdso;
