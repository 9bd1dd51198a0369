//! Saving and restoring real cgroups with their properties, in cgroups of the tests' own.

// Skips are announced on standard output.
#![allow(clippy::print_stdout)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Busy, PATIENCE, TestCgroup, for_each_design, wait_until};
use ferry_cgroup::tree::plan::Obstacle;
use ferry_cgroup::tree::{Directory, Property};
use ferry_cgroup::{CgroupTree, Freezer, Mode, OWN_SET, RestoreError, SetTable, Version};

/// The tree of one child in one cgroup, and its set.
fn save(child: &Busy) -> (CgroupTree, u32) {
    let mut table = SetTable::new().unwrap();
    let set = table.of_process(child.pid()).unwrap();
    (CgroupTree::collect(&table, None).unwrap(), set)
}

/// The saved head of a test's cgroup.
fn head<'a>(tree: &'a mut CgroupTree, cgroup: &Path) -> &'a mut Directory {
    let name = cgroup.file_name().unwrap().to_str().unwrap();
    tree.hierarchies.iter_mut().flat_map(|saved| &mut saved.heads).find(|head| head.name == name).expect("it is saved")
}

fn value<'a>(directory: &'a Directory, name: &str) -> Option<&'a str> {
    directory.properties.iter().find(|property| property.name == name).map(|property| property.value.as_str())
}

fn set_value(directory: &mut Directory, name: &str, value: &str) {
    directory.properties.retain(|property| property.name != name);
    directory.properties.push(Property { name: name.into(), value: value.into(), permissions: None });
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap().trim_end().to_owned()
}

#[test]
fn sets_are_numbered_and_the_own_set_is_not_saved() {
    for_each_design(|version| {
        let (a, b) = (TestCgroup::new(version), TestCgroup::new(version));
        let in_a = [Busy::start(&a.directory), Busy::start(&a.directory)];
        let in_b = Busy::start(&b.directory);
        let mut table = SetTable::new().unwrap();
        let own = table.of_process(i32::try_from(std::process::id()).unwrap()).unwrap();
        let numbers: Vec<u32> =
            [&in_a[0], &in_b, &in_a[1]].map(|child| table.of_process(child.pid()).unwrap()).to_vec();
        assert_eq!((own, numbers.as_slice()), (OWN_SET, &[2, 3, 2][..]));
        let ids: Vec<u32> = table.sets().iter().map(|set| set.id).collect();
        assert_eq!(ids, [2, 3]);
        assert_eq!(table.of_thread(in_b.pid(), 3).unwrap(), 3);
    });
}

#[test]
fn a_tree_comes_back_with_directories_properties_owners_and_tasks() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let inner = cgroup.sub("inner");
        cgroup.sub("empty");
        chown(&inner, Some(1234), Some(5678)).unwrap();
        chown(inner.join("cgroup.procs"), Some(1234), None).unwrap();
        let property = match version {
            Version::V1 => "notify_on_release",
            Version::V2 => "cgroup.max.descendants",
        };
        fs::write(inner.join(property), "1").unwrap();
        let child = Busy::start(&cgroup.directory);
        let (mut tree, set) = save(&child);
        assert_eq!(head(&mut tree, &cgroup.directory).children.len(), 2);
        drop(child);
        let directory = cgroup.directory.clone();
        drop(cgroup);
        assert!(!directory.exists());

        let restored = tree.restore(Mode::Soft).unwrap();
        assert_eq!(restored.made(), [directory.clone(), directory.join("empty"), inner.clone()]);
        let metadata = fs::metadata(&inner).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1234, 5678));
        assert_eq!(fs::metadata(inner.join("cgroup.procs")).unwrap().uid(), 1234);
        assert_eq!(read(inner.join(property)), "1");

        let elsewhere = TestCgroup::new(version);
        let child = Busy::start(&elsewhere.directory);
        restored.move_process(child.pid(), OWN_SET).unwrap();
        assert_eq!(read(elsewhere.directory.join("cgroup.procs")), child.pid().to_string());
        restored.move_process(child.pid(), set).unwrap();
        assert_eq!(read(directory.join("cgroup.procs")), child.pid().to_string());
        assert!(matches!(restored.move_process(child.pid(), 99), Err(RestoreError::NoSet { set: 99, .. })));

        drop(child);
        restored.undo().unwrap();
        assert!(!directory.exists());
    });
}

/// A limit set in a v1 controller's cgroup survives; `None` when the controller is not there.
fn assert_limit_survives(controller: &str, limits: &[(&str, &str)]) {
    let Some(cgroup) = TestCgroup::in_controller(controller) else {
        println!("SKIPPED: no v1 controller {controller}");
        return;
    };
    let expected: Vec<(&str, String)> = limits
        .iter()
        .map(|(file, text)| {
            fs::write(cgroup.directory.join(file), text).unwrap_or_else(|error| panic!("{file}: {error}"));
            (*file, *text)
        })
        .map(|(file, _)| match file {
            "devices.deny" | "devices.allow" => ("devices.list", read(cgroup.directory.join("devices.list"))),
            _ => (file, read(cgroup.directory.join(file))),
        })
        .collect();
    let child = Busy::start(&cgroup.directory);
    let (tree, set) = save(&child);
    drop(child);
    let directory = cgroup.directory.clone();
    drop(cgroup);

    let restored = tree.restore(Mode::Soft).unwrap();
    for (file, value) in &expected {
        // Of two writes to one list, the last reading counts.
        let last = expected.iter().rev().find(|(other, _)| other == file).map(|(_, value)| value);
        assert_eq!(Some(&read(directory.join(file))), last.or(Some(value)), "{controller}: {file}");
    }
    let elsewhere = TestCgroup::in_controller(controller).unwrap();
    let child = Busy::start(&elsewhere.directory);
    restored.move_process(child.pid(), set).unwrap();
    assert_eq!(read(directory.join("tasks")), child.pid().to_string());
    drop(child);
    restored.undo().unwrap();
    assert!(!directory.exists());
}

#[test]
fn limits_of_v1_controllers_survive() {
    assert_limit_survives("pids", &[("pids.max", "123")]);
    assert_limit_survives(
        "cpu",
        &[("cpu.shares", "512"), ("cpu.cfs_period_us", "50000"), ("cpu.cfs_quota_us", "25000")],
    );
    let memory = [
        ("memory.limit_in_bytes", "268435456"),
        ("memory.memsw.limit_in_bytes", "536870912"),
        ("memory.swappiness", "10"),
    ];
    assert_limit_survives("memory", &memory);
    assert_limit_survives("cpuset", &[("cpuset.cpus", "0"), ("cpuset.mems", "0")]);
    assert_limit_survives(
        "devices",
        &[("devices.deny", "a"), ("devices.allow", "c 1:3 rwm"), ("devices.allow", "b *:* m")],
    );
}

/// A tree of one directory with one property of the design.
fn small_tree(version: Version) -> (CgroupTree, &'static str, std::path::PathBuf) {
    let cgroup = TestCgroup::new(version);
    let child = Busy::start(&cgroup.directory);
    let (mut tree, _) = save(&child);
    let property = match version {
        Version::V1 => "notify_on_release",
        Version::V2 => "cgroup.max.descendants",
    };
    set_value(head(&mut tree, &cgroup.directory), property, "1");
    (tree, property, cgroup.directory.clone())
}

#[test]
fn modes_that_want_cgroups_to_exist_refuse_missing_ones() {
    for_each_design(|version| {
        let (tree, _, directory) = small_tree(version);
        for mode in [Mode::None, Mode::Props] {
            match tree.restore(mode) {
                Err(RestoreError::Refused(obstacles)) => {
                    assert_eq!(obstacles, [Obstacle::Missing { cgroup: directory.clone() }]);
                }
                result => panic!("{result:?}"),
            }
        }
        let ignored = tree.restore(Mode::Ignore).unwrap();
        ignored.move_process(1, 2).unwrap();
        assert!(!directory.exists());
    });
}

#[test]
fn existing_cgroups_are_refused_kept_or_overwritten_as_the_mode_says() {
    for_each_design(|version| {
        let (tree, property, directory) = small_tree(version);
        fs::create_dir(&directory).unwrap();
        let file = directory.join(property);
        let before = read(&file);
        assert_ne!(before, "1");
        match tree.restore(Mode::Strict) {
            Err(RestoreError::Refused(obstacles)) => {
                assert_eq!(obstacles, [Obstacle::Exists { cgroup: directory.clone() }]);
            }
            result => panic!("{result:?}"),
        }
        for mode in [Mode::Soft, Mode::None] {
            let restored = tree.restore(mode).unwrap();
            assert_eq!(read(&file), before);
            restored.undo().unwrap();
            assert!(directory.exists(), "what was not made is not removed");
        }
        for mode in [Mode::Props, Mode::Full] {
            let restored = tree.restore(mode).unwrap();
            assert_eq!(read(&file), "1");
            restored.undo().unwrap();
            assert_eq!(read(&file), before, "the undo sets it back");
        }
        tree.restore(Mode::Full).unwrap().keep();
        assert_eq!(read(&file), "1");
        fs::remove_dir(&directory).unwrap();
        tree.restore(Mode::Strict).unwrap().keep();
        assert_eq!(read(&file), "1");
        fs::remove_dir(&directory).unwrap();
    });
}

#[test]
fn a_restore_that_fails_half_way_leaves_nothing() {
    for_each_design(|version| {
        let (mut tree, property, directory) = small_tree(version);
        let mut inner = Directory { name: "inner".into(), permissions: None, properties: vec![], children: vec![] };
        set_value(&mut inner, property, "nonsense");
        head(&mut tree, &directory).children.push(inner);
        match tree.restore(Mode::Soft) {
            Err(RestoreError::Property { path, value, .. }) => {
                assert_eq!((path, value.as_str()), (directory.join("inner").join(property), "nonsense"));
            }
            result => panic!("{result:?}"),
        }
        assert!(!directory.exists());
    });
}

#[test]
fn missing_parents_are_made_and_removed_too() {
    for_each_design(|version| {
        let (mut tree, property, directory) = small_tree(version);
        let name = directory.file_name().unwrap().to_str().unwrap().to_owned();
        tree.change_root(None, &format!("/{name}-a/b/c"));
        let top = directory.with_file_name(format!("{name}-a"));
        let restored = tree.restore(Mode::Soft).unwrap();
        assert_eq!(restored.made(), [top.clone(), top.join("b"), top.join("b/c")]);
        assert_eq!(read(top.join("b/c").join(property)), "1");
        drop(restored);
        assert!(!top.exists());
    });
}

#[test]
fn a_limit_whose_controller_is_missing_is_not_lost_silently() {
    for_each_design(|version| {
        let (mut tree, _, directory) = small_tree(version);
        // A file that no cgroup of the freezer hierarchy has, and one that cgroup2 has only with its controller.
        let property = match version {
            Version::V1 => "memory.limit_in_bytes",
            Version::V2 => "memory.max",
        };
        set_value(head(&mut tree, &directory), property, "max");
        let restored = tree.restore(Mode::Soft).unwrap();
        if directory.join(property).exists() {
            return println!("SKIPPED: the memory controller is in v2 here");
        }
        restored.undo().unwrap();
        set_value(head(&mut tree, &directory), property, "1048576");
        assert!(matches!(tree.restore(Mode::Soft), Err(RestoreError::Property { .. })));
        assert!(!directory.exists());
    });
}

#[test]
fn the_freezer_state_that_was_found_is_saved_and_restored_last() {
    for_each_design(|version| {
        for found_frozen in [false, true] {
            let cgroup = TestCgroup::new(version);
            let child = Busy::start(&cgroup.directory);
            cgroup.wish(found_frozen);
            let frozen = Freezer::for_path(&cgroup.directory).unwrap().freeze(|_| true, PATIENCE).unwrap();
            let mut table = SetTable::new().unwrap();
            let set = table.of_process(child.pid()).unwrap();
            let mut tree = CgroupTree::collect(&table, Some(&frozen)).unwrap();
            let expected = match (version, found_frozen) {
                (Version::V1, false) => ("freezer.state", "THAWED"),
                (Version::V1, true) => ("freezer.state", "FROZEN"),
                (Version::V2, false) => ("cgroup.freeze", "0"),
                (Version::V2, true) => ("cgroup.freeze", "1"),
            };
            assert_eq!(value(head(&mut tree, &cgroup.directory), expected.0), Some(expected.1));
            frozen.thaw().unwrap();
            drop(child);
            let directory = cgroup.directory.clone();
            drop(cgroup);

            let mut restored = tree.restore(Mode::Soft).unwrap();
            let elsewhere = TestCgroup::new(version);
            let mut child = Busy::start(&elsewhere.directory);
            restored.move_process(child.pid(), set).unwrap();
            child.assert_runs();
            restored.restore_freezer_states().unwrap();
            if found_frozen {
                wait_until("restored frozen", || common::is_frozen(&directory, version));
                child.assert_stopped();
                common::wish(&directory, version, false);
            }
            child.assert_runs();
            drop(child);
            restored.undo().unwrap();
        }
    });
}

#[test]
fn a_thread_goes_to_its_own_set_in_v1() {
    let Some(cgroup) = TestCgroup::in_controller("pids") else {
        return println!("SKIPPED: no v1 controller pids");
    };
    let inner = cgroup.sub("inner");
    let mut child = Busy::helper(&cgroup.directory, "helper_with_a_thread");
    child.wait_for_output("thread is up");
    let tid = *common::threads(child.pid()).iter().max().unwrap();
    fs::write(inner.join("tasks"), tid.to_string()).unwrap();
    let mut table = SetTable::new().unwrap();
    let of_process = table.of_process(child.pid()).unwrap();
    let of_thread = table.of_thread(tid, of_process).unwrap();
    assert_ne!(of_process, of_thread);
    let tree = CgroupTree::collect(&table, None).unwrap();

    fs::write(cgroup.directory.join("tasks"), tid.to_string()).unwrap();
    let restored = tree.restore(Mode::Soft).unwrap();
    restored.move_process(child.pid(), of_process).unwrap();
    restored.move_thread(tid, of_thread).unwrap();
    assert_eq!(read(inner.join("tasks")), tid.to_string());
    restored.keep();
}

#[test]
#[ignore = "helper of another test"]
fn helper_with_a_thread() {
    if common::helper_argument().is_some() {
        std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(60)));
        println!("thread is up");
        std::thread::sleep(std::time::Duration::from_secs(60));
    }
}

#[test]
fn the_root_of_a_cgroup_namespace_is_saved_and_found_again() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let scope = cgroup.sub("init.scope");
        let mut child = Command::new("sh")
            .args(["-c", "read line; exec unshare --cgroup sleep 60"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        cgroup.add(pid);
        drop(child.stdin.take());
        wait_until("the namespace", || {
            let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/cgroup")).ok();
            link(&pid.to_string()).is_some_and(|theirs| Some(theirs) != link("self"))
        });
        common::add(&scope, pid);

        let mut table = SetTable::new().unwrap();
        let set = table.of_process(pid).unwrap();
        let mut tree = CgroupTree::collect(&table, None).unwrap();
        let name = format!("/{}", cgroup.directory.file_name().unwrap().to_str().unwrap());
        let member = table.sets()[0].members.iter().find(|member| member.path.starts_with(&name)).unwrap();
        assert_eq!(
            (member.path.as_str(), member.namespace_prefix),
            (format!("{name}/init.scope").as_str(), name.len())
        );
        assert_eq!(head(&mut tree, &cgroup.directory).children[0].name, "init.scope", "all of the namespace is saved");

        let restored = tree.restore(Mode::Soft).unwrap();
        assert!(restored.move_to_namespace_root(pid, set).unwrap());
        assert_eq!(read(cgroup.directory.join("cgroup.procs")), pid.to_string());
        restored.move_process(pid, set).unwrap();
        assert_eq!(read(scope.join("cgroup.procs")), pid.to_string());
        restored.keep();
        child.kill().unwrap();
        child.wait().unwrap();
    });
}
