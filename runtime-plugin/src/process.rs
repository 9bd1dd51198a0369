//! What `/proc` tells of a container's processes (proc_pid_stat(5)).

use std::fs;

/// A process as a state file remembers it: a pid alone may have been given to another process since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitProcess {
    /// Its pid in ferry's pid namespace.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
}

impl InitProcess {
    /// The process that has this pid now; `None` when there is none, or only a zombie.
    pub fn running(pid: i32) -> Option<Self> {
        let stat = Stat::read(pid)?;
        (!stat.is_dead()).then_some(Self { pid, start_time: stat.start_time })
    }

    /// Whether this very process still runs.
    pub fn is_running(self) -> bool {
        Self::running(self.pid) == Some(self)
    }
}

/// The fields of `/proc/PID/stat` that ferry shows or compares.
#[derive(Clone, Debug)]
pub struct Stat {
    /// The command's name, without the parentheses.
    pub command: String,
    /// `R`, `S`, `D`, `Z` …
    pub state: char,
    /// The parent's pid.
    pub parent: i32,
    /// Device number of the controlling terminal, 0 for none.
    pub terminal: i32,
    /// Time in user and kernel mode, in clock ticks.
    pub cpu_ticks: u64,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
}

impl Stat {
    /// Reads the fields of one process; `None` when it is gone.
    pub fn read(pid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Whether it has exited and only its exit status is left.
    pub fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }

    fn parse(text: &str) -> Option<Self> {
        // The name may itself hold parentheses and spaces; the last one ends it.
        let (head, tail) = text.rsplit_once(')')?;
        let command = head.split_once('(')?.1.to_owned();
        let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
        // `fields[0]` is the third field of the man page.
        let number = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u64>().ok());
        Some(Self {
            command,
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            terminal: fields.get(4)?.parse().ok()?,
            cpu_ticks: number(14)? + number(15)?,
            start_time: number(22)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_look_like_fields() {
        let stat = Stat::parse(
            "7 (a) S (b) Z 3 7 7 34816 7 4194304 0 0 0 0 11 22 0 0 20 0 1 0 987654 4096 1 18446744073709551615",
        )
        .unwrap();
        assert_eq!((stat.command.as_str(), stat.state, stat.parent), ("a) S (b", 'Z', 3));
        assert_eq!((stat.terminal, stat.cpu_ticks, stat.start_time), (34816, 33, 987654));
        assert!(stat.is_dead());
    }

    #[test]
    fn this_process_runs_and_another_start_time_is_another_process() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let this = InitProcess::running(pid).unwrap();
        assert!(this.is_running());
        assert!(!InitProcess { start_time: this.start_time + 1, ..this }.is_running());
    }
}
