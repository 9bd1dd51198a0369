//! One connection: requests, one after the other, and their answers.
//!
//! A dump or restore is the last request of a connection; pre-dumps may come before a dump. `keep_open` leaves it open after the requests that
//! only ask; with any other the connection is closed without an answer, as CRIU does. Statuses of the process are CRIU's too.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::ControlFlow;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use ferry_engine::preflight;
use tracing::dispatcher::DefaultGuard;

use super::connection::{Connection, ReceiveError, sentence_for_answer};
use super::message::{
    Answer, DumpAnswer, Features, PageServer, Request, RequestOptions, RequestType, RestoreAnswer, Version,
};
use super::notify::Listener;
use super::peer::Peer;
use super::request::{Prepared, prepare};
use crate::criu::page_server::{self, Door};
use crate::criu::{cpuinfo, dump, log, restore, work_dir};
use crate::failure::Failure;
use crate::guard::{self, End, Side, Worker};

/// The release that this protocol follows, as numbers.
const VERSION: (i32, i32, i32) = (4, 2, 0);

/// A connection, and who is at its other end.
pub struct Session {
    connection: Connection,
    peer: Peer,
}

/// What follows an answer.
enum Next {
    /// The connection was of use, and another request may come if it is to stay open.
    Answered,
    /// This was the last request.
    Done(ExitCode),
}

/// CRIU's status where it returns -1 from its main function.
const MINUS_ONE: u8 = 255;

impl Session {
    /// Begins; a `starter` is the one who started this process.
    ///
    /// # Errors
    /// The client cannot be told.
    pub fn begin(connection: Connection, starter: bool) -> Result<Self, Failure> {
        let peer = Peer::of(&connection, starter)?;
        Ok(Self { connection, peer })
    }

    /// Answers requests until the last.
    pub fn serve(&self) -> ExitCode {
        let mut answered = false;
        loop {
            let request = match self.connection.receive() {
                Ok(request) => request,
                // A client that has had its answers may go.
                Err(ReceiveError::Closed) if answered => return ExitCode::SUCCESS,
                Err(error) => {
                    let failure = Failure::from(error).with_errno(libc::EBADRQC);
                    tracing::error!("{failure}");
                    self.fail(RequestType::Empty, &failure);
                    return ExitCode::from(MINUS_ONE);
                }
            };
            let kind = RequestType::try_from(request.r#type).unwrap_or(RequestType::Empty);
            let keep_open = request.keep_open == Some(true);
            if keep_open && !may_keep_open(kind) {
                return ExitCode::from(MINUS_ONE);
            }
            match self.carry_out(kind, request) {
                Next::Done(code) => return code,
                Next::Answered if keep_open => answered = true,
                Next::Answered => return ExitCode::SUCCESS,
            }
        }
    }

    fn carry_out(&self, kind: RequestType, request: Request) -> Next {
        let options = request.opts.unwrap_or_else(|| RequestOptions { images_dir_fd: -1, ..RequestOptions::default() });
        match kind {
            RequestType::Dump => Next::Done(self.dump(&options)),
            RequestType::Restore => Next::Done(self.restore(&options)),
            RequestType::Check => self.answer_or_fail(kind, self.check(&options).map(|()| Answer::to(kind))),
            RequestType::Version => self.answer_or_fail(kind, Ok(version())),
            RequestType::FeatureCheck => self.answer_or_fail(kind, Ok(features(request.features.unwrap_or_default()))),
            RequestType::WaitPid => self.answer_or_fail(kind, wait_for_child(request.pid)),
            RequestType::PreDump => Next::Done(self.pre_dumps(options)),
            RequestType::SinglePreDump => match self.pre_dump(kind, &options) {
                ControlFlow::Continue(()) => Next::Done(ExitCode::SUCCESS),
                ControlFlow::Break(code) => Next::Done(code),
            },
            RequestType::PageServer | RequestType::PageServerChild => {
                // CRIU answers both with the one type. Whether it is to be a child makes no difference: it is one of this process, and
                // goes on when this process ends.
                self.answer_or_fail(RequestType::PageServer, self.page_server(&options))
            }
            RequestType::CpuinfoDump | RequestType::CpuinfoCheck => {
                self.answer_or_fail(kind, self.cpuinfo(kind, &options).map(|()| Answer::to(kind)))
            }
            RequestType::Empty | RequestType::Notify => {
                let failure =
                    Failure::new(format!("a request of type {} is not known, or not at this point", request.r#type));
                tracing::error!("{failure}");
                self.fail(RequestType::Empty, &failure);
                Next::Done(ExitCode::from(MINUS_ONE))
            }
        }
    }

    fn answer_or_fail(&self, kind: RequestType, answer: Result<Answer, Failure>) -> Next {
        let sent = match answer {
            Ok(answer) => self.send(&answer),
            Err(failure) => {
                tracing::error!("{failure}");
                self.fail(kind, &failure)
            }
        };
        if sent { Next::Answered } else { Next::Done(ExitCode::FAILURE) }
    }

    /// Whether the client could be told.
    fn send(&self, answer: &Answer) -> bool {
        self.connection
            .send(answer)
            .inspect_err(|error| tracing::warn!("the client does not hear the answer: {error}"))
            .is_ok()
    }

    fn fail(&self, kind: RequestType, failure: &Failure) -> bool {
        self.send(&failed(kind, failure))
    }

    /// Dumps, in a process of its own that also answers; this one answers only if that is killed.
    fn dump(&self, asked: &RequestOptions) -> ExitCode {
        let failure = match guard::split() {
            Ok(Side::Worker(worker)) => return self.dump_watched(asked, &worker),
            Ok(Side::Watcher(end)) => match end.outcome() {
                Ok(status) => return status,
                Err(failure) => failure,
            },
            Err(failure) => failure,
        };
        tracing::error!("{failure}");
        let answer = failed(RequestType::Dump, &failure);
        self.send(&Answer { dump: Some(DumpAnswer { restored: Some(false) }), ..answer });
        ExitCode::FAILURE
    }

    fn dump_watched(&self, asked: &RequestOptions, worker: &Worker) -> ExitCode {
        let prepared = prepare(RequestType::Dump, asked, &self.peer);
        let root = asked.pid;
        let done = prepared.and_then(|prepared| {
            self.open_log(&prepared)?;
            Self::may_go_on(&prepared)?;
            self.peer.may_dump(prepared.root())?;
            let listener = Listener::new(&self.connection, &self.peer, prepared.wants, prepared.root());
            dump::run(&prepared.options, Some(&listener), worker)
        });
        let answer = match &done {
            // A client that was dumped itself, and ended, hears that it was when it is restored.
            Ok(()) if root.is_none() && asked.leave_running != Some(true) => return ExitCode::SUCCESS,
            Ok(()) => Answer::to(RequestType::Dump),
            Err(failure) => {
                tracing::error!("{failure}");
                failed(RequestType::Dump, failure)
            }
        };
        let answer = Answer { dump: Some(DumpAnswer { restored: Some(false) }), ..answer };
        let told = self.send(&answer);
        if done.is_ok() && told { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    /// Pre-dumps as long as the client asks for one after the other; what follows the last is a dump.
    fn pre_dumps(&self, first: RequestOptions) -> ExitCode {
        let mut asked = first;
        loop {
            if let ControlFlow::Break(code) = self.pre_dump(RequestType::PreDump, &asked) {
                return code;
            }
            let Ok(Request { r#type, opts: Some(options), .. }) = self.connection.receive() else { break };
            match RequestType::try_from(r#type) {
                Ok(RequestType::PreDump) => asked = options,
                Ok(RequestType::Dump) => return self.dump(&options),
                _ => break,
            }
        }
        ExitCode::from(MINUS_ONE)
    }

    /// Saves the memory of a tree, in a process of its own that also answers. Goes on in this one, when it succeeded.
    fn pre_dump(&self, kind: RequestType, asked: &RequestOptions) -> ControlFlow<ExitCode> {
        let failure = match guard::split() {
            Ok(Side::Worker(worker)) => return ControlFlow::Break(self.pre_dump_watched(kind, asked, &worker)),
            Ok(Side::Watcher(End::Exited(0))) => return ControlFlow::Continue(()),
            Ok(Side::Watcher(end)) => match end.outcome() {
                Ok(status) => return ControlFlow::Break(status),
                Err(failure) => failure,
            },
            Err(failure) => failure,
        };
        tracing::error!("{failure}");
        self.fail(kind, &failure);
        ControlFlow::Break(ExitCode::from(MINUS_ONE))
    }

    fn pre_dump_watched(&self, kind: RequestType, asked: &RequestOptions, worker: &Worker) -> ExitCode {
        let done = prepare(kind, asked, &self.peer).and_then(|prepared| {
            self.open_log(&prepared)?;
            Self::may_go_on(&prepared)?;
            self.peer.may_dump(prepared.root())?;
            dump::run_pre_dump(&prepared.options, worker)
        });
        let answer = match &done {
            Ok(()) => Answer::to(kind),
            Err(failure) => {
                tracing::error!("{failure}");
                failed(kind, failure)
            }
        };
        if self.send(&answer) && done.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(MINUS_ONE) }
    }

    /// Starts a page server, which listens before the client hears of it.
    fn page_server(&self, asked: &RequestOptions) -> Result<Answer, Failure> {
        let prepared = prepare(RequestType::PageServer, asked, &self.peer)?;
        Self::may_go_on(&prepared)?;
        let options = &prepared.options;
        let port = options.port.unwrap_or(0);
        if !self.peer.is_trusted() && (1..1024).contains(&port) {
            return Err(self.peer.refused(&format!("may not listen at port {port}"), "choose one from 1024 on"));
        }
        let folder = page_server::open_folder(options)?;
        let link = page_server::link(options)?;
        let door = Door::open(options)?;
        let port = door.port()?;
        let log = self.log_file(&prepared)?;
        let status = asked.status_fd.filter(|number| *number >= 0);
        let status = status.map(|number| self.peer.descriptor("status_fd", number)).transpose()?;
        let child = page_server::into_background(options, door, &folder, link.as_deref(), log)?;
        if let Some(status) = status {
            File::from(status).write_all(&[0]).map_err(|error| Failure::from(error).context("status_fd"))?;
        }
        let told = PageServer {
            pid: i32::try_from(child.id()).ok(),
            port: (port > 0).then(|| port.into()),
            ..PageServer::default()
        };
        Ok(Answer { ps: Some(told), ..Answer::to(RequestType::PageServer) })
    }

    fn restore(&self, asked: &RequestOptions) -> ExitCode {
        let prepared = prepare(RequestType::Restore, asked, &self.peer);
        let done = prepared.and_then(|prepared| {
            self.open_log(&prepared)?;
            Self::may_go_on(&prepared)?;
            self.peer.may_restore()?;
            let listener = Listener::new(&self.connection, &self.peer, prepared.wants, prepared.root());
            Ok((restore::run(&prepared.options, Some(&listener))?, prepared))
        });
        let (answer, exec) = match done {
            Ok((root, prepared)) => {
                let restore = Some(RestoreAnswer { pid: root.0 });
                let log = prepared.options.log_file.as_ref().map(|name| work_dir(&prepared.options).join(name));
                (Answer { restore, ..Answer::to(RequestType::Restore) }, Some((prepared.exec, log)))
            }
            Err(failure) => {
                tracing::error!("{failure}");
                let restore = Some(RestoreAnswer { pid: -1 });
                (Answer { restore, ..failed(RequestType::Restore, &failure) }, None)
            }
        };
        let told = self.send(&answer);
        match exec {
            Some((exec, log)) if told => run_instead(&exec, log.as_deref()),
            _ => ExitCode::FAILURE,
        }
    }

    fn check(&self, asked: &RequestOptions) -> Result<(), Failure> {
        if asked.log_file.is_some() && asked.log_to_stderr != Some(true) {
            let prepared = prepare(RequestType::Check, asked, &self.peer)?;
            if prepared.options.images_dir.is_none() && prepared.options.work_dir.is_none() {
                return Err(Failure::new("a log file needs images_dir_fd or work_dir_fd").with_errno(libc::EBADRQC));
            }
            let _log = self.open_log_for_now(&prepared)?;
            return Self::check_host().inspect_err(|failure| tracing::error!("{failure}"));
        }
        Self::check_host()
    }

    fn check_host() -> Result<(), Failure> {
        preflight::check_host()?;
        tracing::info!("Looks good.");
        Ok(())
    }

    fn cpuinfo(&self, kind: RequestType, asked: &RequestOptions) -> Result<(), Failure> {
        let mut prepared = prepare(kind, asked, &self.peer)?;
        let _log = self.open_log_for_now(&prepared)?;
        let word = if kind == RequestType::CpuinfoDump { "dump" } else { "check" };
        prepared.options.rest = vec![word.into()];
        cpuinfo::run(&prepared.options).map(drop).inspect_err(|failure| tracing::error!("{failure}"))
    }

    /// Sends the log into the work folder, for the last request of the connection.
    fn open_log(&self, prepared: &Prepared) -> Result<(), Failure> {
        log::install_to(self.log_file(prepared)?, prepared.options.log_level());
        Ok(())
    }

    /// The same while the guard lives: the next request has a log of its own.
    fn open_log_for_now(&self, prepared: &Prepared) -> Result<DefaultGuard, Failure> {
        Ok(log::install_for_now(self.log_file(prepared)?, prepared.options.log_level()))
    }

    /// The file for the log of a request, if there is to be one. The work folder is the current one then.
    fn log_file(&self, prepared: &Prepared) -> Result<Option<File>, Failure> {
        let options = &prepared.options;
        let Some(name) = &options.log_file else { return Ok(None) };
        let path = work_dir(options).join(name);
        let file = if self.peer.is_trusted() {
            File::create(&path)
        } else {
            // What has the name may be a link to anything.
            let _ = std::fs::remove_file(&path);
            OpenOptions::new().write(true).create_new(true).open(&path)
        };
        let file = file.map_err(|error| {
            Failure::from(error)
                .context(format!("cannot create the log file {}", path.display()))
                .with_errno(libc::EBADRQC)
        })?;
        // What the request names by a relative path is there, and scripts run there.
        let folder = work_dir(options);
        std::env::set_current_dir(&folder)
            .map_err(|error| Failure::from(error).context(format!("cannot change to {}", folder.display())))?;
        Ok(Some(file))
    }

    fn may_go_on(prepared: &Prepared) -> Result<(), Failure> {
        match prepared.options.unsupported().as_slice() {
            [] => Ok(()),
            names => Err(Failure::new(format!("ferry does not support {} yet", names.join(", ")))),
        }
    }
}

fn may_keep_open(kind: RequestType) -> bool {
    matches!(
        kind,
        RequestType::PageServer
            | RequestType::PageServerChild
            | RequestType::CpuinfoDump
            | RequestType::CpuinfoCheck
            | RequestType::FeatureCheck
            | RequestType::Version
    )
}

fn failed(kind: RequestType, failure: &Failure) -> Answer {
    Answer {
        success: false,
        cr_errno: failure.errno(),
        cr_errmsg: Some(sentence_for_answer(&failure.to_string())),
        ..Answer::to(kind)
    }
}

fn version() -> Answer {
    let (major_number, minor_number, sublevel) = VERSION;
    let version = Version { major_number, minor_number, sublevel: Some(sublevel), name: None };
    Answer { version: Some(version), ..Answer::to(RequestType::Version) }
}

/// All are answered; those that were not asked for, or are not there, with false.
fn features(asked: Features) -> Answer {
    let features = Features {
        mem_track: Some(asked.mem_track == Some(true)),
        lazy_pages: Some(asked.lazy_pages == Some(true) && ferry_engine::lazy::is_possible()),
        // pidfd_open(2) and pidfd_getfd(2) are older than any kernel that ferry runs on.
        pidfd_store: Some(asked.pidfd_store == Some(true)),
    };
    Answer { features: Some(features), ..Answer::to(RequestType::FeatureCheck) }
}

/// Waits for a child of this process, which earlier requests of the connection may have made.
fn wait_for_child(pid: Option<u32>) -> Result<Answer, Failure> {
    let pid = pid.and_then(|pid| rustix::process::Pid::from_raw(i32::try_from(pid).ok()?));
    let none = || Failure::new("there is no such child to wait for").with_errno(libc::ECHILD);
    let pid = pid.ok_or_else(none)?;
    match rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()) {
        Ok(Some((_, status))) => Ok(Answer { status: Some(status.as_raw()), ..Answer::to(RequestType::WaitPid) }),
        Ok(None) | Err(rustix::io::Errno::CHILD) => Err(none()),
        Err(errno) => Err(Failure::from(errno).with_errno(errno.raw_os_error())),
    }
}

/// Runs a program in place of this process, if there is one to run. What it prints goes to the log, as with CRIU.
fn run_instead(words: &[String], log: Option<&Path>) -> ExitCode {
    let Some((program, arguments)) = words.split_first() else { return ExitCode::SUCCESS };
    let output = || match log.map(|log| OpenOptions::new().append(true).open(log)) {
        Some(Ok(file)) => Stdio::from(file),
        Some(Err(_)) | None => Stdio::null(),
    };
    let error = Command::new(program).args(arguments).stdout(output()).stderr(output()).exec();
    tracing::error!("the tree is restored, but {program} cannot be run: {error}");
    ExitCode::FAILURE
}
