//! Terminals: pseudoterminals (pty(7)), `/dev/tty`, and those that stay outside.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `job` | which session each process is in, and what terminal controls it |
//! | `collect` | the dump |
//! | `input` | bytes that nobody has read yet, on either side |
//! | `plan` | the restore: which pairs there are, and what becomes of sides that the set lacks |
//! | `restore` | making them |
//!
//! A pair is one object with two sides. A master has one open file description, which cannot be opened a second time; a slave
//! has any number, each opened by its path. Settings, window size, session and foreground group belong to the pair. All
//! pairs are made by the first task, before any other, and handed down: a session leader must find its terminal when it begins its
//! session, since only children that are made afterwards have it as their controlling one too (clone(2)).
//!
//! The index of a pair is the lowest free one of its devpts instance, so a given one is had by opening masters until it comes.

mod collect;
mod input;
mod job;
mod plan;
mod restore;

pub(crate) use collect::{FoundTerminal, Terminals};
pub(crate) use job::Job;
pub(super) use plan::{Circumstances, TerminalPlan};
pub use restore::{Controlled, OpenMaster};

use crate::images::tty::{TermiosEntry, WinsizeEntry};
use crate::sys::terminal::{CONTROL_CHARACTERS, Termios, WindowSize};

/// Major numbers of slaves (Documentation/admin-guide/devices.txt); Linux uses the first for all.
const SLAVE_MAJORS: std::ops::RangeInclusive<u32> = 136..=143;
/// `/dev/tty` and `/dev/ptmx`.
const AUXILIARY_MAJOR: u32 = 5;
const TTY_MINOR: u32 = 0;
const PTMX_MINOR: u32 = 2;

/// What a device number says of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Master,
    Slave,
    /// `/dev/tty`: whatever controlled the opener's session.
    Controlling,
    /// Hardware: a console, a serial line.
    Hardware,
}

impl Side {
    /// The kind of a character device, if it is a terminal.
    pub fn of_device(major: u32, minor: u32) -> Option<Self> {
        Some(match (major, minor) {
            (AUXILIARY_MAJOR, TTY_MINOR) => Self::Controlling,
            (AUXILIARY_MAJOR, PTMX_MINOR) => Self::Master,
            (4 | AUXILIARY_MAJOR | 188 | 204, _) => Self::Hardware,
            (major, _) if SLAVE_MAJORS.contains(&major) => Self::Slave,
            _ => return None,
        })
    }
}

/// How CRIU names a terminal that a restore is given: by device number, and device of the file system.
fn external_key(rdev: u64, dev: u64) -> String {
    format!("tty[{rdev:x}:{dev:x}]")
}

fn dump_settings(settings: &Termios) -> TermiosEntry {
    TermiosEntry {
        c_iflag: settings.c_iflag,
        c_oflag: settings.c_oflag,
        c_cflag: settings.c_cflag,
        c_lflag: settings.c_lflag,
        c_line: settings.c_line.into(),
        c_ispeed: settings.c_ispeed,
        c_ospeed: settings.c_ospeed,
        c_cc: pack(&settings.c_cc),
    }
}

/// Control characters as images have them: four a word, in as many words as there are characters.
fn pack(characters: &[u8; CONTROL_CHARACTERS]) -> Vec<u32> {
    let mut words = vec![0; CONTROL_CHARACTERS];
    for (place, byte) in characters.iter().enumerate() {
        words[place / 4] |= u32::from(*byte) << (place % 4 * 8);
    }
    words
}

fn read_settings(entry: &TermiosEntry) -> Termios {
    let mut c_cc = [0; CONTROL_CHARACTERS];
    for (byte, found) in c_cc.iter_mut().zip(entry.c_cc.iter().flat_map(|word| word.to_le_bytes())) {
        *byte = found;
    }
    Termios {
        c_iflag: entry.c_iflag,
        c_oflag: entry.c_oflag,
        c_cflag: entry.c_cflag,
        c_lflag: entry.c_lflag,
        c_line: entry.c_line as u8,
        c_cc,
        c_ispeed: entry.c_ispeed,
        c_ospeed: entry.c_ospeed,
    }
}

fn dump_size(size: WindowSize) -> WinsizeEntry {
    WinsizeEntry {
        ws_row: size.ws_row.into(),
        ws_col: size.ws_col.into(),
        ws_xpixel: size.ws_xpixel.into(),
        ws_ypixel: size.ws_ypixel.into(),
    }
}

fn read_size(entry: &WinsizeEntry) -> WindowSize {
    WindowSize {
        ws_row: entry.ws_row as u16,
        ws_col: entry.ws_col as u16,
        ws_xpixel: entry.ws_xpixel as u16,
        ws_ypixel: entry.ws_ypixel as u16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_four_a_word() {
        let settings = Termios { c_cc: std::array::from_fn(|place| place as u8 + 1), ..Termios::default() };
        let entry = dump_settings(&settings);
        assert_eq!((entry.c_cc.len(), entry.c_cc[0], entry.c_cc[4], entry.c_cc[5]), (19, 0x0403_0201, 0x0013_1211, 0));
        assert_eq!(read_settings(&entry), settings);
    }
}
