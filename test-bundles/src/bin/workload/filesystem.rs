//! Descriptors of files and directories (open(2)): offset, flags, deleted files, shared descriptions.

use crate::room::{Check, Room};
use crate::sys::{Fault, Verdict, c_path, ensure, pattern, raw, same, sys, zeroed};
use std::path::Path;

/// Opens a file.
pub fn open(path: &Path, flags: i32) -> Result<i32, Fault> {
    sys!(open(c_path(path).as_ptr(), flags, 0o644))
        .map(|fd| fd as i32)
        .map_err(|fault| format!("{}: {fault}", path.display()))
}

fn create(path: &Path, content: &[u8]) -> Verdict {
    std::fs::write(path, content).map_err(|error| format!("{}: {error}", path.display()))
}

/// Offset, status flags and descriptor flags.
pub fn state(descriptor: i32) -> Result<(i64, i64, i64), Fault> {
    let offset = sys!(lseek(descriptor, 0, libc::SEEK_CUR))?;
    Ok((offset, sys!(fcntl(descriptor, libc::F_GETFL))?, sys!(fcntl(descriptor, libc::F_GETFD))?))
}

/// Reads at an offset, without moving the description's own.
fn read_at(descriptor: i32, offset: i64, length: usize) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0u8; length];
    let got = sys!(pread(descriptor, bytes.as_mut_ptr().cast(), length, offset))?;
    bytes.truncate(got as usize);
    Ok(bytes)
}

fn write(descriptor: i32, bytes: &[u8]) -> Verdict {
    same!("bytes written", sys!(write(descriptor, bytes.as_ptr().cast(), bytes.len()))?, bytes.len() as i64);
    Ok(())
}

/// Files open for reading, writing and both, with offsets and flags.
pub fn regular_files(room: &Room) -> Result<Check, Fault> {
    let mut all = Vec::new();
    let kinds = [
        libc::O_RDONLY,
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC,
        libc::O_WRONLY | libc::O_SYNC,
        libc::O_RDONLY | libc::O_NOATIME,
    ];
    for (number, flags) in kinds.into_iter().enumerate() {
        let path = room.path(&format!("file {number}"));
        create(&path, &pattern(number as u64 + 1, 10_000))?;
        let descriptor = open(&path, flags)?;
        sys!(lseek(descriptor, number as i64 * 1111, libc::SEEK_SET))?;
        all.push((descriptor, state(descriptor)?, path));
    }
    Ok(Box::new(move || {
        for (number, (descriptor, before, path)) in all.iter().enumerate() {
            same!(format!("offset and flags of {}", path.display()), state(*descriptor)?, *before);
            if before.1 as i32 & libc::O_ACCMODE != libc::O_WRONLY {
                let want = &pattern(number as u64 + 1, 10_000)[100..200];
                same!("content", read_at(*descriptor, 100, 100)?, want);
            }
            let link = std::fs::read_link(format!("/proc/self/fd/{descriptor}")).map_err(|error| error.to_string())?;
            same!("path", link, *path);
        }
        Ok(())
    }))
}

/// O_APPEND: writes go to the end, wherever the offset is.
pub fn append_file(room: &Room) -> Result<Check, Fault> {
    let path = room.path("log");
    create(&path, b"first\n")?;
    let descriptor = open(&path, libc::O_RDWR | libc::O_APPEND)?;
    let mut lines = 0;
    Ok(Box::new(move || {
        sys!(lseek(descriptor, 2, libc::SEEK_SET))?;
        write(descriptor, b"line\n")?;
        lines += 1;
        let content = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
        same!("the log", content, format!("first\n{}", "line\n".repeat(lines)));
        Ok(())
    }))
}

/// One description under two numbers and in a child: they share the offset; a second open of the same file does not.
pub fn shared_offset(room: &Room) -> Result<Check, Fault> {
    let path = room.path("shared");
    create(&path, &pattern(50, 100_000))?;
    let first = open(&path, libc::O_RDONLY)?;
    let second = sys!(dup(first))? as i32;
    let other = open(&path, libc::O_RDONLY)?;
    let child = room.child("child", |_| {
        Ok(Box::new(move || {
            sys!(lseek(first, 10, libc::SEEK_CUR))?;
            Ok(())
        }))
    })?;
    let mut offset = 10;
    sys!(lseek(other, 77, libc::SEEK_SET))?;
    Ok(Box::new(move || {
        same!("offset before", state(second)?.0, offset);
        sys!(lseek(first, 100, libc::SEEK_CUR))?;
        same!("offset of the duplicate", state(second)?.0, offset + 100);
        child.ask()?;
        same!("offset after the child moved it", state(first)?.0, offset + 110);
        same!("offset of the second open", state(other)?.0, 77);
        offset += 110;
        Ok(())
    }))
}

/// The names that a directory's description has yet to give.
fn names(descriptor: i32) -> Result<Vec<String>, Fault> {
    let mut all = Vec::new();
    let mut buffer = [0u8; 4096];
    loop {
        let length = raw!(SYS_getdents64, descriptor, buffer.as_mut_ptr(), buffer.len())? as usize;
        if length == 0 {
            return Ok(all);
        }
        let mut at = 0;
        while at < length {
            // struct linux_dirent64: inode u64, offset i64, record length u16, type u8, name.
            let record = u16::from_le_bytes([buffer[at + 16], buffer[at + 17]]) as usize;
            let name: Vec<u8> = buffer[at + 19..at + record].iter().copied().take_while(|byte| *byte != 0).collect();
            all.push(String::from_utf8_lossy(&name).into_owned());
            at += record;
        }
    }
}

/// A directory read half way.
pub fn directory(room: &Room) -> Result<Check, Fault> {
    let path = room.path("many");
    std::fs::create_dir(&path).map_err(|error| error.to_string())?;
    for number in 0..300 {
        create(&path.join(format!("entry-{number:03}")), b"")?;
    }
    let descriptor = open(&path, libc::O_RDONLY | libc::O_DIRECTORY)?;
    let mut buffer = [0u8; 2000];
    raw!(SYS_getdents64, descriptor, buffer.as_mut_ptr(), buffer.len())?;
    let offset = sys!(lseek(descriptor, 0, libc::SEEK_CUR))?;
    let rest = names(descriptor)?;
    ensure!(!rest.is_empty() && rest.len() < 302, "the directory was not read half way");
    sys!(lseek(descriptor, offset, libc::SEEK_SET))?;
    Ok(Box::new(move || {
        same!("offset in the directory", sys!(lseek(descriptor, 0, libc::SEEK_CUR))?, offset);
        let now = names(descriptor)?;
        sys!(lseek(descriptor, offset, libc::SEEK_SET))?;
        same!("names still to come", now, rest);
        Ok(())
    }))
}

/// A file that was deleted while open: content, size, offset; nothing turns up under its name.
pub fn deleted_file(room: &Room) -> Result<Check, Fault> {
    let path = room.path("gone");
    let content = pattern(51, 300_000);
    create(&path, &content)?;
    let descriptor = open(&path, libc::O_RDWR)?;
    let reader = open(&path, libc::O_RDONLY)?;
    sys!(lseek(descriptor, 12_345, libc::SEEK_SET))?;
    std::fs::remove_file(&path).map_err(|error| error.to_string())?;
    let child = room.child("child", |_| {
        Ok(Box::new(move || {
            same!("offset in the child", state(descriptor)?.0, 12_345);
            Ok(())
        }))
    })?;
    let mut count = 0u64;
    Ok(Box::new(move || {
        child.ask()?;
        same!("offset", state(descriptor)?.0, 12_345);
        ensure!(read_at(descriptor, 8, 400_000)? == content[8..], "the deleted file's content changed");
        let mut stat = zeroed::<libc::stat>();
        sys!(fstat(descriptor, &mut stat))?;
        same!("links, size", (stat.st_nlink, stat.st_size), (0, 300_000));
        count += 1;
        sys!(pwrite(descriptor, (&raw const count).cast(), 8, 0))?;
        same!("what the second description reads", read_at(reader, 0, 8)?, count.to_le_bytes());
        ensure!(!path.exists(), "{} is back", path.display());
        Ok(())
    }))
}

/// A file whose name was deleted and that has another one.
pub fn deleted_linked_file(room: &Room) -> Result<Check, Fault> {
    let (path, other) = (room.path("first name"), room.path("second name"));
    create(&path, &pattern(52, 5000))?;
    let descriptor = open(&path, libc::O_RDWR)?;
    std::fs::hard_link(&path, &other).map_err(|error| error.to_string())?;
    std::fs::remove_file(&path).map_err(|error| error.to_string())?;
    let mut count = 0u64;
    Ok(Box::new(move || {
        ensure!(read_at(descriptor, 8, 5000)? == pattern(52, 5000)[8..], "content changed");
        count += 1;
        sys!(pwrite(descriptor, (&raw const count).cast(), 8, 0))?;
        let through_name = std::fs::read(&other).map_err(|error| error.to_string())?;
        same!("the file under its other name", through_name[..8], count.to_le_bytes());
        ensure!(!path.exists(), "{} is back", path.display());
        Ok(())
    }))
}

/// O_PATH descriptors of a file, a directory and a symbolic link.
pub fn path_descriptor(room: &Room) -> Result<Check, Fault> {
    let (file, link) = (room.path("target"), room.path("link"));
    create(&file, b"x")?;
    std::os::unix::fs::symlink("target", &link).map_err(|error| error.to_string())?;
    let paths = [(file, 0), (room.path(""), libc::O_DIRECTORY), (link, libc::O_NOFOLLOW)];
    let mut all = Vec::new();
    for (path, flags) in paths {
        let descriptor = open(&path, libc::O_PATH | flags)?;
        let mut stat = zeroed::<libc::stat>();
        sys!(fstat(descriptor, &mut stat))?;
        all.push((descriptor, (stat.st_dev, stat.st_ino, stat.st_mode)));
    }
    Ok(Box::new(move || {
        for (descriptor, before) in &all {
            let mut stat = zeroed::<libc::stat>();
            sys!(fstat(*descriptor, &mut stat))?;
            same!("device, inode, mode", (stat.st_dev, stat.st_ino, stat.st_mode), *before);
            ensure!(sys!(fcntl(*descriptor, libc::F_GETFL))? as i32 & libc::O_PATH != 0, "O_PATH is lost");
        }
        Ok(())
    }))
}

/// A deleted file whose name another file has taken: the two must not be confused.
pub fn file_replaced(room: &Room) -> Result<Check, Fault> {
    let (path, fresh) = (room.path("name"), room.path("name.new"));
    create(&path, b"old content")?;
    let old = open(&path, libc::O_RDONLY)?;
    create(&fresh, b"new content")?;
    std::fs::rename(&fresh, &path).map_err(|error| error.to_string())?;
    let new = open(&path, libc::O_RDONLY)?;
    Ok(Box::new(move || {
        same!("the replaced file", read_at(old, 0, 100)?, b"old content");
        same!("the file in its place", read_at(new, 0, 100)?, b"new content");
        let named = std::fs::read(&path).map_err(|error| error.to_string())?;
        same!("the file under the name", named, b"new content");
        Ok(())
    }))
}

/// A file open for writing that its mode does not allow to open any more.
pub fn unix_permissions(room: &Room) -> Result<Check, Fault> {
    let path = room.path("secret");
    create(&path, b"0123456789")?;
    let descriptor = open(&path, libc::O_RDWR)?;
    sys!(fchmod(descriptor, 0o400))?;
    sys!(fchown(descriptor, 1234, 1234))?;
    Ok(Box::new(move || {
        same!("content", read_at(descriptor, 0, 100)?, b"0123456789");
        sys!(pwrite(descriptor, b"0".as_ptr().cast(), 1, 0))?;
        let mut stat = zeroed::<libc::stat>();
        sys!(fstat(descriptor, &mut stat))?;
        same!("mode, owner", (stat.st_mode & 0o7777, stat.st_uid), (0o400, 1234));
        Ok(())
    }))
}
