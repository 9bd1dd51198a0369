//! Reading everything the kernel knows of a stopped tree.
//!
//! Each process is looked at from outside first; then its agent goes in, every thread answers one batch of questions,
//! and the agent goes out again.

use std::io;

use crate::agent::inject::{Context, Injected, Overseer};
use crate::agent::landing::Landings;
use crate::agent::{Call, Pending};
use crate::cgroups::CgroupSets;
use crate::error::Refusal;
use crate::fault::DumpStep;
use crate::files::{FilesCollector, FilesDump};
use crate::freeze::{StoppedProcess, StoppedTree};
use crate::images::core::CoreEntry;
use crate::images::fs::FsEntry;
use crate::images::ids::TaskKobjIdsEntry;
use crate::images::kind::Kind as Image;
use crate::images::mm::MmEntry;
use crate::images::seccomp::SeccompEntry;
use crate::memory::bounds;
use crate::memory::mappings::{self, Kind, Mapping};
use crate::memory::reader::{Found, PageReader};
use crate::memory::shmem::SharedObjects;
use crate::memory::staging::Staging;
use crate::namespaces;
use crate::procfs::Ids;
use crate::sys::robust::RobustList;
use crate::sys::{HostPid, NsPid};
use crate::task::process::{Process, dump_leader, dump_zombie};
use crate::task::refuse;
use crate::task::seccomp::FilterTable;
use crate::task::signals::Queues;
use crate::task::thread::{Thread, dump_thread};
use crate::task::{ProcessAnswers, ProcessOutside, ProcessQuestions, ThreadAnswers, ThreadOutside, ThreadQuestions};
use crate::tree::TaskRef;

use super::relations::{outside_job, shared_with_parent};
use super::{DumpError, DumpOptions};

/// A process as it is to be saved.
pub struct ProcessState {
    /// Who it is.
    pub task: TaskRef,
    /// Its ids at every level.
    pub ids: Ids,
    /// The parent's id in the tree's namespace; 0 for the root.
    pub parent: i32,
    /// `core` entries by the thread's id in its namespace, the leader's first.
    pub cores: Vec<(i32, CoreEntry)>,
    /// The address space; none for a zombie.
    pub mm: Option<MmEntry>,
    /// Working directory, root and umask; none for a zombie.
    pub fs: Option<FsEntry>,
    /// The pages to save.
    pub pages: Found,
}

impl ProcessState {
    /// Whether it has exited.
    pub fn is_zombie(&self) -> bool {
        self.mm.is_none()
    }

    /// The name of its pagemap image.
    pub fn pagemap_image(&self) -> String {
        Image::Pagemap.name_for(self.task.ns_pid.0 as u64)
    }
}

/// A tree as it is to be saved.
pub struct TreeState {
    /// Parents before children.
    pub processes: Vec<ProcessState>,
    /// The level of the tree's pid namespace below ferry's.
    pub level: usize,
    /// Shared memory.
    pub shared: SharedObjects,
    /// Descriptors.
    pub files: FilesDump,
    /// Seccomp filters.
    pub filters: SeccompEntry,
    /// Namespaces.
    pub namespaces: namespaces::Collected,
    /// The cgroups that tasks are in.
    pub cgroups: CgroupSets,
    /// Where pages have been copied to.
    pub staging: Staging,
    /// What only the stopped tree shows that it cannot be saved.
    pub refusals: Vec<Refusal>,
}

impl TreeState {
    /// How many pages are to be written.
    pub fn pages(&self) -> u64 {
        let private: u64 = self.processes.iter().map(|process| process.pages.runs.pages()).sum();
        private + self.shared.iter().map(|(_, object)| object.pages()).sum::<u64>()
    }
}

/// Collects the whole tree. On return no agent is left in it, whatever the result.
pub fn collect_tree(
    tree: &mut StoppedTree,
    options: &DumpOptions,
    list: &mut RobustList,
    reader: PageReader,
    mut cgroups: CgroupSets,
    landings: Landings,
) -> Result<TreeState, DumpError> {
    let root = tree.root().pid;
    // First of all, since that goes on meanwhile.
    let living = tree.processes.iter().filter(|process| !process.is_zombie());
    reader.read(living.map(|process| process.pid).collect(), tree.root().stat.processor as usize);
    let mut tasks = Vec::with_capacity(tree.processes.len());
    let mut all_ids = Vec::with_capacity(tree.processes.len());
    for process in &tree.processes {
        let ids = Ids::read(process.pid).map_err(DumpError::read(process.pid, "ids"))?;
        let task = TaskRef::open(process.pid, ids.innermost(), process.stat.comm.clone())
            .map_err(|errno| DumpError::Read { pid: process.pid, what: "pid", source: errno.into() })?;
        tasks.push(task);
        all_ids.push(ids);
    }
    let level = all_ids[0].pid.len() - 1;
    let namespaces = namespaces::Collected::collect(&tasks[0], &tasks, &options.namespaces)?;
    let mut refusals = namespaces.refusals().to_vec();
    refusals.extend(outside_job(&tasks[0], &all_ids[0], level, options));
    let files = FilesCollector::new(root, options.files.clone()).map_err(DumpError::read(root, "mounts"))?;
    let mut collector = Collector {
        files,
        shared: SharedObjects::default(),
        filters: FilterTable::default(),
        landings,
        refusals,
        list,
        options,
    };
    let mut processes: Vec<ProcessState> = Vec::with_capacity(tasks.len());
    for (index, ((task, ids), process)) in tasks.into_iter().zip(all_ids).zip(&mut tree.processes).enumerate() {
        collector.files.add_job(&task, &process.stat, &ids);
        let parent = processes.iter().find(|parent| parent.task.pid == process.parent);
        if let Some(parent) = parent.filter(|parent| !parent.is_zombie() && !process.is_zombie()) {
            collector.refusals.extend(shared_with_parent(&task, &parent.task));
        }
        let parent = parent.map_or(0, |parent| parent.task.ns_pid.0);
        let mut state = if !process.is_zombie() {
            let Some(mapped) = reader.next_mappings() else {
                reader.finish()?;
                return Err(DumpError::read(task.pid, "mappings")(io::ErrorKind::NotFound.into()));
            };
            let mut state = collector.process(task, ids, parent, process, &mapped)?;
            let tids = process.threads.iter().map(|thread| thread.tid);
            cgroups.add(tids.zip(state.cores.iter_mut().map(|(_, core)| core)))?;
            state
        } else {
            let cores = vec![(task.ns_pid.0, dump_zombie(&process.stat))];
            ProcessState { task, ids, parent, cores, mm: None, fs: None, pages: Found::default() }
        };
        let number = index as u32 + FIRST_OBJECT;
        name_objects(&mut state, number, &namespaces, &mut collector.files);
        processes.push(state);
    }
    let Collector { mut files, mut shared, filters, mut refusals, .. } = collector;
    let of_shared = DumpError::read(root, "shared memory");
    let parent = options.parent.as_deref();
    shared
        .collect_pages()
        .and_then(|()| parent.map_or(Ok(()), |parent| shared.leave_to(parent, &options.cancel)))
        .map_err(of_shared)?;
    refusals.extend(files.refusals());
    let (found, staging) = reader.finish()?;
    for (process, pages) in processes.iter_mut().filter(|process| !process.is_zombie()).zip(found) {
        process.pages = pages;
    }
    let (files, filters) = (files.finish(), filters.finish());
    Ok(TreeState { processes, level, shared, files, filters, namespaces, cgroups, staging, refusals })
}

/// Numbers of kernel objects in `ids` images; 1 is the dumper's own.
const FIRST_OBJECT: u32 = 2;

/// Fills in which objects the process uses. Objects shared between processes are refused before, but for descriptor tables.
fn name_objects(state: &mut ProcessState, number: u32, namespaces: &namespaces::Collected, files: &mut FilesCollector) {
    if state.is_zombie() {
        return;
    }
    let mut ids = TaskKobjIdsEntry { vm_id: number, fs_id: number, sighand_id: number, ..TaskKobjIdsEntry::default() };
    ids.files_id = files.add_task(&state.task);
    namespaces.fill(state.task.pid, &mut ids);
    if let Some((_, leader)) = state.cores.first_mut() {
        leader.ids = Some(ids);
    }
}

struct Collector<'a> {
    files: FilesCollector,
    shared: SharedObjects,
    filters: FilterTable,
    landings: Landings,
    refusals: Vec<Refusal>,
    list: &'a mut RobustList,
    options: &'a DumpOptions,
}

/// What a thread has said.
struct ThreadFacts {
    outside: ThreadOutside,
    answers: ThreadAnswers,
    ns_tid: i32,
}

/// What a process has said.
struct ProcessFacts {
    outside: ProcessOutside,
    answers: ProcessAnswers,
    /// Read when the agents were out again.
    queues: Queues,
    brk: u64,
    /// In the order of the stopped threads, the leader's first.
    threads: Vec<ThreadFacts>,
}

impl Collector<'_> {
    fn process(
        &mut self,
        task: TaskRef,
        ids: Ids,
        parent: i32,
        process: &mut StoppedProcess,
        mapped: &[Mapping],
    ) -> Result<ProcessState, DumpError> {
        let pid = task.pid;
        let read = |what| DumpError::read(pid, what);
        self.refusals.extend(mapped.iter().filter_map(|mapping| mappings::refusal(&task, mapping)));
        let facts = self.ask(&task, process, mapped)?;
        let mut mm = bounds::dump(
            &process.stat.bounds,
            facts.brk,
            bounds::collect_auxv(pid).map_err(read("auxiliary vector"))?,
            &facts.answers.settings,
        );
        mm.exe_file_id = self.files.add_exe(&task).unwrap_or(0);
        mm.vmas.reserve(mapped.len());
        // A program is mapped piece by piece, one behind the other.
        let mut last: Option<(&Mapping, u64)> = None;
        for mapping in mapped {
            let shmid = match mapping.kind {
                Kind::FilePrivate | Kind::FileShared => {
                    let known = last.filter(|(other, _)| mapping.is_of_same_file(other)).map(|(_, file)| file);
                    let file = known
                        .unwrap_or_else(|| self.files.add_mapping(&task, mapping.range.clone()).unwrap_or(0).into());
                    last = Some((mapping, file));
                    file
                }
                _ => self.shared.add(pid, mapping).map_err(read("shared memory"))?,
            };
            mm.vmas.push(mapping.dump(shmid));
        }
        let fs = FsEntry {
            cwd_id: self.files.add_cwd(&task).unwrap_or(0),
            root_id: self.files.add_root(&task).unwrap_or(0),
            umask: Some(ids.umask),
        };
        let cores = self.cores(process, &facts);
        Ok(ProcessState { task, ids, parent, cores, mm: Some(mm), fs: Some(fs), pages: Found::default() })
    }

    /// Has the threads of a process answer their questions, all at the same time.
    fn ask(
        &mut self,
        task: &TaskRef,
        process: &mut StoppedProcess,
        mapped: &[Mapping],
    ) -> Result<ProcessFacts, DumpError> {
        let mut outsides = Vec::with_capacity(process.threads.len());
        for thread in &mut process.threads {
            let outside = ThreadOutside::collect(thread.tid, thread.stop, &mut thread.context)?;
            outsides.push(outside);
        }
        let outside = ProcessOutside::collect(task.pid)?;
        let foothold = self.landings.foothold(task.pid, mapped)?;
        let contexts: Vec<(HostPid, &Context)> =
            process.threads.iter().map(|thread| (thread.tid, &thread.context)).collect();
        let pass = |step| self.options.step(step);
        let overseer = Overseer { journal: self.options.journal.as_ref(), pass: &pass };
        let mut agents = Injected::new(task.pid, contexts[0].1, foothold, contexts.len() - 1, self.list, overseer)?;
        let result = ask_all(&mut agents, &contexts, outside, outsides, self.list, self.options);
        let left = agents.leave();
        self.list.clear();
        let (outside, answers, brk, threads) = result?;
        left?;
        self.options.step(DumpStep::Left)?;
        let queues = Queues::collect(process.threads.iter().map(|thread| thread.tid))?;
        let facts = ProcessFacts { outside, answers, queues, brk, threads };
        self.refusals.extend(refuse::check_process(task, &facts.outside, facts.threads.len()));
        for thread in &facts.threads {
            let tid = NsPid(thread.ns_tid);
            self.refusals.extend(refuse::check_thread(task, tid, &thread.outside, &thread.answers));
        }
        Ok(facts)
    }

    fn cores(&mut self, process: &StoppedProcess, facts: &ProcessFacts) -> Vec<(i32, CoreEntry)> {
        let whole = Process { outside: &facts.outside, answers: &facts.answers, queues: &facts.queues };
        let mut cores = Vec::with_capacity(facts.threads.len());
        for (place, (stopped, said)) in process.threads.iter().zip(&facts.threads).enumerate() {
            let thread = Thread { place, context: &stopped.context, outside: &said.outside, answers: &said.answers };
            let core = if place == 0 {
                dump_leader(thread, whole, stopped.stop, &process.stat, &mut self.filters)
            } else {
                dump_thread(thread, whole, &mut self.filters)
            };
            cores.push((said.ns_tid, core));
        }
        cores
    }
}

/// One batch for each thread; the leader's also asks for what the process shares.
fn ask_all(
    agents: &mut Injected<'_>,
    contexts: &[(HostPid, &Context)],
    outside: ProcessOutside,
    outsides: Vec<ThreadOutside>,
    list: &mut RobustList,
    options: &DumpOptions,
) -> Result<(ProcessOutside, ProcessAnswers, u64, Vec<ThreadFacts>), DumpError> {
    for (tid, context) in &contexts[1..] {
        options.step(DumpStep::Enter)?;
        agents.enter(*tid, context, list)?;
    }
    options.step(DumpStep::Enter)?;
    let mut pending: Vec<(Pending<'_>, ThreadQuestions, Call)> = Vec::with_capacity(contexts.len());
    let mut of_process = None;
    for runner in agents.runners() {
        let mut batch = runner.batch();
        let questions = ThreadQuestions::ask(&mut batch);
        let gettid = batch.call(libc::SYS_gettid, &[]);
        if of_process.is_none() {
            of_process = Some((ProcessQuestions::ask(&mut batch, &outside), batch.call(libc::SYS_brk, &[0])));
        }
        pending.push((batch.submit()?, questions, gettid));
    }
    options.step(DumpStep::Batch)?;
    let mut firsts = Vec::with_capacity(contexts.len());
    let mut leader = None;
    for (pending, questions, gettid) in pending {
        let answers = pending.wait()?;
        firsts.push((questions.answers(&answers)?, answers.value(gettid)? as i32));
        leader.get_or_insert(answers);
    }
    let none = || DumpError::Read { pid: contexts[0].0, what: "threads", source: io::ErrorKind::NotFound.into() };
    let ((questions, brk), leader) = of_process.zip(leader).ok_or_else(none)?;
    let ns_tid = |tid: HostPid| {
        let index = contexts.iter().position(|(other, _)| *other == tid);
        NsPid(index.map_or(0, |index| firsts[index].1))
    };
    let answers = questions.answers(&leader, ns_tid)?;
    let brk = leader.value(brk)?;
    let mut threads = Vec::with_capacity(contexts.len());
    for (((first, ns_tid), outside), runner) in firsts.into_iter().zip(outsides).zip(agents.runners()) {
        threads.push(ThreadFacts { outside, answers: first.complete(runner)?, ns_tid });
    }
    options.step(DumpStep::Answers)?;
    Ok((outside, answers, brk, threads))
}
