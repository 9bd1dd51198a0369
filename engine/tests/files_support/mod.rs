//! What the tests of descriptors share: tasks that hold something, and tasks to restore into.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use ferry_engine::agent::{Area, NODE, Runner, watch};
use ferry_engine::files::{FilesCollector, FilesDump, FilesOptions, Inherited, RestorePlan, RestoreTask, Terminals};
use ferry_engine::images::{Kind, encode};
use ferry_engine::sys::clone::{FirstTask, clone_into_runner};
use ferry_engine::sys::robust::RobustList;
use ferry_engine::sys::{HostPid, NsPid, RemoteAddr, pidfd};
use ferry_engine::tree::TaskRef;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};

/// A process that only sleeps, and holds descriptors.
pub struct Holder {
    child: Child,
    task: TaskRef,
}

impl Holder {
    /// Starts one that inherits `descriptors` under their numbers, and nothing else but /dev/null.
    pub fn start(descriptors: &[BorrowedFd<'_>]) -> Self {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock();
        close_all_by_exec();
        for descriptor in descriptors {
            fcntl_setfd(descriptor, FdFlags::empty()).expect("F_SETFD");
        }
        let child = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sleep starts");
        for descriptor in descriptors {
            fcntl_setfd(descriptor, FdFlags::CLOEXEC).expect("F_SETFD");
        }
        // While it becomes `sleep` it has descriptors of its loader's.
        while !std::fs::read_to_string(format!("/proc/{}/wchan", child.id())).expect("wchan").contains("nanosleep") {
            std::thread::yield_now();
        }
        let pid = HostPid(child.id() as i32);
        let task = TaskRef::open(pid, NsPid(pid.0), "sleep".into()).expect("pidfd");
        Self { child, task }
    }

    pub fn pid(&self) -> HostPid {
        HostPid(self.child.id() as i32)
    }

    pub fn task(&self) -> &TaskRef {
        &self.task
    }

    /// A collector that has seen this process.
    pub fn collect(&self, options: FilesOptions) -> FilesCollector {
        let mut collector = FilesCollector::new(self.pid(), options).expect("a collector");
        collector.add_task(&self.task);
        collector
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Marks every descriptor but the standard ones close-on-exec: whoever started the test may have left some open.
#[allow(unsafe_code)]
fn close_all_by_exec() {
    // SAFETY: takes numbers, and closes nothing.
    let result = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    assert_eq!(result, 0, "close_range");
}

/// All images of a dump, by name.
pub fn images(dump: &FilesDump) -> BTreeMap<String, Vec<u8>> {
    let mut images: BTreeMap<String, Vec<u8>> = dump.images.iter().cloned().collect();
    images.insert(Kind::Files.name(), encode(Kind::Files, &dump.files));
    for (number, entries) in &dump.fdinfo {
        images.insert(Kind::Fdinfo.name_for(*number), encode(Kind::Fdinfo, entries));
    }
    images
}

/// A plan for tasks given as their parent's place and the number of their table.
pub fn plan(
    images: &BTreeMap<String, Vec<u8>>,
    tasks: &[(Option<usize>, u32)],
    inherited: Inherited,
) -> Result<RestorePlan, ferry_engine::files::RestoreFilesError> {
    let tasks = tasks.iter().enumerate().map(|(index, (parent, files_id))| RestoreTask {
        pid: NsPid(index as i32 + 1),
        comm: format!("task{index}"),
        parent: *parent,
        files_id: *files_id,
        session: 0,
        early: false,
    });
    RestorePlan::new(&mut |name| Ok(images.get(name).cloned()), tasks.collect(), inherited, Terminals::default())
}

/// Fresh tasks in runners, the first cloned from this process.
pub struct Tasks {
    pub runners: Vec<Runner>,
    area: Area,
    list: RobustList,
    pidfds: Vec<OwnedFd>,
}

impl Tasks {
    const SLOT: usize = 64 << 10;

    /// Clones the first task.
    pub fn start() -> Self {
        const LEN: usize = 1 << 20;
        let memory = memfd_create("area", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&memory, LEN as u64).expect("ftruncate");
        let mut area = Area::inherited(&memory, LEN, RemoteAddr(0x1000_0000_0000)).expect("an area");
        let mut list = RobustList::install(NODE).expect("robust list");
        let slot = area.slot(Self::SLOT).expect("a slot");
        watch(&mut list, &slot);
        let pid = clone_into_runner(FirstTask::default(), area.code(), slot.remote()).expect("clone");
        let pidfds = vec![pidfd::open(pid).expect("pidfd")];
        Self { runners: vec![Runner::new(pid, slot)], area, list, pidfds }
    }

    /// Has task `parent` clone another one.
    pub fn fork(&mut self, parent: usize) {
        let slot = self.area.slot(Self::SLOT).expect("a slot");
        watch(&mut self.list, &slot);
        let mut batch = self.runners[parent].batch();
        let call = batch.clone_call(libc::SYS_clone, &[libc::SIGCHLD as u64], slot.remote());
        let pid = HostPid(batch.run().expect("batch").value(call).expect("clone") as i32);
        self.pidfds.push(pidfd::open(pid).expect("pidfd"));
        self.runners.push(Runner::new(pid, slot));
    }

    /// Carries out a plan whose task list names the parents in `parents` for all but the first.
    pub fn restore(plan: &mut RestorePlan, parents: &[usize]) -> Result<Self, ferry_engine::files::RestoreFilesError> {
        let mut tasks = Self::start();
        plan.prepare(&tasks.runners[0], &[], None)?;
        for task in 0..=parents.len() {
            if task > 0 {
                tasks.fork(parents[task - 1]);
            }
            plan.create(task, &tasks.runners[task])?;
        }
        for (task, runner) in tasks.runners.iter().enumerate() {
            plan.place(task, runner)?;
        }
        plan.finish()?;
        Ok(tasks)
    }

    pub fn pid(&self, task: usize) -> HostPid {
        self.runners[task].tid()
    }

    /// A duplicate of a task's descriptor.
    pub fn descriptor(&self, task: usize, fd: i32) -> OwnedFd {
        pidfd::get_fd(self.pidfds[task].as_fd(), fd).expect("pidfd_getfd")
    }

    /// A field of a descriptor's fdinfo.
    pub fn info(&self, task: usize, fd: i32, key: &str) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", self.pid(task))).expect("fdinfo");
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("{key} in {text}")).trim().to_owned()
    }

    /// Status flags and access mode, and whether the descriptor is closed by execve(2).
    pub fn flags(&self, task: usize, fd: i32) -> u32 {
        u32::from_str_radix(&self.info(task, fd, "flags"), 8).expect("octal")
    }

    pub fn link(&self, task: usize, fd: i32) -> String {
        let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", self.pid(task))).expect("a link");
        link.to_string_lossy().into_owned()
    }

    /// The numbers of all descriptors of a task.
    pub fn numbers(&self, task: usize) -> Vec<i32> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid(task))).expect("fd");
        let mut numbers: Vec<i32> =
            entries.filter_map(|entry| entry.expect("an entry").file_name().to_string_lossy().parse().ok()).collect();
        numbers.sort_unstable();
        numbers
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.list.clear();
        for (runner, pidfd) in self.runners.iter().zip(&self.pidfds).rev() {
            let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
            let _ = rustix::process::waitpid(
                rustix::process::Pid::from_raw(runner.tid().0),
                rustix::process::WaitOptions::empty(),
            );
        }
    }
}

/// A directory that is removed at the end.
pub struct Scratch(pub std::path::PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ferry-files-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn raw(descriptor: &impl AsRawFd) -> i32 {
    descriptor.as_raw_fd()
}
