//! What a restore that does not succeed takes away of a container, besides its state: the cgroup, and what hooks have made.
//!
//! Ferry does it itself when the restore fails; its janitor does it when ferry is killed.

use std::cell::Cell;
use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use ferry_engine::file_tree::take_back;
use ferry_hooks::{Hooks, State, Status};

use super::RestoreArgs;
use crate::cgroups::ContainerCgroup;
use crate::failure::{Failure, sentence_of};
use crate::janitor::Janitor;
use crate::launch::Bundle;
use crate::logs;

/// The janitor is told this before the cgroup is made …
const CGROUP: u64 = 1;
/// … and this before hooks are run …
const HOOKS: u64 = 2;
/// … and this before the root file system is changed.
const LAYER: u64 = 3;

/// The steps of a restore that leave something.
pub struct Remains {
    janitor: Janitor,
    hooks: Hooks,
    state: State,
    hooks_ran: Cell<bool>,
}

impl Remains {
    /// Has a janitor see to what is left of the container if ferry is killed. Nothing of it has been made yet.
    ///
    /// # Errors
    /// When the cgroup is in use, or there can be no janitor.
    pub fn watch(
        args: &RestoreArgs,
        bundle: &Bundle,
        cgroup: &ContainerCgroup,
        hooks: &Hooks,
    ) -> Result<Self, Failure> {
        let state = State {
            oci_version: bundle.spec.version().clone(),
            id: args.id.id.clone(),
            status: Status::Stopped,
            pid: None,
            bundle: bundle.directory.clone(),
            annotations: bundle.spec.annotations().clone().unwrap_or_default().into_iter().collect(),
        };
        let (cgroup, parents, hooks) = (cgroup.clone(), cgroup.claim()?, hooks.clone());
        let (after, stopped) = (hooks.clone(), state.clone());
        let rootfs = bundle.spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
        let ferry = std::process::id();
        let janitor = Janitor::hire(move |steps| {
            remove_cgroup(steps, &cgroup, &parents);
            if steps.contains(&LAYER) {
                take_back_changes(&rootfs, ferry);
            }
            let ran = steps.contains(&HOOKS);
            move || {
                if ran {
                    undo_hooks(&after, &stopped)
                }
            }
        })
        .map_err(|error| Failure::from(error).context("cannot start the process that watches over the restore"))?;
        Ok(Self { janitor, hooks, state, hooks_ran: Cell::new(false) })
    }

    /// Whom to tell of everything else.
    pub fn janitor(&self) -> &Janitor {
        &self.janitor
    }

    /// The cgroup is about to be made.
    ///
    /// # Errors
    /// When the janitor cannot be told.
    pub fn cgroup(&self) -> io::Result<()> {
        self.janitor.step(CGROUP)
    }

    /// The root file system is about to be changed.
    ///
    /// # Errors
    /// When the janitor cannot be told.
    pub fn layer(&self) -> io::Result<()> {
        self.janitor.step(LAYER)
    }

    /// Runs the hooks that runc runs for a restore too, with the container's first process.
    ///
    /// # Errors
    /// The first hook that fails.
    pub fn run_hooks(&self, root: i32) -> Result<(), Failure> {
        self.janitor.step(HOOKS)?;
        self.hooks_ran.set(true);
        let state = State { status: Status::Creating, pid: Some(root), ..self.state.clone() };
        Ok(self.hooks.run_for_restore(&state)?)
    }

    /// Everything else has been taken away: takes away what hooks have made, by the hooks for the container's end, as runc
    /// does.
    pub fn undo_hooks(&self) {
        if self.hooks_ran.get() {
            undo_hooks(&self.hooks, &self.state);
        }
    }
}

fn remove_cgroup(steps: &HashSet<u64>, cgroup: &ContainerCgroup, parents: &[PathBuf]) {
    if steps.contains(&CGROUP)
        && let Err(error) = cgroup.kill().and_then(|()| cgroup.remove(parents))
    {
        tracing::warn!(error = &error as &dyn std::error::Error, "the cgroup of the killed restore stays");
    }
}

fn take_back_changes(rootfs: &Path, ferry: u32) {
    if let Err(error) = take_back(rootfs, ferry) {
        tracing::warn!(%error, "changes of the root file system by the killed restore stay");
    }
}

fn undo_hooks(hooks: &Hooks, state: &State) {
    for failed in hooks.run_after_stop(state) {
        logs::say(&sentence_of(&failed));
    }
}
