//! File locks (fcntl(2): POSIX and open file description locks; flock(2)), saved in `filelocks.img`.
//!
//! fdinfo shows, since Linux 4.1, the locks that a descriptor has a share in: those of its description, and, for POSIX
//! locks, which belong to the table, all that the process has on the inode. So one lock may be shown many times.
//! POSIX locks are lost when the process closes any descriptor of the file, so they are taken last of all.

use std::collections::HashSet;

use super::Problem;
use super::session::{Done, Session};
use crate::images::file_lock::FileLockEntry;

/// Kinds, as images number them.
const POSIX: u32 = 1;
const FLOCK: u32 = 2;
const OFD: u32 = 4;

const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;

/// A lock, as fdinfo shows it: `1: POSIX  ADVISORY  WRITE 7 00:1d:3 0 EOF`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shown<'a> {
    kind: u32,
    access: u32,
    inode: &'a str,
    start: i64,
    /// 0 for up to the end, however far that moves.
    len: i64,
}

fn parse(line: &str) -> Option<Shown<'_>> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let kind = match words.next()? {
        "POSIX" => POSIX,
        "FLOCK" => FLOCK,
        "OFDLCK" => OFD,
        _ => return None,
    };
    let mut words = words.skip(1);
    let access = match words.next()? {
        "READ" => READ,
        "WRITE" => WRITE,
        _ => return None,
    };
    let mut words = words.skip(1);
    let inode = words.next()?;
    let start: i64 = words.next()?.parse().ok()?;
    let len = match words.next()? {
        "EOF" => 0,
        end => end.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some(Shown { kind, access, inode, start, len })
}

/// The locks of a tree.
#[derive(Default)]
pub struct Locks {
    seen: HashSet<(u32, u32, String, i64)>,
    /// `filelocks.img`.
    pub entries: Vec<FileLockEntry>,
}

impl Locks {
    /// Notes the lock that `line` shows at descriptor `fd` of process `pid`, unless it was noted before. `table` and
    /// `description` are the numbers of those; `flags` tell what the descriptor may do.
    pub fn collect(
        &mut self,
        line: &str,
        (pid, fd): (i32, u32),
        (table, description): (u32, u32),
        flags: u32,
    ) -> Result<(), Problem> {
        let Shown { kind, access, inode, start, len } = parse(line).ok_or_else(|| {
            Problem::new(format!("locks of this kind cannot be saved ({line})"), "have the program release it")
        })?;
        let mode = flags & libc::O_ACCMODE as u32;
        let needed = if access == READ { libc::O_WRONLY } else { libc::O_RDONLY } as u32;
        // A POSIX lock is shown at descriptors too that could not take it.
        if kind == POSIX && mode == needed {
            return Ok(());
        }
        let owner = if kind == POSIX { table } else { description };
        if self.seen.insert((kind, owner, inode.to_owned(), start)) {
            self.entries.push(FileLockEntry { flag: kind, r#type: access, pid, fd: fd as i32, start, len });
        }
        Ok(())
    }
}

/// Whether an entry's numbers can be used at all.
pub fn is_whole(entry: &FileLockEntry) -> bool {
    matches!(entry.flag, POSIX | FLOCK | OFD) && matches!(entry.r#type, READ | WRITE) && entry.fd >= 0
}

/// Takes a lock in the task that had it. Somebody who has taken it meanwhile makes this fail, without a wait.
pub fn restore_lock(session: &mut Session<'_>, id: u32, entry: &FileLockEntry) -> Done {
    session.about(id);
    let step = "take its file lock again";
    let fd = entry.fd as u64;
    if entry.flag == FLOCK {
        let operation = libc::LOCK_NB | if entry.r#type == READ { libc::LOCK_SH } else { libc::LOCK_EX };
        return session.must(step, libc::SYS_flock, &[fd, operation as u64]);
    }
    let mut bytes = [0; size_of::<libc::flock>()];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(std::mem::offset_of!(libc::flock, l_type), &(entry.r#type as i16).to_ne_bytes());
    put(std::mem::offset_of!(libc::flock, l_whence), &(libc::SEEK_SET as i16).to_ne_bytes());
    put(std::mem::offset_of!(libc::flock, l_start), &entry.start.to_ne_bytes());
    put(std::mem::offset_of!(libc::flock, l_len), &entry.len.to_ne_bytes());
    let command = if entry.flag == OFD { libc::F_OFD_SETLK } else { libc::F_SETLK };
    session.must_with(step, libc::SYS_fcntl, &[fd, command as u64], &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_read_with_their_bounds() {
        let shown = parse("1: POSIX  ADVISORY  WRITE 7 00:1d:3 120 129").expect("parses");
        assert_eq!((shown.kind, shown.access, shown.inode, shown.start, shown.len), (POSIX, WRITE, "00:1d:3", 120, 10));
        let shown = parse("2: OFDLCK ADVISORY  READ -1 00:1d:3 0 EOF").expect("parses");
        assert_eq!((shown.kind, shown.access, shown.len), (OFD, READ, 0));
        assert_eq!(parse("3: LEASE  ACTIVE    READ 7 00:1d:3 0 EOF"), None);
    }

    #[test]
    fn a_lock_is_noted_once_and_where_it_can_be_taken() {
        let mut locks = Locks::default();
        let line = "1: POSIX  ADVISORY  WRITE 7 00:1d:3 0 EOF";
        locks.collect(line, (7, 3), (2, 11), libc::O_RDONLY as u32).expect("a lock");
        locks.collect(line, (7, 4), (2, 12), libc::O_RDWR as u32).expect("a lock");
        locks.collect(line, (7, 5), (2, 13), libc::O_RDWR as u32).expect("a lock");
        assert_eq!(locks.entries.iter().map(|lock| lock.fd).collect::<Vec<_>>(), [4]);
        assert!(locks.collect("1: LEASE  ACTIVE    READ 7 00:1d:3 0 EOF", (7, 3), (2, 11), 0).is_err());
    }
}
