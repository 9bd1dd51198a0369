//! Memory that changes between a pre-dump and the dump: every check looks at what the last one left, and changes it.
//!
//! One workload for each way in which the kernel changes a page, so that none can be taken from the wrong images.

use crate::memory::{PAGE, PRIVATE, READ_WRITE, SHARED, fill, holds, map, map_file, protect};
use crate::room::{Check, Room, ask_all};
use crate::sys::{Fault, Verdict, c_path, pattern, raw, same, sys};

/// Pages of most areas.
const PAGES: usize = 64;

/// A check that looks at what the last generation left, then makes the next.
fn generations(
    mut look: impl FnMut(u64) -> Verdict + 'static,
    mut make: impl FnMut(u64) -> Verdict + 'static,
) -> Result<Check, Fault> {
    let mut generation = 1;
    make(generation)?;
    Ok(Box::new(move || {
        look(generation).map_err(|fault| format!("generation {generation}: {fault}"))?;
        generation += 1;
        make(generation)
    }))
}

/// One page of a generation.
fn page(generation: u64) -> Vec<u8> {
    pattern(1000 + generation, PAGE)
}

/// An area whose pages all hold a content of their own, away from its neighbours.
fn area(pages: usize) -> Result<usize, Fault> {
    let at = map((pages + 2) * PAGE, libc::PROT_NONE, PRIVATE)? + PAGE;
    protect(at, pages * PAGE, READ_WRITE)?;
    raw!(SYS_madvise, at, pages * PAGE, libc::MADV_NOHUGEPAGE)?;
    fill(at, &pattern(50, pages * PAGE));
    Ok(at)
}

/// Looks at an area in which only the page `changed` is of the generation.
fn one_changed(at: usize, pages: usize, changed: usize, generation: u64) -> Verdict {
    let first = pattern(50, pages * PAGE);
    holds("before the page", at, &first[..changed * PAGE])?;
    holds("the page", at + changed * PAGE, &page(generation))?;
    holds("behind the page", at + (changed + 1) * PAGE, &first[(changed + 1) * PAGE..])
}

/// The program writes.
pub fn rewritten_pages(_: &Room) -> Result<Check, Fault> {
    let at = area(PAGES)?;
    generations(
        move |generation| one_changed(at, PAGES, 7, generation),
        move |generation| {
            fill(at + 7 * PAGE, &page(generation));
            Ok(())
        },
    )
}

/// Pages that are given back and come again, empty or written (madvise(2), `MADV_DONTNEED`).
pub fn rewritten_discarded(_: &Room) -> Result<Check, Fault> {
    let at = area(PAGES)?;
    generations(
        move |generation| {
            let odd = generation % 2 == 1;
            let want = if odd { vec![0; PAGE] } else { page(generation) };
            holds("the discarded page", at + 3 * PAGE, &want)?;
            holds("a page that is never touched again", at + 4 * PAGE, &[0; PAGE])?;
            holds("a page that stays", at + 5 * PAGE, &pattern(50, PAGES * PAGE)[5 * PAGE..6 * PAGE])
        },
        move |generation| {
            raw!(SYS_madvise, at + 3 * PAGE, 2 * PAGE, libc::MADV_DONTNEED)?;
            if generation % 2 == 0 {
                fill(at + 3 * PAGE, &page(generation));
            } else {
                // Read first, so that the page of zeros is there when it is written.
                holds("an empty page", at + 3 * PAGE, &[0; PAGE])?;
            }
            Ok(())
        },
    )
}

/// Another mapping in the place of one that was there.
pub fn rewritten_mapped_anew(_: &Room) -> Result<Check, Fault> {
    let at = area(PAGES)?;
    generations(
        move |generation| {
            holds("the new mapping", at + 8 * PAGE, &page(generation))?;
            holds("its empty page", at + 9 * PAGE, &[0; PAGE])?;
            holds("what was there before", at + 10 * PAGE, &pattern(50, PAGES * PAGE)[10 * PAGE..])
        },
        move |generation| {
            raw!(SYS_munmap, at + 8 * PAGE, 2 * PAGE)?;
            let flags = PRIVATE | libc::MAP_FIXED_NOREPLACE;
            same!("place", raw!(SYS_mmap, at + 8 * PAGE, 2 * PAGE, READ_WRITE, flags, -1, 0)? as usize, at + 8 * PAGE);
            fill(at + 8 * PAGE, &page(generation));
            Ok(())
        },
    )
}

/// Two areas that change places without a byte being written (mremap(2)).
pub fn rewritten_moved(_: &Room) -> Result<Check, Fault> {
    let (at, spare) = (area(PAGES)?, area(PAGES)?);
    let places = [at + 8 * PAGE, at + 16 * PAGE];
    for (number, place) in places.into_iter().enumerate() {
        fill(place, &pattern(60 + number as u64, 8 * PAGE));
    }
    generations(
        move |generation| {
            for (number, place) in places.into_iter().enumerate() {
                holds("a moved area", place, &pattern(60 + (number as u64 + generation) % 2, 8 * PAGE))?;
            }
            holds("what stays", at + 24 * PAGE, &pattern(50, PAGES * PAGE)[24 * PAGE..])
        },
        move |_| {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            for (from, to) in [(places[0], spare), (places[1], places[0]), (spare, places[1])] {
                raw!(SYS_mremap, from, 8 * PAGE, 8 * PAGE, flags, to)?;
            }
            Ok(())
        },
    )
}

/// The kernel writes for the program: read(2) from a file and past the page cache, into its own memory through `/proc`, and
/// another process does (process_vm_writev(2)).
pub fn rewritten_by_kernel(room: &Room) -> Result<Check, Fault> {
    let at = area(PAGES)?;
    let path = room.path("content");
    let me = std::process::id() as i32;
    generations(
        move |generation| {
            for number in 0..4 {
                holds("a page that the kernel wrote", at + 2 * number * PAGE, &page(generation + 10 * number as u64))?;
            }
            holds("a page between", at + 3 * PAGE, &pattern(50, PAGES * PAGE)[3 * PAGE..4 * PAGE])
        },
        move |generation| {
            let content = |number: u64| page(generation + 10 * number);
            for (number, flags) in [(0, 0), (1, libc::O_DIRECT)] {
                std::fs::write(&path, content(number)).map_err(|error| error.to_string())?;
                // Some file systems have no O_DIRECT.
                let opened = sys!(open(c_path(&path).as_ptr(), libc::O_RDONLY | flags));
                let file = match (opened, flags) {
                    (Ok(file), _) => file as i32,
                    (Err(_), libc::O_DIRECT) => sys!(open(c_path(&path).as_ptr(), libc::O_RDONLY))? as i32,
                    (Err(fault), _) => return Err(fault),
                };
                same!("bytes read", raw!(SYS_read, file, at + 2 * number as usize * PAGE, PAGE)?, PAGE as i64);
                sys!(close(file))?;
            }
            std::fs::OpenOptions::new()
                .write(true)
                .open("/proc/self/mem")
                .and_then(|memory| {
                    std::os::unix::fs::FileExt::write_all_at(&memory, &content(2), (at + 4 * PAGE) as u64)
                })
                .map_err(|error| format!("/proc/self/mem: {error}"))?;
            let bytes = content(3);
            let child = crate::room::fork(|| {
                let local = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: PAGE };
                let remote = libc::iovec { iov_base: (at + 6 * PAGE) as *mut _, iov_len: PAGE };
                i32::from(raw!(SYS_process_vm_writev, me, &local, 1, &remote, 1, 0).ok() != Some(PAGE as i64))
            })?;
            let mut status = 0;
            raw!(SYS_wait4, child, &mut status, 0, 0)?;
            same!("status of the process that writes", status, 0);
            Ok(())
        },
    )
}

/// Private mappings of a file: pages of the file become the program's own, and the file's again.
pub fn rewritten_files(room: &Room) -> Result<Check, Fault> {
    let (path, content) = (room.path("mapped"), pattern(51, PAGES * PAGE));
    std::fs::write(&path, &content).map_err(|error| error.to_string())?;
    let file = sys!(open(c_path(&path).as_ptr(), libc::O_RDWR))? as i32;
    let at = map_file(PAGES * PAGE, READ_WRITE, libc::MAP_PRIVATE, file, 0)?;
    let shared = map_file(PAGE, READ_WRITE, libc::MAP_SHARED, file, 20 * PAGE as i64)?;
    sys!(close(file))?;
    fill(at + PAGE, &page(0));
    generations(
        move |generation| {
            holds("a page that was once written", at + PAGE, &page(0))?;
            holds("a page that is written", at + 2 * PAGE, &page(generation))?;
            let own = generation % 2 == 1;
            let want = if own { page(generation) } else { content[3 * PAGE..4 * PAGE].to_vec() };
            holds("a page that is the file's at times", at + 3 * PAGE, &want)?;
            holds("a page that is the file's", at + 4 * PAGE, &content[4 * PAGE..20 * PAGE])?;
            holds("a page of the file that changes", at + 20 * PAGE, &page(generation + 100))
        },
        move |generation| {
            fill(at + 2 * PAGE, &page(generation));
            fill(shared, &page(generation + 100));
            if generation % 2 == 1 {
                fill(at + 3 * PAGE, &page(generation));
                return Ok(());
            }
            raw!(SYS_madvise, at + 3 * PAGE, PAGE, libc::MADV_DONTNEED).map(|_| ())
        },
    )
}

/// Relatives that share pages copy-on-write, one of them born since.
pub fn rewritten_by_relatives(room: &Room) -> Result<Check, Fault> {
    let at = area(PAGES)?;
    let writes = move |changed: usize| {
        move |_: &Room| {
            generations(
                move |generation| one_changed(at, PAGES, changed, generation),
                move |generation| {
                    fill(at + changed * PAGE, &page(generation));
                    Ok(())
                },
            )
        }
    };
    let mut first = ask_all(vec![room.child("first", writes(5))?]);
    let (room, mut later) = (room.clone(), Vec::new());
    generations(
        move |generation| {
            one_changed(at, PAGES, 9, generation)?;
            first()?;
            later.iter_mut().try_for_each(|child: &mut Check| child())?;
            // Its other pages are the parent's of now.
            let before = crate::memory::read(at + 9 * PAGE, PAGE);
            fill(at + 9 * PAGE, &pattern(50, PAGES * PAGE)[9 * PAGE..10 * PAGE]);
            later.push(ask_all(vec![room.child(&format!("child-{generation}"), writes(11))?]));
            fill(at + 9 * PAGE, &before);
            Ok(())
        },
        move |generation| {
            fill(at + 9 * PAGE, &page(generation));
            Ok(())
        },
    )
}

/// Pages that may only be written at times (mprotect(2)).
pub fn rewritten_protected(_: &Room) -> Result<Check, Fault> {
    let at = area(PAGES)?;
    protect(at, PAGES * PAGE, libc::PROT_NONE)?;
    generations(
        move |generation| {
            protect(at, PAGES * PAGE, libc::PROT_READ)?;
            let result = one_changed(at, PAGES, 30, generation);
            protect(at, PAGES * PAGE, libc::PROT_NONE)?;
            result
        },
        move |generation| {
            protect(at + 30 * PAGE, PAGE, READ_WRITE)?;
            fill(at + 30 * PAGE, &page(generation));
            protect(at + 30 * PAGE, PAGE, libc::PROT_NONE)
        },
    )
}

/// A page within a transparent huge page.
pub fn rewritten_huge(_: &Room) -> Result<Check, Fault> {
    let (huge, pages) = (2 << 20, 1024);
    let somewhere = map(3 * huge, libc::PROT_NONE, PRIVATE)?;
    let at = somewhere.next_multiple_of(huge);
    protect(at, 2 * huge, READ_WRITE)?;
    raw!(SYS_madvise, at, 2 * huge, libc::MADV_HUGEPAGE)?;
    fill(at, &pattern(50, pages * PAGE));
    generations(
        move |generation| one_changed(at, pages, 700, generation),
        move |generation| {
            fill(at + 700 * PAGE, &page(generation));
            Ok(())
        },
    )
}

/// Mappings that grow in their place: by mremap(2), the heap by brk(2), downwards.
pub fn rewritten_grown(_: &Room) -> Result<Check, Fault> {
    let whole = map(400 * PAGE, libc::PROT_NONE, PRIVATE)?;
    let (up, down) = (whole + PAGE, whole + 399 * PAGE);
    raw!(SYS_munmap, whole, 400 * PAGE)?;
    let flags = PRIVATE | libc::MAP_FIXED_NOREPLACE;
    raw!(SYS_mmap, up, PAGE, READ_WRITE, flags, -1, 0)?;
    raw!(SYS_mmap, down - PAGE, PAGE, READ_WRITE, flags | libc::MAP_GROWSDOWN, -1, 0)?;
    let mut heap: Vec<usize> = Vec::new();
    let mut own = Vec::new();
    generations(
        move |generation| {
            for number in 1..=generation as usize {
                holds("what grew upwards", up + number * PAGE, &page(number as u64))?;
                holds("what grew downwards", down - (number + 1) * PAGE, &page(number as u64))?;
            }
            Ok(())
        },
        move |generation| {
            let number = generation as usize;
            same!("place", raw!(SYS_mremap, up, number * PAGE, (number + 1) * PAGE, 0)? as usize, up);
            fill(up + number * PAGE, &page(generation));
            fill(down - (number + 1) * PAGE, &page(generation));
            for (earlier, at) in heap.iter().enumerate() {
                holds("the heap", *at, &page(earlier as u64 + 1))?;
            }
            // SAFETY: the heap only grows here, by pages that nothing else uses.
            let at = unsafe { libc::sbrk(2 * PAGE as libc::intptr_t) as usize };
            fill(at, &page(generation));
            heap.push(at);
            own.push(page(generation));
            Ok(())
        },
    )
}

/// Memory that several processes share, written by the one that does not look.
pub fn rewritten_shared(room: &Room) -> Result<Check, Fault> {
    let at = map(PAGES * PAGE, READ_WRITE, SHARED)?;
    fill(at, &pattern(50, PAGES * PAGE));
    let child = room.child("writer", move |_| {
        generations(
            |_| Ok(()),
            move |generation| {
                fill(at + 21 * PAGE, &page(generation));
                Ok(())
            },
        )
    })?;
    // The child has made a generation at once, and another in the check that made it ready.
    generations(move |generation| one_changed(at, PAGES, 21, generation + 2), move |_| child.ask())
}
