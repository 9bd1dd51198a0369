//! Who is at the other end of a connection: its descriptors, and what it may ask for.
//!
//! The kernel notes pid, user and group of a client when it connects (`SO_PEERCRED`, unix(7)), and holds its process for us
//! (`SO_PEERPIDFD`, Linux 6.5), so that neither its descriptors nor its rights can be those of another process that got its pid.
//!
//! `criu swrk` was started by its client and does what that could do itself. A service acts with its own rights for whoever
//! connects, so it asks: may this client act on that process? Everything may be asked for by the user who started the service;
//! if that is root, by root with the capabilities that a dump takes. Anybody else may have its own processes dumped,
//! when each of the tree has its user and group ids and no capabilities, but restore nothing: images name any file and any user.

use std::fmt::Write as _;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use ferry_engine::procfs;
use ferry_engine::sys::{HostPid, pidfd};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};

use super::connection::Connection;
use crate::failure::Failure;

/// CAP_SYS_PTRACE and CAP_SYS_ADMIN (capabilities(7)): without them no tree of another user can be dumped.
const NEEDED_CAPABILITIES: u64 = 1 << 19 | 1 << 21;

/// A client.
#[derive(Debug)]
pub struct Peer {
    /// Its pid as numbered here.
    pub pid: HostPid,
    uid: u32,
    process: OwnedFd,
    /// Whether it may ask for anything.
    trusted: bool,
    /// Whether it started this process.
    starter: bool,
}

impl Peer {
    /// The client of a connection. A `starter` started this process for its own use.
    ///
    /// # Errors
    /// It is gone, or in a pid namespace that is not seen from here.
    pub fn of(connection: &Connection, starter: bool) -> Result<Self, Failure> {
        let credentials = getsockopt(connection, PeerCredentials)
            .map_err(|errno| Failure::new(format!("cannot tell who the client is: {errno}")))?;
        let pid = HostPid(credentials.pid());
        if pid.0 <= 0 {
            return Err(Failure::new("the client is in a pid namespace that cannot be seen from here"));
        }
        let process = getsockopt(connection, PeerPidfd)
            .or_else(|_| pidfd::open(pid))
            .map_err(|errno| Failure::new(format!("the client, process {pid}, is gone: {errno}")))?;
        let uid = credentials.uid();
        let trusted = starter || has_our_rights(pid, &process, uid);
        Ok(Self { pid, uid, process, trusted, starter })
    }

    /// Whether it started this process, which then can inherit descriptors of it and have it as parent.
    pub fn is_starter(&self) -> bool {
        self.starter
    }

    /// Whether it may ask for anything.
    pub fn is_trusted(&self) -> bool {
        self.trusted
    }

    /// A duplicate of descriptor `number` of the client.
    ///
    /// # Errors
    /// It has none, or may not be looked into.
    pub fn descriptor(&self, what: &str, number: i32) -> Result<OwnedFd, Failure> {
        pidfd::get_fd(self.process.as_fd(), number).map_err(|errno| {
            Failure::new(format!("{what}: descriptor {number} of the client, process {}: {errno}", self.pid))
        })
    }

    /// A path to the folder that is descriptor `number` of the client. It is valid as long as the descriptor that comes with it.
    ///
    /// # Errors
    /// As [`Self::descriptor`]; or it is not the client's folder, so it may not have files made there.
    pub fn folder(&self, what: &str, number: i32) -> Result<(PathBuf, OwnedFd), Failure> {
        let descriptor = self.descriptor(what, number)?;
        let by_descriptor = PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
        let found = fs::metadata(&by_descriptor)
            .map_err(|error| Failure::from(error).context(format!("{what}: descriptor {number} of the client")))?;
        if !found.is_dir() {
            return Err(Failure::new(format!("{what}: descriptor {number} of the client is no folder")));
        }
        if !self.trusted && found.uid() != self.uid {
            let whose = format!("may not have files made in a folder of user {} ({what})", found.uid());
            return Err(self.refused(&whose, "give a folder of its own"));
        }
        // People and scripts want its name. For a client that is not trusted it must be the very folder.
        let named = fs::read_link(&by_descriptor).ok().filter(|path| {
            self.trusted && fs::metadata(path).is_ok_and(|at| (at.dev(), at.ino()) == (found.dev(), found.ino()))
        });
        Ok((named.unwrap_or(by_descriptor), descriptor))
    }

    /// Whether the client may have the tree of `root` dumped, as far as it is visible now.
    ///
    /// # Errors
    /// It may not; why.
    pub fn may_dump(&self, root: HostPid) -> Result<(), Failure> {
        if self.trusted {
            return Ok(());
        }
        let mut tree = vec![root];
        let mut next = 0;
        while let Some(pid) = tree.get(next).copied() {
            next += 1;
            self.owns(pid)?;
            for tid in procfs::threads(pid).unwrap_or_default() {
                tree.extend(procfs::children(pid, tid).unwrap_or_default());
            }
        }
        Ok(())
    }

    /// Whether the client may have anything restored.
    ///
    /// # Errors
    /// It may not.
    pub fn may_restore(&self) -> Result<(), Failure> {
        if self.trusted {
            return Ok(());
        }
        Err(self.refused("may not restore through this service: images name any user and any file", "ask as root"))
    }

    fn owns(&self, pid: HostPid) -> Result<(), Failure> {
        let Some(status) = Status::of(pid) else { return Ok(()) };
        if status.uids.iter().all(|uid| *uid == self.uid) && status.permitted == 0 {
            return Ok(());
        }
        let mut whose = format!("may not act on process {pid}: it has user ids {:?}", status.uids);
        if status.permitted != 0 {
            let _ = write!(whose, " and capabilities {:x}", status.permitted);
        }
        Err(self.refused(&whose, "ask as root, or for processes of that user only"))
    }

    /// That this client is refused something.
    pub fn refused(&self, what: &str, remedy: &str) -> Failure {
        Failure::new(format!("the client, process {} of user {}, {what}; {remedy}", self.pid, self.uid))
            .with_errno(libc::EPERM)
    }
}

/// Whether a client has the rights of the user who started this service.
fn has_our_rights(pid: HostPid, process: &OwnedFd, uid: u32) -> bool {
    let ours = rustix::process::getuid().as_raw();
    let capable = Status::of(pid).is_some_and(|status| status.effective & NEEDED_CAPABILITIES == NEEDED_CAPABILITIES);
    // Its process may have ended, and another have got its pid, before the status was read.
    let there = pidfd::wait_gone(process.as_fd(), Duration::ZERO).is_err();
    there && uid == ours && (ours != 0 || capable)
}

/// The rights of a process (proc_pid_status(5)).
#[derive(Debug, PartialEq, Eq)]
struct Status {
    /// Real, effective, saved, of file systems.
    uids: Vec<u32>,
    permitted: u64,
    effective: u64,
}

impl Status {
    /// None when it is gone.
    fn of(pid: HostPid) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let line = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        let set = |key: &str| u64::from_str_radix(line(key)?.trim(), 16).ok();
        let uids = line("Uid:")?.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        Some(Self { uids, permitted: set("CapPrm:")?, effective: set("CapEff:")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_read() {
        let text = "Name:\tx\nUid:\t1\t2\t3\t4\nCapInh:\t0\nCapPrm:\t00000000000000ff\nCapEff:\t000000000000000f\n";
        assert_eq!(Status::parse(text), Some(Status { uids: vec![1, 2, 3, 4], permitted: 0xff, effective: 0xf }));
        assert_eq!(Status::parse("Name:\tx\n"), None);
    }
}
