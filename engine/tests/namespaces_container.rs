//! Namespaces as a container has them: made by hand, dumped, and made again in a root task that sits in a runner.
//!
//! What is compared is what the kernel says of both: mountinfo, names, limits, links, and content.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use ferry_engine::agent::{Area, Runner};
use ferry_engine::images::ids::TaskKobjIdsEntry;
use ferry_engine::images::inventory::InventoryEntry;
use ferry_engine::images::pstree::PstreeEntry;
use ferry_engine::images::{FolderOptions, FolderSink, FolderSource, ImageSet, Kind, Manifest, Sink, encode};
use ferry_engine::namespaces::{
    Collected, MountTable, NamespaceKind, NamespaceOptions, RestoreNamespaceOptions, RestorePlan,
};
use ferry_engine::sys::clone::{FirstTask, clone_into_runner};
use ferry_engine::sys::{HostPid, NsPid, RemoteAddr};
use ferry_engine::tree::TaskRef;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags};

/// A bundle: the new root, and a folder to be bound into it.
struct Bundle {
    folder: tempfile::TempDir,
}

impl Bundle {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["rootfs/proc", "rootfs/sys", "rootfs/dev", "rootfs/data", "rootfs/tmp", "rootfs/old", "data"] {
            fs::create_dir_all(folder.path().join(name)).expect("a folder");
        }
        fs::write(folder.path().join("data/hello"), "hello").expect("a file");
        Self { folder }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("rootfs")
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }
}

/// Runs a script that changes the root, makes the file `ready` in the new one, and sleeps.
fn run_until(busybox: &Path, script: &str, folder: &Path, ready: &Path) -> Child {
    let mut command = Command::new(busybox);
    let mut child =
        command.args(["ash", "-c", script]).current_dir(folder).stdout(Stdio::null()).spawn().expect("it starts");
    while !ready.exists() {
        assert_eq!(child.try_wait().expect("wait"), None, "the script ended early");
        std::thread::yield_now();
    }
    child
}

/// The program that stands for a container's init.
struct Init(Child);

impl Init {
    /// Starts it in new namespaces of all kinds that containers have, with the mounts of one.
    fn start(bundle: &Bundle) -> Self {
        let (root, data) = (bundle.root(), bundle.data());
        let start = move || {
            let flags = CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWUTS
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWCGROUP;
            unshare(flags).expect("unshare");
            rustix::system::sethostname(b"ferry-test").expect("sethostname");
            fs::write("/proc/sys/kernel/msgmax", "12345").expect("msgmax");
            // Longer than the first read of a careless reader.
            fs::write("/proc/sys/kernel/sem", "1152148432 1822890469 1214363175 6929").expect("sem");
            fs::write("/proc/sys/net/ipv4/conf/default/rp_filter", "2").expect("rp_filter");
            // Forwarding resets the other.
            fs::write("/proc/sys/net/ipv4/conf/all/forwarding", "1").expect("forwarding");
            fs::write("/proc/sys/net/ipv4/conf/all/accept_redirects", "1").expect("accept_redirects");
            for arguments in [&["link", "set", "lo", "up"][..], &["addr", "add", "10.9.8.7/32", "dev", "lo"]] {
                assert!(Command::new("ip").args(arguments).status().expect("ip").success());
            }
            // The mounts are made by a thread, but proc has to be mounted inside the pid namespace: its init does it.
            rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
                .expect("private");
            rustix::mount::mount_bind(&root, &root).expect("bind the root");
            let at = |path: &str| root.join(path);
            let tmpfs = |path: &str, flags, data: &str| {
                rustix::mount::mount(
                    "tmpfs",
                    at(path),
                    "tmpfs",
                    flags,
                    Some(&*std::ffi::CString::new(data).expect("text")),
                )
                .unwrap_or_else(|error| panic!("tmpfs at {path}: {error}"));
            };
            tmpfs("dev", MountFlags::NOSUID, "size=65536k,mode=755");
            for name in ["null", "zero"] {
                fs::write(at("dev").join(name), "").expect("a file");
            }
            fs::remove_file(at("dev/null")).expect("remove");
            let number = rustix::fs::makedev(1, 3);
            rustix::fs::mknodat(
                rustix::fs::CWD,
                at("dev/null"),
                rustix::fs::FileType::CharacterDevice,
                0o666.into(),
                number,
            )
            .expect("mknod");
            for name in ["pts", "shm", "mqueue"] {
                fs::create_dir(at("dev").join(name)).expect("a folder");
            }
            let plain = MountFlags::NOSUID | MountFlags::NOEXEC;
            rustix::mount::mount("devpts", at("dev/pts"), "devpts", plain, Some(c"mode=620,ptmxmode=666"))
                .expect("devpts");
            tmpfs("dev/shm", plain | MountFlags::NODEV, "size=4m");
            fs::write(at("dev/shm/deep"), vec![7; 100_000]).expect("a file");
            rustix::mount::mount("mqueue", at("dev/mqueue"), "mqueue", plain, None).expect("mqueue");
            rustix::mount::mount("sysfs", at("sys"), "sysfs", plain | MountFlags::RDONLY, None).expect("sysfs");
            tmpfs("sys/firmware", MountFlags::RDONLY, "");
            rustix::mount::mount_bind(&data, at("data")).expect("bind data");
            rustix::mount::mount_remount(at("data"), MountFlags::BIND | MountFlags::RDONLY, "").expect("read-only");
            tmpfs("tmp", MountFlags::NODEV, "size=1m");
            fs::write(at("tmp/file"), "content").expect("a file");
            let script = "
                mount -t proc proc proc &&
                mount --bind proc/sys proc/sys && mount -o remount,bind,ro proc/sys &&
                mount --bind dev/null proc/keys &&
                pivot_root . old && /busybox umount -l old && /busybox touch tmp/is-ready && exec /busybox sleep 1000";
            let busybox = at("busybox");
            fs::copy("/bin/busybox", &busybox).expect("busybox");
            // Its children are in the new pid namespace, whose first process is the init.
            unshare(CloneFlags::CLONE_NEWPID).expect("unshare");
            run_until(&busybox, script, &root, Path::new("/tmp/is-ready"))
        };
        Self(std::thread::spawn(start).join().expect("the thread"))
    }

    fn task(&self) -> TaskRef {
        TaskRef::open(HostPid(self.0.id() as i32), NsPid(1), "init".into()).expect("it lives")
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Dumps the namespaces of `task`, with what else a restore of them reads.
fn dump(task: &TaskRef, options: &NamespaceOptions) -> tempfile::TempDir {
    let collected = Collected::collect(task, &[], options).expect("collects");
    assert_eq!(collected.refusals(), []);
    let folder = tempfile::tempdir().expect("a folder");
    let mut sink = FolderSink::open(folder.path(), FolderOptions::default()).expect("a sink");
    collected.dump_content(&mut sink).expect("dumps");
    collected.dump_records(&mut sink).expect("dumps");
    let (mut own, mut ids) = (TaskKobjIdsEntry::default(), TaskKobjIdsEntry::default());
    collected.own_ids().fill(&mut own);
    collected.fill(task.pid, &mut ids);
    let inventory = InventoryEntry { root_ids: Some(own), ..InventoryEntry::default() };
    sink.put("inventory.img", &encode(Kind::Inventory, &[inventory])).expect("inventory");
    sink.put("ids-1.img", &encode(Kind::Ids, &[ids])).expect("ids");
    let root = PstreeEntry { pid: 1, ppid: 0, pgid: 1, sid: 1, threads: vec![1] };
    sink.put("pstree.img", &encode(Kind::Pstree, &[root])).expect("pstree");
    sink.finish(Manifest::new("6.18", 4096)).expect("manifest");
    folder
}

/// A root task in its runner; dropping it ends it.
struct Root {
    runner: Runner,
    _area: Area,
}

impl Root {
    fn start(flags: u64) -> Self {
        let length = 256 << 10;
        let file = rustix::fs::memfd_create("area", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&file, length).expect("ftruncate");
        // One for each of the test's roots.
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0x7100_0000_0000);
        let at = RemoteAddr(NEXT.fetch_add(0x100_0000, std::sync::atomic::Ordering::Relaxed));
        let mut area = Area::inherited(&file, length as usize, at).expect("an area");
        let slot = area.slot(128 << 10).expect("a slot");
        let task = FirstTask { flags, ..FirstTask::default() };
        let pid = clone_into_runner(task, area.code(), slot.remote()).expect("clone");
        Self { runner: Runner::new(pid, slot), _area: area }
    }

    fn pid(&self) -> HostPid {
        self.runner.tid()
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.pid().0);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(pid, None);
    }
}

/// What is the same before and after: everything but the numbers of mounts, devices and groups.
fn mounts(pid: HostPid) -> BTreeSet<String> {
    let table = MountTable::read(pid).expect("mountinfo");
    let one = |mount: &ferry_engine::namespaces::Mount| {
        let parent = table.get(mount.parent).map(|parent| parent.point.display().to_string());
        format!(
            "{} on {parent:?}: {} of {} ({}), {:x}/{:x}, {:?}, shared {}, master {}",
            mount.point.display(),
            mount.root.display(),
            mount.fs_type,
            mount.source.display(),
            mount.flags,
            mount.super_flags,
            mount.options,
            mount.shared.is_some(),
            mount.master.is_some(),
        )
    };
    table.mounts().iter().map(one).collect()
}

/// What somebody in the namespaces of the task sees.
fn inside<T: Send>(task: &TaskRef, flags: CloneFlags, look: impl FnOnce() -> T + Send) -> T {
    let pidfd = task.pidfd();
    let visit = move || {
        setns(pidfd.as_fd(), flags).expect("setns");
        look()
    };
    std::thread::scope(|scope| scope.spawn(visit).join()).expect("the thread")
}

fn names_and_limits(task: &TaskRef) -> Vec<String> {
    let flags = CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWNET;
    inside(task, flags, || {
        let mut seen = vec![rustix::system::uname().nodename().to_string_lossy().into_owned()];
        for file in ["kernel/msgmax", "kernel/sem"] {
            let mut text = [0; 100];
            let length = std::io::Read::read(&mut fs::File::open(format!("/proc/sys/{file}")).expect(file), &mut text);
            seen.push(String::from_utf8_lossy(&text[..length.expect(file)]).into_owned());
        }
        for name in ["default/rp_filter", "lo/rp_filter", "all/forwarding", "all/accept_redirects"] {
            seen.push(fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}")).expect(name));
        }
        let output = Command::new("ip").args(["-o", "addr"]).output().expect("ip");
        seen.push(String::from_utf8_lossy(&output.stdout).into_owned());
        seen
    })
}

fn options(bundle: &Bundle) -> (NamespaceOptions, RestoreNamespaceOptions) {
    let dump = NamespaceOptions {
        external_mounts: BTreeMap::from([("/data".into(), "the data".into())]),
        ..NamespaceOptions::default()
    };
    let restore = RestoreNamespaceOptions {
        root: Some(bundle.root()),
        external_mounts: BTreeMap::from([("the data".into(), bundle.data())]),
        ..RestoreNamespaceOptions::default()
    };
    (dump, restore)
}

fn open(folder: &Path) -> ImageSet {
    ImageSet::open(Box::new(FolderSource::open(folder).expect("a source"))).expect("a set")
}

#[test]
fn a_containers_namespaces_come_back() {
    let bundle = Bundle::new();
    let init = Init::start(&bundle);
    let task = init.task();
    let (dump_options, restore_options) = options(&bundle);
    let images = dump(&task, &dump_options);
    let (mounts_before, others_before) = (mounts(task.pid), names_and_limits(&task));
    let own_mounts = mounts(HostPid(std::process::id() as i32));
    drop(init);

    let plan = RestorePlan::new(&open(images.path()), restore_options).expect("a plan");
    assert_eq!(plan.obstacles(), []);
    let root = Root::start(plan.clone_flags());
    plan.restore(&root.runner, root.pid()).expect("restores");

    let task = TaskRef::open(root.pid(), NsPid(1), "root".into()).expect("it lives");
    let after = mounts(root.pid());
    let difference: Vec<&String> = mounts_before.symmetric_difference(&after).collect();
    assert!(difference.is_empty(), "{difference:#?}");
    assert_eq!(names_and_limits(&task), others_before);
    let at = |path: &str| format!("/proc/{}/root{path}", root.pid());
    assert_eq!(fs::read(at("/dev/shm/deep")).expect("content"), vec![7; 100_000]);
    assert_eq!(fs::read_to_string(at("/tmp/file")).expect("content"), "content");
    assert_eq!(fs::read_to_string(at("/data/hello")).expect("content"), "hello");
    assert!(fs::write(at("/data/no"), "").is_err(), "/data is read-only");
    assert!(fs::read_dir(at("/old")).expect("the old root's place").next().is_none());
    // The proc file system shows the new pid namespace.
    assert_eq!(fs::read_to_string(at("/proc/1/stat")).expect("stat").split(' ').next(), Some("1"));
    assert!(!Path::new(&at(&format!("/proc/{}", std::process::id()))).exists());
    // And the task can be dumped again, to the same.
    let again = dump(&task, &dump_options);
    for name in ["utsns-12.img", "ipcns-var-11.img"] {
        let read = |folder: &Path| fs::read(folder.join(name)).expect(name);
        assert_eq!(read(again.path()), read(images.path()), "{name}");
    }
    // Ending the root undoes everything.
    drop(root);
    assert_eq!(mounts(HostPid(std::process::id() as i32)), own_mounts);
    rustix::fs::openat(rustix::fs::CWD, bundle.root(), rustix::fs::OFlags::PATH, 0.into()).expect("the root is there");
    fs::remove_dir(bundle.root().join("sys")).expect("nothing is mounted on it");
}

#[test]
fn clocks_go_on_where_they_were() {
    let init = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().map(Init).expect("sleep");
    let images = dump(&init.task(), &NamespaceOptions::default());
    drop(init);
    std::thread::sleep(std::time::Duration::from_millis(300));
    let plan = RestorePlan::new(&open(images.path()), RestoreNamespaceOptions::default()).expect("a plan");
    assert_eq!((plan.obstacles(), plan.clone_flags(), plan.has_pid_namespace()), (&[][..], 0, false));
    let root = Root::start(0);
    plan.restore(&root.runner, root.pid()).expect("restores");
    let mut batch = root.runner.batch();
    let time = batch.space(16);
    batch.must(libc::SYS_clock_gettime, &[libc::CLOCK_MONOTONIC as u64, time.addr.0]);
    let answers = batch.run().expect("runs");
    let shown = answers.u64_at(time, 0) as f64 + answers.u64_at(time, 8) as f64 / 1e9;
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let behind = now.tv_sec as f64 + now.tv_nsec as f64 / 1e9 - shown;
    assert!((0.3..5.0).contains(&behind), "{behind}");

    let keep = RestoreNamespaceOptions { keep_clocks: true, ..RestoreNamespaceOptions::default() };
    let plan = RestorePlan::new(&open(images.path()), keep).expect("a plan");
    let root = Root::start(0);
    plan.restore(&root.runner, root.pid()).expect("restores");
    let own = fs::read_link("/proc/self/ns/time").expect("link");
    assert_eq!(fs::read_link(format!("/proc/{}/ns/time", root.pid())).expect("link"), own);
}

#[test]
fn every_obstacle_is_named_before_anything_is_made() {
    let bundle = Bundle::new();
    let init = Init::start(&bundle);
    let (dump_options, _) = options(&bundle);
    let images = dump(&init.task(), &dump_options);
    drop(init);
    fs::remove_dir(bundle.root().join("proc")).expect("remove");
    let restore = RestoreNamespaceOptions { root: Some(bundle.root()), ..RestoreNamespaceOptions::default() };
    let plan = RestorePlan::new(&open(images.path()), restore).expect("a plan");
    let obstacles: Vec<String> = plan.obstacles().iter().map(ToString::to_string).collect();
    assert_eq!(obstacles.len(), 2, "{obstacles:?}");
    assert!(obstacles.iter().any(|text| text.contains("/data") && text.contains("\"the data\"")), "{obstacles:?}");
    assert!(
        obstacles.iter().any(|text| text.contains("mount /proc (proc): ") && text.contains("create it")),
        "{obstacles:?}"
    );
}

#[test]
fn a_given_network_namespace_is_joined() {
    let bundle = Bundle::new();
    let init = Init::start(&bundle);
    let task = init.task();
    let namespace = |pid: HostPid| fs::File::open(format!("/proc/{pid}/ns/net")).expect("a namespace");
    let inode = |file: &fs::File| std::os::unix::fs::MetadataExt::ino(&file.metadata().expect("metadata"));
    let net = namespace(task.pid);
    let (mut dump_options, mut restore_options) = options(&bundle);
    dump_options.external_namespaces.insert((NamespaceKind::Net, inode(&net)), "the net".into());
    let images = dump(&task, &dump_options);
    let missing = RestorePlan::new(&open(images.path()), options(&bundle).1).expect("a plan");
    assert!(missing.obstacles()[0].to_string().contains("the net"), "{:?}", missing.obstacles());

    restore_options.external_namespaces.insert("the net".into(), net.try_clone().expect("a descriptor").into());
    let plan = RestorePlan::new(&open(images.path()), restore_options).expect("a plan");
    assert_eq!((plan.obstacles(), plan.clone_flags() & NamespaceKind::Net.clone_flag()), (&[][..], 0));
    let root = Root::start(plan.clone_flags());
    plan.restore(&root.runner, root.pid()).expect("restores");
    assert_eq!(inode(&namespace(root.pid())), inode(&net));
}

#[test]
fn mounts_that_the_plain_order_would_miss() {
    // Hidden mounts, peers, slaves, and a tmpfs that is bound from below another one.
    let bundle = Bundle::new();
    let root_path = bundle.root();
    let start = || {
        unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
        rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).expect("private");
        rustix::mount::mount_bind(&root_path, &root_path).expect("bind");
        std::env::set_current_dir("/").expect("chdir");
        let at = |path: &str| root_path.join(path);
        for name in ["a/b", "c", "d", "e"] {
            fs::create_dir_all(at(name)).expect("a folder");
        }
        let tmpfs =
            |path: &str| rustix::mount::mount("none", at(path), "tmpfs", MountFlags::empty(), None).expect("tmpfs");
        tmpfs("a/b");
        fs::create_dir(at("a/b/inner")).expect("a folder");
        fs::write(at("a/b/inner/file"), "inner").expect("a file");
        rustix::mount::mount_change(at("a/b"), MountPropagationFlags::SHARED).expect("shared");
        rustix::mount::mount_bind(at("a/b/inner"), at("c")).expect("bind");
        rustix::mount::mount_bind(at("a/b"), at("d")).expect("bind");
        rustix::mount::mount_change(at("d"), MountPropagationFlags::DOWNSTREAM).expect("slave");
        rustix::mount::mount_bind(root_path.join("sys"), at("e")).expect("bind a part of the root");
        fs::copy("/bin/busybox", at("busybox")).expect("busybox");
        let script =
            "pivot_root . old && /busybox umount -l old && /busybox touch d/is-ready && exec /busybox sleep 1000";
        run_until(&at("busybox"), script, &root_path, Path::new("/d/is-ready"))
    };
    let init = Init(std::thread::scope(|scope| scope.spawn(start).join()).expect("the thread"));
    let task = init.task();
    let images = dump(&task, &NamespaceOptions::default());
    let before = mounts(task.pid);
    drop(init);
    let restore = RestoreNamespaceOptions { root: Some(bundle.root()), ..RestoreNamespaceOptions::default() };
    let plan = RestorePlan::new(&open(images.path()), restore).expect("a plan");
    assert_eq!(plan.obstacles(), []);
    let root = Root::start(plan.clone_flags());
    plan.restore(&root.runner, root.pid()).expect("restores");
    let after = mounts(root.pid());
    let difference: Vec<&String> = before.symmetric_difference(&after).collect();
    assert!(difference.is_empty(), "{difference:#?}");
    assert_eq!(fs::read_to_string(format!("/proc/{}/root/c/file", root.pid())).expect("content"), "inner");
    // /c, /a/b and /d show one file system, of which /c and /a/b are peers.
    let table = MountTable::read(root.pid()).expect("mountinfo");
    let find = |point: &str| table.mounts().iter().find(|mount| mount.point == Path::new(point)).expect("a mount");
    assert_eq!(find("/c").shared, find("/a/b").shared);
    assert_eq!(find("/d").master, find("/a/b").shared);
    assert_eq!(find("/c").device, find("/d").device);
}
