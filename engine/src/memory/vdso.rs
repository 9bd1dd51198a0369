//! The kernel's code and data in every task: `[vdso]` and the data pages in front of it (vdso(7)).
//!
//! The kernel maps them into ferry at execve(2), every clone of ferry has them, and mremap(2) moves them to where
//! the images had them; the kernel notes the move of `[vdso]` for its own use. They cannot be made in any other way, so a task
//! that was saved under another vdso is refused: its saved return addresses and function pointers would lead astray.

use std::ops::Range;

use crate::agent::arch;
use crate::sys::{HostPid, PAGE_SIZE, RemoteAddr, process_vm};

use super::layout::Layout;

/// The vdso of ferry, which is that of the running kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vdso {
    /// Its mappings, from the first data page to the last of the code, without gaps.
    pub parts: Vec<Range<u64>>,
    /// The last of them: the code.
    pub code: Range<u64>,
    /// What the code is.
    pub content: Vec<u8>,
    /// Where a system call instruction is, from the start of the code.
    pub syscall_at: u64,
}

impl Vdso {
    /// Finds it in this process.
    ///
    /// # Errors
    /// A sentence when the kernel has none, or has it otherwise than is known.
    pub fn collect() -> Result<Self, String> {
        let maps = std::fs::read_to_string("/proc/self/maps").map_err(|error| format!("/proc/self/maps: {error}"))?;
        let parts = parse(&maps);
        let code = parts.last().cloned().ok_or("this kernel maps no vdso, which tasks need to be restored")?;
        if parts.windows(2).any(|pair| pair[0].end != pair[1].start) {
            return Err("this kernel maps the vdso and its data apart, which is not supported".into());
        }
        let mut content = vec![0; (code.end - code.start) as usize];
        let me = HostPid(std::process::id() as i32);
        process_vm::read(me, std::slice::from_ref(&code), &mut content)
            .map_err(|errno| format!("cannot read the vdso: {errno}"))?;
        let syscall_at = content
            .windows(arch::SYSCALL_INSTRUCTION.len())
            .position(|bytes| bytes == arch::SYSCALL_INSTRUCTION)
            .ok_or("the vdso of this kernel has no system call instruction")? as u64;
        Ok(Self { parts, code, content, syscall_at })
    }

    /// Bytes of all parts.
    pub fn length(&self) -> u64 {
        self.code.end - self.parts[0].start
    }

    /// Where all of it goes so that it is as in `layout`; none if the task had none.
    ///
    /// # Errors
    /// A sentence when the task's was another one. `saved` is the code that the image holds, if it does.
    pub fn place(&self, layout: &Layout, saved: Option<&[u8]>) -> Result<Option<u64>, String> {
        let differs = |what: &str| {
            format!(
                "the images were made under a kernel whose vdso has {what}: restore them under the kernel that they were made under"
            )
        };
        let Some(code) = &layout.vdso else {
            return if layout.vvar.is_none() { Ok(None) } else { Err(differs("data but no code in this task")) };
        };
        let data = layout.vvar.clone().unwrap_or(code.start..code.start);
        let start = code.start.wrapping_sub(self.code.start - self.parts[0].start);
        if code.end - code.start != self.code.end - self.code.start || data != (start..code.start) {
            let kib = |range: &Range<u64>| (range.end - range.start) / 1024;
            return Err(differs(&format!(
                "{} KiB of code behind {} KiB of data, here it is {} behind {}",
                kib(code),
                kib(&data),
                kib(&self.code),
                kib(&(self.parts[0].start..self.code.start))
            )));
        }
        match saved {
            Some(saved) if saved != self.content => Err(differs("other code")),
            _ => Ok(Some(start)),
        }
    }

    /// The arguments of the mremap(2) of each part, which move all of it from `from` to `to`.
    ///
    /// Source and target must not overlap; move through a third place if they do.
    pub fn moves(&self, from: u64, to: u64) -> Vec<[u64; 5]> {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let start = self.parts[0].start;
        let arguments = |part: &Range<u64>| {
            let (skip, length) = (part.start - start, part.end - part.start);
            [from + skip, length, length, flags, to + skip]
        };
        self.parts.iter().map(arguments).collect()
    }

    /// A system call instruction, when all of it starts at `start`.
    pub fn syscall_instruction(&self, start: u64) -> RemoteAddr {
        RemoteAddr(start + (self.code.start - self.parts[0].start) + self.syscall_at)
    }
}

fn parse(maps: &str) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    for line in maps.lines() {
        let name = line.rsplit(' ').next().unwrap_or_default();
        if !name.starts_with("[vvar") && name != "[vdso]" {
            continue;
        }
        let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) else { continue };
        if let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) {
            parts.push(start..end);
        }
        if name == "[vdso]" {
            break;
        }
    }
    parts
}

/// The length to set aside for moving a vdso about.
pub const PARKING: u64 = 64 * PAGE_SIZE;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_own_vdso_and_places_it_where_it_was() {
        let vdso = Vdso::collect().unwrap();
        assert!(vdso.content.starts_with(b"\x7fELF"));
        assert!(vdso.length() <= PARKING);
        let here = Layout {
            vdso: Some(vdso.code.clone()),
            vvar: Some(vdso.parts[0].start..vdso.code.start),
            ..Layout::default()
        };
        assert_eq!(vdso.place(&here, Some(&vdso.content)), Ok(Some(vdso.parts[0].start)));
        assert_eq!(vdso.place(&Layout::default(), None), Ok(None));
        let mut longer = here.clone();
        longer.vdso = Some(vdso.code.start..vdso.code.end + PAGE_SIZE);
        assert!(vdso.place(&longer, None).unwrap_err().contains("KiB"));
        let mut other = vdso.content.clone();
        other[100] ^= 1;
        assert!(vdso.place(&here, Some(&other)).unwrap_err().contains("other code"));
    }

    #[test]
    fn only_the_kernels_mappings_count() {
        let maps = "7f00-7f10 r--p 00000000 00:00 0    [vvar]\n7f10-7f20 r--p 00000000 00:00 0 [vvar_vclock]\n\
                    7f20-7f30 r-xp 00000000 00:00 0 [vdso]\n8000-9000 r--p 00000000 fe:00 7 /x [vvar] y\n";
        assert_eq!(parse(maps), [0x7f00..0x7f10, 0x7f10..0x7f20, 0x7f20..0x7f30]);
    }
}
