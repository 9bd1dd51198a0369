//! Lists of calls for tasks, run in all of them at once.
//!
//! A script is written down before it runs, however long it is; running cuts it into batches that fit the slot. Each call
//! says what it does and to what, so that a failure can be told in words.

use std::ops::Range;

use nix::errno::Errno;

use crate::agent::{AgentError, Answers, Batch, Call, Pending, Runner};
use crate::sys::clone::CloneArguments;
use crate::sys::{NsPid, RemoteAddr};

/// What a call works on, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A range of memory.
    Memory(Range<u64>),
    /// A task to be created.
    Task(NsPid),
    /// Anything else.
    Named(String),
}

impl std::fmt::Display for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Memory(range) => write!(f, "memory {:x}-{:x}", range.start, range.end),
            Self::Task(pid) => write!(f, "task {pid}"),
            Self::Named(name) => f.write_str(name),
        }
    }
}

/// Why a script failed.
#[derive(Debug)]
pub enum ScriptError {
    /// The agent did not do its work.
    Agent(AgentError),
    /// A call failed.
    Step {
        /// What it was to do.
        step: &'static str,
        /// To what.
        object: Object,
        /// The kernel's answer.
        errno: Errno,
    },
}

struct Planned {
    number: i64,
    arguments: [u64; 6],
    /// Bytes that an argument points to.
    data: Option<Data>,
    step: &'static str,
    object: Object,
    may_fail: bool,
    /// The slot of the task that a clone makes.
    child: Option<RemoteAddr>,
}

/// Bytes that come with a call.
pub struct Data {
    /// The argument that is their address.
    pub argument: usize,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// More bytes, whose address is stored at an offset of the first.
    pub inner: Option<(usize, Vec<u8>)>,
}

impl Planned {
    fn room(&self) -> usize {
        let data = self
            .data
            .as_ref()
            .map_or(0, |data| data.bytes.len() + data.inner.as_ref().map_or(0, |(_, bytes)| bytes.len()) + 64);
        Batch::CALL_BYTES + data
    }

    fn add(&self, batch: &mut Batch<'_>) -> Call {
        let mut arguments = self.arguments;
        if let Some(data) = &self.data {
            let mut bytes = data.bytes.clone();
            if let Some((at, inner)) = &data.inner {
                let address = batch.bytes(inner);
                bytes[*at..*at + 8].copy_from_slice(&address.0.to_ne_bytes());
            }
            arguments[data.argument] = batch.bytes(&bytes).0;
        }
        match self.child {
            Some(slot) => batch.clone_call(self.number, &arguments, slot),
            None if self.may_fail => batch.call(self.number, &arguments),
            None => batch.must(self.number, &arguments),
        }
    }
}

/// Calls for one task, in order.
#[derive(Default)]
pub struct Script {
    calls: Vec<Planned>,
}

impl Script {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    fn push(&mut self, step: &'static str, object: Object, number: i64, arguments: &[u64]) -> &mut Planned {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        let planned = Planned { number, arguments: all, data: None, step, object, may_fail: false, child: None };
        self.calls.push(planned);
        let last = self.calls.len() - 1;
        &mut self.calls[last]
    }

    /// A call on memory that must succeed.
    pub fn memory(&mut self, step: &'static str, range: &Range<u64>, number: i64, arguments: &[u64]) {
        self.push(step, Object::Memory(range.clone()), number, arguments);
    }

    /// A call on memory that may fail.
    pub fn try_memory(&mut self, range: &Range<u64>, number: i64, arguments: &[u64]) {
        self.push("", Object::Memory(range.clone()), number, arguments).may_fail = true;
    }

    /// Any call that must succeed. Returns its place among the results.
    pub fn must(&mut self, step: &'static str, object: impl Into<String>, number: i64, arguments: &[u64]) -> usize {
        self.push(step, Object::Named(object.into()), number, arguments);
        self.calls.len() - 1
    }

    /// Like [`Self::must`], with bytes that the task reads.
    pub fn with_data(
        &mut self,
        step: &'static str,
        object: impl Into<String>,
        number: i64,
        arguments: &[u64],
        data: Data,
    ) -> usize {
        self.push(step, Object::Named(object.into()), number, arguments).data = Some(data);
        self.calls.len() - 1
    }

    /// A clone3(2) whose child, numbered `set_tid` (innermost namespace first), starts in the runner of the slot at `slot`.
    pub fn clone_task(&mut self, arguments: CloneArguments, set_tid: &[i32], slot: RemoteAddr) -> usize {
        let pid = set_tid.first().copied().unwrap_or(0);
        let arguments = CloneArguments { set_tid_size: set_tid.len() as u64, ..arguments };
        let bytes = arguments.to_bytes();
        let length = bytes.len() as u64;
        let numbers: Vec<u8> = set_tid.iter().flat_map(|number| number.to_ne_bytes()).collect();
        let inner = (!set_tid.is_empty()).then_some((std::mem::offset_of!(CloneArguments, set_tid), numbers));
        let planned = self.push("create it", Object::Task(NsPid(pid)), libc::SYS_clone3, &[0, length]);
        planned.data = Some(Data { argument: 0, bytes, inner });
        planned.child = Some(slot);
        self.calls.len() - 1
    }

    /// A call that may fail, with bytes that the task reads.
    pub fn attempt_with(&mut self, number: i64, arguments: &[u64], data: Data) {
        let planned = self.push("", Object::Named(String::new()), number, arguments);
        planned.may_fail = true;
        planned.data = Some(data);
    }

    /// Any call that may fail. Returns its place among the results.
    pub fn attempt(&mut self, number: i64, arguments: &[u64]) -> usize {
        self.push("", Object::Named(String::new()), number, arguments).may_fail = true;
        self.calls.len() - 1
    }
}

/// What the calls of a script returned.
pub type Results = Vec<nix::Result<u64>>;

/// Runs each script in its task, all tasks at once; returns the results in the same order.
///
/// # Errors
/// The place of the first task that failed in `scripts`, and why. All tasks have ended their batches then.
pub fn run(scripts: &[(&Runner, Script)]) -> Result<Vec<Results>, (usize, ScriptError)> {
    let mut results: Vec<Results> = scripts.iter().map(|(_, script)| Vec::with_capacity(script.calls.len())).collect();
    let mut failure = None;
    while failure.is_none() {
        let mut running: Vec<(usize, usize, Pending<'_>, Vec<Call>)> = Vec::new();
        for (index, (runner, script)) in scripts.iter().enumerate() {
            let done = results[index].len();
            if done == script.calls.len() {
                continue;
            }
            let mut batch = runner.batch();
            let mut calls = Vec::new();
            for planned in &script.calls[done..] {
                if !calls.is_empty() && batch.room() < planned.room() + Batch::CALL_BYTES {
                    break;
                }
                calls.push(planned.add(&mut batch));
            }
            match batch.submit() {
                Ok(pending) => running.push((index, done, pending, calls)),
                Err(error) => {
                    failure.get_or_insert((index, ScriptError::Agent(error)));
                }
            }
        }
        if running.is_empty() {
            break;
        }
        for (index, done, pending, calls) in running {
            match pending.wait() {
                Ok(answers) => {
                    let planned = &scripts[index].1.calls[done..];
                    if let Err(error) = take(&answers, planned, &calls, &mut results[index]) {
                        failure.get_or_insert((index, error));
                    }
                }
                Err(error) => {
                    failure.get_or_insert((index, ScriptError::Agent(error)));
                }
            }
        }
    }
    failure.map_or(Ok(results), Err)
}

fn take(answers: &Answers<'_>, planned: &[Planned], calls: &[Call], results: &mut Results) -> Result<(), ScriptError> {
    for (planned, call) in planned.iter().zip(calls) {
        let result = answers.result(*call);
        if let (Err(errno), false) = (result, planned.may_fail) {
            return Err(ScriptError::Step { step: planned.step, object: planned.object.clone(), errno });
        }
        results.push(result);
    }
    Ok(())
}
