//! System calls of the root task, in batches, with names for what fails.

use std::collections::HashMap;
use std::hash::Hash;

use nix::errno::Errno;

use crate::agent::{AgentError, Batch, Call, Runner};
use crate::sys::RemoteAddr;

/// How much of a slot one step may take.
const STEP: usize = 3 * libc::PATH_MAX as usize;

/// Why a step failed.
#[derive(Debug)]
pub enum StepError {
    /// The task's agent did.
    Agent(AgentError),
    /// A call did: what it was about, what it was to do, and the kernel's answer.
    Call { object: String, step: &'static str, errno: Errno },
}

/// Calls to be made by one task, each of which must succeed. Descriptors that calls open are kept by a key.
pub struct Script<'a, K> {
    runner: &'a Runner,
    batch: Batch<'a>,
    steps: Vec<(Call, String, &'static str, Option<K>)>,
    descriptors: HashMap<K, u64>,
}

impl<'a, K: Copy + Eq + Hash> Script<'a, K> {
    /// An empty one.
    pub fn new(runner: &'a Runner) -> Self {
        Self { runner, batch: runner.batch(), steps: Vec::new(), descriptors: HashMap::new() }
    }

    /// The task.
    pub fn runner(&self) -> &'a Runner {
        self.runner
    }

    /// Appends a call about `object`.
    pub fn call(&mut self, object: &str, step: &'static str, number: i64, arguments: &[u64]) -> Call {
        let call = self.batch.must(number, arguments);
        self.steps.push((call, object.to_owned(), step, None));
        call
    }

    /// Appends a call that returns a descriptor, kept as `key`.
    pub fn open(&mut self, key: K, object: &str, step: &'static str, number: i64, arguments: &[u64]) {
        let call = self.batch.must(number, arguments);
        self.steps.push((call, object.to_owned(), step, Some(key)));
    }

    /// A path for the next call.
    pub fn path(&mut self, path: impl AsRef<[u8]>) -> RemoteAddr {
        self.batch.path(path)
    }

    /// The descriptor kept as `key`, once the call that opens it has been run.
    pub fn descriptor(&mut self, key: K) -> Result<Option<u64>, StepError> {
        if !self.descriptors.contains_key(&key) && self.steps.iter().any(|step| step.3 == Some(key)) {
            self.run()?;
        }
        Ok(self.descriptors.get(&key).copied())
    }

    /// Makes sure that one more step fits: runs what there is if not.
    pub fn make_room(&mut self) -> Result<(), StepError> {
        if self.batch.room() < STEP { self.run() } else { Ok(()) }
    }

    /// Runs all calls so far.
    pub fn run(&mut self) -> Result<(), StepError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let batch = std::mem::replace(&mut self.batch, self.runner.batch());
        let answers = batch.run().map_err(StepError::Agent)?;
        for (call, object, step, key) in self.steps.drain(..) {
            match (answers.result(call), key) {
                (Ok(descriptor), Some(key)) => drop(self.descriptors.insert(key, descriptor)),
                (Ok(_), None) => {}
                (Err(errno), _) => return Err(StepError::Call { object, step, errno }),
            }
        }
        Ok(())
    }

    /// Closes all descriptors that were kept, and runs what is left.
    pub fn finish(mut self) -> Result<(), StepError> {
        self.run()?;
        let descriptors: Vec<u64> = self.descriptors.drain().map(|(_, descriptor)| descriptor).collect();
        for descriptor in descriptors {
            self.make_room()?;
            self.call("a descriptor", "close it", libc::SYS_close, &[descriptor]);
        }
        self.run()
    }
}
