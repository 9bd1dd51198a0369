//! The runner and its registers on x86-64.
//!
//! Facts relied on: the system call convention (number in rax, arguments in rdi rsi rdx r10 r8 r9, rcx and
//! r11 lost; syscall(2)); `struct rt_sigframe` and the xsave area behind it (arch/x86/kernel/signal_64.c,
//! arch/x86/include/uapi/asm/sigcontext.h); FUTEX numbers of futex(2).
#![allow(unsafe_code)] // the runner is assembly, and ferry's own copy of it is read as bytes.

use std::arch::{asm, global_asm};
use std::slice;

use crate::agent::landing::Landing;
use crate::sys::RemoteAddr;
use crate::sys::clone::CloneArguments;
use crate::sys::cpuid::{EXTENDED_START, XsaveLayout};

/// The machine code of a `syscall` instruction.
pub const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// General registers of a thread.
pub type Registers = libc::user_regs_struct;

// r15 is the slot throughout; no stack is used, so threads can share everything but their slots.
// Offsets are those of `agent::slot` (header) and `agent::batch` (operations); a test compares them.
global_asm!(
    ".pushsection .text.ferry_runner,\"ax\",@progbits",
    ".balign 16",
    ".global ferry_runner_start",
    ".global ferry_runner_end",
    "ferry_runner_start:",
    "2: lock or dword ptr [r15], 0x80000000", // FUTEX_WAITERS: have the kernel wake us when the owner dies
    "mov edx, dword ptr [r15]",
    "test edx, 0x40000000", // FUTEX_OWNER_DIED
    "jnz 8f",
    "cmp dword ptr [r15 + 4], 0",
    "jne 3f",
    "mov rdi, r15",
    "xor esi, esi",
    "xor r10d, r10d",
    "mov eax, 202", // futex(word, FUTEX_WAIT, value, NULL)
    "syscall",
    "jmp 2b",
    "3: mov r12, qword ptr [r15 + 8]",
    "mov r13, qword ptr [r15 + 16]",
    "4: test r13, r13",
    "jz 7f",
    // Not one call more when ferry is dead: its tracing held the task's seccomp filters back.
    "test dword ptr [r15], 0x40000000",
    "jnz 8f",
    "mov rax, qword ptr [r12]",
    "mov rdi, qword ptr [r12 + 8]",
    "mov rsi, qword ptr [r12 + 16]",
    "mov rdx, qword ptr [r12 + 24]",
    "mov r10, qword ptr [r12 + 32]",
    "mov r8, qword ptr [r12 + 40]",
    "mov r9, qword ptr [r12 + 48]",
    "mov r14, qword ptr [r12 + 72]", // before the call: when a child first runs, the next batch may be in its place
    "syscall",
    "test rax, rax",
    "jnz 5f",
    "test r14, r14",
    "jz 5f",
    "mov r15, r14", // the child of a clone: on to its own slot, touching nothing of its parent's
    "jmp 2b",
    "5: mov qword ptr [r12 + 56], rax",
    "mov rcx, qword ptr [r12 + 64]",
    "test rcx, rcx",
    "jz 6f",
    "test byte ptr [r12 + 80], 2",
    "jnz 9f",
    "mov qword ptr [rcx], rax",
    "6: test byte ptr [r12 + 80], 1",
    "jz 10f",
    "cmp rax, -4095",
    "jae 7f",
    "10: add r12, 88",
    "dec r13",
    "jmp 4b",
    "9: mov dword ptr [rcx], eax",
    "jmp 6b",
    "7: mov dword ptr [r15 + 4], 0",
    "test dword ptr [r15], 0x40000000",
    "jnz 8f",
    "lea rdi, [r15 + 4]",
    "mov esi, 1",
    "mov edx, 1",
    "mov eax, 202", // futex(work, FUTEX_WAKE, 1)
    "syscall",
    "jmp 2b",
    "8: mov rsp, qword ptr [r15 + 24]", // ferry died: back to the interrupted context, or away
    "test rsp, rsp",
    "jz 11f",
    "mov eax, 15", // rt_sigreturn
    "syscall",
    "11: mov edi, 1",
    "mov eax, 231", // exit_group
    "syscall",
    "ferry_runner_end:",
    ".popsection",
);

unsafe extern "C" {
    static ferry_runner_start: u8;
    static ferry_runner_end: u8;
}

/// The runner's machine code, which runs at any address.
pub fn runner_code() -> &'static [u8] {
    // SAFETY: both symbols delimit the assembly above, in the read-only text of this program.
    unsafe {
        let start = &raw const ferry_runner_start;
        slice::from_raw_parts(start, (&raw const ferry_runner_end).offset_from(start) as usize)
    }
}

/// The registers that make a thread at any stop execute pause(2) at the `syscall` instruction at `at`, and wait there for ever
/// while its signals are blocked.
pub fn parked_registers(base: &Registers, at: RemoteAddr) -> Registers {
    // No interrupted system call is to be restarted over these registers.
    Registers { rip: at.0, rax: libc::SYS_pause as u64, orig_rax: u64::MAX, ..*base }
}

/// Whether a stopped thread has [`parked_registers`], or is in the call that they make.
pub fn is_parked(registers: &Registers, at: RemoteAddr) -> bool {
    let pause = libc::SYS_pause as u64;
    (registers.rip == at.0 && registers.rax == pause)
        || (registers.rip == at.0 + SYSCALL_INSTRUCTION.len() as u64 && registers.orig_rax == pause)
}

/// How an instruction jumps to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SelfJump {
    /// By its own displacement.
    Relative,
    /// Through rcx. A system call overwrites it, but for calls at whose entry it was set: those return with all registers (iretq).
    Rcx,
    /// Through rbx.
    Rbx,
    /// Through rbp.
    Rbp,
}

impl SelfJump {
    /// All of them.
    pub const ALL: &'static [Self] = &[Self::Relative, Self::Rcx, Self::Rbx, Self::Rbp];
}

/// The first two bytes of `code` that jump to themselves, or would with the right value in a register.
pub fn find_self_jump(code: &[u8]) -> Option<(usize, SelfJump)> {
    let jump = |pair: &[u8]| match pair {
        [0xeb, 0xfe] => Some(SelfJump::Relative),
        [0xff, 0xe1] => Some(SelfJump::Rcx),
        [0xff, 0xe3] => Some(SelfJump::Rbx),
        [0xff, 0xe5] => Some(SelfJump::Rbp),
        _ => None,
    };
    code.windows(2).enumerate().find_map(|(offset, pair)| Some((offset, jump(pair)?)))
}

/// Makes a thread that returns from a system call with these registers land there.
fn land(registers: Registers, landing: Landing) -> Registers {
    let at = landing.at.0;
    let registers = Registers { rip: at, ..registers };
    match landing.jump {
        SelfJump::Relative => registers,
        SelfJump::Rcx => Registers { rcx: at, ..registers },
        SelfJump::Rbx => Registers { rbx: at, ..registers },
        SelfJump::Rbp => Registers { rbp: at, ..registers },
    }
}

/// The registers at the entry of a system call that make the kernel execute `number(arguments)` instead, and the thread land where it
/// can do no harm after that.
pub fn call_registers(at_entry: &Registers, number: i64, arguments: [u64; 6], landing: Option<Landing>) -> Registers {
    let registers = Registers {
        orig_rax: number as u64,
        rdi: arguments[0],
        rsi: arguments[1],
        rdx: arguments[2],
        r10: arguments[3],
        r8: arguments[4],
        r9: arguments[5],
        ..*at_entry
    };
    landing.map_or(registers, |landing| land(registers, landing))
}

/// The registers that start a thread in the runner at `code` with its slot at `slot`.
pub fn runner_registers(base: &Registers, code: RemoteAddr, slot: RemoteAddr) -> Registers {
    Registers { rip: code.0, r15: slot.0, orig_rax: u64::MAX, ..*base }
}

/// General registers as bytes.
pub fn to_bytes(registers: &Registers) -> [u8; size_of::<Registers>()] {
    // SAFETY: a structure of integers of one size, without padding, is bytes; their number is the same.
    unsafe { std::mem::transmute(*registers) }
}

/// General registers from the bytes that [`to_bytes`] gave.
pub fn from_bytes(bytes: &[u8; size_of::<Registers>()]) -> Registers {
    // SAFETY: every value is one of a structure of integers; the number of bytes is the same.
    unsafe { std::mem::transmute(*bytes) }
}

/// A system call's result at its exit stop.
pub fn call_result(registers: &Registers) -> i64 {
    registers.rax as i64
}

/// The registers with which an interrupted system call starts again, when that is what the kernel would do.
///
/// A thread stopped in a system call shows the kernel's internal codes in rax (include/linux/errno.h): 512 to 514
/// restart the call with its own arguments. 516 (`ERESTART_RESTARTBLOCK`) would go on through restart_syscall(2) with
/// a deadline that only the kernel knows; starting over is the nearest that the program cannot tell from a slow clock.
pub fn restart_interrupted_call(registers: &mut Registers) {
    if (registers.orig_rax as i64) < 0 {
        return;
    }
    if matches!(-(registers.rax as i64), 512..=514 | 516) {
        registers.rax = registers.orig_rax;
        registers.rip -= SYSCALL_INSTRUCTION.len() as u64;
        registers.orig_rax = u64::MAX;
    }
}

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
const UC_FLAGS: u64 = 1 | 2 | 4; // UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
const SW_RESERVED: usize = 464;
/// Which components of an xsave area are in use.
const XSTATE_BV: usize = 512;
/// The component of AMX's tiles, which a task must ask for (arch_prctl(2), ARCH_REQ_XCOMP_PERM).
const TILES: u32 = 18;
/// From the frame's start to its xsave area, which must be aligned to 64 bytes.
const FRAME_TO_XSTATE: usize = 512;

/// The most bytes that [`signal_frame`] takes for an extended state, alignment included.
pub fn signal_frame_size(xstate: &[u8]) -> usize {
    FRAME_TO_XSTATE + xstate.len() + size_of::<u32>() + 64
}

/// A `struct rt_sigframe` (from its `uc` on, where rt_sigreturn finds it) for the address `at`.
///
/// Executing rt_sigreturn with rsp = `at` resumes `registers`, `mask` and `xstate`. `at` must be aligned to 64 bytes.
pub fn signal_frame(at: RemoteAddr, registers: &Registers, mask: u64, xstate: &[u8]) -> Vec<u8> {
    let mut frame = vec![0u8; FRAME_TO_XSTATE];
    let mut put = |offset: usize, value: u64| frame[offset..offset + 8].copy_from_slice(&value.to_ne_bytes());
    put(0, UC_FLAGS);
    // struct sigcontext starts behind uc_flags, uc_link and uc_stack.
    let context = [
        registers.r8,
        registers.r9,
        registers.r10,
        registers.r11,
        registers.r12,
        registers.r13,
        registers.r14,
        registers.r15,
        registers.rdi,
        registers.rsi,
        registers.rbp,
        registers.rbx,
        registers.rdx,
        registers.rax,
        registers.rcx,
        registers.rsp,
        registers.rip,
        registers.eflags,
        registers.cs | registers.ss << 48,
    ];
    for (index, value) in context.into_iter().enumerate() {
        put(40 + 8 * index, value);
    }
    put(40 + 8 * 23, at.0 + FRAME_TO_XSTATE as u64); // fpstate, behind err, trapno, oldmask and cr2
    put(40 + 8 * 32, mask); // behind eight reserved words
    let mut area = xstate.to_vec();
    if area.len() > SW_RESERVED + 48 {
        let mut features = u64_at(&area, SW_RESERVED);
        // The kernel takes no more of a task than what it would save of it in a signal frame: no tiles, unless it uses them.
        let layout = XsaveLayout::of_this_machine();
        if layout.range(TILES).is_some() && u64_at(&area, XSTATE_BV) >> TILES & 1 == 0 {
            let others = (0..u64::BITS).filter(|number| *number != TILES).filter_map(|number| layout.range(number));
            area.truncate(others.map(|range| range.end).max().unwrap_or(EXTENDED_START));
            features &= !(1 << TILES);
        }
        let size = area.len() as u32;
        let reserved = &mut area[SW_RESERVED..SW_RESERVED + 48];
        reserved.fill(0);
        reserved[0..4].copy_from_slice(&FP_XSTATE_MAGIC1.to_ne_bytes());
        reserved[4..8].copy_from_slice(&(size + 4).to_ne_bytes());
        reserved[8..16].copy_from_slice(&features.to_ne_bytes());
        reserved[16..20].copy_from_slice(&size.to_ne_bytes());
        area.extend_from_slice(&FP_XSTATE_MAGIC2.to_ne_bytes());
    }
    frame.extend_from_slice(&area);
    frame
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..offset + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// Issues clone3 so that the parent gets the child's id and the child enters the runner at `code`.
///
/// # Safety
/// `arguments` must be valid and must not ask for shared memory or a stack; `code` must hold the runner and `slot` an
/// initialised slot, both mapped in the child too.
pub unsafe fn clone_into_runner(arguments: *const CloneArguments, code: u64, slot: u64) -> i64 {
    let result: i64;
    // SAFETY: the parent only loses the registers that the kernel clobbers; the child leaves for the runner with r15
    // set, which the compiler cannot see and need not.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov r15, {slot}",
            "jmp {code}",
            "2:",
            slot = in(reg) slot,
            code = in(reg) code,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") arguments,
            in("rsi") size_of::<CloneArguments>(),
            // Not `lateout`: the child still needs `slot` and `code` when the kernel has changed these.
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runner_is_small_and_ends_where_it_says() {
        let code = runner_code();
        assert!(code.len() > 100 && code.len() < 400, "{}", code.len());
        assert_eq!(code[code.len() - 2..], SYSCALL_INSTRUCTION);
    }

    #[test]
    fn jumps_to_themselves_are_found_anywhere() {
        assert_eq!(find_self_jump(&[0x90, 0x0f, 0xeb, 0xfe]), Some((2, SelfJump::Relative)));
        assert_eq!(find_self_jump(&[0x41, 0xff, 0xe3, 0xff, 0xe1]), Some((1, SelfJump::Rbx)));
        assert_eq!(find_self_jump(&[0xeb, 0xfd, 0xff, 0xe0, 0xff]), None);
    }

    #[test]
    fn only_kernel_restart_codes_are_restarted() {
        // SAFETY: a structure of integers, for which all zeroes is a value.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        registers.rip = 0x1002;
        registers.orig_rax = 35;
        registers.rax = -libc::EINTR as i64 as u64;
        restart_interrupted_call(&mut registers);
        assert_eq!((registers.rip, registers.orig_rax), (0x1002, 35));
        registers.rax = -516i64 as u64;
        restart_interrupted_call(&mut registers);
        assert_eq!((registers.rip, registers.rax, registers.orig_rax as i64), (0x1000, 35, -1));
    }
}
