//! Pipes and FIFOs with content (pipe(7), fifo(7)).

use crate::filesystem::open;
use crate::room::{Check, Room};
use crate::sys::{Fault, Verdict, c_path, ensure, errno, pattern, same, sys};

fn pipe(flags: i32) -> Result<[i32; 2], Fault> {
    let mut ends = [0i32; 2];
    sys!(pipe2(ends.as_mut_ptr(), flags))?;
    Ok(ends)
}

fn put(descriptor: i32, bytes: &[u8]) -> Verdict {
    same!("bytes written", sys!(write(descriptor, bytes.as_ptr().cast(), bytes.len()))?, bytes.len() as i64);
    Ok(())
}

/// One read of at most `length` bytes.
fn take(descriptor: i32, length: usize) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0u8; length];
    let got = sys!(read(descriptor, bytes.as_mut_ptr().cast(), length))?;
    bytes.truncate(got as usize);
    Ok(bytes)
}

/// A pipe's content: taken, compared, put back.
pub fn pipe_content(_: &Room) -> Result<Check, Fault> {
    let (full, empty) = (pipe(libc::O_NONBLOCK)?, pipe(libc::O_NONBLOCK | libc::O_CLOEXEC)?);
    let content = pattern(60, 50_000);
    put(full[1], &content)?;
    let flags = move || -> Result<Vec<i64>, Fault> {
        [full, empty].concat().into_iter().map(|fd| sys!(fcntl(fd, libc::F_GETFL))).collect()
    };
    let before = flags()?;
    Ok(Box::new(move || {
        same!("flags", flags()?, before);
        let got = take(full[0], 100_000)?;
        ensure!(got == content, "{} bytes came out of the pipe, {} were in it", got.len(), content.len());
        ensure!(take(full[0], 1).is_err() && errno() == libc::EAGAIN, "the pipe holds more than it did");
        ensure!(take(empty[0], 1).is_err() && errno() == libc::EAGAIN, "the empty pipe is not empty");
        put(full[1], &content)
    }))
}

/// O_DIRECT: a pipe of packets keeps their bounds.
pub fn pipe_packets(_: &Room) -> Result<Check, Fault> {
    let ends = pipe(libc::O_DIRECT | libc::O_NONBLOCK)?;
    let packets: Vec<Vec<u8>> =
        [10, 1, 2000, 4096, 33].into_iter().map(|length| pattern(length as u64, length)).collect();
    packets.iter().try_for_each(|packet| put(ends[1], packet))?;
    Ok(Box::new(move || {
        ensure!(
            sys!(fcntl(ends[1], libc::F_GETFL))? as i32 & libc::O_DIRECT != 0,
            "the pipe is no packet pipe any more"
        );
        for packet in &packets {
            let got = take(ends[0], 5000)?;
            ensure!(got == *packet, "a packet of {} bytes, it had {}", got.len(), packet.len());
        }
        packets.iter().try_for_each(|packet| put(ends[1], packet))
    }))
}

/// A pipe with a capacity of its own, more than the usual in it.
pub fn pipe_size(_: &Room) -> Result<Check, Fault> {
    let ends = pipe(libc::O_NONBLOCK)?;
    let capacity = sys!(fcntl(ends[1], libc::F_SETPIPE_SZ, 512 << 10))?;
    let content = pattern(61, 300_000);
    put(ends[1], &content)?;
    Ok(Box::new(move || {
        same!("capacity", sys!(fcntl(ends[0], libc::F_GETPIPE_SZ))?, capacity);
        let mut got = Vec::new();
        while let Ok(more) = take(ends[0], 400_000) {
            got.extend(more);
        }
        ensure!(got == content, "{} bytes came out of the pipe, {} were in it", got.len(), content.len());
        put(ends[1], &content)
    }))
}

/// A pipe whose ends are in two processes, and one shared by three: bytes flow as before.
pub fn pipe_between_processes(room: &Room) -> Result<Check, Fault> {
    let (to, from) = (pipe(0)?, pipe(0)?);
    put(to[1], b"waiting")?;
    let reader = room.child("reader", |_| {
        sys!(close(to[1]))?;
        sys!(close(from[0]))?;
        Ok(Box::new(move || {
            let got = take(to[0], 100)?;
            put(from[1], &got)
        }))
    })?;
    same!("the first bytes", take(from[0], 100)?, b"waiting");
    put(to[1], b"more")?;
    Ok(Box::new(move || {
        reader.ask()?;
        same!("what came through the other process", take(from[0], 100)?, b"more");
        put(to[1], b"more")
    }))
}

/// A pipe whose writer has gone: its content, then the end of file; and one whose reader has gone.
pub fn pipe_half_closed(_: &Room) -> Result<Check, Fault> {
    // SAFETY: SIG_IGN for a signal that this workload's writes raise.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let (no_reader, ended) = (pipe(0)?, pipe(0)?);
    sys!(close(no_reader[0]))?;
    sys!(close(ended[1]))?;
    let mut with_rest = Some(pipe(0)?);
    if let Some(ends) = with_rest {
        put(ends[1], b"the rest")?;
        sys!(close(ends[1]))?;
    }
    let mut first = true;
    Ok(Box::new(move || {
        ensure!(put(no_reader[1], b"x").is_err() && errno() == libc::EPIPE, "a pipe without reader takes bytes");
        same!("bytes of a pipe without writer", take(ended[0], 10)?.len(), 0);
        if std::mem::take(&mut first) {
            return Ok(()); // the check before the dump leaves the rest in the pipe
        }
        if let Some(ends) = with_rest.take() {
            same!("rest in a pipe without writer", take(ends[0], 100)?, b"the rest");
            same!("bytes after the rest", take(ends[0], 100)?.len(), 0);
        }
        Ok(())
    }))
}

/// A FIFO of the file system, open at both ends, with content.
pub fn fifo(room: &Room) -> Result<Check, Fault> {
    let path = room.path("fifo");
    sys!(mkfifo(c_path(&path).as_ptr(), 0o600))?;
    let both = open(&path, libc::O_RDWR)?;
    let reader = open(&path, libc::O_RDONLY | libc::O_NONBLOCK)?;
    let writer = open(&path, libc::O_WRONLY)?;
    sys!(close(both))?;
    put(writer, b"through the fifo")?;
    Ok(Box::new(move || {
        same!("content of the fifo", take(reader, 100)?, b"through the fifo");
        ensure!(take(reader, 1).is_err() && errno() == libc::EAGAIN, "the fifo holds more than it did");
        let other = open(&path, libc::O_WRONLY | libc::O_NONBLOCK)?;
        put(other, b"by name")?;
        sys!(close(other))?;
        same!("what came by the fifo's name", take(reader, 100)?, b"by name");
        put(writer, b"through the fifo")
    }))
}
