//! The state of tasks: put into a live process by the restore halves, seen by the kernel, and read back by the dump halves.

use std::fs;

use ferry_engine::agent::inject::{Context, Injected, Overseer, find_syscall_instruction};
use ferry_engine::agent::{NODE, Runner};
use ferry_engine::images::core::{CoreEntry, RlimitEntry, ThreadSasEntry};
use ferry_engine::images::extension::{FerryTaskEntry, FerryThreadEntry};
use ferry_engine::images::seccomp::{SeccompEntry, SeccompFilter, SeccompMode};
use ferry_engine::images::signal::SiginfoEntry;
use ferry_engine::images::timer::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use ferry_engine::procfs::Stat;
use ferry_engine::sys::robust::RobustList;
use ferry_engine::sys::{HostPid, NsPid, process_vm, ptrace};
use ferry_engine::task::process::{dump_leader, restore_process};
use ferry_engine::task::seccomp::{self, FilterTable};
use ferry_engine::task::signals::{self, QueueIds};
use ferry_engine::task::thread::{restore_identity, restore_thread};
use ferry_engine::task::{
    Checks, Process, ProcessOutside, ProcessQuestions, Queues, Thread, ThreadOutside, ThreadQuestions, identity,
    refuse, registers, timers,
};
use ferry_engine::tree::TaskRef;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

mod sleeper;
use sleeper::{Sleeper, vdso};

/// A stopped process.
struct Victim {
    _sleeper: Sleeper,
    pid: HostPid,
    context: Context,
    stop: ptrace::Stop,
    list: RobustList,
}

impl Victim {
    fn stop() -> Self {
        let (sleeper, pid) = Sleeper::start();
        ptrace::seize(pid, ptrace::OPTION_SUSPEND_SECCOMP).expect("seize");
        ptrace::interrupt(pid).expect("interrupt");
        let stop = ptrace::wait_stop(pid).expect("stop");
        let context = Context::collect(pid).expect("context");
        Self { _sleeper: sleeper, pid, context, stop, list: RobustList::install(NODE).expect("list") }
    }

    /// Runs `work` with an agent in the process, which is taken out again.
    fn with_agent<T>(&mut self, work: impl FnOnce(&Runner) -> T) -> T {
        let at = find_syscall_instruction(self.pid, [vdso(self.pid)]).expect("an instruction");
        let injected =
            Injected::new(self.pid, &self.context, at, 0, &mut self.list, Overseer::default()).expect("inject");
        let result = work(injected.leader());
        injected.leave().expect("leave");
        self.list.clear();
        result
    }

    fn dump(&mut self) -> (CoreEntry, SeccompEntry) {
        let (pid, stop) = (self.pid, self.stop);
        let thread = ThreadOutside::collect(pid, stop, &mut self.context).expect("thread");
        let process = ProcessOutside::collect(pid).expect("process");
        let (thread_answers, process_answers) = self.with_agent(|runner| {
            let mut batch = runner.batch();
            let of_thread = ThreadQuestions::ask(&mut batch);
            let of_process = ProcessQuestions::ask(&mut batch, &process);
            let answers = batch.run().expect("questions");
            let same = |tid: HostPid| NsPid(tid.0);
            let thread = of_thread.answers(&answers).expect("thread");
            let process = of_process.answers(&answers, same).expect("process");
            (thread.complete(runner).expect("thread"), process)
        });
        let queues = Queues::collect([pid]).expect("queues");
        let stat = Stat::read(pid).expect("stat");
        let mut table = FilterTable::default();
        let thread = Thread { place: 0, context: &self.context, outside: &thread, answers: &thread_answers };
        let process = Process { outside: &process, answers: &process_answers, queues: &queues };
        let core = dump_leader(thread, process, stop, &stat, &mut table);
        (core, table.finish())
    }

    fn restore(&mut self, core: &CoreEntry, filters: &SeccompEntry) {
        let pid = self.pid;
        let tid = pid.0 as u32;
        self.with_agent(|runner| {
            let mut batch = runner.batch();
            // The sleeper's C library has registered its own.
            let rseq = ptrace_free_rseq(core);
            batch.call(libc::SYS_rseq, &rseq);
            let of_thread = restore_thread(&mut batch, core, tid).expect("thread");
            let of_process = restore_process(&mut batch, core, tid).expect("process");
            let answers = batch.run().expect("batch");
            of_thread.verify(pid, &answers).expect("thread");
            of_process.verify(pid, &answers).expect("process");
            let process = core.tc.as_ref().expect("a leader");
            let times = process.timers.as_ref().expect("timers");
            timers::create_timers(runner, times, tid, tid).expect("timers");
            let ids = QueueIds { process: tid, thread: tid };
            signals::restore_queues(runner, core, ids).expect("queues");
            let wanted = seccomp::wanted(core, core, filters, tid).expect("seccomp");
            seccomp::restore_seccomp(runner, &wanted, seccomp::Share { common: 0, leads: true }).expect("seccomp");
            let mut batch = runner.batch();
            let done = restore_identity(&mut batch, core, tid).expect("identity");
            let answers = batch.run().expect("batch");
            done.verify(runner, &answers).expect("identity");
            timers::arm_timers(runner, times).expect("arm");
        });
        identity::restore_oom_score_adj(pid, process_oom(core)).expect("oom_score_adj");
        let fresh = ptrace::xstate(pid).expect("xstate");
        self.context = registers::final_registers(core, tid, &fresh).expect("registers");
        registers::set_final_registers(pid, &self.context).expect("registers");
    }

    fn status(&self, key: &str) -> String {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("status");
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    }
}

fn process_oom(core: &CoreEntry) -> Option<i32> {
    core.tc.as_ref().and_then(|process| process.oom_score_adj)
}

/// Arguments that end the registration of `core`'s thread.
fn ptrace_free_rseq(core: &CoreEntry) -> [u64; 4] {
    let entry = core.thread_core.as_ref().and_then(|thread| thread.rseq_entry.clone()).unwrap_or_default();
    [entry.rseq_abi_pointer, entry.rseq_abi_size.into(), 1, entry.signature.into()]
}

/// Compares line by line what the two print, and shows the lines that differ only.
fn assert_same(left: &CoreEntry, right: &CoreEntry) {
    let (left, right) = (format!("{left:#?}"), format!("{right:#?}"));
    let pairs = left.lines().zip(right.lines());
    let differences: Vec<_> = pairs.enumerate().filter(|(_, (left, right))| left != right).take(9).collect();
    assert!(differences.is_empty() && left.len() == right.len(), "{differences:#?}");
}

/// The same state, without what time changes, the kernel's own flags, and an interrupted call that is set up again.
fn timeless(mut core: CoreEntry) -> CoreEntry {
    if let Some(process) = &mut core.tc {
        process.flags = 0;
    }
    if let Some(info) = &mut core.thread_info {
        info.gpregs.orig_ax = u64::MAX;
        if let Some(xsave) = &mut info.fpregs.xsave {
            xsave.xstate_bv |= 3;
        }
    }
    if let Some(times) = core.tc.as_mut().and_then(|process| process.timers.as_mut()) {
        for timer in [&mut times.real, &mut times.virt, &mut times.prof] {
            (timer.vsec, timer.vusec) = (0, 0);
        }
        for timer in &mut times.posix {
            (timer.vsec, timer.vnsec, timer.overrun) = (0, 0, 0);
        }
    }
    core
}

fn siginfo(signal: i32, code: i32, value: u64) -> SiginfoEntry {
    let mut siginfo = vec![0; 128];
    siginfo[0..4].copy_from_slice(&signal.to_ne_bytes());
    siginfo[8..12].copy_from_slice(&code.to_ne_bytes());
    siginfo[16..20].copy_from_slice(&4711i32.to_ne_bytes());
    siginfo[20..24].copy_from_slice(&99u32.to_ne_bytes());
    siginfo[24..32].copy_from_slice(&value.to_ne_bytes());
    SiginfoEntry { siginfo }
}

#[test]
fn a_plain_process_is_itself_after_a_restore_of_its_own_state() {
    let mut victim = Victim::stop();
    let (core, filters) = victim.dump();
    victim.restore(&core, &filters);
    let (again, _) = victim.dump();
    assert_same(&timeless(again), &timeless(core.clone()));
    let info = core.thread_info.expect("registers");
    assert_eq!(info.gpregs.ax, 230, "clock_nanosleep is made again");
    assert!(info.fpregs.mxcsr != 0 && info.fpregs.xsave.is_some());
    assert!(info.clear_tid_addr != 0, "the C library sets it");
}

#[test]
fn every_setting_is_restored_and_read_back() {
    let mut victim = Victim::stop();
    let (mut core, _) = victim.dump();
    let allow = SeccompFilter { filter: vec![6, 0, 0, 0, 0, 0, 0xff, 0x7f], prev: None, flags: Some(0) };
    let filters = SeccompEntry { seccomp_filters: vec![allow.clone(), SeccompFilter { prev: Some(0), ..allow }] };

    let process = core.tc.as_mut().expect("a leader");
    process.comm = b"a (new) name".to_vec();
    process.personality = 0x0040000; // ADDR_NO_RANDOMIZE
    process.child_subreaper = Some(true);
    process.membarrier_registration_mask = Some(1 << 4);
    process.oom_score_adj = Some(500);
    process.blk_sigset = 1 << 9 | 1 << 11 | 1 << 33 | 1 << 13 | 1 << 25 | 1 << 26;
    let action = &mut process.sigactions[9]; // SIGUSR1 is 10; SIGKILL has no entry.
    (action.sigaction, action.flags, action.restorer, action.mask) = (0x1000, 0x1400_0004, 0x2000, 0xf0f0);
    process.signals_s.as_mut().expect("a queue").signals =
        vec![siginfo(34, -1, 1), siginfo(12, -1, 2), siginfo(34, -1, 3)];
    let limits = &mut process.rlimits.as_mut().expect("limits").rlimits;
    limits[7] = RlimitEntry { cur: 100, max: 200 };
    let times = process.timers.as_mut().expect("timers");
    times.real = ItimerEntry { isec: 5, iusec: 6, vsec: 1000, vusec: 8 };
    times.prof = ItimerEntry { isec: 0, iusec: 0, vsec: 2000, vusec: 0 };
    let timer = |it_id, si_signo, it_sigev_notify| PosixTimerEntry {
        it_id,
        clock_id: 1,
        si_signo,
        it_sigev_notify,
        sival_ptr: 0xdead_beef,
        isec: 7,
        insec: 8,
        vsec: 5000,
        ..PosixTimerEntry::default()
    };
    let mut to_thread = timer(9, 14, libc::SIGEV_THREAD_ID as u32);
    to_thread.notify_thread_id = Some(victim.pid.0);
    times.posix = vec![timer(3, 14, 0), to_thread, PosixTimerEntry { isec: 0, insec: 0, vsec: 0, ..timer(70, 14, 0) }];

    let thread = core.thread_core.as_mut().expect("a thread");
    thread.comm = Some(b"a (new) name".to_vec());
    thread.sas = Some(ThreadSasEntry { ss_sp: 0x10000, ss_size: 65536, ss_flags: 0 });
    thread.pdeath_sig = Some(12);
    thread.sched_nice = Some(7);
    thread.sched_policy = Some(libc::SCHED_RR as u32 | libc::SCHED_RESET_ON_FORK as u32);
    thread.sched_prio = Some(3);
    thread.signals_p.as_mut().expect("a queue").signals = vec![siginfo(10, -6, 0)];
    (thread.seccomp_mode, thread.seccomp_filter) = (Some(SeccompMode::Filter as i32), Some(1));
    let creds = thread.creds.as_mut().expect("credentials");
    (creds.uid, creds.euid, creds.suid, creds.fsuid) = (1001, 1002, 1003, 1004);
    (creds.gid, creds.egid, creds.sgid, creds.fsgid) = (2001, 2002, 2003, 2004);
    creds.groups = vec![7, 3000, 4000];
    creds.cap_inh = vec![1 << 10 | 1 << 5, 0];
    creds.cap_prm = vec![1 << 10 | 1 << 12, 1 << 6];
    creds.cap_eff = vec![1 << 12, 1 << 6];
    creds.cap_bnd = vec![1 << 10 | 1 << 12, 1 << 6];
    creds.cap_amb = vec![1 << 10, 0];
    creds.secbits = 0x2c; // SECBIT_NO_SETUID_FIXUP with its lock, and the lock of SECBIT_KEEP_CAPS
    creds.no_new_privs = Some(1);
    thread.ferry = Some(FerryThreadEntry {
        io_priority: Some(2 << 13 | 7),
        affinity: Some(vec![1]),
        tsc_faults: Some(true),
        ..FerryThreadEntry::default()
    });
    let info = core.thread_info.as_mut().expect("registers");
    info.clear_tid_addr = 0x12340;
    info.gpregs.r12 = 0x1122_3344_5566_7788;
    info.fpregs.xmm_space[5] = 0x55aa_55aa;
    if let Some(xsave) = &mut info.fpregs.xsave
        && let Some(word) = xsave.ymmh_space.get_mut(9)
    {
        *word = 0x1234_5678;
        xsave.xstate_bv |= 4;
    }

    victim.restore(&core, &filters);
    // The kernel agrees,
    assert_eq!(victim.status("Name"), "a (new) name");
    assert_eq!(victim.status("Uid"), "1001\t1002\t1003\t1004");
    assert_eq!(victim.status("Gid"), "2001\t2002\t2003\t2004");
    assert_eq!(victim.status("Groups"), "7 3000 4000");
    assert_eq!(victim.status("CapPrm"), "0000004000001400");
    assert_eq!(victim.status("CapAmb"), "0000000000000400");
    assert_eq!(victim.status("NoNewPrivs"), "1");
    assert_eq!((victim.status("Seccomp").as_str(), victim.status("Seccomp_filters").as_str()), ("2", "2"));
    assert_eq!(victim.status("SigBlk"), format!("{:016x}", core.tc.as_ref().expect("a leader").blk_sigset));
    assert_eq!(victim.status("SigPnd"), "0000000000000200");
    assert_eq!(victim.status("ShdPnd"), "0000000200000800");
    let limits = fs::read_to_string(format!("/proc/{}/limits", victim.pid)).expect("limits");
    assert!(limits.lines().any(|line| line.split_ascii_whitespace().eq("Max open files 100 200 files".split(' '))));
    // and so does a dump, but for the order between signals: by number, then by age.
    let (again, table) = victim.dump();
    assert_eq!(table, filters);
    let left = again.tc.as_ref().and_then(|process| process.timers.as_ref()).expect("timers").clone();
    assert_same(&timeless(again), &timeless(core));
    assert!((999..=1000).contains(&left.real.vsec), "{left:?}");
    assert!(left.posix[..2].iter().all(|timer| timer.vsec == 4999), "{left:?}");
    assert_eq!((left.posix[2].vsec, left.posix[2].vnsec), (0, 0), "a timer that did not run does not run");
}

#[test]
fn the_ban_on_making_memory_executable_is_restored() {
    let mut victim = Victim::stop();
    let pid = victim.pid;
    // The agent itself cannot come in after it, so it stays for the questions.
    victim.with_agent(|runner| {
        let mut batch = runner.batch();
        let mut checks = Checks::default();
        let wanted = FerryTaskEntry { mdwe: Some(1), memory_merge: None };
        identity::restore_memory_rules(&mut batch, &wanted, &mut checks);
        let questions = identity::ProcessQuestions::ask(&mut batch);
        let answers = batch.run().expect("batch");
        checks.verify(pid, &answers).expect("rules");
        let settings = questions.answers(&answers).expect("settings");
        assert_eq!(settings.dump_extension(), Some(wanted));
    });
}

#[test]
fn what_images_cannot_hold_is_refused_by_name() {
    let mut victim = Victim::stop();
    let pid = victim.pid;
    let task = TaskRef::open(pid, NsPid(pid.0), "sleep".into()).expect("the process");
    let running = refuse::check_running(&task);
    assert!(running.len() == 1 && running[0].object == "ptrace", "we trace it: {running:?}");

    let outside = ThreadOutside::collect(pid, victim.stop, &mut victim.context).expect("thread");
    let answers = victim.with_agent(|runner| {
        let mut batch = runner.batch();
        // A 32-bit data segment over all memory (modify_ldt(2), `struct user_desc`).
        let segment = batch.bytes([0u32, 0, 0xfffff, 0b1_0001].map(u32::to_ne_bytes).as_flattened());
        let made = batch.call(libc::SYS_modify_ldt, &[1, segment.0, 16]);
        let questions = ThreadQuestions::ask(&mut batch);
        let answers = batch.run().expect("batch");
        assert_eq!(answers.result(made), Ok(0));
        questions.answers(&answers).expect("thread").complete(runner).expect("thread")
    });
    let refusals = refuse::check_thread(&task, NsPid(pid.0), &outside, &answers);
    assert!(refusals.len() == 1 && refusals[0].problem.contains("modify_ldt"), "{refusals:?}");
}

/// Writes `words` to the memory of `pid` at `at`.
fn poke(pid: HostPid, at: u64, words: &[u64]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let range = at..at + bytes.len() as u64;
    assert_eq!(process_vm::write(pid, std::slice::from_ref(&range), &bytes), Ok(bytes.len()));
}

#[test]
fn a_thread_in_a_restartable_sequence_goes_on_at_its_abort_handler() {
    let mut victim = Victim::stop();
    let (pid, registers) = (victim.pid, victim.context.registers);
    let rseq = ptrace::rseq_configuration(pid).expect("registration").pointer;
    assert_ne!(rseq, 0, "the C library has registered one");
    // A description below the stack's end: version and flags, start, length, abort handler; named by the registration.
    let section = registers.rsp - 4096;
    poke(pid, rseq + 8, &[section]);
    let mut collect = |start: u64| {
        poke(pid, section, &[0, start, 16, 0xab0]);
        victim.context.registers.rip = registers.rip;
        ThreadOutside::collect(pid, victim.stop, &mut victim.context).expect("collect");
        victim.context.registers.rip
    };
    assert_eq!(collect(registers.rip), 0xab0, "at its first instruction");
    assert_eq!(collect(registers.rip - 15), 0xab0, "at its last");
    assert_eq!(collect(registers.rip - 16), registers.rip, "just behind it");
    assert_eq!(collect(registers.rip + 1), registers.rip, "just before it");
    poke(pid, rseq + 8, &[0x1000]);
    assert_eq!(collect(registers.rip), registers.rip, "a description that cannot be read");
}

#[test]
fn a_call_that_a_handler_interrupts_fails_in_the_image() {
    let mut victim = Victim::stop();
    let pid = victim.pid;
    // As if the sleeper had a handler for SIGUSR1 without SA_RESTART, and a signal came while it was stopped.
    victim.with_agent(|runner| {
        let mut batch = runner.batch();
        let action = batch.bytes([0x1000u64, 0x0400_0000, 0x2000, 0].map(u64::to_ne_bytes).as_flattened());
        let set = batch.call(libc::SYS_rt_sigaction, &[libc::SIGUSR1 as u64, action.0, 0, 8]);
        assert_eq!(batch.run().expect("batch").result(set), Ok(0));
    });
    let call_of = |core: &CoreEntry| core.thread_info.as_ref().map(|info| info.gpregs.ax as i64).expect("registers");
    assert_eq!(call_of(&victim.dump().0), libc::SYS_clock_nanosleep, "no signal: it is made again");
    kill(Pid::from_raw(pid.0), Signal::SIGUSR1).expect("a signal");
    let (core, _) = victim.dump();
    assert_eq!(
        core.tc.as_ref().and_then(|process| process.signals_s.as_ref()).map_or(0, |queue| queue.signals.len()),
        1
    );
    assert_eq!(call_of(&core), -i64::from(libc::EINTR));
    // The thread itself would run into the handler, which is not there.
    kill(Pid::from_raw(pid.0), Signal::SIGKILL).expect("its end");
}

#[test]
fn timers_get_their_ids_without_help_of_the_kernel() {
    let mut victim = Victim::stop();
    let pid = victim.pid.0 as u32;
    let timer = |it_id| PosixTimerEntry { it_id, clock_id: 1, si_signo: 14, ..PosixTimerEntry::default() };
    let wanted = TaskTimersEntry { posix: vec![timer(1500), timer(2)], ..TaskTimersEntry::default() };
    victim.with_agent(|runner| timers::create_counting(runner, &wanted, pid, pid).expect("timers"));
    let listed = timers::collect_timers(victim.pid).expect("timers");
    assert_eq!(listed.iter().map(timers::Listed::id).collect::<Vec<_>>(), [2, 1500]);
}

#[test]
#[allow(clippy::print_stdout, reason = "a skip is told")]
fn a_login_id_is_changed_by_the_process_itself() {
    let mut victim = Victim::stop();
    let before = identity::collect_loginuid(victim.pid).expect("login id");
    if before.is_none() {
        println!("skipped: this kernel has no login ids");
        return;
    }
    let pid = victim.pid;
    let descriptors = || fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").count();
    let open = descriptors();
    victim.with_agent(|runner| {
        identity::restore_loginuid(runner, Some(before.unwrap_or(0)), before).expect("nothing to do");
        identity::restore_loginuid(runner, Some(4242), before).expect("another");
    });
    assert_eq!(identity::collect_loginuid(pid).expect("login id"), Some(4242));
    assert_eq!(descriptors(), open, "no descriptor stays");
}
