//! State of tasks that images cannot hold yet, by name.
//!
//! What shows from outside is refused before anything is stopped; what only a stopped thread tells, before anything is
//! written.

use std::fs::{self, File};
use std::io::Read;

use super::{ProcessOutside, ThreadAnswers, ThreadOutside, timers};
use crate::error::Refusal;
use crate::sys::NsPid;
use crate::tree::TaskRef;

/// Offset and value in an ELF file's head that mark it as a 32-bit program (elf(5), `EI_CLASS`).
const ELF_CLASS: (usize, u8) = (4, 1);

/// Refusals that a running process shows. One that vanishes has none.
pub fn check_running(task: &TaskRef) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let status = fs::read(format!("/proc/{}/status", task.pid)).unwrap_or_default();
    let status = String::from_utf8_lossy(&status);
    let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim);
    if let Some(tracer) = field("TracerPid").filter(|tracer| *tracer != "0") {
        refusals.push(task.refuse("ptrace", format!("process {tracer} traces it"), "end that debugger or dump first"));
    }
    if field("x86_Thread_features").is_some_and(|features| features.contains("shstk")) {
        refusals.push(shadow_stack(task));
    }
    if is_32_bit(task) {
        let remedy = "run a 64-bit build of it";
        refusals.push(task.refuse("program", "it is a 32-bit program, and only 64-bit ones can be saved", remedy));
    }
    let threads = fs::read_dir(format!("/proc/{}/task", task.pid)).map_or(0, Iterator::count);
    refusals.extend(check_timers(task, &timers::collect_timers(task.pid).unwrap_or_default(), threads));
    refusals
}

fn shadow_stack(task: &TaskRef) -> Refusal {
    let remedy = "start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off";
    task.refuse("shadow stack", "it runs with a shadow stack, which cannot be saved yet", remedy)
}

fn is_32_bit(task: &TaskRef) -> bool {
    let mut head = [0; 16];
    let program = File::open(format!("/proc/{}/exe", task.pid));
    program.and_then(|mut program| program.read_exact(&mut head)).is_ok() && head[ELF_CLASS.0] == ELF_CLASS.1
}

fn check_timers(task: &TaskRef, listed: &[timers::Listed], threads: usize) -> Option<Refusal> {
    let timer = listed.iter().find(|timer| threads > 1 && timer.is_on_unknown_thread_clock())?;
    let problem = "it runs on the processor time of one of several threads, and the kernel does not tell of which";
    let remedy = "let it notify its thread (SIGEV_THREAD_ID), or use a timer of the process's time";
    Some(task.refuse(format!("POSIX timer {}", timer.id()), problem, remedy))
}

/// Refusals that only a stopped thread shows.
pub fn check_thread(task: &TaskRef, tid: NsPid, outside: &ThreadOutside, answers: &ThreadAnswers) -> Vec<Refusal> {
    let mut refusals: Vec<_> = outside
        .unsupported_state
        .iter()
        .map(|name| {
            let problem = format!("it uses the processor's {name}, which images cannot hold");
            task.refuse(format!("thread {tid}"), problem, "")
        })
        .collect();
    let mut refuse = |is: bool, problem: &str, remedy: &str| {
        if is {
            refusals.push(task.refuse(format!("thread {tid}"), problem, remedy));
        }
    };
    refuse(outside.dispatches_calls, "its system calls are dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH)", "");
    refuse(answers.switches.segments, "it has segments of its own (modify_ldt), which images cannot hold", "");
    let remedy = "start it without core scheduling";
    refuse(answers.scheduling.core_cookie, "it shares processor cores by a cookie (PR_SCHED_CORE)", remedy);
    if answers.switches.shadow_stack {
        refusals.push(shadow_stack(task));
    }
    refusals
}

/// Refusals that only a stopped process shows.
pub fn check_process(task: &TaskRef, outside: &ProcessOutside, threads: usize) -> Vec<Refusal> {
    check_timers(task, &outside.timers, threads).into_iter().collect()
}
