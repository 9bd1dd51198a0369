//! Terminals: ioctl_tty(2), and what `rustix` lacks of it.
//!
//! Asked of the master side of a pseudoterminal, settings, window size, session and foreground group are those of its
//! slave side (drivers/tty/tty_io.c, `tty_pair_get_tty`); packet mode, lock, exclusive use and input are its own.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::check;

/// Makes a terminal the controlling one of the session that the caller leads.
pub const TIOCSCTTY: u64 = 0x540e;
/// Sets the foreground process group of the caller's session.
pub const TIOCSPGRP: u64 = 0x5410;
/// The index of a master's slave.
pub const TIOCGPTN: u64 = 0x8004_5430;
const TIOCGPGRP: u64 = 0x540f;
const TIOCGSID: u64 = 0x5429;
const TIOCEXCL: u64 = 0x540c;
const TIOCSTI: u64 = 0x5412;
const TIOCGWINSZ: u64 = 0x5413;
const TIOCSWINSZ: u64 = 0x5414;
const FIONREAD: u64 = 0x541b;
const TIOCPKT: u64 = 0x5420;
const TIOCGLCKTRMIOS: u64 = 0x5456;
const TIOCSLCKTRMIOS: u64 = 0x5457;
const TCGETS2: u64 = 0x802c_542a;
const TCSETS2: u64 = 0x402c_542b;
const TCSETS: u64 = 0x5402;
const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCGDEV: u64 = 0x8004_5432;
const TIOCGPKT: u64 = 0x8004_5438;
const TIOCGPTLCK: u64 = 0x8004_5439;
const TIOCGEXCL: u64 = 0x8004_5440;
/// Opens the slave of a master.
pub const TIOCGPTPEER: u64 = 0x5441;

/// How many control characters the kernel has (`NCCS` of asm-generic/termbits.h).
pub const CONTROL_CHARACTERS: usize = 19;

/// `struct termios2`, whose beginning is `struct termios` (asm-generic/termbits.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of termios(3)")]
pub struct Termios {
    pub c_iflag: u32,
    pub c_oflag: u32,
    pub c_cflag: u32,
    pub c_lflag: u32,
    pub c_line: u8,
    pub c_cc: [u8; CONTROL_CHARACTERS],
    /// Bits a second; 0 where only `c_cflag` tells.
    pub c_ispeed: u32,
    pub c_ospeed: u32,
}

const _: () = assert!(size_of::<Termios>() == 44);

/// `struct winsize`: rows, columns, and the size in pixels.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of ioctl_tty(2)")]
pub struct WindowSize {
    pub ws_row: u16,
    pub ws_col: u16,
    pub ws_xpixel: u16,
    pub ws_ypixel: u16,
}

/// An ioctl whose argument points to a `T`, which the kernel reads or writes.
fn with<T>(fd: BorrowedFd<'_>, request: u64, argument: &mut T) -> nix::Result<()> {
    // SAFETY: every caller in this file passes a `T` that is as large as what the request reads or writes.
    check(i64::from(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) })).map(drop)
}

fn number(fd: BorrowedFd<'_>, request: u64) -> nix::Result<i32> {
    let mut value = 0i32;
    with(fd, request, &mut value).map(|()| value)
}

/// The settings.
///
/// # Errors
/// `EIO` when the terminal was hung up; `ENOTTY` when it is none.
pub fn settings(fd: BorrowedFd<'_>) -> nix::Result<Termios> {
    let mut settings = Termios::default();
    with(fd, TCGETS2, &mut settings).map(|()| settings)
}

/// Sets the settings at once; nothing is flushed.
pub fn set_settings(fd: BorrowedFd<'_>, settings: &Termios) -> nix::Result<()> {
    let request = if settings.c_ispeed == 0 && settings.c_ospeed == 0 { TCSETS } else { TCSETS2 };
    with(fd, request, &mut settings.clone())
}

/// Which settings are locked: the bits that are set.
pub fn locked_settings(fd: BorrowedFd<'_>) -> nix::Result<Termios> {
    let mut settings = Termios::default();
    with(fd, TIOCGLCKTRMIOS, &mut settings).map(|()| settings)
}

/// Locks settings (`CAP_SYS_ADMIN`).
pub fn lock_settings(fd: BorrowedFd<'_>, locked: &Termios) -> nix::Result<()> {
    with(fd, TIOCSLCKTRMIOS, &mut locked.clone())
}

/// The window size.
pub fn window_size(fd: BorrowedFd<'_>) -> nix::Result<WindowSize> {
    let mut size = WindowSize::default();
    with(fd, TIOCGWINSZ, &mut size).map(|()| size)
}

/// Sets the window size; the foreground group is signalled if it changes.
pub fn set_window_size(fd: BorrowedFd<'_>, size: WindowSize) -> nix::Result<()> {
    with(fd, TIOCSWINSZ, &mut size.clone())
}

/// The number in `/dev/pts` of a master's slave.
pub fn index(master: BorrowedFd<'_>) -> nix::Result<u32> {
    number(master, TIOCGPTN).map(|index| index as u32)
}

/// The device that a terminal is at last, as `(major, minor)`, whatever it was opened by (`/dev/tty`, `/dev/console`).
pub fn device(fd: BorrowedFd<'_>) -> nix::Result<(u32, u32)> {
    let device = u64::from(number(fd, TIOCGDEV)? as u32);
    Ok((libc::major(device), libc::minor(device)))
}

/// The session that a terminal controls, as ferry numbers it; 0 if there is none. A slave tells it only to that session.
pub fn session(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    match number(fd, TIOCGSID) {
        Err(Errno::ENOTTY) => Ok(0),
        answer => answer,
    }
}

/// The foreground process group, likewise.
pub fn foreground(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    match number(fd, TIOCGPGRP) {
        Err(Errno::ENOTTY) => Ok(0),
        answer => answer,
    }
}

/// Whether a master's slave cannot be opened yet (unlockpt(3)).
pub fn is_locked(master: BorrowedFd<'_>) -> nix::Result<bool> {
    number(master, TIOCGPTLCK).map(|locked| locked != 0)
}

/// Lets a master's slave be opened, or not.
pub fn set_locked(master: BorrowedFd<'_>, locked: bool) -> nix::Result<()> {
    with(master, TIOCSPTLCK, &mut i32::from(locked))
}

/// Whether a master is read in packet mode.
pub fn packet_mode(master: BorrowedFd<'_>) -> nix::Result<bool> {
    number(master, TIOCGPKT).map(|on| on != 0)
}

/// Has a master read in packet mode.
pub fn set_packet_mode(master: BorrowedFd<'_>) -> nix::Result<()> {
    with(master, TIOCPKT, &mut 1i32)
}

/// Whether nobody without `CAP_SYS_ADMIN` may open it (`TIOCEXCL`; asked for since Linux 3.8).
pub fn is_exclusive(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    number(fd, TIOCGEXCL).map(|exclusive| exclusive != 0)
}

/// Keeps others from opening it.
pub fn set_exclusive(fd: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: takes no argument.
    check(i64::from(unsafe { libc::ioctl(fd.as_raw_fd(), TIOCEXCL as _) })).map(drop)
}

/// Opens a master's slave, wherever its devpts is mounted (Linux 4.13).
pub fn open_slave(master: BorrowedFd<'_>, flags: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes a number; the result is a new descriptor that nobody else owns.
    unsafe {
        let opened = libc::ioctl(master.as_raw_fd(), TIOCGPTPEER as _, flags | libc::O_NOCTTY | libc::O_CLOEXEC);
        Ok(OwnedFd::from_raw_fd(check(i64::from(opened))? as i32))
    }
}

/// How many bytes can be read: of a terminal that gives whole lines, those of whole lines.
pub fn readable(fd: BorrowedFd<'_>) -> nix::Result<usize> {
    number(fd, FIONREAD).map(|count| count as usize)
}

/// Puts a byte into the input of a terminal as if it had arrived there (`CAP_SYS_ADMIN`).
pub fn insert(fd: BorrowedFd<'_>, byte: u8) -> nix::Result<()> {
    with(fd, TIOCSTI, &mut byte.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn both_sides_tell_the_settings_of_the_slave() {
        let master = std::fs::File::options().read(true).write(true).open("/dev/ptmx").expect("a master");
        assert_eq!(is_locked(master.as_fd()), Ok(true));
        set_locked(master.as_fd(), false).expect("unlocks");
        let slave = open_slave(master.as_fd(), libc::O_RDWR).expect("a slave");
        let mut wanted = settings(slave.as_fd()).expect("settings");
        wanted.c_lflag ^= libc::ECHO;
        wanted.c_cc[libc::VEOF] = 7;
        set_settings(master.as_fd(), &wanted).expect("sets");
        assert_eq!(settings(slave.as_fd()), Ok(wanted));
        let size = WindowSize { ws_row: 11, ws_col: 22, ws_xpixel: 33, ws_ypixel: 44 };
        set_window_size(slave.as_fd(), size).expect("sets");
        assert_eq!(window_size(master.as_fd()), Ok(size));
        assert_eq!(device(slave.as_fd()), Ok((136, index(master.as_fd()).expect("an index"))));
        assert_eq!((session(master.as_fd()), foreground(master.as_fd())), (Ok(0), Ok(0)));
        drop(master);
        assert_eq!(settings(slave.as_fd()), Err(Errno::EIO));
    }
}
