//! A system call that the stop interrupted, when a signal handler is about to run.
//!
//! The kernel decides at the moment of delivery whether an interrupted call is made again or fails with `EINTR`
//! (signal(7), "Interruption of system calls and library functions by signal handlers"; arch/x86/kernel/signal.c). In an image the call is made
//! again, from its first instruction. So where a handler waits to run, the decision must be made by the dump: else a
//! pause(2) whose signal came while the tree was stopped would, after its handler, wait for another one.

use super::signals::{Pending, signal_of};
use crate::agent::arch::Registers;
use crate::images::signal::SaEntry;

/// Internal codes of the kernel (include/linux/errno.h).
const ERESTARTSYS: i64 = -512;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
const SYNCHRONOUS: [i32; 6] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGTRAP, libc::SIGFPE, libc::SIGSYS];

/// The action of the handler that will run first, if any will: `queues` are looked through one after the other.
pub fn next_handler<'a>(queues: &[&Pending], blocked: u64, actions: &'a [SaEntry]) -> Option<&'a SaEntry> {
    queues.iter().find_map(|queue| {
        let mut signals: Vec<i32> = queue.iter().map(|info| signal_of(info)).collect();
        signals.sort_by_key(|signal| (!SYNCHRONOUS.contains(signal), *signal));
        let allowed =
            signals.into_iter().filter(|signal| (1..=64).contains(signal) && blocked >> (signal - 1) & 1 == 0);
        allowed
            .filter_map(|signal| action_of(signal, actions))
            .find(|action| ![libc::SIG_DFL as u64, libc::SIG_IGN as u64].contains(&action.sigaction))
    })
}

/// The entry for `signal` in a list that lacks SIGKILL and SIGSTOP.
fn action_of(signal: i32, actions: &[SaEntry]) -> Option<&SaEntry> {
    let before = [libc::SIGKILL, libc::SIGSTOP].iter().filter(|missing| **missing < signal).count();
    let missing = [libc::SIGKILL, libc::SIGSTOP].contains(&signal);
    if missing { None } else { actions.get(signal as usize - 1 - before) }
}

/// Makes an interrupted call return `EINTR` if the kernel would before it runs the handler of `action`.
pub fn settle(registers: &mut Registers, action: &SaEntry) {
    if (registers.orig_rax as i64) < 0 {
        return;
    }
    let fails = match registers.rax as i64 {
        ERESTARTNOHAND | ERESTART_RESTARTBLOCK => true,
        ERESTARTSYS => action.flags & libc::SA_RESTART as u64 == 0,
        _ => false,
    };
    if fails {
        registers.rax = -i64::from(libc::EINTR) as u64;
        registers.orig_rax = u64::MAX;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(signals: &[i32]) -> Pending {
        let info = |signal: &i32| {
            let mut info = [0; 128];
            info[..4].copy_from_slice(&signal.to_ne_bytes());
            info
        };
        signals.iter().map(info).collect()
    }

    fn actions(set: &[(usize, u64, u64)]) -> Vec<SaEntry> {
        let mut actions = vec![SaEntry::default(); 62];
        for (place, handler, flags) in set {
            (actions[*place].sigaction, actions[*place].flags) = (*handler, *flags);
        }
        actions
    }

    #[test]
    fn the_first_handler_is_found_behind_what_is_blocked_and_ignored() {
        // SIGHUP 1, SIGINT 2, SIGSEGV 11 (place 9, behind SIGKILL), SIGRTMIN 34 (place 31, behind SIGSTOP too).
        let actions = actions(&[(0, 0x100, 0), (1, 1, 0), (9, 0x200, 0), (31, 0x300, 0)]);
        let first = |signals: &[i32], blocked| {
            next_handler(&[&queue(&[]), &queue(signals)], blocked, &actions).map(|action| action.sigaction)
        };
        assert_eq!(first(&[34, 2, 1, 11], 0), Some(0x200), "synchronous ones first");
        assert_eq!(first(&[34, 2, 1], 0), Some(0x100));
        assert_eq!(first(&[34, 2, 1], 1), Some(0x300), "blocked, ignored");
        assert_eq!(first(&[2, 9, 19, 99], 0), None);
    }

    #[test]
    fn a_call_fails_where_the_kernel_would_let_it_fail() {
        let registers = |result: i64| {
            let mut registers = crate::task::registers::tests::none();
            (registers.orig_rax, registers.rax) = (7, result as u64);
            registers
        };
        for (result, flags, fails) in [
            (-512, 0, true),
            (-512, libc::SA_RESTART as u64, false),
            (-513, 0, false),
            (-514, libc::SA_RESTART as u64, true),
            (-516, 0, true),
            (-4, 0, true),
            (5, 0, false),
        ] {
            let mut settled = registers(result);
            settle(&mut settled, &SaEntry { flags, ..SaEntry::default() });
            assert_eq!(settled.rax as i64 == -4, fails, "{result}");
        }
    }
}
