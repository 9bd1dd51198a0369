//! What has arrived at a terminal and nobody has read yet.
//!
//! The kernel has no way to look at input without taking it, so a dump takes it and puts it back at once, while the tree is
//! stopped. It is put back where it was: the line discipline's buffer holds 4,095 bytes, into which `TIOCSTI` places them
//! one by one; what lay behind, in the driver's buffer of 8 KiB, is written from the other side. So nothing here waits for
//! anybody.
//!
//! A terminal that gives whole lines (`ICANON`) keeps a mark behind each. Lines are taken one by one, then what is left of an
//! unfinished one with `ICANON` off; they are put back with `ICANON` on and everything else off that would act on them: no
//! echo, no signals, no editing. An end-of-file mark is kept as the `VEOF` character.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::sys::terminal::{self, Termios};

/// What the line discipline holds (drivers/tty/n_tty.c, `N_TTY_BUF_SIZE` less one).
const DISCIPLINE: usize = 4095;
/// More than line discipline and driver hold together.
const MOST: usize = 64 << 10;
const DISABLED: u8 = 0;

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// Whether the slave has been open and is closed everywhere: reading the master ends with `EIO`.
pub fn is_abandoned(master: BorrowedFd<'_>) -> nix::Result<bool> {
    Ok(ready(master)?.contains(PollFlags::HUP))
}

fn ready(fd: BorrowedFd<'_>) -> nix::Result<PollFlags> {
    let mut wanted = [PollFd::from_borrowed_fd(fd, PollFlags::IN | PollFlags::PRI)];
    poll(&mut wanted, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_err(errno)?;
    Ok(wanted[0].revents())
}

/// Opens the slave for ourselves: without waiting, and whether or not it is locked.
pub fn open_slave(master: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let locked = terminal::is_locked(master)?;
    if locked {
        terminal::set_locked(master, false)?;
    }
    let opened = terminal::open_slave(master, libc::O_RDWR | libc::O_NONBLOCK);
    if locked {
        terminal::set_locked(master, true)?;
    }
    opened
}

/// Input of both sides of a pair.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Input {
    pub master: Vec<u8>,
    pub slave: Vec<u8>,
}

/// Looks at the input of both sides; everybody who has the pair open is stopped. On failure all that was taken is back too.
///
/// # Errors
/// The kernel's; `EBUSY` when a master in packet mode has a change of state to tell, which could not be put back.
pub fn look(master: BorrowedFd<'_>) -> nix::Result<Input> {
    let packets = terminal::packet_mode(master)?;
    if packets && ready(master)?.contains(PollFlags::PRI) {
        return Err(Errno::EBUSY);
    }
    let own = open_slave(master)?;
    let slave = own.as_fd();
    let mut input = Input::default();
    // The slave first: what is on its way to it is echoed to the master when it arrives, and reading waits for that.
    let taken =
        take_from_slave(slave, &mut input.slave).and_then(|()| take_from_master(master, packets, &mut input.master));
    let back = put(master, &input);
    taken.and(back).map(|()| input)
}

fn take_from_master(master: BorrowedFd<'_>, packets: bool, taken: &mut Vec<u8>) -> nix::Result<()> {
    // A packet begins with a byte that says what it is: 0, data.
    let head = usize::from(packets);
    while ready(master)?.contains(PollFlags::IN) && taken.len() < MOST {
        let mut bytes = vec![0; terminal::readable(master)? + head];
        if bytes.len() == head {
            break;
        }
        let count = rustix::io::read(master, &mut bytes[..]).map_err(errno)?;
        taken.extend_from_slice(bytes.get(head..count).unwrap_or_default());
    }
    Ok(())
}

fn take_from_slave(slave: BorrowedFd<'_>, taken: &mut Vec<u8>) -> nix::Result<()> {
    let settings = terminal::settings(slave)?;
    if settings.c_lflag & libc::ICANON == 0 {
        return drain(slave, None, taken);
    }
    drain(slave, Some(&settings), taken)?;
    terminal::set_settings(slave, &Termios { c_lflag: settings.c_lflag & !libc::ICANON, ..settings })?;
    let rest = drain(slave, None, taken);
    terminal::set_settings(slave, &settings).and(rest)
}

/// Reads all there is. With settings of a terminal that gives lines, each reading is a line, which without its end ended at
/// an end-of-file mark.
fn drain(slave: BorrowedFd<'_>, lines: Option<&Termios>, taken: &mut Vec<u8>) -> nix::Result<()> {
    let mut bytes = [0; 8192];
    while taken.len() < MOST {
        let read = match rustix::io::read(slave, &mut bytes[..]) {
            Ok(count) => &bytes[..count],
            Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(errno(error)),
        };
        taken.extend_from_slice(read);
        match lines {
            Some(settings) if !read.last().is_some_and(|byte| ends_line(settings, *byte)) => {
                taken.push(settings.c_cc[libc::VEOF]);
            }
            None if read.is_empty() => return Ok(()),
            _ => {}
        }
    }
    Ok(())
}

fn ends_line(settings: &Termios, byte: u8) -> bool {
    let is = |which: usize| settings.c_cc[which] != DISABLED && settings.c_cc[which] == byte;
    byte == b'\n' || is(libc::VEOL) || is(libc::VEOL2)
}

/// Puts input to where it was, in a pair without any; its settings are the final ones.
///
/// # Errors
/// The kernel's.
pub fn put(master: BorrowedFd<'_>, input: &Input) -> nix::Result<()> {
    if input.master.is_empty() && input.slave.is_empty() {
        return Ok(());
    }
    let own = open_slave(master)?;
    let slave = own.as_fd();
    let settings = terminal::settings(slave)?;
    let mut quiet = quiet(&settings);
    if terminal::packet_mode(master)? {
        // A change of these would be told to whoever reads the master.
        quiet.c_iflag |= settings.c_iflag & libc::IXON;
        quiet.c_lflag |= settings.c_lflag & libc::EXTPROC;
        for which in [libc::VSTART, libc::VSTOP] {
            quiet.c_cc[which] = settings.c_cc[which];
        }
    }
    terminal::set_settings(slave, &quiet)?;
    let result = insert(slave, master, &input.slave).and_then(|()| insert(master, slave, &input.master));
    terminal::set_settings(slave, &settings).and(result)
}

/// Settings under which input arrives as it is, with the marks of lines if there are any.
fn quiet(settings: &Termios) -> Termios {
    let mut c_cc = [DISABLED; terminal::CONTROL_CHARACTERS];
    for which in [libc::VEOF, libc::VEOL, libc::VEOL2] {
        c_cc[which] = settings.c_cc[which];
    }
    let c_lflag = settings.c_lflag & libc::ICANON;
    Termios { c_iflag: 0, c_oflag: settings.c_oflag & !libc::OPOST, c_lflag, c_cc, ..*settings }
}

/// Has `bytes` arrive at `to`, whose other side is `from`.
fn insert(to: BorrowedFd<'_>, from: BorrowedFd<'_>, bytes: &[u8]) -> nix::Result<()> {
    let (near, mut far) = bytes.split_at(bytes.len().min(DISCIPLINE));
    for byte in near {
        terminal::insert(to, *byte)?;
    }
    while !far.is_empty() {
        let count = rustix::io::write(from, far).map_err(errno)?;
        far = &far[count..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    fn pair() -> (File, OwnedFd) {
        let master = File::options().read(true).write(true).open("/dev/ptmx").expect("a master");
        let slave = open_slave(master.as_fd()).expect("a slave");
        (master, slave)
    }

    fn lines(slave: &OwnedFd) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        let mut bytes = [0; 8192];
        while let Ok(count) = rustix::io::read(slave, &mut bytes[..]) {
            lines.push(bytes[..count].to_vec());
        }
        lines
    }

    #[test]
    fn lines_stay_lines_and_an_unfinished_one_can_still_be_edited() {
        let (mut master, slave) = pair();
        master.write_all(b"one\ntwo\nend\x04unfin").expect("writes");
        let (before, locked) = (terminal::settings(slave.as_fd()), terminal::is_locked(master.as_fd()));
        let input = look(master.as_fd()).expect("looks");
        assert_eq!(input.slave, b"one\ntwo\nend\x04unfin");
        // The echo of all that.
        assert!(input.master.starts_with(b"one\r\ntwo\r\n"), "{:?}", input.master);
        assert_eq!((terminal::settings(slave.as_fd()), terminal::is_locked(master.as_fd())), (before, locked));
        assert_eq!(look(master.as_fd()), Ok(input.clone()), "a second look sees the same");
        let mut echo = vec![0; input.master.len()];
        master.read_exact(&mut echo).expect("reads");
        assert_eq!(echo, input.master);
        assert_eq!(lines(&slave), [&b"one\n"[..], b"two\n", b"end"]);
        master.write_all(b"x\x7f\x7fished\n").expect("writes");
        assert_eq!(lines(&slave), [b"unfiished\n"]);
    }

    #[test]
    fn more_than_the_line_discipline_holds_keeps_its_order() {
        let (mut master, slave) = pair();
        let mut raw = terminal::settings(slave.as_fd()).expect("settings");
        (raw.c_iflag, raw.c_oflag, raw.c_lflag) = (0, 0, 0);
        terminal::set_settings(slave.as_fd(), &raw).expect("sets");
        let many: Vec<u8> = (0..10_000u32).map(|place| (place % 251) as u8).collect();
        master.write_all(&many).expect("writes");
        rustix::io::write(&slave, &many[..9000]).expect("writes");
        let input = look(master.as_fd()).expect("looks");
        assert_eq!((input.slave.len(), input.master.len()), (10_000, 9000));
        assert_eq!(lines(&slave).concat(), many);
        let mut back = vec![0; 9000];
        master.read_exact(&mut back).expect("reads");
        assert_eq!(back, many[..9000]);
    }

    #[test]
    fn a_master_whose_slave_is_gone_still_gives_what_it_had() {
        let (mut master, slave) = pair();
        assert_eq!(is_abandoned(master.as_fd()), Ok(false));
        rustix::io::write(&slave, b"last words").expect("writes");
        drop(slave);
        assert_eq!(is_abandoned(master.as_fd()), Ok(true));
        assert_eq!(look(master.as_fd()).expect("looks").master, b"last words");
        let mut bytes = [0; 10];
        master.read_exact(&mut bytes).expect("reads");
        assert_eq!(&bytes, b"last words");
        assert_eq!(is_abandoned(master.as_fd()), Ok(true));
    }
}
