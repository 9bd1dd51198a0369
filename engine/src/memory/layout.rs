//! The mappings of an address space, as `mm-PID.img` has them and as mmap(2) makes them.
//!
//! Invariants of a [`Layout`]: mappings are aligned to pages, ascend and do not overlap, and lie below
//! [`ADDRESS_END`]; what cannot be made is refused in [`Layout::decode`], before anything exists.

use std::collections::HashMap;
use std::ops::Range;

use crate::images::mm::{MmEntry, VmaEntry, vma_status};
use crate::memory::mappings::MAP_DROPPABLE;
use crate::sys::PAGE_SIZE;

/// First address that no task maps (47 bits, arch/x86/include/asm/page_64_types.h; Linux gives higher ones only to
/// those who ask for them, and those are refused).
pub const ADDRESS_END: u64 = 0x7fff_ffff_f000;

/// Bits of [`Mapping::advice`]: `1 << MADV_*`.
pub mod advice {
    /// `MADV_DONTFORK`.
    pub const DONTFORK: u64 = 1 << libc::MADV_DONTFORK;
    /// `MADV_WIPEONFORK`.
    pub const WIPEONFORK: u64 = 1 << libc::MADV_WIPEONFORK;
    /// `MADV_HUGEPAGE`.
    pub const HUGEPAGE: u64 = 1 << libc::MADV_HUGEPAGE;
    /// `MADV_NOHUGEPAGE`.
    pub const NOHUGEPAGE: u64 = 1 << libc::MADV_NOHUGEPAGE;
    /// All that a mapping can have.
    pub const KNOWN: u64 = DONTFORK
        | WIPEONFORK
        | HUGEPAGE
        | NOHUGEPAGE
        | 1 << libc::MADV_RANDOM
        | 1 << libc::MADV_SEQUENTIAL
        | 1 << libc::MADV_MERGEABLE
        | 1 << libc::MADV_DONTDUMP;
}

/// What a mapping shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private memory of no file.
    Anonymous,
    /// A file, by its number in the image set.
    File {
        /// The description in `files.img`.
        id: u32,
        /// `MAP_SHARED`.
        shared: bool,
        /// `O_*` access mode that the mapping needs of its description.
        access: u32,
    },
    /// A nameless file in memory: what relatives share (`MAP_SHARED | MAP_ANONYMOUS`), or a memfd_create(2).
    Shared {
        /// Number in `pagemap-shmem-N.img`.
        shmid: u64,
        /// `MAP_PRIVATE`, which only a memfd can be.
        private: bool,
    },
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Addresses.
    pub range: Range<u64>,
    /// What it shows.
    pub backing: Backing,
    /// Where in that, in bytes.
    pub offset: u64,
    /// `PROT_*`.
    pub protection: u32,
    /// `MAP_*` beyond sharing: `MAP_GROWSDOWN`, `MAP_NORESERVE`, `MAP_DROPPABLE`, `MAP_HUGETLB` and its size.
    pub flags: u32,
    /// Whether mlock(2) holds it in memory.
    pub locked: bool,
    /// `1 << MADV_*` of every advice in force.
    pub advice: u64,
}

impl Mapping {
    /// Whether its pages can be the task's own.
    pub fn is_private(&self) -> bool {
        matches!(
            self.backing,
            Backing::Anonymous | Backing::File { shared: false, .. } | Backing::Shared { private: true, .. }
        )
    }

    /// `flags` of the mmap(2) that makes it, but for the placement.
    pub fn map_flags(&self) -> u32 {
        let sharing = match self.backing {
            Backing::Anonymous if self.flags & MAP_DROPPABLE != 0 => libc::MAP_ANONYMOUS,
            Backing::Anonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            _ if self.is_private() => libc::MAP_PRIVATE,
            _ => libc::MAP_SHARED,
        };
        // A huge page file is one by itself; these flags are for anonymous memory.
        let others =
            if self.backing == Backing::Anonymous { 0 } else { libc::MAP_HUGETLB as u32 | HUGE_SIZE | MAP_DROPPABLE };
        sharing as u32 | self.flags & !others
    }

    /// Whether `other`, in the parent, becomes part of this mapping by fork(2), wherever both overlap.
    pub fn inherits(&self, other: &Self) -> bool {
        self.backing == other.backing
            && self.flags == other.flags
            && self.advice == other.advice
            && other.advice & (advice::DONTFORK | advice::WIPEONFORK) == 0
            && (self.backing == Backing::Anonymous
                || self.offset.wrapping_sub(self.range.start) == other.offset.wrapping_sub(other.range.start))
    }
}

/// The bits of mmap(2)'s flags that say the size of huge pages.
const HUGE_SIZE: u32 = 0x3f << 26;
const KEPT_FLAGS: u32 =
    (libc::MAP_GROWSDOWN | libc::MAP_NORESERVE | libc::MAP_HUGETLB) as u32 | MAP_DROPPABLE | HUGE_SIZE;

/// The mappings of a task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// All mappings but those that the kernel provides.
    pub mappings: Vec<Mapping>,
    /// Ranges of `MADV_GUARD_INSTALL`.
    pub guards: Vec<Range<u64>>,
    /// `[vdso]`.
    pub vdso: Option<Range<u64>>,
    /// The data pages in front of it: `[vvar]` and its like, joined.
    pub vvar: Option<Range<u64>>,
}

impl Layout {
    /// Takes the mappings out of `mm-PID.img`. `memfds` has the memory number of each description of a memfd: CRIU 4 writes
    /// shared anonymous memory as such, too.
    ///
    /// # Errors
    /// A sentence about the first mapping that is damaged or of a kind that is not restored.
    pub fn decode(mm: &MmEntry, memfds: &HashMap<u32, u64>) -> Result<Self, String> {
        let mut layout = Self::default();
        let mut end = 0;
        for vma in &mm.vmas {
            let range = vma.start..vma.end;
            if vma.status & (vma_status::VSYSCALL | vma_status::UPROBES) != 0 {
                continue;
            }
            let refuse = |what: &str| Err(format!("mapping {:x}-{:x}: {what}", range.start, range.end));
            let aligned = [range.start, range.end, vma.pgoff].iter().all(|value| value.is_multiple_of(PAGE_SIZE));
            let reach = vma.pgoff.checked_add(vma.end.saturating_sub(vma.start));
            let reaches = reach.is_none_or(|reach| reach > i64::MAX as u64);
            if !aligned || range.is_empty() || range.end > ADDRESS_END || reaches {
                return refuse("not a range of pages that a task can have: the image is damaged");
            }
            if vma.status & vma_status::GUARD != 0 {
                layout.guards.push(range);
                continue;
            }
            if range.start < end {
                return refuse("overlaps the one before: the image is damaged");
            }
            end = range.end;
            if vma.status & vma_status::VDSO != 0 {
                layout.vdso = Some(range);
            } else if vma.status & vma_status::VVAR != 0 {
                layout.vvar = match layout.vvar.take() {
                    Some(before) if before.end == range.start => Some(before.start..range.end),
                    Some(_) => return refuse("the kernel's data pages are apart: not supported"),
                    None => Some(range),
                };
            } else {
                layout.mappings.push(decode_mapping(vma, memfds)?);
            }
        }
        Ok(layout)
    }

    /// All ranges in use, in no order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let kernels = self.vdso.iter().chain(&self.vvar).cloned();
        self.mappings.iter().map(|mapping| mapping.range.clone()).chain(kernels)
    }

    /// The mapping that contains `address`.
    pub fn mapping_at(&self, address: u64) -> Option<&Mapping> {
        let after = self.mappings.partition_point(|mapping| mapping.range.end <= address);
        self.mappings.get(after).filter(|mapping| mapping.range.contains(&address))
    }
}

fn decode_mapping(vma: &VmaEntry, memfds: &HashMap<u32, u64>) -> Result<Mapping, String> {
    let refuse = |what: &str| Err(format!("mapping {:x}-{:x}: {what}", vma.start, vma.end));
    let unsupported = [
        (vma_status::AIORING, "a ring of io_setup(2)"),
        (vma_status::SOCKET, "a mapped socket ring"),
        (vma_status::SHADOW_STACK, "a shadow stack"),
        (vma_status::SYSVIPC, "a System V shared memory segment"),
    ];
    for (bit, name) in unsupported {
        if vma.status & bit != 0 {
            return refuse(&format!("{name} cannot be restored yet"));
        }
    }
    let file = |shared: bool| match u32::try_from(vma.shmid) {
        Ok(id) => Ok(match memfds.get(&id) {
            Some(shmid) => Backing::Shared { shmid: *shmid, private: !shared },
            None => Backing::File { id, shared, access: file_access(vma, shared) },
        }),
        Err(_) => Err(format!("mapping {:x}-{:x}: it names no file: the image is damaged", vma.start, vma.end)),
    };
    let backing = if vma.status & vma_status::FILE_PRIVATE != 0 {
        file(false)?
    } else if vma.status & vma_status::FILE_SHARED != 0 {
        file(true)?
    } else if vma.status & vma_status::ANON_SHARED != 0 {
        Backing::Shared { shmid: vma.shmid, private: false }
    } else if vma.status & vma_status::ANON_PRIVATE != 0 {
        Backing::Anonymous
    } else {
        return refuse("of no kind that this version knows");
    };
    let protections = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u32;
    if vma.prot & !protections != 0 {
        return refuse("unknown protection bits: the image is damaged");
    }
    let unknown = vma.madv.unwrap_or(0) & !advice::KNOWN;
    if unknown != 0 {
        return refuse(&format!("advice {unknown:#x} is unknown to this version"));
    }
    Ok(Mapping {
        range: vma.start..vma.end,
        backing,
        offset: if backing == Backing::Anonymous { 0 } else { vma.pgoff },
        protection: vma.prot,
        flags: vma.flags & KEPT_FLAGS,
        locked: vma.flags & libc::MAP_LOCKED as u32 != 0,
        advice: vma.madv.unwrap_or(0),
    })
}

/// Access mode for the open(2) of a mapping's file: what was recorded, else what the mapping needs.
fn file_access(vma: &VmaEntry, shared: bool) -> u32 {
    let writable = shared && vma.prot & libc::PROT_WRITE as u32 != 0;
    match vma.fdflags {
        Some(flags) => flags & libc::O_ACCMODE as u32,
        None if writable => libc::O_RDWR as u32,
        None => libc::O_RDONLY as u32,
    }
}

/// Removes `holes`, which are sorted, from `range`.
pub fn subtract(range: Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut start = range.start;
    let first = holes.partition_point(|hole| hole.end <= range.start);
    for hole in &holes[first..] {
        if hole.start >= range.end {
            break;
        }
        if hole.start > start {
            left.push(start..hole.start);
        }
        start = start.max(hole.end);
    }
    if start < range.end {
        left.push(start..range.end);
    }
    left
}

/// The lowest range of `length` bytes at or above `from` that touches none of `used` (in any order), with a free margin on both sides.
pub fn free_range(used: impl IntoIterator<Item = Range<u64>>, from: u64, length: u64) -> Option<Range<u64>> {
    // A stack that grows down keeps 256 pages free below it (`stack_guard_gap`).
    const MARGIN: u64 = 512 * PAGE_SIZE;
    let mut used: Vec<_> = used.into_iter().collect();
    used.sort_by_key(|range| range.start);
    let mut start = from;
    for range in used {
        if range.start.saturating_sub(MARGIN) >= start.checked_add(length)? {
            break;
        }
        start = start.max(range.end.checked_add(MARGIN)?);
    }
    let end = start.checked_add(length)?;
    (end <= ADDRESS_END).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64, status: u32) -> VmaEntry {
        VmaEntry { start, end, status, prot: 3, flags: 0x22, fd: -1, ..VmaEntry::default() }
    }

    fn decode(vmas: Vec<VmaEntry>) -> Result<Layout, String> {
        Layout::decode(&MmEntry { vmas, ..MmEntry::default() }, &HashMap::new())
    }

    #[test]
    fn kernel_mappings_are_apart_from_the_others() {
        let layout = decode(vec![
            vma(0x1000, 0x3000, vma_status::REGULAR | vma_status::ANON_PRIVATE),
            vma(0x5000, 0x9000, vma_status::ANON_PRIVATE | vma_status::VVAR),
            vma(0x9000, 0xb000, vma_status::ANON_PRIVATE | vma_status::VVAR),
            vma(0xb000, 0xd000, vma_status::ANON_PRIVATE | vma_status::VDSO),
            vma(0xffff_ffff_ff60_0000, 0xffff_ffff_ff60_1000, vma_status::VSYSCALL),
        ])
        .unwrap();
        assert_eq!(layout.mappings.len(), 1);
        assert_eq!((layout.vvar.clone(), layout.vdso.clone()), (Some(0x5000..0xb000), Some(0xb000..0xd000)));
        assert!(layout.mapping_at(0x2fff).is_some() && layout.mapping_at(0x3000).is_none());
    }

    #[test]
    fn damaged_and_unsupported_mappings_are_refused_by_address() {
        let regular = vma_status::REGULAR | vma_status::ANON_PRIVATE;
        for bad in [
            vec![vma(0x1000, 0x1000, regular)],
            vec![vma(0x1001, 0x2000, regular)],
            vec![vma(0x1000, 1 << 48, regular)],
            vec![vma(0x1000, 0x3000, regular), vma(0x2000, 0x4000, regular)],
            vec![vma(0x1000, 0x3000, regular | vma_status::AIORING)],
            vec![vma(0x1000, 0x3000, vma_status::REGULAR)],
            vec![VmaEntry { pgoff: u64::MAX - 0xfff, ..vma(0x1000, 0x3000, regular) }],
        ] {
            let error = decode(bad.clone()).unwrap_err();
            assert!(error.contains(&format!("{:x}-", bad[bad.len() - 1].start)), "{error}");
        }
    }

    #[test]
    fn ranges_are_subtracted_and_free_ones_found() {
        assert_eq!(subtract(0..10, &[]), [0..10]);
        assert_eq!(subtract(2..10, &[0..3, 5..6, 9..20]), [3..5, 6..9]);
        assert_eq!(subtract(2..10, &[0..20]), []);
        let margin = 512 * PAGE_SIZE;
        assert_eq!(free_range([0x1000..0x2000], 0x1000, 0x1000), Some(0x2000 + margin..0x3000 + margin));
        assert_eq!(free_range([0..ADDRESS_END], 0x1000, 0x1000), None);
        let far = 1 << 40;
        assert_eq!(free_range([far..far + 0x1000], 0x1000, 0x1000), Some(0x1000..0x2000));
    }
}
