//! Interval timers (setitimer(2)) and POSIX timers (timer_create(2)) of a process.
//!
//! Facts relied on: `/proc/PID/timers` lists the POSIX timers with signal, value, notification and clock, but neither
//! interval nor time left, which timer_gettime(2) tells from inside. A new timer's id counts up from 0 over
//! the life of a process; since Linux 6.15 `PR_TIMER_CREATE_RESTORE_IDS` lets the process choose it. A timer on a thread's own processor
//! clock belongs to the thread that creates it.
//!
//! Timers are created when all threads are there, and armed last, so that no time is lost to the restore.

use std::ops::Range;
use std::time::Duration;

use nix::errno::Errno;

use super::signals::{Queues, signal_of};
use super::{Checks, TaskError};
use crate::agent::{Answers, Batch, Call, Out, Runner};
use crate::images::timer::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use crate::procfs;
use crate::sys::{HostPid, NsPid};

const SPEC: usize = 32;
const SIGEVENT: usize = 64;
/// Where a `siginfo_t` names its POSIX timer.
const TIMER_ID: usize = 16;
/// The `si_code` of signals from the kernel itself.
const SI_KERNEL: i32 = 0x80;
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// The clock id of a timer made with `CLOCK_THREAD_CPUTIME_ID`: the calling thread's (include/linux/posix-timers.h).
const OWN_THREAD_CLOCK: u32 = -2i32 as u32;
const INTERVAL_TIMERS: [(u64, &str); 3] = [(0, "real"), (1, "virtual"), (2, "profiling")];
/// Where the counting fallback gives up: each step costs two calls.
const MOST_STEPS: u32 = 100_000;

/// One POSIX timer as `/proc/PID/timers` lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    id: u32,
    signal: u32,
    value: u64,
    notify: u32,
    thread: Option<HostPid>,
    clock: u32,
}

impl Listed {
    /// Whether the kernel keeps which thread's clock this timer runs on to itself.
    pub fn is_on_unknown_thread_clock(&self) -> bool {
        self.clock == OWN_THREAD_CLOCK && self.thread.is_none()
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.id
    }
}

/// Reads the list of POSIX timers.
///
/// # Errors
/// [`TaskError::Proc`].
pub fn collect_timers(pid: HostPid) -> Result<Vec<Listed>, TaskError> {
    let failed = |source| TaskError::Proc { tid: pid, file: "timers", source };
    let text = procfs::read_text(format!("/proc/{pid}/timers")).map_err(failed)?;
    parse(&text).ok_or_else(|| failed(std::io::Error::from(std::io::ErrorKind::InvalidData)))
}

fn parse(text: &str) -> Option<Vec<Listed>> {
    let mut timers: Vec<Listed> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(':')?;
        let value = value.trim();
        if key == "ID" {
            timers.push(Listed { id: value.parse().ok()?, ..Listed::default() });
            continue;
        }
        let timer = timers.last_mut()?;
        match key {
            "signal" => {
                let (signal, pointer) = value.split_once('/')?;
                timer.signal = signal.parse().ok()?;
                // The kernel prints a null pointer as "(null)" on some versions.
                timer.value = u64::from_str_radix(pointer.trim_start_matches("0x"), 16).unwrap_or(0);
            }
            "notify" => {
                let (how, whom) = value.split_once('/')?;
                let (kind, id) = whom.split_once('.')?;
                timer.notify = match (how, kind) {
                    (_, "tid") => libc::SIGEV_THREAD_ID as u32,
                    ("signal", _) => libc::SIGEV_SIGNAL as u32,
                    ("none", _) => libc::SIGEV_NONE as u32,
                    ("thread", _) => libc::SIGEV_THREAD as u32,
                    _ => return None,
                };
                timer.thread = (kind == "tid").then(|| id.parse().map(HostPid)).transpose().ok()?;
            }
            "ClockID" => timer.clock = value.parse::<i32>().ok()? as u32,
            _ => {}
        }
    }
    timers.sort_by_key(Listed::id);
    Some(timers)
}

/// The questions for all timers of a process.
pub struct Questions {
    interval: Vec<(Call, Out)>,
    posix: Vec<(Listed, Call, Out, Call)>,
}

impl Questions {
    /// Appends three getitimer(2), and two calls for each POSIX timer of the list.
    pub fn ask(batch: &mut Batch<'_>, listed: &[Listed]) -> Self {
        let mut timed = |number: i64, which: u64| {
            let out = batch.space(SPEC);
            (batch.call(number, &[which, out.addr.0]), out)
        };
        let interval = INTERVAL_TIMERS.map(|(which, _)| timed(libc::SYS_getitimer, which)).to_vec();
        let times: Vec<_> = listed.iter().map(|timer| timed(libc::SYS_timer_gettime, timer.id.into())).collect();
        let posix = listed.iter().zip(times).map(|(timer, (call, out))| {
            (timer.clone(), call, out, batch.call(libc::SYS_timer_getoverrun, &[timer.id.into()]))
        });
        Self { interval, posix: posix.collect() }
    }

    /// The timers; `ns_tid` translates the thread that a timer notifies.
    ///
    /// # Errors
    /// [`TaskError::Agent`].
    pub fn answers(
        &self,
        answers: &Answers<'_>,
        ns_tid: impl Fn(HostPid) -> NsPid,
    ) -> Result<TaskTimersEntry, TaskError> {
        let interval = |index: usize| {
            let (call, out) = self.interval[index];
            answers.value(call)?;
            let word = |index: usize| answers.u64_at(out, 8 * index);
            Ok::<_, TaskError>(ItimerEntry { isec: word(0), iusec: word(1), vsec: word(2), vusec: word(3) })
        };
        let posix = self.posix.iter().map(|(timer, call, out, overrun)| {
            answers.value(*call)?;
            let word = |index: usize| answers.u64_at(*out, 8 * index);
            Ok(PosixTimerEntry {
                it_id: timer.id,
                clock_id: timer.clock,
                si_signo: timer.signal,
                it_sigev_notify: timer.notify,
                sival_ptr: timer.value,
                overrun: answers.value(*overrun)? as u32,
                isec: word(0),
                insec: word(1),
                vsec: word(2),
                vnsec: word(3),
                notify_thread_id: timer.thread.map(|tid| ns_tid(tid).0),
            })
        });
        Ok(TaskTimersEntry {
            real: interval(0)?,
            virt: interval(1)?,
            prof: interval(2)?,
            posix: posix.collect::<Result<_, TaskError>>()?,
        })
    }
}

/// Timers that were read as running, but expired before the signals were: their signal is in a queue.
///
/// `since` is the time from before the timers were read until after the queues were. Without this, such a timer
/// would be restored with its signal pending and running towards it a second time.
pub fn settle(timers: &TaskTimersEntry, queues: &Queues, since: Duration) -> TaskTimersEntry {
    let mut timers = timers.clone();
    let pending = |wanted: &dyn Fn(&[u8; 128]) -> bool| queues.all().any(wanted);
    let real = &mut timers.real;
    let left = Duration::from_secs(real.vsec) + Duration::from_micros(real.vusec);
    let is_alarm = |info: &[u8; 128]| signal_of(info) == libc::SIGALRM && code_of(info) == SI_KERNEL;
    if (real.vsec, real.vusec) != (0, 0) && left <= since && pending(&is_alarm) {
        (real.vsec, real.vusec) = (real.isec, real.iusec);
    }
    for timer in &mut timers.posix {
        let left = Duration::from_secs(timer.vsec) + Duration::from_nanos(timer.vnsec);
        let id = timer.it_id.to_ne_bytes();
        let is_its = |info: &[u8; 128]| code_of(info) == libc::SI_TIMER && info[TIMER_ID..TIMER_ID + 4] == id;
        if (timer.vsec, timer.vnsec) != (0, 0) && left <= since && pending(&is_its) {
            (timer.vsec, timer.vnsec) = (timer.isec, timer.insec);
        }
    }
    timers
}

fn code_of(info: &[u8; 128]) -> i32 {
    i32::from_ne_bytes([info[8], info[9], info[10], info[11]])
}

/// Creates POSIX timers, not armed yet, in batches of its own.
///
/// The leader's runner makes all but those on another thread's own clock; that thread's runner makes these, with
/// `thread` its id as the image has it.
///
/// # Errors
/// [`TaskError::Restore`]; [`TaskError::Machine`] when an id can be reached neither by choice nor by counting.
pub fn create_timers(runner: &Runner, timers: &TaskTimersEntry, leader: u32, thread: u32) -> Result<(), TaskError> {
    let own = own(timers, leader, thread);
    if own.is_empty() {
        return Ok(());
    }
    if runner.call(libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 1]).is_err() {
        return create_counting(runner, timers, leader, thread);
    }
    for timer in own {
        create(runner, timer, true)?;
    }
    runner.call(libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 0])?;
    Ok(())
}

/// [`create_timers`] where the kernel takes no wishes: ids below the wanted ones are used up.
///
/// # Errors
/// As there.
pub fn create_counting(runner: &Runner, timers: &TaskTimersEntry, leader: u32, thread: u32) -> Result<(), TaskError> {
    let mut next = 0;
    for timer in own(timers, leader, thread) {
        count_up_to(runner, next..timer.it_id, leader)?;
        create(runner, timer, false)?;
        next = timer.it_id.saturating_add(1);
    }
    Ok(())
}

/// The timers that `thread` has to create, by id.
fn own(timers: &TaskTimersEntry, leader: u32, thread: u32) -> Vec<&PosixTimerEntry> {
    let owner = |timer: &PosixTimerEntry| match timer.notify_thread_id {
        Some(owner) if timer.clock_id == OWN_THREAD_CLOCK => owner as u32,
        _ => leader,
    };
    let mut own: Vec<_> = timers.posix.iter().filter(|timer| owner(timer) == thread).collect();
    own.sort_by_key(|timer| timer.it_id);
    own
}

/// Creates one timer; `choosing` when the kernel takes the id as a wish, else it must come by itself.
fn create(runner: &Runner, timer: &PosixTimerEntry, choosing: bool) -> Result<(), TaskError> {
    let failed = |errno| TaskError::Restore { tid: runner.tid(), what: format!("POSIX timer {}", timer.it_id), errno };
    let mut event = [0; SIGEVENT];
    event[..8].copy_from_slice(&timer.sival_ptr.to_ne_bytes());
    event[8..12].copy_from_slice(&timer.si_signo.to_ne_bytes());
    event[12..16].copy_from_slice(&timer.it_sigev_notify.to_ne_bytes());
    event[16..20].copy_from_slice(&timer.notify_thread_id.unwrap_or(0).to_ne_bytes());
    let mut batch = runner.batch();
    let event = batch.bytes(&event).0;
    let clock = i64::from(timer.clock_id as i32) as u64;
    if choosing {
        let wish = batch.bytes(&timer.it_id.to_ne_bytes()).0;
        let call = batch.call(libc::SYS_timer_create, &[clock, event, wish]);
        batch.run()?.result(call).map_err(failed)?;
        return Ok(());
    }
    let id = batch.space(4);
    let call = batch.call(libc::SYS_timer_create, &[clock, event, id.addr.0]);
    let answers = batch.run()?;
    answers.result(call).map_err(failed)?;
    if answers.u32_at(id, 0) == timer.it_id { Ok(()) } else { Err(failed(Errno::EBUSY)) }
}

/// Creates and deletes timers so that the ids of `range` are used up.
fn count_up_to(runner: &Runner, range: Range<u32>, leader: u32) -> Result<(), TaskError> {
    if range.len() > MOST_STEPS as usize {
        let what = format!("POSIX timer {} needs Linux 6.15 to get its id again", range.end);
        return Err(TaskError::Machine { tid: leader, what });
    }
    let mut ids = range.peekable();
    while ids.peek().is_some() {
        let mut batch = runner.batch();
        let mut checks = Checks::default();
        let unused = batch.space(4).addr.0;
        let fit = batch.room() / (2 * Batch::CALL_BYTES) - 1;
        for id in ids.by_ref().take(fit) {
            let monotonic = libc::CLOCK_MONOTONIC as u64;
            let what = format!("POSIX timer ids below {id}");
            checks.call(&mut batch, what.clone(), libc::SYS_timer_create, &[monotonic, 0, unused]);
            checks.call(&mut batch, what, libc::SYS_timer_delete, &[id.into()]);
        }
        checks.verify(runner.tid(), &batch.run()?)?;
    }
    Ok(())
}

/// Starts every timer that ran, in batches of the leader's runner: the last thing before registers are set.
///
/// # Errors
/// [`TaskError::Restore`], `EINVAL` for times that no kernel tells.
pub fn arm_timers(runner: &Runner, timers: &TaskTimersEntry) -> Result<(), TaskError> {
    let interval = INTERVAL_TIMERS.into_iter().zip([&timers.real, &timers.virt, &timers.prof]);
    let interval = interval.filter_map(|((which, name), entry)| {
        let spec = running([entry.isec, entry.iusec], [entry.vsec, entry.vusec])?;
        Some((libc::SYS_setitimer, vec![which], spec, format!("{name} interval timer")))
    });
    let posix = timers.posix.iter().filter_map(|timer| {
        let spec = running([timer.isec, timer.insec], [timer.vsec, timer.vnsec])?;
        let id = u64::from(timer.it_id);
        Some((libc::SYS_timer_settime, vec![id, 0], spec, format!("POSIX timer {id}")))
    });
    let mut all = interval.chain(posix).peekable();
    while all.peek().is_some() {
        let mut batch = runner.batch();
        let mut checks = Checks::default();
        let fit = batch.room() / (Batch::CALL_BYTES + SPEC + 16) - 1;
        for (number, mut arguments, spec, what) in all.by_ref().take(fit) {
            arguments.push(batch.bytes(spec.map(u64::to_ne_bytes).as_flattened()).0);
            checks.call(&mut batch, what, number, &arguments);
        }
        checks.verify(runner.tid(), &batch.run()?)?;
    }
    Ok(())
}

/// The words that start a timer again; none for one that did not run.
///
/// An interval with no time left is a timer whose signal is pending: its next period starts now.
fn running(interval: [u64; 2], left: [u64; 2]) -> Option<[u64; 4]> {
    let value = if left == [0, 0] { interval } else { left };
    (value != [0, 0]).then_some([interval[0], interval[1], value[0], value[1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_timers_is_understood() {
        let text = "ID: 0\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
                    ID: 7\nsignal: 0/0000000000000000\nnotify: none/tid.12\nClockID: -2\n\
                    ID: 9\nsignal: 14/(null)\nnotify: none/pid.3\nClockID: 1\n";
        let timers = parse(text).expect("parses");
        assert_eq!(timers[0], Listed { id: 0, signal: 60, value: 0x7fff_86e4_52a8, notify: 0, thread: None, clock: 0 });
        assert_eq!((timers[1].notify, timers[1].thread, timers[1].clock), (4, Some(HostPid(12)), OWN_THREAD_CLOCK));
        assert_eq!((timers[2].notify, timers[2].value), (libc::SIGEV_NONE as u32, 0));
        assert!(parse("signal: 1/0\n").is_none(), "a setting without a timer");
    }

    #[test]
    fn a_timer_that_expired_while_it_was_read_does_not_expire_again() {
        let mut info = [0; 128];
        info[..4].copy_from_slice(&40i32.to_ne_bytes());
        info[8..12].copy_from_slice(&libc::SI_TIMER.to_ne_bytes());
        info[TIMER_ID..TIMER_ID + 4].copy_from_slice(&7u32.to_ne_bytes());
        let queues = Queues { shared: vec![info], private: vec![], read: std::time::Instant::now() };
        let timer = |it_id, vnsec, insec| PosixTimerEntry { it_id, vnsec, insec, ..PosixTimerEntry::default() };
        let posix = vec![timer(7, 900, 0), timer(7, 900, 5), timer(7, 1100, 0), timer(8, 900, 0)];
        let real = ItimerEntry { vusec: 1, ..ItimerEntry::default() };
        let timers = TaskTimersEntry { posix, real, ..TaskTimersEntry::default() };
        let settled = settle(&timers, &queues, Duration::from_nanos(1000));
        let left: Vec<_> = settled.posix.iter().map(|timer| timer.vnsec).collect();
        assert_eq!(left, [0, 5, 1100, 900], "expired once; in its next period; later than that; another's signal");
        assert_eq!(settled.real, timers.real, "no SIGALRM is pending");
    }

    #[test]
    fn only_timers_that_ran_are_started() {
        assert_eq!(running([0, 0], [0, 0]), None);
        assert_eq!(running([1, 2], [0, 0]), Some([1, 2, 1, 2]));
        assert_eq!(running([1, 2], [3, 4]), Some([1, 2, 3, 4]));
        assert_eq!(running([0, 0], [3, 4]), Some([0, 0, 3, 4]));
    }
}
