//! The workload `service` in a container of some client: what it is started with, and whether it still is what it was.

use crate::workload::Talk;
use crate::{Bundle, Outcome, Place};
use std::path::PathBuf;

/// Where the service, and whoever asks it, has its folder inside the container.
pub const INSIDE: &str = "/work";

/// A service and the folder that it shares with the test.
pub struct Service {
    /// The folder on the host, to be bound at [`INSIDE`].
    pub folder: PathBuf,
    talk: Talk,
}

impl Service {
    /// Makes the folder.
    pub fn new(place: &Place) -> Outcome<Self> {
        let folder = place.folder("work")?;
        Ok(Self { talk: Talk::new(folder.clone()), folder })
    }

    /// A bundle whose root file system holds the workload program beside busybox, and whose first process is the service.
    pub fn bundle(&self, place: &Place) -> Outcome<Bundle> {
        Bundle::of_workload(place, "service").map(|(bundle, _)| bundle)
    }

    /// The command line of a workload inside.
    pub fn words(workload: &str) -> [&str; 3] {
        ["/bin/workload", workload, INSIDE]
    }

    /// Waits until it is ready; returns its pid as it sees it.
    pub fn await_ready(&self) -> Outcome<i32> {
        self.talk.await_ready()
    }

    /// Has it look at itself, after `event`.
    pub fn ask(&self, event: &str) -> Outcome {
        self.talk.ask().map_err(|error| format!("after {event}: {error}"))
    }
}
