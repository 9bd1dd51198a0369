//! Programs of others that a checkpoint or restore runs: OCI hooks, hooks.d files, action scripts.
//!
//! | module | what it owns |
//! | --- | --- |
//! | [`hook`] | OCI hooks: running them with the container's state, and what their failure means |
//! | [`directories`] | hooks.d: files that add hooks to the containers that match their conditions |
//! | [`notify`] | the points at which an engine tells others what it does, CRIU's names for them |
//! | [`action`] | action scripts: CRIU's `--action-script`, a [`notify::Notifier`] |
//! | [`program`] | running one program: standard input, deadline, captured output |

pub mod action;
pub mod directories;
pub mod hook;
pub mod notify;
pub mod program;

pub use action::ActionScripts;
pub use hook::{Hook, HookError, Hooks, Stage, State, Status};
pub use notify::{Event, Notifier, NotifyError};
