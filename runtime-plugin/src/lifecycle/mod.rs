//! The commands of the container lifecycle, one file each.

pub mod spec;
