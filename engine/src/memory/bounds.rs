//! Where the parts of a program lie in its memory, its auxiliary vector, and the switches of the whole address space.
//!
//! proc_pid_stat(5) tells the bounds to whoever may trace the process; the current break, and what prctl(2)
//! holds for the address space, have to be asked from inside.
//!
//! `PR_SET_MM_MAP` (prctl(2), Linux 3.18) sets all of it at once and needs no `CAP_SYS_RESOURCE`, unlike the single settings;
//! for the executable, `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN` in the user namespace. The old executable must not be
//! mapped any more.

use std::io;

use crate::images::mm::MmEntry;
use crate::procfs::{self, MemoryBounds};
use crate::sys::HostPid;
use crate::task::identity::ProcessSettings;

/// The entry of `mm-PID.img`, still without executable and mappings.
pub fn dump(bounds: &MemoryBounds, brk: u64, auxv: Vec<u64>, settings: &ProcessSettings) -> MmEntry {
    MmEntry {
        mm_start_code: bounds.start_code,
        mm_end_code: bounds.end_code,
        mm_start_data: bounds.start_data,
        mm_end_data: bounds.end_data,
        mm_start_stack: bounds.start_stack,
        mm_start_brk: bounds.start_brk,
        mm_brk: brk,
        mm_arg_start: bounds.arg_start,
        mm_arg_end: bounds.arg_end,
        mm_env_start: bounds.env_start,
        mm_env_end: bounds.env_end,
        exe_file_id: 0,
        mm_saved_auxv: auxv,
        vmas: Vec::new(),
        dumpable: Some(settings.dumpable),
        aios: Vec::new(),
        thp_disabled: Some(settings.thp_disabled),
    }
}

/// The auxiliary vector that the program was started with, as the kernel keeps it (proc_pid_auxv(5)): pairs of words,
/// without the terminating pair.
///
/// # Errors
/// Those of reading the file.
pub fn collect_auxv(pid: HostPid) -> io::Result<Vec<u64>> {
    let bytes = procfs::read(format!("/proc/{pid}/auxv"))?;
    let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    let pairs = words.chunks_exact(2).take_while(|pair| pair[0] != libc::AT_NULL);
    Ok(pairs.flatten().copied().collect())
}

/// Size of `struct prctl_mm_map` (linux/prctl.h).
pub const MAP_SIZE: usize = 12 * 8 + 2 * 4;

/// Where in it the address of the auxiliary vector is.
pub const VECTOR: usize = 11 * 8;

/// In place of the executable's descriptor: leave it as it is.
pub const SAME_EXECUTABLE: u32 = u32::MAX;

/// `struct prctl_mm_map` for `mm`: its executable is open as `exe`; the address at [`VECTOR`] is to be filled in.
pub fn prctl_map(mm: &MmEntry, exe: u32) -> Vec<u8> {
    let addresses = [
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
        0,
    ];
    let mut bytes: Vec<u8> = addresses.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend_from_slice(&(size_of_val(mm.mm_saved_auxv.as_slice()) as u32).to_ne_bytes());
    bytes.extend_from_slice(&exe.to_ne_bytes());
    bytes
}

/// The auxiliary vector as the kernel reads it.
pub fn auxiliary(mm: &MmEntry) -> Vec<u8> {
    mm.mm_saved_auxv.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
