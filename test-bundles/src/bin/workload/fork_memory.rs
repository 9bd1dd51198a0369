//! Memory of relatives: what fork(2) shared copy-on-write stays shared, what differs stays different.

use crate::memory::{PAGE, PRIVATE, READ_WRITE, SHARED, fill, holds, map, pagemap, read};
use crate::room::{Check, Room};
use crate::sys::{Fault, ensure, errno, pattern, raw};

/// The frame that each page of a range lies in; root only, else the kernel answers 0.
fn frames(address: usize, pages: usize) -> Result<Vec<u64>, Fault> {
    Ok(pagemap(address, pages)?
        .into_iter()
        .map(|word| if word >> 63 == 1 { word & ((1 << 55) - 1) } else { 0 })
        .collect())
}

/// How many pages lie in the same frame in both lists.
fn shared_frames(one: &[u64], other: &[u64]) -> usize {
    one.iter().zip(other).filter(|(a, b)| a == b && **a != 0).count()
}

const PAGES: usize = 400;

/// The pages that the child has written since the fork.
fn own(page: usize) -> bool {
    page % 8 == 3
}

/// Parent and child share what neither has written: the same frames before and after, so no memory is doubled.
pub fn copy_on_write(room: &Room) -> Result<Check, Fault> {
    let content = pattern(40, PAGES * PAGE);
    // A page on either side keeps the mapping apart from what the C library maps, in parent and child alike.
    let memory = map((PAGES + 2) * PAGE, libc::PROT_NONE, PRIVATE)? + PAGE;
    crate::memory::protect(memory, PAGES * PAGE, READ_WRITE)?;
    raw!(SYS_madvise, memory, PAGES * PAGE, libc::MADV_NOHUGEPAGE)?;
    fill(memory, &content);
    let told = map(PAGES * 8, READ_WRITE, SHARED)?;
    let frames_of_child = move || -> Vec<u64> {
        let bytes = read(told, PAGES * 8);
        bytes
            .chunks_exact(8)
            .map(|word| word.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
            .collect()
    };
    let expected = content.clone();
    let child = room.child("child", move |_| {
        for page in (0..PAGES).filter(|page| own(*page)) {
            fill(memory + page * PAGE, &[page as u8; PAGE]);
        }
        Ok(Box::new(move || {
            for page in 0..PAGES {
                let want =
                    if own(page) { vec![page as u8; PAGE] } else { expected[page * PAGE..(page + 1) * PAGE].to_vec() };
                holds("child's memory", memory + page * PAGE, &want)?;
            }
            for (number, frame) in frames(memory, PAGES)?.into_iter().enumerate() {
                fill(told + number * 8, &frame.to_le_bytes());
            }
            Ok(())
        }))
    })?;
    let common = PAGES - (0..PAGES).filter(|page| own(*page)).count();
    Ok(Box::new(move || {
        holds("parent's memory", memory, &content)?;
        child.ask()?;
        let here = frames(memory, PAGES)?;
        ensure!(here.iter().any(|frame| *frame != 0), "the kernel tells no frame numbers (CAP_SYS_ADMIN)");
        let shared = shared_frames(&here, &frames_of_child());
        ensure!(shared == common, "{shared} pages are shared with the child, {common} were");
        Ok(())
    }))
}

/// A child that unmapped, moved and protected parts of what it inherited.
pub fn copy_on_write_unmapped(room: &Room) -> Result<Check, Fault> {
    let content = pattern(41, 64 * PAGE);
    let memory = map(64 * PAGE, READ_WRITE, PRIVATE)?;
    fill(memory, &content);
    let expected = content.clone();
    let child = room.child("child", move |_| {
        raw!(SYS_mprotect, memory + 16 * PAGE, 8 * PAGE, libc::PROT_READ)?;
        let moved =
            raw!(SYS_mremap, memory + 32 * PAGE, 8 * PAGE, 8 * PAGE, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP, 0);
        raw!(SYS_munmap, memory, 8 * PAGE)?; // after the move, which would fill the hole
        let moved = moved.map(|address| address as usize);
        Ok(Box::new(move || {
            let mut resident = 0u8;
            let answer = raw!(SYS_mincore, memory, PAGE, &mut resident);
            ensure!(answer.is_err() && errno() == libc::ENOMEM, "what the child unmapped is mapped");
            holds("child's memory", memory + 8 * PAGE, &expected[8 * PAGE..32 * PAGE])?;
            if let Ok(moved) = moved {
                holds("moved memory", moved, &expected[32 * PAGE..40 * PAGE])?;
                holds("what the move left", memory + 32 * PAGE, &[0; 8 * PAGE])?;
            }
            holds("child's memory", memory + 40 * PAGE, &expected[40 * PAGE..])
        }))
    })?;
    Ok(Box::new(move || {
        holds("parent's memory", memory, &content)?;
        child.ask()
    }))
}

/// Three generations; each has written some pages; shared memory made by the grandparent connects them.
pub fn shared_between_relatives(room: &Room) -> Result<Check, Fault> {
    let private = map(32 * PAGE, READ_WRITE, PRIVATE)?;
    let shared = map(32 * PAGE, READ_WRITE, SHARED)?;
    fill(private, &pattern(42, 32 * PAGE));
    let layer = move |depth: usize| fill(private + depth * 8 * PAGE, &pattern(100 + depth as u64, PAGE));
    let right = move |depth: usize| {
        let mut want = pattern(42, 32 * PAGE);
        for written in 1..=depth {
            want[written * 8 * PAGE..written * 8 * PAGE + PAGE].copy_from_slice(&pattern(100 + written as u64, PAGE));
        }
        holds("memory of this generation", private, &want)
    };
    let mut count = 0u64;
    let child = room.child("child", move |room| {
        layer(1);
        let grandchild = room.child("grandchild", move |_| {
            layer(2);
            Ok(Box::new(move || {
                right(2)?;
                fill(shared + 31 * PAGE, &read(shared, 8));
                Ok(())
            }))
        })?;
        Ok(Box::new(move || {
            right(1)?;
            grandchild.ask()
        }))
    })?;
    Ok(Box::new(move || {
        right(0)?;
        count += 1;
        fill(shared, &count.to_le_bytes());
        child.ask()?;
        holds("what the grandchild wrote", shared + 31 * PAGE, &count.to_le_bytes())
    }))
}

/// MADV_DONTFORK and MADV_WIPEONFORK still do it to children born after the restore; guard: errno of the missing range.
pub fn dont_fork(_: &Room) -> Result<Check, Fault> {
    let (kept_back, wiped) = (map(4 * PAGE, READ_WRITE, PRIVATE)?, map(4 * PAGE, READ_WRITE, PRIVATE)?);
    fill(kept_back, &pattern(43, 4 * PAGE));
    fill(wiped, &pattern(44, 4 * PAGE));
    raw!(SYS_madvise, kept_back, 4 * PAGE, libc::MADV_DONTFORK)?;
    raw!(SYS_madvise, wiped, 4 * PAGE, libc::MADV_WIPEONFORK)?;
    Ok(Box::new(move || {
        holds("memory kept from children", kept_back, &pattern(43, 4 * PAGE))?;
        holds("memory wiped in children", wiped, &pattern(44, 4 * PAGE))?;
        let child = crate::room::fork(|| {
            let absent = raw!(SYS_madvise, kept_back, PAGE, libc::MADV_NORMAL).is_err() && errno() == libc::ENOMEM;
            let zero = read(wiped, 4 * PAGE).iter().all(|byte| *byte == 0);
            i32::from(!absent) | i32::from(!zero) << 1
        })?;
        let mut status = 0;
        raw!(SYS_wait4, child, &mut status, 0, 0)?;
        ensure!(status == 0, "a new child inherited what it should not: {:#x}", status >> 8);
        Ok(())
    }))
}
