//! Who is signalled when a descriptor becomes ready (`F_SETOWN`, `F_SETSIG` of fcntl(2)).

use std::os::fd::BorrowedFd;

use super::Problem;
use super::session::{Done, Session};
use crate::images::fown::FownEntry;
use crate::procfs::Ids;
use crate::sys::owner::{self, F_SETOWN_EX, F_SETSIG};
use crate::sys::{HostPid, NsPid};

const F_OWNER_PGRP: i32 = 2;

/// Nobody is signalled.
pub fn nobody() -> FownEntry {
    FownEntry::default()
}

/// Reads the owner of the description behind `duplicate`; ids become those of the owner's own pid namespace.
pub fn collect_owner(duplicate: BorrowedFd<'_>) -> Result<FownEntry, Problem> {
    let found = owner::get(duplicate).map_err(|errno| Problem::unreadable("its signal owner", errno))?;
    let mut entry = FownEntry { signum: found.signal as u32, ..nobody() };
    if found.pid == 0 {
        return Ok(entry);
    }
    let ids = Ids::read(HostPid(found.pid)).map_err(|_| {
        Problem::new(
            format!("process {} owns its signals (F_SETOWN) and has ended", found.pid),
            "have the program set another owner",
        )
    })?;
    let NsPid(process) = ids.innermost();
    let pid = if found.kind == F_OWNER_PGRP { ids.group.last().copied().unwrap_or(process) } else { process };
    entry.pid = pid as u32;
    entry.pid_type = found.kind as u32;
    [entry.uid, entry.euid] = found.uids;
    Ok(entry)
}

/// Sets the owner of descriptor `fd`, and `O_ASYNC` if `flags` have it. The owner must exist by now.
pub fn restore_owner(session: &mut Session<'_>, id: u32, fd: u32, entry: &FownEntry, flags: u32) -> Done {
    let asynchronous = flags & libc::O_ASYNC as u32 != 0;
    if *entry == nobody() && !asynchronous {
        return Ok(());
    }
    session.about(id);
    if entry.signum != 0 {
        session.must("set its signal", libc::SYS_fcntl, &[fd.into(), F_SETSIG as u64, entry.signum.into()])?;
    }
    if entry.pid != 0 {
        // The kernel checks later, with the ids of now, whether the setter may signal the owner.
        let keep = u64::from(u32::MAX);
        let foreign = entry.uid != 0 || entry.euid != 0;
        if foreign {
            session.must("take its owner's ids", libc::SYS_setresuid, &[entry.uid.into(), entry.euid.into(), keep])?;
        }
        let words = [entry.pid_type.to_ne_bytes(), entry.pid.to_ne_bytes()].concat();
        session.must_with("set its owner", libc::SYS_fcntl, &[fd.into(), F_SETOWN_EX as u64], &words)?;
        if foreign {
            session.must("take its own ids back", libc::SYS_setresuid, &[0, 0, keep])?;
        }
    }
    if asynchronous {
        session.must("set its flags", libc::SYS_fcntl, &[fd.into(), libc::F_SETFL as u64, flags.into()])?;
    }
    Ok(())
}
