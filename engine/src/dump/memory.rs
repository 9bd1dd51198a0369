//! The memory phase: the pages of every process and of every shared object, and what tmpfs mounts hold.
//!
//! Pages images are numbered from 1: processes in the order of the tree, then shared objects.

use std::time::Instant;

use crate::fault::DumpStep;
use crate::images::pagemap::PagemapEntry;
use crate::images::{Content, Sink};
use crate::memory::pages::ProcessPages;
use crate::memory::staging::{Staged, Staging};
use crate::sys::HostPid;

use super::{DumpError, DumpOptions, Dumped, TreeState, records};

/// Pages that were copied, to be written once the tree runs on.
pub struct Copied {
    staging: Staging,
    images: Vec<CopiedImage>,
}

struct CopiedImage {
    number: u32,
    pagemap: String,
    entries: Vec<PagemapEntry>,
    copy: Staged,
}

/// Writes what was not copied while the tree is stopped; returns what was.
pub fn save(
    state: &mut TreeState,
    sink: &mut dyn Sink,
    options: &DumpOptions,
    dumped: &mut Dumped,
) -> Result<Copied, DumpError> {
    let start = Instant::now();
    let mut staging = std::mem::take(&mut state.staging);
    let mut images = Vec::new();
    let mut number = 0;
    let mut put = |pagemap: String, entries: Vec<PagemapEntry>, copy: Option<Staged>, pages: &dyn Content| {
        number += 1;
        match copy {
            Some(copy) => images.push(CopiedImage { number, pagemap, entries, copy }),
            None => {
                options.step(DumpStep::Pages)?;
                records::save_pages(sink, &pagemap, number, &entries, pages)?;
            }
        }
        Ok::<_, DumpError>(())
    };
    for process in state.processes.iter_mut().filter(|process| !process.is_zombie()) {
        let pid = process.task.pid;
        let copy = process.pages.copy.take();
        let pages = ProcessPages::open(pid, &process.pages.runs).map_err(DumpError::read(pid, "memory"))?;
        put(process.pagemap_image(), process.pages.entries(), copy, &pages)?;
        dumped.pages += process.pages.runs.pages();
        dumped.parent_pages += process.pages.pages_in_parent();
    }
    let root: HostPid = state.processes[0].task.pid;
    for (id, object) in state.shared.iter() {
        let copy = staging.take(object).map_err(DumpError::read(root, "shared memory"))?;
        put(records::shared_pagemap_image(id), object.dump(), copy, object)?;
        dumped.pages += object.pages();
        dumped.shared_pages += object.pages();
        dumped.shared_parent_pages += object.pages_in_parent();
    }
    state.namespaces.dump_content(sink)?;
    dumped.memory = start.elapsed();
    Ok(Copied { staging, images })
}

impl Copied {
    /// Writes the copies. The tree need not be stopped.
    pub fn save(self, sink: &mut dyn Sink, options: &DumpOptions, dumped: &mut Dumped) -> Result<(), DumpError> {
        let start = Instant::now();
        for image in &self.images {
            options.step(DumpStep::Pages)?;
            let pages = self.staging.bytes(&image.copy);
            records::save_pages(sink, &image.pagemap, image.number, &image.entries, &pages)?;
        }
        dumped.memory_writing = start.elapsed();
        Ok(())
    }
}
