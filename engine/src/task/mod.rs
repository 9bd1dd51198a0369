//! What a task has besides memory, files and namespaces: the `core` images.
//!
//! One file per kernel object, each with its dump and its restore half:
//!
//! - [`registers`], [`interrupted`], [`rseq`], [`processor`]: the processor's state, interrupted calls, restartable
//!   sequences, and switches;
//! - [`signals`], [`timers`]: actions, stacks, queues; interval and POSIX timers;
//! - [`credentials`], [`seccomp`]: what a thread may do;
//! - [`limits`], [`scheduling`], [`affinity`], [`identity`]: limits, priorities, processors, name, and the many small settings of prctl(2);
//! - [`thread`], [`process`]: a whole thread and a whole process, put together from these;
//! - [`refuse`]: what cannot be saved.
//!
//! # Order of a restore
//!
//! Each thread in its own runner, all signals blocked, privileges whole:
//!
//! 1. [`identity::restore_loginuid`], before the tree's own `/proc` hides ferry's; per process.
//! 2. When memory, descriptors and all threads are there: [`process::restore_process`] (leaders),
//!    [`thread::restore_thread`] (all), in one batch.
//! 3. [`timers::create_timers`], [`signals::restore_queues`]: batches of their own, none for most threads.
//! 4. Under `PTRACE_O_SUSPEND_SECCOMP`: [`seccomp::restore_seccomp`], then [`thread::restore_identity`].
//! 5. Leaders, when every thread has its credentials: [`identity::restore_memory_flags`],
//!    [`identity::restore_oom_score_adj`] (from outside), and last of all [`timers::arm_timers`].
//! 6. Stopped by ptrace(2): [`registers::final_registers`], [`registers::set_final_registers`], [`rseq::section_to_name`].
//!
//! # Order of a dump
//!
//! [`ThreadOutside::collect`] for every stopped thread, before any agent enters; [`ProcessOutside::collect`];
//! [`ThreadQuestions`] in each thread and [`ProcessQuestions`] in the leader; when the agents have left,
//! [`Queues::collect`]; [`refuse`]; [`process::dump_leader`] and [`thread::dump_thread`].
//!
//! A dump asks from outside what ptrace(2) tells of a stopped thread, and everything else from inside, in one batch per
//! thread: a call from inside costs a tenth of a microsecond, a file of `/proc` tens of microseconds. Most questions are
//! answered from inside for a second reason: the ids are then those of the tree's own namespaces.

pub mod affinity;
pub mod credentials;
pub mod identity;
pub mod interrupted;
pub mod limits;
pub mod process;
pub mod processor;
pub mod refuse;
pub mod registers;
pub mod rseq;
pub mod scheduling;
pub mod seccomp;
pub mod signals;
pub mod thread;
pub mod timers;

use nix::errno::Errno;

use crate::agent::{AgentError, Answers, Batch, Call};
use crate::sys::HostPid;

pub use process::{Process, ProcessAnswers, ProcessOutside, ProcessQuestions};
pub use signals::Queues;
pub use thread::{Thread, ThreadAnswers, ThreadOutside, ThreadQuestions};

/// Why the state of a task could not be read or restored.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The agent failed, or a call that it made.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The kernel did not tell something about a stopped thread.
    #[error("task {tid}: cannot read its {what}: {errno}")]
    Collect {
        /// The thread.
        tid: HostPid,
        /// What was asked for.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A file of `/proc` could not be read, or says something unknown.
    #[error("task {tid}: /proc/{tid}/{file}: {source}")]
    Proc {
        /// The process.
        tid: HostPid,
        /// The file.
        file: &'static str,
        /// What went wrong.
        source: std::io::Error,
    },
    /// The kernel refused to set something.
    #[error("task {tid}: cannot restore its {what}: {errno}")]
    Restore {
        /// The thread.
        tid: HostPid,
        /// What was to be set.
        what: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// Something was set, but is not what it should be.
    #[error("task {tid}: its {what} should be {wanted}, but the kernel made it {got}")]
    Differs {
        /// The thread.
        tid: HostPid,
        /// What was to be set.
        what: &'static str,
        /// What the image says.
        wanted: String,
        /// What the kernel says.
        got: String,
    },
    /// The image holds what no kernel would have said.
    #[error("image core-{tid}: {what}: the image is damaged")]
    Image {
        /// The thread, as the image numbers it.
        tid: u32,
        /// What is wrong.
        what: String,
    },
    /// The state needs what this machine does not have.
    #[error("image core-{tid}: {what}")]
    Machine {
        /// The thread, as the image numbers it.
        tid: u32,
        /// What is missing.
        what: String,
    },
}

/// Calls of a batch that must succeed, each with what it sets, for the message.
#[derive(Debug, Default)]
pub struct Checks(Vec<(Call, String, Option<u64>)>);

impl Checks {
    /// Appends to `batch` a call that sets `what` and must succeed.
    pub fn call(&mut self, batch: &mut Batch<'_>, what: impl Into<String>, number: i64, arguments: &[u64]) -> Call {
        let call = batch.call(number, arguments);
        self.0.push((call, what.into(), None));
        call
    }

    /// Like [`Self::call`]; the call must return `value`.
    pub fn call_returns(
        &mut self,
        batch: &mut Batch<'_>,
        what: impl Into<String>,
        number: i64,
        arguments: &[u64],
        value: u64,
    ) {
        let call = batch.call(number, arguments);
        self.0.push((call, what.into(), Some(value)));
    }

    /// The first call that failed, if any.
    ///
    /// # Errors
    /// [`TaskError::Restore`].
    pub fn verify(&self, tid: HostPid, answers: &Answers<'_>) -> Result<(), TaskError> {
        for (call, what, wanted) in &self.0 {
            let error = match (answers.result(*call), wanted) {
                (Err(errno), _) => errno,
                (Ok(got), Some(wanted)) if got != *wanted => Errno::EINVAL,
                _ => continue,
            };
            return Err(TaskError::Restore { tid, what: what.clone(), errno: error });
        }
        Ok(())
    }
}

/// Little-endian words of an image's or the kernel's bytes; a rest that fills no word is left out.
pub(crate) fn words32(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

/// As [`words32`], of 64 bits.
pub(crate) fn words64(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
}
