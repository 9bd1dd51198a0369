//! Where a thread lands after a system call that was put into it, should ferry die meanwhile.
//!
//! Between the entry and the exit of such a call nobody can set the thread's registers. When the tracer is killed there, the call is
//! completed and the thread goes on at the instruction that its registers name. That would be the code behind the `syscall`
//! instruction that was borrowed, with the registers and stack of something else. So at the entry the registers are made
//! to name a jump that leads to itself: the thread circles there, with all signals blocked, until the watcher gives it its own
//! registers back ([`super::recover`]). Ordinary code has such a jump every few KiB, be it in the middle of other instructions:
//! `jmp` to itself, or through a register that a system call leaves alone and in which its own address can be put.

use std::ops::Range;
use std::slice;

use super::AgentError;
use super::arch::{self, SelfJump};
use super::inject::find_syscall_instruction;
use crate::sys::{HostPid, RemoteAddr, process_vm};

/// How much of a program is searched.
const MOST: u64 = 4 << 20;
/// How much at a time. No jump is looked for across its end.
const BLOCK: u64 = 64 << 10;

/// A jump to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landing {
    /// Where it is.
    pub at: RemoteAddr,
    /// What it jumps through.
    pub jump: SelfJump,
}

impl Landing {
    /// Looks for one in the executable ranges of a task. None where there is none, as in a tiny program without a C library.
    pub fn find(tid: HostPid, executable: impl IntoIterator<Item = Range<u64>>) -> Option<Self> {
        let (mut block, mut left) = (Vec::new(), MOST);
        for range in executable {
            for start in (range.start..range.end).step_by(BLOCK as usize) {
                let part = start..range.end.min(start + BLOCK);
                left = left.checked_sub(part.end - part.start)?;
                block.resize((part.end - part.start) as usize, 0);
                let got = process_vm::read(tid, slice::from_ref(&part), &mut block).unwrap_or(0);
                if let Some((offset, jump)) = arch::find_self_jump(&block[..got]) {
                    return Some(Self { at: RemoteAddr(start + offset as u64), jump });
                }
            }
        }
        None
    }
}

/// What of a task's own code serves to have it make calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foothold {
    /// A `syscall` instruction.
    pub syscall_at: RemoteAddr,
    /// Where to land if ferry dies in the middle of a call.
    pub landing: Option<Landing>,
}

impl Foothold {
    /// Looks for one in the executable ranges of a task.
    ///
    /// # Errors
    /// [`AgentError::NoSyscallInstruction`].
    pub fn find(tid: HostPid, executable: impl Iterator<Item = Range<u64>> + Clone) -> Result<Self, AgentError> {
        let syscall_at = find_syscall_instruction(tid, executable.clone())?;
        Ok(Self { syscall_at, landing: Landing::find(tid, executable) })
    }
}

impl From<RemoteAddr> for Foothold {
    /// A `syscall` instruction without a landing.
    fn from(syscall_at: RemoteAddr) -> Self {
        Self { syscall_at, landing: None }
    }
}
