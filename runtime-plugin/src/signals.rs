//! Signals by name or number, and sending them (signal(7), kill(2)).

#![allow(unsafe_code, reason = "kill(2) with any number: the typed wrappers know no realtime signals")]

use std::io;
use std::str::FromStr;

use nix::sys::signal::Signal;

/// A signal's number, from 1 to 64, or 0, which only asks whether the process exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalNumber(i32);

impl SignalNumber {
    /// SIGKILL.
    pub const KILL: Self = Self(libc::SIGKILL);

    /// Reads `KILL`, `SIGKILL`, `sigkill` or `9`.
    ///
    /// # Errors
    /// A sentence for people, when there is no such signal.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse::<i32>() {
            return if (0..=64).contains(&number) {
                Ok(Self(number))
            } else {
                Err(format!("there is no signal {number}: numbers go from 0 to 64"))
            };
        }
        let upper = text.to_ascii_uppercase();
        let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
        Signal::from_str(&name)
            .map(|signal| Self(signal as i32))
            .map_err(|_| format!("there is no signal named {text}"))
    }

    /// Sends it to a process.
    ///
    /// # Errors
    /// What kill(2) says; `ESRCH` when the process is gone.
    pub fn send(self, pid: i32) -> io::Result<()> {
        // Zero and negative pids mean groups of processes, which is never what a state file means.
        if pid <= 0 {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // SAFETY: kill(2) takes two integers and touches no memory of this process.
        match unsafe { libc::kill(pid, self.0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sends it to a process that may be gone, which is no error then.
    ///
    /// # Errors
    /// What kill(2) says otherwise.
    pub fn send_if_alive(self, pid: i32) -> io::Result<()> {
        match self.send(pid) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }
}

impl From<Signal> for SignalNumber {
    fn from(signal: Signal) -> Self {
        Self(signal as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for text in ["KILL", "SIGKILL", "kill", "9"] {
            assert_eq!(SignalNumber::parse(text), Ok(SignalNumber::KILL), "{text}");
        }
        assert_eq!(SignalNumber::parse("0"), Ok(SignalNumber(0)));
        assert_eq!(SignalNumber::parse("34"), Ok(SignalNumber(34)));
        assert!(SignalNumber::parse("65").is_err());
        assert!(SignalNumber::parse("SIGNOTHING").is_err());
    }

    #[test]
    fn groups_are_never_meant() {
        assert_eq!(SignalNumber(0).send(-1).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert_eq!(SignalNumber(0).send(0).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
