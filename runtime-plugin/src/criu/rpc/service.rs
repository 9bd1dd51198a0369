//! `criu service`: a socket that anybody may connect to, and a process for each client.
//!
//! A client is served by this same program, started again with the connection as its standard input: it begins with
//! nothing of the clients before it. The same way the service goes into the background (`--daemon`), with its socket as standard
//! input. Who may ask for what is decided by [`super::peer`].

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use ferry_engine::sys::descriptor;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::connection::Connection;
use crate::criu::options::Options;
use crate::criu::{install_log, ready};
use crate::failure::{Failure, Outcome};

/// The socket's name when none is given.
const DEFAULT_ADDRESS: &str = "criu_service.socket";

/// Second words of the command, for processes that the service starts; what they need is their standard input.
const IN_BACKGROUND: &str = "in-background";
const FOR_CLIENT: &str = "for-client";

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// Most clients at a time of one user, root aside.
const CLIENTS_PER_USER: usize = 16;

/// Listens, and serves until it is ended by a signal.
pub fn service(options: &Options) -> Outcome {
    match options.rest.first().and_then(|word| word.to_str()) {
        Some(FOR_CLIENT) => return Ok(super::serve(Connection::new(descriptor::take(0)?), false)),
        Some(IN_BACKGROUND) => {
            let listener = descriptor::take(0)?;
            rustix::process::setsid()?;
            install_log(options)?;
            return Err(serve_all(&listener));
        }
        Some(other) => return Err(Failure::new(format!("service takes no second word: {other}"))),
        None => {}
    }
    if let Some(folder) = &options.work_dir {
        std::env::set_current_dir(folder)
            .map_err(|error| Failure::from(error).context(format!("--work-dir {}", folder.display())))?;
    }
    let path = options.address.as_deref().unwrap_or(DEFAULT_ADDRESS);
    let listener =
        listen(Path::new(path)).map_err(|error| Failure::from(error).context(format!("cannot listen at {path}")))?;
    // CRIU's short option for the background is the one of a restore.
    if options.daemon || options.restore_detached {
        let child = into_background(options, listener)?;
        ready(options, child.id())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut here = options.clone();
    (here.work_dir, here.images_dir) = (None, None);
    install_log(&here)?;
    ready(options, std::process::id())?;
    tracing::info!("listening at {path}");
    Err(serve_all(&listener))
}

/// Makes the socket, in place of one that an earlier service left.
fn listen(path: &Path) -> io::Result<OwnedFd> {
    if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Anybody may connect: what a client may ask for is looked at with each request.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// This program again, as `criu service WORD`.
fn again(word: &str, stdin: OwnedFd) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("criu").args(["service", word]).stdin(stdin);
    command
}

fn into_background(options: &Options, listener: OwnedFd) -> Result<Child, Failure> {
    let mut command = again(IN_BACKGROUND, listener);
    command.arg(format!("--verbosity={}", options.log_level())).stdout(Stdio::null()).stderr(Stdio::null());
    if let Some(file) = &options.log_file {
        command.arg("--log-file").arg(file);
    }
    Ok(command.spawn()?)
}

/// How many clients each user has.
type Clients = Arc<Mutex<HashMap<u32, usize>>>;

/// Accepts clients; returns only when that fails.
fn serve_all(listener: &OwnedFd) -> Failure {
    let clients = Clients::default();
    loop {
        match net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(connection) => {
                if let Err(failure) = serve_one(connection, &clients) {
                    tracing::error!("a client is not served: {failure}");
                }
            }
            // The client is gone already, or a signal came.
            Err(rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR) => {}
            Err(errno) => return Failure::from(errno).context("cannot accept clients"),
        }
    }
}

/// Starts a process for a client, and a thread that waits for its end.
fn serve_one(connection: OwnedFd, clients: &Clients) -> Result<(), Failure> {
    let uid = getsockopt(&connection, PeerCredentials)?.uid();
    {
        let mut counts = clients.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(uid).or_default();
        if uid != 0 && *count >= CLIENTS_PER_USER {
            return Err(Failure::new(format!("user {uid} has {CLIENTS_PER_USER} connections already")));
        }
        *count += 1;
    }
    let mut leaving = Leaving { uid, clients: clients.clone(), child: None };
    leaving.child = Some(again(FOR_CLIENT, connection).spawn()?);
    std::thread::Builder::new().name(format!("client of {uid}")).spawn(move || drop(leaving))?;
    Ok(())
}

/// A client that is being served. Dropped, it waits for the end of that, and then counts no more.
struct Leaving {
    uid: u32,
    clients: Clients,
    child: Option<Child>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        match self.child.as_mut().map(Child::wait) {
            Some(Ok(status)) => tracing::info!("a client of user {} is served: {status}", self.uid),
            Some(Err(error)) => tracing::warn!("cannot wait for a client's process: {error}"),
            None => {}
        }
        let mut counts = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.uid);
            }
        }
    }
}
