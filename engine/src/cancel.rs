//! Giving a dump or restore up before its end: because somebody asks for it, or because its time is over.
//!
//! Asking is a store to an atomic, so a signal handler may do it. The engine looks at every edge of a phase, between the
//! batches of agents and between images; what it then returns is an error like any other, so that all is undone in order.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Why it was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cancelled {
    /// A signal asked for it.
    #[error("it was ended by {}", signal_name(*.signal))]
    Signal {
        /// The signal's number.
        signal: i32,
    },
    /// Whoever it is done for is gone.
    #[error("the process that asked for it is gone")]
    CallerGone,
    /// It took too long.
    #[error("it took longer than the {limit:?} that it was given")]
    TimedOut {
        /// The time that it was given.
        limit: Duration,
    },
}

const NOT: i32 = 0;
const CALLER_GONE: i32 = -1;

/// Tells one operation to stop. Clones tell the same operation.
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    asked: Arc<AtomicI32>,
    /// When its time is over, and how long it was given.
    limit: Arc<Mutex<Option<(Instant, Duration)>>>,
}

impl Cancel {
    /// From now on, its time is over `limit` after `start`.
    pub fn limit(&self, start: Instant, limit: Duration) {
        self.set_limit(start.checked_add(limit).map(|end| (end, limit)));
    }

    /// It has all the time there is.
    pub fn lift_limit(&self) {
        self.set_limit(None);
    }

    fn set_limit(&self, limit: Option<(Instant, Duration)>) {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner) = limit;
    }

    /// Asks, because `signal` came. Async-signal-safe; only the first reason counts.
    pub fn signal(&self, signal: i32) {
        let _ = self.asked.compare_exchange(NOT, signal, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Asks, because the caller is gone. Async-signal-safe; only the first reason counts.
    pub fn caller_gone(&self) {
        self.signal(CALLER_GONE);
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// [`Cancelled`], if not.
    pub fn check(&self) -> Result<(), Cancelled> {
        match self.asked.load(Ordering::Relaxed) {
            NOT => {}
            CALLER_GONE => return Err(Cancelled::CallerGone),
            signal => return Err(Cancelled::Signal { signal }),
        }
        match *self.limit.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((end, limit)) if Instant::now() >= end => Err(Cancelled::TimedOut { limit }),
            _ => Ok(()),
        }
    }
}

fn signal_name(signal: i32) -> String {
    match nix::sys::signal::Signal::try_from(signal) {
        Ok(known) => known.as_str().to_owned(),
        Err(_) => format!("signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let cancel = Cancel::default();
        assert_eq!(cancel.check(), Ok(()));
        cancel.clone().signal(libc::SIGTERM);
        cancel.caller_gone();
        let told = cancel.check().unwrap_err();
        assert_eq!(told.to_string(), "it was ended by SIGTERM");
    }

    #[test]
    fn time_runs_out() {
        let now = Instant::now();
        let cancel = Cancel::default();
        cancel.clone().limit(now, Duration::ZERO);
        assert_eq!(cancel.check(), Err(Cancelled::TimedOut { limit: Duration::ZERO }));
        cancel.clone().limit(now, Duration::from_secs(60));
        assert_eq!(cancel.check(), Ok(()));
        cancel.limit(now, Duration::ZERO);
        cancel.lift_limit();
        assert_eq!(cancel.check(), Ok(()));
    }
}
