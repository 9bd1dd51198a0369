//! One restore, from images to the container's running tree.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};

use ferry_engine::fault::Faults;
use ferry_engine::file_tree::{DELETED_FILES, ROOTFS_DIFF};
use ferry_engine::images::{FolderSource, ImageSet, RawRegion, Source as ImageSource};
use ferry_engine::lazy::handshake::{Daemon, SOCKET};
use ferry_engine::namespaces::RestoreNamespaceOptions;
use ferry_engine::restore::{RestoreOptions, Stage, TakeTerminal, restore};
use ferry_engine::sys::HostPid;

use super::layer::{Layer, Members};
use super::{Plan, Source, config};
use crate::archive;
use crate::checkpoint::DESCRIPTORS;
use crate::ending::{self, Heeded};
use crate::externals;
use crate::failure::Failure;
use crate::progress::Bar;
use crate::user_config::UserConfig;

/// Runs the engine; `complete` gets the container's first process when all is there and nothing runs yet. On failure nothing of
/// the tree is left.
pub fn restore_tree(plan: &Plan, complete: &mut dyn FnMut(HostPid) -> Result<(), Failure>) -> Result<(), Failure> {
    let Opened { source, stdio, members, saved } = open(&plan.source)?;
    // Not before what a pipe has is read, which may take as long as whoever writes to it likes.
    let heeded = Heeded::heed()?;
    let images = ImageSet::open(source)?;
    let spec = &plan.bundle.spec;
    config::check(&images, saved, spec)?;
    let rootfs = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
    let layer = Layer::read(&images, members, &rootfs, plan.args.ignore_rootfs)?;
    let outside = externals::mounts(spec, &plan.bundle.directory, &rootfs, &plan.cgroup);
    let mut namespaces = RestoreNamespaceOptions {
        root: Some(rootfs),
        external_mounts: outside.into_iter().map(|(point, source)| (point.display().to_string(), source)).collect(),
        empty_net: !plan.args.empty_ns.is_empty(),
        mount_context: plan.args.lsm_mount_context.clone().filter(|context| !context.is_empty()),
        of_bundle: true,
        ..RestoreNamespaceOptions::default()
    };
    for (kind, path) in externals::namespaces(spec) {
        let file = File::open(&path)
            .map_err(|error| Failure::from(error).context(format!("cannot open the namespace {}", path.display())))?;
        namespaces.external_namespaces.insert(externals::namespace_key(kind).to_owned(), file.into());
    }
    let shell_job = plan.args.shell_job || UserConfig::of(spec)?.shell_job;
    let bar = Bar::new("restore");
    let options = RestoreOptions {
        memory: bar.progress(),
        shell_job,
        first_task: Some(Box::new(|root: HostPid| {
            plan.remains.janitor().root(root).map_err(|error| error.to_string())?;
            plan.cgroup.add(root.0).map_err(|error| format!("cannot put it into the container's cgroup: {error}"))
        })),
        namespaces,
        cgroups: plan.cgroup.options(plan.args.manage_cgroups_mode)?,
        notify: Some(Box::new(|stage, root| {
            let done = match stage {
                Stage::SetupNamespaces => plan.remains.run_hooks(root.0),
                Stage::PostRestore => complete(root),
                _ => Ok(()),
            };
            done.map_err(|failure| failure.to_string())?;
            layer.at_stage(stage)
        })),
        progress: Some(Box::new(|phase| layer.at_phase(phase, plan.remains))),
        names: Some(plan.remains.janitor().journal()),
        inherited: stdio_from_here(&stdio)?,
        terminal: crate::own_terminal::own_terminal(shell_job)?,
        terminal_master: plan.console.socket().map(|_| -> TakeTerminal<'_> {
            Box::new(|master| plan.console.pass(&master).map_err(|error| error.to_string()))
        }),
        lazy: plan.args.lazy_pages.then(|| daemon(plan)).transpose()?,
        cancel: ending::cancel(),
        faults: Faults::new(plan.args.fault.iter().copied()),
        ..RestoreOptions::default()
    };
    let restored = restore(&images, options)?;
    if !plan.args.detach {
        heeded.catch_up();
    }
    if let Some(work) = &plan.work {
        let stats = work.join("stats-restore");
        if let Err(error) = fs::write(&stats, restored.stats_image()) {
            tracing::warn!("the container runs, but {} cannot be written: {error}", stats.display());
        }
    }
    Ok(())
}

/// The daemon that brings pages.
fn daemon(plan: &Plan) -> Result<Daemon, Failure> {
    let Source::Folder(folder) = &plan.source else {
        return Err(Failure::new("--lazy-pages goes with --image-path: ferry criu lazy-pages reads folders of images"));
    };
    let folder = plan.work.as_ref().unwrap_or(folder);
    Daemon::connect(folder).map_err(|error| {
        Failure::from(error).context(format!(
            "--lazy-pages: nobody answers at {}: start ferry criu lazy-pages for the same images first",
            folder.join(SOCKET).display()
        ))
    })
}

/// A checkpoint, opened.
struct Opened {
    source: Box<dyn ImageSource>,
    /// What the first process's standard descriptors were, if that was kept.
    stdio: Option<Vec<u8>>,
    members: Members,
    /// The config that the container had.
    saved: Option<RawRegion>,
}

fn open(source: &Source) -> Result<Opened, Failure> {
    match source {
        Source::Folder(folder) => {
            let stdio = fs::read(folder.join(DESCRIPTORS)).ok();
            let source = Box::new(FolderSource::open(folder)?);
            Ok(Opened { source, stdio, members: Members::default(), saved: None })
        }
        Source::Archive(path) => from_archive(archive::open(path)?),
        Source::Stream => from_archive(archive::read(std::io::stdin())?),
    }
}

fn from_archive(archive: ferry_engine::images::ArchiveSource) -> Result<Opened, Failure> {
    let stdio = archive.member(DESCRIPTORS).map(|member| member.to_vec(DESCRIPTORS)).transpose()?;
    let members = Members { diff: archive.member(ROOTFS_DIFF), deleted: archive.member(DELETED_FILES) };
    let saved = archive.member(config::SAVED);
    Ok(Opened { source: Box::new(archive), stdio, members, saved })
}

/// Standard descriptors that were pipes lead to whoever restores, as with runc: their other ends are gone.
fn stdio_from_here(descriptors: &Option<Vec<u8>>) -> Result<ferry_engine::files::Inherited, Failure> {
    let mut inherited = ferry_engine::files::Inherited::new();
    let Some(json) = descriptors else { return Ok(inherited) };
    let targets: Vec<String> = serde_json::from_slice(json)
        .map_err(|error| Failure::from(error).context(format!("{DESCRIPTORS} of the checkpoint is damaged")))?;
    let own: [OwnedFd; 3] = [
        std::io::stdin().as_fd().try_clone_to_owned()?,
        std::io::stdout().as_fd().try_clone_to_owned()?,
        std::io::stderr().as_fd().try_clone_to_owned()?,
    ];
    for (target, descriptor) in targets.into_iter().zip(own) {
        if target.starts_with("pipe:") {
            inherited.insert(target, descriptor);
        }
    }
    Ok(inherited)
}
