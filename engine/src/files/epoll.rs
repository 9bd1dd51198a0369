//! epoll(7): which descriptions an instance watches.
//!
//! fdinfo names a watched description by the descriptor number that it was added with. That descriptor may have been closed since,
//! while a duplicate keeps the description open; kcmp(2) with `KCMP_EPOLL_TFD` (Linux 4.13) tells which descriptor is meant.

use std::collections::HashMap;

use super::Problem;
use super::fdinfo::FdInfo;
use super::session::{Done, Session, Temporary};
use crate::images::event::{EventpollFileEntry, EventpollTfdEntry};
use crate::images::fown::FownEntry;
use crate::sys::{HostPid, kcmp};

/// Reads an instance.
pub fn collect_epoll(id: u32, info: &FdInfo<'_>, fown: FownEntry) -> Result<EventpollFileEntry, Problem> {
    let targets: Option<Vec<_>> =
        info.body.lines().filter(|line| line.starts_with("tfd:")).map(|line| target(id, line)).collect();
    let tfd = targets.ok_or_else(|| Problem::new("the kernel does not describe its targets as expected", ""))?;
    Ok(EventpollFileEntry { id, flags: info.flags, fown, tfd })
}

/// `tfd:        5 events:       19 data:                5  pos:0 ino:3d sdev:9`, all but the first and `pos` in hexadecimal.
fn target(id: u32, line: &str) -> Option<EventpollTfdEntry> {
    let mut words = line.split_ascii_whitespace();
    let mut fields = HashMap::new();
    while let Some(word) = words.next() {
        // The value follows the colon at once, or after spaces.
        let (key, value) = word.split_once(':')?;
        fields.insert(key, if value.is_empty() { words.next()? } else { value });
    }
    let hexadecimal = |key| u64::from_str_radix(fields.get(key)?, 16).ok();
    Some(EventpollTfdEntry {
        id,
        tfd: fields.get("tfd")?.parse().ok()?,
        events: hexadecimal("events")? as u32,
        data: hexadecimal("data")?,
        dev: hexadecimal("sdev").map(|device| device as u32),
        inode: hexadecimal("ino"),
        pos: fields.get("pos").and_then(|pos| pos.parse::<i64>().ok()).map(|pos| pos as u64),
    })
}

/// Finds, for every target, a descriptor of the task that names it still: `fds` are all of its descriptors.
///
/// # Errors
/// The number of a target that no descriptor of the task names.
pub fn resolve_targets(entry: &mut EventpollFileEntry, (pid, fd): (HostPid, u32), fds: &[u32]) -> Result<(), u32> {
    let mut seen: HashMap<u32, u32> = HashMap::new();
    for target in &mut entry.tfd {
        let added = target.tfd;
        // Descriptions added under one number, one after the other, are told apart by their order.
        let order = seen.entry(added).or_insert(0);
        let slot = kcmp::EpollSlot { epoll: fd, target: added, order: *order };
        *order += 1;
        let names_it = |candidate: &u32| kcmp::is_epoll_target(pid, *candidate, slot).unwrap_or(false);
        let candidates = std::iter::once(&added).chain(fds.iter().filter(|candidate| **candidate != added));
        target.tfd = *candidates.into_iter().find(|candidate| names_it(candidate)).ok_or(added)?;
    }
    Ok(())
}

/// Makes an instance that watches nothing yet.
pub fn restore_epoll(session: &mut Session<'_>, cloexec: bool) -> Done<Temporary> {
    let flags = if cloexec { libc::EPOLL_CLOEXEC as u64 } else { 0 };
    session.make("make it", libc::SYS_epoll_create1, &[flags], &[], &[])
}

/// Has the instance at descriptor `epoll` watch one more.
pub fn watch_target(session: &mut Session<'_>, epoll: u32, target: &EventpollTfdEntry) -> Done {
    session.about(target.id);
    let mut event = [0; size_of::<libc::epoll_event>()];
    event[..4].copy_from_slice(&target.events.to_ne_bytes());
    let data = std::mem::offset_of!(libc::epoll_event, u64);
    event[data..data + 8].copy_from_slice(&target.data.to_ne_bytes());
    let before = [epoll.into(), libc::EPOLL_CTL_ADD as u64, target.tfd.into()];
    session.must_with("have it watch a descriptor again", libc::SYS_epoll_ctl, &before, &event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_with_spaces_and_without() {
        let line = "tfd:       15 events: 80000019 data: ffff00000000000f  pos:0 ino:3d sdev:9";
        let target = target(4, line).expect("parses");
        assert_eq!((target.id, target.tfd, target.events, target.data), (4, 15, 0x8000_0019, 0xffff_0000_0000_000f));
        assert_eq!((target.dev, target.inode, target.pos), (Some(9), Some(0x3d), Some(0)));
    }
}
