//! What keeps a tree from being saved, in words for people.

use std::fmt;

use crate::sys::NsPid;

/// One thing that a dump cannot save, found before anything is frozen (or, at the latest, before anything is written).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The process that has it, as its own namespace numbers it.
    pub pid: NsPid,
    /// That process's name.
    pub comm: String,
    /// The object: "fd 7, /tmp/x", "mapping 7f00-7f10", "namespace user".
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({}): {}: {}", self.pid, self.comm, self.object, self.problem)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "; {}", self.remedy) }
    }
}

/// Several refusals as one message, a line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusals(pub Vec<Refusal>);

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, refusal) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            refusal.fmt(f)?;
        }
        Ok(())
    }
}
