//! Where a thread lands after a system call that was put into it, should ferry die meanwhile.
//!
//! Between the entry and the exit of such a call nobody can set the thread's registers. When the tracer is killed there, the call is
//! completed and the thread goes on at the instruction that its registers name. That would be the code behind the `syscall`
//! instruction that was borrowed, with the registers and stack of something else. So at the entry the registers are made
//! to name a jump that leads to itself: the thread circles there, with all signals blocked, until the watcher gives it its own
//! registers back ([`super::recover`]). Ordinary code has such a jump every few KiB, be it in the middle of other instructions:
//! `jmp` to itself, or through a register that a system call leaves alone and in which its own address can be put.

use std::slice;

use super::AgentError;
use super::arch::{self, SelfJump};
use super::inject::find_syscall_instruction;
use crate::memory::mappings::{self, Mapping};
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

/// Landings of files that were found in one process, for the others: code of a file is searched once.
#[derive(Debug, Default)]
pub struct Landings(Vec<InFile>);

/// Where one is in a file.
#[derive(Debug)]
struct InFile {
    device: (u32, u32),
    inode: u64,
    offset: u64,
}

impl Landings {
    /// Looks for what it takes to have a task make calls. There is no landing in a tiny program without a C library.
    ///
    /// # Errors
    /// [`AgentError::NoSyscallInstruction`].
    pub fn foothold(&mut self, tid: HostPid, mapped: &[Mapping]) -> Result<Foothold, AgentError> {
        let code = mappings::code(mapped);
        let syscall_at = find_syscall_instruction(tid, code.map(|mapping| mapping.range.clone()))?;
        Ok(Foothold { syscall_at, landing: self.find(tid, mapped) })
    }

    /// Looks for a landing in a task: where one is in a file is known from then on, so that a running task may be asked and a stopped one
    /// need not wait for the search.
    pub fn find(&mut self, tid: HostPid, mapped: &[Mapping]) -> Option<Landing> {
        let code = mappings::code(mapped);
        let known = code.clone().find_map(|mapping| self.known(tid, mapping));
        known.or_else(|| self.search(tid, code))
    }

    fn known(&self, tid: HostPid, mapping: &Mapping) -> Option<Landing> {
        let offsets = mapping.offset..mapping.offset + (mapping.range.end - mapping.range.start);
        let of_file = |known: &&InFile| known.device == mapping.device && known.inode == mapping.inode;
        self.0.iter().filter(of_file).filter(|known| offsets.contains(&known.offset)).find_map(|known| {
            let at = mapping.range.start + (known.offset - mapping.offset);
            // The program may have written to its code.
            let mut pair = [0; 2];
            process_vm::read(tid, &[at..at + 2], &mut pair).ok()?;
            let (_, jump) = arch::find_self_jump(&pair)?;
            Some(Landing { at: RemoteAddr(at), jump })
        })
    }

    fn search<'a>(&mut self, tid: HostPid, executable: impl Iterator<Item = &'a Mapping>) -> Option<Landing> {
        let (mut block, mut left) = (Vec::new(), MOST);
        for mapping in executable {
            for start in mapping.range.clone().step_by(BLOCK as usize) {
                let part = start..mapping.range.end.min(start + BLOCK);
                left = left.checked_sub(part.end - part.start)?;
                block.resize((part.end - part.start) as usize, 0);
                let got = process_vm::read(tid, slice::from_ref(&part), &mut block).unwrap_or(0);
                let Some((offset, jump)) = arch::find_self_jump(&block[..got]) else { continue };
                let at = start + offset as u64;
                if mapping.inode != 0 {
                    let offset = mapping.offset + (at - mapping.range.start);
                    self.0.push(InFile { device: mapping.device, inode: mapping.inode, offset });
                }
                return Some(Landing { at: RemoteAddr(at), jump });
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

impl From<RemoteAddr> for Foothold {
    /// A `syscall` instruction without a landing.
    fn from(syscall_at: RemoteAddr) -> Self {
        Self { syscall_at, landing: None }
    }
}
