//! Address spaces: what is mapped, which pages there are, and their contents.
//!
//! A dump collects with [`mappings`], [`pages`], [`shmem`], [`staging`] and [`reader`]; a restore reads [`layout`], [`pageset`] and [`images`],
//! computes what to do in [`inherit`], and does it with [`fill`], [`bounds`] and [`vdso`]. An incremental dump leaves pages to its [`parent`].

pub mod bounds;
pub mod fill;
pub mod images;
pub mod inherit;
pub mod layout;
pub mod lazy;
pub mod mappings;
pub mod pages;
pub mod pageset;
pub mod parallel;
pub mod parent;
pub mod reader;
pub mod shmem;
pub mod staging;
pub mod vdso;
