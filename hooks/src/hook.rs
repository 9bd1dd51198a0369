//! OCI hooks: running them with the container's state, and what their failure means.
//!
//! The contract is the runtime specification's (config.md, "POSIX-platform Hooks"; runtime.md, "Lifecycle"): `path` is absolute,
//! `args` is the whole argv, the state comes on standard input as JSON. A hook without `env` inherits the environment
//! and one with `env` has just that, and the working directory is the bundle: so runc has it.
//!
//! The specification has no hooks for checkpoints. What runc does is the contract that users know: a restore runs
//! `prestart` and `createRuntime` once the namespaces exist and before anything runs in them; a checkpoint that ends the
//! container runs `poststop`; nobody runs `createContainer`, `startContainer` or `poststart` for either.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::program::{Program, ProgramError};

/// One hook, as in `config.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// The program, an absolute path of the host.
    pub path: PathBuf,
    /// Its whole argv, the name first; empty for the path alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// `NAME=VALUE`; empty to inherit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// When it is killed; whole seconds in JSON, greater than zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(serialize_with = "write_seconds", deserialize_with = "read_seconds")]
    pub timeout: Option<Duration>,
}

/// The hooks of a container, as in `config.json`; each list is run in its order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // The specification's names, listed in [`Stage`].
pub struct Hooks {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prestart: Vec<Hook>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub create_runtime: Vec<Hook>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub create_container: Vec<Hook>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub start_container: Vec<Hook>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub poststart: Vec<Hook>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub poststop: Vec<Hook>,
}

/// A point of a container's life at which hooks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Stage {
    /// The namespaces exist, nothing runs in them; deprecated by the specification.
    Prestart,
    /// After `Prestart`, the namespaces exist.
    CreateRuntime,
    /// In the container's namespaces, before the root file system is entered.
    CreateContainer,
    /// In the container's namespaces, before the user's program starts.
    StartContainer,
    /// The user's program has started.
    Poststart,
    /// The container is gone.
    Poststop,
}

impl Stage {
    /// The specification's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Stage::Prestart => "prestart",
            Stage::CreateRuntime => "createRuntime",
            Stage::CreateContainer => "createContainer",
            Stage::StartContainer => "startContainer",
            Stage::Poststart => "poststart",
            Stage::Poststop => "poststop",
        }
    }

    /// Whether a failing hook fails the operation. After the start it is only warned of, and the rest still runs.
    pub fn failure_is_fatal(self) -> bool {
        !matches!(self, Stage::Poststart | Stage::Poststop)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The container's state, as hooks get it (runtime.md, "State").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The version of the specification that it follows.
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// Where in its life the container is.
    pub status: Status,
    /// The container's process, numbered as on the host; `None` once it is stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// The absolute path of the bundle.
    pub bundle: PathBuf,
    /// The container's annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// The states of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made; what `prestart` and `createRuntime` see.
    Creating,
    /// Made, not started.
    Created,
    /// Running.
    Running,
    /// Ended; what `poststop` sees.
    Stopped,
}

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
#[error("the {stage} hook {} of container {container} failed", .path.display())]
pub struct HookError {
    /// When it was run.
    pub stage: Stage,
    /// The container's id.
    pub container: String,
    /// The hook's program.
    pub path: PathBuf,
    /// How it failed.
    #[source]
    pub source: HookFailure,
}

/// How a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookFailure {
    /// `path` is not absolute, which the specification demands.
    #[error("its path is not absolute")]
    RelativePath,
    /// An entry of `env` is not `NAME=VALUE`.
    #[error("its environment entry {0:?} is not NAME=VALUE")]
    Environment(String),
    /// The state could not be written as JSON.
    #[error("the container's state cannot be written as JSON")]
    State(#[source] serde_json::Error),
    /// The program failed.
    #[error(transparent)]
    Program(#[from] ProgramError),
}

impl Hooks {
    /// The hooks of a stage.
    pub fn at(&self, stage: Stage) -> &[Hook] {
        match stage {
            Stage::Prestart => &self.prestart,
            Stage::CreateRuntime => &self.create_runtime,
            Stage::CreateContainer => &self.create_container,
            Stage::StartContainer => &self.start_container,
            Stage::Poststart => &self.poststart,
            Stage::Poststop => &self.poststop,
        }
    }

    /// Adds a hook behind those of the stage.
    pub fn push(&mut self, stage: Stage, hook: Hook) {
        let list = match stage {
            Stage::Prestart => &mut self.prestart,
            Stage::CreateRuntime => &mut self.create_runtime,
            Stage::CreateContainer => &mut self.create_container,
            Stage::StartContainer => &mut self.start_container,
            Stage::Poststart => &mut self.poststart,
            Stage::Poststop => &mut self.poststop,
        };
        list.push(hook);
    }

    /// Runs the hooks that a restore runs, between the making of the namespaces and the first step of the restored tasks:
    /// `prestart`, then `createRuntime`. `state.pid` is the container's first process, `state.status` is creating.
    ///
    /// # Errors
    /// The first hook that fails; the rest is not run, and the restore is to be undone.
    pub fn run_for_restore(&self, state: &State) -> Result<(), HookError> {
        for stage in [Stage::Prestart, Stage::CreateRuntime] {
            self.run(stage, state)?;
        }
        Ok(())
    }

    /// Runs the hooks of a container that a checkpoint ended, when all of it is removed: `poststop`. Returns the failures,
    /// which are only to be warned of.
    pub fn run_after_stop(&self, state: &State) -> Vec<HookError> {
        self.run_tolerantly(Stage::Poststop, state)
    }

    /// Runs the hooks of a stage in their order. Returns the failures of a stage at which they are only to be warned of.
    ///
    /// # Errors
    /// At the other stages, the first hook that fails; the rest is not run.
    pub fn run(&self, stage: Stage, state: &State) -> Result<Vec<HookError>, HookError> {
        if !stage.failure_is_fatal() {
            return Ok(self.run_tolerantly(stage, state));
        }
        for hook in self.at(stage) {
            hook.run(stage, state)?;
        }
        Ok(Vec::new())
    }

    fn run_tolerantly(&self, stage: Stage, state: &State) -> Vec<HookError> {
        self.at(stage).iter().filter_map(|hook| hook.run(stage, state).err()).collect()
    }
}

impl Hook {
    /// Runs it with the state on its standard input, in the bundle.
    ///
    /// # Errors
    /// When it cannot be run, ends with a status other than 0, or takes longer than its timeout (it is then killed).
    pub fn run(&self, stage: Stage, state: &State) -> Result<(), HookError> {
        tracing::debug!(%stage, container = %state.id, hook = %self.path.display(), "running hook");
        self.run_program(state).map_err(|source| HookError {
            stage,
            container: state.id.clone(),
            path: self.path.clone(),
            source,
        })
    }

    fn run_program(&self, state: &State) -> Result<(), HookFailure> {
        if !self.path.is_absolute() {
            return Err(HookFailure::RelativePath);
        }
        let environment = (!self.env.is_empty())
            .then(|| {
                let split = |entry: &'_ String| entry.split_once('=').is_some_and(|(name, _)| !name.is_empty());
                match self.env.iter().find(|entry| !split(entry)) {
                    Some(entry) => Err(HookFailure::Environment(entry.clone())),
                    None => Ok(self.env.iter().filter_map(|entry| entry.split_once('=')).collect()),
                }
            })
            .transpose()?;
        let input = serde_json::to_vec(state).map_err(HookFailure::State)?;
        let args = self.args.iter().map(OsStr::new).collect();
        Program {
            path: self.path.clone(),
            args,
            environment,
            additions: Vec::new(),
            directory: Some(&state.bundle),
            input: &input,
            timeout: self.timeout,
        }
        .run()?;
        Ok(())
    }
}

fn read_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    match Option::<i64>::deserialize(deserializer)? {
        None => Ok(None),
        Some(seconds @ 1..) => Ok(Some(Duration::from_secs(seconds.unsigned_abs()))),
        Some(seconds) => {
            Err(serde::de::Error::custom(format!("a hook's timeout is {seconds}, it must be greater than zero")))
        }
    }
}

// The signature is serde's.
#[allow(clippy::ref_option)]
fn write_seconds<S: Serializer>(timeout: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    timeout.map(|timeout| timeout.as_secs().max(1)).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_are_read_as_the_specification_writes_them() {
        let hooks: Hooks = serde_json::from_str(
            r#"{"prestart": [{"path": "/usr/bin/fix-mounts", "args": ["fix-mounts", "arg1"], "env": ["key1=value1"]}],
                "createRuntime": [{"path": "/usr/bin/x", "timeout": 30}]}"#,
        )
        .unwrap();
        assert_eq!(hooks.prestart[0].args, ["fix-mounts", "arg1"]);
        assert_eq!(hooks.create_runtime[0].timeout, Some(Duration::from_secs(30)));
        assert!(hooks.poststop.is_empty());
        let again: Hooks = serde_json::from_str(&serde_json::to_string(&hooks).unwrap()).unwrap();
        assert_eq!(again, hooks);
    }

    #[test]
    fn a_timeout_of_zero_is_refused() {
        let error = serde_json::from_str::<Hook>(r#"{"path": "/x", "timeout": 0}"#).unwrap_err();
        assert!(error.to_string().contains("greater than zero"), "{error}");
    }

    #[test]
    fn the_state_has_the_specifications_names() {
        let state = State {
            oci_version: "1.0.2".into(),
            id: "c1".into(),
            status: Status::Creating,
            pid: Some(7),
            bundle: "/b".into(),
            annotations: BTreeMap::new(),
        };
        let json = serde_json::to_value(&state).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 7, "bundle": "/b"})
        );
    }
}
