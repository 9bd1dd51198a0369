//! The CPU's registers (x86-64): general ones in a spin loop, and each part of the xsave area.
//!
//! A thread fills registers with a pattern and holds them until a flag in memory changes, then stores them. The
//! loops are assembly, so that no compiler touches the registers in between. The vector loops sleep between looks: the kernel
//! keeps vector registers across a system call, and a spinning thread would take a whole CPU.

use crate::Workload;
use crate::room::{Check, Room};
use crate::sys::{Fault, ensure, pattern, wait_for};
use std::sync::atomic::{AtomicU32, Ordering};

std::arch::global_asm!(
    r#"
    .macro HOLD_UNTIL_ASKED
        lock inc dword ptr [rip + {entered}]
    71: sub rsp, 16
        mov qword ptr [rsp], 0
        mov qword ptr [rsp + 8], 2000000
        mov rdi, rsp
        xor esi, esi
        mov eax, 35
        syscall
        add rsp, 16
        mov ecx, 2000
    72: pause
        dec ecx
        jnz 72b
        cmp dword ptr [rip + {asked}], 0
        je 71b
    .endm

    // hold_general(pattern: rdi, out: rsi): fourteen registers and the flags.
    .globl hold_general
hold_general:
        push rbx
        push rbp
        push r12
        push r13
        push r14
        push r15
        push rsi
        lock inc dword ptr [rip + {entered}]
        mov rax, [rdi]
        mov rbx, [rdi + 8]
        mov rcx, [rdi + 16]
        mov rdx, [rdi + 24]
        mov rbp, [rdi + 32]
        mov rsi, [rdi + 40]
        mov r8, [rdi + 56]
        mov r9, [rdi + 64]
        mov r10, [rdi + 72]
        mov r11, [rdi + 80]
        mov r12, [rdi + 88]
        mov r13, [rdi + 96]
        mov r14, [rdi + 104]
        mov r15, [rdi + 112]
        mov rdi, [rdi + 48]
    73: pause
        cmp dword ptr [rip + {asked}], 0
        je 73b
        xchg rdi, [rsp]
        mov [rdi], rax
        mov [rdi + 8], rbx
        mov [rdi + 16], rcx
        mov [rdi + 24], rdx
        mov [rdi + 32], rbp
        mov [rdi + 40], rsi
        mov [rdi + 56], r8
        mov [rdi + 64], r9
        mov [rdi + 72], r10
        mov [rdi + 80], r11
        mov [rdi + 88], r12
        mov [rdi + 96], r13
        mov [rdi + 104], r14
        mov [rdi + 112], r15
        pop rax
        mov [rdi + 48], rax
        pop r15
        pop r14
        pop r13
        pop r12
        pop rbp
        pop rbx
        ret

    .macro EACH16 op, width, to_memory, prefix
        .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        .if \to_memory
        \op [r8 + \n * \width], \prefix\n
        .else
        \op \prefix\n, [r8 + \n * \width]
        .endif
        .endr
    .endm

    .macro VECTOR_HOLD name, op, width, prefix
    .globl \name
\name:
        push r12
        push r13
        sub rsp, 8
        mov r12, rdi
        mov r13, rsi
        mov r8, r12
        EACH16 \op, \width, 0, \prefix
        HOLD_UNTIL_ASKED
        mov r8, r13
        EACH16 \op, \width, 1, \prefix
        add rsp, 8
        pop r13
        pop r12
        ret
    .endm

    VECTOR_HOLD hold_sse, movups, 16, xmm
    VECTOR_HOLD hold_avx, vmovups, 32, ymm

    // hold_avx512(pattern: rdi, out: rsi): 32 vectors of 64 bytes, then eight masks.
    .globl hold_avx512
hold_avx512:
        push r12
        push r13
        sub rsp, 8
        mov r12, rdi
        mov r13, rsi
        .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        vmovups zmm\n, [r12 + \n * 64]
        .endr
        .irp n, 0,1,2,3,4,5,6,7
        kmovw k\n, [r12 + 2048 + \n * 2]
        .endr
        HOLD_UNTIL_ASKED
        .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        vmovups [r13 + \n * 64], zmm\n
        .endr
        .irp n, 0,1,2,3,4,5,6,7
        kmovw [r13 + 2048 + \n * 2], k\n
        .endr
        vzeroupper
        add rsp, 8
        pop r13
        pop r12
        ret

    // hold_x87(in: rdi, out: rsi): control word u16, mxcsr u32 at 4, three doubles at 8; out adds the status word at 2.
    .globl hold_x87
hold_x87:
        push r12
        push r13
        sub rsp, 24
        mov r12, rdi
        mov r13, rsi
        fnstcw [rsp]
        stmxcsr [rsp + 4]
        fninit
        fldcw [r12]
        ldmxcsr [r12 + 4]
        fld qword ptr [r12 + 8]
        fld qword ptr [r12 + 16]
        fld qword ptr [r12 + 24]
        HOLD_UNTIL_ASKED
        fnstcw [r13]
        fnstsw [r13 + 2]
        stmxcsr [r13 + 4]
        fstp qword ptr [r13 + 24]
        fstp qword ptr [r13 + 16]
        fstp qword ptr [r13 + 8]
        fninit
        fldcw [rsp]
        ldmxcsr [rsp + 4]
        add rsp, 24
        pop r13
        pop r12
        ret

    // hold_pkru(in: rdi, out: rsi): the protection keys' rights.
    .globl hold_pkru
hold_pkru:
        push r12
        push r13
        sub rsp, 8
        mov r12, rdi
        mov r13, rsi
        xor ecx, ecx
        xor edx, edx
        mov eax, [r12]
        wrpkru
        HOLD_UNTIL_ASKED
        xor ecx, ecx
        rdpkru
        mov [r13], eax
        add rsp, 8
        pop r13
        pop r12
        ret
"#,
    entered = sym ENTERED,
    asked = sym ASKED,
);

type Hold = unsafe extern "C" fn(*const u8, *mut u8);

unsafe extern "C" {
    fn hold_general(pattern: *const u8, out: *mut u8);
    fn hold_sse(pattern: *const u8, out: *mut u8);
    fn hold_avx(pattern: *const u8, out: *mut u8);
    fn hold_avx512(pattern: *const u8, out: *mut u8);
    fn hold_x87(pattern: *const u8, out: *mut u8);
    fn hold_pkru(pattern: *const u8, out: *mut u8);
}

/// Threads that hold their pattern.
static ENTERED: AtomicU32 = AtomicU32::new(0);
/// Not zero: store what you hold.
static ASKED: AtomicU32 = AtomicU32::new(0);

/// A check that `count` threads, each holding what `content` makes of its number, still hold it.
fn holds(hold: Hold, count: u64, content: fn(u64) -> Vec<u8>) -> Result<Check, Fault> {
    let start = move || {
        ENTERED.store(0, Ordering::SeqCst);
        ASKED.store(0, Ordering::SeqCst);
        let all: Vec<_> = (0..count)
            .map(|number| {
                std::thread::spawn(move || {
                    let want = content(number);
                    let mut got = vec![0u8; want.len()];
                    // SAFETY: both buffers have the size that this loop reads and writes, the same for both.
                    unsafe { hold(want.as_ptr(), got.as_mut_ptr()) };
                    (want, got)
                })
            })
            .collect();
        wait_for("the threads to hold", || u64::from(ENTERED.load(Ordering::SeqCst)) == count).map(|()| all)
    };
    let mut running = start()?;
    Ok(Box::new(move || {
        ASKED.store(1, Ordering::SeqCst);
        let mut changed = Vec::new();
        for thread in std::mem::take(&mut running) {
            let (want, got) = thread.join().map_err(|_| "the thread panicked")?;
            changed.extend(want.iter().zip(&got).enumerate().filter(|(_, (a, b))| a != b).map(|(at, _)| at).take(4));
        }
        running = start()?;
        ensure!(changed.is_empty(), "registers changed at bytes {changed:?}");
        Ok(())
    }))
}

fn general(_: &Room) -> Result<Check, Fault> {
    holds(hold_general, 1, |number| pattern(number + 50, 120))
}

fn sse(_: &Room) -> Result<Check, Fault> {
    holds(hold_sse, 3, |number| pattern(number + 60, 256))
}

fn avx(_: &Room) -> Result<Check, Fault> {
    holds(hold_avx, 3, |number| pattern(number + 70, 512))
}

fn avx512(_: &Room) -> Result<Check, Fault> {
    holds(hold_avx512, 3, |number| pattern(number + 80, 2048 + 16))
}

fn x87(_: &Room) -> Result<Check, Fault> {
    holds(hold_x87, 2, |number| {
        // Control: round up, double precision; status: three values on the stack; mxcsr: round to zero, flush to zero.
        let (control, status, mxcsr) = (0x0A7Fu16, 0x2800u16, 0xFF80u32);
        let mut content = [&control.to_le_bytes()[..], &status.to_le_bytes(), &mxcsr.to_le_bytes()].concat();
        for value in [1.5, -2.25e300, number as f64 + 0.125] {
            content.extend_from_slice(&f64::to_le_bytes(value));
        }
        content
    })
}

fn pkru(_: &Room) -> Result<Check, Fault> {
    // Rights of the keys 1, 2, 14 and 15 taken away; key 0, which all memory has, is left alone.
    holds(hold_pkru, 2, |_| 0xF000_0034u32.to_le_bytes().to_vec())
}

/// Why this CPU cannot hold such registers, by the flag that /proc/cpuinfo would show.
fn without(flag: &str) -> Option<String> {
    let known = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if known.split_whitespace().any(|word| word == flag) { None } else { Some(format!("the CPU has no {flag}")) }
}

/// The workloads of this file, with the CPU features they need.
pub const WORKLOADS: &[Workload] = &[
    Workload { name: "registers_general", setup: general, missing: || None },
    Workload { name: "registers_sse", setup: sse, missing: || None },
    Workload { name: "registers_x87", setup: x87, missing: || None },
    Workload { name: "registers_avx", setup: avx, missing: || without("avx") },
    Workload { name: "registers_avx512", setup: avx512, missing: || without("avx512f") },
    Workload { name: "registers_pkru", setup: pkru, missing: || without("ospke") },
];
