//! What a dump has out there, noted where it outlives ferry.
//!
//! A process that is killed undoes nothing. So a dump may be given a journal: memory that it shares with a process which
//! watches over it, and in which it notes each thing before it makes it. [`Journal::repair`], called by the watcher once
//! the dump's process is gone, undoes what is noted: tasks get their registers and signal masks back, the agents' areas are unmapped, images
//! of an unfinished set are removed, and a tree that was being ended, its images complete, is ended.
//!
//! There is one writer and, after its death, one reader; each note is complete before the word that makes it valid is stored. What is undone
//! is forgotten, so that whoever watches over the watcher can go on where that was killed too. A journal that is closed
//! ([`Journal::close`]) asks for nothing any more.
//! Pages of the journal that nobody writes to take no memory.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::agent::arch::{self, Registers, SelfJump};
use crate::agent::landing::{Foothold, Landing};
use crate::agent::recover;
use crate::procfs::Stat;
use crate::sys::shared::SharedMemory;
use crate::sys::{HostPid, RemoteAddr};

/// Words of the first page: how many bytes of paths there are, how many processes are being ended, and whether it is closed.
const PATHS_USED: usize = 0;
const ENDING_USED: usize = 4;
const CLOSED: usize = 8;

/// Areas that can be in tasks at the same time.
const AREAS: Table = Table { start: 0x1000, entry: 64, count: 64 };
/// Threads that can be other than their own selves at the same time.
const THREADS: Table = Table { start: 0x2000, entry: 256, count: 32 << 10 };
/// Processes that a dump ends.
const ENDING: Table = Table { start: THREADS.end(), entry: 16, count: 128 << 10 };
const PATHS: usize = ENDING.end();
const LEN: usize = PATHS + (64 << 20);

const REGISTERS: usize = size_of::<Registers>();
const _: () = assert!(16 + REGISTERS <= THREADS.entry);

struct Table {
    start: usize,
    entry: usize,
    count: usize,
}

impl Table {
    const fn end(&self) -> usize {
        self.start + self.entry * self.count
    }

    const fn at(&self, index: usize) -> usize {
        self.start + self.entry * index
    }
}

/// The state of a thread's note: what is not its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Changed {
    /// Its registers, unless its runner has returned, and its signal mask with them.
    Registers = 1,
    /// Its signal mask, and maybe its registers.
    Mask = 2,
}

/// A thread as noted.
#[derive(Clone, Copy)]
pub(crate) struct ThreadNote {
    pub place: Place,
    pub tid: HostPid,
    pub changed: Changed,
    pub mask: u64,
    pub registers: Registers,
}

/// An area as noted; its start is 0 until it is mapped.
#[derive(Clone, Debug)]
pub(crate) struct AreaNote {
    pub place: Place,
    pub leader: HostPid,
    pub range: std::ops::Range<u64>,
    pub foothold: Foothold,
    /// The number of a userfaultfd that the process may have from ferry.
    pub userfaultfd: Option<u32>,
}

/// The place of a note.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place(usize);

/// The notes of one dump. Clones are the same journal, as is what a forked child inherits.
#[derive(Clone)]
pub struct Journal {
    memory: Arc<SharedMemory>,
    /// Where the writer looks for room for the next thread.
    next_thread: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Journal")
    }
}

impl Journal {
    /// An empty journal, to be made before the fork.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn new() -> nix::Result<Self> {
        Ok(Self { memory: Arc::new(SharedMemory::anonymous(LEN, 0)?), next_thread: Arc::default() })
    }

    /// Notes that an area of `len` bytes is to be mapped in the process of `leader`. None when there is no room.
    pub(crate) fn area(&self, leader: HostPid, len: u64, foothold: Foothold) -> Option<Place> {
        let place = self.free(&AREAS, 0)?.1;
        self.next_thread.store(0, Ordering::Relaxed);
        self.put(place, 4, &leader.0.to_ne_bytes());
        self.put(place, 8, &0u64.to_ne_bytes());
        self.put(place, 16, &len.to_ne_bytes());
        self.put(place, 24, &foothold.syscall_at.0.to_ne_bytes());
        let landing = foothold.landing.map_or((0, 0), |landing| (landing.at.0, landing.jump as u64 + 1));
        self.put(place, 32, &landing.0.to_ne_bytes());
        self.put(place, 40, &landing.1.to_ne_bytes());
        self.userfaultfd(place, None);
        self.set(place, 1);
        Some(place)
    }

    /// Notes where the area was mapped.
    pub(crate) fn mapped(&self, area: Place, start: u64) {
        self.put(area, 8, &start.to_ne_bytes());
    }

    /// Notes the number that a userfaultfd will have which the process is to make, or that it is closed again.
    pub(crate) fn userfaultfd(&self, area: Place, number: Option<u32>) {
        self.put(area, 48, &number.map_or(0, |number| u64::from(number) + 1).to_ne_bytes());
    }

    /// Notes what a thread is, before its registers are changed. None when there is no room.
    pub(crate) fn thread(&self, tid: HostPid, registers: &Registers, mask: u64) -> Option<Place> {
        let (index, place) = self.free(&THREADS, self.next_thread.load(Ordering::Relaxed))?;
        self.next_thread.store(index + 1, Ordering::Relaxed);
        self.put(place, 4, &tid.0.to_ne_bytes());
        self.put(place, 8, &mask.to_ne_bytes());
        self.put(place, 16, &arch::to_bytes(registers));
        self.set(place, Changed::Registers as u32);
        Some(place)
    }

    /// Notes what of a thread is about to be changed, or is not put back yet.
    pub(crate) fn changed(&self, thread: Place, changed: Changed) {
        self.set(thread, changed as u32);
    }

    /// Forgets a note.
    pub(crate) fn forget(&self, place: Place) {
        self.set(place, 0);
    }

    /// Notes a file or folder that is to be made, and is to be removed unless [`Self::keep_paths`] is called.
    ///
    /// Files that do not fit are not noted; they stay behind if ferry is killed.
    pub fn path(&self, path: &Path) {
        let bytes = path.as_os_str().as_bytes();
        let used = self.memory.word(PATHS_USED).load(Ordering::Relaxed) as usize;
        let end = used + size_of::<u32>() + bytes.len().next_multiple_of(4);
        if PATHS + end > LEN {
            return;
        }
        self.memory.write(PATHS + used, &(bytes.len() as u32).to_ne_bytes());
        self.memory.write(PATHS + used + size_of::<u32>(), bytes);
        self.memory.word(PATHS_USED).store(end as u32, Ordering::Release);
    }

    /// The files made are complete, and stay.
    pub fn keep_paths(&self) {
        self.memory.word(PATHS_USED).store(0, Ordering::Release);
    }

    /// Notes the processes that are to be ended now, their images being complete.
    pub(crate) fn ending(&self, processes: impl Iterator<Item = (HostPid, u64)>) {
        let mut count = 0;
        for (index, (pid, started)) in processes.take(ENDING.count).enumerate() {
            let place = Place(ENDING.at(index));
            self.put(place, 0, &pid.0.to_ne_bytes());
            self.put(place, 8, &started.to_ne_bytes());
            count = index + 1;
        }
        self.memory.word(ENDING_USED).store(count as u32, Ordering::Release);
    }

    /// Nothing is to be undone any more: all is in order, or what could be undone was.
    pub fn close(&self) {
        self.memory.word(CLOSED).store(1, Ordering::Release);
    }

    /// Whether nothing is to be undone any more.
    pub fn is_closed(&self) -> bool {
        self.memory.word(CLOSED).load(Ordering::Acquire) != 0
    }

    /// Undoes what is noted. To be called once the process that wrote it is gone; what could not be undone is told.
    pub fn repair(&self) -> Repaired {
        let mut repaired = Repaired::default();
        let threads: Vec<ThreadNote> =
            (0..THREADS.count).map_while(|index| self.thread_note(index)).flatten().collect();
        let areas: Vec<AreaNote> = (0..AREAS.count).filter_map(|index| self.area_note(index)).collect();
        for area in &areas {
            repaired.tasks += 1;
            match recover::recover(area, &threads, &|thread| self.forget(thread)) {
                Ok(()) => self.forget(area.place),
                Err(problem) => repaired.left.push(format!("process {}: {problem}", area.leader)),
            }
        }
        for path in self.paths().into_iter().rev() {
            let removed = match std::fs::symlink_metadata(&path) {
                Ok(found) if found.is_dir() => std::fs::remove_dir(&path),
                Ok(_) => std::fs::remove_file(&path),
                Err(error) => Err(error),
            };
            match removed {
                Ok(()) => repaired.paths += 1,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => repaired.left.push(format!("{}: {error}", path.display())),
            }
        }
        self.keep_paths();
        repaired.ended = self.end_processes();
        repaired
    }

    fn end_processes(&self) -> usize {
        let count = (self.memory.word(ENDING_USED).load(Ordering::Acquire) as usize).min(ENDING.count);
        for index in 0..count {
            let place = Place(ENDING.at(index));
            let (pid, started) = (HostPid(self.get(place, 0) as u32 as i32), self.get(place, 8));
            if Stat::read(pid).is_ok_and(|stat| stat.start_time == started && stat.state != 'Z') {
                // It may end at any time by itself.
                let _ = kill(Pid::from_raw(pid.0), Signal::SIGKILL);
            }
        }
        count
    }

    fn paths(&self) -> Vec<PathBuf> {
        let used = (self.memory.word(PATHS_USED).load(Ordering::Acquire) as usize).min(LEN - PATHS);
        let mut bytes = vec![0; used];
        self.memory.read(PATHS, &mut bytes);
        let mut rest = bytes.as_slice();
        let mut paths = Vec::new();
        while let Some((len, tail)) = rest.split_first_chunk::<4>() {
            let len = u32::from_ne_bytes(*len) as usize;
            let Some(path) = tail.get(..len) else { break };
            paths.push(PathBuf::from(OsStr::from_bytes(path)));
            rest = tail.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        paths
    }

    fn area_note(&self, index: usize) -> Option<AreaNote> {
        let place = Place(AREAS.at(index));
        (self.memory.word(place.0).load(Ordering::Acquire) != 0).then(|| {
            let (start, len) = (self.get(place, 8), self.get(place, 16));
            let leader = HostPid(self.memory.word(place.0 + 4).load(Ordering::Relaxed) as i32);
            let jump = SelfJump::ALL.iter().copied().find(|jump| *jump as u64 + 1 == self.get(place, 40));
            let landing = jump.map(|jump| Landing { at: RemoteAddr(self.get(place, 32)), jump });
            let foothold = Foothold { syscall_at: RemoteAddr(self.get(place, 24)), landing };
            let userfaultfd = self.get(place, 48).checked_sub(1).and_then(|number| u32::try_from(number).ok());
            AreaNote { place, leader, range: start..start.saturating_add(len), foothold, userfaultfd }
        })
    }

    /// The note at `index`; none past the last that was ever written, and none inside for one that is not valid.
    fn thread_note(&self, index: usize) -> Option<Option<ThreadNote>> {
        let place = Place(THREADS.at(index));
        let tid = HostPid(self.memory.word(place.0 + 4).load(Ordering::Relaxed) as i32);
        if tid.0 == 0 {
            return None;
        }
        let changed = match self.memory.word(place.0).load(Ordering::Acquire) {
            1 => Changed::Registers,
            2 => Changed::Mask,
            _ => return Some(None),
        };
        let mut bytes = [0; REGISTERS];
        self.memory.read(place.0 + 16, &mut bytes);
        let registers = arch::from_bytes(&bytes);
        Some(Some(ThreadNote { place, tid, changed, mask: self.get(place, 8), registers }))
    }

    /// The first place from `from` on that no valid note takes.
    fn free(&self, table: &Table, from: usize) -> Option<(usize, Place)> {
        let free = |place: &usize| self.memory.word(*place).load(Ordering::Relaxed) == 0;
        (from..table.count)
            .map(|index| (index, table.at(index)))
            .find(|(_, place)| free(place))
            .map(|(index, place)| (index, Place(place)))
    }

    fn set(&self, place: Place, state: u32) {
        self.memory.word(place.0).store(state, Ordering::Release);
    }

    fn put(&self, place: Place, offset: usize, bytes: &[u8]) {
        self.memory.write(place.0 + offset, bytes);
    }

    fn get(&self, place: Place, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(place.0 + offset, &mut bytes);
        u64::from_ne_bytes(bytes)
    }
}

/// What [`Journal::repair`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    /// Processes that still had an area of agents.
    pub tasks: usize,
    /// Files and folders removed.
    pub paths: usize,
    /// Processes of a tree whose images are complete, and that was being ended.
    pub ended: usize,
    /// What could not be undone, a sentence each.
    pub left: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_an_unfinished_set_go_and_those_of_a_finished_one_stay() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::new().unwrap();
        let (inner, kept) = (folder.path().join("images"), folder.path().join("kept"));
        journal.path(&kept);
        std::fs::write(&kept, "").unwrap();
        journal.keep_paths();
        journal.path(&inner);
        std::fs::create_dir(&inner).unwrap();
        journal.path(&inner.join("a.img"));
        journal.path(&inner.join("never-made.img"));
        std::fs::write(inner.join("a.img"), "x").unwrap();
        assert_eq!(journal.repair(), Repaired { paths: 2, ..Repaired::default() });
        assert!(kept.exists() && !inner.exists());
        assert_eq!(journal.repair(), Repaired::default());
    }

    #[test]
    fn notes_are_found_again_until_they_are_forgotten() {
        let journal = Journal::new().unwrap();
        let mut registers = arch::from_bytes(&[0; REGISTERS]);
        registers.rip = 0x1234;
        let first = journal.thread(HostPid(7), &registers, 5).unwrap();
        let second = journal.thread(HostPid(8), &registers, 6).unwrap();
        journal.forget(first);
        journal.changed(second, Changed::Mask);
        let note = journal.thread_note(1).flatten().unwrap();
        assert_eq!((note.tid, note.changed, note.mask), (HostPid(8), Changed::Mask, 6));
        assert_eq!(note.registers.rip, 0x1234);
        assert!(journal.thread_note(0).unwrap().is_none() && journal.thread_note(2).is_none());
        let landing = Some(Landing { at: RemoteAddr(0x66), jump: SelfJump::Rbx });
        let foothold = Foothold { syscall_at: RemoteAddr(0x55), landing };
        let area = journal.area(HostPid(7), 0x3000, foothold).unwrap();
        journal.mapped(area, 0x1000);
        let note = journal.area_note(0).unwrap();
        assert_eq!((note.leader, note.range, note.foothold), (HostPid(7), 0x1000..0x4000, foothold));
        journal.userfaultfd(area, Some(0));
        assert_eq!((note.userfaultfd, journal.area_note(0).unwrap().userfaultfd), (None, Some(0)));
        journal.userfaultfd(area, None);
        assert_eq!(journal.area_note(0).unwrap().userfaultfd, None);
    }
}
