//! Named points of a dump and a restore at which a test may let something go wrong.
//!
//! A caller passes [`Faults`] with its options; the engine calls [`Faults::hit`] wherever [`Point`] says. Without faults that is
//! one comparison. Every edge of every phase is a point, and so is what happens between two batches of an agent, so that a
//! runner that walks through [`Point::all`] meets every state that a failure can find.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};

use crate::cancel::Cancelled;
use crate::dump::DumpPhase;
use crate::restore::RestorePhase;

/// Where a phase is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Edge {
    /// Nothing of it has been done.
    Before,
    /// All of it has been done.
    After,
}

/// Points within the phases of a dump; each is met as often as there are processes, threads or images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DumpStep {
    /// A process of the tree is in the ptrace stops of its threads.
    Stopped,
    /// The leader of a process is made to call mmap(2): it has other registers than its own.
    Call,
    /// It is at the entry of that call.
    Mapping,
    /// The area of the agents is in a process; no agent runs.
    Area,
    /// An agent runs in a thread.
    Enter,
    /// Every agent of a process has a batch, and none has been awaited.
    Batch,
    /// Every agent of a process has answered.
    Answers,
    /// The agents of a process stand in ptrace stops again, their area is still there.
    Leave,
    /// The leader of a process is made to call munmap(2): it has other registers than its own.
    Unmap,
    /// It is at the entry of that call.
    Unmapping,
    /// No agent and no area is in a process any more.
    Left,
    /// A process has a userfaultfd that ferry is about to take away. Met by pre-dumps alone.
    Descriptor,
    /// The pages of one process or object are to be written.
    Pages,
    /// The records of one process are to be written.
    Records,
}

impl DumpStep {
    /// All of them, in the order in which a process meets them.
    pub const ALL: &'static [Self] = &[
        Self::Stopped,
        Self::Call,
        Self::Mapping,
        Self::Area,
        Self::Enter,
        Self::Batch,
        Self::Answers,
        Self::Leave,
        Self::Unmap,
        Self::Unmapping,
        Self::Left,
        Self::Descriptor,
        Self::Pages,
        Self::Records,
    ];
}

/// Points within the phases of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RestoreStep {
    /// A task has been cloned, and does not depend on its maker's life yet.
    Cloned,
    /// Batches of tasks are to be run.
    Batch,
    /// Some threads have been let go, others not. It is too late to fail there.
    Freed,
}

impl RestoreStep {
    /// All of them.
    pub const ALL: &'static [Self] = &[Self::Cloned, Self::Batch, Self::Freed];
}

/// A point at which something may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Point {
    /// At the edge of a phase of a dump.
    Dump(Edge, DumpPhase),
    /// Within a phase of a dump.
    DumpStep(DumpStep),
    /// At the edge of a phase of a restore.
    Restore(Edge, RestorePhase),
    /// Within a phase of a restore.
    RestoreStep(RestoreStep),
}

impl Point {
    /// Every point there is: those of a dump, then those of a restore.
    pub fn all() -> impl Iterator<Item = Self> {
        let edges = [Edge::Before, Edge::After];
        let dump = DumpPhase::ALL.iter().flat_map(move |phase| edges.map(|edge| Self::Dump(edge, *phase)));
        let restore = RestorePhase::ALL.iter().flat_map(move |phase| edges.map(|edge| Self::Restore(edge, *phase)));
        dump.chain(DumpStep::ALL.iter().map(|step| Self::DumpStep(*step)))
            .chain(restore)
            .chain(RestoreStep::ALL.iter().map(|step| Self::RestoreStep(*step)))
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Dump(edge, phase) => format!("Dump{edge:?}{phase:?}"),
            Self::DumpStep(step) => format!("Dump{step:?}"),
            Self::Restore(edge, phase) => format!("Restore{edge:?}{phase:?}"),
            Self::RestoreStep(step) => format!("Restore{step:?}"),
        };
        for (index, letter) in name.chars().enumerate() {
            if index > 0 && letter.is_ascii_uppercase() {
                f.write_str("-")?;
            }
            write!(f, "{}", letter.to_ascii_lowercase())?;
        }
        Ok(())
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The step fails.
    Error,
    /// This process is killed (SIGKILL).
    Kill,
    /// This process's parent is killed, and this process goes on once it is gone.
    KillParent,
    /// This process and its parent are killed at once.
    KillBoth,
    /// This process is asked to end (SIGTERM).
    Ask,
    /// It takes that much longer.
    Delay(Duration),
}

/// One fault: what goes wrong, where, and at which meeting of the point (from 1).
///
/// Written `POINT[:N]=ACTION`, where ACTION is `error`, `kill`, `kill-parent`, `kill-both`, `ask` or `delay:MILLISECONDS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub point: Point,
    /// How often the point is met before, plus one.
    pub occurrence: u32,
    /// What.
    pub action: Action,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!("{text} is no fault: POINT[:N]=error|kill|kill-parent|kill-both|ask|delay:MILLISECONDS is wanted")
        };
        let (place, action) = text.split_once('=').ok_or_else(bad)?;
        let (name, occurrence) = match place.split_once(':') {
            Some((name, number)) => (name, number.parse().ok().filter(|number| *number > 0).ok_or_else(bad)?),
            None => (place, 1),
        };
        let point =
            Point::all().find(|point| point.to_string() == name).ok_or_else(|| format!("there is no point {name}"))?;
        let action = match (action, action.split_once(':')) {
            ("error", _) => Action::Error,
            ("kill", _) => Action::Kill,
            ("kill-parent", _) => Action::KillParent,
            ("kill-both", _) => Action::KillBoth,
            ("ask", _) => Action::Ask,
            (_, Some(("delay", time))) => Action::Delay(Duration::from_millis(time.parse().map_err(|_| bad())?)),
            _ => return Err(bad()),
        };
        Ok(Self { point, occurrence, action })
    }
}

/// The error of a point that was told to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the fault asked for at {0}")]
pub struct InjectedFault(pub Point);

/// Why an operation ended at a point that it passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Interrupted {
    /// It was given up.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// A test let it fail.
    #[error(transparent)]
    Fault(#[from] InjectedFault),
}

/// What is to go wrong; usually nothing.
#[derive(Clone, Debug, Default)]
pub struct Faults(Option<Arc<[Armed]>>);

#[derive(Debug)]
struct Armed {
    fault: Fault,
    met: AtomicU32,
}

impl Faults {
    /// These faults, each once.
    pub fn new(faults: impl IntoIterator<Item = Fault>) -> Self {
        let armed: Arc<[Armed]> =
            faults.into_iter().map(|fault| Armed { fault, met: AtomicU32::new(0) }).collect::<Vec<_>>().into();
        Self((!armed.is_empty()).then_some(armed))
    }

    /// Meets a point.
    ///
    /// # Errors
    /// [`InjectedFault`] when it was told to fail.
    pub fn hit(&self, point: Point) -> Result<(), InjectedFault> {
        match &self.0 {
            None => Ok(()),
            Some(armed) => meet(armed, point),
        }
    }
}

#[cold]
fn meet(armed: &[Armed], point: Point) -> Result<(), InjectedFault> {
    for Armed { fault, met } in armed.iter().filter(|armed| armed.fault.point == point) {
        if met.fetch_add(1, Ordering::Relaxed) + 1 == fault.occurrence {
            act(fault.action, point)?;
        }
    }
    Ok(())
}

fn act(action: Action, point: Point) -> Result<(), InjectedFault> {
    match action {
        Action::Error => return Err(InjectedFault(point)),
        Action::Kill => {
            let _ = kill(Pid::this(), Signal::SIGKILL);
        }
        Action::KillParent => {
            let (parent, start) = (getppid(), Instant::now());
            let _ = kill(parent, Signal::SIGKILL);
            while getppid() == parent && start.elapsed() < Duration::from_secs(5) {
                sleep(Duration::from_micros(100));
            }
        }
        Action::KillBoth => {
            let _ = kill(getppid(), Signal::SIGKILL);
            let _ = kill(Pid::this(), Signal::SIGKILL);
        }
        Action::Ask => {
            let _ = kill(Pid::this(), Signal::SIGTERM);
        }
        Action::Delay(time) => sleep(time),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_point_has_a_name_of_its_own_that_is_understood() {
        let mut names = HashSet::new();
        for point in Point::all() {
            let fault: Fault = format!("{point}:3=delay:5").parse().unwrap();
            let action = Action::Delay(Duration::from_millis(5));
            assert_eq!(fault, Fault { point, occurrence: 3, action });
            assert!(names.insert(point.to_string()), "{point}");
        }
        assert!(names.contains("dump-before-freeze") && names.contains("restore-after-first-task"));
    }

    #[test]
    fn a_fault_comes_at_its_occurrence_and_once() {
        let faults = Faults::new(["dump-batch:2=error".parse().unwrap()]);
        let point = Point::DumpStep(DumpStep::Batch);
        let met: Vec<bool> = (0..4).map(|_| faults.clone().hit(point).is_err()).collect();
        assert_eq!(met, [false, true, false, false], "clones count together");
        assert_eq!(faults.hit(Point::DumpStep(DumpStep::Area)), Ok(()));
        assert_eq!(Faults::default().hit(point), Ok(()));
    }

    #[test]
    fn what_is_no_fault_is_refused() {
        for text in ["dump-batch", "dump-batch=die", "dump-batch:0=kill", "dump-nothing=kill", "dump-batch=delay:x"] {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }
}
