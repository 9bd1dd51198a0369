//! Signals that ask a command to end, told to the work that it does: SIGTERM, SIGINT and SIGHUP, as far as the caller has not chosen
//! to ignore them.
//!
//! The handler stores the wish in this process's [`Cancel`], at which the engine looks often; what is half done is then undone in
//! order. Work that does not come to its end, as for a hook that hangs, is not waited for without end: a second signal, or an
//! alarm, ends the process as the kernel does, and whoever watches over it takes away what it has made.
#![allow(unsafe_code, reason = "signal handlers; each use says why it is sound")]

use std::sync::OnceLock;

use ferry_engine::cancel::Cancel;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};

/// What asks a command to end.
const ENDING: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// Seconds that the work may take to give up.
const GRACE: u32 = 10;

/// What the handlers tell. A process that was asked once stays asked.
static CANCEL: OnceLock<Cancel> = OnceLock::new();

/// What this process's signals ask.
pub fn cancel() -> Cancel {
    CANCEL.get_or_init(Cancel::default).clone()
}

/// Those of the signals that the caller has not chosen to ignore.
pub fn not_ignored() -> Vec<Signal> {
    ENDING.into_iter().filter(|signal| !is_ignored(*signal)).collect()
}

fn is_ignored(signal: Signal) -> bool {
    let mut found = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: no action is set, and the one in force is written to memory that is large enough; it is read only then.
    unsafe {
        libc::sigaction(signal as i32, std::ptr::null(), found.as_mut_ptr()) == 0
            && found.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// From now on, until it is dropped, signals ask the work to end instead of ending this process.
#[derive(Debug)]
pub struct Heeded {
    before: Vec<(Signal, SigAction)>,
}

impl Heeded {
    /// Heeds the signals.
    ///
    /// # Errors
    /// Those of sigaction(2).
    pub fn heed() -> nix::Result<Self> {
        cancel();
        // A second one has its usual effect.
        let flags = SaFlags::SA_RESTART | SaFlags::SA_RESETHAND;
        let action = SigAction::new(SigHandler::Handler(asked), flags, SigSet::empty());
        let mut heeded = Self { before: Vec::new() };
        for signal in not_ignored() {
            // SAFETY: the handler does nothing but what a handler may do: an atomic store, and alarm(2) (signal-safety(7)).
            let before = unsafe { sigaction(signal, &action) }?;
            heeded.before.push((signal, before));
        }
        Ok(heeded)
    }

    /// Heeds them no more. One that came when it was too late to give up has its usual effect now.
    pub fn catch_up(self) {
        drop(self);
        if let Err(ferry_engine::cancel::Cancelled::Signal { signal }) = cancel().check()
            && let Ok(signal) = Signal::try_from(signal)
        {
            // Without effect it is as if it had not come.
            let _ = raise(signal);
        }
    }
}

impl Drop for Heeded {
    fn drop(&mut self) {
        for (signal, before) in &self.before {
            // SAFETY: what was in force is in force again.
            let _ = unsafe { sigaction(*signal, before) };
        }
        // SAFETY: takes a number.
        unsafe { libc::alarm(0) };
    }
}

extern "C" fn asked(signal: i32) {
    note(signal);
    // The default action of the alarm is the end of this process, should it not come to one.
    // SAFETY: takes a number.
    unsafe { libc::alarm(GRACE) };
}

/// A handler that does no more than to tell the work. Async-signal-safe once [`cancel`] was called.
pub extern "C" fn note(signal: i32) {
    if let Some(cancel) = CANCEL.get() {
        cancel.signal(signal);
    }
}

/// The same, because the caller is gone.
pub fn note_caller_gone() {
    if let Some(cancel) = CANCEL.get() {
        cancel.caller_gone();
    }
}
