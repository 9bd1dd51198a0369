//! The memory that an agent's runner and ferry talk through.
//!
//! A slot starts with a header that the assembly knows:
//!
//! | offset | what |
//! | --- | --- |
//! | 0 | futex word: ferry's thread id; `FUTEX_WAITERS` while the runner sleeps on it |
//! | 4 | 1 while a batch is to be run, 0 when it is done; a futex that ferry sleeps on |
//! | 8, 16 | address and count of the operations |
//! | 24 | a signal frame to return to if ferry dies, or 0 to exit |
//! | 32 | the node of ferry's robust list |
//!
//! Operations and their data follow at [`HEADER`]. A signal frame, if there is one, takes the slot's end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::AgentError;
use crate::sys::robust::FUTEX_OWNER_DIED;
use crate::sys::shared::{SharedMemory, await_word, futex_wake, this_thread};
use crate::sys::{HostPid, RemoteAddr};

const OWNER: usize = 0;
const WORK: usize = 4;
const OPERATIONS: usize = 8;
const COUNT: usize = 16;
const DEATH_FRAME: usize = 24;
/// Where the robust list's node lies.
pub const NODE: usize = 32;
/// Where operations may start.
pub const HEADER: usize = 64;

/// How long a batch may take before ferry looks whether the task is still alive.
const PATIENCE: Duration = Duration::from_millis(20);

/// One runner's part of a shared area.
#[derive(Clone)]
pub struct Slot {
    memory: Arc<SharedMemory>,
    offset: usize,
    len: usize,
    remote: RemoteAddr,
    /// The address in ferry of the same memory differs from the remote one by this area's placement only.
    reserved: usize,
}

impl Slot {
    /// The part of `memory` from `offset`, `len` bytes long, that the task sees at `remote`; ready for a runner.
    pub fn new(memory: Arc<SharedMemory>, offset: usize, len: usize, remote: RemoteAddr) -> Self {
        assert!(len > HEADER && offset + len <= memory.len());
        memory.write(offset, &[0; HEADER]);
        memory.word(offset + OWNER).store(this_thread(), Ordering::Release);
        Self { memory, offset, len, remote, reserved: 0 }
    }

    /// Where the task sees the slot.
    pub fn remote(&self) -> RemoteAddr {
        self.remote
    }

    /// How many bytes operations and data may take.
    pub fn room(&self) -> usize {
        self.len - HEADER - self.reserved
    }

    /// Where the task sees byte `offset` of the part for operations and data.
    pub fn body(&self, offset: usize) -> RemoteAddr {
        self.remote.offset((HEADER + offset) as u64)
    }

    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        self.memory.write(self.offset + HEADER + offset, bytes);
    }

    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.memory.read(self.offset + HEADER + offset, bytes);
    }

    /// Ferry's address of the robust list's node.
    pub(super) fn node(&self) -> *mut u8 {
        self.memory.local_base().wrapping_add(self.offset + NODE)
    }

    /// Places, at the slot's end, what the runner returns to if ferry dies; `make` is given its remote address.
    pub(super) fn set_death_frame(&mut self, size: usize, make: impl FnOnce(RemoteAddr) -> Vec<u8>) {
        let start = (self.len - size) & !63;
        let frame = make(self.remote.offset(start as u64));
        assert!(frame.len() <= size && start > HEADER);
        self.memory.write(self.offset + start, &frame);
        let address = self.remote.0 + start as u64;
        self.memory.write(self.offset + DEATH_FRAME, &address.to_ne_bytes());
        self.reserved = self.len - start;
    }

    /// Hands `count` operations at the start of the body to the runner.
    pub(super) fn submit(&self, count: usize) {
        self.memory.write(self.offset + OPERATIONS, &self.body(0).0.to_ne_bytes());
        self.memory.write(self.offset + COUNT, &(count as u64).to_ne_bytes());
        self.memory.word(self.offset + WORK).store(1, Ordering::Release);
        // Clearing FUTEX_WAITERS makes a runner that is about to sleep look again: no wake-up is lost.
        let owner = self.memory.word(self.offset + OWNER);
        owner.store(this_thread(), Ordering::Release);
        futex_wake(owner);
    }

    /// Lets the runner, if there is one, do what it does when ferry dies, as soon as it waits for work: what the kernel
    /// would do with the robust list, done by hand.
    pub fn abandon(&self) {
        let owner = self.memory.word(self.offset + OWNER);
        owner.fetch_or(FUTEX_OWNER_DIED, Ordering::AcqRel);
        futex_wake(owner);
    }

    /// Waits until the runner of `tid` has run what [`Self::submit`] gave it.
    ///
    /// # Errors
    /// When the task is gone or stopped, or `deadline` is over.
    pub(super) fn wait_done(&self, tid: HostPid, deadline: Duration) -> Result<(), AgentError> {
        let word = self.memory.word(self.offset + WORK);
        let start = Instant::now();
        while !await_word(word, 0, PATIENCE) {
            match task_state(tid) {
                Some('R' | 'S' | 'D') => {}
                Some('t' | 'T') => return Err(AgentError::Stopped { tid }),
                _ => return Err(AgentError::Died { tid }),
            }
            if start.elapsed() > deadline {
                return Err(AgentError::Late { tid, after: deadline });
            }
        }
        Ok(())
    }
}

/// The state letter of proc_pid_stat(5), or none when the task is gone.
fn task_state(tid: HostPid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}
