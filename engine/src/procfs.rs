//! Reading proc(5), and the two of its files that describe a task as a whole: `stat` and `status`.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::sys::{HostPid, NsPid};

/// What most files of a task take.
const USUAL: usize = 4 << 10;

/// Reads a file of proc(5), whose size nobody knows before: with few large reads, where [`fs::read`] asks for the size and then begins
/// with 32 bytes.
///
/// # Errors
/// Those of opening and reading.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let file = rustix::fs::open(path.as_ref(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = Vec::with_capacity(USUAL);
    loop {
        match rustix::io::read(&file, rustix::buffer::spare_capacity(&mut bytes)) {
            Ok(0) => return Ok(bytes),
            // The kernel fills a page at a time, if that.
            Ok(_) if bytes.capacity() - bytes.len() < USUAL => bytes.reserve(bytes.len().max(USUAL)),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads a file of proc(5) as text.
///
/// # Errors
/// As [`read`]; `InvalidData` when it is not UTF-8.
pub fn read_text(path: impl AsRef<Path>) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The inode of a namespace of a task, as `/proc/PID/ns/KIND` shows it (namespaces(7)); none when the task is gone.
pub fn namespace_inode(pid: HostPid, kind: &str) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(format!("/proc/{pid}/ns/{kind}")).map(|namespace| namespace.ino()).ok()
}

/// The processes that there are, in no order.
pub fn processes() -> io::Result<Vec<HostPid>> {
    let names = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(names.map(HostPid).collect())
}

/// The name of a process, at most 15 bytes.
pub fn comm(pid: HostPid) -> io::Result<String> {
    Ok(read_text(format!("/proc/{pid}/comm"))?.trim_end_matches('\n').to_owned())
}

/// The effective user id of a process.
pub fn effective_user(pid: HostPid) -> io::Result<u32> {
    let status = read_text(format!("/proc/{pid}/status"))?;
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let effective = ids.and_then(|ids| ids.split_ascii_whitespace().nth(1)?.parse().ok());
    effective.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// What `/proc/PID/stat` says (proc_pid_stat(5)).
#[derive(Clone, Debug, Default)]
pub struct Stat {
    /// The name, at most 15 bytes.
    pub comm: String,
    /// One letter, `R` to `Z`.
    pub state: char,
    /// The parent, in ferry's pid namespace; 0 when it is outside.
    pub parent: i32,
    /// The session, in ferry's pid namespace.
    pub session: i32,
    /// The controlling terminal's device, encoded as in `st_rdev`; 0 if it has none.
    pub terminal: u32,
    /// That terminal's foreground process group, in ferry's pid namespace; -1 if there is none.
    pub foreground: i32,
    /// `PF_*` flags of the kernel.
    pub flags: u64,
    /// The processor that it ran on last.
    pub processor: u32,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
    /// Bounds of the address space, as `PR_SET_MM_MAP` takes them; zero for a zombie.
    pub bounds: MemoryBounds,
    /// Wait status that its parent will see.
    pub exit_code: i32,
}

/// Where the parts of a program lie in its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the kernel's")]
pub struct MemoryBounds {
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

impl Stat {
    /// Reads the file of a process, or of one of its threads by its own id.
    ///
    /// # Errors
    /// Those of reading; `InvalidData` when the kernel writes something else.
    pub fn read(pid: HostPid) -> io::Result<Self> {
        let text = read(format!("/proc/{pid}/stat"))?;
        Self::parse(&String::from_utf8_lossy(&text)).ok_or_else(|| malformed(pid, "stat"))
    }

    fn parse(text: &str) -> Option<Self> {
        // The name may itself contain parentheses and spaces: the last closing one ends it.
        let (head, tail) = text.trim_end().rsplit_once(") ")?;
        let comm = head.split_once(" (")?.1.to_owned();
        let fields: Vec<&str> = tail.split(' ').collect();
        // Field N of the manual page is at N - 3 here.
        let number = |field: usize| -> Option<u64> { fields.get(field - 3)?.parse().ok() };
        let signed = |field: usize| -> Option<i32> { fields.get(field - 3)?.parse().ok() };
        Some(Self {
            comm,
            state: fields.first()?.chars().next()?,
            parent: signed(4)?,
            session: signed(6)?,
            terminal: signed(7)? as u32,
            foreground: signed(8)?,
            flags: number(9)?,
            processor: number(39)? as u32,
            start_time: number(22)?,
            bounds: MemoryBounds {
                start_code: number(26)?,
                end_code: number(27)?,
                start_stack: number(28)?,
                start_data: number(45)?,
                end_data: number(46)?,
                start_brk: number(47)?,
                arg_start: number(48)?,
                arg_end: number(49)?,
                env_start: number(50)?,
                env_end: number(51)?,
            },
            exit_code: signed(52)?,
        })
    }
}

/// What `/proc/PID/status` says of a process's ids (proc_pid_status(5)), each innermost namespace last.
#[derive(Clone, Debug, Default)]
pub struct Ids {
    /// Process id at every level from ferry's namespace inwards.
    pub pid: Vec<i32>,
    /// Process group, likewise; a 0 is a group led from outside that level.
    pub group: Vec<i32>,
    /// Session, likewise.
    pub session: Vec<i32>,
    /// File mode creation mask.
    pub umask: u32,
}

impl Ids {
    /// Reads the file of a process or thread.
    ///
    /// # Errors
    /// Those of reading; `InvalidData` when the kernel writes something else.
    pub fn read(pid: HostPid) -> io::Result<Self> {
        let text = read(format!("/proc/{pid}/status"))?;
        let text = String::from_utf8_lossy(&text);
        let mut ids = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(":\t") else { continue };
            let numbers = || value.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect();
            match key {
                "Umask" => ids.umask = u32::from_str_radix(value, 8).map_err(|_| malformed(pid, "status"))?,
                "NSpid" => ids.pid = numbers(),
                "NSpgid" => ids.group = numbers(),
                "NSsid" => ids.session = numbers(),
                _ => {}
            }
        }
        if ids.pid.is_empty() { Err(malformed(pid, "status")) } else { Ok(ids) }
    }

    /// The process id in its innermost namespace.
    pub fn innermost(&self) -> NsPid {
        NsPid(self.pid.last().copied().unwrap_or(0))
    }
}

/// What `/proc/PID/status` says of a process's memory, in bytes, within the error of the kernel's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Private anonymous memory (`RssAnon`).
    pub anonymous: u64,
    /// Shared anonymous memory and files in tmpfs (`RssShmem`).
    pub shared: u64,
}

impl Resident {
    /// Reads the file of a process.
    ///
    /// # Errors
    /// Those of reading: the process may be gone.
    pub fn read(pid: HostPid) -> io::Result<Self> {
        let text = read(format!("/proc/{pid}/status"))?;
        let text = String::from_utf8_lossy(&text);
        let bytes = |key| kibibytes(&text, key).unwrap_or(0) * 1024;
        Ok(Self { anonymous: bytes("RssAnon:"), shared: bytes("RssShmem:") })
    }
}

/// How many bytes the host could give to programs without swapping (proc_meminfo(5), `MemAvailable`).
///
/// # Errors
/// Those of reading.
pub fn available_memory() -> io::Result<u64> {
    let text = read_text("/proc/meminfo")?;
    Ok(kibibytes(&text, "MemAvailable:").unwrap_or(0) * 1024)
}

/// The number in the line that starts with `key`.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    value.split_ascii_whitespace().next()?.parse().ok()
}

/// The threads of a process, leader included, as ferry numbers them.
///
/// # Errors
/// Those of reading the directory: the process may be gone.
pub fn threads(pid: HostPid) -> io::Result<Vec<HostPid>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        if let Some(tid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
            threads.push(HostPid(tid));
        }
    }
    Ok(threads)
}

/// Whether the process has threads that have not ended, though its first thread may have.
pub fn has_living_threads(pid: HostPid) -> bool {
    let lives = |tid| Stat::read(tid).is_ok_and(|stat| !matches!(stat.state, 'Z' | 'X'));
    threads(pid).is_ok_and(|threads| threads.into_iter().any(lives))
}

/// The children that one thread has made or adopted.
///
/// # Errors
/// Those of reading: the thread may be gone.
pub fn children(pid: HostPid, tid: HostPid) -> io::Result<Vec<HostPid>> {
    let text = read_text(format!("/proc/{pid}/task/{tid}/children"))?;
    Ok(text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).map(HostPid).collect())
}

fn malformed(pid: HostPid, file: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/{file} is not as proc(5) says"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_the_rest_of_the_line() {
        let numbers: Vec<String> = (4..=52).map(|field| field.to_string()).collect();
        let stat = Stat::parse(&format!("7 (a) R (b) c) T {}\n", numbers.join(" "))).expect("parses");
        assert_eq!((stat.comm.as_str(), stat.state, stat.parent), ("a) R (b) c", 'T', 4));
        assert_eq!((stat.processor, stat.bounds.env_end, stat.exit_code), (39, 51, 52));
    }

    #[test]
    fn reads_this_process() {
        let me = HostPid(std::process::id() as i32);
        assert_eq!(Ids::read(me).expect("status").pid[0], me.0);
        assert!(threads(me).expect("task").contains(&me));
        assert!(Stat::read(me).expect("stat").bounds.start_stack > 0);
        assert!(Resident::read(me).expect("status").anonymous > 0);
    }
}
