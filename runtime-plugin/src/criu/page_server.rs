//! `criu page-server`: takes the pages of one dump into a folder, and ends.
//!
//! In the background it is this same program, started again with everything that it needs as its standard descriptors: the socket
//! as input, the folder as output, its log as errors. So it has no name to look up and nothing of whoever started it. Like a dump it is two
//! processes ([`crate::guard`]): whichever is killed, nothing is left that is not complete.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use ferry_engine::images::{FolderSource, ImageSet, Source, parent};
use ferry_engine::remote::connection::{Connection, Listener};
use ferry_engine::remote::server::receive;
use ferry_engine::remote::store::PageStore;
use ferry_engine::sys::descriptor;

use super::options::Options;
use super::{begin, images_dir, install_log, log_path, ready, remote};
use crate::failure::{Failure, Outcome};
use crate::guard::{self, Worker};
use crate::previous;

/// The second word of the command for the process in the background.
const IN_BACKGROUND: &str = "in-background";

/// How the dump comes.
#[derive(Debug)]
pub enum Door {
    /// It connects.
    Listens(Listener),
    /// It is connected.
    Connected(OwnedFd),
}

impl Door {
    /// What options ask for.
    ///
    /// # Errors
    /// The address cannot be listened at.
    pub fn open(options: &Options) -> Result<Self, Failure> {
        if let Some(number) = options.ps_socket {
            return remote::socket(number).map(Self::Connected);
        }
        let (address, port) = (options.address.as_deref(), options.port.unwrap_or(0));
        Listener::open(address, port).map(Self::Listens).map_err(|error| {
            let place = address.unwrap_or("any address");
            Failure::from(error).context(format!("the page server cannot listen at {place}, port {port}"))
        })
    }

    /// The port, 0 if there is none.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn port(&self) -> Result<u16, Failure> {
        match self {
            Self::Listens(listener) => Ok(listener.address()?.port()),
            Self::Connected(_) => Ok(0),
        }
    }
}

/// Runs the command.
pub fn run(options: &Options) -> Outcome {
    match options.rest.first().and_then(|word| word.to_str()) {
        Some(IN_BACKGROUND) => return continue_in_background(options),
        Some(word) => return Err(Failure::new(format!("page-server takes no second word: {word}"))),
        None => {}
    }
    let options = begin(options)?;
    let folder = open_folder(&options)?;
    let link = link(&options)?;
    let door = Door::open(&options)?;
    if let (Door::Listens(listener), None | Some(0)) = (&door, options.port) {
        tell_address(&listener.address()?.to_string())?;
    }
    // CRIU's short option for the background is the one of a restore.
    if options.daemon || options.restore_detached {
        let log = log_path(&options).map(|path| File::options().append(true).open(path)).transpose()?;
        let child = into_background(&options, door, &folder, link.as_deref(), log)?;
        ready(&options, child.id())?;
        return Ok(ExitCode::SUCCESS);
    }
    ready(&options, std::process::id())?;
    guard::run(|worker| serve(door, &folder, link, worker))
}

/// Starts the server as a child of this process; what it is given is closed here.
///
/// # Errors
/// It cannot be started.
pub fn into_background(
    options: &Options,
    door: Door,
    folder: &OwnedFd,
    link: Option<&Path>,
    log: Option<File>,
) -> Result<Child, Failure> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("criu").args(["page-server", IN_BACKGROUND, "--no-default-config"]);
    command.arg(format!("--verbosity={}", options.log_level()));
    if let Some(link) = link {
        command.arg("--prev-images-dir").arg(link);
    }
    match door {
        Door::Listens(listener) => command.stdin(OwnedFd::from(listener)),
        Door::Connected(socket) => command.arg("--ps-socket=0").stdin(socket),
    };
    command.stdout(folder.try_clone()?).stderr(log.map_or_else(Stdio::null, Stdio::from));
    command.spawn().map_err(|error| Failure::from(error).context("cannot start the page server"))
}

fn continue_in_background(options: &Options) -> Outcome {
    let (socket, folder) = (descriptor::take(0)?, descriptor::take(1)?);
    rustix::process::setsid()?;
    install_log(options)?;
    let door = if options.ps_socket.is_some() { Door::Connected(socket) } else { Door::Listens(socket.into()) };
    guard::run(|worker| serve(door, &folder, options.prev_images_dir.clone(), worker))
}

/// Takes what one dump sends.
fn serve(door: Door, folder: &OwnedFd, link: Option<PathBuf>, worker: &Worker) -> Outcome {
    let cancel = worker.cancel.clone();
    let mut connection = match door {
        Door::Connected(socket) => Connection::from_dump(socket, "the other end of --ps-socket".to_owned(), cancel),
        Door::Listens(listener) => listener
            .accept(cancel)
            .map_err(|error| Failure::from(error).context("no dump has connected to the page server"))?,
    };
    tracing::info!("a dump has connected from {}", connection.peer());
    // A dump into the same folder may have made the link by now.
    let parent: Option<Box<dyn Source>> = match &link {
        Some(link) => Some(Box::new(FolderSource::new(parent::follow(folder, link)?))),
        None => FolderSource::new(folder.try_clone()?).parent()?,
    };
    let parent = parent.map(ImageSet::open).transpose()?;
    // The watcher has the folder open too, and by the same number.
    let path = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    let mut store = PageStore::new(folder, parent).with_link(link).noted_in(worker.journal.clone(), path);
    receive(&mut connection, &mut store)
        .map_err(|error| Failure::from(error).context(format!("the page server, for {}", connection.peer())))?;
    let (objects, pages) = store.received();
    tracing::info!(objects, pages, "the pages of the dump are complete");
    Ok(ExitCode::SUCCESS)
}

/// The folder that the images are to be in.
///
/// # Errors
/// It cannot be opened, or is none.
pub fn open_folder(options: &Options) -> Result<OwnedFd, Failure> {
    let path = images_dir(options);
    let folder = File::options().read(true).open(path).and_then(|folder| {
        if folder.metadata()?.is_dir() { Ok(folder) } else { Err(io::ErrorKind::NotADirectory.into()) }
    });
    folder
        .map(OwnedFd::from)
        .map_err(|error| Failure::from(error).context(format!("cannot use the image folder {}", path.display())))
}

/// What the link to earlier images is to say, if there are any; they are there.
///
/// # Errors
/// They are not, or a restore would not find them.
pub fn link(options: &Options) -> Result<Option<PathBuf>, Failure> {
    options.prev_images_dir.as_deref().map(|previous| previous::link(images_dir(options), previous)).transpose()
}

#[allow(clippy::print_stdout, reason = "somebody has to know the port that was found")]
fn tell_address(address: &str) -> io::Result<()> {
    println!("Listening at {address}");
    io::stdout().flush()
}
