//! `criu restore`.

use std::os::fd::AsFd;
use std::time::Duration;

use ferry_engine::fault::Faults;
use ferry_engine::images::folder::FolderSource;
use ferry_engine::images::{ImageSet, Kind};
use ferry_engine::namespaces::RestoreNamespaceOptions;
use ferry_engine::restore::{RestoreOptions, Stage, TakeTerminal, restore};
use ferry_engine::sys::{HostPid, pidfd};
use ferry_hooks::Event;

use super::listen::{Client, Listeners};
use super::options::Options;
use super::{images_dir, outside, stats, work_dir, write_new};
use crate::ending::{self, Heeded};
use crate::failure::Failure;
use crate::janitor::Janitor;
use crate::pid_file::PidFile;

/// Restores the tree; `client` is told of stages, besides action scripts. The root's pid.
pub fn run(options: &Options, client: Option<&dyn Client>) -> Result<HostPid, Failure> {
    let images = ImageSet::open(Box::new(FolderSource::open(images_dir(options))?))?;
    super::cpuinfo::check(options, &images)?;
    let listeners = Listeners::new(options, client);
    listeners.tell(Event::PreRestore, None)?;
    let heeded = Heeded::heed()?;
    let janitor = Janitor::hire(|_| || ())
        .map_err(|error| Failure::from(error).context("cannot start the process that watches over the restore"))?;
    let mut pid_file = None;
    let mut reached = |stage, root: HostPid| {
        if stage == Stage::PostRestore
            && let Some(path) = &options.pidfile
        {
            let written = PidFile::write(path, root.0, Some(&janitor)).map_err(|failure| failure.to_string())?;
            pid_file = Some(written);
        }
        listeners.restoring(stage, root)
    };
    let restored = restore(
        &images,
        RestoreOptions {
            terminal_master: client.filter(|client| client.takes_terminal()).map(|client| -> TakeTerminal<'_> {
                Box::new(|master| client.take_terminal(&master).map_err(|failure| failure.to_string()))
            }),
            first_task: Some(Box::new(|root| janitor.root(root).map_err(|error| error.to_string()))),
            names: Some(janitor.journal()),
            notify: Some(Box::new(&mut reached)),
            ..restore_options(options)?
        },
    )
    .map_err(|error| match error.is_pid_taken() {
        true => Failure::from(error).with_errno(libc::EEXIST),
        false => Failure::from(error),
    })?;
    // The tree runs: what is left to do is no reason to fail.
    pid_file.into_iter().for_each(PidFile::keep);
    drop(janitor);
    let image = restored.stats_image();
    let file = work_dir(options).join("stats-restore");
    if let Err(error) = write_new(&file, &image) {
        tracing::warn!("the tree runs, but {} cannot be written: {error}", file.display());
    }
    if options.display_stats {
        stats::print(Kind::StatsRestore, &image)?;
    }
    tracing::info!("Restore finished successfully. Tasks resumed.");
    // The command that takes this process's place waits for it.
    if !options.restore_detached && !options.exec_cmd {
        heeded.catch_up();
        await_end(restored.pid)?;
    }
    Ok(restored.pid)
}

fn await_end(root: HostPid) -> Result<(), Failure> {
    let task = pidfd::open(root)?;
    while pidfd::wait_gone(task.as_fd(), Duration::from_secs(3600)).is_err() {}
    Ok(())
}

fn restore_options<'a>(options: &Options) -> Result<RestoreOptions<'a>, Failure> {
    super::lsm::check(options.lsm_profile.as_deref())?;
    let mut restore = RestoreOptions {
        shell_job: options.shell_job,
        terminal: crate::own_terminal::own_terminal(options.shell_job)?,
        sibling: options.restore_sibling,
        lazy: options.lazy_pages.then(|| super::lazy::daemon(options)).transpose()?,
        leave_stopped: options.leave_stopped,
        cancel: ending::cancel(),
        faults: Faults::new(options.fault.iter().copied()),
        cgroups: super::cgroups::options(options)?,
        ..RestoreOptions::default()
    };
    restore.namespaces = RestoreNamespaceOptions {
        root: options.root.clone(),
        empty_net: options.empty_ns.iter().any(|kind| kind == "net"),
        mount_context: options.lsm_mount_context.clone(),
        ..RestoreNamespaceOptions::default()
    };
    outside::for_restore(options, &mut restore)?;
    Ok(restore)
}
