//! The namespaces of trees that live in ferry's own, and of those that do not.

use std::process::{Child, Command, Stdio};

use ferry_engine::images::ipc::IpcVarEntry;
use ferry_engine::images::net::NetDeviceEntry;
use ferry_engine::images::ns::{TimensEntry, UtsnsEntry};
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
    collected.dump_content(&mut sink).expect("dumps");
    collected.dump_records(&mut sink).expect("dumps");
    let source = FolderSource::open(folder.path()).expect("a source");
    assert_eq!(source.names().expect("names"), ["timens-0.img"]);
    let image = source.get("timens-0.img").expect("readable").expect("there");
    let clocks: TimensEntry = decode_one("timens-0.img", Kind::Timens, &image).expect("decodes");
    assert!(clocks.boottime.tv_sec >= clocks.monotonic.tv_sec && clocks.monotonic.tv_sec > 0);
}

#[test]
fn other_namespaces_are_saved_and_what_they_hold_is_refused_by_name() {
    let flags = libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWNET;
    let sleeper = Sleeper::start(flags);
    let task = sleeper.task();
    let collected = Collected::collect(&task, &[], &NamespaceOptions::default()).expect("collects");
    assert_eq!(collected.refusals(), []);
    let ids = collected.ids(task.pid).expect("it lives");
    assert_eq!((ids.get(NamespaceKind::Net), ids.get(NamespaceKind::Ipc), ids.get(NamespaceKind::Uts)), (9, 10, 11));
    let folder = tempfile::tempdir().expect("a folder");
    let mut sink = FolderSink::open(folder.path(), FolderOptions::default()).expect("a sink");
    collected.dump_content(&mut sink).expect("dumps");
    collected.dump_records(&mut sink).expect("dumps");
    let source = FolderSource::open(folder.path()).expect("a source");
    let image = source.get("utsns-11.img").expect("readable").expect("there");
    let names: UtsnsEntry = decode_one("utsns-11.img", Kind::Utsns, &image).expect("decodes");
    assert_eq!(names.nodename, rustix::system::uname().nodename().to_bytes());
    let image = source.get("netdev-9.img").expect("readable").expect("there");
    let link: NetDeviceEntry = decode_one("netdev-9.img", Kind::Netdev, &image).expect("decodes");
    assert_eq!((link.name.as_str(), link.flags & libc::IFF_UP as u32), ("lo", 0));
    let image = source.get("ipcns-var-10.img").expect("readable").expect("there");
    let limits: IpcVarEntry = decode_one("ipcns-var-10.img", Kind::IpcVar, &image).expect("decodes");
    assert!(limits.msg_ctlmax > 0 && limits.sem_ctls.len() == 4);

    // A message queue and a link beside the loopback, made by somebody in the namespaces.
    let pidfd = task.pidfd();
    let make = || {
        nix::sched::setns(pidfd, nix::sched::CloneFlags::from_bits_retain(flags)).expect("setns");
        let run = |program: &str, arguments: &[&str]| {
            let status = Command::new(program).args(arguments).stdout(Stdio::null()).status().expect(program);
            assert!(status.success(), "{program}");
        };
        run("ipcmk", &["-Q"]);
        run("ip", &["link", "add", "d0", "type", "bridge"]);
    };
    std::thread::scope(|scope| scope.spawn(make).join()).expect("the thread");
    let collected = Collected::collect(&task, &[], &NamespaceOptions::default()).expect("collects");
    let objects: Vec<&str> = collected.refusals().iter().map(|refusal| refusal.object.as_str()).collect();
    assert!(objects[0].starts_with("System V message queue 0 "), "{objects:?}");
    assert_eq!(objects[1..], ["network link d0"]);
    let empty = NamespaceOptions { empty_net: true, ..NamespaceOptions::default() };
    assert_eq!(Collected::collect(&task, &[], &empty).expect("collects").refusals().len(), 1);
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
