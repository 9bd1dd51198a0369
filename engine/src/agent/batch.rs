//! A batch of system calls for one runner, and its answers.

use std::time::Duration;

use nix::errno::Errno;

use super::AgentError;
use super::slot::Slot;
use crate::sys::{HostPid, RemoteAddr};

/// How long a whole batch may take by default.
const DEADLINE: Duration = Duration::from_secs(120);

const STOP_ON_ERROR: u64 = 1;
const STORE_32_BITS: u64 = 2;
const NOT_RUN: i64 = i64::MIN;

/// One operation, as the runner's assembly reads it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Operation {
    number: u64,
    arguments: [u64; 6],
    result: i64,
    store: u64,
    child: u64,
    flags: u64,
}

const OPERATION: usize = size_of::<Operation>();
const _: () = assert!(OPERATION == 88);

impl Operation {
    fn to_bytes(self) -> [u8; OPERATION] {
        let words = [
            self.number,
            self.arguments[0],
            self.arguments[1],
            self.arguments[2],
            self.arguments[3],
            self.arguments[4],
            self.arguments[5],
            self.result as u64,
            self.store,
            self.child,
            self.flags,
        ];
        let mut bytes = [0; OPERATION];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// A call of a batch, by which its result is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call(usize);

/// Space in the slot that the calls of a batch write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Out {
    /// Where the task sees it.
    pub addr: RemoteAddr,
    offset: usize,
    len: usize,
}

/// A task that sits in a runner and waits for work.
#[derive(Clone)]
pub struct Runner {
    tid: HostPid,
    slot: Slot,
}

impl Runner {
    /// The runner of thread `tid`, which was started with `slot`.
    pub fn new(tid: HostPid, slot: Slot) -> Self {
        Self { tid, slot }
    }

    /// The thread that runs it.
    pub fn tid(&self) -> HostPid {
        self.tid
    }

    /// Its memory.
    pub fn slot(&self) -> &Slot {
        &self.slot
    }

    /// Starts an empty batch.
    pub fn batch(&self) -> Batch<'_> {
        Batch { runner: self, operations: Vec::new(), data: Vec::new(), data_start: self.slot.room() }
    }

    /// Runs a single call; returns its value.
    ///
    /// # Errors
    /// [`AgentError::Call`] with the call's own error, or those of [`Batch::run`].
    pub fn call(&self, number: i64, arguments: &[u64]) -> Result<u64, AgentError> {
        let mut batch = self.batch();
        let call = batch.call(number, arguments);
        batch.run()?.value(call)
    }
}

/// System calls to be run by one task in one round trip.
///
/// Operations grow from the start of the slot's body, data from its end. What does not fit makes [`Self::submit`]
/// fail with [`AgentError::Full`]; callers with lists of unknown length ask [`Self::room`] and split.
pub struct Batch<'a> {
    runner: &'a Runner,
    operations: Vec<Operation>,
    /// Data to copy in: offset in the body, bytes.
    data: Vec<(usize, Vec<u8>)>,
    data_start: usize,
}

impl<'a> Batch<'a> {
    /// Appends the call `number(arguments)`; arguments left out are 0.
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> Call {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        self.operations.push(Operation {
            number: number as u64,
            arguments: all,
            result: NOT_RUN,
            store: 0,
            child: 0,
            flags: 0,
        });
        Call(self.operations.len() - 1)
    }

    /// Like [`Self::call`], and an error of it ends the batch: the calls after it are not run.
    pub fn must(&mut self, number: i64, arguments: &[u64]) -> Call {
        let call = self.call(number, arguments);
        self.operations[call.0].flags |= STOP_ON_ERROR;
        call
    }

    /// Appends a clone(2) or clone3(2) whose child starts in a runner of its own, with the slot at `slot`.
    pub fn clone_call(&mut self, number: i64, arguments: &[u64], slot: RemoteAddr) -> Call {
        let call = self.must(number, arguments);
        self.operations[call.0].child = slot.0;
        call
    }

    /// Makes the result of `from` the argument `index` of the later call `to`.
    ///
    /// # Panics
    /// When `from` is not before `to`, or has a [`Self::store`] already.
    pub fn pass(&mut self, from: Call, to: Call, index: usize) {
        assert!(from.0 < to.0 && index < 6 && self.operations[from.0].store == 0);
        self.operations[from.0].store = self.runner.slot.body(to.0 * OPERATION + 8 + 8 * index).0;
    }

    /// Stores the result of `call`, as 32 bits, at `addr` in the task.
    pub fn store(&mut self, call: Call, addr: RemoteAddr) {
        assert!(self.operations[call.0].store == 0);
        self.operations[call.0].store = addr.0;
        self.operations[call.0].flags |= STORE_32_BITS;
    }

    /// Places `bytes` where the task can read them; the address is aligned to 16 bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> RemoteAddr {
        let out = self.space(bytes.len());
        self.data.push((out.offset, bytes.to_vec()));
        out.addr
    }

    /// Places `text` and a terminating zero byte where the task can read them.
    pub fn path(&mut self, text: impl AsRef<[u8]>) -> RemoteAddr {
        let mut bytes = text.as_ref().to_vec();
        bytes.push(0);
        self.bytes(&bytes)
    }

    /// Sets `len` zero bytes aside for the calls to write to.
    pub fn space(&mut self, len: usize) -> Out {
        self.data_start = self.data_start.saturating_sub(len) & !15;
        let out = Out { addr: self.runner.slot.body(self.data_start), offset: self.data_start, len };
        if self.fits() {
            self.data.push((out.offset, vec![0; len]));
        }
        out
    }

    /// How many more bytes of data fit, when each operation counts as [`Self::CALL_BYTES`].
    pub fn room(&self) -> usize {
        self.data_start.saturating_sub(self.operations.len() * OPERATION)
    }

    /// What one operation takes of [`Self::room`].
    pub const CALL_BYTES: usize = OPERATION;

    /// Whether no call has been added.
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    fn fits(&self) -> bool {
        self.data_start > self.operations.len() * OPERATION
    }

    /// Gives the batch to the task without waiting for it.
    ///
    /// # Errors
    /// [`AgentError::Full`] when it does not fit the slot; nothing was run then.
    pub fn submit(self) -> Result<Pending<'a>, AgentError> {
        if !self.fits() {
            return Err(AgentError::Full { tid: self.runner.tid });
        }
        let slot = &self.runner.slot;
        let mut operations = Vec::with_capacity(self.operations.len() * OPERATION);
        for operation in &self.operations {
            operations.extend_from_slice(&operation.to_bytes());
        }
        slot.write(0, &operations);
        for (offset, bytes) in &self.data {
            slot.write(*offset, bytes);
        }
        slot.submit(self.operations.len());
        let numbers = self.operations.iter().map(|operation| operation.number as i64).collect();
        Ok(Pending { runner: self.runner, numbers })
    }

    /// Runs the batch and returns its answers.
    ///
    /// # Errors
    /// [`AgentError::Full`], or when the task died, was stopped by a signal, or is too late. That a call failed is
    /// told by its answer.
    pub fn run(self) -> Result<Answers<'a>, AgentError> {
        self.submit()?.wait()
    }
}

/// A batch that the task is running.
#[must_use = "a submitted batch must be awaited before the slot is used again"]
pub struct Pending<'a> {
    runner: &'a Runner,
    numbers: Vec<i64>,
}

impl<'a> Pending<'a> {
    /// Waits for the end of the batch. Errors as [`Batch::run`].
    pub fn wait(self) -> Result<Answers<'a>, AgentError> {
        self.runner.slot.wait_done(self.runner.tid, DEADLINE)?;
        let mut operations = vec![0; self.numbers.len() * OPERATION];
        self.runner.slot.read(0, &mut operations);
        let results = operations
            .chunks_exact(OPERATION)
            .map(|operation| i64::from_ne_bytes(operation[56..64].try_into().unwrap_or_default()))
            .collect();
        Ok(Answers { runner: self.runner, numbers: self.numbers, results })
    }
}

/// What the calls of a batch returned. Data is read from the slot, so before the next batch.
pub struct Answers<'a> {
    runner: &'a Runner,
    numbers: Vec<i64>,
    results: Vec<i64>,
}

impl Answers<'_> {
    /// The call's return value or its error number; `ECANCELED` for a call that an earlier failure kept from running.
    pub fn result(&self, call: Call) -> nix::Result<u64> {
        match self.results[call.0] {
            NOT_RUN => Err(Errno::ECANCELED),
            error @ -4095..0 => Err(Errno::from_raw(-error as i32)),
            value => Ok(value as u64),
        }
    }

    /// Like [`Self::result`], with an error that names task and call.
    pub fn value(&self, call: Call) -> Result<u64, AgentError> {
        self.result(call).map_err(|errno| AgentError::Call {
            tid: self.runner.tid,
            number: self.numbers[call.0],
            index: call.0,
            errno,
        })
    }

    /// The error of the first call that failed or was not run, if any.
    ///
    /// # Errors
    /// [`AgentError::Call`].
    pub fn all_succeeded(&self) -> Result<(), AgentError> {
        (0..self.results.len()).try_for_each(|index| self.value(Call(index)).map(drop))
    }

    /// What the calls wrote to `out`.
    pub fn bytes(&self, out: Out) -> Vec<u8> {
        let mut bytes = vec![0; out.len];
        self.runner.slot.read(out.offset, &mut bytes);
        bytes
    }

    /// The 64-bit word at `offset` of `out`.
    pub fn u64_at(&self, out: Out, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.runner.slot.read(out.offset + offset, &mut bytes);
        u64::from_ne_bytes(bytes)
    }

    /// The 32-bit word at `offset` of `out`.
    pub fn u32_at(&self, out: Out, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.runner.slot.read(out.offset + offset, &mut bytes);
        u32::from_ne_bytes(bytes)
    }
}
