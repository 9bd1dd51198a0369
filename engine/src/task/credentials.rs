//! Credentials of a thread: ids, groups, capability sets, securebits, `no_new_privs`.
//!
//! Facts relied on (credentials(7), capabilities(7)): every thread has its own. Changing uids clears capabilities unless
//! `SECBIT_NO_SETUID_FIXUP` is set; the bounding set can only shrink, which needs `CAP_SETPCAP`, and so do securebits;
//! inheritable capabilities may only be added from the bounding set; ambient ones only while permitted and inheritable,
//! and not once `SECBIT_NO_CAP_AMBIENT_RAISE` is set. setfsuid(2) with an impossible id changes nothing and tells the id.
//!
//! Restoring sets everything in the order that these rules leave, asks the kernel for the result, and compares: a call that
//! was refused but changed nothing that mattered is no failure, so a restore needs no more privilege than its target state does.

use super::TaskError;
use crate::agent::{Answers, Batch, Call, Out, Runner};
use crate::images::creds::CredsEntry;
use crate::sys::HostPid;

/// One more than the highest capability of any kernel so far, `CAP_CHECKPOINT_RESTORE`.
const CAPABILITIES: u64 = 41;
/// `_LINUX_CAPABILITY_VERSION_3`, with pid 0 behind it: this thread.
const CAPABILITY_HEADER: [u32; 2] = [0x2008_0522, 0];
const CAPABILITY_DATA: usize = 24;
/// `NGROUPS_MAX` is 65,536; what fits a thread's slot is the limit here.
const GROUPS: usize = 1024;
const SECBIT_NO_SETUID_FIXUP: u64 = 1 << 2;
const CAP_SETPCAP: u64 = 1 << 8;
const NO_ID: u64 = u64::MAX;

/// The questions for all credentials of a thread.
pub struct Questions {
    uids: (Call, Out),
    gids: (Call, Out),
    fsuid: Call,
    fsgid: Call,
    groups: (Call, Out),
    sets: (Call, Out),
    bounding: Vec<Call>,
    securebits: Call,
    no_new_privs: Call,
}

impl Questions {
    /// Appends some fifty calls that change nothing.
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        let (uids, gids) = (batch.space(12), batch.space(12));
        let three = |out: Out| [out.addr.0, out.addr.0 + 4, out.addr.0 + 8];
        let groups = batch.space(GROUPS * 4);
        let header = batch.bytes(CAPABILITY_HEADER.map(u32::to_ne_bytes).as_flattened());
        let sets = batch.space(CAPABILITY_DATA);
        let mut prctl = |arguments: &[u64]| batch.call(libc::SYS_prctl, arguments);
        let bounding = (0..CAPABILITIES).map(|number| prctl(&[libc::PR_CAPBSET_READ as u64, number])).collect();
        let securebits = prctl(&[libc::PR_GET_SECUREBITS as u64]);
        let no_new_privs = prctl(&[libc::PR_GET_NO_NEW_PRIVS as u64]);
        Self {
            uids: (batch.call(libc::SYS_getresuid, &three(uids)), uids),
            gids: (batch.call(libc::SYS_getresgid, &three(gids)), gids),
            fsuid: batch.call(libc::SYS_setfsuid, &[NO_ID]),
            fsgid: batch.call(libc::SYS_setfsgid, &[NO_ID]),
            groups: (batch.call(libc::SYS_getgroups, &[GROUPS as u64, groups.addr.0]), groups),
            sets: (batch.call(libc::SYS_capget, &[header.0, sets.addr.0]), sets),
            bounding,
            securebits,
            no_new_privs,
        }
    }

    /// The credentials, with ids as the thread's user namespace numbers them, but for ambient capabilities
    /// ([`complete`]).
    ///
    /// # Errors
    /// [`TaskError::Agent`]; `EINVAL` from getgroups(2) when there are more than 1,024 groups.
    pub fn answers(&self, answers: &Answers<'_>) -> Result<CredsEntry, TaskError> {
        for call in [self.uids.0, self.gids.0, self.sets.0] {
            answers.value(call)?;
        }
        let groups = answers.value(self.groups.0)? as usize;
        // The kernel's words are effective, permitted, inheritable; low ones first.
        let set = |index: usize| [0, 12].map(|half| answers.u32_at(self.sets.1, half + 4 * index)).to_vec();
        let no_new_privs = answers.value(self.no_new_privs)? as u32;
        Ok(CredsEntry {
            uid: answers.u32_at(self.uids.1, 0),
            gid: answers.u32_at(self.gids.1, 0),
            euid: answers.u32_at(self.uids.1, 4),
            egid: answers.u32_at(self.gids.1, 4),
            suid: answers.u32_at(self.uids.1, 8),
            sgid: answers.u32_at(self.gids.1, 8),
            fsuid: answers.value(self.fsuid)? as u32,
            fsgid: answers.value(self.fsgid)? as u32,
            cap_inh: set(2),
            cap_prm: set(1),
            cap_eff: set(0),
            cap_bnd: bits(&self.bounding, answers),
            secbits: answers.value(self.securebits)? as u32,
            groups: (0..groups.min(GROUPS)).map(|index| answers.u32_at(self.groups.1, 4 * index)).collect(),
            lsm_profile: None,
            lsm_sockcreate: None,
            apparmor_data: None,
            no_new_privs: (no_new_privs > 0).then_some(no_new_privs),
            cap_amb: vec![0, 0],
        })
    }
}

fn bits(calls: &[Call], answers: &Answers<'_>) -> Vec<u32> {
    let is_set = |number: &usize| answers.result(calls[*number]) == Ok(1);
    let set = (0..calls.len()).filter(is_set).fold(0u64, |set, number| set | 1 << number);
    vec![set as u32, (set >> 32) as u32]
}

/// Asks the thread for its ambient capabilities, in a batch of its own, if it can have any: they are permitted and
/// inheritable, and few programs have inheritable ones.
///
/// # Errors
/// [`TaskError::Agent`].
pub fn complete(runner: &Runner, entry: &mut CredsEntry) -> Result<(), TaskError> {
    if members(&entry.cap_prm) & members(&entry.cap_inh) == 0 {
        return Ok(());
    }
    let mut batch = runner.batch();
    let [option, is_set] = [libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_IS_SET as u64];
    let ask = |number| batch.call(libc::SYS_prctl, &[option, is_set, number]);
    let calls: Vec<_> = (0..CAPABILITIES).map(ask).collect();
    entry.cap_amb = bits(&calls, &batch.run()?);
    Ok(())
}

/// What [`restore_credentials`] set, to be compared with what the kernel says.
pub struct Restored {
    wanted: CredsEntry,
    questions: Questions,
}

/// Appends the calls that give a thread the credentials of `entry`, and the questions for the result.
///
/// Expects the full capabilities that the restore has in the tree's user namespace, and leaves those of the image.
pub fn restore_credentials(batch: &mut Batch<'_>, entry: &CredsEntry) -> Restored {
    let prctl = |batch: &mut Batch<'_>, arguments: &[u64]| batch.call(libc::SYS_prctl, arguments);
    prctl(batch, &[libc::PR_SET_SECUREBITS as u64, SECBIT_NO_SETUID_FIXUP]);
    let groups: Vec<u8> = entry.groups.iter().flat_map(|group| group.to_ne_bytes()).collect();
    let groups = batch.bytes(&groups).0;
    batch.call(libc::SYS_setgroups, &[entry.groups.len() as u64, groups]);
    let [gid, egid, sgid, fsgid] = [entry.gid, entry.egid, entry.sgid, entry.fsgid].map(u64::from);
    batch.call(libc::SYS_setresgid, &[gid, egid, sgid]);
    batch.call(libc::SYS_setfsgid, &[fsgid]);
    let [uid, euid, suid, fsuid] = [entry.uid, entry.euid, entry.suid, entry.fsuid].map(u64::from);
    batch.call(libc::SYS_setresuid, &[uid, euid, suid]);
    batch.call(libc::SYS_setfsuid, &[fsuid]);

    // Inheritable and ambient ones while the bounding set is whole and raising is allowed; CAP_SETPCAP stays for the rest.
    let header = batch.bytes(CAPABILITY_HEADER.map(u32::to_ne_bytes).as_flattened()).0;
    let [eff, prm, inh] = [&entry.cap_eff, &entry.cap_prm, &entry.cap_inh].map(|set| members(set));
    set_capabilities(batch, header, CAP_SETPCAP, prm | CAP_SETPCAP, inh);
    let ambient = members(&entry.cap_amb);
    for number in (0..64).filter(|number| ambient >> number & 1 == 1) {
        prctl(batch, &[libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_RAISE as u64, number]);
    }
    let bounding = members(&entry.cap_bnd);
    for number in (0..CAPABILITIES).filter(|number| bounding >> number & 1 == 0) {
        prctl(batch, &[libc::PR_CAPBSET_DROP as u64, number]);
    }
    prctl(batch, &[libc::PR_SET_SECUREBITS as u64, u64::from(entry.secbits)]);
    set_capabilities(batch, header, eff, prm, inh);
    if entry.no_new_privs.is_some_and(|value| value > 0) {
        prctl(batch, &[libc::PR_SET_NO_NEW_PRIVS as u64, 1]);
    }
    Restored { wanted: entry.clone(), questions: Questions::ask(batch) }
}

fn set_capabilities(batch: &mut Batch<'_>, header: u64, effective: u64, permitted: u64, inheritable: u64) {
    let [low, high] = [0, 32].map(|shift| [effective, permitted, inheritable].map(|set| (set >> shift) as u32));
    let data: Vec<u8> = [low, high].as_flattened().iter().flat_map(|word| word.to_ne_bytes()).collect();
    let data = batch.bytes(&data);
    batch.call(libc::SYS_capset, &[header, data.0]);
}

/// A set's two words as one; bit `n` is capability `n`.
fn members(set: &[u32]) -> u64 {
    let word = |index: usize| u64::from(set.get(index).copied().unwrap_or(0));
    word(0) | word(1) << 32
}

impl Restored {
    /// Compares what the kernel says with what the image says.
    ///
    /// # Errors
    /// [`TaskError::Differs`] with the first difference.
    pub fn verify(&self, runner: &Runner, answers: &Answers<'_>) -> Result<(), TaskError> {
        let (wanted, mut got) = (&self.wanted, self.questions.answers(answers)?);
        complete(runner, &mut got)?;
        let tid = runner.tid();
        let ids = |e: &CredsEntry| [e.uid, e.euid, e.suid, e.fsuid, e.gid, e.egid, e.sgid, e.fsgid];
        let hex = |set: &[u32]| format!("{:#x}", members(set));
        differ(tid, "user and group ids (real, effective, saved, file system)", ids(wanted), ids(&got))?;
        // The kernel keeps groups sorted.
        let sorted = |e: &CredsEntry| {
            let mut groups = e.groups.clone();
            groups.sort_unstable();
            groups
        };
        differ(tid, "supplementary groups", sorted(wanted), sorted(&got))?;
        differ(tid, "inheritable capabilities", hex(&wanted.cap_inh), hex(&got.cap_inh))?;
        differ(tid, "permitted capabilities", hex(&wanted.cap_prm), hex(&got.cap_prm))?;
        differ(tid, "effective capabilities", hex(&wanted.cap_eff), hex(&got.cap_eff))?;
        differ(tid, "ambient capabilities", hex(&wanted.cap_amb), hex(&got.cap_amb))?;
        differ(tid, "securebits", wanted.secbits, got.secbits)?;
        differ(tid, "no_new_privs", wanted.no_new_privs.unwrap_or(0), got.no_new_privs.unwrap_or(0))?;
        // The bounding set of a task can never grow: less than in the image is all that a lesser restorer can give.
        let surplus = members(&got.cap_bnd) & !members(&wanted.cap_bnd);
        if surplus != 0 {
            differ(tid, "capability bounding set", hex(&wanted.cap_bnd), hex(&got.cap_bnd))?;
        }
        Ok(())
    }
}

fn differ<T: PartialEq + std::fmt::Debug>(
    tid: HostPid,
    what: &'static str,
    wanted: T,
    got: T,
) -> Result<(), TaskError> {
    if wanted == got {
        return Ok(());
    }
    Err(TaskError::Differs { tid, what, wanted: format!("{wanted:?}"), got: format!("{got:?}") })
}
