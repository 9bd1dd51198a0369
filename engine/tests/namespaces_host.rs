//! The namespaces of trees that live in ferry's own, and of those that do not.

use std::process::{Child, Command, Stdio};

use ferry_engine::images::ns::TimensEntry;
use ferry_engine::images::{FolderOptions, FolderSink, FolderSource, Kind, Source, decode_one};
use ferry_engine::namespaces::{Collected, NamespaceKind, NamespaceOptions};
use ferry_engine::sys::{HostPid, NsPid};
use ferry_engine::tree::TaskRef;

struct Sleeper(Child);

impl Sleeper {
    /// Starts one with new namespaces: a thread leaves ferry's for it.
    fn start(flags: i32) -> Self {
        let spawn = move || {
            nix::sched::unshare(nix::sched::CloneFlags::from_bits_retain(flags)).expect("unshare");
            Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().expect("sleep starts")
        };
        Self(std::thread::spawn(spawn).join().expect("the thread"))
    }

    fn task(&self) -> TaskRef {
        let pid = self.0.id() as i32;
        TaskRef::open(HostPid(pid), NsPid(pid), "sleep".into()).expect("it lives")
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_tree_in_ferrys_own_namespaces_has_ferrys_numbers() {
    let sleepers = [Sleeper::start(0), Sleeper::start(0)];
    let tasks: Vec<TaskRef> = sleepers.iter().map(Sleeper::task).collect();
    let collected = Collected::collect(&tasks[0], &tasks, &NamespaceOptions::default()).expect("collects");
    assert_eq!(collected.refusals(), []);
    for task in &tasks {
        assert_eq!(collected.ids(task.pid), Some(collected.own_ids()));
    }
    assert_eq!((collected.own_ids().get(NamespaceKind::Pid), collected.own_ids().get(NamespaceKind::Cgroup)), (1, 8));

    let folder = tempfile::tempdir().expect("a folder");
    let mut sink = FolderSink::open(folder.path(), FolderOptions::default()).expect("a sink");
    collected.dump(&mut sink).expect("dumps");
    let source = FolderSource::open(folder.path()).expect("a source");
    assert_eq!(source.names().expect("names"), ["timens-0.img"]);
    let image = source.get("timens-0.img").expect("readable").expect("there");
    let clocks: TimensEntry = decode_one("timens-0.img", Kind::Timens, &image).expect("decodes");
    assert!(clocks.boottime.tv_sec >= clocks.monotonic.tv_sec && clocks.monotonic.tv_sec > 0);
}

#[test]
fn a_tree_with_two_namespaces_of_a_kind_is_refused_by_name() {
    let sleepers = [Sleeper::start(0), Sleeper::start(libc::CLONE_NEWUTS), Sleeper::start(libc::CLONE_NEWPID)];
    let tasks: Vec<TaskRef> = sleepers.iter().map(Sleeper::task).collect();
    let collected = Collected::collect(&tasks[0], &tasks, &NamespaceOptions::default()).expect("collects");
    let refused: Vec<(NsPid, &str)> =
        collected.refusals().iter().map(|refusal| (refusal.pid, refusal.object.as_str())).collect();
    assert_eq!(refused, [(tasks[1].ns_pid, "uts namespace"), (tasks[2].ns_pid, "pid namespace")]);
    assert_ne!(collected.ids(tasks[1].pid), Some(collected.own_ids()));
}
