//! Restartable sequences (rseq(2)): the registration, and threads found inside a critical section.
//!
//! Facts relied on: `PTRACE_GET_RSEQ_CONFIGURATION` (Linux 5.13). A thread that is preempted or interrupted between
//! `start_ip` and `post_commit` of the section that its `struct rseq` names goes on at `abort_ip`, and the kernel clears the
//! name (include/uapi/linux/rseq.h, kernel/rseq.c). An agent in the thread leaves the section for the kernel, which then
//! clears the name; so the thread must be sent to the abort handler by ferry, whether it is saved or only let go on.

use std::slice;

use super::{Checks, TaskError};
use crate::agent::Batch;
use crate::agent::inject::Context;
use crate::images::core::RseqEntry;
use crate::sys::{HostPid, RemoteAddr, process_vm, ptrace};

/// Offset of `rseq_cs` in `struct rseq`.
const RSEQ_CS: u64 = 8;
const RSEQ_CS_SIZE: usize = 32;

/// Reads the registration of a stopped thread, and moves its `context` out of a critical section.
///
/// To be called before an agent enters the thread. Memory that does not hold what rseq(2) says is taken as no section:
/// the kernel would kill the thread for it, which is the thread's own affair.
///
/// # Errors
/// [`TaskError::Collect`].
pub fn collect_rseq(tid: HostPid, context: &mut Context) -> Result<RseqEntry, TaskError> {
    let registration = ptrace::rseq_configuration(tid).map_err(|errno| TaskError::Collect {
        tid,
        what: "restartable sequence registration",
        errno,
    })?;
    if registration.pointer != 0
        && let Some(section) = Section::read(tid, registration.pointer)
        && section.contains(context.registers.rip)
    {
        context.registers.rip = section.abort;
    }
    Ok(RseqEntry {
        rseq_abi_pointer: registration.pointer,
        rseq_abi_size: registration.size,
        signature: registration.signature,
        rseq_cs_pointer: None,
    })
}

/// A critical section, as `struct rseq_cs` describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Section {
    start: u64,
    len: u64,
    abort: u64,
}

impl Section {
    fn read(tid: HostPid, rseq: u64) -> Option<Self> {
        let name = read_words::<8>(tid, rseq + RSEQ_CS)?[0];
        if name == 0 {
            return None;
        }
        let words = read_words::<RSEQ_CS_SIZE>(tid, name)?;
        // Version and flags must be zero since Linux 6.1.
        (words[0] == 0).then_some(Self { start: words[1], len: words[2], abort: words[3] })
    }

    fn contains(self, address: u64) -> bool {
        address.wrapping_sub(self.start) < self.len
    }
}

fn read_words<const LEN: usize>(tid: HostPid, address: u64) -> Option<Vec<u64>> {
    let mut bytes = [0; LEN];
    let range = address..address.checked_add(LEN as u64)?;
    (process_vm::read(tid, slice::from_ref(&range), &mut bytes).ok()? == LEN).then(|| super::words64(&bytes))
}

/// Appends the registration, if there was one. The thread must have none: its runner's is to be taken back before.
pub fn restore_rseq(batch: &mut Batch<'_>, entry: Option<&RseqEntry>, checks: &mut Checks) {
    if let Some(entry) = entry.filter(|entry| entry.rseq_abi_pointer != 0) {
        let arguments = [entry.rseq_abi_pointer, u64::from(entry.rseq_abi_size), 0, u64::from(entry.signature)];
        checks.call(batch, "restartable sequence registration", libc::SYS_rseq, &arguments);
    }
}

/// Where a word must be written last, and the word: some images name a section that the thread must still be in.
pub fn section_to_name(entry: Option<&RseqEntry>) -> Option<(RemoteAddr, u64)> {
    let entry = entry?;
    Some((RemoteAddr(entry.rseq_abi_pointer.wrapping_add(RSEQ_CS)), entry.rseq_cs_pointer?))
}
