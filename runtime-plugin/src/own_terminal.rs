//! The terminal that ferry was started in, for trees that share one with a shell.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};

/// A duplicate of standard input, if that is `wanted` and a terminal.
///
/// # Errors
/// The kernel's, of duplicating it.
pub fn own_terminal(wanted: bool) -> io::Result<Option<OwnedFd>> {
    let stdin = io::stdin();
    if wanted && stdin.is_terminal() { stdin.as_fd().try_clone_to_owned().map(Some) } else { Ok(None) }
}
