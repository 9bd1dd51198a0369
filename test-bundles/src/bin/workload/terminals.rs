//! Terminals: pairs, the sessions that they control, and what nobody has read yet.

use crate::room::{Check, Room};
use crate::sys::{Fault, Verdict, c_path, ensure, errno, raw, same, sys, wait_for, zeroed};
use std::path::Path;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

/// Both sides of a new pair; neither controls anybody.
fn pair() -> Result<(i32, i32), Fault> {
    let master = sys!(open(c"/dev/ptmx".as_ptr(), libc::O_RDWR | libc::O_NOCTTY))? as i32;
    sys!(unlockpt(master))?;
    Ok((master, slave_of(master)?))
}

fn slave_of(master: i32) -> Result<i32, Fault> {
    let mut name = [0u8; 64];
    sys!(ptsname_r(master, name.as_mut_ptr().cast(), name.len()))?;
    Ok(sys!(open(name.as_ptr().cast(), libc::O_RDWR | libc::O_NOCTTY))? as i32)
}

fn write(fd: i32, bytes: &[u8]) -> Verdict {
    let count = sys!(write(fd, bytes.as_ptr().cast(), bytes.len()))?;
    same!("bytes written", count, bytes.len() as i64);
    Ok(())
}

/// Reads exactly this.
fn read(what: &str, fd: i32, expected: &[u8]) -> Verdict {
    let mut bytes = vec![0; expected.len()];
    let mut length = 0;
    while length < bytes.len() {
        let rest = &mut bytes[length..];
        match sys!(read(fd, rest.as_mut_ptr().cast(), rest.len()))? {
            0 => break,
            count => length += count as usize,
        }
    }
    same!(what, String::from_utf8_lossy(&bytes[..length]), String::from_utf8_lossy(expected));
    Ok(())
}

fn settings(fd: i32) -> Result<libc::termios, Fault> {
    let mut settings = zeroed::<libc::termios>();
    sys!(tcgetattr(fd, &mut settings))?;
    Ok(settings)
}

/// A pair that passes a line.
pub fn terminal(_: &Room) -> Result<Check, Fault> {
    let (master, slave) = pair()?;
    Ok(Box::new(move || {
        write(master, b"line\n")?;
        read("the line", slave, b"line\n")?;
        read("its echo", master, b"line\r\n")
    }))
}

/// Settings, size, owner; two descriptions of the slave, one that does not wait.
pub fn terminal_settings(_: &Room) -> Result<Check, Fault> {
    let (master, slave) = pair()?;
    let second = slave_of(master)?;
    sys!(fcntl(second, libc::F_SETFL, libc::O_NONBLOCK))?;
    let mut wanted = settings(slave)?;
    // SAFETY: it changes the structure and nothing else.
    unsafe { libc::cfmakeraw(&raw mut wanted) };
    wanted.c_cc[libc::VINTR] = 24;
    sys!(tcsetattr(slave, libc::TCSANOW, &wanted))?;
    let size = libc::winsize { ws_row: 51, ws_col: 132, ws_xpixel: 7, ws_ypixel: 9 };
    sys!(ioctl(master, libc::TIOCSWINSZ, &size))?;
    sys!(fchown(slave, 13_333, 4444))?;
    let index = |fd: i32| -> Result<i32, Fault> {
        let mut index = 0;
        sys!(ioctl(fd, libc::TIOCGPTN, &mut index)).map(|_| index)
    };
    let number = index(master)?;
    Ok(Box::new(move || {
        same!("index", index(master)?, number);
        for fd in [slave, second, master] {
            let found = settings(fd)?;
            let flags = |of: &libc::termios| (of.c_iflag, of.c_oflag, of.c_cflag, of.c_lflag, of.c_cc);
            same!("settings", flags(&found), flags(&wanted));
            let mut found = zeroed::<libc::winsize>();
            sys!(ioctl(fd, libc::TIOCGWINSZ, &mut found))?;
            let all = |of: &libc::winsize| (of.ws_row, of.ws_col, of.ws_xpixel, of.ws_ypixel);
            same!("size", all(&found), all(&size));
        }
        let mut stat = zeroed::<libc::stat>();
        sys!(fstat(slave, &mut stat))?;
        same!("owner", (stat.st_uid, stat.st_gid), (13_333, 4444));
        let mut byte = 0u8;
        let answer = sys!(read(second, (&raw mut byte).cast(), 1));
        ensure!(answer.is_err() && errno() == libc::EAGAIN, "the second slave waits, or has something");
        same!("flags of the first", sys!(fcntl(slave, libc::F_GETFL))? & i64::from(libc::O_NONBLOCK), 0);
        write(master, b"\x03raw\x04")?;
        read("what is written", second, b"\x03raw\x04")
    }))
}

/// Input that nobody has read: lines and half a line one way, output the other.
pub fn terminal_input(_: &Room) -> Result<Check, Fault> {
    let (master, slave) = pair()?;
    let mut quiet = settings(slave)?;
    quiet.c_lflag &= !libc::ECHO;
    sys!(tcsetattr(slave, libc::TCSANOW, &quiet))?;
    write(master, b"one\ntwo\nhal")?;
    write(slave, b"out\n")?;
    Ok(Box::new(move || {
        read("first line", slave, b"one\n")?;
        read("second line", slave, b"two\n")?;
        // What was typed of a line can still be taken back.
        write(master, b"\x7fnd\n")?;
        read("third line", slave, b"hand\n")?;
        read("output", master, b"out\r\n")?;
        write(master, b"one\ntwo\nhal")?;
        write(slave, b"out\n")
    }))
}

/// A page that all processes of a workload count in.
static COUNTS: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());
/// Where this process counts its interrupts.
static OWN: AtomicUsize = AtomicUsize::new(0);
const LEADER: usize = 1;
const JOB: usize = 2;

fn count(which: usize) -> u32 {
    // SAFETY: the page is mapped before any handler is set, for as long as the workload runs, and holds 1,024 counts.
    unsafe { &*COUNTS.load(Ordering::SeqCst).add(which) }.load(Ordering::SeqCst)
}

extern "C" fn interrupted(_: i32) {
    // SAFETY: as for `count`.
    unsafe { &*COUNTS.load(Ordering::SeqCst).add(OWN.load(Ordering::SeqCst)) }.fetch_add(1, Ordering::SeqCst);
}

/// Counts interrupts under `which` from now on.
fn count_interrupts(which: usize) {
    OWN.store(which, Ordering::SeqCst);
    // SAFETY: the handler only adds to a number in a page that stays mapped.
    unsafe { libc::signal(libc::SIGINT, interrupted as *const () as usize) };
}

/// Begins a session that the slave controls.
fn lead(slave: i32) -> Verdict {
    sys!(setsid())?;
    sys!(ioctl(slave, libc::TIOCSCTTY, 0)).map(drop)
}

/// A session whose leader has a controlling terminal, with a job in the foreground: ^C reaches the job and nobody else.
pub fn terminal_session(room: &Room) -> Result<Check, Fault> {
    let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let page = raw!(SYS_mmap, 0, 4096, libc::PROT_READ | libc::PROT_WRITE, shared, -1, 0)?;
    COUNTS.store(page as *mut AtomicU32, Ordering::SeqCst);
    let (master, slave) = pair()?;
    let mut quiet = settings(slave)?;
    quiet.c_lflag &= !libc::ECHO;
    sys!(tcsetattr(slave, libc::TCSANOW, &quiet))?;
    let leader = room.child("leader", |room| {
        sys!(close(master))?;
        lead(slave)?;
        count_interrupts(LEADER);
        let job = room.child("job", |_| {
            count_interrupts(JOB);
            sys!(setpgid(0, 0))?;
            // Only who is in the foreground may say who is, or who does not mind being told off.
            // SAFETY: ignoring a signal runs no code.
            unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
            let own = sys!(getpid())? as i32;
            sys!(tcsetpgrp(slave, own))?;
            Ok(Box::new(move || {
                let terminal = sys!(open(c"/dev/tty".as_ptr(), libc::O_RDWR))? as i32;
                same!("foreground group", sys!(tcgetpgrp(terminal))?, sys!(getpid())?);
                sys!(close(terminal)).map(drop)
            }))
        })?;
        Ok(Box::new(move || {
            same!("session", sys!(tcgetsid(slave))?, sys!(getpid())?);
            job.ask()
        }))
    })?;
    Ok(Box::new(move || {
        leader.ask()?;
        same!("session, seen by the master", sys!(tcgetsid(master))?, i64::from(leader.pid));
        let before = count(JOB);
        write(master, b"\x03")?;
        wait_for("the job to be interrupted", || count(JOB) != before)?;
        same!("interrupts", (count(JOB), count(LEADER)), (before + 1, 0));
        Ok(())
    }))
}

/// A session whose only descriptor of its terminal was opened as /dev/tty, and is shared with a child.
pub fn terminal_controlling(room: &Room) -> Result<Check, Fault> {
    let (master, slave) = pair()?;
    let says = |who: &'static str, terminal: i32| -> Check {
        Box::new(move || {
            let link = std::fs::read_link(format!("/proc/self/fd/{terminal}")).map_err(|error| error.to_string())?;
            same!("name", link, Path::new("/dev/tty"));
            write(terminal, who.as_bytes())
        })
    };
    let leader = room.child("leader", |room| {
        sys!(close(master))?;
        lead(slave)?;
        let terminal = sys!(open(c"/dev/tty".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC))? as i32;
        sys!(close(slave))?;
        let child = room.child("child", |_| Ok(says("child\n", terminal)))?;
        let mut own = says("leader\n", terminal);
        Ok(Box::new(move || {
            child.ask()?;
            own()
        }))
    })?;
    sys!(close(slave))?;
    // Each process has looked once while it was set up, the child twice.
    read("first words", master, b"child\r\nchild\r\nleader\r\n")?;
    Ok(Box::new(move || {
        leader.ask()?;
        read("words", master, b"child\r\nleader\r\n")
    }))
}

/// Slaves whose master was closed, and a master whose slave was.
pub fn terminal_hung_up(_: &Room) -> Result<Check, Fault> {
    let (gone, first) = pair()?;
    let second = slave_of(gone)?;
    sys!(close(gone))?;
    let (master, slave) = pair()?;
    let say_and_go = move |slave: i32| -> Verdict {
        write(slave, b"last words")?;
        sys!(close(slave)).map(drop)
    };
    say_and_go(slave)?;
    Ok(Box::new(move || {
        for fd in [first, second] {
            let mut byte = 0u8;
            same!("read from a slave that was hung up", sys!(read(fd, (&raw mut byte).cast(), 1))?, 0);
            ensure!(settings(fd).is_err() && errno() == libc::EIO, "it still has settings");
        }
        read("what was left", master, b"last words")?;
        let mut byte = 0u8;
        let answer = sys!(read(master, (&raw mut byte).cast(), 1));
        ensure!(answer.is_err() && errno() == libc::EIO, "the master does not know that the slave was closed");
        say_and_go(slave_of(master)?)
    }))
}

/// Packet mode, exclusive use, and a slave that nobody has opened.
pub fn terminal_modes(_: &Room) -> Result<Check, Fault> {
    let (master, slave) = pair()?;
    sys!(ioctl(master, libc::TIOCPKT, &1i32))?;
    sys!(ioctl(slave, libc::TIOCEXCL))?;
    let locked = sys!(open(c"/dev/ptmx".as_ptr(), libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK))? as i32;
    write(slave, b"waits")?;
    Ok(Box::new(move || {
        read("a packet", master, b"\0waits")?;
        write(slave, b"waits")?;
        let mut exclusive = 0i32;
        sys!(ioctl(slave, 0x8004_5440, &mut exclusive))?;
        same!("exclusive", exclusive, 1);
        let mut byte = 0u8;
        let answer = sys!(read(locked, (&raw mut byte).cast(), 1));
        ensure!(answer.is_err() && errno() == libc::EAGAIN, "a slave that was never open counts as closed");
        let mut name = [0u8; 64];
        sys!(ptsname_r(locked, name.as_mut_ptr().cast(), name.len()))?;
        let answer = sys!(open(name.as_ptr().cast(), libc::O_RDWR | libc::O_NOCTTY));
        ensure!(answer.is_err() && errno() == libc::EIO, "it is not locked any more");
        Ok(())
    }))
}

/// A slave whose master is held by a process that is no part of the tree.
pub fn terminal_outside(room: &Room) -> Result<Check, Fault> {
    let (master, slave) = pair()?;
    let stop = room.path("stop");
    std::fs::write(&stop, "").map_err(|error| error.to_string())?;
    let between = crate::room::fork(|| {
        let left = crate::room::fork(|| {
            let _ = sys!(setsid());
            // Until the test removes its folder.
            while sys!(access(c_path(&stop).as_ptr(), libc::F_OK)).is_ok() {
                crate::sys::pause();
            }
            0
        });
        i32::from(left.is_err())
    })?;
    sys!(waitpid(between, std::ptr::null_mut(), 0))?;
    sys!(close(master))?;
    Ok(Box::new(move || settings(slave).map(drop)))
}
