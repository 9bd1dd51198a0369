//! seccomp(2): strict mode, and filters with their ancestry.
//!
//! Facts relied on: `PTRACE_SECCOMP_GET_FILTER` (Linux 4.4, `CAP_SYS_ADMIN`) gives the filters of a stopped thread, newest
//! first; `PTRACE_SECCOMP_GET_METADATA` (4.16) their flags. Filters are inherited by clone(2), so that most threads of a
//! container have the same chain. Installing one needs `CAP_SYS_ADMIN` or `no_new_privs`: before credentials. A restored
//! thread must be traced with `PTRACE_O_SUSPEND_SECCOMP` meanwhile, since a filter would hold for the runner too.
//!
//! `SECCOMP_FILTER_FLAG_TSYNC` gives a filter to all threads of a process at once, if what each of them has is a part of
//! what the caller has: the same filters, not equal ones. So threads get as one what is equal in all their chains, or a
//! program could not do that any more after a restore. (Which filters of two threads are the same the kernel does not tell.)
//!
//! The image holds each chain oldest first, with every filter naming the one before it.

use std::collections::HashMap;

use nix::errno::Errno;

use super::{Checks, TaskError};
use crate::agent::{AgentError, Runner};
use crate::images::core::CoreEntry;
use crate::images::seccomp::{SeccompEntry, SeccompFilter, SeccompMode};
use crate::sys::{HostPid, ptrace};

/// `BPF_MAXINSNS`.
const MOST_INSTRUCTIONS: usize = 4096;
const INSTRUCTION: usize = 8;
/// The kernel allows some 32,000 instructions in a chain, each filter counting four more than it has.
const MOST_FILTERS: usize = 8192;
const SECCOMP_SET_MODE_STRICT: u64 = 0;
const SECCOMP_SET_MODE_FILTER: u64 = 1;
const FLAG_TSYNC: u32 = 1;
/// Flags that change how a filter works: `SECCOMP_FILTER_FLAG_LOG` and `SPEC_ALLOW`. The others say how to install it.
const FLAGS_KEPT: u32 = 0b110;

/// One filter of a thread: instructions as in `struct sock_filter`, and flags.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Filter {
    program: Vec<u8>,
    flags: u32,
}

/// The filters of a stopped thread, oldest first; none when it has no filters.
///
/// # Errors
/// [`TaskError::Collect`].
pub fn collect_filters(tid: HostPid) -> Result<Vec<Filter>, TaskError> {
    let failed = |errno| TaskError::Collect { tid, what: "seccomp filters", errno };
    let mut filters = Vec::new();
    loop {
        let instructions = match ptrace::seccomp_filter(tid, filters.len()) {
            Ok(instructions) => instructions,
            // Past the last filter; and no filter at all.
            Err(Errno::ENOENT) => break,
            Err(Errno::EINVAL) if filters.is_empty() => break,
            Err(errno) => return Err(failed(errno)),
        };
        let mut program = Vec::with_capacity(instructions.len() * INSTRUCTION);
        for instruction in &instructions {
            program.extend_from_slice(&instruction.code.to_ne_bytes());
            program.extend_from_slice(&[instruction.jt, instruction.jf]);
            program.extend_from_slice(&instruction.k.to_ne_bytes());
        }
        let flags = ptrace::seccomp_filter_flags(tid, filters.len()).map_err(failed)? as u32;
        filters.push(Filter { program, flags });
    }
    filters.reverse();
    Ok(filters)
}

/// Gathers the chains of all threads; equal beginnings are stored once.
#[derive(Default)]
pub struct FilterTable {
    filters: Vec<SeccompFilter>,
    known: HashMap<(Option<u32>, Filter), u32>,
}

impl FilterTable {
    /// Adds a chain, oldest first; returns the place of its newest filter, none for an empty chain.
    pub fn add(&mut self, chain: &[Filter]) -> Option<u32> {
        let mut last = None;
        for filter in chain {
            let place = *self.known.entry((last, filter.clone())).or_insert_with(|| {
                let (program, flags) = (filter.program.clone(), Some(filter.flags));
                self.filters.push(SeccompFilter { filter: program, prev: last, flags });
                self.filters.len() as u32 - 1
            });
            last = Some(place);
        }
        last
    }

    /// The content of `seccomp.img`; the image is always written, even if empty.
    pub fn finish(self) -> SeccompEntry {
        SeccompEntry { seccomp_filters: self.filters }
    }
}

/// What a thread's seccomp mode is to be, with the programs to install, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// No seccomp.
    Disabled,
    /// Strict mode.
    Strict,
    /// Filters.
    Filters(Vec<Filter>),
}

/// Finds in `table` what a thread is to get; `leader` is its process's leader, perhaps itself.
///
/// CRIU stores filters that all threads of a process share with the leader alone, with a flag that has the kernel spread
/// them; here each thread gets its own then.
///
/// # Errors
/// [`TaskError::Image`] for a mode, place or program that no kernel knows.
pub fn wanted(core: &CoreEntry, leader: &CoreEntry, table: &SeccompEntry, tid: u32) -> Result<Wanted, TaskError> {
    let mut found = find(leader, table, tid)?;
    if !matches!(&found, Wanted::Filters(filters) if filters.iter().any(|filter| filter.flags & FLAG_TSYNC != 0)) {
        found = find(core, table, tid)?;
    }
    if let Wanted::Filters(filters) = &mut found {
        filters.iter_mut().for_each(|filter| filter.flags &= FLAGS_KEPT);
    }
    Ok(found)
}

fn find(core: &CoreEntry, table: &SeccompEntry, tid: u32) -> Result<Wanted, TaskError> {
    let damaged = |what: String| TaskError::Image { tid, what };
    let Some(entry) = &core.thread_core else { return Err(damaged("it has no thread state".into())) };
    match entry.seccomp_mode.map(SeccompMode::try_from) {
        None | Some(Ok(SeccompMode::Disabled)) => return Ok(Wanted::Disabled),
        Some(Ok(SeccompMode::Strict)) => return Ok(Wanted::Strict),
        Some(Ok(SeccompMode::Filter)) => {}
        Some(Err(_)) => return Err(damaged("its seccomp mode is unknown".into())),
    }
    let mut chain = Vec::new();
    let mut next = Some(entry.seccomp_filter.unwrap_or(0));
    while let Some(place) = next {
        let filter = table.seccomp_filters.get(place as usize).filter(|filter| {
            let len = filter.filter.len();
            len.is_multiple_of(INSTRUCTION) && (1..=MOST_INSTRUCTIONS * INSTRUCTION).contains(&len)
        });
        let filter =
            filter.ok_or_else(|| damaged(format!("seccomp filter {place} is missing or of impossible size")))?;
        if chain.len() >= MOST_FILTERS {
            return Err(damaged("its seccomp filters form a ring".into()));
        }
        chain.push(Filter { program: filter.filter.clone(), flags: filter.flags.unwrap_or(0) });
        next = filter.prev;
    }
    chain.reverse();
    Ok(Wanted::Filters(chain))
}

/// How many filters, from the oldest, all threads of a process are to have in common; none if it has but one thread.
pub fn common<'a>(threads: impl IntoIterator<Item = &'a Wanted>) -> usize {
    let mut chains = threads.into_iter().map(|wanted| match wanted {
        Wanted::Filters(filters) => filters.as_slice(),
        Wanted::Disabled | Wanted::Strict => &[],
    });
    let Some(first) = chains.next() else { return 0 };
    let equal = |other: &[Filter]| first.iter().zip(other).take_while(|(one, another)| one == another).count();
    chains.map(equal).min().unwrap_or(0)
}

/// What of a process's filters a thread installs.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// As [`common`] counts.
    pub common: usize,
    /// Whether it is the one that installs these, for all; it has to come first.
    pub leads: bool,
}

/// Puts the runner's thread into the mode wanted, in batches of its own: a chain may be larger than a slot.
///
/// # Errors
/// [`TaskError::Restore`]; [`AgentError::Full`] for a filter that no slot holds.
pub fn restore_seccomp(runner: &Runner, wanted: &Wanted, share: Share) -> Result<(), TaskError> {
    match wanted {
        Wanted::Disabled => Ok(()),
        Wanted::Strict => {
            let mut batch = runner.batch();
            let mut checks = Checks::default();
            checks.call(&mut batch, "strict seccomp mode", libc::SYS_seccomp, &[SECCOMP_SET_MODE_STRICT, 0, 0]);
            checks.verify(runner.tid(), &batch.run()?)
        }
        Wanted::Filters(filters) => {
            let common = share.common.min(filters.len());
            let mut place = if share.leads { 0 } else { common };
            while place < filters.len() {
                let mut batch = runner.batch();
                let mut checks = Checks::default();
                let first = place;
                for filter in &filters[first..] {
                    let needed = filter.program.len() + 64 + 2 * crate::agent::Batch::CALL_BYTES;
                    if place > first && batch.room() < needed {
                        break;
                    }
                    if batch.room() < needed {
                        return Err(AgentError::Full { tid: runner.tid() }.into());
                    }
                    let program = batch.bytes(&filter.program).0;
                    let instructions = (filter.program.len() / INSTRUCTION) as u64;
                    let fprog = batch.bytes([instructions, program].map(u64::to_ne_bytes).as_flattened()).0;
                    let for_all = if place < common { FLAG_TSYNC } else { 0 };
                    let arguments = [SECCOMP_SET_MODE_FILTER, u64::from(filter.flags | for_all), fprog];
                    // Where a thread cannot follow, the answer is its number.
                    checks.call_returns(&mut batch, "seccomp filter", libc::SYS_seccomp, &arguments, 0);
                    place += 1;
                }
                checks.verify(runner.tid(), &batch.run()?)?;
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::core::ThreadCoreEntry;

    fn core(mode: i32, place: Option<u32>) -> CoreEntry {
        let thread = ThreadCoreEntry { seccomp_mode: Some(mode), seccomp_filter: place, ..ThreadCoreEntry::default() };
        CoreEntry { thread_core: Some(thread), ..CoreEntry::default() }
    }

    fn filter(byte: u8) -> Filter {
        Filter { program: vec![byte; INSTRUCTION], flags: 0 }
    }

    #[test]
    fn equal_beginnings_are_stored_once_and_found_again() {
        let mut table = FilterTable::default();
        assert_eq!(table.add(&[]), None);
        let first = table.add(&[filter(1), filter(2)]);
        let second = table.add(&[filter(1), filter(3)]);
        assert_eq!(table.add(&[filter(1), filter(2)]), first);
        let image = table.finish();
        assert_eq!(image.seccomp_filters.len(), 3, "the common one is shared");
        let thread = core(SeccompMode::Filter as i32, second);
        let plain = core(0, None);
        assert_eq!(wanted(&thread, &plain, &image, 1).expect("found"), Wanted::Filters(vec![filter(1), filter(3)]));
        assert_eq!(wanted(&plain, &thread, &image, 1).expect("found"), Wanted::Disabled);
    }

    #[test]
    fn damaged_tables_are_errors() {
        let entry = |place| core(SeccompMode::Filter as i32, Some(place));
        let ring = SeccompFilter { filter: vec![0; INSTRUCTION], prev: Some(0), flags: None };
        let odd = SeccompFilter { filter: vec![0; 3], prev: None, flags: None };
        let table = SeccompEntry { seccomp_filters: vec![ring, odd] };
        for place in 0..3 {
            let damaged = entry(place);
            assert!(matches!(wanted(&damaged, &damaged, &table, 1), Err(TaskError::Image { .. })), "{place}");
        }
        assert!(wanted(&core(9, None), &core(0, None), &table, 1).is_err());
    }

    #[test]
    fn what_all_threads_have_in_common_is_counted_from_the_oldest() {
        let chain = |bytes: &[u8]| Wanted::Filters(bytes.iter().copied().map(filter).collect());
        assert_eq!(common(&[chain(&[1, 2])]), 0, "one thread shares with nobody");
        assert_eq!(common(&[chain(&[1, 2]), chain(&[1, 2])]), 2);
        assert_eq!(common(&[chain(&[1, 2, 3]), chain(&[1, 2]), chain(&[1, 4, 3])]), 1);
        assert_eq!(common(&[chain(&[1]), Wanted::Disabled]), 0);
    }

    #[test]
    fn filters_stored_for_all_threads_reach_them() {
        let all = SeccompFilter { filter: vec![1; INSTRUCTION], prev: None, flags: Some(FLAG_TSYNC | 2) };
        let table = SeccompEntry { seccomp_filters: vec![all] };
        let leader = core(SeccompMode::Filter as i32, Some(0));
        let expected = Wanted::Filters(vec![Filter { flags: 2, ..filter(1) }]);
        assert_eq!(wanted(&core(0, None), &leader, &table, 1).expect("found"), expected);
    }
}
