//! What is known of a container: where it is written down, and what the kernel says of it now.
//!
//! A container of ferry has a directory `ROOT/ID` with
//!
//! | file | content |
//! | --- | --- |
//! | `state.json` | libcontainer's state of it |
//! | `config.json` | the bundle's config as it was when the container was made, paths resolved |
//! | `ferry.json` | what libcontainer does not keep: [`Record`] |
//! | `notify.sock` | where `start` tells a created container to go on |
//!
//! The status is never taken from the files alone: a container runs while its first process does, the very process
//! with the start time on record, and it is paused when its cgroup is frozen, by whomever.

pub mod runc;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ferry_hooks::Hooks;
use libcontainer::container::{Container as Library, ContainerStatus, State as LibraryState};
use libcontainer::oci_spec::OciSpecError;
use libcontainer::oci_spec::runtime::Spec;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};

use crate::cgroups::{CgroupError, ContainerCgroup};
use crate::janitor::{Janitor, Kind};
use crate::process::InitProcess;

const RECORD: &str = "ferry.json";
const SPEC: &str = "config.json";

/// Why a container's state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// There is no such container.
    #[error("container {id} does not exist (looked in {root})")]
    Missing {
        /// The name asked for.
        id: String,
        /// The state directory.
        root: PathBuf,
    },
    /// The name is taken.
    #[error("container {id} exists already")]
    Exists {
        /// The name.
        id: String,
    },
    /// The container is another runtime's, whose commands it needs.
    #[error("container {id} belongs to runc: use runc for this, ferry can checkpoint and restore it")]
    OfRunc {
        /// The name.
        id: String,
    },
    /// A file of the state could not be used.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A file of the state does not hold what it should.
    #[error("{path} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// libcontainer could not read or write its part.
    #[error("the state of container {id} cannot be used")]
    Library {
        /// The name.
        id: String,
        /// The library's reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The bundle's config could not be read.
    #[error("cannot read the bundle's config {path}")]
    Spec {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        #[source]
        source: OciSpecError,
    },
    /// The process that a restored container is to be registered with is gone.
    #[error("process {pid}, restored as the first of container {id}, is gone")]
    Gone {
        /// The container's name.
        id: String,
        /// Its pid.
        pid: i32,
    },
    /// Its cgroup could not be found out.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

type Result<T> = std::result::Result<T, StateError>;

/// The runtime that made a container and has its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// This program.
    Ferry,
    /// runc, whose state is read but never written.
    Runc,
}

/// What a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Its first process is being set up.
    Creating,
    /// Everything is set up; the program waits for `start`.
    Created,
    /// The program runs.
    Running,
    /// The program is frozen.
    Paused,
    /// Its first process has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// What ferry keeps beside libcontainer's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    /// The root file system, absolute.
    rootfs: PathBuf,
    /// The first process; absent while there is none.
    init: Option<RecordedInit>,
    /// The cgroup's path within the hierarchies, or systemd's slice:prefix:name.
    cgroup: PathBuf,
    /// Directories above the cgroup that were made with it.
    cgroup_parents: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct RecordedInit {
    pid: i32,
    start_time: u64,
}

/// A container, as its files and the kernel describe it at one moment.
#[derive(Clone, Debug)]
pub struct Container {
    /// Who made it.
    pub owner: Owner,
    /// Its name.
    pub id: String,
    /// The directory with its state.
    pub directory: PathBuf,
    /// The bundle that it was made from.
    pub bundle: PathBuf,
    /// Its root file system, as the host sees it.
    pub rootfs: PathBuf,
    /// Its first process; it may have ended.
    pub init: Option<InitProcess>,
    /// What it does.
    pub status: Status,
    /// When it was made, in RFC 3339.
    pub created: String,
    /// The bundle's annotations.
    pub annotations: BTreeMap<String, String>,
    /// The version of the runtime specification that it was made by.
    pub oci_version: String,
    /// Its cgroup.
    pub cgroup: ContainerCgroup,
    /// Directories above the cgroup that are removed with it when they are empty.
    pub cgroup_parents: Vec<PathBuf>,
}

impl Container {
    /// The container `id` of ferry.
    ///
    /// # Errors
    /// When there is none, its state is damaged, or it is runc's.
    pub fn load(root: &Path, id: &str) -> Result<Self> {
        match Self::find(root, id)? {
            Some(container) if container.owner == Owner::Ferry => Ok(container),
            Some(_) => Err(StateError::OfRunc { id: id.to_owned() }),
            None => Err(StateError::Missing { id: id.to_owned(), root: root.to_owned() }),
        }
    }

    /// The container `id` of ferry, or else of runc.
    ///
    /// runc's are looked for in `root` too (a manager's `--root`), and then in runc's own default.
    ///
    /// # Errors
    /// When neither knows it, or the state is damaged.
    pub fn resolve(root: &Path, id: &str) -> Result<Self> {
        if let Some(container) = Self::find(root, id)? {
            return Ok(container);
        }
        match runc::find(Path::new(runc::DEFAULT_ROOT), id)? {
            Some(container) => Ok(container),
            None => Err(StateError::Missing { id: id.to_owned(), root: root.to_owned() }),
        }
    }

    fn find(root: &Path, id: &str) -> Result<Option<Self>> {
        let directory = root.join(id);
        if !directory.join("state.json").exists() {
            return Ok(None);
        }
        if directory.join(RECORD).exists() { Self::read(directory, id).map(Some) } else { runc::find(root, id) }
    }

    fn read(directory: PathBuf, id: &str) -> Result<Self> {
        let state = settled(|| LibraryState::load(&directory)).map_err(library_error(id))?;
        let record: Record = read_json(&directory.join(RECORD))?;
        let cgroup = match record.init.filter(|_| record.cgroup.is_relative()) {
            Some(init) => ContainerCgroup::of_unit(record.cgroup, id, init.pid)?,
            None => ContainerCgroup::at(record.cgroup, id, state.use_systemd)?,
        };
        let init = record.init.map(|init| InitProcess { pid: init.pid, start_time: init.start_time });
        let running = init.is_some_and(InitProcess::is_running);
        let status = match state.status {
            ContainerStatus::Creating if init.is_none() => Status::Creating,
            _ if !running => Status::Stopped,
            ContainerStatus::Creating | ContainerStatus::Created => Status::Created,
            _ if cgroup.is_frozen() => Status::Paused,
            _ => Status::Running,
        };
        Ok(Self {
            owner: Owner::Ferry,
            id: state.id,
            bundle: state.bundle,
            rootfs: record.rootfs,
            init,
            status,
            created: state.created.map(rfc3339).unwrap_or_default(),
            annotations: state.annotations.unwrap_or_default().into_iter().collect(),
            oci_version: state.oci_version,
            cgroup,
            cgroup_parents: record.cgroup_parents,
            directory,
        })
    }

    /// All containers of ferry, by name, with what is wrong with those that cannot be read.
    ///
    /// # Errors
    /// When the state directory exists and cannot be read.
    pub fn list(root: &Path) -> Result<Vec<Result<Self>>> {
        let mut names = Vec::new();
        match fs::read_dir(root) {
            Ok(entries) => {
                for entry in entries {
                    let entry = entry.map_err(io_error("list", root))?;
                    if entry.path().join(RECORD).exists() {
                        names.push(entry.file_name().to_string_lossy().into_owned());
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("list", root)(error)),
        }
        names.sort();
        Ok(names.iter().map(|name| Self::load(root, name)).collect())
    }

    /// The config that the container was made by: of ferry's, with its paths resolved; of runc's, the bundle's.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn spec(&self) -> Result<Spec> {
        match self.owner {
            Owner::Ferry => read_spec(&self.directory.join(SPEC)),
            Owner::Runc => read_spec(&self.bundle.join(SPEC)),
        }
    }

    /// Replaces the config on record, after limits were changed.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save_spec(&self, spec: &Spec) -> Result<()> {
        write_json(&self.directory.join(SPEC), spec)
    }

    /// libcontainer's view of it.
    ///
    /// # Errors
    /// When libcontainer cannot read its files.
    pub fn library(&self) -> Result<Library> {
        settled(|| Library::load(self.directory.clone())).map_err(library_error(&self.id))
    }

    /// Writes down the status that a command has brought it to.
    ///
    /// # Errors
    /// When the state cannot be written.
    pub fn save_status(&self, status: ContainerStatus) -> Result<()> {
        let mut library = self.library()?;
        library.set_status(status).save().map_err(library_error(&self.id))
    }

    /// The hooks of its config.
    ///
    /// # Errors
    /// When the config cannot be read.
    pub fn hooks(&self) -> Result<Hooks> {
        hooks_of(&self.spec()?, &self.directory.join(SPEC))
    }

    /// What its hooks get on their standard input.
    pub fn hook_state(&self, status: ferry_hooks::Status) -> ferry_hooks::State {
        let pid = self.init.filter(|_| status != ferry_hooks::Status::Stopped).map(|init| init.pid);
        ferry_hooks::State {
            oci_version: self.oci_version.clone(),
            id: self.id.clone(),
            status,
            pid,
            bundle: self.bundle.clone(),
            annotations: self.annotations.clone(),
        }
    }
}

/// The hooks of a config that was read from `path`.
///
/// # Errors
/// When a hook has a value that hooks cannot have.
pub fn hooks_of(spec: &Spec, path: &Path) -> Result<Hooks> {
    let damaged = |source| StateError::Damaged { path: path.to_owned(), source };
    match spec.hooks() {
        Some(hooks) => serde_json::to_value(hooks).and_then(serde_json::from_value).map_err(damaged),
        None => Ok(Hooks::default()),
    }
}

/// A container that is being made: it has its name and state, perhaps its cgroup and processes. Unless `keep` is called,
/// all of it is removed again when this is dropped.
#[derive(Debug)]
pub struct NewContainer {
    id: String,
    directory: PathBuf,
    library: Library,
    record: Record,
    cgroup: ContainerCgroup,
    kept: bool,
}

impl NewContainer {
    /// Whether the name is free. [`Self::claim`] decides; this is to say so before anything else is done.
    ///
    /// # Errors
    /// When it is taken.
    pub fn look(root: &Path, id: &str) -> Result<()> {
        if root.join(id).exists() { Err(StateError::Exists { id: id.to_owned() }) } else { Ok(()) }
    }

    /// Takes the name, and writes down what is known before there is a process. `spec` has absolute paths. A janitor is told
    /// of the directory, not of the cgroup.
    ///
    /// # Errors
    /// When the name is taken, the cgroup is in use, or the state directory cannot be written.
    pub fn claim(
        root: &Path,
        id: &str,
        bundle: &Path,
        spec: &Spec,
        cgroup: ContainerCgroup,
        janitor: Option<&Janitor>,
    ) -> Result<Self> {
        fs::create_dir_all(root).map_err(io_error("create", root))?;
        let root = root.canonicalize().map_err(io_error("open", root))?;
        let directory = root.join(id);
        let made = janitor.map_or_else(|| fs::create_dir(&directory), |janitor| make_watched(&directory, janitor));
        made.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => StateError::Exists { id: id.to_owned() },
            _ => io_error("create", &directory)(error),
        })?;
        match Self::write_first(&directory, id, bundle, spec, &cgroup) {
            Ok((library, record)) => Ok(Self { id: id.to_owned(), directory, library, record, cgroup, kept: false }),
            Err(error) => {
                let _ = fs::remove_dir_all(&directory);
                Err(error)
            }
        }
    }

    fn write_first(
        directory: &Path,
        id: &str,
        bundle: &Path,
        spec: &Spec,
        cgroup: &ContainerCgroup,
    ) -> Result<(Library, Record)> {
        let mut state =
            Library::new(id, ContainerStatus::Creating, None, bundle, directory).map_err(library_error(id))?;
        state.set_systemd(cgroup.config().systemd_cgroup).set_annotations(spec.annotations().clone());
        state.save().map_err(library_error(id))?;
        write_json(&directory.join(SPEC), spec)?;
        let record = Record {
            rootfs: spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default(),
            init: None,
            cgroup: cgroup.path().to_owned(),
            cgroup_parents: cgroup.claim()?,
        };
        write_json(&directory.join(RECORD), &record)?;
        Ok((state, record))
    }

    /// The directory of its state.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// libcontainer's state, for the process builder.
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &ContainerCgroup {
        &self.cgroup
    }

    /// Writes down the first process, in the status it has reached, and makes the container complete: it stays.
    ///
    /// # Errors
    /// When the process is gone already, or the state cannot be written.
    pub fn keep(mut self, pid: i32, status: ContainerStatus) -> Result<Container> {
        self.record(pid, status)?;
        self.keep_recorded()
    }

    /// Writes down the first process, in the status it has reached or is about to reach.
    ///
    /// # Errors
    /// As [`Self::keep`].
    pub fn record(&mut self, pid: i32, status: ContainerStatus) -> Result<()> {
        let Some(init) = InitProcess::running(pid) else {
            return Err(StateError::Gone { id: self.id.clone(), pid });
        };
        self.record.init = Some(RecordedInit { pid, start_time: init.start_time });
        write_json(&self.directory.join(RECORD), &self.record)?;
        // The creation time is set on the way through `Created`.
        self.library.set_status(ContainerStatus::Created).set_status(status);
        self.library.set_creator(rustix::process::geteuid().as_raw()).set_pid(pid);
        self.library.save().map_err(library_error(&self.id))
    }

    /// Makes the container complete, of which [`Self::record`] has written down the rest.
    ///
    /// # Errors
    /// When the state cannot be read back.
    pub fn keep_recorded(mut self) -> Result<Container> {
        let container = Container::read(self.directory.clone(), &self.id)?;
        self.kept = true;
        Ok(container)
    }
}

impl Drop for NewContainer {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = self.cgroup.kill().and_then(|()| self.cgroup.remove(&self.record.cgroup_parents)) {
            tracing::warn!(error = &error as &dyn std::error::Error, "the cgroup of the failed container stays");
        }
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            tracing::warn!(directory = %self.directory.display(), %error, "the state of the failed container stays");
        }
    }
}

/// Makes an empty directory that goes if ferry is killed, at any instant: under a name of its own first, so that a directory that
/// somebody else has made meanwhile is never taken for it.
fn make_watched(directory: &Path, janitor: &Janitor) -> io::Result<()> {
    // No container is called so (`lifecycle::container_id`).
    let draft = directory.with_file_name(format!("@{}", std::process::id()));
    janitor.path(&draft, Kind::Tree, None)?;
    fs::create_dir(&draft)?;
    let named = fs::metadata(&draft).and_then(|made| {
        janitor.path(directory, Kind::Tree, Some(made.ino()))?;
        Ok(renameat_with(CWD, &draft, CWD, directory, RenameFlags::NOREPLACE)?)
    });
    named.inspect_err(|_| drop(fs::remove_dir(&draft)))
}

/// Reads a bundle's config, without judging it.
///
/// # Errors
/// When the file is missing or no valid config.
pub fn read_spec(path: &Path) -> Result<Spec> {
    Spec::load(path).map_err(|source| StateError::Spec { path: path.to_owned(), source })
}

fn rfc3339(time: chrono::DateTime<chrono::Utc>) -> String {
    time.to_rfc3339_opts(chrono::SecondsFormat::Nanos, true)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(io_error("read", path))?;
    serde_json::from_slice(&text).map_err(|source| StateError::Damaged { path: path.to_owned(), source })
}

/// Replaces the file in one step: a reader, or a ferry that is killed, never sees half of it.
fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(|source| StateError::Damaged { path: path.to_owned(), source })?;
    let draft = path.with_extension("new");
    fs::write(&draft, text).map_err(io_error("write", &draft))?;
    fs::rename(&draft, path).map_err(io_error("replace", path))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { action, path, source }
}

/// Loads a state that another command may be writing: libcontainer empties the file and fills it again, and what is read
/// between the two cannot be parsed.
fn settled<T, E>(mut load: impl FnMut() -> std::result::Result<T, E>) -> std::result::Result<T, E> {
    let deadline = Instant::now() + WRITING_TIME;
    loop {
        match load() {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            loaded => return loaded,
        }
    }
}

/// Longer than a state file takes to be written, by a process that waits for a processor too.
const WRITING_TIME: Duration = Duration::from_millis(200);

/// Wraps an error of libcontainer.
fn library_error<E: std::error::Error + Send + Sync + 'static>(id: &str) -> impl FnOnce(E) -> StateError {
    let id = id.to_owned();
    move |error| StateError::Library { id, source: Box::new(error) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::delete;

    #[test]
    fn a_state_that_is_being_written_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let mut library =
            Library::new("id", ContainerStatus::Creating, None, Path::new("/"), directory.path()).unwrap();
        fs::write(directory.path().join("state.json"), "").unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                library.set_status(ContainerStatus::Stopped).save().unwrap();
            });
            let state = settled(|| LibraryState::load(directory.path())).unwrap();
            assert_eq!(state.status, ContainerStatus::Stopped);
        });
        fs::write(directory.path().join("state.json"), "{").unwrap();
        settled(|| LibraryState::load(directory.path())).unwrap_err();
    }

    fn bundle() -> (tempfile::TempDir, Spec) {
        let directory = tempfile::tempdir().unwrap();
        let mut spec = Spec::default();
        spec.root_mut().as_mut().unwrap().set_path(directory.path().to_owned());
        (directory, spec)
    }

    fn name(what: &str) -> String {
        format!("ferry-unit-{what}-{}", std::process::id())
    }

    #[test]
    fn a_process_that_is_there_already_becomes_a_container() {
        let (bundle, spec) = bundle();
        let root = bundle.path().join("state");
        let id = name("restored");
        let cgroup = ContainerCgroup::of_spec(&spec, &id, false).unwrap();
        let new = NewContainer::claim(&root, &id, bundle.path(), &spec, cgroup, None).unwrap();
        let limits = serde_json::from_str(r#"{"pids":{"limit":17}}"#).unwrap();
        new.cgroup().create(Some(&limits)).unwrap();
        let mut process = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(process.id()).unwrap();
        new.cgroup().add(pid).unwrap();
        assert_eq!(Container::load(&root, &id).unwrap().status, Status::Creating);
        let container = new.keep(pid, ContainerStatus::Running).unwrap();
        assert_eq!(container.status, Status::Running);
        assert_eq!(container.cgroup.processes().unwrap().into_iter().collect::<Vec<i32>>(), [pid]);
        assert_eq!(container.library().unwrap().pid().map(|pid| pid.as_raw()), Some(pid));

        container.cgroup.freeze().unwrap();
        assert_eq!(Container::load(&root, &id).unwrap().status, Status::Paused);
        container.cgroup.thaw().unwrap();
        let again = ContainerCgroup::of_spec(&spec, &id, false).unwrap();
        assert!(matches!(again.claim(), Err(CgroupError::InUse { .. })));

        delete::destroy(&container).unwrap();
        process.wait().unwrap();
        assert!(container.cgroup.directories().values().all(|directory| !directory.exists()));
        assert!(matches!(Container::load(&root, &id), Err(StateError::Missing { .. })));
    }

    #[test]
    fn a_container_that_is_given_up_leaves_nothing() {
        let (bundle, spec) = bundle();
        let root = bundle.path().join("state");
        let id = name("given-up");
        let cgroup = ContainerCgroup::of_spec(&spec, &id, false).unwrap();
        let new = NewContainer::claim(&root, &id, bundle.path(), &spec, cgroup.clone(), None).unwrap();
        new.cgroup().create(None).unwrap();
        let mut process = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        new.cgroup().add(i32::try_from(process.id()).unwrap()).unwrap();
        assert!(cgroup.directories().values().all(|directory| directory.exists()));
        drop(new);
        assert!(!process.wait().unwrap().success(), "what is in the cgroup is killed");
        assert!(cgroup.directories().values().all(|directory| !directory.exists()));
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }

    #[test]
    fn a_pid_that_another_process_has_now_is_a_stopped_container() {
        let (bundle, spec) = bundle();
        let root = bundle.path().join("state");
        let id = name("reused");
        let cgroup = ContainerCgroup::of_spec(&spec, &id, false).unwrap();
        let new = NewContainer::claim(&root, &id, bundle.path(), &spec, cgroup, None).unwrap();
        let this = i32::try_from(std::process::id()).unwrap();
        let container = new.keep(this, ContainerStatus::Running).unwrap();
        let file = container.directory.join(RECORD);
        let mut record: Record = read_json(&file).unwrap();
        record.init = record.init.map(|init| RecordedInit { start_time: init.start_time + 1, ..init });
        write_json(&file, &record).unwrap();
        assert_eq!(Container::load(&root, &id).unwrap().status, Status::Stopped);
    }
}
