//! Freezing real processes with both freezers, in cgroups of the tests' own.

// The helpers answer on standard output, and skips are announced there.
#![allow(clippy::print_stdout)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use common::{A_WHILE, Busy, PATIENCE, TestCgroup, for_each_design, is_frozen, wait_until, wish};
use ferry_cgroup::freezer::Unfit;
use ferry_cgroup::{CgroupSet, FreezeError, Freezer, State, Version};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

fn anyone(_: i32) -> bool {
    true
}

#[test]
fn a_freeze_stops_progress_and_the_guard_thaws_on_drop() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let mut child = Busy::start(&cgroup.directory);
        child.assert_runs();

        let freezer = Freezer::for_path(&cgroup.directory).unwrap();
        assert_eq!(freezer.state().unwrap(), State::Thawed);
        let pid = child.pid();
        let frozen = freezer.freeze(|candidate| candidate == pid, PATIENCE).unwrap();
        assert!(cgroup.is_frozen() && !frozen.was_frozen());
        assert_eq!(freezer.state().unwrap(), State::Frozen);
        child.assert_stopped();

        drop(frozen);
        assert!(!cgroup.is_frozen());
        assert_eq!(freezer.state().unwrap(), State::Thawed);
        child.assert_runs();
    });
}

#[test]
fn a_cgroup_frozen_by_hand_is_accepted_and_left_frozen() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let mut child = Busy::start(&cgroup.directory);
        cgroup.wish(true);
        wait_until("frozen by hand", || cgroup.is_frozen());

        let frozen = Freezer::for_path(&cgroup.directory).unwrap().freeze(anyone, PATIENCE).unwrap();
        assert!(frozen.was_frozen());
        frozen.restore().unwrap();
        assert!(cgroup.is_frozen());
        child.assert_stopped();

        let mut frozen = Freezer::for_path(&cgroup.directory).unwrap().freeze(anyone, PATIENCE).unwrap();
        frozen.thaw_for_ptrace().unwrap();
        child.assert_runs();
        drop(frozen);
        wait_until("left frozen", || cgroup.is_frozen());
        child.assert_stopped();

        Freezer::for_path(&cgroup.directory).unwrap().freeze(anyone, PATIENCE).unwrap().thaw().unwrap();
        assert!(!cgroup.is_frozen());
        child.assert_runs();
    });
}

#[test]
fn a_kept_freeze_stays() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let mut child = Busy::start(&cgroup.directory);
        Freezer::for_path(&cgroup.directory).unwrap().freeze(anyone, PATIENCE).unwrap().keep();
        assert!(cgroup.is_frozen());
        child.assert_stopped();
    });
}

#[test]
fn a_frozen_ancestor_is_accepted_thawed_for_ptrace_and_left_frozen() {
    for_each_design(|version| {
        let outer = TestCgroup::new(version);
        let inner = outer.sub("container");
        let mut child = Busy::start(&inner);
        outer.wish(true);
        wait_until("frozen from above", || is_frozen(&inner, version));

        let mut frozen = Freezer::for_path(&inner).unwrap().freeze(anyone, PATIENCE).unwrap();
        assert!(frozen.was_frozen());
        frozen.thaw_for_ptrace().unwrap();
        child.assert_runs();
        frozen.refreeze(PATIENCE).unwrap();
        child.assert_stopped();
        drop(frozen);
        assert!(outer.is_frozen());
        child.assert_stopped();

        outer.wish(false);
        child.assert_runs();
    });
}

#[test]
fn an_ancestor_that_others_are_frozen_by_too_is_not_thawed() {
    for_each_design(|version| {
        let outer = TestCgroup::new(version);
        let inner = outer.sub("container");
        let mut child = Busy::start(&inner);
        let mut other = Busy::start(&outer.sub("other"));
        outer.wish(true);
        wait_until("frozen from above", || outer.is_frozen());

        let mut frozen = Freezer::for_path(&inner).unwrap().freeze(anyone, PATIENCE).unwrap();
        match frozen.thaw_for_ptrace() {
            Err(FreezeError::HeldElsewhere { cgroup, foreign }) => {
                assert_eq!(cgroup, outer.directory);
                assert_eq!(foreign, [other.pid()]);
            }
            result => panic!("{result:?}"),
        }
        drop(frozen);
        assert!(outer.is_frozen());
        child.assert_stopped();
        other.assert_stopped();
    });
}

#[test]
fn a_sub_cgroup_that_was_frozen_stays_so_and_the_rest_runs() {
    for_each_design(|version| {
        let outer = TestCgroup::new(version);
        let mut running = Busy::start(&outer.sub("running"));
        let paused_directory = outer.sub("paused");
        let mut paused = Busy::start(&paused_directory);
        wish(&paused_directory, version, true);
        wait_until("frozen by hand", || is_frozen(&paused_directory, version));

        let mut frozen = Freezer::for_path(&outer.directory).unwrap().freeze(anyone, PATIENCE).unwrap();
        assert!(!frozen.was_frozen());
        running.assert_stopped();
        frozen.thaw_for_ptrace().unwrap();
        running.assert_runs();
        paused.assert_runs();
        drop(frozen);
        wait_until("left frozen", || is_frozen(&paused_directory, version));
        paused.assert_stopped();
        running.assert_runs();
    });
}

#[test]
fn ptrace_stops_are_reached_and_a_refreeze_leaves_no_gap() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let mut child = Busy::start(&cgroup.directory);
        child.assert_runs();
        cgroup.wish(true);
        wait_until("frozen by hand", || cgroup.is_frozen());
        child.output();

        let mut frozen = Freezer::for_path(&cgroup.directory).unwrap().freeze(anyone, PATIENCE).unwrap();
        let pid = Pid::from_raw(child.pid());
        ptrace::seize(pid, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(pid).unwrap();
        let look = || waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)).unwrap();
        if version == Version::V1 {
            std::thread::sleep(A_WHILE);
            assert_eq!(look(), WaitStatus::StillAlive, "v1 lets no stop be reached before the thaw");
        } else {
            wait_until("v2 lets the stop be reached", || matches!(look(), WaitStatus::PtraceEvent(..)));
        }

        frozen.thaw_for_ptrace().unwrap();
        assert!(!cgroup.is_frozen() || version == Version::V2, "v2 reports stopped tracees as frozen only when asked");
        if version == Version::V1 {
            wait_until("the stop after the thaw", || matches!(look(), WaitStatus::PtraceEvent(..)));
        }
        assert_eq!(child.output(), "", "it ran between thaw and stop");
        ptrace::getregs(pid).expect("it is stopped and can be asked");

        frozen.refreeze(PATIENCE).unwrap();
        ptrace::detach(pid, None).unwrap();
        child.assert_stopped();
        drop(frozen);
        assert!(cgroup.is_frozen());
        child.assert_stopped();
        cgroup.wish(false);
        child.assert_runs();
    });
}

#[test]
fn a_continued_tracee_runs_only_after_the_thaw() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let mut child = Busy::start(&cgroup.directory);
        let pid = Pid::from_raw(child.pid());
        ptrace::seize(pid, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(pid).unwrap();
        let look = || waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)).unwrap();
        wait_until("the stop", || matches!(look(), WaitStatus::PtraceEvent(..)));
        let mut frozen = Freezer::for_path(&cgroup.directory).unwrap().freeze(anyone, PATIENCE).unwrap();
        ptrace::cont(pid, None).unwrap();
        child.assert_stopped();
        frozen.thaw_for_ptrace().unwrap();
        child.assert_runs();
    });
}

#[test]
fn a_killed_task_dies_in_v2_at_once_and_in_v1_after_the_thaw() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let mut child = Busy::start(&cgroup.directory);
        let frozen = Freezer::for_path(&cgroup.directory).unwrap().freeze(anyone, PATIENCE).unwrap();
        if version == Version::V1 {
            child.send_kill();
            std::thread::sleep(A_WHILE);
            assert!(!child.is_dead());
            frozen.thaw().unwrap();
            child.kill();
        } else {
            child.kill();
            assert!(cgroup.is_frozen());
        }
    });
}

#[test]
fn a_task_that_cannot_freeze_makes_the_freeze_fail_in_time_and_is_named() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let mut bystander = Busy::start(&cgroup.directory);
        let mut stuck = Busy::helper(&cgroup.directory, "helper_stuck_in_a_page_fault");
        stuck.wait_for_output("faulting");
        let in_fault =
            || common::threads(stuck.pid()).into_iter().find(|tid| common::wchan(*tid).contains("userfault"));
        wait_until("the page fault", || in_fault().is_some());
        let tid = in_fault().unwrap();

        let started = Instant::now();
        let timeout = Duration::from_millis(200);
        let error = Freezer::for_path(&cgroup.directory).unwrap().freeze(anyone, timeout).unwrap_err();
        assert!(started.elapsed() >= timeout && started.elapsed() < PATIENCE);
        match &error {
            FreezeError::Timeout { blockers, state: State::Freezing, .. } => {
                assert!(blockers.iter().any(|blocker| blocker.tid == tid), "{tid}: {error}");
                let known = |tid: i32| tid == bystander.pid() || common::threads(stuck.pid()).contains(&tid);
                assert!(blockers.iter().all(|blocker| known(blocker.tid)), "{error}");
                assert!(error.to_string().contains(&tid.to_string()), "{error}");
            }
            error => panic!("{error}"),
        }
        bystander.assert_runs();
    });
}

#[test]
fn a_stuck_task_is_noticed_beside_sub_cgroups_and_below() {
    for_each_design(|version| {
        for stuck_below in [false, true] {
            let cgroup = TestCgroup::new(version);
            let sub = cgroup.sub("sub");
            let (stuck_in, other_in) = if stuck_below { (&sub, &cgroup.directory) } else { (&cgroup.directory, &sub) };
            let mut stuck = Busy::helper(stuck_in, "helper_stuck_in_a_page_fault");
            let _other = Busy::start(other_in);
            stuck.wait_for_output("faulting");
            wait_until("the page fault", || {
                common::threads(stuck.pid()).iter().any(|tid| common::wchan(*tid).contains("userfault"))
            });
            let freezer = Freezer::for_path(&cgroup.directory).unwrap();
            let error = freezer.freeze(anyone, Duration::from_millis(100)).unwrap_err();
            assert!(matches!(error, FreezeError::Timeout { .. }), "below {stuck_below}: {error}");
            assert_eq!(freezer.state().unwrap(), State::Thawed);
        }
    });
}

/// Writes from a page that nobody ever fills in: the task is in the kernel, waiting, and cannot reach a freezer.
#[test]
#[ignore = "helper of another test"]
fn helper_stuck_in_a_page_fault() {
    if common::helper_argument().is_some() {
        page_fault::write_from_missing_page();
    }
}

#[allow(unsafe_code)]
mod page_fault {
    //! userfaultfd(2) has no safe interface: the page that is waited for is never touched by Rust code.

    use std::ffi::c_void;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags, mmap_anonymous, userfaultfd};

    const UFFDIO_API: u64 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u64 = 0xc020_aa00;

    pub fn write_from_missing_page() {
        let (_read, write) = super::common::pipe();
        // SAFETY: creates a descriptor; nothing is registered with it yet.
        let faults = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC) }.unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe {
            mmap_anonymous(std::ptr::null_mut(), 4096, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE).unwrap()
        };
        let mut api: [u64; 3] = [0xaa, 0, 0];
        let mut register: [u64; 4] = [page as u64, 4096, 1, 0];
        for (request, argument) in [(UFFDIO_API, api.as_mut_ptr()), (UFFDIO_REGISTER, register.as_mut_ptr())] {
            // SAFETY: the arguments are struct uffdio_api and struct uffdio_register of linux/userfaultfd.h.
            let result = unsafe { libc::ioctl(faults.as_raw_fd(), request, argument) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        }
        println!("faulting");
        std::io::stdout().flush().unwrap();
        // SAFETY: the kernel reads the page, which is mapped; no reference to it is made.
        unsafe { libc::write(write.as_raw_fd(), page.cast::<c_void>(), 1) };
    }
}

#[test]
fn tasks_of_nested_cgroups_and_all_threads_are_found() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let deep = cgroup.sub("a");
        fs::create_dir(deep.join("b")).unwrap();
        let top = Busy::start(&cgroup.directory);
        let mut threaded = Busy::helper(&deep.join("b"), "helper_with_threads");
        threaded.wait_for_output("threads are up");

        let freezer = Freezer::for_path(&cgroup.directory).unwrap();
        assert_eq!(freezer.processes().unwrap(), BTreeSet::from([top.pid(), threaded.pid()]));
        let threads = common::threads(threaded.pid());
        assert!(threads.len() >= 3, "{threads:?}");
        assert_eq!(freezer.tasks().unwrap(), &threads | &BTreeSet::from([top.pid()]));
        let _frozen = freezer.freeze(anyone, PATIENCE).unwrap();
        assert!(is_frozen(&deep.join("b"), version));
    });
}

#[test]
fn threads_in_a_threaded_v2_cgroup_are_found_and_frozen() {
    for_each_design(|version| {
        if version == Version::V1 {
            return;
        }
        let cgroup = TestCgroup::new(version);
        let mut child = Busy::helper(&cgroup.directory, "helper_with_threads");
        child.wait_for_output("threads are up");
        let threads = common::threads(child.pid());
        let sub = cgroup.sub("threaded");
        fs::write(sub.join("cgroup.type"), "threaded").unwrap();
        let moved = *threads.iter().find(|tid| **tid != child.pid()).unwrap();
        fs::write(sub.join("cgroup.threads"), moved.to_string()).unwrap();

        let freezer = Freezer::for_path(&cgroup.directory).unwrap();
        assert_eq!(freezer.tasks().unwrap(), threads);
        assert_eq!(freezer.processes().unwrap(), BTreeSet::from([child.pid()]));
        let _frozen = freezer.freeze(anyone, PATIENCE).unwrap();
        assert!(cgroup.is_frozen());
    });
}

#[test]
#[ignore = "helper of another test"]
fn helper_with_threads() {
    if common::helper_argument().is_some() {
        for _ in 0..2 {
            std::thread::spawn(|| std::thread::sleep(Duration::from_secs(60)));
        }
        println!("threads are up");
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[test]
fn foreign_tasks_are_refused_and_nothing_is_touched() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let mut own = Busy::start(&cgroup.directory);
        let mut foreign = Busy::start(&cgroup.sub("elsewhere"));
        let own_pid = own.pid();
        match Freezer::for_path(&cgroup.directory).unwrap().freeze(|pid| pid == own_pid, PATIENCE) {
            Err(FreezeError::Unfit { reason: Unfit::Foreign(pids), .. }) => assert_eq!(pids, [foreign.pid()]),
            result => panic!("{result:?}"),
        }
        assert!(!cgroup.is_frozen());
        own.assert_runs();
        foreign.assert_runs();
    });
}

#[test]
fn roots_and_missing_paths_are_refused() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let root = cgroup.directory.parent().unwrap();
        assert!(matches!(Freezer::for_path(root), Err(FreezeError::Unfit { reason: Unfit::Root, .. })));
        assert!(matches!(Freezer::for_path(cgroup.directory.join("no")), Err(FreezeError::NotFound { .. })));
        let up = cgroup.directory.join("..");
        assert!(matches!(Freezer::for_path(up), Err(FreezeError::Unfit { reason: Unfit::Root, .. })), "as a directory");
        let up = std::path::Path::new(cgroup.directory.file_name().unwrap()).join("..");
        assert!(matches!(Freezer::for_path(up), Err(FreezeError::NotFound { .. })), "as a path in the hierarchy");
    });
    assert!(matches!(Freezer::for_path("/"), Err(FreezeError::Unfit { reason: Unfit::Root, .. })));
}

#[test]
fn a_process_does_not_freeze_its_own_cgroup() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let mut helper = Busy::helper(&cgroup.directory, "helper_that_freezes_its_own_cgroup");
        let said = helper.wait_for_output("answer:");
        assert!(said.contains("answer: Unfit HoldsCaller"), "{said}");
    });
}

#[test]
#[ignore = "helper of another test"]
fn helper_that_freezes_its_own_cgroup() {
    let Some(directory) = common::helper_argument() else { return };
    let own = i32::try_from(std::process::id()).unwrap();
    wait_until("moved into the cgroup", || {
        fs::read_to_string(directory.join("cgroup.procs")).unwrap().lines().any(|line| line == own.to_string())
    });
    match Freezer::for_path(&directory).unwrap().freeze(anyone, PATIENCE) {
        Err(FreezeError::Unfit { reason, .. }) => println!("answer: Unfit {reason:?}"),
        result => println!("answer: {result:?}"),
    }
}

#[test]
fn a_relative_path_means_the_design_where_it_has_tasks() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let name = cgroup.directory.file_name().unwrap();
        let _child = Busy::start(&cgroup.directory);
        let freezer = Freezer::for_path(name).unwrap();
        assert_eq!(freezer.cgroup().directory(), cgroup.directory);
        assert_eq!(freezer.cgroup().version(), version);
        let absolute = std::path::Path::new("/").join(name);
        assert_eq!(Freezer::for_path(absolute).unwrap(), freezer);
    });
}

#[test]
fn a_containers_id_names_its_cgroup_wherever_it_is() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let id = format!("{}x", cgroup.directory.file_name().unwrap().to_str().unwrap());
        for name in [id.clone(), format!("libpod-{id}"), format!("runtime-{id}.scope")] {
            let directory = cgroup.sub(&name);
            assert_eq!(Freezer::for_path(&id).unwrap().cgroup().directory(), directory, "{name}");
            fs::remove_dir(&directory).unwrap();
        }
        assert!(matches!(Freezer::for_path(&id), Err(FreezeError::NotFound { .. })));
    });
}

#[test]
fn links_on_the_way_to_a_directory_are_followed() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let link = std::env::temp_dir().join(cgroup.directory.file_name().unwrap());
        std::os::unix::fs::symlink(&cgroup.directory, &link).unwrap();
        let found = Freezer::for_path(&link);
        fs::remove_file(&link).unwrap();
        assert_eq!(found.unwrap().cgroup().directory(), cgroup.directory);
    });
}

#[test]
fn of_an_ended_container_its_own_cgroups_are_thawed_and_those_above_given_back() {
    for_each_design(|version| {
        let outer = TestCgroup::new(version);
        let inner = outer.sub("container");
        let mut child = Busy::start(&inner);
        wish(&inner, version, true);
        outer.wish(true);
        wait_until("frozen", || is_frozen(&inner, version));
        let mut frozen = Freezer::for_path(&inner).unwrap().freeze(anyone, PATIENCE).unwrap();
        frozen.thaw_for_ptrace().unwrap();
        child.kill();
        frozen.end().unwrap();
        outer.wish(false);
        assert!(!is_frozen(&inner, version), "its own is thawed");
    });
}

#[test]
fn what_a_freeze_would_refuse_is_foreseen() {
    for_each_design(|version| {
        let outer = TestCgroup::new(version);
        let inner = outer.sub("container");
        let child = Busy::start(&inner);
        let other = Busy::start(&outer.sub("other"));
        let freezer = Freezer::for_path(&inner).unwrap();
        freezer.foresee(anyone).unwrap();
        let child_pid = child.pid();
        assert!(matches!(freezer.foresee(|pid| pid != child_pid), Err(FreezeError::Unfit { .. })));
        outer.wish(true);
        match freezer.foresee(anyone) {
            Err(FreezeError::HeldElsewhere { foreign, .. }) => assert_eq!(foreign, [other.pid()]),
            result => panic!("{result:?}"),
        }
    });
}

#[test]
fn of_container_takes_the_cgroup_that_holds_exactly_the_container() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let mut child = Busy::start(&cgroup.directory);
        let pid = child.pid();
        let set = CgroupSet::of(pid).unwrap();
        let freezer = Freezer::of_container(&set, |candidate| candidate == pid).unwrap();
        assert_eq!(freezer.cgroup().directory(), cgroup.directory, "the other design's cgroup is the root");

        match Freezer::of_container(&set, |_| false) {
            Err(FreezeError::NoneFits { candidates }) => {
                assert!(candidates.contains(&(cgroup.directory.clone(), Unfit::Foreign(vec![pid]))), "{candidates:?}");
            }
            result => panic!("{result:?}"),
        }
        child.assert_runs();
    });
}

#[test]
fn on_a_hybrid_host_a_frozen_v1_cgroup_wins_and_both_are_thawed_for_ptrace() {
    let designs = std::cell::Cell::new(0);
    for_each_design(|_| designs.set(designs.get() + 1));
    if designs.get() < 2 {
        println!("SKIPPED: not a hybrid host");
        return;
    }
    let (v1, v2) = (TestCgroup::new(Version::V1), TestCgroup::new(Version::V2));
    let mut child = Busy::start(&v1.directory);
    v2.add(child.pid());
    let set = CgroupSet::of(child.pid()).unwrap();
    assert_eq!(Freezer::of_container(&set, anyone).unwrap().cgroup().directory(), v2.directory);

    v2.wish(true);
    wait_until("v2 frozen", || v2.is_frozen());
    v1.wish(true);
    wait_until("v1 frozen", || v1.is_frozen());
    let freezer = Freezer::of_container(&set, anyone).unwrap();
    assert_eq!(freezer.cgroup().directory(), v1.directory);
    let mut frozen = freezer.freeze(anyone, PATIENCE).unwrap();
    frozen.thaw_for_ptrace().unwrap();
    child.assert_runs();
    drop(frozen);
    child.assert_stopped();
    wait_until("v1 given back", || v1.is_frozen());
    assert!(fs::read_to_string(v2.directory.join("cgroup.freeze")).unwrap().starts_with('1'));
    // SIGKILL reaches a task that v1 froze only after the thaw, and the v2 cgroup goes first.
    v1.wish(false);
}

#[test]
fn a_process_that_is_killed_leaves_the_cgroup_as_it_was_found() {
    for_each_design(|version| {
        for found_frozen in [false, true] {
            let (cgroup, elsewhere) = (TestCgroup::new(version), TestCgroup::new(version));
            let mut child = Busy::start(&cgroup.directory);
            cgroup.wish(found_frozen);
            // It finds the cgroup through its own, which is its argument.
            fs::create_dir(elsewhere.directory.join(cgroup.directory.file_name().unwrap())).unwrap();
            let mut helper = Busy::helper(&elsewhere.directory, "helper_that_freezes_and_is_killed");
            helper.wait_for_output("frozen");
            child.assert_stopped();
            helper.kill();
            if found_frozen {
                std::thread::sleep(A_WHILE);
                assert!(cgroup.is_frozen());
                child.assert_stopped();
            } else {
                child.assert_runs();
                assert!(!cgroup.is_frozen());
            }
        }
    });
}

#[test]
#[ignore = "helper of another test"]
fn helper_that_freezes_and_is_killed() {
    let Some(own) = common::helper_argument() else { return };
    let name =
        fs::read_dir(&own).unwrap().flatten().find(|entry| entry.file_type().unwrap().is_dir()).unwrap().file_name();
    let _frozen = Freezer::for_path(own.with_file_name(name)).unwrap().freeze(anyone, PATIENCE).unwrap();
    println!("frozen");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn no_process_is_left_behind() {
    let children = || {
        let own = std::process::id();
        fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default()
    };
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let before = children();
        let frozen = Freezer::for_path(&cgroup.directory).unwrap().freeze(anyone, PATIENCE).unwrap();
        assert_eq!(children(), before, "nothing that a wait for any child would meet");
        let is_held_open = || {
            // Whoever holds a control file of this cgroup open.
            fs::read_dir("/proc").unwrap().flatten().any(|entry| {
                let links = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
                links.filter_map(|link| fs::read_link(link.path()).ok()).any(|file| file.starts_with(&cgroup.directory))
            })
        };
        assert!(is_held_open());
        drop(frozen);
        wait_until("the rescuer to be gone", || !is_held_open());
    });
}

#[test]
fn a_cgroup_removed_under_the_guard_is_no_error() {
    for_each_design(|version| {
        let cgroup = TestCgroup::new(version);
        let inner = cgroup.sub("short-lived");
        let frozen = Freezer::for_path(&inner).unwrap().freeze(anyone, PATIENCE).unwrap();
        fs::remove_dir(&inner).unwrap();
        frozen.restore().unwrap();
    });
}
