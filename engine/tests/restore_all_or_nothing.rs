//! A restore that fails leaves nothing, whatever it had made by then; one that succeeds brings everything back.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ferry_engine::dump::{DumpOptions, dump};
use ferry_engine::images::folder::{FolderOptions, FolderSink, FolderSource};
use ferry_engine::images::{ImageSet, Kind, pstree::PstreeEntry};
use ferry_engine::restore::{RestoreError, RestoreOptions, RestorePhase, restore};
use ferry_engine::sys::HostPid;
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

/// What the test's own parents left open, a pipe perhaps, is no part of the tree.
const TREE: &str = r#"
    for fd in /proc/$$/fd/*; do [ ${fd##*/} -gt 2 ] && eval "exec ${fd##*/}>&-"; done
    sleep 1000 & (sleep 1001; true) & setsid bash -c 'sleep 1002 & wait' & wait"#;

fn images(folder: &Path) -> ImageSet {
    ImageSet::open(Box::new(FolderSource::open(folder).expect("a folder"))).expect("an image set")
}

/// Starts a tree in a session of its own, dumps it into `folder`, which ends it; returns its pids.
fn dumped_tree(folder: &Path) -> Vec<i32> {
    set_child_subreaper(true).expect("subreaper");
    let mut shell = Command::new("setsid")
        .args(["bash", "-c", TREE])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a shell");
    let root = HostPid(shell.id() as i32);
    let deadline = Instant::now() + Duration::from_secs(20);
    while sleepers(root.0) < 3 {
        assert!(Instant::now() < deadline, "the tree does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut sink = FolderSink::open(folder, FolderOptions::default()).expect("a sink");
    dump(root, &mut sink, &DumpOptions::default()).expect("a dump");
    let tree: Vec<PstreeEntry> =
        images(folder).entries(Kind::Pstree, &Kind::Pstree.name()).expect("an image").expect("a tree");
    let pids: Vec<i32> = tree.iter().map(|task| task.pid as i32).collect();
    // The dump, their tracer, may have reaped some of them.
    let _ = shell.wait();
    for pid in &pids[1..] {
        let _ = waitpid(Pid::from_raw(*pid), None);
    }
    assert_eq!(living(&pids), BTreeSet::new());
    pids
}

/// Ends a tree from the top: the children of whoever ended come to this process.
fn end(pids: &[i32]) {
    for pid in pids.iter().map(|pid| Pid::from_raw(*pid)) {
        kill(pid, Signal::SIGKILL).expect("it lives");
        waitpid(pid, None).expect("it comes to the subreaper");
    }
}

fn children(pid: i32) -> Vec<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn sleepers(pid: i32) -> usize {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    usize::from(comm == "sleep\n") + children(pid).into_iter().map(sleepers).sum::<usize>()
}

fn living(pids: &[i32]) -> BTreeSet<i32> {
    pids.iter().copied().filter(|pid| Path::new(&format!("/proc/{pid}")).exists()).collect()
}

/// Parent, group and session of each.
fn relations(pids: &[i32]) -> Vec<Vec<String>> {
    let stat = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let fields = |stat: String| {
        stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').skip(1).take(3).map(str::to_owned).collect())
    };
    pids.iter().map(|pid| fields(stat(pid)).expect("a stat")).collect()
}

#[test]
fn a_failure_before_any_phase_leaves_nothing_and_the_next_restore_succeeds() {
    let folder = tempfile::tempdir().expect("a folder");
    let pids = dumped_tree(folder.path());
    let images = images(folder.path());
    for fail_at in RestorePhase::ALL {
        let progress = |phase| if phase == *fail_at { Err(format!("no {phase:?}")) } else { Ok(()) };
        let options = RestoreOptions { progress: Some(Box::new(progress)), ..RestoreOptions::default() };
        let error = restore(&images, options).expect_err("it fails");
        assert!(matches!(error, RestoreError::Caller { .. }), "{error}");
        assert_eq!(living(&pids), BTreeSet::new(), "after a failure before {fail_at:?}");
    }
    let restored = restore(&images, RestoreOptions::default()).expect("it succeeds");
    assert_eq!((restored.pid.0, restored.processes), (pids[0], pids.len()));
    assert_eq!(living(&pids), pids.iter().copied().collect());
    assert_eq!(sleepers(pids[0]), 3);
    let me = std::process::id().to_string();
    let tree: Vec<PstreeEntry> = images.entries(Kind::Pstree, &Kind::Pstree.name()).expect("an image").expect("a tree");
    let saved = tree.iter().map(|task| {
        let parent = if task.ppid == 0 { me.clone() } else { task.ppid.to_string() };
        vec![parent, task.pgid.to_string(), task.sid.to_string()]
    });
    assert_eq!(relations(&pids), saved.collect::<Vec<_>>());
    end(&pids);
}

#[test]
fn a_pid_in_use_is_told_before_anything_is_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let pids = dumped_tree(folder.path());
    let images = images(folder.path());
    restore(&images, RestoreOptions::default()).expect("it succeeds");
    let before = relations(&pids);
    let error = restore(&images, RestoreOptions::default()).expect_err("the pids are in use");
    let RestoreError::Obstacles(obstacles) = error else { panic!("{error}") };
    assert_eq!(obstacles.len(), pids.len(), "all are told");
    assert!(obstacles.iter().all(|obstacle| obstacle.problem.contains("in use by another task")));
    assert_eq!(relations(&pids), before);
    end(&pids);
}
