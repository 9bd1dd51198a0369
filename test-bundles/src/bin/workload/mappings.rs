//! Mappings of files: private with changed pages, shared, of deleted files, past the end (mmap(2)).

use crate::memory::{PAGE, READ_WRITE, fill, holds, map_file, protect, smaps};
use crate::room::{Check, Room};
use crate::sys::{Fault, c_path, ensure, pattern, raw, same, sys, text};
use std::path::Path;

/// A new file with this content, open for reading and writing.
fn file(path: &Path, content: &[u8]) -> Result<i32, Fault> {
    std::fs::write(path, content).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(sys!(open(c_path(path).as_ptr(), libc::O_RDWR | libc::O_CLOEXEC))? as i32)
}

/// The path that /proc/self/maps shows for the mapping that starts at `address`.
fn mapped_path(address: usize) -> Result<String, Fault> {
    let all = text("/proc/self/maps")?;
    let line = all.lines().find(|line| line.starts_with(&format!("{address:08x}-")));
    let line = line.ok_or_else(|| format!("no mapping starts at {address:#x}"))?;
    Ok(line.splitn(6, ' ').nth(5).unwrap_or("").trim().to_owned())
}

/// A private mapping: pages that were written differ from the file, the others follow it.
pub fn file_private(room: &Room) -> Result<Check, Fault> {
    let (path, content, own) = (room.path("mapped"), pattern(30, 12 * PAGE), pattern(31, PAGE));
    let descriptor = file(&path, &content)?;
    let memory = map_file(10 * PAGE, READ_WRITE, libc::MAP_PRIVATE, descriptor, 2 * PAGE as i64)?;
    let readonly = map_file(4 * PAGE, libc::PROT_READ, libc::MAP_PRIVATE, descriptor, 0)?;
    for page in [1, 2, 7] {
        fill(memory + page * PAGE, &own);
    }
    sys!(close(descriptor))?;
    let mut want = content[2 * PAGE..].to_vec();
    for page in [1, 2, 7] {
        want[page * PAGE..(page + 1) * PAGE].copy_from_slice(&own);
    }
    let name = mapped_path(memory)?;
    Ok(Box::new(move || {
        same!("the mapping's file", mapped_path(memory)?, name);
        holds("private mapping", memory, &want)?;
        holds("read-only mapping", readonly, &content[..4 * PAGE])?;
        let on_disk = std::fs::read(&path).map_err(|error| error.to_string())?;
        ensure!(on_disk == content, "a private mapping's pages went into the file");
        protect(readonly, PAGE, READ_WRITE)?;
        protect(readonly, PAGE, libc::PROT_READ)
    }))
}

/// A shared mapping: what is written goes into the file, before and after.
pub fn file_shared(room: &Room) -> Result<Check, Fault> {
    let (path, content) = (room.path("shared"), pattern(32, 8 * PAGE));
    let descriptor = file(&path, &content)?;
    let memory = map_file(8 * PAGE, READ_WRITE, libc::MAP_SHARED, descriptor, 0)?;
    let readonly = map_file(8 * PAGE, libc::PROT_READ, libc::MAP_SHARED, descriptor, 0)?;
    sys!(close(descriptor))?;
    let mut count = 0u64;
    Ok(Box::new(move || {
        holds("shared mapping", memory + PAGE, &content[PAGE..])?;
        count += 1;
        fill(memory, &count.to_le_bytes());
        holds("second mapping", readonly, &count.to_le_bytes())?;
        let on_disk = std::fs::read(&path).map_err(|error| error.to_string())?;
        same!("the file's first bytes", on_disk[..8], count.to_le_bytes());
        for (address, protection) in [(memory, "rw-s"), (readonly, "r--s")] {
            same!("protection", smaps(address)?["protection"], protection);
        }
        Ok(())
    }))
}

/// Mappings, private and shared, of a file that was deleted.
pub fn file_deleted_mapping(room: &Room) -> Result<Check, Fault> {
    let (path, content) = (room.path("deleted"), pattern(33, 6 * PAGE));
    let descriptor = file(&path, &content)?;
    let private = map_file(6 * PAGE, READ_WRITE, libc::MAP_PRIVATE, descriptor, 0)?;
    let shared = map_file(6 * PAGE, READ_WRITE, libc::MAP_SHARED, descriptor, 0)?;
    fill(private + PAGE, &[1; PAGE]);
    fill(shared + 3 * PAGE, &[3; PAGE]);
    sys!(close(descriptor))?;
    std::fs::remove_file(&path).map_err(|error| error.to_string())?;
    let (mut in_private, mut in_shared) = (content.clone(), content);
    in_shared[3 * PAGE..4 * PAGE].fill(3);
    in_private[PAGE..2 * PAGE].fill(1);
    in_private[3 * PAGE..4 * PAGE].fill(3);
    Ok(Box::new(move || {
        holds("private mapping of a deleted file", private, &in_private)?;
        holds("shared mapping of a deleted file", shared, &in_shared)?;
        ensure!(mapped_path(private)?.ends_with("(deleted)"), "the file is not deleted: {}", mapped_path(private)?);
        Ok(())
    }))
}

/// A mapping longer than its file: the pages past the end cannot be read, and are there.
pub fn file_past_end(room: &Room) -> Result<Check, Fault> {
    let (path, content) = (room.path("short"), pattern(34, 2 * PAGE + 100));
    let descriptor = file(&path, &content)?;
    let memory = map_file(8 * PAGE, READ_WRITE, libc::MAP_PRIVATE, descriptor, 0)?;
    fill(memory + PAGE, &[5; 10]);
    let mut want = content;
    want[PAGE..PAGE + 10].fill(5);
    Ok(Box::new(move || {
        holds("mapping", memory, &want)?;
        let range = format!("{:08x}-{:08x}", memory, memory + 8 * PAGE);
        same!("range", smaps(memory)?["range"], range);
        let probe = raw!(SYS_write, descriptor, memory + 4 * PAGE, 1);
        ensure!(probe.is_err(), "a page past the end of the file can be read");
        Ok(())
    }))
}

/// Private and shared mappings of /dev/zero.
pub fn device_zero_mapping(_: &Room) -> Result<Check, Fault> {
    let descriptor = sys!(open(c"/dev/zero".as_ptr(), libc::O_RDWR))? as i32;
    let private = map_file(4 * PAGE, READ_WRITE, libc::MAP_PRIVATE, descriptor, 0)?;
    let shared = map_file(4 * PAGE, READ_WRITE, libc::MAP_SHARED, descriptor, 0)?;
    let content = pattern(35, 4 * PAGE);
    fill(private, &content);
    fill(shared, &content);
    Ok(Box::new(move || {
        holds("private mapping of /dev/zero", private, &content)?;
        holds("shared mapping of /dev/zero", shared, &content)
    }))
}
