//! The processors that a thread may run on.
//!
//! Facts relied on: sched_getaffinity(2) tells the mask that results from the thread's own choice and its cpuset; a thread
//! that never chose has its cpuset's mask. The kernel tells nobody what was chosen. So a mask is saved only when it is less
//! than what the cpuset gives: on another host, "all there are" must stay that.

use super::TaskError;
use crate::agent::{Answers, Batch, Call, Out};
use crate::images::extension::FerryThreadEntry;
use crate::procfs;
use crate::sys::HostPid;

/// Bytes for 8,192 processors, the most that Linux supports on x86-64.
const MASK: usize = 1024;

/// The question for a thread's mask.
pub struct Question(Call, Out);

impl Question {
    /// Appends a sched_getaffinity(2).
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        let out = batch.space(MASK);
        Self(batch.call(libc::SYS_sched_getaffinity, &[0, MASK as u64, out.addr.0]), out)
    }

    /// The mask, a bit for each processor, without trailing zero bytes.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answer(&self, answers: &Answers<'_>) -> Result<Vec<u8>, TaskError> {
        let len = answers.value(self.0)? as usize;
        let mut mask = answers.bytes(self.1);
        mask.truncate(len);
        trim(&mut mask);
        Ok(mask)
    }
}

fn trim(mask: &mut Vec<u8>) {
    while mask.last() == Some(&0) {
        mask.pop();
    }
}

/// The processors of the cpuset of `pid`, as a mask; none when that cannot be found out.
///
/// Looks at the v1 controller and both usual places of the v2 hierarchy; without any, all processors online.
pub fn collect_cpuset(pid: HostPid) -> Option<Vec<u8>> {
    let path = procfs::read_text(format!("/proc/{pid}/cpuset")).unwrap_or_default();
    let path = path.trim().trim_end_matches('/');
    let below = |root: &str, file: &str| procfs::read_text(format!("{root}{path}/{file}")).ok();
    let list = below("/sys/fs/cgroup/cpuset", "cpuset.effective_cpus")
        .or_else(|| below("/sys/fs/cgroup", "cpuset.cpus.effective"))
        .or_else(|| below("/sys/fs/cgroup/unified", "cpuset.cpus.effective"))
        .or_else(|| procfs::read_text("/sys/devices/system/cpu/online").ok())?;
    parse(list.trim())
}

/// A list such as `0-3,8` (cpuset(7), "List format") as a mask.
fn parse(list: &str) -> Option<Vec<u8>> {
    let mut mask = vec![0u8; MASK];
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        for number in first.parse::<usize>().ok()?..=last.parse().ok()? {
            *mask.get_mut(number / 8)? |= 1 << (number % 8);
        }
    }
    trim(&mut mask);
    Some(mask)
}

/// Fills the field of `entry` if the thread has chosen fewer processors than its cpuset gives.
pub fn dump_affinity(mask: &[u8], cpuset: Option<&[u8]>, entry: &mut FerryThreadEntry) {
    entry.affinity = (cpuset.is_some_and(|cpuset| cpuset != mask)).then(|| mask.to_vec());
}

/// Appends the call that sets a chosen mask. Where none of its processors exists here, the thread keeps all.
pub fn restore_affinity(batch: &mut Batch<'_>, entry: &FerryThreadEntry, tid: u32) -> Result<(), TaskError> {
    let Some(mask) = &entry.affinity else { return Ok(()) };
    if mask.len() > MASK {
        return Err(TaskError::Image { tid, what: format!("its processor mask has {} bytes", mask.len()) });
    }
    let addr = batch.bytes(mask).0;
    batch.call(libc::SYS_sched_setaffinity, &[0, mask.len() as u64, addr]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_become_masks() {
        assert_eq!(parse("0-1"), Some(vec![3]));
        assert_eq!(parse("0,9-10"), Some(vec![1, 6]));
        assert_eq!(parse(""), Some(vec![]));
        assert_eq!(parse("0-99999"), None);
        assert_eq!(parse("x"), None);
    }

    #[test]
    fn only_a_chosen_mask_is_saved() {
        let mut entry = FerryThreadEntry::default();
        dump_affinity(&[3], Some(&[3]), &mut entry);
        assert_eq!(entry.affinity, None);
        dump_affinity(&[1], Some(&[3]), &mut entry);
        assert_eq!(entry.affinity, Some(vec![1]));
        dump_affinity(&[1], None, &mut entry);
        assert_eq!(entry.affinity, None);
    }
}
