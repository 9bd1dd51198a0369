//! Making descriptions inside a task: batches that know which descriptor numbers the kernel will give.
//!
//! The kernel gives the lowest number that is free (open(2), pipe(2), socket(2)). A task that sits in a runner does nothing
//! but what ferry tells it, so ferry knows its descriptor table, and can name a new descriptor in the calls after the one that
//! makes it: thousands of descriptors take a few batches. Every number is compared with the answer when a batch has run.

use nix::errno::Errno;

use crate::agent::{AgentError, Batch, Call, Out, Runner};
use crate::sys::RemoteAddr;

/// Room kept free in a batch for calls without data.
const SLACK: usize = 16 * Batch::CALL_BYTES;
/// Most bytes that one call writes.
const CHUNK: usize = 64 << 10;

/// Why a session failed; the plan turns ids into words.
#[derive(Debug)]
pub(crate) enum SessionError {
    /// The task did not run the batch.
    Agent(AgentError),
    /// A call for description `id` failed.
    Step { id: u32, step: &'static str, errno: Errno },
    /// The file of description `id` is not what was saved.
    Changed { id: u32, problem: String },
    /// The kernel gave another number than expected.
    Number { id: u32, expected: u32, got: u64 },
}

impl From<AgentError> for SessionError {
    fn from(error: AgentError) -> Self {
        Self::Agent(error)
    }
}

/// What a step of a session returns.
pub(crate) type Done<T = ()> = Result<T, SessionError>;

/// Which numbers of a descriptor table are taken.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbers {
    words: Vec<u64>,
}

impl Numbers {
    /// The lowest free number, which is taken from now on.
    fn allocate(&mut self) -> u32 {
        let word = self.words.iter().position(|word| *word != u64::MAX).unwrap_or(self.words.len());
        let bit = self.words.get(word).map_or(0, |word| word.trailing_ones());
        let number = word as u32 * 64 + bit;
        self.take(number);
        number
    }

    /// Marks `number` as taken.
    pub fn take(&mut self, number: u32) {
        let word = number as usize / 64;
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (number % 64);
    }

    fn free(&mut self, number: u32) {
        if let Some(word) = self.words.get_mut(number as usize / 64) {
            *word &= !(1 << (number % 64));
        }
    }
}

/// A descriptor that has its number only for the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Temporary(u32);

impl Temporary {
    /// The number.
    pub fn number(self) -> u32 {
        self.0
    }

    /// A descriptor that has been in the table before.
    pub fn known(number: u32) -> Self {
        Self(number)
    }
}

/// Where a descriptor is to be, and whether execve(2) closes it there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub number: u32,
    pub cloexec: bool,
}

enum Expect {
    Success,
    Number(u32),
    Count(u64),
    Pair(Out, [u32; 2]),
    File { out: Out, size: Option<u64>, mode: Option<u32> },
}

struct Check {
    call: Call,
    id: u32,
    step: &'static str,
    expect: Expect,
}

/// Work in one task's descriptor table.
pub(crate) struct Session<'a> {
    runner: &'a Runner,
    batch: Batch<'a>,
    checks: Vec<Check>,
    numbers: Numbers,
    /// The description that the next calls are for.
    id: u32,
    /// A number that nothing else uses.
    scratch: u32,
}

impl<'a> Session<'a> {
    /// Begins in the task of `runner`, whose table holds `numbers`; `scratch` is above all others.
    pub fn new(runner: &'a Runner, numbers: Numbers, scratch: u32) -> Self {
        Self { runner, batch: runner.batch(), checks: Vec::new(), numbers, id: 0, scratch }
    }

    /// Names the description that the next calls are for.
    pub fn about(&mut self, id: u32) {
        self.id = id;
    }

    /// Makes sure that `bytes` of data and a few calls fit.
    fn reserve(&mut self, bytes: usize) -> Done {
        if self.batch.room() < bytes + SLACK { self.flush() } else { Ok(()) }
    }

    fn check(&mut self, call: Call, step: &'static str, expect: Expect) {
        self.checks.push(Check { call, id: self.id, step, expect });
    }

    /// A call that has to succeed.
    pub fn must(&mut self, step: &'static str, number: i64, arguments: &[u64]) -> Done {
        self.must_with(step, number, arguments, &[])
    }

    /// The same; a pointer to a copy of `data`, unless empty, is its last argument.
    pub fn must_with(&mut self, step: &'static str, number: i64, arguments: &[u64], data: &[u8]) -> Done {
        self.must_around(step, number, arguments, data, &[])
    }

    /// The same, with arguments before and after the pointer.
    pub fn must_around(&mut self, step: &'static str, number: i64, before: &[u64], data: &[u8], after: &[u64]) -> Done {
        let call = self.call_around(number, before, data, after)?;
        self.check(call, step, Expect::Success);
        Ok(())
    }

    fn call_around(&mut self, number: i64, before: &[u64], data: &[u8], after: &[u64]) -> Done<Call> {
        self.reserve(data.len())?;
        let mut arguments = before.to_vec();
        if !data.is_empty() {
            arguments.push(self.batch.bytes(data).0);
        }
        arguments.extend_from_slice(after);
        Ok(self.batch.must(number, &arguments))
    }

    /// A call that may fail.
    pub fn try_call(&mut self, number: i64, arguments: &[u64]) -> Done {
        self.reserve(0)?;
        self.batch.call(number, arguments);
        Ok(())
    }

    /// Runs what has been gathered, then one call with `len` bytes for it to write to as its last argument; returns them.
    pub fn ask(&mut self, step: &'static str, number: i64, arguments: &[u64], len: usize) -> Done<Vec<u8>> {
        self.flush()?;
        let mut batch = self.runner.batch();
        let out = batch.space(len);
        let call = batch.must(number, &[arguments, &[out.addr.0]].concat());
        let answers = batch.run()?;
        answers.result(call).map_err(|errno| SessionError::Step { id: self.id, step, errno })?;
        Ok(answers.bytes(out))
    }

    /// The description that calls are for.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Runs what has been gathered, then one call with a copy of `data` and room for `len` bytes among its arguments;
    /// returns what it wrote there, or nothing if it said `ENOENT`.
    pub fn try_ask(
        &mut self,
        number: i64,
        before: &[u64],
        data: &[u8],
        len: usize,
        after: &[u64],
    ) -> Done<Option<Vec<u8>>> {
        self.flush()?;
        let mut batch = self.runner.batch();
        let (data, out) = (batch.bytes(data), batch.space(len));
        let call = batch.call(number, &[before, &[data.0, out.addr.0], after].concat());
        let answers = batch.run()?;
        match answers.result(call) {
            Ok(_) => Ok(Some(answers.bytes(out))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(SessionError::Step { id: self.id, step: "examine what is there", errno }),
        }
    }

    /// A copy of `bytes` for the very next call, which may have as many bytes of data of its own as 64.
    pub fn data(&mut self, bytes: &[u8]) -> Done<RemoteAddr> {
        self.reserve(bytes.len() + 128)?;
        Ok(self.batch.bytes(bytes))
    }

    /// A call that makes a descriptor.
    pub fn make(
        &mut self,
        step: &'static str,
        number: i64,
        before: &[u64],
        data: &[u8],
        after: &[u64],
    ) -> Done<Temporary> {
        let call = self.call_around(number, before, data, after)?;
        let expected = self.numbers.allocate();
        self.check(call, step, Expect::Number(expected));
        Ok(Temporary(expected))
    }

    /// Opens the file at a path from the task's root, or from its working directory.
    pub fn open(&mut self, path: &[u8], flags: u32) -> Done<Temporary> {
        let path = [path, &[0]].concat();
        self.make("open it", libc::SYS_openat, &[libc::AT_FDCWD as u64], &path, &[flags.into(), 0])
    }

    /// A call that makes two descriptors, and writes their numbers to the pointer between its arguments.
    pub fn pair(&mut self, step: &'static str, number: i64, before: &[u64], after: &[u64]) -> Done<[Temporary; 2]> {
        self.reserve(16)?;
        let out = self.batch.space(8);
        let call = self.batch.must(number, &[before, &[out.addr.0], after].concat());
        let expected = [self.numbers.allocate(), self.numbers.allocate()];
        self.check(call, step, Expect::Pair(out, expected));
        Ok(expected.map(Temporary))
    }

    /// Closes a descriptor.
    pub fn close(&mut self, descriptor: Temporary) -> Done {
        self.must("close it", libc::SYS_close, &[descriptor.0.into()])?;
        self.numbers.free(descriptor.0);
        Ok(())
    }

    /// Closes all numbers from `first` to `last`; the table that is known is the caller's to keep right.
    pub fn close_range(&mut self, first: u32, last: u32) -> Done {
        self.must("close what it does not need", libc::SYS_close_range, &[first.into(), last.into(), 0])
    }

    /// Sets whether execve(2) closes the descriptor.
    pub fn set_cloexec(&mut self, descriptor: Temporary, cloexec: bool) -> Done {
        let flags = if cloexec { libc::FD_CLOEXEC as u64 } else { 0 };
        self.must("set its descriptor flags", libc::SYS_fcntl, &[descriptor.0.into(), libc::F_SETFD as u64, flags])
    }

    /// Sets status flags (`F_SETFL`).
    pub fn set_flags(&mut self, descriptor: Temporary, flags: u32) -> Done {
        self.must("set its flags", libc::SYS_fcntl, &[descriptor.0.into(), libc::F_SETFL as u64, flags.into()])
    }

    /// Writes all of `bytes`, which must not block.
    pub fn write(&mut self, descriptor: Temporary, bytes: &[u8]) -> Done {
        for chunk in bytes.chunks(CHUNK) {
            let mut rest = chunk;
            while !rest.is_empty() {
                self.reserve(rest.len().min(CHUNK / 4))?;
                let (now, later) = rest.split_at(rest.len().min(self.batch.room().saturating_sub(SLACK)));
                let address = self.batch.bytes(now);
                let call = self.batch.must(libc::SYS_write, &[descriptor.0.into(), address.0, now.len() as u64]);
                self.check(call, "fill it", Expect::Count(now.len() as u64));
                rest = later;
            }
        }
        Ok(())
    }

    /// Sends `packet` as one, which must not block.
    pub fn send(&mut self, descriptor: Temporary, packet: &[u8]) -> Done {
        self.reserve(packet.len())?;
        let address = self.batch.bytes(packet);
        let arguments = [descriptor.0.into(), address.0, packet.len() as u64, libc::MSG_NOSIGNAL as u64, 0, 0];
        let call = self.batch.must(libc::SYS_sendto, &arguments);
        self.check(call, "fill its queue", Expect::Count(packet.len() as u64));
        Ok(())
    }

    /// Compares an open file with what was saved: its size, and its type.
    pub fn check_file(&mut self, file: Temporary, size: Option<u64>, mode: Option<u32>) -> Done {
        let len = size_of::<libc::stat>();
        self.reserve(len)?;
        let out = self.batch.space(len);
        let call = self.batch.must(libc::SYS_fstat, &[file.0.into(), out.addr.0]);
        self.check(call, "examine it", Expect::File { out, size, mode });
        Ok(())
    }

    /// Duplicates a descriptor that stays where it is.
    pub fn duplicate(&mut self, from: u32, to: Place) -> Done {
        let flags = if to.cloexec { libc::O_CLOEXEC as u64 } else { 0 };
        self.must("place it", libc::SYS_dup3, &[from.into(), to.number.into(), flags])?;
        self.numbers.take(to.number);
        Ok(())
    }

    /// Moves each descriptor to its places; one without a place is closed.
    ///
    /// A descriptor that is at its first place already must have been made with the flag wanted there.
    pub fn settle(&mut self, mut moves: Vec<(Temporary, Vec<Place>)>) -> Done {
        let scratch = Place { number: self.scratch, cloexec: true };
        while !moves.is_empty() {
            // One whose places are not in the way of the others, or else any, out of the way.
            let at_rest = |from: &Temporary, places: &[Place]| {
                !moves.iter().any(|(other, _)| other != from && places.iter().any(|place| place.number == other.0))
            };
            match moves.iter().position(|(from, places)| at_rest(from, places)) {
                Some(index) => {
                    let (from, places) = moves.swap_remove(index);
                    for place in places.iter().filter(|place| place.number != from.0) {
                        self.duplicate(from.0, *place)?;
                    }
                    if !places.iter().any(|place| place.number == from.0) {
                        self.close(from)?;
                    }
                }
                None => {
                    let from = moves[0].0;
                    self.duplicate(from.0, scratch)?;
                    self.close(from)?;
                    moves[0].0 = Temporary(scratch.number);
                }
            }
        }
        Ok(())
    }

    /// Runs what has been gathered, and compares every answer with what was expected.
    pub fn flush(&mut self) -> Done {
        if self.batch.is_empty() {
            return Ok(());
        }
        let answers = std::mem::replace(&mut self.batch, self.runner.batch()).run()?;
        for Check { call, id, step, expect } in self.checks.drain(..) {
            let value = answers.result(call).map_err(|errno| SessionError::Step { id, step, errno })?;
            match expect {
                Expect::Success => {}
                Expect::Number(expected) => number(id, expected, value)?,
                Expect::Count(count) if value == count => {}
                Expect::Count(_) => return Err(SessionError::Step { id, step, errno: Errno::EAGAIN }),
                Expect::Pair(out, expected) => {
                    for (index, expected) in expected.into_iter().enumerate() {
                        number(id, expected, answers.u32_at(out, 4 * index).into())?;
                    }
                }
                Expect::File { out, size, mode } => {
                    let word = |offset| answers.u64_at(out, offset);
                    let found_size = word(std::mem::offset_of!(libc::stat, st_size));
                    let found_mode = answers.u32_at(out, std::mem::offset_of!(libc::stat, st_mode));
                    compare(size, mode, found_size, found_mode)
                        .map_err(|problem| SessionError::Changed { id, problem })?;
                }
            }
        }
        Ok(())
    }

    /// Ends the session; returns the table as it is now.
    pub fn finish(mut self) -> Done<Numbers> {
        self.flush()?;
        Ok(self.numbers)
    }
}

fn number(id: u32, expected: u32, got: u64) -> Done {
    if got == u64::from(expected) { Ok(()) } else { Err(SessionError::Number { id, expected, got }) }
}

/// Says how a file differs from what was saved.
pub(crate) fn compare(size: Option<u64>, mode: Option<u32>, found_size: u64, found_mode: u32) -> Result<(), String> {
    if mode.is_some_and(|mode| mode & libc::S_IFMT != found_mode & libc::S_IFMT) {
        return Err("it is no longer a file of the same type".into());
    }
    match size {
        Some(size) if size != found_size => Err(format!("it has {found_size} bytes now and had {size} when saved")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_is_given() {
        let mut numbers = Numbers::default();
        for number in (0..64).chain([65]) {
            numbers.take(number);
        }
        assert_eq!(numbers.allocate(), 64);
        assert_eq!(numbers.allocate(), 66);
        numbers.free(3);
        assert_eq!(numbers.allocate(), 3);
    }

    #[test]
    fn a_changed_file_is_described() {
        assert_eq!(compare(Some(3), Some(0o100644), 3, 0o100600), Ok(()));
        assert!(compare(Some(3), None, 4, 0o100600).is_err_and(|text| text.contains("4 bytes")));
        assert!(compare(None, Some(0o100644), 4, 0o040755).is_err_and(|text| text.contains("type")));
    }
}
