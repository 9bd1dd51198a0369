//! Switches of the processor that the kernel keeps for each thread: time stamp counter, CPUID, speculation, shadow stack.
//!
//! Facts relied on: `PR_SET_TSC` and `PR_SET_SPECULATION_CTRL` of prctl(2); `ARCH_SET_CPUID` and `ARCH_SHSTK_STATUS` of
//! arch_prctl(2) (arch/x86/include/uapi/asm/prctl.h); modify_ldt(2) reads as many bytes as the table has.
//! A switch that the processor or kernel lacks cannot be in use: an error in asking is the default.

use super::{Checks, TaskError};
use crate::agent::{Answers, Batch, Call, Out};
use crate::images::extension::{FerryThreadEntry, SpeculationEntry};

const ARCH_GET_CPUID: u64 = 0x1011;
const ARCH_SET_CPUID: u64 = 0x1012;
const ARCH_SHSTK_STATUS: u64 = 0x5005;
const CPUID_FAULTS: u64 = 0;
const TSC_FAULTS: u32 = libc::PR_TSC_SIGSEGV as u32;
/// `PR_SPEC_STORE_BYPASS`, `PR_SPEC_INDIRECT_BRANCH`, `PR_SPEC_L1D_FLUSH`.
const SPECULATION: [(u32, &str); 3] = [(0, "store bypass"), (1, "indirect branches"), (2, "flush of the data cache")];
const PR_SPEC_PRCTL: u64 = 1;
const PR_SPEC_DISABLE: u64 = 1 << 2;
const PR_SPEC_FORCE_DISABLE: u64 = 1 << 3;
const PR_SPEC_DISABLE_NOEXEC: u64 = 1 << 4;
/// The data cache's flush is off by default; for it, "enable" is what a thread asks for.
const L1D_FLUSH: u32 = 2;
const PR_SPEC_ENABLE: u64 = 1 << 1;
const READ_LDT: u64 = 0;

/// The questions of one thread.
pub struct Questions {
    tsc: (Call, Out),
    cpuid: Call,
    speculation: [Call; SPECULATION.len()],
    shadow_stack: (Call, Out),
    segments: (Call, Out),
}

/// The switches of one thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Switches {
    tsc_faults: bool,
    cpuid_faults: bool,
    speculation: Vec<SpeculationEntry>,
    /// Whether it runs with a shadow stack, which images cannot hold yet.
    pub shadow_stack: bool,
    /// Whether its process has segments of its own (modify_ldt(2)), which images cannot hold.
    pub segments: bool,
}

impl Questions {
    /// Appends the questions.
    pub fn ask(batch: &mut Batch<'_>) -> Self {
        let mut with_out = |number: i64, before: &[u64], after: &[u64], len: usize| {
            let out = batch.space(len);
            (batch.call(number, &[before, &[out.addr.0], after].concat()), out)
        };
        let tsc = with_out(libc::SYS_prctl, &[libc::PR_GET_TSC as u64], &[], 4);
        let shadow_stack = with_out(libc::SYS_arch_prctl, &[ARCH_SHSTK_STATUS], &[], 8);
        let segments = with_out(libc::SYS_modify_ldt, &[READ_LDT], &[8], 8);
        let cpuid = batch.call(libc::SYS_arch_prctl, &[ARCH_GET_CPUID]);
        let speculation = SPECULATION
            .map(|(feature, _)| batch.call(libc::SYS_prctl, &[libc::PR_GET_SPECULATION_CTRL as u64, feature.into()]));
        Self { tsc, cpuid, speculation, shadow_stack, segments }
    }

    /// The switches.
    pub fn answers(&self, answers: &Answers<'_>) -> Switches {
        let said = |(call, out): (Call, Out)| answers.result(call).is_ok().then(|| answers.u32_at(out, 0));
        let controls = SPECULATION.iter().zip(self.speculation);
        let chosen = controls.filter_map(|((feature, _), call)| chosen(*feature, answers.result(call).ok()?));
        Switches {
            tsc_faults: said(self.tsc) == Some(TSC_FAULTS),
            cpuid_faults: answers.result(self.cpuid) == Ok(CPUID_FAULTS),
            speculation: chosen.collect(),
            shadow_stack: said(self.shadow_stack).is_some_and(|features| features != 0),
            segments: answers.result(self.segments.0).is_ok_and(|bytes| bytes > 0),
        }
    }
}

/// The control to set again, if the thread has chosen another than the default.
fn chosen(feature: u32, status: u64) -> Option<SpeculationEntry> {
    if status & PR_SPEC_PRCTL == 0 {
        return None;
    }
    let default = if feature == L1D_FLUSH { PR_SPEC_DISABLE } else { PR_SPEC_ENABLE };
    let all = [PR_SPEC_ENABLE, PR_SPEC_DISABLE, PR_SPEC_FORCE_DISABLE, PR_SPEC_DISABLE_NOEXEC];
    let control = all.into_iter().find(|control| status & control != 0 && *control != default)?;
    Some(SpeculationEntry { feature, control: control as u32 })
}

impl Switches {
    /// Fills the fields of `entry`.
    pub fn dump(&self, entry: &mut FerryThreadEntry) {
        entry.tsc_faults = self.tsc_faults.then_some(true);
        entry.cpuid_faults = self.cpuid_faults.then_some(true);
        entry.speculation.clone_from(&self.speculation);
    }
}

/// Appends the calls that set the switches of `entry`.
///
/// # Errors
/// [`TaskError::Image`] for a control that no kernel knows.
pub fn restore_switches(
    batch: &mut Batch<'_>,
    entry: &FerryThreadEntry,
    tid: u32,
    checks: &mut Checks,
) -> Result<(), TaskError> {
    if entry.tsc_faults == Some(true) {
        let arguments = [libc::PR_SET_TSC as u64, u64::from(TSC_FAULTS)];
        checks.call(batch, "ban on the time stamp counter", libc::SYS_prctl, &arguments);
    }
    if entry.cpuid_faults == Some(true) {
        checks.call(batch, "ban on CPUID", libc::SYS_arch_prctl, &[ARCH_SET_CPUID, CPUID_FAULTS]);
    }
    for SpeculationEntry { feature, control } in &entry.speculation {
        let Some((_, name)) = SPECULATION.iter().find(|(known, _)| known == feature) else {
            return Err(TaskError::Image { tid, what: format!("speculation control {feature} is unknown") });
        };
        let arguments = [libc::PR_SET_SPECULATION_CTRL as u64, u64::from(*feature), u64::from(*control)];
        checks.call(batch, format!("speculation control for {name}"), libc::SYS_prctl, &arguments);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_from_the_default_is_set_again() {
        assert_eq!(chosen(0, PR_SPEC_PRCTL | PR_SPEC_ENABLE), None);
        assert_eq!(chosen(0, PR_SPEC_DISABLE), None, "not this thread's choice");
        assert_eq!(chosen(L1D_FLUSH, PR_SPEC_PRCTL | PR_SPEC_DISABLE), None);
        let forced = chosen(1, PR_SPEC_PRCTL | PR_SPEC_FORCE_DISABLE).map(|entry| entry.control);
        assert_eq!(forced, Some(PR_SPEC_FORCE_DISABLE as u32));
        assert!(chosen(L1D_FLUSH, PR_SPEC_PRCTL | PR_SPEC_ENABLE).is_some());
    }
}
