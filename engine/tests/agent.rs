//! The agent in a real process: what it runs, and that it leaves no trace.

use ferry_engine::agent::NODE;
use ferry_engine::agent::inject::{Context, Injected, Overseer, find_syscall_instruction};
use ferry_engine::sys::ptrace;
use ferry_engine::sys::robust::RobustList;

mod sleeper;
use sleeper::{Sleeper, maps, vdso};

#[test]
fn runs_a_batch_and_leaves_no_trace() {
    let (_sleeper, pid) = Sleeper::start();
    let maps_before = maps(pid);
    ptrace::seize(pid, 0).expect("seize");
    ptrace::interrupt(pid).expect("interrupt");
    assert_eq!(ptrace::wait_stop(pid), Ok(ptrace::Stop::Interrupted));
    let context = Context::collect(pid).expect("context");
    let at = find_syscall_instruction(pid, [vdso(pid)]).expect("a syscall instruction");
    let mut list = RobustList::install(NODE).expect("robust list");
    let injected = Injected::new(pid, &context, at, 0, &mut list, Overseer::default()).expect("inject");

    let mut batch = injected.leader().batch();
    let getpid = batch.call(libc::SYS_getpid, &[]);
    let text = batch.path("/proc/self/status");
    let out = batch.space(16);
    let open = batch.must(libc::SYS_openat, &[libc::AT_FDCWD as u64, text.0, libc::O_RDONLY as u64]);
    let read = batch.must(libc::SYS_read, &[0, out.addr.0, 16]);
    let close = batch.must(libc::SYS_close, &[0]);
    batch.pass(open, read, 0);
    let answers = batch.run().expect("batch");
    assert_eq!(answers.result(getpid), Ok(pid.0 as u64));
    assert_eq!(answers.bytes(out), b"Name:\tsleep\nUmas");
    assert_eq!(answers.result(close), Ok(0), "the standard input was closed, as asked");

    // An error ends the batch at a call that must succeed.
    let mut batch = injected.leader().batch();
    let bad = batch.must(libc::SYS_close, &[12345]);
    let never = batch.call(libc::SYS_getpid, &[]);
    let answers = batch.run().expect("batch");
    assert_eq!(answers.result(bad), Err(nix::errno::Errno::EBADF));
    assert_eq!(answers.result(never), Err(nix::errno::Errno::ECANCELED));

    injected.leave().expect("leave");
    list.clear();
    let after = Context::collect(pid).expect("context");
    assert_eq!(
        (after.registers.rip, after.registers.rsp, after.registers.orig_rax, after.mask),
        (context.registers.rip, context.registers.rsp, context.registers.orig_rax, context.mask)
    );
    assert_eq!(after.xstate, context.xstate);
    ptrace::detach(pid, 0).expect("detach");
    assert_eq!(maps(pid), maps_before);
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    assert!(state.contains(") S ") || state.contains(") R "), "{state}");
}

#[test]
fn a_stop_that_comes_meanwhile_is_taken_later() {
    let (_sleeper, pid) = Sleeper::start();
    ptrace::seize(pid, 0).expect("seize");
    ptrace::interrupt(pid).expect("interrupt");
    assert_eq!(ptrace::wait_stop(pid), Ok(ptrace::Stop::Interrupted));
    let context = Context::collect(pid).expect("context");
    let at = find_syscall_instruction(pid, [vdso(pid)]).expect("a syscall instruction");
    let nix_pid = nix::unistd::Pid::from_raw(pid.0);
    nix::sys::signal::kill(nix_pid, nix::sys::signal::Signal::SIGSTOP).expect("kill");
    let mut list = RobustList::install(NODE).expect("robust list");
    let injected = Injected::new(pid, &context, at, 0, &mut list, Overseer::default()).expect("inject");
    let answers = injected.leader().call(libc::SYS_getpid, &[]).expect("a call");
    assert_eq!(answers, pid.0 as u64);
    injected.leave().expect("leave");
    list.clear();
    assert_eq!(ptrace::pending_signals(pid, true).expect("queue").len(), 1, "the SIGSTOP waits again");
    ptrace::detach(pid, 0).expect("detach");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while !std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat").contains(") T ") {
        assert!(std::time::Instant::now() < deadline, "it does not stop");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn the_task_runs_on_when_the_tracing_thread_dies() {
    let (_sleeper, pid) = Sleeper::start();
    // The thread ends while the runner waits for work; the kernel wakes the runner through the robust list.
    std::thread::spawn(move || {
        ptrace::seize(pid, 0).expect("seize");
        ptrace::interrupt(pid).expect("interrupt");
        ptrace::wait_stop(pid).expect("stop");
        let context = Context::collect(pid).expect("context");
        let at = find_syscall_instruction(pid, [vdso(pid)]).expect("a syscall instruction");
        let mut list = RobustList::install(NODE).expect("robust list");
        let injected = Injected::new(pid, &context, at, 0, &mut list, Overseer::default()).expect("inject");
        injected.leader().call(libc::SYS_getpid, &[]).expect("a call");
        // Neither the list nor the area is put right: as if ferry had been killed.
        std::mem::forget((list, injected));
    })
    .join()
    .expect("the thread");
    // Back in its nanosleep, which the frame starts again.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the task lives");
        let wchan = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        if stat.contains(") S ") && wchan.contains("nanosleep") {
            break;
        }
        assert!(!stat.contains(") Z "), "the task died: {stat}");
        assert!(std::time::Instant::now() < deadline, "the task does not run on: {stat} {wchan}");
        std::thread::yield_now();
    }
}
