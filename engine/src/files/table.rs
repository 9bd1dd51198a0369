//! Reading a descriptor table from outside: what the kernel says of each descriptor before it is looked at closely.
//!
//! Per descriptor: a readlink(2), the reading of its fdinfo, and, for files with a path, a statx(2). A large table is read by a
//! second thread while the first looks at what has been read.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::sync_channel;
use std::thread;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, Statx, openat, readlinkat_raw, statx};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::regular::STATX;
use crate::sys::HostPid;

/// Longest path that the kernel tells.
const PATH_MAX: usize = 4096;
/// From this many descriptors on, a second thread is worth its start.
const MANY: usize = 256;
/// How many descriptors are handed over at once, and how many such parts may wait.
const PART: usize = 64;
const WAITING: usize = 4;

/// One descriptor, as the kernel shows it.
pub struct Shown {
    /// Its number.
    pub fd: u32,
    /// The link in `/proc/PID/fd`: a path, or a kind and a number.
    pub name: Vec<u8>,
    /// The text of its fdinfo.
    pub info: String,
    /// What the link leads to, if it is a path.
    pub stat: Option<Statx>,
}

/// Why a descriptor could not be read.
pub struct Unreadable {
    /// Its number.
    pub fd: u32,
    /// What could not be read.
    pub what: &'static str,
    /// The kernel's answer.
    pub error: Errno,
}

/// A descriptor table that is open for reading.
pub struct Table {
    links: OwnedFd,
    infos: OwnedFd,
    numbers: Vec<u32>,
}

impl Table {
    /// Opens the table of a task and lists its descriptors.
    ///
    /// # Errors
    /// Those of reading `/proc/PID`: the task may be gone.
    pub fn open(pid: HostPid) -> rustix::io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |name| rustix::fs::open(format!("/proc/{pid}/{name}"), flags, Mode::empty());
        let links = open("fd")?;
        let numbers = numbers(&links)?;
        Ok(Self { links, infos: open("fdinfo")?, numbers })
    }

    /// The numbers of the descriptors, ascending.
    pub fn numbers(&self) -> &[u32] {
        &self.numbers
    }

    /// Reads every descriptor but those of a name in `passed_over`, and hands it to `look`, in the order of their numbers.
    pub fn read(&self, passed_over: &[&[u8]], mut look: impl FnMut(Result<Shown, Unreadable>)) {
        if self.numbers.len() < MANY {
            let mut buffers = Buffers::new();
            let read = |fd: &u32| self.read_one(*fd, passed_over, &mut buffers).transpose();
            self.numbers.iter().filter_map(read).for_each(look);
            return;
        }
        thread::scope(|scope| {
            let (send, receive) = sync_channel(WAITING);
            scope.spawn(move || {
                let mut buffers = Buffers::new();
                for part in self.numbers.chunks(PART) {
                    let read: Vec<_> = part
                        .iter()
                        .filter_map(|fd| self.read_one(*fd, passed_over, &mut buffers).transpose())
                        .collect();
                    if send.send(read).is_err() {
                        return;
                    }
                }
            });
            receive.iter().flatten().for_each(&mut look);
        });
    }

    fn read_one(&self, fd: u32, passed_over: &[&[u8]], buffers: &mut Buffers) -> Result<Option<Shown>, Unreadable> {
        let failed = |what| move |error| Unreadable { fd, what, error };
        let number = DecInt::new(fd);
        let (name, _) =
            readlinkat_raw(&self.links, number.as_c_str(), &mut buffers.link[..]).map_err(failed("its name"))?;
        if passed_over.contains(&&*name) {
            return Ok(None);
        }
        let info = read_info(&self.infos, number.as_c_str(), &mut buffers.info).map_err(failed("its fdinfo"))?;
        let flags = AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
        let stat = match name.first() {
            Some(b'/') => Some(statx(&self.links, number.as_c_str(), flags, STATX).map_err(failed("its inode"))?),
            _ => None,
        };
        Ok(Some(Shown { fd, name: name.to_vec(), info: info.to_owned(), stat }))
    }
}

/// Room for what the kernel says, used again for every descriptor.
struct Buffers {
    link: Vec<MaybeUninit<u8>>,
    info: Vec<u8>,
}

impl Buffers {
    fn new() -> Self {
        Self { link: vec![MaybeUninit::uninit(); PATH_MAX], info: vec![0; PATH_MAX] }
    }
}

/// The entries of a directory that are numbers, ascending.
fn numbers(directory: &OwnedFd) -> rustix::io::Result<Vec<u32>> {
    let mut buffer = Vec::with_capacity(32 << 10);
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    let mut numbers = Vec::new();
    while let Some(entry) = entries.next() {
        if let Some(number) = entry?.file_name().to_str().ok().and_then(|name| name.parse().ok()) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads an fdinfo file into `buffer`, which grows when an epoll instance has much to say.
fn read_info<'a>(directory: impl AsFd, number: &CStr, buffer: &'a mut Vec<u8>) -> rustix::io::Result<&'a str> {
    let file = openat(directory, number, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut len = 0;
    loop {
        // fdinfo is one record of a sequence file: a reading that leaves room has all of it (fs/seq_file.c).
        len += rustix::io::read(&file, &mut buffer[len..])?;
        if len < buffer.len() {
            break;
        }
        buffer.resize(buffer.len() * 2, 0);
    }
    std::str::from_utf8(&buffer[..len]).map_err(|_| Errno::ILSEQ)
}
