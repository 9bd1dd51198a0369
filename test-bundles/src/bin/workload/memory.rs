//! Anonymous memory: content, protection, flags, places (mmap(2), mprotect(2), madvise(2), mlock(2)).

use crate::Workload;
use crate::room::{Check, Room, ask_all};
use crate::sys::{Fault, Verdict, clock, ensure, errno, pattern, raw, same, sys, text};
use std::collections::BTreeMap;

pub const PAGE: usize = 4096;
pub const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
pub const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
pub const SHARED: i32 = libc::MAP_SHARED | libc::MAP_ANONYMOUS;

/// Maps anonymous memory somewhere.
pub fn map(length: usize, protection: i32, flags: i32) -> Result<usize, Fault> {
    map_file(length, protection, flags, -1, 0)
}

/// Maps a descriptor's file, or anonymous memory where it is -1.
pub fn map_file(length: usize, protection: i32, flags: i32, descriptor: i32, offset: i64) -> Result<usize, Fault> {
    Ok(raw!(SYS_mmap, 0, length, protection, flags, descriptor, offset)? as usize)
}

/// Changes the protection of a range that this program mapped.
pub fn protect(address: usize, length: usize, protection: i32) -> Verdict {
    raw!(SYS_mprotect, address, length, protection).map(|_| ())
}

/// Writes bytes to memory that this program mapped writable.
pub fn fill(address: usize, bytes: &[u8]) {
    // SAFETY: every caller passes a range of its own mapping, which it has made writable and holds no reference to.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
}

/// Reads bytes of memory that this program mapped readable.
pub fn read(address: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; length];
    // SAFETY: as for `fill`; the copy is complete before anything can write the source again.
    unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), length) };
    bytes
}

/// Fails unless the memory holds these bytes.
pub fn holds(what: &str, address: usize, want: &[u8]) -> Verdict {
    let got = read(address, want.len());
    match got.iter().zip(want).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!("{what}: byte {at:#x} at {:#x} is {:#x}, was {:#x}", address + at, got[at], want[at])),
    }
}

/// What /proc/self/smaps tells of the mapping that holds `address`: the first line's range and protection, and the fields.
pub fn smaps(address: usize) -> Result<BTreeMap<String, String>, Fault> {
    let mut fields = BTreeMap::new();
    let mut inside = false;
    for line in text("/proc/self/smaps")?.lines() {
        let first = line.split(' ').next().unwrap_or("");
        if let Some((from, to)) = first.split_once('-') {
            let bound = |digits| usize::from_str_radix(digits, 16).map_err(|_| format!("odd line in smaps: {line}"));
            inside = (bound(from)?..bound(to)?).contains(&address);
            if inside {
                fields.insert("range".to_owned(), first.to_owned());
                fields.insert("protection".to_owned(), line.split(' ').nth(1).unwrap_or("").to_owned());
            }
        } else if inside && let Some((name, value)) = line.split_once(':') {
            fields.insert(name.to_owned(), value.trim().to_owned());
        }
    }
    ensure!(!fields.is_empty(), "nothing is mapped at {address:#x}");
    Ok(fields)
}

fn smaps_field(address: usize, field: &str) -> Result<String, Fault> {
    smaps(address)?.remove(field).ok_or_else(|| format!("no {field} in smaps"))
}

/// The kernel's words about each page of a range (proc_pid_pagemap(5)).
pub fn pagemap(address: usize, pages: usize) -> Result<Vec<u64>, Fault> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open("/proc/self/pagemap").map_err(|error| error.to_string())?;
    let mut bytes = vec![0u8; pages * 8];
    file.read_exact_at(&mut bytes, (address / PAGE * 8) as u64).map_err(|error| error.to_string())?;
    Ok(bytes
        .chunks_exact(8)
        .map(|word| word.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
        .collect())
}

/// Whether each page of a range is present or swapped.
fn populated(address: usize, pages: usize) -> Result<Vec<bool>, Fault> {
    Ok(pagemap(address, pages)?.into_iter().map(|word| word >> 62 != 0).collect())
}

/// Private anonymous memory, readable or not, executable too.
pub fn anonymous_private(_: &Room) -> Result<Check, Fault> {
    let content = pattern(20, 100 * PAGE);
    let plain = map(content.len(), READ_WRITE, PRIVATE)?;
    let executable = map(2 * PAGE, READ_WRITE, PRIVATE)?;
    fill(plain, &content);
    fill(executable, &[0xB8, 42, 0, 0, 0, 0xC3]); // mov eax, 42; ret
    protect(executable, 2 * PAGE, libc::PROT_READ | libc::PROT_EXEC)?;
    Ok(Box::new(move || {
        holds("memory", plain, &content)?;
        // SAFETY: the page holds the two instructions above, a function without arguments.
        let function: extern "C" fn() -> i32 = unsafe { std::mem::transmute(executable) };
        same!("answer of code in anonymous memory", function(), 42);
        Ok(())
    }))
}

/// Shared anonymous memory of two processes: content, and that a write of one is seen by the other.
pub fn anonymous_shared(room: &Room) -> Result<Check, Fault> {
    let content = pattern(21, 64 * PAGE);
    let shared = map(content.len(), READ_WRITE, SHARED)?;
    fill(shared + PAGE, &content[PAGE..]);
    let (counter, mirror) = (shared, shared + 8);
    let child = room.child("sharer", |_| {
        let count = read(counter, 8);
        fill(mirror, &count);
        Ok(Box::new(move || {
            fill(mirror, &read(counter, 8));
            Ok(())
        }))
    })?;
    let mut count = 0u64;
    Ok(Box::new(move || {
        holds("shared memory", shared + PAGE, &content[PAGE..])?;
        count += 1;
        fill(counter, &count.to_le_bytes());
        child.ask()?;
        holds("what the other process wrote", mirror, &count.to_le_bytes())
    }))
}

/// The heap made by brk(2): its bounds, its content, and that it still grows.
pub fn heap(_: &Room) -> Result<Check, Fault> {
    /// The end of the heap, through the C library: its allocator keeps account of it.
    fn move_end(by: usize) -> usize {
        // SAFETY: the heap only grows here, and nothing but the new part is used by this workload.
        unsafe { libc::sbrk(by as libc::intptr_t) as usize }
    }
    let content = pattern(22, 40 * PAGE);
    let start = move_end(content.len());
    let end = start + content.len();
    fill(start, &content);
    Ok(Box::new(move || {
        holds("heap", start, &content)?;
        // The allocator may have moved the end since; it never moves it back below what is ours.
        let now = move_end(3 * PAGE);
        ensure!(now >= end, "the heap ended at {now:#x}, it ended at {end:#x} before");
        same!("end of the heap after growing", raw!(SYS_brk, 0)? as usize, now + 3 * PAGE);
        fill(now + 2 * PAGE, &[7; 100]);
        Ok(())
    }))
}

/// A deep stack: content far below where it started.
pub fn stack_deep(room: &Room) -> Result<Check, Fault> {
    fn deep(room: &Room, depth: u64) {
        let content: [u8; 3000] = std::hint::black_box(pattern(depth, 3000).try_into().unwrap_or([0; 3000]));
        let all_right = move || content[..] == pattern(depth, 3000)[..];
        if depth > 0 {
            deep(room, depth - 1);
        } else {
            room.serve(Ok(Box::new(move || {
                ensure!(all_right(), "the stack's content changed");
                Ok(())
            })));
        }
        std::hint::black_box(&content);
    }
    deep(room, 150);
    Err("the deep function returned".to_owned())
}

/// A MAP_GROWSDOWN mapping still grows.
pub fn stack_growsdown(_: &Room) -> Result<Check, Fault> {
    let room = map(1 << 20, libc::PROT_NONE, PRIVATE)?;
    raw!(SYS_munmap, room, 1 << 20)?;
    let top = room + (1 << 20) - 4 * PAGE;
    let flags = PRIVATE | libc::MAP_GROWSDOWN | libc::MAP_FIXED_NOREPLACE;
    same!("place", raw!(SYS_mmap, top, 2 * PAGE, READ_WRITE, flags, -1, 0)? as usize, top);
    fill(top, &pattern(23, 2 * PAGE));
    let mut bottom = top;
    Ok(Box::new(move || {
        holds("growing mapping", top, &pattern(23, 2 * PAGE))?;
        let flags = smaps_field(top, "VmFlags")?;
        ensure!(flags.split(' ').any(|flag| flag == "gd"), "the mapping lost MAP_GROWSDOWN: {flags}");
        bottom -= PAGE;
        fill(bottom, &[9; 16]); // the kernel extends the mapping, or the process dies here
        holds("grown page", bottom, &[9; 16])
    }))
}

/// Memory that nobody touched stays unpopulated.
pub fn holes(_: &Room) -> Result<Check, Fault> {
    let pages = 512;
    let memory = map(pages * PAGE, READ_WRITE, PRIVATE)?;
    raw!(SYS_madvise, memory, pages * PAGE, libc::MADV_NOHUGEPAGE)?;
    for page in (0..pages).filter(|page| page % 5 == 0 || (200..230).contains(page)) {
        fill(memory + page * PAGE, &pattern(page as u64 + 1, 64));
    }
    let before = populated(memory, pages)?;
    Ok(Box::new(move || {
        let now = populated(memory, pages)?;
        let differ = now.iter().zip(&before).filter(|(now, before)| **now && !**before).count();
        ensure!(differ == 0, "{differ} pages are populated that nobody touched");
        for page in (0..pages).filter(|page| before[*page]) {
            holds("touched page", memory + page * PAGE, &pattern(page as u64 + 1, 64))?;
        }
        Ok(())
    }))
}

/// Pages that were written with zeros, and pages that were only read.
pub fn zero_pages(_: &Room) -> Result<Check, Fault> {
    let memory = map(64 * PAGE, READ_WRITE, PRIVATE)?;
    for page in 0..64 {
        match page % 4 {
            0 => fill(memory + page * PAGE, &[0; PAGE]),
            1 => same!("a fresh page", read(memory + page * PAGE, 1)[0], 0),
            2 => fill(memory + page * PAGE + PAGE - 1, &[page as u8]),
            _ => {}
        }
    }
    Ok(Box::new(move || {
        for page in 0..64 {
            let mut want = vec![0u8; PAGE];
            if page % 4 == 2 {
                want[PAGE - 1] = page as u8;
            }
            // The untouched pages are read too: reading maps the zero page, which is no change.
            holds("page of zeros", memory + page * PAGE, &want)?;
        }
        Ok(())
    }))
}

/// Pages of one mapping with different protections; a forbidden access still is one.
pub fn protections(_: &Room) -> Result<Check, Fault> {
    let kinds = [READ_WRITE, libc::PROT_READ, libc::PROT_NONE, libc::PROT_READ | libc::PROT_EXEC, libc::PROT_EXEC];
    let memory = map(60 * PAGE, READ_WRITE, PRIVATE)?;
    fill(memory, &pattern(24, 60 * PAGE));
    for page in 0..60 {
        protect(memory + page * PAGE, PAGE, kinds[page % kinds.len()])?;
    }
    let each = move || -> Result<Vec<String>, Fault> {
        let all = text("/proc/self/maps")?;
        let inside = |line: &&str| {
            let start = usize::from_str_radix(line.split('-').next().unwrap_or(""), 16).unwrap_or(0);
            (memory..memory + 60 * PAGE).contains(&start)
        };
        Ok(all.lines().filter(inside).map(|line| line[..line.len().min(40)].trim().to_owned()).collect())
    };
    let before = each()?;
    Ok(Box::new(move || {
        same!("protections", each()?, before);
        let descriptor = sys!(memfd_create(c"probe".as_ptr(), 0))? as i32;
        for page in 0..60 {
            // The kernel copies from the page on our behalf and answers EFAULT where we may not read.
            let answer = raw!(SYS_write, descriptor, memory + page * PAGE, 1);
            let readable = kinds[page % kinds.len()] & libc::PROT_READ != 0;
            // A page with PROT_EXEC alone is not readable where the CPU has protection keys.
            let unsure = kinds[page % kinds.len()] == libc::PROT_EXEC;
            ensure!(unsure || answer.is_ok() == readable, "page {page}: reading gives {answer:?}, errno {}", errno());
        }
        sys!(close(descriptor)).map(|_| ())
    }))
}

/// Pages that were filled and then made inaccessible keep their content; so do guard pages their place.
pub fn protected_data(_: &Room) -> Result<Check, Fault> {
    let content = pattern(25, 16 * PAGE);
    let memory = map(content.len() + 2 * PAGE, libc::PROT_NONE, PRIVATE)?;
    protect(memory + PAGE, content.len(), READ_WRITE)?;
    fill(memory + PAGE, &content);
    protect(memory + PAGE, content.len(), libc::PROT_NONE)?;
    let range = smaps_field(memory + PAGE, "range")?;
    Ok(Box::new(move || {
        same!("range of the inaccessible mapping", smaps_field(memory + PAGE, "range")?, range);
        same!("protection of the guard page", smaps(memory)?["protection"], "---p");
        same!("protection", smaps(memory + PAGE)?["protection"], "---p");
        protect(memory + PAGE, content.len(), libc::PROT_READ)?;
        let verdict = holds("inaccessible memory", memory + PAGE, &content);
        protect(memory + PAGE, content.len(), libc::PROT_NONE)?;
        verdict
    }))
}

/// Two thousand small mappings.
pub fn many_mappings(_: &Room) -> Result<Check, Fault> {
    let memory = map(4000 * PAGE, libc::PROT_READ, PRIVATE)?;
    for number in (0..4000).step_by(2) {
        protect(memory + number * PAGE, PAGE, READ_WRITE)?;
        if number % 6 == 0 {
            fill(memory + number * PAGE, &pattern(number as u64 + 1, 32));
        }
    }
    let ranges = || text("/proc/self/maps").map(|all| all.lines().count());
    let before = ranges()?;
    Ok(Box::new(move || {
        let now = ranges()?;
        ensure!(now.abs_diff(before) < 20, "{now} mappings, there were {before}");
        (0..4000)
            .step_by(6)
            .try_for_each(|number| holds("small mapping", memory + number * PAGE, &pattern(number as u64 + 1, 32)))
    }))
}

/// A hundred mebibytes.
pub fn large_memory(_: &Room) -> Result<Check, Fault> {
    let content = pattern(26, 100 << 20);
    let memory = map(content.len(), READ_WRITE, PRIVATE)?;
    fill(memory, &content);
    Ok(Box::new(move || holds("large memory", memory, &content)))
}

/// Zero pages, pattern pages, holes and repeats mixed in one mapping, in many runs.
pub fn page_content_mix(_: &Room) -> Result<Check, Fault> {
    let memory = map(3000 * PAGE, READ_WRITE, PRIVATE)?;
    let content = |page: usize| match page * page % 7 {
        0 => None,
        1 => Some(vec![0u8; PAGE]),
        2 => Some(vec![0x5Au8; PAGE]),
        _ => Some(pattern(page as u64 + 1, PAGE)),
    };
    for page in 0..3000 {
        if let Some(bytes) = content(page) {
            fill(memory + page * PAGE, &bytes);
        }
    }
    Ok(Box::new(move || {
        (0..3000).try_for_each(|page| content(page).map_or(Ok(()), |bytes| holds("page", memory + page * PAGE, &bytes)))
    }))
}

/// Advice that stays with the mapping (madvise(2)), as smaps shows it.
pub fn madvise_flags(_: &Room) -> Result<Check, Fault> {
    let advice = [
        (libc::MADV_DONTFORK, "dc"),
        (libc::MADV_WIPEONFORK, "wf"),
        (libc::MADV_MERGEABLE, "mg"),
        (libc::MADV_HUGEPAGE, "hg"),
        (libc::MADV_NOHUGEPAGE, "nh"),
        (libc::MADV_DONTDUMP, "dd"),
        (libc::MADV_SEQUENTIAL, "sr"),
        (libc::MADV_RANDOM, "rr"),
    ];
    let mut mappings = Vec::new();
    for (advice, flag) in advice {
        let memory = map(4 * PAGE, READ_WRITE, PRIVATE)?;
        fill(memory, &pattern(advice as u64, 4 * PAGE));
        match raw!(SYS_madvise, memory, 4 * PAGE, advice) {
            Ok(_) => mappings.push((memory, advice, flag)),
            // A kernel without the feature (KSM, huge pages) has no such flag to keep.
            Err(fault) => ensure!(errno() == libc::EINVAL, "{fault}"),
        }
    }
    ensure!(mappings.len() >= 5, "this kernel knows only {} of the flags", mappings.len());
    Ok(Box::new(move || {
        for (memory, advice, flag) in &mappings {
            let flags = smaps_field(*memory, "VmFlags")?;
            ensure!(flags.split(' ').any(|each| each == *flag), "the mapping lost {flag}: {flags}");
            holds(flag, *memory, &pattern(*advice as u64, 4 * PAGE))?;
        }
        Ok(())
    }))
}

/// Locked memory: mlock(2), and on access only (MLOCK_ONFAULT).
pub fn locked(_: &Room) -> Result<Check, Fault> {
    let (all, on_fault) = (map(8 * PAGE, READ_WRITE, PRIVATE)?, map(8 * PAGE, READ_WRITE, PRIVATE)?);
    fill(all, &pattern(27, PAGE));
    fill(on_fault, &pattern(28, PAGE));
    raw!(SYS_mlock, all, 8 * PAGE)?;
    raw!(SYS_mlock2, on_fault, 8 * PAGE, 1)?;
    Ok(Box::new(move || {
        for memory in [all, on_fault] {
            let flags = smaps_field(memory, "VmFlags")?;
            ensure!(flags.split(' ').any(|flag| flag == "lo"), "the mapping is not locked any more: {flags}");
        }
        ensure!(populated(all, 8)?.iter().all(|page| *page), "locked memory is not populated");
        holds("locked memory", all, &pattern(27, PAGE))?;
        holds("locked memory", on_fault, &pattern(28, PAGE))
    }))
}

/// Calls that the vdso answers (vdso(7)), in the root process and in a child.
pub fn vdso_calls(room: &Room) -> Result<Check, Fault> {
    fn check() -> Result<Check, Fault> {
        let mut last = clock(libc::CLOCK_MONOTONIC)?;
        Ok(Box::new(move || {
            for _ in 0..1000 {
                let now = clock(libc::CLOCK_MONOTONIC)?;
                ensure!(now >= last, "the clock stepped back from {last:?} to {now:?}");
                last = now;
            }
            let (mut cpu, mut node) = (0u32, 0u32);
            raw!(SYS_getcpu, &mut cpu, &mut node, 0)?;
            ensure!(sys!(sched_getcpu())? >= 0, "no CPU number");
            let (vdso, kernel) = (sys!(time(std::ptr::null_mut()))?, raw!(SYS_time, 0)?);
            ensure!((kernel - vdso).abs() <= 1, "time is {vdso} by the vdso, {kernel} by the kernel");
            ensure!(text("/proc/self/maps")?.contains("[vdso]"), "there is no mapping named [vdso]");
            Ok(())
        }))
    }
    let (child, mut here) = (room.child("child", |_| check())?, check()?);
    let mut child = ask_all(vec![child]);
    Ok(Box::new(move || {
        child()?;
        here()
    }))
}

const HUGE: usize = 2 << 20;

/// Memory of MAP_HUGETLB, with one of two huge pages touched.
fn huge_pages(_: &Room) -> Result<Check, Fault> {
    let memory = map(2 * HUGE, READ_WRITE, PRIVATE | libc::MAP_HUGETLB)?;
    let content = pattern(29, HUGE);
    fill(memory, &content);
    let size = smaps_field(memory, "KernelPageSize")?;
    Ok(Box::new(move || {
        holds("huge page", memory, &content)?;
        same!("page size", smaps_field(memory, "KernelPageSize")?, size);
        Ok(())
    }))
}

/// Transparent huge pages that madvise(2) asked for: content, and they are huge again.
fn transparent_huge_pages(_: &Room) -> Result<Check, Fault> {
    let memory = (map(6 * HUGE, READ_WRITE, PRIVATE)? + HUGE - 1) & !(HUGE - 1);
    raw!(SYS_madvise, memory, 4 * HUGE, libc::MADV_HUGEPAGE)?;
    let content = pattern(30, 4 * HUGE);
    fill(memory, &content);
    let huge = smaps_field(memory, "AnonHugePages")?;
    ensure!(huge != "0 kB", "the kernel gave no huge pages");
    Ok(Box::new(move || {
        holds("memory of huge pages", memory, &content)?;
        same!("AnonHugePages", smaps_field(memory, "AnonHugePages")?, huge);
        Ok(())
    }))
}

/// mmap(2), Linux 6.11: `MAP_DROPPABLE`.
const DROPPABLE: i32 = 0x8 | libc::MAP_ANONYMOUS;

/// Memory that the kernel may take away, which stays such: what was in it is there or gone.
fn droppable(_: &Room) -> Result<Check, Fault> {
    let memory = map(2 * PAGE, READ_WRITE, DROPPABLE)?;
    fill(memory, &pattern(41, PAGE));
    Ok(Box::new(move || {
        let flags = smaps_field(memory, "VmFlags")?;
        ensure!(flags.split(' ').any(|each| each == "dp"), "the mapping lost dp: {flags}");
        if holds("what was not written", memory, &[0; PAGE]).is_err() {
            holds("what was written", memory, &pattern(41, PAGE))?;
        }
        holds("what was not written", memory + PAGE, &[0; PAGE])
    }))
}

/// The workloads that not every kernel can run.
pub const WORKLOADS: &[Workload] = &[
    Workload {
        name: "droppable",
        setup: droppable,
        missing: || match map(PAGE, READ_WRITE, DROPPABLE) {
            Ok(_) => None,
            Err(_) => Some("the kernel has no droppable memory (Linux 6.11)".to_owned()),
        },
    },
    Workload {
        name: "huge_pages",
        setup: huge_pages,
        missing: || {
            let free = text("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or_default();
            let enough = free.trim().parse::<u32>().is_ok_and(|free| free >= 4);
            if enough { None } else { Some("fewer than four huge pages are reserved (vm.nr_hugepages)".to_owned()) }
        },
    },
    Workload {
        name: "transparent_huge_pages",
        setup: transparent_huge_pages,
        missing: || {
            let mode = text("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
            if mode.contains("[never]") || mode.is_empty() {
                Some("transparent huge pages are off".to_owned())
            } else {
                None
            }
        },
    },
];
