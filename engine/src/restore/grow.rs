//! Making the tasks: the first by ferry, each other by the task that the plan says, wave by wave.
//!
//! After: every member and helper sits in its runner, with its memory, its parent and its session.

use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::Restore;
use super::attach::shared_with_maker;
use super::birth::{Birth, Maker};
use super::error::RestoreError;
use super::live::{LiveTask, LiveThread};
use super::script::Script;
use crate::agent::{Runner, Slot};
use crate::fault::RestoreStep;
use crate::procfs;
use crate::sys::clone::{CloneArguments, FirstTask, clone_into_runner};
use crate::sys::terminal::{TIOCSCTTY, TIOCSPGRP};
use crate::sys::{HostPid, NsPid, pidns, ptrace};
use crate::task::identity;

const RSEQ_UNREGISTER: u64 = 1;
/// All signals, for rt_sigprocmask(2).
const ALL_SIGNALS: [u8; 8] = [0xff; 8];

impl Restore<'_> {
    /// Clones the root from ferry.
    pub(super) fn make_first(&mut self) -> Result<HostPid, RestoreError> {
        let root = &self.checkpoint.tasks[0];
        let slot = self.live.leader_slot()?;
        let pid = [root.pid.0];
        let task = FirstTask {
            flags: self.namespaces.clone_flags() | if self.options.sibling { libc::CLONE_PARENT as u64 } else { 0 },
            set_tid: &pid,
            cgroup: self.options.cgroup.map(|cgroup| cgroup.as_raw_fd()),
        };
        let code = self.live.code();
        let host = clone_into_runner(task, code, slot.remote())
            .map_err(|errno| RestoreError::Clone { pid: root.pid, errno })?;
        let vdso_at = self.plan.vdso.parts[0].start;
        self.live.add(
            0,
            LiveTask {
                pid: root.pid,
                comm: root.comm.clone(),
                host,
                runner: Runner::new(host, slot),
                threads: Vec::new(),
                vdso_at,
                space: None,
                ended: false,
            },
        );
        self.live.step(RestoreStep::Cloned)?;
        Ok(host)
    }

    /// Takes out of the root what the C library left there.
    pub(super) fn first_steps(&mut self) -> Result<(), RestoreError> {
        let host = self.live.task(0).host;
        let failed = |step| move |errno| RestoreError::Trace { pid: host, step, errno };
        // The kernel writes into a registered `struct rseq` whenever the thread was interrupted, and ends the thread if
        // that is not mapped. Where the C library has it and how long it is, only the kernel tells for sure.
        ptrace::seize(host, ptrace::OPTION_EXITKILL).map_err(failed("attach to it"))?;
        ptrace::interrupt(host).map_err(failed("stop it"))?;
        ptrace::wait_stop(host).map_err(failed("await its stop"))?;
        let rseq = ptrace::rseq_configuration(host).map_err(failed("read its rseq registration"))?;
        ptrace::detach(host, 0).map_err(failed("let it go on"))?;
        let mut script = Script::default();
        let data = super::script::Data { argument: 1, bytes: ALL_SIGNALS.to_vec(), inner: None };
        let arguments = [libc::SIG_SETMASK as u64, 0, 0, ALL_SIGNALS.len() as u64];
        script.with_data("block them", "signals", libc::SYS_rt_sigprocmask, &arguments, data);
        if rseq.pointer != 0 {
            let arguments = [rseq.pointer, rseq.size.into(), RSEQ_UNREGISTER, rseq.signature.into()];
            script.must("take it back", "rseq registration", libc::SYS_rseq, &arguments);
        }
        self.die_with_parent(&mut script);
        self.forbid_huge_pages(&mut script);
        self.live.run(vec![(0, script)])?;
        self.restore_login_ids(&[0])
    }

    /// Gives tasks that have no children yet their login ids, which these inherit.
    fn restore_login_ids(&self, places: &[usize]) -> Result<(), RestoreError> {
        let recorded = |place: usize| self.checkpoint.tasks[place].process().loginuid;
        for &place in places.iter().filter(|place| **place < self.checkpoint.tasks.len()) {
            let live = self.live.task(place);
            let named = |source| RestoreError::Task { pid: live.pid, comm: live.comm.clone(), source };
            let has = identity::collect_loginuid(live.host).map_err(named)?;
            identity::restore_loginuid(&live.runner, recorded(place), has).map_err(named)?;
        }
        Ok(())
    }

    /// Whether not all tasks have one login id.
    fn login_ids_differ(&self) -> bool {
        let mut ids = self.checkpoint.tasks.iter().map(|task| task.process().loginuid);
        let first = ids.next();
        ids.any(|id| Some(id) != first)
    }

    fn die_with_parent(&self, script: &mut Script) {
        let arguments = [libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64];
        script.must("set it", "parent-death signal", libc::SYS_prctl, &arguments);
    }

    /// Makes all others.
    pub(super) fn make_others(&mut self) -> Result<(), RestoreError> {
        let login_ids = self.login_ids_differ();
        for wave in 0..self.plan.tree.waves.len() {
            let births = &self.plan.tree.waves[wave];
            let places: Vec<usize> = births.iter().map(|birth| birth.task).collect();
            self.restore_memory(&places)?;
            if login_ids {
                self.restore_login_ids(&places)?;
            }
            for &place in &places {
                self.live.step(RestoreStep::Batch)?;
                self.files.create(&self.live, place)?;
            }
            let next = self.plan.tree.waves.get(wave + 1).map_or(&[][..], |next| next);
            self.reproduce(&places, next)?;
        }
        Ok(())
    }

    /// Has each of `makers` make its part of `births`, before and after it begins its own session.
    fn reproduce(&mut self, makers: &[usize], births: &[Birth]) -> Result<(), RestoreError> {
        let mut scripts = Vec::new();
        let mut born: Vec<(Birth, Slot)> = Vec::new();
        for &maker in makers {
            let mut script = Script::default();
            let of_maker = |birth: &&Birth| birth.maker.task() == Some(maker);
            for birth in births.iter().filter(of_maker).filter(|birth| birth.early) {
                born.push((*birth, self.birth(&mut script, birth)?));
            }
            if self.leads_session(maker) {
                script.must("begin it", "session", libc::SYS_setsid, &[]);
                // Only children that are made from now on have the terminal too.
                if let Some(terminal) = self.files.terminal_of(maker) {
                    // With 1 it is taken from the session that has it: a shell job that led a session of its own gets the
                    // caller's terminal, as with CRIU. Terminals that are made again belong to nobody.
                    let arguments = [terminal.number.into(), TIOCSCTTY, 1];
                    script.must("give it its terminal", "session", libc::SYS_ioctl, &arguments);
                }
                if self.files.opens_terminal(maker) {
                    self.live.run(vec![(maker, std::mem::take(&mut script))])?;
                    self.files.open_terminal(&self.live, maker)?;
                }
            }
            for birth in births.iter().filter(of_maker).filter(|birth| !birth.early) {
                if !matches!(birth.maker, Maker::Grandparent(_)) {
                    born.push((*birth, self.birth(&mut script, birth)?));
                }
            }
            if !script.is_empty() {
                scripts.push((maker, script));
            }
        }
        self.live.run(scripts)?;
        self.live.step(RestoreStep::Cloned)?;
        let mut first = Vec::new();
        for (birth, slot) in born {
            self.note(birth, slot)?;
            let mut script = Script::default();
            self.die_with_parent(&mut script);
            first.push((birth.task, script));
        }
        self.live.run(first)?;
        for birth in births.iter().filter(|birth| matches!(birth.maker, Maker::Grandparent(_))) {
            self.adopt(birth)?;
        }
        Ok(())
    }

    fn pid_of(&self, place: usize) -> NsPid {
        let members = &self.checkpoint.tasks;
        members.get(place).map_or_else(|| NsPid(self.plan.tree.helpers[place - members.len()].pid), |task| task.pid)
    }

    fn leads_session(&self, place: usize) -> bool {
        let members = &self.checkpoint.tasks;
        match members.get(place) {
            Some(task) => task.session == task.pid.0,
            None => self.plan.tree.helpers[place - members.len()].leads_session,
        }
    }

    /// Appends the clone of a task; returns its slot.
    fn birth(&mut self, script: &mut Script, birth: &Birth) -> Result<Slot, RestoreError> {
        let slot = self.live.leader_slot()?;
        let arguments = match birth.maker {
            // The brother's exit signal is the maker's own then (clone3(2)).
            Maker::Sibling(_) => CloneArguments { flags: libc::CLONE_PARENT as u64, ..CloneArguments::default() },
            maker => CloneArguments {
                flags: shared_with_maker(self.checkpoint, birth.task, maker),
                exit_signal: libc::SIGCHLD as u64,
                ..CloneArguments::default()
            },
        };
        script.clone_task(arguments, &[self.pid_of(birth.task).0], slot.remote());
        Ok(slot)
    }

    fn note(&mut self, birth: Birth, slot: Slot) -> Result<(), RestoreError> {
        let maker = birth.maker.task().map(|maker| self.live.task(maker));
        let (vdso_at, space) = maker.map_or((0, None), |maker| (maker.vdso_at, maker.space));
        let pid = self.pid_of(birth.task);
        let host = self.host_pid(pid)?;
        let comm = self.checkpoint.tasks.get(birth.task).map_or_else(String::new, |task| task.comm.clone());
        let runner = Runner::new(host, slot);
        let task = LiveTask { pid, comm, host, runner, threads: Vec::new(), vdso_at, space, ended: false };
        self.live.add(birth.task, task);
        self.place(birth.task, birth.maker.task())
    }

    /// The id here of the task with `pid` in the root's namespace.
    fn host_pid(&self, pid: NsPid) -> Result<HostPid, RestoreError> {
        let Some(namespace) = &self.pid_namespace else { return Ok(HostPid(pid.0)) };
        match pidns::translate(namespace, pid) {
            Ok(host) => Ok(host),
            Err(_) => self.find_in_proc(pid).ok_or(RestoreError::Clone { pid, errno: Errno::ESRCH }),
        }
    }

    /// The same for kernels before 6.11: the threads of the tree's tasks and of their children are looked through.
    fn find_in_proc(&self, pid: NsPid) -> Option<HostPid> {
        let is_it = |host: &HostPid| procfs::Ids::read(*host).is_ok_and(|ids| ids.innermost() == pid);
        self.live.living().find_map(|(_, task)| {
            let threads = procfs::threads(task.host).ok()?;
            let children = threads.iter().filter_map(|tid| procfs::children(task.host, *tid).ok()).flatten();
            threads.iter().copied().chain(children).find(is_it)
        })
    }

    /// Makes a task whose maker is neither its parent nor its brother, through a task in between that ends at once: the kernel
    /// gives the orphan to the nearest subreaper or the namespace's init.
    fn adopt(&mut self, birth: &Birth) -> Result<(), RestoreError> {
        let Some(maker) = birth.maker.task() else { return Ok(()) };
        let (between, slot) = (self.live.leader_slot()?, self.live.leader_slot()?);
        let mut script = Script::default();
        let arguments = CloneArguments { exit_signal: libc::SIGCHLD as u64, ..CloneArguments::default() };
        let call = script.clone_task(arguments, &[], between.remote());
        let results = self.live.run(vec![(maker, script)])?;
        let short_lived = NsPid(results[0][call].unwrap_or(0) as i32);
        let host = self.host_pid(short_lived)?;
        let runner = Runner::new(host, between);
        let mut script = Script::default();
        script.clone_task(arguments, &[self.pid_of(birth.task).0], slot.remote());
        let task = self.live.task(maker);
        super::script::run(&[(&runner, script)]).map_err(|(_, error)| task.script(error))?;
        self.live.step(RestoreStep::Cloned)?;
        let mut batch = runner.batch();
        batch.call(libc::SYS_exit_group, &[0]);
        // It never answers: waiting for its end is its parent's part.
        let pending = batch.submit().map_err(|source| task.agent(source))?;
        drop(pending);
        let mut script = Script::default();
        script.must("await the end of", "a task in between", libc::SYS_wait4, &[short_lived.0 as u64, 0, 0, 0]);
        self.live.run(vec![(maker, script)])?;
        self.note(*birth, slot)?;
        let mut script = Script::default();
        self.die_with_parent(&mut script);
        self.live.run(vec![(birth.task, script)])?;
        let wanted = self.checkpoint.tasks[birth.task].parent.map(|parent| self.live.task(parent).host.0);
        let orphan = self.live.task(birth.task);
        let parent = procfs::Stat::read(orphan.host).map_or(0, |stat| stat.parent);
        if wanted == Some(parent) {
            return Ok(());
        }
        Err(orphan.step("have it adopted by its parent", "its parent", Errno::ECHILD))
    }

    /// Makes groups, then lets everybody join theirs.
    pub(super) fn make_groups(&mut self) -> Result<(), RestoreError> {
        let members = self.checkpoint.tasks.len();
        let helpers = self.plan.tree.helpers.iter().enumerate();
        let helping = helpers.filter(|(_, helper)| !helper.leads_session).map(|(index, _)| members + index);
        let found = |place: usize| {
            let mut script = Script::default();
            script.must("begin it", "process group", libc::SYS_setpgid, &[0, 0]);
            (place, script)
        };
        self.live.run(self.plan.tree.group_leaders.iter().copied().chain(helping).map(found).collect())?;
        let join = |(place, group): &(usize, i32)| {
            let mut script = Script::default();
            script.must("join it", format!("process group {group}"), libc::SYS_setpgid, &[0, *group as u64]);
            (*place, script)
        };
        self.live.run(self.plan.tree.joins.iter().map(join).collect()).map(drop)
    }

    /// Gives each terminal the foreground group that it had. All signals are blocked, so that a task may do so that is not in it.
    pub(super) fn make_foreground(&mut self) -> Result<(), RestoreError> {
        let mut scripts = Vec::new();
        for place in self.live.living().map(|(place, _)| place) {
            let Some(terminal) = self.files.terminal_of(place).filter(|terminal| terminal.group != 0) else { continue };
            let mut script = Script::default();
            let data = super::script::Data { argument: 2, bytes: terminal.group.to_ne_bytes().to_vec(), inner: None };
            let arguments = [terminal.number.into(), TIOCSPGRP, 0];
            if self.leads_session(place) {
                let object = format!("process group {}", terminal.group);
                script.with_data("bring it to the foreground", object, libc::SYS_ioctl, &arguments, data);
            } else if self.plan.tree.leads_group(terminal.group) {
                // The terminal of whoever restores: it may not control ferry's session after all.
                script.attempt_with(libc::SYS_ioctl, &arguments, data);
            }
            scripts.push((place, script));
        }
        self.live.run(scripts).map(drop)
    }

    /// Ends the helpers without a trace, and the tasks that had exited with one.
    pub(super) fn end_the_dead(&mut self) -> Result<(), RestoreError> {
        let members = self.checkpoint.tasks.len();
        let helpers: Vec<usize> = (members..members + self.plan.tree.helpers.len()).collect();
        for place in helpers {
            let parent = self.plan.tree.helpers[place - members].parent;
            self.end(place, parent, 0, true)?;
        }
        // Children before parents; a zombie has no living ones.
        for place in (0..members).rev().filter(|place| self.checkpoint.tasks[*place].is_zombie()) {
            let task = &self.checkpoint.tasks[place];
            let status = task.process().exit_code;
            if let Some(parent) = task.parent {
                self.end(place, parent, status, false)?;
            }
        }
        Ok(())
    }

    /// Ends a task with a wait status, and waits for that in its parent.
    fn end(&mut self, place: usize, parent: usize, status: u32, reap: bool) -> Result<(), RestoreError> {
        let task = self.live.task(place);
        let mut batch = task.runner.batch();
        let name = batch.path(&task.comm.as_bytes()[..task.comm.len().min(15)]);
        batch.call(libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name.0]);
        let signal = status & 0x7f;
        if signal == 0 {
            batch.call(libc::SYS_exit_group, &[u64::from(status >> 8 & 0xff)]);
        } else {
            // Its default action, no core file, unblocked, to itself.
            let none = batch.space(32);
            batch.call(libc::SYS_prlimit64, &[0, libc::RLIMIT_CORE.into(), none.addr.0, 0]);
            batch.call(libc::SYS_rt_sigaction, &[signal.into(), none.addr.0, 0, 8]);
            batch.call(libc::SYS_kill, &[task.pid.0 as u64, signal.into()]);
            batch.call(libc::SYS_rt_sigprocmask, &[libc::SIG_SETMASK as u64, none.addr.0, 0, 8]);
            batch.call(libc::SYS_exit_group, &[u64::from(128 + signal)]);
        }
        // It never answers: waiting for its end is its parent's part.
        drop(batch.submit().map_err(|source| task.agent(source))?);
        let pid = task.pid;
        let mut script = Script::default();
        let flags = libc::WEXITED as u64 | if reap { 0 } else { libc::WNOWAIT as u64 };
        let what = if reap { "a helper" } else { "an exited child" };
        script.must("await", what, libc::SYS_waitid, &[libc::P_PID.into(), pid.0 as u64, 0, flags, 0]);
        self.live.task_mut(place).ended = true;
        self.live.run(vec![(parent, script)]).map(drop)
    }

    /// Makes the threads of every task, each with its id.
    pub(super) fn make_threads(&mut self) -> Result<(), RestoreError> {
        let mut scripts = Vec::new();
        let mut born: Vec<(usize, NsPid, Slot)> = Vec::new();
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        let arguments = CloneArguments { flags: flags as u64, ..CloneArguments::default() };
        for (place, task) in self.checkpoint.tasks.iter().enumerate().filter(|(_, task)| !task.threads.is_empty()) {
            let mut script = Script::default();
            for thread in &task.threads {
                let slot = self.live.thread_slot()?;
                script.clone_task(arguments, &[thread.tid.0], slot.remote());
                born.push((place, thread.tid, slot));
            }
            scripts.push((place, script));
        }
        self.live.run(scripts)?;
        for (place, tid, slot) in born {
            let host = self.host_pid(tid)?;
            let task = &self.checkpoint.tasks[place];
            let thread = task.threads.iter().find(|thread| thread.tid == tid);
            if let (Some(cgroups), Some(thread)) = (&self.cgroups, thread) {
                cgroups.place_thread(host, &thread.core, &task.core)?;
            }
            self.live.task_mut(place).threads.push(LiveThread { tid, host, runner: Runner::new(host, slot) });
        }
        Ok(())
    }
}
