//! Time namespaces (time_namespaces(7), Linux 5.6): the monotonic and boot clocks go on where they were.
//!
//! Images hold what the clocks showed inside the namespace at the dump. A tree that lives in ferry's own time namespace
//! has them saved too, as number 0, so that a restore can give it a namespace in which its clocks go on.

use std::io;

use rustix::time::{ClockId, clock_gettime};

use crate::images::ns::{TimensEntry, Timespec};
use crate::procfs;
use crate::sys::HostPid;

const BILLION: i128 = 1_000_000_000;

/// What a time namespace adds to the clocks, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offsets {
    pub monotonic: i128,
    pub boottime: i128,
}

impl Offsets {
    /// Those of the namespace that children of `pid` are put into.
    pub fn read(pid: impl std::fmt::Display) -> io::Result<Self> {
        match procfs::read_text(format!("/proc/{pid}/timens_offsets")) {
            Ok(text) => Self::parse(&text)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "timens_offsets is not as proc(5) says")),
            // A kernel without time namespaces.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut offsets = Self::default();
        for line in text.lines() {
            let mut fields = line.split_ascii_whitespace();
            let clock = fields.next()?;
            let value = fields.next()?.parse::<i128>().ok()? * BILLION + fields.next()?.parse::<i128>().ok()?;
            match clock {
                // Old kernels wrote the clock's number.
                "monotonic" | "1" => offsets.monotonic = value,
                "boottime" | "7" => offsets.boottime = value,
                _ => {}
            }
        }
        Some(offsets)
    }
}

/// What the clocks show in the namespace of `pid` now.
pub(super) fn collect(pid: HostPid) -> io::Result<TimensEntry> {
    let (own, theirs) = (Offsets::read("self")?, Offsets::read(pid)?);
    Ok(TimensEntry {
        monotonic: to_image(now(ClockId::Monotonic) - own.monotonic + theirs.monotonic),
        boottime: to_image(now(ClockId::Boottime) - own.boottime + theirs.boottime),
    })
}

/// What a new time namespace has to add, so that clocks that showed `entry` go on: the text for `timens_offsets`.
pub(super) fn offsets_for(entry: &TimensEntry) -> io::Result<String> {
    let own = Offsets::read("self")?;
    let line = |clock: &str, shown: &Timespec, now: i128| {
        let offset = from_image(shown) - now;
        format!("{clock} {} {}\n", offset.div_euclid(BILLION), offset.rem_euclid(BILLION))
    };
    let monotonic = line("monotonic", &entry.monotonic, now(ClockId::Monotonic) - own.monotonic);
    Ok(monotonic + &line("boottime", &entry.boottime, now(ClockId::Boottime) - own.boottime))
}

fn from_image(time: &Timespec) -> i128 {
    i128::from(time.tv_sec) * BILLION + i128::from(time.tv_nsec)
}

fn now(clock: ClockId) -> i128 {
    let time = clock_gettime(clock);
    i128::from(time.tv_sec) * BILLION + i128::from(time.tv_nsec)
}

fn to_image(time: i128) -> Timespec {
    Timespec { tv_sec: time.div_euclid(BILLION) as u64, tv_nsec: time.rem_euclid(BILLION) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_may_be_negative() {
        let offsets = Offsets::parse("monotonic         -2         5\nboottime         3         0\n").expect("parses");
        assert_eq!((offsets.monotonic, offsets.boottime), (-1_999_999_995, 3 * BILLION));
        assert_eq!(Offsets::parse("monotonic x 0\n"), None);
        assert_eq!(to_image(offsets.boottime).tv_sec, 3);
    }

    #[test]
    fn clocks_of_ferrys_own_namespace_are_ferrys() {
        let before = now(ClockId::Monotonic);
        let entry = collect(HostPid(std::process::id() as i32)).expect("offsets");
        let seen = i128::from(entry.monotonic.tv_sec) * BILLION + i128::from(entry.monotonic.tv_nsec);
        assert!(before <= seen && seen <= now(ClockId::Monotonic), "{seen}");
    }
}
