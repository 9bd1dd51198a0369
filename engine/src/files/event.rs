//! Event sources whose whole state fdinfo tells: eventfd(2), signalfd(2), timerfd_create(2).

use super::Problem;
use super::fdinfo::FdInfo;
use super::session::{Done, Session, Temporary};
use crate::images::event::{EventfdFileEntry, SignalfdEntry, TimerfdEntry};
use crate::images::fown::FownEntry;

const O_NONBLOCK: u32 = libc::O_NONBLOCK as u32;
/// `EFD_SEMAPHORE` has the number of an access mode, which an eventfd does not have: it is kept among the flags, where
/// CRIU passes it to `F_SETFL`, which ignores it.
const EFD_SEMAPHORE: u32 = libc::EFD_SEMAPHORE as u32;
/// Sets how many expirations read(2) will tell (Linux 3.17): `_IOW('T', 0, u64)`.
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;

fn malformed(kind: &str) -> Problem {
    Problem::new(format!("the kernel does not describe this {kind} as expected"), "")
}

/// Reads an eventfd. Semaphores are told by Linux 6.5 and later.
pub fn collect_eventfd(id: u32, info: &FdInfo<'_>, fown: FownEntry) -> Result<EventfdFileEntry, Problem> {
    let counter = info.field("eventfd-count").and_then(|text| u64::from_str_radix(text, 16).ok());
    let semaphore = info.field("eventfd-semaphore") == Some("1");
    let flags = info.flags | if semaphore { EFD_SEMAPHORE } else { 0 };
    Ok(EventfdFileEntry { id, flags, fown, counter: counter.ok_or_else(|| malformed("eventfd"))? })
}

/// Makes an eventfd.
pub fn restore_eventfd(session: &mut Session<'_>, entry: &EventfdFileEntry, cloexec: bool) -> Done<Temporary> {
    let flags = entry.flags & (O_NONBLOCK | EFD_SEMAPHORE) | if cloexec { libc::EFD_CLOEXEC as u32 } else { 0 };
    let small = u32::try_from(entry.counter).ok();
    let made = session.make("make it", libc::SYS_eventfd2, &[small.unwrap_or(0).into(), flags.into()], &[], &[])?;
    if small.is_none() {
        session.write(made, &entry.counter.to_ne_bytes())?;
    }
    Ok(made)
}

/// Reads a signalfd.
pub fn collect_signalfd(id: u32, info: &FdInfo<'_>, fown: FownEntry) -> Result<SignalfdEntry, Problem> {
    let sigmask = info.field("sigmask").and_then(|text| u64::from_str_radix(text, 16).ok());
    Ok(SignalfdEntry { id, flags: info.flags, fown, sigmask: sigmask.ok_or_else(|| malformed("signalfd"))? })
}

/// Makes a signalfd.
pub fn restore_signalfd(session: &mut Session<'_>, entry: &SignalfdEntry, cloexec: bool) -> Done<Temporary> {
    let flags = entry.flags & O_NONBLOCK | if cloexec { libc::SFD_CLOEXEC as u32 } else { 0 };
    let mask = entry.sigmask.to_ne_bytes();
    session.make("make it", libc::SYS_signalfd4, &[u64::MAX], &mask, &[mask.len() as u64, flags.into()])
}

/// Reads a timerfd: the time left is relative to now, whatever the timer was set to.
pub fn collect_timerfd(id: u32, info: &FdInfo<'_>, fown: FownEntry) -> Result<TimerfdEntry, Problem> {
    let pair = |key| {
        let (seconds, nanoseconds) = info.field(key)?.strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
        Some((seconds.parse().ok()?, nanoseconds.parse().ok()?))
    };
    let entry = || {
        let ((vsec, vnsec), (isec, insec)) = (pair("it_value")?, pair("it_interval")?);
        Some(TimerfdEntry {
            id,
            flags: info.flags,
            fown,
            clockid: info.field("clockid")?.parse().ok()?,
            ticks: info.field("ticks")?.parse().ok()?,
            settime_flags: u32::from_str_radix(info.field("settime flags")?, 8).ok()?,
            vsec,
            vnsec,
            isec,
            insec,
        })
    };
    entry().ok_or_else(|| malformed("timerfd"))
}

/// Makes a timerfd, not yet armed.
pub fn restore_timerfd(session: &mut Session<'_>, entry: &TimerfdEntry, cloexec: bool) -> Done<Temporary> {
    let flags = entry.flags & O_NONBLOCK | if cloexec { libc::TFD_CLOEXEC as u32 } else { 0 };
    session.make("make it", libc::SYS_timerfd_create, &[entry.clockid.into(), flags.into()], &[], &[])
}

/// Arms a timerfd with the time that was left. One set to a point in time is set to that distance from now, by the
/// task's own clock.
pub fn arm_timerfd(session: &mut Session<'_>, entry: &TimerfdEntry, fd: u32) -> Done {
    const NANOSECONDS: u64 = 1_000_000_000;
    session.about(entry.id);
    // A periodic timer that has expired has no time left, and runs on when its expirations are read (fs/timerfd.c).
    let is_due = entry.ticks != 0 && (entry.isec, entry.insec) != (0, 0);
    if is_due || entry.vsec != 0 || entry.vnsec != 0 {
        let (mut seconds, mut nanoseconds) = (entry.vsec, entry.vnsec);
        if seconds == 0 && nanoseconds == 0 {
            nanoseconds = 1;
        }
        if entry.settime_flags & libc::TFD_TIMER_ABSTIME as u32 != 0 {
            let now = session.ask("read its clock", libc::SYS_clock_gettime, &[entry.clockid.into()], 16)?;
            let word = |at: usize| u64::from_ne_bytes(now[at..at + 8].try_into().unwrap_or_default());
            nanoseconds = nanoseconds.saturating_add(word(8));
            seconds = seconds.saturating_add(word(0)).saturating_add(nanoseconds / NANOSECONDS);
            nanoseconds %= NANOSECONDS;
        }
        let words = [entry.isec, entry.insec, seconds, nanoseconds].map(u64::to_ne_bytes).concat();
        let before = [fd.into(), entry.settime_flags.into()];
        session.must_around("arm it", libc::SYS_timerfd_settime, &before, &words, &[0])?;
    }
    if entry.ticks != 0 {
        let ticks = entry.ticks.to_ne_bytes();
        session.must_with("set its expirations", libc::SYS_ioctl, &[fd.into(), TFD_IOC_SET_TICKS], &ticks)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_is_read_with_its_interval() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t16\nclockid: 1\nticks: 3\nsettime flags: 01\nit_value: (4, 5)\nit_interval: (6, 7)\n";
        let entry = collect_timerfd(9, &FdInfo::parse(text).expect("parses"), FownEntry::default()).expect("a timer");
        assert_eq!((entry.clockid, entry.ticks, entry.settime_flags), (1, 3, 1));
        assert_eq!((entry.vsec, entry.vnsec, entry.isec, entry.insec), (4, 5, 6, 7));
    }

    #[test]
    fn a_counter_is_hexadecimal() {
        let text =
            "pos:\t0\nflags:\t02\nmnt_id:\t16\neventfd-count:               1f\neventfd-id: 4\neventfd-semaphore: 1\n";
        let entry = collect_eventfd(9, &FdInfo::parse(text).expect("parses"), FownEntry::default()).expect("a counter");
        assert_eq!((entry.counter, entry.flags), (0x1f, 3));
    }
}
