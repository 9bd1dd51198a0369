//! `ferry state`: one container as JSON, and the same record for `list`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::{IdArgs, print};
use crate::cli::Global;
use crate::failure::Outcome;
use crate::state::{Container, Status};

/// What runc prints of a container, in its order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    oci_version: String,
    /// The container's name.
    pub id: String,
    /// The first process, 0 when it has ended.
    pub pid: i32,
    /// The status in lower case.
    pub status: String,
    /// The bundle's directory.
    pub bundle: PathBuf,
    rootfs: PathBuf,
    /// When it was made.
    pub created: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    /// The owner of the state directory.
    pub owner: String,
}

impl Report {
    /// The record of one container.
    pub fn of(container: Container, owner: String) -> Self {
        let pid = container.init.filter(|_| container.status != Status::Stopped).map_or(0, |init| init.pid);
        Self {
            oci_version: container.oci_version,
            id: container.id,
            pid,
            status: container.status.to_string(),
            bundle: container.bundle,
            rootfs: container.rootfs,
            created: container.created,
            annotations: container.annotations,
            owner,
        }
    }
}

/// Prints the state.
pub fn run(global: &Global, args: &IdArgs) -> Outcome {
    // runc leaves the owner empty here.
    let report = Report::of(Container::load(&global.root, &args.id)?, String::new());
    print(&(serde_json::to_string_pretty(&report)? + "\n"))?;
    Ok(ExitCode::SUCCESS)
}
