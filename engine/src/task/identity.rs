//! The small settings of threads and processes: name, tid address, robust list, personality, and what prctl(2) keeps.
//!
//! Facts relied on: `PR_GET_TID_ADDRESS` (Linux 3.5); `MEMBARRIER_CMD_GET_REGISTRATIONS` (6.3); the parent-death signal and
//! the dumpable flag fall back when credentials change (prctl(2)), so both are restored after them; a process's
//! `loginuid` can be written by itself only (kernel/auditsc, `/proc/PID/loginuid`).

use std::fs;

use nix::errno::Errno;

use super::{Checks, TaskError};
use crate::agent::{Answers, Batch, Call, Out, Runner};
use crate::images::core::{TaskCoreEntry, ThreadCoreEntry};
use crate::images::extension::FerryTaskEntry;
use crate::procfs;
use crate::sys::HostPid;

const NAME: usize = 16;
const ROBUST_HEAD: u64 = 24;
const PR_GET_TID_ADDRESS: u64 = 40;
const MEMBARRIER_CMD_GET_REGISTRATIONS: u64 = 1 << 9;
const PERSONALITY_ASK: u64 = 0xffff_ffff;
/// The value of the dumpable flag that prctl(2) cannot set: readable by root only.
const DUMPABLE_BY_ROOT: i32 = 2;

/// Questions for the settings of one thread.
pub struct ThreadQuestions {
    tid_address: (Call, Out),
    death_signal: (Call, Out),
    name: (Call, Out),
    robust_list: (Call, Out),
    seccomp_mode: Call,
}

/// The settings of one thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThreadSettings {
    /// Where the kernel clears the tid when the thread ends (set_tid_address(2)).
    pub tid_address: u64,
    /// What it gets when its parent dies.
    pub death_signal: u32,
    /// Its name, without the zero byte.
    pub name: Vec<u8>,
    /// Head and length of its robust futex list.
    pub robust_list: (u64, u32),
    /// 0, 1 (strict) or 2 (filter).
    pub seccomp_mode: u32,
}

impl ThreadQuestions {
    /// Appends the questions.
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        let mut prctl = |option: u64, len: usize| {
            let out = batch.space(len);
            (batch.call(libc::SYS_prctl, &[option, out.addr.0]), out)
        };
        let tid_address = prctl(PR_GET_TID_ADDRESS, 8);
        let death_signal = prctl(libc::PR_GET_PDEATHSIG as u64, 4);
        let name = prctl(libc::PR_GET_NAME as u64, NAME);
        let seccomp_mode = batch.call(libc::SYS_prctl, &[libc::PR_GET_SECCOMP as u64]);
        let out = batch.space(16);
        let list = batch.call(libc::SYS_get_robust_list, &[0, out.addr.0, out.addr.0 + 8]);
        Self { tid_address, death_signal, name, robust_list: (list, out), seccomp_mode }
    }

    /// The settings.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answers(&self, answers: &Answers<'_>) -> Result<ThreadSettings, TaskError> {
        for call in [self.tid_address.0, self.death_signal.0, self.name.0, self.robust_list.0] {
            answers.value(call)?;
        }
        Ok(ThreadSettings {
            tid_address: answers.u64_at(self.tid_address.1, 0),
            death_signal: answers.u32_at(self.death_signal.1, 0),
            name: until_zero(answers.bytes(self.name.1)),
            robust_list: (answers.u64_at(self.robust_list.1, 0), answers.u64_at(self.robust_list.1, 8) as u32),
            // A kernel without seccomp has no mode to tell.
            seccomp_mode: answers.result(self.seccomp_mode).unwrap_or(0) as u32,
        })
    }
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    bytes
}

/// Questions for the settings of a process.
pub struct ProcessQuestions {
    personality: Call,
    subreaper: (Call, Out),
    dumpable: Call,
    thp_disabled: Call,
    membarrier: Call,
    mdwe: Call,
    memory_merge: Call,
}

/// The settings of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessSettings {
    /// Execution domain (personality(2)).
    pub personality: u32,
    /// Whether it adopts orphans.
    pub subreaper: bool,
    /// 0, 1, or 2; belongs to `mm` images.
    pub dumpable: i32,
    /// Whether it has transparent huge pages switched off; belongs to `mm` images.
    pub thp_disabled: bool,
    /// `MEMBARRIER_CMD_REGISTER_*` bits.
    pub membarrier: u32,
    /// `PR_MDWE_*` flags: memory that is writable cannot become executable.
    pub mdwe: u32,
    /// Whether all its memory may be merged.
    pub memory_merge: bool,
}

impl ProcessQuestions {
    /// Appends the questions.
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        let out = batch.space(4);
        let prctl = libc::SYS_prctl;
        Self {
            personality: batch.call(libc::SYS_personality, &[PERSONALITY_ASK]),
            subreaper: (batch.call(prctl, &[libc::PR_GET_CHILD_SUBREAPER as u64, out.addr.0]), out),
            dumpable: batch.call(prctl, &[libc::PR_GET_DUMPABLE as u64]),
            thp_disabled: batch.call(prctl, &[libc::PR_GET_THP_DISABLE as u64]),
            membarrier: batch.call(libc::SYS_membarrier, &[MEMBARRIER_CMD_GET_REGISTRATIONS, 0]),
            mdwe: batch.call(prctl, &[libc::PR_GET_MDWE as u64]),
            memory_merge: batch.call(prctl, &[libc::PR_GET_MEMORY_MERGE as u64]),
        }
    }

    /// The settings.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answers(&self, answers: &Answers<'_>) -> Result<ProcessSettings, TaskError> {
        answers.value(self.subreaper.0)?;
        Ok(ProcessSettings {
            personality: answers.value(self.personality)? as u32,
            subreaper: answers.u32_at(self.subreaper.1, 0) != 0,
            dumpable: answers.value(self.dumpable)? as i32,
            thp_disabled: answers.value(self.thp_disabled)? != 0,
            // EINVAL before Linux 6.3; a process can then be asked by its registrations' effects only, so none is assumed.
            membarrier: answers.result(self.membarrier).unwrap_or(0) as u32,
            // Kernels without these (Linux 6.3, 6.4) have nothing to tell.
            mdwe: answers.result(self.mdwe).unwrap_or(0) as u32,
            memory_merge: answers.result(self.memory_merge) == Ok(1),
        })
    }
}

impl ProcessSettings {
    /// What the format itself has no place for; none if there is nothing.
    pub fn dump_extension(&self) -> Option<FerryTaskEntry> {
        let entry = FerryTaskEntry {
            mdwe: (self.mdwe != 0).then_some(self.mdwe),
            memory_merge: self.memory_merge.then_some(true),
        };
        (entry != FerryTaskEntry::default()).then_some(entry)
    }
}

/// `/proc/PID/oom_score_adj`.
///
/// # Errors
/// [`TaskError::Proc`].
pub fn collect_oom_score_adj(pid: HostPid) -> Result<i32, TaskError> {
    number(pid, "oom_score_adj")
}

/// `/proc/PID/loginuid`; none when the kernel does not audit. All ones: nobody logged in.
///
/// # Errors
/// [`TaskError::Proc`].
pub fn collect_loginuid(pid: HostPid) -> Result<Option<u32>, TaskError> {
    match number(pid, "loginuid") {
        Ok(uid) => Ok(Some(uid)),
        Err(TaskError::Proc { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn number<T: std::str::FromStr>(pid: HostPid, file: &'static str) -> Result<T, TaskError> {
    let failed = |source| TaskError::Proc { tid: pid, file, source };
    let text = procfs::read_text(format!("/proc/{pid}/{file}")).map_err(failed)?;
    text.trim().parse().map_err(|_| failed(std::io::ErrorKind::InvalidData.into()))
}

/// Appends a thread's name, tid address and robust list.
///
/// The tid address is set even if zero: the task has its maker's otherwise.
pub fn restore_thread_settings(
    batch: &mut Batch<'_>,
    entry: &ThreadCoreEntry,
    name: &[u8],
    tid_address: u64,
    checks: &mut Checks,
) {
    batch.call(libc::SYS_set_tid_address, &[tid_address]);
    let (head, len) = match entry.futex_rla_len {
        0 => (0, ROBUST_HEAD),
        len => (entry.futex_rla, u64::from(len)),
    };
    checks.call(batch, "robust futex list", libc::SYS_set_robust_list, &[head, len]);
    let name = batch.path(&name[..name.len().min(NAME - 1)]);
    checks.call(batch, "name", libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name.0]);
}

/// Appends what the process keeps for all its threads, and that needs no order.
pub fn restore_process_settings(batch: &mut Batch<'_>, entry: &TaskCoreEntry, checks: &mut Checks) {
    let personality = u64::from(entry.personality);
    checks.call(batch, format!("personality {personality:#x}"), libc::SYS_personality, &[personality]);
    let subreaper = u64::from(entry.child_subreaper.unwrap_or(false));
    let option = libc::PR_SET_CHILD_SUBREAPER as u64;
    checks.call(batch, "subreaper flag", libc::SYS_prctl, &[option, subreaper]);
    let registered = entry.membarrier_registration_mask.unwrap_or(0);
    for command in (0..32).map(|bit| 1u32 << bit).filter(|command| registered & command != 0) {
        let what = format!("membarrier registration {command:#x}");
        checks.call(batch, what, libc::SYS_membarrier, &[u64::from(command), 0]);
    }
}

/// Appends the rules of a process for its memory; after the memory is whole.
pub fn restore_memory_rules(batch: &mut Batch<'_>, entry: &FerryTaskEntry, checks: &mut Checks) {
    if entry.memory_merge == Some(true) {
        // Needs CAP_SYS_RESOURCE, and a program runs as well without.
        batch.call(libc::SYS_prctl, &[libc::PR_SET_MEMORY_MERGE as u64, 1]);
    }
    if let Some(flags) = entry.mdwe {
        let arguments = [libc::PR_SET_MDWE as u64, u64::from(flags)];
        checks.call(batch, "ban on memory that is made executable", libc::SYS_prctl, &arguments);
    }
}

/// Appends the parent-death signal; after credentials, which clear it.
pub fn restore_death_signal(batch: &mut Batch<'_>, signal: u32, checks: &mut Checks) {
    let arguments = [libc::PR_SET_PDEATHSIG as u64, u64::from(signal)];
    checks.call(batch, "parent-death signal", libc::SYS_prctl, &arguments);
}

/// Appends the flags of the memory that prctl(2) sets; after the credentials of every thread, which change the first.
///
/// Value 2 of `dumpable` can only come from the kernel. 0 is set in its place, which differs in one thing: no core file is
/// written for root either.
pub fn restore_memory_flags(batch: &mut Batch<'_>, dumpable: Option<i32>, thp_disabled: bool, checks: &mut Checks) {
    if let Some(value) = dumpable {
        let value = if value == DUMPABLE_BY_ROOT { 0 } else { value };
        let arguments = [libc::PR_SET_DUMPABLE as u64, value as u64];
        checks.call(batch, format!("dumpable flag {value}"), libc::SYS_prctl, &arguments);
    }
    if thp_disabled {
        let arguments = [libc::PR_SET_THP_DISABLE as u64, 1];
        checks.call(batch, "switch for transparent huge pages", libc::SYS_prctl, &arguments);
    }
}

/// Changes a process's login id, if the one that it has inherited, its maker's, is another; in batches of its own.
///
/// Only the process itself may write it, through the `/proc` that it sees: for the root this comes while that is ferry's.
/// An id that is set already takes `CAP_AUDIT_CONTROL` over the whole machine to change, and kernels can be told to keep it
/// for good: then the process keeps its maker's, with a warning, since only the audit log shows it.
///
/// # Errors
/// [`TaskError::Restore`].
pub fn restore_loginuid(runner: &Runner, wanted: Option<u32>, has: Option<u32>) -> Result<(), TaskError> {
    let Some(wanted) = wanted.filter(|wanted| has.is_some_and(|has| has != *wanted)) else { return Ok(()) };
    let what = format!("login id {wanted}");
    let mut batch = runner.batch();
    let mut checks = Checks::default();
    let path = batch.path("/proc/self/loginuid").0;
    let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as u64;
    let open = checks.call(&mut batch, what.clone(), libc::SYS_openat, &[libc::AT_FDCWD as u64, path, flags]);
    let answers = batch.run()?;
    checks.verify(runner.tid(), &answers)?;
    let file = answers.value(open)?;
    let mut batch = runner.batch();
    let text = wanted.to_string();
    let bytes = batch.bytes(text.as_bytes()).0;
    let write = batch.call(libc::SYS_write, &[file, bytes, text.len() as u64]);
    batch.call(libc::SYS_close, &[file]);
    match batch.run()?.result(write) {
        Ok(_) => Ok(()),
        Err(Errno::EPERM) => {
            tracing::warn!(tid = %runner.tid(), wanted, "the kernel does not let the login id be changed: it stays ferry's");
            Ok(())
        }
        Err(errno) => Err(TaskError::Restore { tid: runner.tid(), what, errno }),
    }
}

/// Sets `/proc/PID/oom_score_adj` of a restored process from outside, if it differs.
///
/// # Errors
/// [`TaskError::Restore`], `EACCES` when it would have to be lowered without `CAP_SYS_RESOURCE`.
pub fn restore_oom_score_adj(pid: HostPid, wanted: Option<i32>) -> Result<(), TaskError> {
    let Some(wanted) = wanted else { return Ok(()) };
    if collect_oom_score_adj(pid)? == wanted {
        return Ok(());
    }
    let failed = |error: std::io::Error| TaskError::Restore {
        tid: pid,
        what: format!("oom_score_adj {wanted}"),
        errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
    };
    fs::write(format!("/proc/{pid}/oom_score_adj"), wanted.to_string()).map_err(failed)
}
