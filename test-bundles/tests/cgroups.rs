//! Cgroups in images: what a dump saves of those of its tasks, and what a restore makes of it, mode by mode.
//!
//! Every test makes cgroups of its own, called as the test is, in each hierarchy that is mounted; a machine without one of the two
//! designs tests the other.

use ferry_test_bundles::{Engine, Outcome, Place, Workload, processes, programs};
use std::path::{Path, PathBuf};

/// Where hierarchies are mounted, with the file that a test changes in them and two values for it.
const PROPERTIES: [(&str, &str, &str, &str); 4] = [
    ("/sys/fs/cgroup/pids", "pids.max", "321", "654"),
    ("/sys/fs/cgroup/freezer", "notify_on_release", "1", "0"),
    ("/sys/fs/cgroup/unified", "cgroup.max.descendants", "32", "65"),
    ("/sys/fs/cgroup", "cgroup.max.descendants", "32", "65"),
];

struct Cgroup {
    directory: PathBuf,
    property: &'static str,
    /// What it is set to before the dump.
    saved: &'static str,
    /// What it is set to before the restore, where the cgroup exists then.
    other: &'static str,
}

impl Cgroup {
    fn is(&self, below: &str, value: &str) -> Outcome {
        let path = self.directory.join(below).join(self.property);
        let now = read(&path)?;
        if now == value { Ok(()) } else { Err(format!("{} is {now}, not {value}", path.display())) }
    }

    fn has(&self, below: &str, pid: i32) -> Outcome {
        let path = self.directory.join(below).join("cgroup.procs");
        let now = read(&path)?;
        if now.lines().any(|line| line == pid.to_string()) {
            Ok(())
        } else {
            Err(format!("{} lists {now:?}, not {pid}", path.display()))
        }
    }
}

fn read(path: &Path) -> Outcome<String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

fn write(path: &Path, text: &str) -> Outcome {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// The test's cgroup in each hierarchy, with one below it.
fn cgroups(place: &Place) -> Vec<Cgroup> {
    let made = |(root, property, saved, other): (&str, &'static str, &'static str, &'static str)| {
        let directory = Path::new(root).join(place.name());
        let is_hierarchy = Path::new(root).join("cgroup.procs").exists();
        (is_hierarchy && std::fs::create_dir_all(directory.join("below")).is_ok()).then_some(Cgroup {
            directory,
            property,
            saved,
            other,
        })
    };
    PROPERTIES.into_iter().filter_map(made).collect()
}

fn remove(cgroups: &[Cgroup]) -> Outcome {
    for cgroup in cgroups {
        for directory in [cgroup.directory.join("below"), cgroup.directory.clone()] {
            processes::wait_for("a cgroup to be empty", || {
                !directory.exists() || std::fs::remove_dir(&directory).is_ok()
            })?;
        }
    }
    Ok(())
}

/// A tree with its root in the test's cgroups and its child below; dumped with `options`, and gone.
struct Dumped<'a> {
    workload: Workload<'a>,
    images: PathBuf,
    cgroups: Vec<Cgroup>,
    tree: Vec<i32>,
}

fn dumped<'a>(place: &'a Place, engine: &Engine, options: &[&str]) -> Outcome<Dumped<'a>> {
    let cgroups = cgroups(place);
    if cgroups.is_empty() {
        return Err("no cgroup can be made: the test needs root and a mounted hierarchy".into());
    }
    let mut workload = Workload::start(place, "stopped_child")?;
    let tree = processes::tree(workload.pid);
    for cgroup in &cgroups {
        write(&cgroup.directory.join(cgroup.property), cgroup.saved)?;
        write(&cgroup.directory.join("cgroup.procs"), &tree[0].to_string())?;
        write(&cgroup.directory.join("below/cgroup.procs"), &tree[1].to_string())?;
    }
    let images = workload.images()?;
    engine.dump(place, workload.pid, &images, options)?;
    processes::await_end(&tree)?;
    Ok(Dumped { workload, images, cgroups, tree })
}

/// Dumps with one engine, removes the cgroups, restores with the other.
fn round_trip(dumper: &Engine, restorer: &Engine) -> Outcome {
    let place = Place::new()?;
    let Dumped { workload, images, cgroups, tree } = dumped(&place, dumper, &["--manage-cgroups"])?;
    remove(&cgroups)?;
    restorer.restore(&place, &images, &["--manage-cgroups"])?;
    workload.ask()?;
    for cgroup in &cgroups {
        cgroup.is("", cgroup.saved)?;
        cgroup.has("", tree[0])?;
        cgroup.has("below", tree[1])?;
    }
    processes::end_all_below();
    remove(&cgroups)?;
    workload.end()
}

#[test]
fn cgroups_come_back_with_properties_and_tasks() -> Outcome {
    round_trip(&Engine::under_test()?, &Engine::under_test()?)
}

/// A control file that nobody knows by itself is saved and restored when it is named to both, and named when the restore does not
/// know it.
#[test]
fn properties_are_chosen() -> Outcome {
    // Of every version 2 cgroup since Linux 6.1: whether pressure is accounted.
    const FILE: &str = "cgroup.pressure";
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let cgroups = cgroups(&place);
    let chosen = cgroups.iter().find(|cgroup| cgroup.directory.join(FILE).exists());
    let directory = chosen.ok_or_else(|| format!("no cgroup has {FILE}: the test needs version 2"))?.directory.clone();
    write(&directory.join(FILE), "0")?;
    let file = place.path("properties");
    write(&file, &format!("\"cgroup\":\n - \"strategy\": \"merge\"\n - \"properties\": [\"{FILE}\"]\n"))?;
    let options = ["--manage-cgroups", "--cgroup-props-file", &file.to_string_lossy()];
    let Dumped { workload, images, .. } = dumped(&place, &engine, &options)?;
    remove(&cgroups)?;
    let refused = engine.restore(&place, &images, &options[..1]).err().unwrap_or_default();
    if !["cgroup.pressure", "--cgroup-props"].iter().all(|word| refused.contains(word)) {
        return Err(format!("a file that the restore was not told of is no reason to refuse: {refused}"));
    }
    engine.restore(&place, &images, &options)?;
    workload.ask()?;
    let now = read(&directory.join(FILE))?;
    if now != "0" {
        return Err(format!("{FILE} is {now}"));
    }
    processes::end_all_below();
    remove(&cgroups)?;
    workload.end()
}

#[test]
#[ignore = "needs CRIU 4.x: set CRIU to its path"]
fn criu_restores_cgroups_that_ferry_saved() -> Outcome {
    round_trip(&Engine::ferry()?, &foreign()?)
}

#[test]
#[ignore = "needs CRIU 4.x: set CRIU to its path"]
fn ferry_restores_cgroups_that_criu_saved() -> Outcome {
    round_trip(&foreign()?, &Engine::ferry()?)
}

fn foreign() -> Outcome<Engine> {
    Engine::command_line(&std::env::var("CRIU").map_err(|_| "set CRIU to the program to exchange images with")?)
}

/// What a mode does with cgroups that exist: whether properties are as saved afterwards, as they were before, or it is refused.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    Saved,
    Kept,
    Refused,
    /// Not looked at: tasks stay where the engine is.
    Ignored,
}

fn into_existing(mode: &str, expect: Expect) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let Dumped { workload, images, cgroups, tree } = dumped(&place, &engine, &[])?;
    for cgroup in &cgroups {
        write(&cgroup.directory.join(cgroup.property), cgroup.other)?;
    }
    let restored = engine.restore(&place, &images, &[&format!("--manage-cgroups={mode}")]);
    if expect == Expect::Refused {
        let problem = restored.err().ok_or("the restore was not refused")?;
        if !problem.contains("exists already") {
            return Err(problem);
        }
    } else {
        restored?;
        workload.ask()?;
        for cgroup in &cgroups {
            cgroup.is("", if expect == Expect::Saved { cgroup.saved } else { cgroup.other })?;
            if cgroup.has("below", tree[1]).is_ok() == (expect == Expect::Ignored) {
                return Err(format!("{}: tasks are where they ought not to be", cgroup.directory.display()));
            }
        }
    }
    processes::end_all_below();
    remove(&cgroups)?;
    workload.end()
}

#[test]
fn soft_keeps_existing_cgroups() -> Outcome {
    into_existing("soft", Expect::Kept)
}

#[test]
fn full_sets_the_properties_of_existing_cgroups() -> Outcome {
    into_existing("full", Expect::Saved)
}

#[test]
fn props_sets_the_properties_of_existing_cgroups() -> Outcome {
    into_existing("props", Expect::Saved)
}

#[test]
fn none_keeps_existing_cgroups() -> Outcome {
    into_existing("none", Expect::Kept)
}

#[test]
fn strict_refuses_existing_cgroups() -> Outcome {
    into_existing("strict", Expect::Refused)
}

#[test]
fn ignore_leaves_tasks_where_they_are_made() -> Outcome {
    into_existing("ignore", Expect::Ignored)
}

#[test]
fn none_refuses_missing_cgroups_and_leaves_nothing() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let Dumped { workload, images, cgroups, .. } = dumped(&place, &engine, &[])?;
    remove(&cgroups)?;
    let problem = engine.restore(&place, &images, &["--manage-cgroups=none"]).err().ok_or("it was not refused")?;
    if !problem.contains("does not exist") {
        return Err(problem);
    }
    workload.end()
}

#[test]
fn a_new_root_is_where_cgroups_come_back() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let Dumped { workload, images, cgroups, tree } = dumped(&place, &engine, &[])?;
    remove(&cgroups)?;
    let root = format!("/{}-moved/here", place.name());
    engine.restore(&place, &images, &["--cgroup-root", &root])?;
    workload.ask()?;
    let mut moved = Vec::new();
    for cgroup in &cgroups {
        let hierarchy = cgroup.directory.parent().unwrap_or(Path::new("/"));
        let directory = hierarchy.join(root.trim_start_matches('/'));
        let new = Cgroup { directory, property: cgroup.property, saved: cgroup.saved, other: cgroup.other };
        new.is("", new.saved)?;
        new.has("", tree[0])?;
        new.has("below", tree[1])?;
        moved.push(new);
    }
    processes::end_all_below();
    remove(&moved)?;
    for new in &moved {
        let _ = new.directory.parent().map(std::fs::remove_dir);
    }
    workload.end()
}

#[test]
fn a_killed_restore_leaves_no_cgroups() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let Dumped { workload, images, cgroups, tree } = dumped(&place, &engine, &["--manage-cgroups"])?;
    remove(&cgroups)?;
    for point in ["restore-after-first-task", "restore-after-tree", "restore-before-go", "restore-freed"] {
        let at = |error: String| format!("{point}: {error}");
        let mut command = engine.command(&place, "restore", &images, "restore.log");
        command.args(["-d", "--manage-cgroups", "--fault", &format!("{point}=kill")]);
        let output = programs::run(&mut command).map_err(at)?;
        if output.status.code().is_some() {
            return Err(at(format!("it was not killed: {}", programs::said(&output))));
        }
        processes::wait_for("its processes to end", || {
            processes::reap();
            processes::below().is_empty()
        })
        .map_err(at)?;
        for cgroup in &cgroups {
            if cgroup.directory.exists() {
                return Err(at(format!("{} is left", cgroup.directory.display())));
            }
        }
    }
    engine.restore(&place, &images, &["--manage-cgroups"])?;
    workload.ask()?;
    for cgroup in &cgroups {
        cgroup.has("below", tree[1])?;
    }
    processes::end_all_below();
    remove(&cgroups)?;
    workload.end()
}

#[test]
fn a_failed_restore_removes_the_cgroups_that_it_made() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let Dumped { workload, images, cgroups, .. } = dumped(&place, &engine, &[])?;
    remove(&cgroups)?;
    let script = place.path("fail-late");
    write(&script, "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION != post-restore ]\n")?;
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .map_err(|error| format!("{}: {error}", script.display()))?;
    let problem = engine.restore(&place, &images, &["--action-script", &script.to_string_lossy()]).err();
    let problem = problem.ok_or("a failing script did not fail the restore")?;
    if !problem.contains("post-restore") {
        return Err(problem);
    }
    for cgroup in &cgroups {
        if cgroup.directory.exists() {
            return Err(format!("{} is left", cgroup.directory.display()));
        }
    }
    workload.end()
}
