//! The memory phase: the pages of every process and of every shared object, and what tmpfs mounts hold.
//!
//! Pages images are numbered from 1: processes in the order of the tree, then shared objects.

use std::time::Instant;

use crate::fault::DumpStep;
use crate::images::pagemap::PagemapEntry;
use crate::images::{Content, Sink};
use crate::lazy::offer::StoppedPages;
use crate::memory::lazy::{self, Parted};
use crate::memory::pages::ProcessPages;
use crate::memory::staging::{Staged, Staging};
use crate::sys::HostPid;

use super::{DumpError, DumpOptions, Dumped, TreeState, records};

/// Pages that were copied, to be written once the tree runs on.
pub struct Copied {
    staging: Staging,
    images: Vec<CopiedImage>,
    /// Pages that are left out of the images, to be fetched from the stopped tree.
    pub later: StoppedPages,
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
    let (mut images, mut later) = (Vec::new(), StoppedPages::default());
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
        let cores = process.cores.iter().map(|(_, core)| core);
        let may_wait = process.mm.as_ref().map(|mm| lazy::ranges(mm, cores)).unwrap_or_default();
        let found = &process.pages;
        if options.lazy.is_some() {
            let parted = Parted::of(&found.runs, &may_wait);
            let pages = ProcessPages::open(pid, &parted.written).map_err(DumpError::read(pid, "memory"))?;
            put(process.pagemap_image(), parted.entries(&found.in_parent), None, &pages)?;
            dumped.pages += parted.written.pages();
            dumped.lazy_pages += parted.later.pages();
            later.add(process.task.ns_pid.0 as u32, pid, parted.later);
        } else {
            let pages = ProcessPages::open(pid, &found.runs).map_err(DumpError::read(pid, "memory"))?;
            let entries = lazy::entries(found.runs.runs(), &found.in_parent, &may_wait);
            put(process.pagemap_image(), entries, copy, &pages)?;
            dumped.pages += found.runs.pages();
        }
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
    Ok(Copied { staging, images, later })
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
