//! One checkpoint, from a container and where it goes to the finished images.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ferry_engine::dump::{After, DumpError, DumpListener, DumpOptions, DumpStage, Dumped, dump_telling, pre_dump};
use ferry_engine::fault::Faults;
use ferry_engine::images::{ArchiveSink, Content, FolderOptions, FolderSink, Manifest, Sink, SinkError};
use ferry_engine::lazy::offer::PageOffer;
use ferry_engine::sys::{HostPid, PAGE_SIZE};
use libcontainer::oci_spec::runtime::Spec;
use serde_json::json;

use super::layer::Layer;
use super::{CheckpointArgs, Compression, Destination, Plan, Summary};
use crate::archive::{Compressor, Counter, NewFile};
use crate::criu::remote::{Server, send_to};
use crate::criu::tell_ready;
use crate::failure::Failure;
use crate::progress::Bar;
use crate::state::Container;
use crate::user_config::UserConfig;
use crate::{externals, previous};

/// Runs the engine. On failure the container runs on as it was found, and nothing of the images is left.
pub fn dump_container(plan: &Plan) -> Result<Summary, Failure> {
    let pid = plan.container.init.ok_or_else(|| no_process(plan.container))?.pid;
    let mut options = options(plan.container, plan.spec, plan.args)?;
    options.track_memory = plan.args.pre_dump;
    plan.worker.oversee(&mut options);
    let bar = Bar::new("checkpoint");
    options.progress = bar.progress();
    let (dumped, size) = match &plan.destination {
        Destination::Folder(folder) => into_folder(plan, pid, options, folder)?,
        Destination::Archive(path, method) => {
            let (new, file) = NewFile::create(path, &plan.worker.journal)?;
            into_archive(plan, pid, &options, file, Some(new), *method)?
        }
        Destination::Stream(method) => into_archive(plan, pid, &options, stdout()?, None, *method)?,
    };
    Ok(Summary {
        processes: dumped.processes,
        memory: (dumped.pages + dumped.lazy_pages) * PAGE_SIZE,
        pause: dumped.frozen,
        size,
    })
}

/// What the engine is to do with the container.
///
/// # Errors
/// When it has no process, or what lies outside of it cannot be told.
pub fn options(container: &Container, spec: &Spec, args: &CheckpointArgs) -> Result<DumpOptions, Failure> {
    let pid = container.init.ok_or_else(|| no_process(container))?.pid;
    let config = UserConfig::of(spec)?;
    let shell_job = args.shell_job || config.shell_job;
    let mut options = DumpOptions {
        after: if args.leave_running { After::Run } else { After::Kill },
        shell_job,
        freezer: Some(container.cgroup.freezer()?),
        cgroups: container.cgroup.options(args.manage_cgroups_mode)?,
        faults: Faults::new(args.fault.iter().copied()),
        ..DumpOptions::default()
    };
    if let Some(place) = args.page_server.as_deref().filter(|_| args.lazy_pages && !args.check) {
        let listener = TcpListener::bind(place).map_err(|error| {
            Failure::from(error).context(format!("--page-server {place}: cannot serve pages there"))
        })?;
        options.lazy = Some(Arc::new(PageOffer::Listener(listener)));
    }
    options.files.file_locks = args.file_locks || config.file_locks;
    options.files.ghost_limit = config.ghost_limit.unwrap_or(options.files.ghost_limit);
    options.files.skipped_mounts = config.skipped_mounts.clone();
    options.namespaces.skipped_mounts = config.skipped_mounts;
    if let Some(limit) = config.timeout {
        options.freeze_deadline = limit;
        options.standstill = Some(limit);
    }
    options.files.outside_stdio = true;
    options.files.of_bundle = true;
    options.namespaces.of_bundle = true;
    let has_terminal = spec.process().as_ref().is_some_and(|process| process.terminal().unwrap_or(false));
    options.files.outside_terminal = has_terminal || shell_job;
    let key = |path: &Path| path.display().to_string();
    let mut outside = externals::mounts(spec, &container.bundle, &container.rootfs, &container.cgroup);
    // A masked folder has an empty tmpfs of its own over it, which is saved like any other.
    let inside = Path::new("/proc").join(pid.to_string()).join("root");
    outside.retain(|point, source| {
        source != Path::new("/dev/null") || !inside.join(point.strip_prefix("/").unwrap_or(point)).is_dir()
    });
    options.namespaces.external_mounts = outside.into_keys().map(|path| (path.clone(), key(&path))).collect();
    options.namespaces.empty_net = !args.empty_ns.is_empty();
    for (kind, path) in externals::namespaces(spec) {
        let inode = fs::metadata(format!("/proc/{pid}/ns/{}", kind.name()))
            .map_err(|error| {
                Failure::from(error).context(format!("cannot look at the container's {} namespace", kind.name()))
            })?
            .ino();
        options.namespaces.external_namespaces.insert((kind, inode), externals::namespace_key(kind).to_owned());
        tracing::debug!("the {} namespace is {}", kind.name(), path.display());
    }
    Ok(options)
}

fn no_process(container: &Container) -> Failure {
    Failure::new(format!("container {} has no process", container.id))
}

fn into_folder(plan: &Plan, pid: i32, mut options: DumpOptions, folder: &Path) -> Result<(Dumped, u64), Failure> {
    let made = !folder.exists();
    if made {
        plan.worker.journal.path(folder);
    }
    fs::create_dir_all(folder).map_err(cannot_write(folder))?;
    let descriptors = folder.join(DESCRIPTORS);
    plan.worker.journal.path(&descriptors);
    let result = (|| {
        let previous = plan.args.parent_path.as_deref();
        let parent = previous.map(|previous| previous::take(folder, previous, &mut options)).transpose()?;
        // Whatever may fail comes before the container is ended.
        fs::write(&descriptors, stdio_json(pid)).map_err(cannot_write(&descriptors))?;
        let sink = FolderSink::open(folder, FolderOptions::default())?.with_parent(parent);
        let sink = sink.noted_in(options.journal.clone(), folder);
        // With lazy pages it says where they are fetched.
        let server = plan.args.page_server.as_deref().filter(|_| !plan.args.lazy_pages);
        let mut sink = send_to(server.map(Server::parse).transpose()?, sink, &mut options)?;
        let dumped = if plan.args.pre_dump {
            pre_dump(HostPid(pid), &mut *sink, &options)
        } else {
            dump_telling(HostPid(pid), &mut *sink, &options, &mut Ready(plan.args.status_fd))
        };
        let dumped = dumped.map_err(explain)?;
        let work = plan.work.as_deref().unwrap_or(folder);
        let stats = work.join("stats-dump");
        let written = fs::create_dir_all(work).and_then(|()| fs::write(&stats, dumped.stats_image()));
        if let Err(error) = written {
            tracing::warn!("the checkpoint is complete, but {} cannot be written: {error}", stats.display());
        }
        let size = size_of_images(&dumped);
        Ok((dumped, size))
    })();
    if result.is_err() {
        let _ = fs::remove_file(&descriptors);
        if made {
            let _ = fs::remove_dir(folder);
        }
    }
    result
}

/// Tells whoever gave the descriptor that pages can be fetched.
struct Ready(i32);

impl DumpListener for Ready {
    fn reached(&mut self, stage: DumpStage, _: HostPid) -> Result<(), String> {
        if stage != DumpStage::StatusReady || self.0 < 0 {
            return Ok(());
        }
        tell_ready(self.0).map_err(|failure| failure.to_string())
    }
}

/// Writes an archive into `file`, which becomes `new` when it is complete.
fn into_archive(
    plan: &Plan,
    pid: i32,
    options: &DumpOptions,
    file: File,
    mut new: Option<NewFile>,
    method: Compression,
) -> Result<(Dumped, u64), Failure> {
    let seekable = file.metadata().is_ok_and(|metadata| metadata.is_file());
    if method == Compression::None && seekable {
        let length = file.try_clone().map_err(Failure::from)?;
        let complete = move |sink: ArchiveSink<File>| {
            sink.close()?;
            new.take().map_or(Ok(()), NewFile::finish)
        };
        let dumped = fill(plan, pid, options, ArchiveSink::in_file(file)?, Box::new(complete))?;
        let size = length.metadata().map_err(Failure::from)?.len();
        return Ok((dumped, size));
    }
    let counter = Counter::new(file);
    let bytes = counter.bytes.clone();
    let complete = move |sink: ArchiveSink<Compressor<Counter<File>>>| {
        sink.close()?.finish().map_err(|error| Failure::from(error).context("cannot write the archive"))?;
        new.take().map_or(Ok(()), NewFile::finish)
    };
    let dumped = fill(plan, pid, options, ArchiveSink::new(Compressor::new(method, counter)?)?, Box::new(complete))?;
    Ok((dumped, bytes.load(Ordering::Relaxed)))
}

/// Writes the images and what stands beside them, in one pass.
fn fill<W: Write + Send>(
    plan: &Plan,
    pid: i32,
    options: &DumpOptions,
    mut sink: ArchiveSink<W>,
    complete: Complete<'_, W>,
) -> Result<Dumped, Failure> {
    sink.put_member("spec.dump", &serde_json::to_vec_pretty(&named_spec(plan))?)?;
    let beside = vec![("config.dump", serde_json::to_vec_pretty(&config(plan))?), (DESCRIPTORS, stdio_json(pid))];
    let mut layer = Layer::find(pid, plan.args.ignore_rootfs)?;
    let mut archive = Archive { sink: Some(sink), beside, complete };
    dump_telling(HostPid(pid), &mut archive, options, &mut layer).map_err(explain)
}

/// What is to be done when everything is in an archive.
type Complete<'a, W> = Box<dyn FnMut(ArchiveSink<W>) -> Result<(), Failure> + Send + 'a>;

/// An archive on its way. It is whole, and has its name, before the container is ended.
struct Archive<'a, W: Write + Send> {
    /// Until it is whole.
    sink: Option<ArchiveSink<W>>,
    /// What stands beside the images, besides the statistics.
    beside: Vec<(&'static str, Vec<u8>)>,
    complete: Complete<'a, W>,
}

impl<W: Write + Send> Archive<'_, W> {
    fn sink(&mut self, name: &str) -> Result<&mut ArchiveSink<W>, SinkError> {
        self.sink.as_mut().ok_or_else(|| SinkError::Finished { name: name.to_owned() })
    }
}

impl<W: Write + Send> Sink for Archive<'_, W> {
    fn put(&mut self, name: &str, content: &[u8]) -> Result<(), SinkError> {
        self.sink(name)?.put(name, content)
    }

    fn put_raw(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError> {
        self.sink(name)?.put_raw(name, content)
    }

    fn put_beside(&mut self, name: &str, content: &dyn Content) -> Result<(), SinkError> {
        self.sink(name)?.put_beside(name, content)
    }

    fn finish(&mut self, manifest: Manifest) -> Result<Manifest, SinkError> {
        self.sink("the manifest")?.finish(manifest)
    }

    fn seal(&mut self, dumped: &Dumped) -> Result<(), SinkError> {
        for (name, content) in std::mem::take(&mut self.beside) {
            self.sink(name)?.put_member(name, &content)?;
        }
        self.sink("stats-dump")?.put_member("stats-dump", &dumped.stats_image())?;
        let Some(sink) = self.sink.take() else { return Ok(()) };
        (self.complete)(sink).map_err(|failure| SinkError::Seal { problem: failure.to_string() })
    }
}

/// One sentence for a failed dump; several refusals are numbered in it.
fn explain(error: DumpError) -> Failure {
    let DumpError::Refused { refusals } = error else { return Failure::from(error) };
    match refusals.0.as_slice() {
        [one] => Failure::new(format!("the container cannot be checkpointed: {one}")),
        all => {
            let listed: Vec<String> =
                all.iter().zip(1..).map(|(refusal, number)| format!("({number}) {refusal}")).collect();
            Failure::new(format!(
                "the container cannot be checkpointed, for {} reasons: {}",
                all.len(),
                listed.join("; ")
            ))
        }
    }
}

/// The container's config, with its name where readers of archives look for it if no manager has left its own mark there.
fn named_spec(plan: &Plan) -> Spec {
    const MANAGER: &str = "io.container.manager";
    const NAME: &str = "io.kubernetes.cri.container-name";
    let mut spec = plan.spec.clone();
    let mut annotations = spec.annotations().clone().unwrap_or_default();
    if !annotations.contains_key(MANAGER) {
        annotations.entry(NAME.to_owned()).or_insert_with(|| plan.container.id.clone());
    }
    spec.set_annotations(Some(annotations));
    spec
}

/// Who the container is, in the fields that readers of Podman's archives look for.
fn config(plan: &Plan) -> serde_json::Value {
    let container = plan.container;
    json!({
        "id": container.id,
        "name": container.id,
        "rootfsImage": "",
        "rootfsImageRef": "",
        "rootfsImageName": container.rootfs.display().to_string(),
        "runtime": "ferry",
        "createdTime": container.created,
        "checkpointedTime": chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Micros, true),
    })
}

/// The file that runc keeps beside its images: what the first process's standard descriptors are.
pub const DESCRIPTORS: &str = "descriptors.json";

fn stdio_json(pid: i32) -> Vec<u8> {
    let target = |fd: i32| fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
    let targets: Vec<String> = (0..3).map(|fd| target(fd).to_string_lossy().into_owned()).collect();
    json!(targets).to_string().into_bytes()
}

fn size_of_images(dumped: &Dumped) -> u64 {
    dumped.manifest.iter().flat_map(|manifest| manifest.images.values()).map(|image| image.length).sum()
}

fn stdout() -> Result<File, Failure> {
    let stdout = io::stdout().as_fd().try_clone_to_owned();
    stdout.map(File::from).map_err(|error| Failure::from(error).context("cannot write to standard output"))
}

fn cannot_write(what: &Path) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure::from(error).context(format!("cannot write {}", what.display()))
}
