//! Memory whose pages come after the program runs again (criu --lazy-pages): every check first does what must be right while they are
//! missing, then looks. What it changes it puts right again, so that it can be asked again.

use crate::memory::{PAGE, PRIVATE, READ_WRITE, fill, holds, map, protect};
use crate::room::{Check, Room, fork};
use crate::sys::{Fault, Verdict, ensure, pattern, raw, same, sys};
use std::ffi::CString;

/// Pages of an area: 4 MiB, more than a daemon brings before the program gets to it.
const PAGES: usize = 1024;
const MOVED: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;

/// An area with content of its own, away from its neighbours.
fn area(seed: u64) -> Result<usize, Fault> {
    let at = map((PAGES + 2) * PAGE, libc::PROT_NONE, PRIVATE)? + PAGE;
    protect(at, PAGES * PAGE, READ_WRITE)?;
    fill(at, &pattern(seed, PAGES * PAGE));
    Ok(at)
}

fn whole(what: &str, at: usize, seed: u64) -> Verdict {
    holds(what, at, &pattern(seed, PAGES * PAGE))
}

/// A child's verdict as its status.
fn status(verdict: Verdict) -> i32 {
    if let Err(fault) = &verdict {
        let _ = std::fs::write("/dev/stderr", fault);
    }
    i32::from(verdict.is_err())
}

fn ended_well(what: &str, pid: i32) -> Verdict {
    let mut status = 0;
    sys!(waitpid(pid, &mut status, 0))?;
    ensure!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{what} ended with status {status:#x}");
    Ok(())
}

/// Children and a grandchild, forked while pages are missing: each has what its parent had, and writes of one are not seen by another.
pub fn lazy_forks(_: &Room) -> Result<Check, Fault> {
    let at = area(70)?;
    Ok(Box::new(move || {
        let child = fork(move || {
            fill(at + 500 * PAGE, &[1; PAGE]);
            let grandchild = fork(move || {
                status(holds("what the child wrote", at + 500 * PAGE, &[1; PAGE]).and_then(|()| {
                    holds("the grandchild's end", at + 501 * PAGE, &pattern(70, PAGES * PAGE)[501 * PAGE..])
                }))
            });
            status(
                grandchild
                    .and_then(|grandchild| ended_well("a grandchild", grandchild))
                    .and_then(|()| holds("the child's beginning", at, &pattern(70, PAGES * PAGE)[..500 * PAGE])),
            )
        })?;
        // One that touches nothing and ends at once, and one that ends while the daemon is at work for it.
        let brief = fork(|| 0)?;
        let second = fork(move || {
            status(holds("the second child's end", at + 1000 * PAGE, &pattern(70, PAGES * PAGE)[1000 * PAGE..]))
        })?;
        whole("the parent's memory", at, 70)?;
        ended_well("the brief child", brief)?;
        ended_well("the second child", second)?;
        ended_well("a child", child)?;
        whole("the parent's memory, later", at, 70)
    }))
}

/// Ranges that move while their pages are missing, onto others too, grow and shrink.
pub fn lazy_moves(_: &Room) -> Result<Check, Fault> {
    let (at, other, spare) = (area(71)?, area(72)?, area(73)?);
    Ok(Box::new(move || {
        // The middle of one goes onto the middle of the other, whose pages are missing too and are wanted no more.
        let (from, to, length) = (at + 256 * PAGE, other + 512 * PAGE, 256 * PAGE);
        raw!(SYS_mremap, from, length, length, MOVED, to)?;
        let (one, two) = (pattern(71, PAGES * PAGE), pattern(72, PAGES * PAGE));
        holds("what moved", to, &one[256 * PAGE..512 * PAGE])?;
        holds("before it", other, &two[..512 * PAGE])?;
        holds("behind it", other + 768 * PAGE, &two[768 * PAGE..])?;
        holds("what stayed", at, &one[..256 * PAGE])?;
        // Back, without having looked at what is behind.
        raw!(SYS_mremap, to, length, length, MOVED, from)?;
        same!("the hole", raw!(SYS_mmap, to, length, READ_WRITE, PRIVATE | libc::MAP_FIXED, -1, 0)? as usize, to);
        fill(to, &two[512 * PAGE..768 * PAGE]);
        whole("the first area", at, 71)?;
        whole("the second area", other, 72)?;
        // Shrunk and grown again: what comes anew is empty.
        raw!(SYS_mremap, spare, PAGES * PAGE, 512 * PAGE, 0, 0)?;
        raw!(SYS_mremap, spare, 512 * PAGE, PAGES * PAGE, 0, 0).or_else(|_| {
            raw!(SYS_mmap, spare + 512 * PAGE, 512 * PAGE, READ_WRITE, PRIVATE | libc::MAP_FIXED, -1, 0)
        })?;
        holds("what is left of a shrunk area", spare, &pattern(73, PAGES * PAGE)[..512 * PAGE])?;
        holds("what it grew by", spare + 512 * PAGE, &[0; 512 * PAGE])?;
        fill(spare, &pattern(73, PAGES * PAGE));
        Ok(())
    }))
}

/// Ranges that are discarded, unmapped and mapped anew while their pages are missing: nothing of before may come later.
pub fn lazy_discards(_: &Room) -> Result<Check, Fault> {
    let at = area(74)?;
    Ok(Box::new(move || {
        let want = pattern(74, PAGES * PAGE);
        raw!(SYS_madvise, at + 100 * PAGE, 300 * PAGE, libc::MADV_DONTNEED)?;
        raw!(SYS_munmap, at + 600 * PAGE, 300 * PAGE)?;
        let (again, length) = (at + 700 * PAGE, 100 * PAGE);
        let flags = PRIVATE | libc::MAP_FIXED_NOREPLACE;
        same!("place", raw!(SYS_mmap, again, length, READ_WRITE, flags, -1, 0)? as usize, again);
        holds("what was discarded", at + 100 * PAGE, &[0; 300 * PAGE])?;
        holds("what was mapped anew", again, &[0; 100 * PAGE])?;
        // The protection parts the mapping that the daemon knows of.
        protect(at + 420 * PAGE, PAGE, libc::PROT_READ)?;
        holds("before", at, &want[..100 * PAGE])?;
        holds("between", at + 400 * PAGE, &want[400 * PAGE..600 * PAGE])?;
        holds("behind", at + 900 * PAGE, &want[900 * PAGE..])?;
        holds("what was discarded, later", at + 100 * PAGE, &[0; 300 * PAGE])?;
        protect(at + 420 * PAGE, PAGE, READ_WRITE)?;
        raw!(SYS_mmap, at + 600 * PAGE, 300 * PAGE, READ_WRITE, PRIVATE | libc::MAP_FIXED, -1, 0)?;
        fill(at, &want);
        Ok(())
    }))
}

/// A child that executes another program, with arguments that lie in missing pages, and the kernel reading and writing them.
pub fn lazy_executes(_: &Room) -> Result<Check, Fault> {
    let at = area(75)?;
    let text = CString::new("test \"$0\" = word").map_err(|error| error.to_string())?;
    let words = at + 800 * PAGE;
    fill(words, b"/bin/sh\0");
    fill(words + 8 * PAGE, b"-c\0");
    fill(words + 16 * PAGE, text.as_bytes_with_nul());
    fill(words + 24 * PAGE, b"word\0");
    let vector: Vec<u8> = [words, words + 8 * PAGE, words + 16 * PAGE, words + 24 * PAGE, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    fill(words + 32 * PAGE, &vector);
    fill(words + 40 * PAGE, &[0; 8]);
    Ok(Box::new(move || {
        let child = fork(move || {
            let _ = raw!(SYS_execve, words, words + 32 * PAGE, words + 40 * PAGE);
            9
        })?;
        // The kernel reads a missing page, and writes into another.
        let mut pipe = [0; 2];
        sys!(pipe(pipe.as_mut_ptr()))?;
        same!("bytes written", raw!(SYS_write, pipe[1], at + 10 * PAGE, PAGE)?, PAGE as i64);
        same!("bytes read", raw!(SYS_read, pipe[0], at + 20 * PAGE + 8, PAGE - 8)?, PAGE as i64 - 8);
        sys!(close(pipe[0]))?;
        sys!(close(pipe[1]))?;
        let want = pattern(75, PAGES * PAGE);
        holds("around what the kernel wrote", at + 20 * PAGE, &want[20 * PAGE..20 * PAGE + 8])?;
        holds("what the kernel wrote", at + 20 * PAGE + 8, &want[10 * PAGE..11 * PAGE - 8])?;
        fill(at + 20 * PAGE, &want[20 * PAGE..21 * PAGE]);
        holds("the rest", at, &want[..800 * PAGE])?;
        ended_well("the executed program", child)
    }))
}

/// Threads that touch the same missing pages and others, at the same time.
pub fn lazy_threads(_: &Room) -> Result<Check, Fault> {
    let at = area(76)?;
    Ok(Box::new(move || {
        let look = move |number: usize| {
            let want = pattern(76, PAGES * PAGE);
            for step in 0..PAGES {
                // From another place in another order each, so that they meet.
                let page = (step * (2 * number + 1) + number * 100) % PAGES;
                holds("a thread's page", at + page * PAGE, &want[page * PAGE..(page + 1) * PAGE])?;
            }
            Ok(())
        };
        let threads: Vec<std::thread::JoinHandle<Verdict>> =
            (0..8).map(|number| std::thread::spawn(move || look(number))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?)
    }))
}

/// Memory that a child does not have, or has without content (madvise(2), `MADV_WIPEONFORK`), forked while it is missing.
pub fn lazy_wiped(_: &Room) -> Result<Check, Fault> {
    let (wiped, kept) = (area(77)?, area(78)?);
    raw!(SYS_madvise, wiped, PAGES * PAGE, libc::MADV_WIPEONFORK)?;
    raw!(SYS_madvise, kept, 512 * PAGE, libc::MADV_DONTFORK)?;
    Ok(Box::new(move || {
        let child = fork(move || {
            let other = raw!(SYS_mmap, kept, 512 * PAGE, READ_WRITE, PRIVATE | libc::MAP_FIXED_NOREPLACE, -1, 0);
            let empty = other.and_then(|_| holds("another mapping", kept, &[0; 512 * PAGE]));
            status(
                empty
                    .and_then(|()| holds("wiped memory", wiped, &[0; PAGES * PAGE]))
                    .and_then(|()| holds("kept memory", kept + 512 * PAGE, &pattern(78, PAGES * PAGE)[512 * PAGE..])),
            )
        })?;
        whole("the parent's wiped memory", wiped, 77)?;
        whole("the parent's other memory", kept, 78)?;
        ended_well("the child", child)
    }))
}
