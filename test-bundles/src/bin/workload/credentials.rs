//! Credentials (credentials(7), capabilities(7)): ids, capability sets, securebits, no_new_privs.

use crate::Workload;
use crate::room::{Check, Room, ask_all};
use crate::sys::{Fault, ensure, raw, same, sys, text};

/// The lines of /proc/self/status that tell the credentials.
fn credentials() -> Result<Vec<String>, Fault> {
    let fields = ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"];
    let status = text("/proc/self/status")?;
    let of_interest = |line: &&str| line.split_once(':').is_some_and(|(name, _)| fields.contains(&name));
    Ok(status.lines().filter(of_interest).map(str::to_owned).collect())
}

/// A child that changes its credentials with `change`, and checks that they stay so.
fn changed(room: &Room, name: &str, change: impl FnOnce() -> Result<(), Fault>) -> Result<crate::room::Child, Fault> {
    room.child(name, |_| {
        change()?;
        let before = (credentials()?, sys!(prctl(libc::PR_GET_SECUREBITS))?, sys!(prctl(libc::PR_GET_KEEPCAPS))?);
        Ok(Box::new(move || {
            let now = (credentials()?, sys!(prctl(libc::PR_GET_SECUREBITS))?, sys!(prctl(libc::PR_GET_KEEPCAPS))?);
            same!("credentials, securebits, keepcaps", now, before);
            Ok(())
        }))
    })
}

/// Processes of other users: all ids the same, all ids different, supplementary groups, file system ids.
pub fn user_ids(room: &Room) -> Result<Check, Fault> {
    let plain = changed(room, "plain", || {
        let groups = [7u32, 1000, 70_000];
        raw!(SYS_setgroups, groups.len(), groups.as_ptr())?;
        raw!(SYS_setresgid, 1000, 1000, 1000)?;
        raw!(SYS_setresuid, 1000, 1000, 1000)?;
        Ok(())
    })?;
    let mixed = changed(room, "mixed", || {
        raw!(SYS_setgroups, 0, std::ptr::null::<u32>())?;
        raw!(SYS_setresgid, 11, 12, 13)?;
        raw!(SYS_setresuid, 21, 0, 23)?;
        Ok(())
    })?;
    let file_ids = changed(room, "file-ids", || {
        raw!(SYS_setfsgid, 31)?;
        raw!(SYS_setfsuid, 32)?;
        Ok(())
    })?;
    Ok(ask_all(vec![plain, mixed, file_ids]))
}

/// The capability sets of capset(2), version 3: two words each.
#[repr(C)]
struct Capabilities {
    words: [[u32; 3]; 2],
}

fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> Result<(), Fault> {
    let header = [0x2008_0522u32, 0];
    let word = |shift: u32| [effective, permitted, inheritable].map(|set| (set >> shift) as u32);
    let data = Capabilities { words: [word(0), word(32)] };
    raw!(SYS_capset, header.as_ptr(), &data).map(|_| ())
}

const CAP_CHOWN: u64 = 1;
const CAP_KILL: u64 = 1 << 5;
const CAP_SETPCAP: u64 = 1 << 8;
const CAP_NET_BIND: u64 = 1 << 10;
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// Every capability set different: effective, permitted, inheritable, ambient, bounding.
pub fn capabilities(room: &Room) -> Result<Check, Fault> {
    let sets = changed(room, "sets", || {
        for dropped in [13, 14, 25, 38] {
            sys!(prctl(libc::PR_CAPBSET_DROP, dropped, 0, 0, 0))?;
        }
        let permitted = CAP_CHOWN | CAP_KILL | CAP_SETPCAP | CAP_NET_BIND | CAP_SYS_ADMIN;
        set_capabilities(CAP_CHOWN | CAP_KILL, permitted, CAP_KILL | CAP_NET_BIND)?;
        sys!(prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, 10, 0, 0))?;
        Ok(())
    })?;
    let none = changed(room, "none", || set_capabilities(0, 0, 0))?;
    let user = changed(room, "user-with-capability", || {
        sys!(prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0))?;
        raw!(SYS_setresuid, 1000, 1000, 1000)?;
        set_capabilities(CAP_NET_BIND, CAP_NET_BIND, CAP_NET_BIND)
    })?;
    Ok(ask_all(vec![sets, none, user]))
}

/// The securebits flags (capabilities(7)).
pub fn securebits(room: &Room) -> Result<Check, Fault> {
    // SECBIT_NOROOT, its lock, SECBIT_NO_SETUID_FIXUP, SECBIT_NO_CAP_AMBIENT_RAISE.
    let child = changed(room, "securebits", || sys!(prctl(libc::PR_SET_SECUREBITS, 0b0100_0111, 0, 0, 0)).map(|_| ()))?;
    Ok(ask_all(vec![child]))
}

/// The no_new_privs bit, in one process and not in another.
pub fn no_new_privs(room: &Room) -> Result<Check, Fault> {
    let with = changed(room, "with", || sys!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)).map(|_| ()))?;
    let without = changed(room, "without", || {
        ensure!(sys!(prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0))? == 0, "the workload started with no_new_privs");
        Ok(())
    })?;
    Ok(ask_all(vec![with, without]))
}

/// The login id that audit(7) shows, of a process and of its child another.
fn login_id(room: &Room) -> Result<Check, Fault> {
    const FILE: &str = "/proc/self/loginuid";
    let set = |id: &str| std::fs::write(FILE, id).map_err(|error| format!("{FILE}: {error}"));
    let child = room.child("other", |_| {
        set("1234")?;
        Ok(Box::new(|| {
            same!("login id of the child", crate::sys::text(FILE)?, "1234");
            Ok(())
        }))
    })?;
    set("4321")?;
    Ok(Box::new(move || {
        same!("login id", crate::sys::text(FILE)?, "4321");
        child.ask()
    }))
}

/// The workload that needs a kernel with audit(8), and the right to change a login id.
pub const WORKLOADS: &[Workload] = &[Workload {
    name: "login_id",
    setup: login_id,
    missing: || {
        let file = "/proc/self/loginuid";
        let own = std::fs::read_to_string(file).and_then(|id| std::fs::write(file, id.trim()));
        own.err().map(|error| format!("login ids cannot be set here: {error}"))
    },
}];

/// PR_SET_KEEPCAPS.
pub fn keep_capabilities(room: &Room) -> Result<Check, Fault> {
    let child = changed(room, "keepcaps", || sys!(prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0)).map(|_| ()))?;
    Ok(ask_all(vec![child]))
}
