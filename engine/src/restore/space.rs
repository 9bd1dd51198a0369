//! Giving tasks their memory, all tasks of a wave at once.
//!
//! Before: a task has its maker's memory (the first one ferry's). After: it has the mappings, pages, bounds and vdso of its image,
//! beside the scaffold (the runners' area and the parking), and no descriptor more than before.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use super::Restore;
use super::error::RestoreError;
use super::live::LiveTask;
use super::script::{Data, Results, Script};
use crate::memory::bounds;
use crate::memory::fill::{self, WORTH_USERFAULTFD};
use crate::memory::inherit::{Changes, PageWrite};
use crate::memory::layout::{ADDRESS_END, Backing, Layout, Mapping, advice, subtract};
use crate::sys::pidfd;

const READ_WRITE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const MADV_GUARD_INSTALL: u64 = 102;

/// What is going on in one task.
struct Job {
    place: usize,
    changes: Changes,
    /// Files by number and access mode; the index of the call that opens it, then the descriptor.
    files: BTreeMap<(u32, u32), u64>,
    /// The same for the executable; none when it is that of the inherited memory already.
    exe: Option<u64>,
    /// Fresh ranges that userfaultfd(2) fills, and what goes there.
    big: Vec<Range<u64>>,
    placed: Vec<PageWrite>,
    uffd: Option<u64>,
}

impl Restore<'_> {
    /// Restores the memory of `places`, whose makers' memory is finished.
    pub(super) fn restore_memory(&mut self, places: &[usize]) -> Result<(), RestoreError> {
        let mut jobs: Vec<Job> = Vec::new();
        for &place in places {
            if self.checkpoint.tasks.get(place).is_some_and(|task| task.memory.is_some()) {
                jobs.push(self.plan_job(place));
            }
        }
        let mut clearing = Vec::with_capacity(jobs.len());
        for job in &mut jobs {
            clearing.push((job.place, self.clear(job)?));
        }
        let results = self.live.run(clearing)?;
        for (job, results) in jobs.iter_mut().zip(&results) {
            job.take_descriptors(results)?;
        }
        let mapping = jobs.iter_mut().map(|job| (job.place, self.map(job))).collect();
        let results = self.live.run(mapping)?;
        for (job, results) in jobs.iter_mut().zip(&results) {
            job.uffd = job.uffd.and_then(|call| results[call as usize].ok());
            self.fill(job)?;
        }
        let finishing = jobs.iter().map(|job| (job.place, self.finish(job))).collect();
        self.live.run(finishing)?;
        for job in &jobs {
            let vdso_at = self.plan.vdso_at[job.place].unwrap_or(self.plan.parking.start);
            let task = self.live.task_mut(job.place);
            task.space = Some(job.place);
            task.vdso_at = vdso_at;
            self.pages_compared += job.changes.compared;
            self.pages_shared += job.changes.compared - job.changes.different;
        }
        Ok(())
    }

    fn layout(&self, place: usize) -> &Layout {
        &self.memory(place).layout
    }

    fn plan_job(&self, place: usize) -> Job {
        let target = self.memory(place).memory();
        let parent = self.live.task(place).space.map(|space| self.memory(space).memory());
        let mut changes = Changes::between(parent, target);
        let (big, placed) = split_big(&mut changes, target.layout);
        Job { place, changes, files: BTreeMap::new(), exe: None, big, placed, uffd: None }
    }

    /// Moves the vdso, unmaps what the task shall not have, opens the files that it needs.
    fn clear(&self, job: &mut Job) -> Result<Script, RestoreError> {
        let mut script = Script::default();
        let (task, vdso) = (self.live.task(job.place), &self.plan.vdso);
        let mut keep = job.changes.keep.clone();
        keep.push(self.plan.scaffold());
        let target = self.plan.vdso_at[job.place].unwrap_or(self.plan.parking.start);
        let moves = target != task.vdso_at;
        if moves && task.vdso_at != self.plan.parking.start {
            self.move_vdso(&mut script, task.vdso_at, self.plan.parking.start);
        } else if !moves {
            keep.push(target..target + vdso.length());
        }
        keep.sort_by_key(|range| range.start);
        for gap in subtract(0..ADDRESS_END, &keep) {
            let length = gap.end - gap.start;
            script.memory("unmap what was inherited", &gap, libc::SYS_munmap, &[gap.start, length]);
        }
        if moves && target != self.plan.parking.start {
            self.move_vdso(&mut script, self.plan.parking.start, target);
        }
        let layout = self.layout(job.place);
        for fresh in &job.changes.fresh {
            if let Backing::File { id, access, .. } = layout.mappings[fresh.mapping].backing
                && let Entry::Vacant(entry) = job.files.entry((id, access))
            {
                entry.insert(self.files.open(&mut script, id, access)? as u64);
            }
        }
        // The kernel refuses to change an executable that is mapped, even to itself.
        let exe = self.memory(job.place).mm.exe_file_id;
        if task.space.map(|space| self.memory(space).mm.exe_file_id) != Some(exe) {
            job.exe = Some(self.files.open(&mut script, exe, libc::O_RDONLY as u32)? as u64);
        }
        Ok(script)
    }

    fn move_vdso(&self, script: &mut Script, from: u64, to: u64) {
        for arguments in self.plan.vdso.moves(from, to) {
            let range = arguments[0]..arguments[0] + arguments[1];
            script.memory("move the vdso", &range, libc::SYS_mremap, &arguments);
        }
    }

    /// Maps what is new, opens what will be written, drops what only the parent has.
    fn map(&self, job: &mut Job) -> Script {
        let mut script = Script::default();
        for range in &job.changes.unprotect {
            let arguments = [range.start, range.end - range.start, READ_WRITE];
            script.memory("make it writable", range, libc::SYS_mprotect, &arguments);
        }
        for range in &job.changes.drop {
            let arguments = [range.start, range.end - range.start, libc::MADV_DONTNEED as u64];
            script.memory("drop pages of", range, libc::SYS_madvise, &arguments);
        }
        let layout = self.layout(job.place);
        for fresh in &job.changes.fresh {
            let (mapping, range) = (&layout.mappings[fresh.mapping], &fresh.range);
            let offset = mapping.offset + (range.start - mapping.range.start);
            let (fd, offset) = match mapping.backing {
                Backing::Anonymous => (u64::MAX, 0),
                Backing::File { id, access, .. } => (job.files[&(id, access)], offset),
                Backing::Shared { shmid, .. } => (self.shared_descriptor(shmid), offset),
            };
            let flags = u64::from(mapping.map_flags()) | libc::MAP_FIXED_NOREPLACE as u64;
            let length = range.end - range.start;
            let arguments = [range.start, length, u64::from(fresh.protection), flags, fd, offset];
            script.memory("map", range, libc::SYS_mmap, &arguments);
            for bit in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
                // Before the pages come, so that they come in the right size.
                if mapping.advice & (1 << bit) != 0 {
                    script.try_memory(range, libc::SYS_madvise, &[range.start, length, bit as u64]);
                }
            }
        }
        for fd in job.files.values() {
            script.attempt(libc::SYS_close, &[*fd]);
        }
        if !job.big.is_empty() {
            let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
            job.uffd = Some(script.attempt(libc::SYS_userfaultfd, &[flags]) as u64);
        }
        script
    }

    fn fill(&self, job: &mut Job) -> Result<(), RestoreError> {
        let (task, pages) = (self.live.task(job.place), &self.memory(job.place).pages.pages);
        let failed = |source| RestoreError::fill(task.pid, &task.comm, source);
        fill::write(task.host, pages, &job.changes.writes).map_err(failed)?;
        match job.uffd.map(|fd| take_uffd(task, fd, &job.big)) {
            Some(Ok(uffd)) => fill::place(task.host, uffd.as_fd(), pages, &job.placed).map_err(failed),
            // Without it (a sysctl or seccomp may forbid it), the slower way; the ranges are writable for that.
            _ => fill::write(task.host, pages, &job.placed).map_err(failed),
        }
    }

    /// Puts protections, advice, locks, guards and bounds right.
    fn finish(&self, job: &Job) -> Script {
        let mut script = Script::default();
        let layout = self.layout(job.place);
        if let Some(fd) = job.uffd {
            script.attempt(libc::SYS_close, &[fd]);
        }
        for (range, protection) in &job.changes.protect {
            let arguments = [range.start, range.end - range.start, u64::from(*protection)];
            script.memory("protect", range, libc::SYS_mprotect, &arguments);
        }
        for mapping in &layout.mappings {
            advise(&mut script, mapping);
            if mapping.locked {
                let length = mapping.range.end - mapping.range.start;
                // Without any access to it the pages cannot be brought in, but the lock holds.
                if mapping.protection == 0 {
                    script.try_memory(&mapping.range, libc::SYS_mlock, &[mapping.range.start, length]);
                } else {
                    script.memory("lock", &mapping.range, libc::SYS_mlock, &[mapping.range.start, length]);
                }
            }
        }
        for range in &layout.guards {
            let arguments = [range.start, range.end - range.start, MADV_GUARD_INSTALL];
            script.memory("guard (Linux 6.13)", range, libc::SYS_madvise, &arguments);
        }
        let image = &self.memory(job.place).mm;
        let data = Data {
            argument: 2,
            bytes: bounds::prctl_map(image, job.exe.map_or(bounds::SAME_EXECUTABLE, |exe| exe as u32)),
            inner: Some((bounds::VECTOR, bounds::auxiliary(image))),
        };
        let arguments = [libc::PR_SET_MM as u64, libc::PR_SET_MM_MAP as u64, 0, bounds::MAP_SIZE as u64];
        script.with_data("set them", "bounds of its memory", libc::SYS_prctl, &arguments, data);
        if let Some(exe) = job.exe {
            script.attempt(libc::SYS_close, &[exe]);
        }
        script
    }
}

impl Job {
    /// Replaces the places of the opening calls by what they returned.
    fn take_descriptors(&mut self, results: &Results) -> Result<(), RestoreError> {
        for fd in self.files.values_mut().chain(&mut self.exe) {
            *fd = results[*fd as usize].map_err(|errno| RestoreError::Own { step: "open a file in a task", errno })?;
        }
        Ok(())
    }
}

/// Advice other than that on page sizes, which comes before the pages.
fn advise(script: &mut Script, mapping: &Mapping) {
    let rest = mapping.advice & !(advice::HUGEPAGE | advice::NOHUGEPAGE);
    let length = mapping.range.end - mapping.range.start;
    for bit in (0..64).filter(|bit| rest & (1 << bit) != 0) {
        script.memory("advise", &mapping.range, libc::SYS_madvise, &[mapping.range.start, length, bit]);
    }
}

/// Takes out what userfaultfd(2) is to place: much content for fresh private memory of ordinary pages.
fn split_big(changes: &mut Changes, layout: &Layout) -> (Vec<Range<u64>>, Vec<PageWrite>) {
    let (mut big, mut placed) = (Vec::new(), Vec::new());
    if changes.writes.iter().map(|write| write.length).sum::<u64>() < WORTH_USERFAULTFD {
        return (big, placed);
    }
    for fresh in &changes.fresh {
        let mapping = &layout.mappings[fresh.mapping];
        let huge = mapping.flags & libc::MAP_HUGETLB as u32 != 0 || mapping.advice & advice::HUGEPAGE != 0;
        let first = changes.writes.partition_point(|write| write.address + write.length <= fresh.range.start);
        let inside = changes.writes[first..].iter().take_while(|write| write.address < fresh.range.end);
        let bytes: u64 = inside.map(|write| write.length).sum();
        if mapping.backing == Backing::Anonymous && !huge && bytes >= WORTH_USERFAULTFD {
            big.push(fresh.range.clone());
        }
    }
    let mut kept = Vec::new();
    for write in changes.writes.drain(..) {
        let mut address = write.address;
        let whole = write.address..write.address + write.length;
        let part = |range: Range<u64>| PageWrite {
            address: range.start,
            offset: write.offset + (range.start - write.address),
            length: range.end - range.start,
        };
        for range in big.iter().filter(|range| range.start < whole.end && whole.start < range.end) {
            let (start, end) = (range.start.max(whole.start), range.end.min(whole.end));
            if address < start {
                kept.push(part(address..start));
            }
            placed.push(part(start..end));
            address = end;
        }
        if address < whole.end {
            kept.push(part(address..whole.end));
        }
    }
    changes.writes = kept;
    (big, placed)
}

fn take_uffd(task: &LiveTask, fd: u64, ranges: &[Range<u64>]) -> nix::Result<OwnedFd> {
    let process = pidfd::open(task.host)?;
    let uffd = pidfd::get_fd(process.as_fd(), fd as i32)?;
    fill::register(&uffd, ranges)?;
    Ok(uffd)
}
