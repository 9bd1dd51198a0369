//! A process's mappings, as `/proc/PID/smaps` tells them (proc_pid_smaps(5)).
//!
//! `smaps` is the only place that shows the advice and locks of a mapping (`VmFlags`, Linux 3.8). A mapping that
//! cannot be made again is kept with the reason, so that preflight can name them all.

use std::io;
use std::ops::Range;

use crate::error::Refusal;
use crate::images::mm::{VmaEntry, vma_status};
use crate::procfs;
use crate::sys::HostPid;
use crate::tree::TaskRef;

/// What a mapping is, as far as saving it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private memory of no file: heap and stack included.
    AnonymousPrivate,
    /// Memory shared by inheritance, backed by a nameless file of the kernel's tmpfs.
    AnonymousShared,
    /// A private view of a file.
    FilePrivate,
    /// A shared view of a file.
    FileShared,
    /// The kernel's code for programs.
    Vdso,
    /// The kernel's data for that code; `[vvar]`, `[vvar_vclock]`.
    Vvar,
    /// The fixed page at the end of the address space.
    Vsyscall,
    /// Something that cannot be saved, and why.
    Unsupported(&'static str),
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First and last-plus-one byte.
    pub range: Range<u64>,
    /// `PROT_*` bits.
    pub protection: u32,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Device of the file, major and minor.
    pub device: (u32, u32),
    /// Inode of the file; for anonymous shared memory this names the object.
    pub inode: u64,
    /// What the kernel prints behind the numbers, with ` (deleted)` if so.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// `MAP_*` flags beyond private, shared and anonymous.
    flags: u32,
    /// Bit N for `MADV_` number N.
    advice: u64,
    /// Whether mprotect(2) may make it writable: for a shared view, whether its file was opened for writing.
    may_write: bool,
    /// Whether a userfaultfd has its writes noticed, which is ferry's own doing if a keeper knows of it ([`crate::track`]).
    pub writes_tracked: bool,
    /// Whether guard regions were installed in it (`MADV_GUARD_INSTALL`, Linux 6.13).
    pub has_guards: bool,
}

const MAP_HUGE_SHIFT: u32 = 26;
/// Of mmap(2), since Linux 6.11: memory that the kernel may take away, and that takes the place of `MAP_PRIVATE`.
pub const MAP_DROPPABLE: u32 = 0x8;

/// The name of memory of the pool of huge pages: the kernel's files are deleted from the start.
const HUGE_PAGES: &str = "/anon_hugepage (deleted)";

/// Why memory of a userfaultfd is refused.
const WATCHED: &str = "it is watched by a userfaultfd, which cannot be saved";

impl Mapping {
    /// Whether it holds code.
    pub fn is_executable(&self) -> bool {
        self.protection & libc::PROT_EXEC as u32 != 0
    }

    /// Whether it is anonymous memory of the pool of huge pages (`MAP_HUGETLB`).
    pub fn is_of_huge_pages(&self) -> bool {
        self.name.starts_with(HUGE_PAGES)
    }

    /// Whether both are of one file, by what the kernel calls it.
    pub fn is_of_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode) && self.name == other.name
    }

    /// Whether `range` shows private pages, which `pagemap-PID.img` lists. Pages of `MAP_DROPPABLE` are none: whoever has
    /// such memory has to expect that it is empty, and it holds what shall be nowhere else (random(4)'s state).
    pub fn has_private_pages(&self) -> bool {
        matches!(self.kind, Kind::AnonymousPrivate | Kind::FilePrivate) && self.flags & MAP_DROPPABLE == 0
    }

    /// The entry of `mm-PID.img`; `shmid` as [`VmaEntry`] defines it.
    pub fn dump(&self, shmid: u64) -> VmaEntry {
        use vma_status::{ANON_PRIVATE, ANON_SHARED, FILE_PRIVATE, FILE_SHARED, HEAP, REGULAR, VDSO, VSYSCALL, VVAR};
        let anonymous = libc::MAP_ANONYMOUS as u32;
        let (private, shared) = (libc::MAP_PRIVATE as u32, libc::MAP_SHARED as u32);
        let (mut status, flags) = match self.kind {
            Kind::AnonymousPrivate if self.flags & MAP_DROPPABLE != 0 => (REGULAR | ANON_PRIVATE, anonymous),
            Kind::AnonymousPrivate => (REGULAR | ANON_PRIVATE, private | anonymous),
            Kind::AnonymousShared => (REGULAR | ANON_SHARED, shared | anonymous),
            Kind::FilePrivate => (REGULAR | FILE_PRIVATE, private),
            Kind::FileShared => (REGULAR | FILE_SHARED, shared),
            Kind::Vdso => (REGULAR | VDSO | ANON_PRIVATE, private | anonymous),
            Kind::Vvar => (REGULAR | VVAR | ANON_PRIVATE, private | anonymous),
            Kind::Vsyscall => (VSYSCALL | ANON_PRIVATE, private | anonymous),
            Kind::Unsupported(_) => (0, 0),
        };
        if self.name == "[heap]" {
            status |= HEAP;
        }
        VmaEntry {
            start: self.range.start,
            end: self.range.end,
            pgoff: self.offset,
            shmid,
            prot: self.protection,
            flags: flags | self.flags,
            status,
            fd: -1,
            madv: (self.advice != 0).then_some(self.advice),
            fdflags: match self.kind {
                Kind::FileShared if self.may_write => Some(libc::O_RDWR as u32),
                Kind::FileShared | Kind::FilePrivate => Some(libc::O_RDONLY as u32),
                _ => None,
            },
        }
    }

    fn parse_head(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
        let permissions = fields.next()?.as_bytes();
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        let rest = fields.next()?;
        // The inode and the name are set apart by padding.
        let (inode, name) = match fields.next() {
            Some(name) => (rest.parse().ok()?, name.trim_start().replace("\\012", "\n")),
            None => (rest.parse().ok()?, String::new()),
        };
        let mut protection = 0;
        for (index, bit) in [libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC].into_iter().enumerate() {
            if *permissions.get(index)? != b'-' {
                protection |= bit as u32;
            }
        }
        let shared = *permissions.get(3)? == b's';
        let kind = classify(&name, shared, inode);
        Some(Self {
            range,
            protection,
            // The kernel shows an anonymous mapping's page offset too; it means nothing.
            offset: if matches!(kind, Kind::AnonymousPrivate) { 0 } else { offset },
            device,
            inode,
            name,
            kind,
            flags: 0,
            advice: 0,
            may_write: false,
            writes_tracked: false,
            has_guards: false,
        })
    }

    fn parse_vm_flags(&mut self, flags: &str, page_size_kib: u64) {
        let of_kernel = matches!(self.kind, Kind::Vvar | Kind::Vdso | Kind::Vsyscall);
        let mut refuse = |why| self.kind = Kind::Unsupported(why);
        for flag in flags.split_ascii_whitespace() {
            match flag {
                "gd" => self.flags |= libc::MAP_GROWSDOWN as u32,
                "lo" => self.flags |= libc::MAP_LOCKED as u32,
                "dp" => self.flags |= MAP_DROPPABLE,
                "nr" => self.flags |= libc::MAP_NORESERVE as u32,
                "ht" => {
                    let shift = (page_size_kib << 10).trailing_zeros();
                    self.flags |= libc::MAP_HUGETLB as u32 | shift << MAP_HUGE_SHIFT;
                }
                "rr" => self.advice |= 1 << libc::MADV_RANDOM,
                "sr" => self.advice |= 1 << libc::MADV_SEQUENTIAL,
                "dc" => self.advice |= 1 << libc::MADV_DONTFORK,
                "mg" => self.advice |= 1 << libc::MADV_MERGEABLE,
                "hg" => self.advice |= 1 << libc::MADV_HUGEPAGE,
                "nh" => self.advice |= 1 << libc::MADV_NOHUGEPAGE,
                "dd" => self.advice |= 1 << libc::MADV_DONTDUMP,
                "wf" => self.advice |= 1 << libc::MADV_WIPEONFORK,
                "mw" => self.may_write = true,
                "gu" => self.has_guards = true,
                "um" | "ui" => refuse(WATCHED),
                "uw" => self.writes_tracked = true,
                "ss" => refuse("it is a shadow stack, which cannot be saved yet"),
                "io" | "pf" if !of_kernel => {
                    refuse("it shows a device's memory, which cannot be saved");
                }
                _ => {}
            }
        }
        // The kernel's own mappings carry flags that nobody asked for.
        if of_kernel {
            (self.flags, self.advice) = (0, 0);
        }
    }
}

fn classify(name: &str, shared: bool, inode: u64) -> Kind {
    // Its inode is its identifier, which is 0 for the first (ipc/shm.c).
    if name.starts_with("/SYSV") && name.ends_with(" (deleted)") {
        return Kind::Unsupported("it is a System V segment, which cannot be saved yet");
    }
    if inode == 0 {
        return match name {
            "[vdso]" => Kind::Vdso,
            "[vvar]" | "[vvar_vclock]" => Kind::Vvar,
            "[vsyscall]" => Kind::Vsyscall,
            "[uprobes]" => Kind::Unsupported("it holds a debugger's breakpoints; remove the uprobes"),
            _ if shared => Kind::Unsupported("it is shared memory of a kind that ferry does not know"),
            _ => Kind::AnonymousPrivate,
        };
    }
    if name.starts_with("anon_inode:") || name.starts_with("/anon_inode:") {
        return Kind::Unsupported(
            "it shows an object of the kernel (io_uring, perf, bpf …), which cannot be saved yet",
        );
    }
    if name.starts_with("/memfd:") {
        return Kind::Unsupported("it is a mapped memfd, which cannot be saved yet");
    }
    if name.starts_with("/[aio]") {
        return Kind::Unsupported("it is an asynchronous I/O ring (io_setup), which cannot be saved yet");
    }
    if name.starts_with("socket:") {
        return Kind::Unsupported("it is a socket's ring, which cannot be saved yet");
    }
    match (name, shared) {
        (name, false) if name.starts_with(HUGE_PAGES) => Kind::AnonymousPrivate,
        (name, true) if name.starts_with(HUGE_PAGES) => {
            Kind::Unsupported("it is shared memory of huge pages, which cannot be saved yet")
        }
        (name, true) if name == "/dev/zero (deleted)" || name.starts_with("[anon_shmem:") => Kind::AnonymousShared,
        (_, true) => Kind::FileShared,
        (_, false) => Kind::FilePrivate,
    }
}

/// Reads the mappings of a process, in address order.
///
/// # Errors
/// Those of reading `smaps`; `InvalidData` when the kernel writes something else.
pub fn collect(pid: HostPid) -> io::Result<Vec<Mapping>> {
    let text = procfs::read(format!("/proc/{pid}/smaps"))?;
    parse(&String::from_utf8_lossy(&text))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/smaps is not as proc(5) says")))
}

/// Reads the mappings without advice and locks, from `/proc/PID/maps`: that walks no page tables, so that it costs a
/// running process nothing.
///
/// # Errors
/// As [`collect`].
pub fn collect_names(pid: HostPid) -> io::Result<Vec<Mapping>> {
    let text = procfs::read(format!("/proc/{pid}/maps"))?;
    parse(&String::from_utf8_lossy(&text))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/maps is not as proc(5) says")))
}

/// Where code is, the vdso's first: nobody changes that.
pub fn code(mappings: &[Mapping]) -> impl Iterator<Item = &Mapping> + Clone {
    let of_kind = |is_vdso: bool| {
        let wanted = move |mapping: &&Mapping| {
            mapping.is_executable() && mapping.kind != Kind::Vsyscall && (mapping.kind == Kind::Vdso) == is_vdso
        };
        mappings.iter().filter(wanted)
    };
    of_kind(true).chain(of_kind(false))
}

/// Marks the mappings whose writes somebody other than ferry tracks.
pub fn refuse_tracked(mappings: &mut [Mapping]) {
    for mapping in mappings.iter_mut().filter(|mapping| mapping.writes_tracked) {
        mapping.kind = Kind::Unsupported(WATCHED);
    }
}

/// Why `mapping` keeps its process from being saved, if it does.
pub fn refusal(task: &TaskRef, mapping: &Mapping) -> Option<Refusal> {
    let Kind::Unsupported(problem) = mapping.kind else { return None };
    let Range { start, end } = mapping.range;
    let name = if mapping.name.is_empty() { "nameless" } else { &mapping.name };
    Some(task.refuse(
        format!("mapping {start:x}-{end:x}, {name}"),
        problem,
        "end the process, or have it unmap this first",
    ))
}

fn parse(text: &str) -> Option<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    let mut page_size_kib = 4;
    for line in text.lines() {
        // Attribute lines start with a capital letter, heads with a hexadecimal digit in lower case.
        if !line.as_bytes().first()?.is_ascii_uppercase() {
            let mapping = Mapping::parse_head(line)?;
            match mappings.last_mut() {
                // Linux 6.13 shows the kernel's data in two parts. Images hold one: CRIU compares its size with its own, and
                // makes detours in the code where they differ.
                Some(last)
                    if [&last.kind, &mapping.kind] == [&Kind::Vvar; 2] && last.range.end == mapping.range.start =>
                {
                    last.range.end = mapping.range.end;
                }
                _ => mappings.push(mapping),
            }
        } else if let Some(size) = line.strip_prefix("KernelPageSize:") {
            page_size_kib = size.trim().trim_end_matches(" kB").parse().ok()?;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            mappings.last_mut()?.parse_vm_flags(flags, page_size_kib);
        }
    }
    Some(mappings)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00452000 r-xp 00001000 08:02 173521      /usr/bin/a b (deleted)
KernelPageSize:        4 kB
VmFlags: rd ex mr mw me sd
7f0000000000-7f0000200000 rw-s 00000000 00:01 99                         /dev/zero (deleted)
KernelPageSize:        4 kB
VmFlags: rd wr sh mr mw me ms dc lo
7f0000200000-7f0000400000 rw-p 7f0000200 00:00 0\u{20}
KernelPageSize:        4 kB
VmFlags: rd wr mr mw me ac hg
7f0000400000-7f0000402000 rw-p 00000000 00:00 0\u{20}
KernelPageSize:        4 kB
VmFlags: rd wr mr mw me nr wf dd dp
7ffff7fc1000-7ffff7fc5000 r--p 00000000 00:00 0                          [vvar]
KernelPageSize:        4 kB
VmFlags: rd mr pf io de dd sd
7ffff7fc5000-7ffff7fc7000 r--p 00000000 00:00 0                          [vvar_vclock]
KernelPageSize:        4 kB
VmFlags: rd mr pf io de dd sd
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
KernelPageSize:        4 kB
VmFlags: ex
";

    #[test]
    fn kinds_flags_and_names() {
        let mappings = parse(SMAPS).expect("parses");
        assert_eq!(mappings.len(), 6);
        assert_eq!(
            (mappings[4].kind.clone(), mappings[4].range.clone()),
            (Kind::Vvar, 0x7fff_f7fc_1000..0x7fff_f7fc_7000)
        );
        assert_eq!((mappings[0].kind.clone(), mappings[0].offset), (Kind::FilePrivate, 0x1000));
        assert_eq!(mappings[0].dump(3).fdflags, Some(libc::O_RDONLY as u32));
        assert_eq!(mappings[0].name, "/usr/bin/a b (deleted)");
        let shared = mappings[1].dump(99);
        assert_eq!(shared.status, vma_status::REGULAR | vma_status::ANON_SHARED);
        assert_eq!(shared.flags, (libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_LOCKED) as u32);
        assert_eq!(shared.madv, Some(1 << libc::MADV_DONTFORK));
        assert_eq!((mappings[2].kind.clone(), mappings[2].offset), (Kind::AnonymousPrivate, 0));
        assert_eq!(mappings[2].dump(0).madv, Some(1 << libc::MADV_HUGEPAGE));
        let droppable = (MAP_DROPPABLE as i32 | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u32;
        assert_eq!((mappings[3].dump(0).flags, mappings[3].has_private_pages()), (droppable, false));
        assert_eq!(mappings[4].dump(0).madv, None);
        assert_eq!(mappings[5].kind, Kind::Vsyscall);
    }

    #[test]
    fn what_cannot_be_saved_says_why() {
        for name in ["anon_inode:[io_uring]", "/SYSV00000000 (deleted)", "/memfd:x (deleted)", "/[aio] (deleted)"] {
            assert!(matches!(classify(name, true, 7), Kind::Unsupported(_)), "{name}");
        }
        assert_eq!(classify("/tmp/memfd:x", true, 7), Kind::FileShared);
        let first = classify("/SYSV00000000 (deleted)", true, 0);
        assert!(matches!(first, Kind::Unsupported(problem) if problem.contains("System V")));
    }

    #[test]
    fn damaged_text_is_no_panic() {
        for length in 0..SMAPS.len() {
            let _ = parse(&SMAPS[..length]);
        }
    }
}
