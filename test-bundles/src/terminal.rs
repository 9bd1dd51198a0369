//! The other side of a terminal: what a test types, and what it sees.

use crate::Outcome;
use crate::processes::wait_for;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What is typed into, and read from.
pub struct Terminal {
    keyboard: File,
    screen: File,
    seen: String,
    /// The program between, if there is one.
    between: Option<Child>,
}

impl Terminal {
    /// The terminal with this master side.
    pub fn of(master: OwnedFd) -> Outcome<Self> {
        let screen = File::from(master);
        let keyboard = screen.try_clone().map_err(|error| format!("the master cannot be duplicated: {error}"))?;
        Ok(Self { keyboard, screen, seen: String::new(), between: None })
    }

    /// A new terminal of the host with a shell that it controls (script(1) makes it).
    pub fn with_shell() -> Outcome<Self> {
        let mut command = Command::new("script");
        command.args(["-q", "-f", "-c", "exec /bin/sh -i", "/dev/null"]).env("PS1", "$ ").env("SHELL", "/bin/sh");
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut child = child.map_err(|error| format!("script: {error}"))?;
        let ends = (child.stdin.take(), child.stdout.take());
        let (Some(keyboard), Some(screen)) = ends else { return Err("script has no input or output".to_owned()) };
        let (keyboard, screen) = (OwnedFd::from(keyboard).into(), OwnedFd::from(screen).into());
        Ok(Self { keyboard, screen, seen: String::new(), between: Some(child) })
    }

    /// Types this.
    pub fn enter(&mut self, text: &str) -> Outcome {
        self.keyboard.write_all(text.as_bytes()).map_err(|error| format!("typing {text:?}: {error}"))
    }

    /// Waits until this has been printed; what is looked for next comes after it.
    pub fn expect(&mut self, text: &str) -> Outcome {
        let mut gone = None;
        let appeared = wait_for(&format!("{text:?} on the terminal"), || {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return true;
            }
            if let Err(error) = self.look() {
                gone = Some(error);
            }
            gone.is_some()
        });
        let seen = || format!("seen: {:?}", self.seen);
        appeared.map_err(|error| format!("{error}; {}", seen()))?;
        gone.map_or(Ok(()), |error| Err(format!("waiting for {text:?}: {error}; {}", seen())))
    }

    fn look(&mut self) -> Outcome {
        let mut wanted = [PollFd::new(&self.screen, PollFlags::IN)];
        let soon = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        if poll(&mut wanted, Some(&soon)).unwrap_or(0) == 0 {
            return Ok(());
        }
        let mut bytes = [0; 4096];
        match self.screen.read(&mut bytes) {
            Ok(0) => Err("the terminal was closed".to_owned()),
            Ok(count) => {
                self.seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
                Ok(())
            }
            Err(error) => Err(format!("the terminal cannot be read: {error}")),
        }
    }

    /// The size in rows and columns.
    pub fn size(&self) -> Outcome<(u16, u16)> {
        let size = rustix::termios::tcgetwinsize(&self.screen).map_err(|error| format!("its size: {error}"))?;
        Ok((size.ws_row, size.ws_col))
    }

    /// Sets the size in rows and columns.
    pub fn set_size(&self, (rows, columns): (u16, u16)) -> Outcome {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&self.screen, size).map_err(|error| format!("its size: {error}"))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(mut child) = self.between.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The socket that an OCI runtime sends a container's terminal to.
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens at this path.
    pub fn new(path: PathBuf) -> Outcome<Self> {
        let listener = UnixListener::bind(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { listener, path })
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the terminal that was sent.
    pub fn take(&self) -> Outcome<Terminal> {
        let failed = |what: &'static str| move |error: std::io::Error| format!("the console socket: {what}: {error}");
        self.listener.set_nonblocking(true).map_err(failed("wait"))?;
        let mut stream = None;
        wait_for("a connection to the console socket", || {
            stream = self.listener.accept().ok();
            stream.is_some()
        })?;
        let (stream, _) = stream.ok_or("nobody connected")?;
        stream.set_nonblocking(false).map_err(failed("wait"))?;
        let mut name = [0; 256];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        recvmsg(&stream, &mut [IoSliceMut::new(&mut name)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
            .map_err(|error| format!("the console socket: {error}"))?;
        let master = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        Terminal::of(master.ok_or("no terminal was sent")?)
    }
}
