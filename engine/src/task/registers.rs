//! Registers of an x86-64 thread: general, x87 and SSE, and the components of the extended state.
//!
//! Facts relied on: `NT_X86_XSTATE` of ptrace(2) is the standard xsave format: the 512-byte fxsave area, a header whose
//! first word (`XSTATE_BV`) tells which components are not in their initial state, and each component where CPUID says
//! ([`XsaveLayout`]). A component whose bit is clear need not be saved: setting the area puts it into its initial state.
//!
//! Invariant: a component in use that the image format has no place for is a refusal, never dropped.

use nix::errno::Errno;

use super::{TaskError, words32, words64};
use crate::agent::arch::{self, Registers};
use crate::agent::inject::Context;
use crate::images::core::{CoreEntry, March};
use crate::images::core_x86::{
    ThreadInfoX86, UserDesc, UserX86FpregsEntry, UserX86RegsEntry, UserX86RegsMode, UserX86XsaveEntry,
};
use crate::sys::cpuid::{EXTENDED_START, XsaveLayout};
use crate::sys::{HostPid, ptrace};

const XSTATE_BV: usize = 512;
const ST_SPACE: std::ops::Range<usize> = 32..160;
const XMM_SPACE: std::ops::Range<usize> = 160..416;
/// Where a thread's own descriptors lie in the GDT (arch/x86/include/asm/segment.h).
const GDT_ENTRIES: std::ops::Range<u32> = 12..15;
/// x87 and SSE: always in the legacy area.
const LEGACY: u64 = 0b11;

/// Numbers of the components that the format has a place for (Intel SDM vol. 1, 13.1).
mod component {
    pub const YMM: u32 = 2;
    pub const BNDREGS: u32 = 3;
    pub const BNDCSR: u32 = 4;
    pub const OPMASK: u32 = 5;
    pub const ZMM_UPPER: u32 = 6;
    pub const HI16_ZMM: u32 = 7;
    pub const PKRU: u32 = 9;
    pub const ALL: [u32; 7] = [YMM, BNDREGS, BNDCSR, OPMASK, ZMM_UPPER, HI16_ZMM, PKRU];
}

/// A name for people of a component of the extended state.
pub fn component_name(number: u32) -> String {
    match number {
        component::YMM => "AVX".into(),
        component::BNDREGS | component::BNDCSR => "MPX".into(),
        component::OPMASK | component::ZMM_UPPER | component::HI16_ZMM => "AVX-512".into(),
        component::PKRU => "protection keys".into(),
        11 | 12 => "shadow stack".into(),
        17 | 18 => "AMX tiles".into(),
        19 => "APX".into(),
        other => format!("extended state component {other}"),
    }
}

/// Components of `xstate` that are in use and that the image format cannot hold.
pub fn unsupported_components(xstate: &[u8]) -> Vec<u32> {
    let known = component::ALL.iter().fold(LEGACY, |known, number| known | 1 << number);
    let unknown = header(xstate) & !known;
    (0..64).filter(|number| unknown >> number & 1 == 1).collect()
}

fn header(xstate: &[u8]) -> u64 {
    xstate.get(XSTATE_BV..XSTATE_BV + 8).map_or(0, |word| words64(word)[0])
}

/// The registers as an image holds them. An interrupted system call is set up to be made again.
pub fn dump_registers(context: &Context, clear_tid_addr: u64) -> ThreadInfoX86 {
    let mut registers = context.registers;
    arch::restart_interrupted_call(&mut registers);
    // A 64-bit thread has no descriptors of its own in the GDT; the format wants its three places all the same.
    let empty =
        |entry_number| UserDesc { entry_number, read_exec_only: true, seg_not_present: true, ..UserDesc::default() };
    ThreadInfoX86 {
        clear_tid_addr,
        gpregs: dump_general(&registers),
        fpregs: dump_extended(&context.xstate),
        tls: GDT_ENTRIES.map(empty).collect(),
    }
}

fn dump_general(registers: &Registers) -> UserX86RegsEntry {
    UserX86RegsEntry {
        r15: registers.r15,
        r14: registers.r14,
        r13: registers.r13,
        r12: registers.r12,
        bp: registers.rbp,
        bx: registers.rbx,
        r11: registers.r11,
        r10: registers.r10,
        r9: registers.r9,
        r8: registers.r8,
        ax: registers.rax,
        cx: registers.rcx,
        dx: registers.rdx,
        si: registers.rsi,
        di: registers.rdi,
        orig_ax: registers.orig_rax,
        ip: registers.rip,
        cs: registers.cs,
        flags: registers.eflags,
        sp: registers.rsp,
        ss: registers.ss,
        fs_base: registers.fs_base,
        gs_base: registers.gs_base,
        ds: registers.ds,
        es: registers.es,
        fs: registers.fs,
        gs: registers.gs,
        mode: Some(UserX86RegsMode::Native as i32),
    }
}

fn dump_extended(xstate: &[u8]) -> UserX86FpregsEntry {
    // Shorter only on a processor without fxsave, which x86-64 excludes; zeros then stand for the initial state.
    let mut legacy = [0; EXTENDED_START];
    let len = xstate.len().min(EXTENDED_START);
    legacy[..len].copy_from_slice(&xstate[..len]);
    let half = |at: usize| u32::from(u16::from_le_bytes([legacy[at], legacy[at + 1]]));
    let layout = XsaveLayout::of_this_machine();
    let part = |number: u32| layout.range(number).and_then(|range| xstate.get(range)).unwrap_or(&[]);
    let extended = (xstate.len() >= EXTENDED_START).then(|| UserX86XsaveEntry {
        xstate_bv: header(xstate),
        ymmh_space: words32(part(component::YMM)),
        bndreg_state: words64(part(component::BNDREGS)),
        bndcsr_state: words64(part(component::BNDCSR)),
        opmask_reg: words64(part(component::OPMASK)),
        zmm_upper: words64(part(component::ZMM_UPPER)),
        hi16_zmm: words64(part(component::HI16_ZMM)),
        pkru: words32(part(component::PKRU)),
        cet: None,
    });
    UserX86FpregsEntry {
        cwd: half(0),
        swd: half(2),
        twd: half(4),
        fop: half(6),
        rip: words64(&legacy[8..16])[0],
        rdp: words64(&legacy[16..24])[0],
        mxcsr: words32(&legacy[24..28])[0],
        mxcsr_mask: words32(&legacy[28..32])[0],
        st_space: words32(&legacy[ST_SPACE]),
        xmm_space: words32(&legacy[XMM_SPACE]),
        padding: Vec::new(),
        xsave: extended,
    }
}

/// What a restored thread gets last, by ptrace(2): its registers, its extended state and its blocked signals.
///
/// `fresh_xstate` is the extended state that the new thread has now, which gives the size and the parts that no image
/// holds.
///
/// # Errors
/// [`TaskError::Machine`] when the image needs a processor feature that this machine lacks, or a 32-bit task;
/// [`TaskError::Image`] when it is damaged.
pub fn final_registers(core: &CoreEntry, tid: u32, fresh_xstate: &[u8]) -> Result<Context, TaskError> {
    let damaged = |what: &str| TaskError::Image { tid, what: what.into() };
    if core.mtype != March::X86_64 as i32 {
        return Err(TaskError::Machine { tid, what: "the image was made on a machine other than x86-64".into() });
    }
    let info = core.thread_info.as_ref().ok_or_else(|| damaged("it has no registers"))?;
    if info.gpregs.mode.unwrap_or(UserX86RegsMode::Native as i32) != UserX86RegsMode::Native as i32 {
        return Err(TaskError::Machine {
            tid,
            what: "the thread ran 32-bit code, which ferry does not restore".into(),
        });
    }
    // A leader's mask stands with its process, the others' with their thread.
    let of_thread = core.thread_core.as_ref().and_then(|thread| thread.blk_sigset);
    let mask = core.tc.as_ref().map(|process| process.blk_sigset).or(of_thread).unwrap_or(0);
    Ok(Context {
        registers: restore_general(&info.gpregs),
        xstate: restore_extended(&info.fpregs, tid, fresh_xstate)?,
        mask,
    })
}

fn restore_general(entry: &UserX86RegsEntry) -> Registers {
    Registers {
        r15: entry.r15,
        r14: entry.r14,
        r13: entry.r13,
        r12: entry.r12,
        rbp: entry.bp,
        rbx: entry.bx,
        r11: entry.r11,
        r10: entry.r10,
        r9: entry.r9,
        r8: entry.r8,
        rax: entry.ax,
        rcx: entry.cx,
        rdx: entry.dx,
        rsi: entry.si,
        rdi: entry.di,
        // The dump has set an interrupted call up already: the kernel must not do it again.
        orig_rax: u64::MAX,
        rip: entry.ip,
        cs: entry.cs,
        eflags: entry.flags,
        rsp: entry.sp,
        ss: entry.ss,
        fs_base: entry.fs_base,
        gs_base: entry.gs_base,
        ds: entry.ds,
        es: entry.es,
        fs: entry.fs,
        gs: entry.gs,
    }
}

fn restore_extended(entry: &UserX86FpregsEntry, tid: u32, fresh: &[u8]) -> Result<Vec<u8>, TaskError> {
    let mut area = fresh.to_vec();
    if area.len() < XSTATE_BV {
        return Err(TaskError::Machine { tid, what: "this machine reports no extended registers".into() });
    }
    for (at, value) in [(0, entry.cwd), (2, entry.swd), (4, entry.twd), (6, entry.fop)] {
        area[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    area[8..16].copy_from_slice(&entry.rip.to_le_bytes());
    area[16..24].copy_from_slice(&entry.rdp.to_le_bytes());
    area[24..28].copy_from_slice(&entry.mxcsr.to_le_bytes());
    put(&mut area, ST_SPACE, &bytes32(&entry.st_space), tid)?;
    put(&mut area, XMM_SPACE, &bytes32(&entry.xmm_space), tid)?;
    if area.len() < EXTENDED_START {
        return Ok(area);
    }
    let layout = XsaveLayout::of_this_machine();
    let mut used = LEGACY;
    if let Some(extended) = &entry.xsave {
        let parts = [
            bytes32(&extended.ymmh_space),
            bytes64(&extended.bndreg_state),
            bytes64(&extended.bndcsr_state),
            bytes64(&extended.opmask_reg),
            bytes64(&extended.zmm_upper),
            bytes64(&extended.hi16_zmm),
            bytes32(&extended.pkru),
        ];
        let mut unknown = extended.xstate_bv & !LEGACY;
        for (number, bytes) in component::ALL.into_iter().zip(parts) {
            unknown &= !(1 << number);
            if extended.xstate_bv >> number & 1 == 0 || bytes.is_empty() {
                continue;
            }
            let missing = || TaskError::Machine {
                tid,
                what: format!("the thread uses {}, which this processor lacks", component_name(number)),
            };
            let range = layout.range(number).filter(|range| range.end <= area.len()).ok_or_else(missing)?;
            put(&mut area, range, &bytes, tid)?;
            used |= 1 << number;
        }
        if unknown != 0 {
            let what =
                format!("the thread uses {}, which ferry cannot restore", component_name(unknown.trailing_zeros()));
            return Err(TaskError::Machine { tid, what });
        }
    }
    area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&used.to_le_bytes());
    area[XSTATE_BV + 8..EXTENDED_START].fill(0);
    Ok(area)
}

fn put(area: &mut [u8], range: std::ops::Range<usize>, bytes: &[u8], tid: u32) -> Result<(), TaskError> {
    if range.len() != bytes.len() {
        let what = format!("a part of the extended registers has {} bytes instead of {}", bytes.len(), range.len());
        return Err(TaskError::Image { tid, what });
    }
    area[range].copy_from_slice(bytes);
    Ok(())
}

fn bytes32(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn bytes64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Gives a stopped thread the context that [`final_registers`] made.
///
/// # Errors
/// [`TaskError::Restore`]; `EINVAL` or `EIO` when the image asks for values that no program can have.
pub fn set_final_registers(tid: HostPid, context: &Context) -> Result<(), TaskError> {
    let failed = |what: &'static str| move |errno: Errno| TaskError::Restore { tid, what: what.into(), errno };
    ptrace::set_xstate(tid, &context.xstate).map_err(failed("extended registers"))?;
    ptrace::set_registers(tid, &context.registers).map_err(failed("registers"))?;
    ptrace::set_signal_mask(tid, context.mask).map_err(failed("blocked signals"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// All zero.
    pub fn none() -> Registers {
        restore_general(&UserX86RegsEntry::default())
    }

    fn area() -> Vec<u8> {
        let end =
            (2..64).filter_map(|number| XsaveLayout::of_this_machine().range(number)).map(|range| range.end).max();
        let mut area: Vec<u8> = (0..end.unwrap_or(EXTENDED_START)).map(|index| (index % 251) as u8).collect();
        // In use: everything that the format knows and this processor has.
        let has = |number: &u32| XsaveLayout::of_this_machine().range(*number).is_some();
        let used = component::ALL.into_iter().filter(has).fold(LEGACY, |used, number| used | 1 << number);
        area[XSTATE_BV..EXTENDED_START].fill(0);
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&used.to_le_bytes());
        area
    }

    #[test]
    fn the_extended_state_survives_bit_by_bit() {
        let area = area();
        let entry = dump_extended(&area);
        // A fresh thread differs wherever an image can hold something.
        let fresh: Vec<u8> = area.iter().map(|byte| !byte).collect();
        let restored = restore_extended(&entry, 1, &fresh).expect("fits");
        let known = component::ALL.into_iter().filter_map(|number| XsaveLayout::of_this_machine().range(number));
        for range in known.chain([0..24, 24..28, ST_SPACE, XMM_SPACE, XSTATE_BV..EXTENDED_START]) {
            assert_eq!(restored[range.clone()], area[range.clone()], "{range:?}");
        }
    }

    #[test]
    fn a_component_without_a_place_is_named() {
        let mut area = area();
        assert!(unsupported_components(&area).is_empty());
        area[XSTATE_BV + 2] |= 1 << 2; // component 18
        assert_eq!(unsupported_components(&area), [18]);
        assert_eq!(component_name(18), "AMX tiles");
    }

    #[test]
    fn damaged_and_foreign_states_are_errors() {
        let fresh = area();
        let mut cut = dump_extended(&fresh);
        cut.xmm_space.pop();
        assert!(matches!(restore_extended(&cut, 1, &fresh), Err(TaskError::Image { .. })));
        let mut foreign = dump_extended(&fresh);
        if let Some(extended) = &mut foreign.xsave {
            extended.xstate_bv |= 1 << 18;
        }
        assert!(matches!(restore_extended(&foreign, 1, &fresh), Err(TaskError::Machine { .. })));
        let lacking = fresh[..EXTENDED_START].to_vec();
        let whole = dump_extended(&fresh);
        if whole.xsave.as_ref().is_some_and(|extended| !extended.ymmh_space.is_empty()) {
            assert!(matches!(restore_extended(&whole, 1, &lacking), Err(TaskError::Machine { .. })));
        }
    }
}
