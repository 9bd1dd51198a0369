//! `criu lazy-pages`, and what `--lazy-pages` means for dumps, restores and the page server.
//!
//! The daemon is two processes. One, whose pid the caller knows, brings pages; the other holds the descriptors too and does nothing
//! ([`Watch`]). If the first ends before all pages are there, whatever the reason, the second ends the processes that were restored: their
//! memory cannot be had any more, and without the second they would go on with zeros in its place.
#![allow(unsafe_code, reason = "fork(2); it says why it is sound")]

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;

use ferry_engine::cancel::Cancel;
use ferry_engine::images::ImageSet;
use ferry_engine::images::folder::FolderSource;
use ferry_engine::lazy::fetch::PageServer;
use ferry_engine::lazy::handshake::{Daemon, SOCKET, listen};
use ferry_engine::lazy::offer::{ImagePages, PageOffer};
use ferry_engine::lazy::serve::serve;
use ferry_engine::lazy::source::TreePages;
use nix::unistd::{ForkResult, Pid, fork, setsid};

use super::options::Options;
use super::remote::socket;
use super::{images_dir, tell_ready, work_dir};
use crate::failure::{Failure, Outcome};
use crate::lazy_watch::Watch;
use crate::pid_file::PidFile;

/// Runs `criu lazy-pages`: serves one restore.
pub fn run(options: &Options) -> Outcome {
    let folder = work_dir(options);
    let listener = listen(&folder).map_err(|error| {
        Failure::from(error).context(format!("cannot make the socket {}", folder.join(SOCKET).display()))
    })?;
    if options.daemon && is_left_behind(options)? {
        return Ok(ExitCode::SUCCESS);
    }
    let mut watch = Watch::begin().map_err(|error| {
        Failure::from(error).context("cannot start the process that watches over the one that brings pages")
    })?;
    if let Some(number) = options.status_fd {
        tell_ready(number)?;
    }
    tracing::info!("waiting for a restore at {}", folder.join(SOCKET).display());
    let (restore, _) =
        listener.accept().map_err(|error| Failure::from(error).context("no restore can be waited for"))?;
    drop(listener);
    let server = options.page_server.then(|| connect(options)).transpose()?;
    let images = ImageSet::open(Box::new(FolderSource::open(images_dir(options))?))?;
    let mut pages = TreePages::read(&images, server)?;
    let served = serve(&restore, &mut pages, &mut watch, &Cancel::default())?;
    watch.dismiss();
    // Every process has its memory: what is left to do is no reason to fail.
    if let Err(error) = pages.finish() {
        return Err(Failure::from(error).context("the tree has all its pages, but its page server does not know it"));
    }
    tracing::info!(
        "all pages are there: {} bytes for {} address spaces, {} times because somebody waited",
        served.bytes,
        served.spaces,
        served.faults
    );
    Ok(ExitCode::SUCCESS)
}

/// Runs `criu page-server --lazy-pages`: what lazy-pages --page-server fetches is in images.
pub fn serve_images(options: &Options) -> Outcome {
    let images = ImageSet::open(Box::new(FolderSource::open(images_dir(options))?))?;
    let pages = ImagePages::read(&images)?;
    let offer = offer(options)?;
    if options.daemon && is_left_behind(options)? {
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(number) = options.status_fd {
        tell_ready(number)?;
    }
    offer.serve(&pages, &Cancel::default())?;
    Ok(ExitCode::SUCCESS)
}

/// Where the pages of a dump are fetched.
pub fn offer(options: &Options) -> Result<PageOffer, Failure> {
    if let Some(number) = options.ps_socket {
        return Ok(PageOffer::Connection(connected(number)?));
    }
    let address = options.address.as_deref().unwrap_or("0.0.0.0");
    let port = options.port.unwrap_or(0);
    let listener = TcpListener::bind((address, port))
        .map_err(|error| Failure::from(error).context(format!("cannot serve pages at {address}, port {port}")))?;
    if let Ok(place) = listener.local_addr() {
        tracing::info!("pages can be fetched at {place}");
    }
    Ok(PageOffer::Listener(listener))
}

/// The daemon that brings pages to the tree of a restore.
pub fn daemon(options: &Options) -> Result<Daemon, Failure> {
    let folder = work_dir(options);
    Daemon::connect(&folder).map_err(|error| {
        Failure::from(error).context(format!(
            "--lazy-pages: nobody answers at {}: start lazy-pages for the same images first",
            folder.join(SOCKET).display()
        ))
    })
}

fn connect(options: &Options) -> Result<PageServer, Failure> {
    let stream = match (options.ps_socket, options.port) {
        (Some(number), _) => connected(number)?,
        (None, Some(port)) => {
            let address = options.address.as_deref().unwrap_or("127.0.0.1");
            TcpStream::connect((address, port)).map_err(|error| {
                Failure::from(error).context(format!("no page server can be reached at {address}, port {port}"))
            })?
        }
        (None, None) => return Err(Failure::new("--page-server needs --port, and --address if it is not this host")),
    };
    Ok(PageServer::new(stream)?)
}

fn connected(number: i32) -> Result<TcpStream, Failure> {
    socket(number).map(TcpStream::from)
}

/// Goes on in the background; whether this is the process that the caller waits for.
fn is_left_behind(options: &Options) -> Result<bool, Failure> {
    let failed = |error: io::Error| Failure::from(error).context("cannot run in the background");
    // SAFETY: this command has one thread, so the child may do whatever this process may.
    match unsafe { fork() }.map_err(|errno| failed(errno.into()))? {
        ForkResult::Parent { child } => {
            note_pid(options, child).inspect_err(|_| {
                let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
                let _ = nix::sys::wait::waitpid(child, None);
            })?;
            Ok(true)
        }
        ForkResult::Child => {
            setsid().map_err(|errno| failed(errno.into()))?;
            let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
            nix::unistd::dup2_stdin(null.as_fd()).map_err(|errno| failed(errno.into()))?;
            nix::unistd::dup2_stdout(null.as_fd()).map_err(|errno| failed(errno.into()))?;
            nix::unistd::dup2_stderr(null.as_fd()).map_err(|errno| failed(errno.into()))?;
            debug_assert!(null.as_raw_fd() > 2);
            Ok(false)
        }
    }
}

fn note_pid(options: &Options, child: Pid) -> Result<(), Failure> {
    let Some(path) = &options.pidfile else { return Ok(()) };
    PidFile::write(path, child.as_raw(), None).map(PidFile::keep)
}
