//! Where the parts of a program lie in its memory, its auxiliary vector, and the switches of the whole address space.
//!
//! proc_pid_stat(5) tells the bounds to whoever may trace the process; the current break, and what prctl(2)
//! holds for the address space, have to be asked from inside.

use std::io;

use crate::images::mm::MmEntry;
use crate::procfs::MemoryBounds;
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
    let bytes = std::fs::read(format!("/proc/{pid}/auxv"))?;
    let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    let pairs = words.chunks_exact(2).take_while(|pair| pair[0] != libc::AT_NULL);
    Ok(pairs.flatten().copied().collect())
}
