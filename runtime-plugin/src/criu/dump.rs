//! `criu dump` and `criu pre-dump`.

use std::sync::Arc;
use std::time::Duration;

use ferry_engine::dump::{After, DumpError, DumpOptions, Dumped, dump_telling, pre_dump};
use ferry_engine::fault::Faults;
use ferry_engine::freeze::FreezeError;
use ferry_engine::images::{FolderOptions, FolderSink, Kind, Sink};
use ferry_engine::procfs::Stat;
use ferry_engine::sys::HostPid;

use super::listen::{Client, Listeners};
use super::options::Options;
use super::remote::{self, Server};
use super::{freezer, images_dir, outside, parse_size, stats, work_dir, write_new};
use crate::failure::Failure;
use crate::guard::Worker;
use crate::previous;

/// Dumps the tree; `client` is told of stages, besides action scripts. It is the work of `worker`, which is watched over.
pub fn run(options: &Options, client: Option<&dyn Client>, worker: &Worker) -> Result<(), Failure> {
    let pid = options.tree.ok_or_else(|| Failure::new("dump needs --tree PID, the root of the process tree"))?;
    let mut dump_options = dump_options(options)?;
    if let Some(client) = client {
        // Runtimes note what pipes the root's standard descriptors are, and hand their own to the restored one.
        dump_options.files.outside_stdio = true;
        dump_options.files.outside_pipes = true;
        dump_options.files.requested_by = client.connection();
        dump_options.files.outside_terminal |= client.takes_terminal();
    }
    if is_above_us(HostPid(pid)) {
        return Err(within_tree(pid));
    }
    let mut sink = begin(options, &mut dump_options, worker)?;
    let dumped = dump_telling(HostPid(pid), &mut *sink, &dump_options, &mut Listeners::new(options, client));
    tell(options, &dumped.map_err(failure)?)?;
    tracing::info!("Dumping finished successfully");
    Ok(())
}

/// Saves the tree's memory only, for a later dump; the tree runs on. Nobody is told of stages, as with CRIU.
pub fn run_pre_dump(options: &Options, worker: &Worker) -> Result<(), Failure> {
    let pid = options.tree.ok_or_else(|| Failure::new("pre-dump needs --tree PID, the root of the process tree"))?;
    let mut dump_options = dump_options(options)?;
    if is_above_us(HostPid(pid)) {
        return Err(within_tree(pid));
    }
    let mut sink = begin(options, &mut dump_options, worker)?;
    let dumped = pre_dump(HostPid(pid), &mut *sink, &dump_options).map_err(failure)?;
    tell(options, &dumped)?;
    tracing::info!("Pre-dumping finished successfully");
    Ok(())
}

/// Opens the image folder, and that of earlier images, and connects to the page server if there is one.
fn begin(options: &Options, dump_options: &mut DumpOptions, worker: &Worker) -> Result<Box<dyn Sink>, Failure> {
    worker.oversee(dump_options);
    let folder = images_dir(options);
    let previous = options.prev_images_dir.as_deref();
    let parent = previous.map(|previous| previous::take(folder, previous, dump_options)).transpose()?;
    let sink = FolderSink::open(folder, FolderOptions::default())?.with_parent(parent);
    let sink = sink.noted_in(dump_options.journal.clone(), folder);
    // With lazy pages it says where they are fetched.
    let server = (options.page_server && !options.lazy_pages).then(|| Server::of(options)).transpose()?;
    remote::send_to(server, sink, dump_options)
}

/// Writes and prints the statistics.
fn tell(options: &Options, dumped: &Dumped) -> Result<(), Failure> {
    let image = dumped.stats_image();
    write_new(&work_dir(options).join("stats-dump"), &image)
        .map_err(|error| Failure::new(format!("the dump is complete, but stats-dump cannot be written: {error}")))?;
    if options.display_stats {
        stats::print(Kind::StatsDump, &image)?;
    }
    Ok(())
}

fn failure(error: DumpError) -> Failure {
    match error {
        DumpError::Freeze(FreezeError::NoProcess { .. }) => Failure::from(error).with_errno(libc::ESRCH),
        error => error.into(),
    }
}

fn within_tree(pid: i32) -> Failure {
    // Clients know this sentence.
    Failure::new(format!(
        "The criu itself is within dumped tree: process {pid} started this command; dump it from outside"
    ))
}

/// Whether a process is this one or one that it descends from.
fn is_above_us(pid: HostPid) -> bool {
    let mut above = HostPid(std::process::id() as i32);
    while above.0 > 0 {
        if above == pid {
            return true;
        }
        above = HostPid(Stat::read(above).map_or(0, |stat| stat.parent));
    }
    false
}

/// What the engine is to do, as the options say.
///
/// # Errors
/// When they contradict each other or name what is not there.
pub fn dump_options(options: &Options) -> Result<DumpOptions, Failure> {
    let mut dump = DumpOptions {
        after: match (options.leave_running, options.leave_stopped) {
            (true, true) => return Err(Failure::new("--leave-running and --leave-stopped exclude each other")),
            (true, false) => After::Run,
            (false, true) => After::Stop,
            (false, false) => After::Kill,
        },
        shell_job: options.shell_job,
        freezer: options.freeze_cgroup.as_deref().map(freezer::named).transpose()?,
        faults: Faults::new(options.fault.iter().copied()),
        ..DumpOptions::default()
    };
    match options.timeout {
        None => {}
        // As with CRIU, no limit: a century.
        Some(0) => dump.freeze_deadline = Duration::from_secs(u64::from(u32::MAX)),
        Some(seconds) => {
            dump.freeze_deadline = Duration::from_secs(seconds);
            dump.standstill = Some(dump.freeze_deadline);
        }
    }
    if let Some(limit) = &options.ghost_limit {
        dump.files.ghost_limit = parse_size(limit)?;
    }
    if options.lazy_pages {
        dump.lazy = Some(Arc::new(super::lazy::offer(options)?));
    }
    dump.cgroups = super::cgroups::options(options)?;
    dump.track_memory = options.track_mem;
    dump.cpuinfo = super::cpuinfo::is_wanted(options)?;
    dump.files.file_locks = options.file_locks;
    dump.files.outside_stdio = options.shell_job;
    dump.files.outside_terminal = options.shell_job;
    dump.namespaces.empty_net = options.empty_ns.iter().any(|kind| kind == "net");
    outside::for_dump(options, &mut dump)?;
    Ok(dump)
}
