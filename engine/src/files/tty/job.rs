//! Which session each process is in, and what terminal controls it (proc_pid_stat(5)): a slave tells that only to its own
//! session, and a master's answer has ferry's numbers.

use crate::error::Refusal;
use crate::procfs::{Ids, Stat};
use crate::sys::HostPid;
use crate::tree::TaskRef;

/// A number as ferry sees it, and as the tree does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Number {
    pub here: i32,
    /// 0 when it belongs to somebody outside the tree's namespace.
    pub inside: i32,
}

/// One process of the tree.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub pid: HostPid,
    pub session: Number,
    pub group: Number,
    /// Device of the controlling terminal; 0 for none.
    pub terminal: u32,
    /// That terminal's foreground group, as ferry sees it.
    pub foreground: i32,
    leads: bool,
    /// The process, ready to be told of.
    blank: Refusal,
}

impl Job {
    /// From what the kernel said of a process.
    pub fn new(task: &TaskRef, stat: &Stat, ids: &Ids) -> Self {
        let number = |levels: &[i32]| Number {
            here: levels.first().copied().unwrap_or(0),
            inside: levels.last().copied().unwrap_or(0),
        };
        let session = Number { here: stat.session, ..number(&ids.session) };
        Self {
            pid: task.pid,
            session,
            group: number(&ids.group),
            terminal: stat.terminal,
            foreground: stat.foreground,
            leads: session.here == task.pid.0 && stat.state != 'Z',
            blank: task.refuse("its controlling terminal", "", ""),
        }
    }

    /// Whether it leads its session.
    pub fn leads_session(&self) -> bool {
        self.leads
    }

    /// A refusal about its controlling terminal.
    pub fn refuse(&self, problem: impl Into<String>, remedy: impl Into<String>) -> Refusal {
        Refusal { problem: problem.into(), remedy: remedy.into(), ..self.blank.clone() }
    }
}
