//! The points at which an engine tells others what it does, by CRIU's names.
//!
//! Who listens decides what happens: action scripts run, an RPC client gets a message and answers. A listener that
//! fails makes the operation fail, and the engine undo it.

use std::error::Error;
use std::fmt;

/// A point of a dump or restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// Before images go to, or come from, a stream instead of files.
    PreStream,
    /// Before the dump begins; nothing is stopped.
    PreDump,
    /// The images are complete; the tasks are still stopped, and end or go on after it.
    PostDump,
    /// Before the restore begins; nothing is made.
    PreRestore,
    /// Everything is restored, and stopped. With the new root task.
    PostRestore,
    /// The network of the tasks is about to be locked: only when they have a network namespace of their own.
    NetworkLock,
    /// The network of the tasks is about to be unlocked.
    NetworkUnlock,
    /// The root task and its namespaces exist; the namespaces are empty. With the new root task.
    SetupNamespaces,
    /// The namespaces are filled.
    PostSetupNamespaces,
    /// The tasks are about to run.
    PreResume,
    /// The tasks run.
    PostResume,
    /// A pty master without an owner waits to be taken; it comes as a descriptor, so only an RPC client can.
    OrphanPtsMaster,
    /// Lazy pages: the page server listens.
    StatusReady,
    /// The tasks are stopped and the network is locked; an RPC client may name more external files.
    QueryExtFiles,
}

impl Event {
    /// CRIU's name, in `CRTOOLS_SCRIPT_ACTION` and in RPC messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Event::PreStream => "pre-stream",
            Event::PreDump => "pre-dump",
            Event::PostDump => "post-dump",
            Event::PreRestore => "pre-restore",
            Event::PostRestore => "post-restore",
            Event::NetworkLock => "network-lock",
            Event::NetworkUnlock => "network-unlock",
            Event::SetupNamespaces => "setup-namespaces",
            Event::PostSetupNamespaces => "post-setup-namespaces",
            Event::PreResume => "pre-resume",
            Event::PostResume => "post-resume",
            Event::OrphanPtsMaster => "orphan-pts-master",
            Event::StatusReady => "status-ready",
            Event::QueryExtFiles => "query-ext-files",
        }
    }

    /// Whether only an RPC client hears of it, since it carries a descriptor or an answer.
    pub fn is_for_rpc_only(self) -> bool {
        matches!(self, Event::OrphanPtsMaster | Event::QueryExtFiles)
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A dump's events in their order. `NetworkUnlock` comes only when the tasks go on or the dump failed; `NetworkLock` and it only with
/// a network namespace; `StatusReady` only with lazy pages. A pre-dump has none.
pub const DUMP_ORDER: [Event; 6] = [
    Event::PreDump,
    Event::NetworkLock,
    Event::QueryExtFiles,
    Event::PostDump,
    Event::NetworkUnlock,
    Event::StatusReady,
];

/// A restore's events in their order. `SetupNamespaces` and `PostSetupNamespaces` come only with a namespace of any kind.
pub const RESTORE_ORDER: [Event; 8] = [
    Event::PreRestore,
    Event::SetupNamespaces,
    Event::PostSetupNamespaces,
    Event::OrphanPtsMaster,
    Event::PostRestore,
    Event::NetworkUnlock,
    Event::PreResume,
    Event::PostResume,
];

/// Someone who is told of events.
pub trait Notifier {
    /// Tells of an event, and returns when it was dealt with. `pid` is the root task as numbered here, once there is one.
    ///
    /// # Errors
    /// When the listener failed or refused. The operation then fails.
    fn notify(&self, event: Event, pid: Option<i32>) -> Result<(), NotifyError>;
}

/// A listener that failed.
#[derive(Debug, thiserror::Error)]
#[error("the {event} notification failed")]
pub struct NotifyError {
    /// What it was told.
    pub event: Event,
    /// How it failed.
    #[source]
    pub source: Box<dyn Error + Send + Sync>,
}

/// Nobody listens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Notifier for Silent {
    fn notify(&self, _: Event, _: Option<i32>) -> Result<(), NotifyError> {
        Ok(())
    }
}

/// Several listeners, told one after the other; the first that fails ends it.
impl<N: Notifier + ?Sized> Notifier for Vec<Box<N>> {
    fn notify(&self, event: Event, pid: Option<i32>) -> Result<(), NotifyError> {
        self.iter().try_for_each(|listener| listener.notify(event, pid))
    }
}
