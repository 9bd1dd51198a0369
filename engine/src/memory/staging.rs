//! Memory that a tree's pages are copied to while it is stopped, so that it may run on while they are written out.
//!
//! Writing pages to a new file costs two to four times as much as copying them: the kernel finds, clears and files a
//! page of its cache for each. A dump that lets the tree run on therefore prepares the memory before it stops the tree,
//! and only copies while it is stopped.

use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::images::Content;
use crate::procfs;
use crate::sys::touched::TouchedMemory;

/// What one thread copies at a time.
const PIECE: usize = 512 << 10;
/// Below this a second thread costs more than it gains: it takes some 200 µs to start and to end.
const WORTH_THREAD: usize = 8 << 20;
/// Copying is bound by memory, which two threads saturate.
const THREADS: usize = 2;
/// Room beyond what was counted while the tree ran: what it touches until it stops, and the kernel's counters, which lag.
const SLACK: u64 = 1 << 20;

/// Room for pages.
#[derive(Default)]
pub struct Staging {
    room: Option<TouchedMemory>,
    used: usize,
}

/// Where content lies in a [`Staging`].
pub struct Staged(Range<usize>);

impl Staging {
    /// Prepares room for `expected` bytes and somewhat more, but not for more than `most`, nor for more than a quarter of
    /// what the host has available. Without room, pages are written out while the tree is stopped.
    pub fn prepare(expected: u64, most: u64) -> Self {
        let len = expected.saturating_add(expected / 8).saturating_add(SLACK);
        if len > most.min(procfs::available_memory().unwrap_or(0) / 4) {
            return Self::default();
        }
        let room = TouchedMemory::new(len as usize)
            .inspect_err(|errno| tracing::debug!(%errno, len, "no memory to copy pages to"))
            .ok();
        Self { room, used: 0 }
    }

    /// Whether there is any room at all.
    pub fn has_room(&self) -> bool {
        self.room.as_ref().is_some_and(|room| self.used < room.len())
    }

    /// Copies `content`, if there is room for it.
    ///
    /// # Errors
    /// Those of reading it.
    pub fn take(&mut self, content: &dyn Content) -> io::Result<Option<Staged>> {
        let place = usize::try_from(content.len()).ok().and_then(|len| Some(self.used..self.used.checked_add(len)?));
        let Some(place) = place else { return Ok(None) };
        let Some(room) = self.room.as_mut().and_then(|room| room.get_mut(place.clone())) else { return Ok(None) };
        copy(content, room)?;
        self.used = place.end;
        Ok(Some(Staged(place)))
    }

    /// The copy.
    pub fn bytes(&self, staged: &Staged) -> &[u8] {
        self.room.as_deref().and_then(|room| room.get(staged.0.clone())).unwrap_or_default()
    }
}

/// Fills `room` with `content`, which is as long.
fn copy(content: &dyn Content, room: &mut [u8]) -> io::Result<()> {
    let threads = if room.len() < WORTH_THREAD { 1 } else { THREADS };
    let pieces = Mutex::new(room.chunks_mut(PIECE).enumerate());
    let failed = AtomicBool::new(false);
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let next = pieces.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
            let Some((index, piece)) = next else { break };
            content.read_at((index * PIECE) as u64, piece).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        others.into_iter().fold(own, |result, other| match other.join() {
            Ok(theirs) => result.and(theirs),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_fits_and_leaves_the_rest() {
        let mut staging = Staging::prepare(3 << 20, 64 << 20);
        let large: Vec<u8> = (0..(3 << 20) + 17u32).map(|byte| (byte % 253) as u8).collect();
        let kept = staging.take(&large).unwrap().expect("as much as was expected");
        assert!(staging.take(&large).unwrap().is_none(), "no room for twice as much");
        let small = staging.take(&vec![7; 5]).unwrap().expect("room is left");
        assert!(staging.bytes(&kept) == large);
        assert_eq!(staging.bytes(&small), [7; 5]);
    }

    #[test]
    fn prepares_nothing_beyond_the_limit() {
        let mut staging = Staging::prepare(1 << 20, 1 << 20);
        assert!(staging.take(&vec![1]).unwrap().is_none());
    }

    #[test]
    fn reports_what_cannot_be_read() {
        struct Failing;
        impl Content for Failing {
            fn len(&self) -> u64 {
                8 << 20
            }
            fn read_at(&self, offset: u64, _: &mut [u8]) -> io::Result<()> {
                if offset < 4 << 20 { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
            }
        }
        let error = Staging::prepare(8 << 20, 64 << 20).take(&Failing).err().expect("fails");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
