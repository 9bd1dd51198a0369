//! A client that is told of events, and answers each.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ferry_engine::sys::HostPid;
use ferry_hooks::{Event, Notifier, NotifyError};

use super::connection::{Connection, ReceiveError};
use super::message::{Answer, Notification, Request, RequestType};
use super::peer::Peer;
use crate::criu::listen::Client;
use crate::failure::Failure;

/// The client of a request, while it is carried out.
pub struct Listener<'a> {
    connection: &'a Connection,
    peer: &'a Peer,
    wants: Wants,
    /// The root of the tree to dump.
    root: HostPid,
    /// Whether the client is gone, so that it is told nothing more.
    gone: Cell<bool>,
}

/// What a client wants to be told of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wants {
    /// Events; otherwise only its rights are looked at.
    pub events: bool,
    /// Terminals without a master.
    pub terminals: bool,
}

/// Why a client did not let an event pass.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the sentences say it")]
pub enum ClientError {
    #[error("the client answered that its part in it failed")]
    Failed,
    #[error("the client answered with something else")]
    NoAnswer,
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error("the client cannot be told: {0}")]
    Send(#[from] io::Error),
}

impl<'a> Listener<'a> {
    /// The client of a request about the tree of `root`.
    pub fn new(connection: &'a Connection, peer: &'a Peer, wants: Wants, root: HostPid) -> Self {
        Self { connection, peer, wants, root, gone: Cell::new(false) }
    }

    fn ask(&self, event: Event, pid: Option<i32>, descriptor: Option<BorrowedFd<'_>>) -> Result<Request, ClientError> {
        let notification = Notification { script: Some(event.as_str().to_owned()), pid };
        let answer = Answer { notify: Some(notification), ..Answer::to(RequestType::Notify) };
        let sent = self.connection.send_with(&answer, descriptor).map_err(ClientError::from);
        let answered = sent.and_then(|()| self.connection.receive().map_err(ClientError::from));
        let request = answered.inspect_err(|_| self.gone.set(true))?;
        match (request.r#type == RequestType::Notify as i32, request.notify_success == Some(true)) {
            (true, true) => Ok(request),
            (true, false) => Err(ClientError::Failed),
            (false, _) => Err(ClientError::NoAnswer),
        }
    }
}

impl Notifier for Listener<'_> {
    fn notify(&self, event: Event, pid: Option<i32>) -> Result<(), NotifyError> {
        if !self.wants.events || self.gone.get() {
            return Ok(());
        }
        // CRIU tells the pid in these two only, and clients take it where they see it.
        let pid = pid.filter(|_| matches!(event, Event::SetupNamespaces | Event::PostRestore));
        match self.ask(event, pid, None) {
            Ok(_) => Ok(()),
            Err(error) => Err(NotifyError { event, source: Box::new(error) }),
        }
    }
}

impl Client for Listener<'_> {
    fn connection(&self) -> Option<u32> {
        let inode = rustix::fs::fstat(self.connection).ok()?.st_ino;
        u32::try_from(inode).ok()
    }

    fn takes_terminal(&self) -> bool {
        self.wants.terminals
    }

    fn take_terminal(&self, master: &OwnedFd) -> Result<(), Failure> {
        let event = Event::OrphanPtsMaster;
        let answer = self.ask(event, None, Some(master.as_fd()));
        answer.map(drop).map_err(|error| NotifyError { event, source: Box::new(error) }.into())
    }

    fn names_external(&self) -> bool {
        self.wants.events
    }

    fn tree_stopped(&self) -> Result<Vec<String>, Failure> {
        // What it was asked before, of a tree that could change.
        self.peer.may_dump(self.root)?;
        if !self.wants.events {
            return Ok(Vec::new());
        }
        let event = Event::QueryExtFiles;
        let answer = self.ask(event, None, None).map_err(|error| NotifyError { event, source: Box::new(error) })?;
        Ok(answer.opts.map(|opts| opts.external).unwrap_or_default())
    }
}
