//! Freezing on the host, with cgroups of both designs, and in containers: found frozen and left frozen, refused for others'
//! sake, vfork(2).

use ferry_test_bundles::cgroup::{Cgroup, Design};
use ferry_test_bundles::{Bundle, Container, Engine, Outcome, Place, Workload, processes};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Runs a test in a cgroup of each design that this machine has; it needs at least one.
fn for_each_design(test: impl Fn(&Place, Cgroup) -> Outcome) -> Outcome {
    let designs = Design::available();
    if designs.is_empty() {
        return Err("this machine has no freezer, neither of cgroup v1 nor of v2".to_owned());
    }
    for (design, root) in designs {
        let place = Place::new()?;
        let cgroup = Cgroup::new(&place, design, &root)?;
        test(&place, cgroup).map_err(|error| format!("{design:?}: {error}"))?;
    }
    Ok(())
}

/// Ends the workload, sees that nothing is left of it, and of the cgroup.
fn end(workload: Workload, cgroup: Cgroup) -> Outcome {
    cgroup.end()?;
    workload.end()
}

/// The counters of a workload, all of them.
fn counters(place: &Place) -> Outcome<Vec<u8>> {
    let path = place.path("work/counters");
    std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))
}

fn named(cgroup: &Cgroup) -> [String; 2] {
    ["--freeze-cgroup".to_owned(), cgroup.directory().display().to_string()]
}

/// A dump of the workload with its cgroup, and how long it took.
fn dump(workload: &mut Workload, place: &Place, cgroup: &Cgroup, options: &[&str]) -> Outcome<(PathBuf, Duration)> {
    let (engine, images) = (Engine::under_test()?, workload.images()?);
    let named = named(cgroup);
    let options: Vec<&str> = named.iter().map(String::as_str).chain(options.iter().copied()).collect();
    let start = Instant::now();
    engine.dump(place, workload.pid, &images, &options)?;
    Ok((images, start.elapsed()))
}

/// A cgroup frozen by hand: not a step is done during a dump, which takes no longer than another, and it is left frozen.
#[test]
fn frozen_by_hand_stays_frozen() -> Outcome {
    for_each_design(|place, cgroup| {
        let mut workload = Workload::start(place, "spinning")?;
        cgroup.enter(workload.pid)?;
        let (_, unfrozen) = dump(&mut workload, place, &cgroup, &["--leave-running"])?;
        if cgroup.is_frozen() {
            return Err("a cgroup that was found thawed is left frozen".to_owned());
        }
        workload.ask()?;
        cgroup.freeze()?;
        let before = counters(place)?;
        for _ in 0..3 {
            let (_, frozen) = dump(&mut workload, place, &cgroup, &["--leave-running"])?;
            if frozen > unfrozen * 3 + Duration::from_millis(500) {
                return Err(format!("frozen, the dump took {frozen:?}; otherwise {unfrozen:?}"));
            }
            if !cgroup.is_frozen() {
                return Err("the cgroup that was found frozen is not left so".to_owned());
            }
            if counters(place)? != before {
                return Err("frozen tasks have run during the dump".to_owned());
            }
        }
        cgroup.thaw()?;
        workload.ask()?;
        workload.round_trip(&Engine::under_test()?)?;
        end(workload, cgroup)
    })
}

/// A stop dump of a cgroup frozen by hand: nothing runs before the end, and the images restore to a tree that runs.
#[test]
fn frozen_by_hand_is_dumped_and_restored() -> Outcome {
    for_each_design(|place, cgroup| {
        let mut workload = Workload::start(place, "spinning")?;
        cgroup.enter(workload.pid)?;
        cgroup.freeze()?;
        let (before, tree) = (counters(place)?, processes::tree(workload.pid));
        let (images, _) = dump(&mut workload, place, &cgroup, &[])?;
        processes::await_end(&tree)?;
        if counters(place)? != before {
            return Err("frozen tasks have run before they were ended".to_owned());
        }
        if cgroup.is_frozen() {
            return Err("the emptied cgroup is frozen, so that nothing could be restored into it".to_owned());
        }
        Engine::under_test()?.restore(place, &images, &[])?;
        workload.ask()?;
        end(workload, cgroup)
    })
}

/// A process in a job-control stop, in a cgroup that ferry freezes, and in one frozen by hand.
#[test]
fn a_stopped_process_in_a_frozen_cgroup_is_saved() -> Outcome {
    for_each_design(|place, cgroup| {
        let mut workload = Workload::start(place, "stopped_child")?;
        cgroup.enter(workload.pid)?;
        dump(&mut workload, place, &cgroup, &["--leave-running"])?;
        workload.ask()?;
        cgroup.freeze()?;
        dump(&mut workload, place, &cgroup, &["--leave-running"])?;
        if !cgroup.is_frozen() {
            return Err("the cgroup is not left frozen".to_owned());
        }
        let tree = processes::tree(workload.pid);
        let (images, _) = dump(&mut workload, place, &cgroup, &[])?;
        processes::await_end(&tree)?;
        Engine::under_test()?.restore(place, &images, &[])?;
        workload.ask()?;
        end(workload, cgroup)
    })
}

/// A cgroup that is frozen from above is dumped where it is, and stays frozen.
#[test]
fn frozen_from_above_stays_frozen() -> Outcome {
    for_each_design(|place, outer| {
        let inner = outer.below("inner")?;
        let mut workload = Workload::start(place, "spinning")?;
        inner.enter(workload.pid)?;
        outer.freeze()?;
        let before = counters(place)?;
        dump(&mut workload, place, &inner, &["--leave-running"])?;
        if !outer.is_frozen() || counters(place)? != before {
            return Err("what was frozen from above has run".to_owned());
        }
        outer.thaw()?;
        workload.ask()?;
        end(workload, outer)
    })
}

/// A dump that must be refused in these words, and change nothing.
fn refused(workload: &mut Workload, place: &Place, cgroup: &Cgroup, options: &[&str], words: &[&str]) -> Outcome {
    let tree = processes::tree(workload.pid);
    match dump(workload, place, cgroup, &[&["--leave-running"], options].concat()) {
        Ok(_) => Err("the dump succeeded".to_owned()),
        Err(error) => match words.iter().find(|word| !error.contains(**word)) {
            Some(word) => Err(format!("the refusal does not say {word:?}: {error}")),
            None if processes::tree(workload.pid) != tree => Err("the tree has changed".to_owned()),
            None => Ok(()),
        },
    }
}

/// A cgroup above that holds others too cannot be thawed for the tree's sake.
#[test]
fn frozen_from_above_with_others_is_refused() -> Outcome {
    for_each_design(|place, outer| {
        let (inner, other) = (outer.below("inner")?, outer.below("other")?);
        let mut workload = Workload::start(place, "spinning")?;
        inner.enter(workload.pid)?;
        let mut sleeper = sleeper()?;
        other.enter(sleeper.id() as i32)?;
        outer.freeze()?;
        let before = counters(place)?;
        let name = outer.directory().display().to_string();
        refused(&mut workload, place, &inner, &[], &[&name, &sleeper.id().to_string(), "frozen"])?;
        if !outer.is_frozen() || counters(place)? != before {
            return Err("a refused dump has set frozen tasks running".to_owned());
        }
        outer.thaw()?;
        let _ = sleeper.kill().and_then(|()| sleeper.wait());
        workload.ask()?;
        end(workload, outer)
    })
}

fn sleeper() -> Outcome<std::process::Child> {
    std::process::Command::new("sleep").arg("1000").spawn().map_err(|error| format!("sleep: {error}"))
}

/// A cgroup with a process that is none of the tree's is refused, frozen or not.
#[test]
fn a_cgroup_with_others_is_refused() -> Outcome {
    for_each_design(|place, cgroup| {
        let mut workload = Workload::start(place, "spinning")?;
        cgroup.enter(workload.pid)?;
        let mut sleeper = sleeper()?;
        cgroup.enter(sleeper.id() as i32)?;
        let words = [&*sleeper.id().to_string(), "(sleep)", &workload.pid.to_string()];
        refused(&mut workload, place, &cgroup, &[], &words)?;
        workload.ask()?;
        cgroup.freeze()?;
        let before = counters(place)?;
        refused(&mut workload, place, &cgroup, &[], &words)?;
        if !cgroup.is_frozen() || counters(place)? != before {
            return Err("a refused dump has set frozen tasks running".to_owned());
        }
        cgroup.thaw()?;
        let _ = sleeper.kill().and_then(|()| sleeper.wait());
        workload.round_trip(&Engine::under_test()?)?;
        end(workload, cgroup)
    })
}

/// Tasks of the tree that are in other cgroups are found and saved too.
#[test]
fn tasks_outside_the_cgroup_are_saved() -> Outcome {
    for_each_design(|place, cgroup| {
        let mut workload = Workload::start(place, "spinning")?;
        // The root alone, and one child below.
        let tree = processes::tree(workload.pid);
        let write = |directory: &Path, pid: i32| {
            std::fs::write(directory.join("cgroup.procs"), pid.to_string()).map_err(|error| error.to_string())
        };
        write(cgroup.directory(), tree[0])?;
        write(cgroup.below("part")?.directory(), tree[1])?;
        let (images, _) = dump(&mut workload, place, &cgroup, &[])?;
        processes::await_end(&tree)?;
        Engine::under_test()?.restore(place, &images, &[])?;
        if processes::tree(workload.pid) != tree {
            return Err("not every process is restored".to_owned());
        }
        workload.ask()?;
        end(workload, cgroup)
    })
}

/// A child of vfork(2) is let go until its parent can be stopped.
#[test]
fn a_child_of_vfork_is_waited_for() -> Outcome {
    for_each_design(|place, cgroup| {
        let mut workload = Workload::start(place, "vfork_loop")?;
        cgroup.enter(workload.pid)?;
        for _ in 0..5 {
            dump(&mut workload, place, &cgroup, &["--leave-running"])?;
        }
        workload.ask()?;
        end(workload, cgroup)
    })
}

/// One that never ends is named, in time, and the tree runs on; frozen by hand, it is not set running to find out.
#[test]
fn a_child_of_vfork_that_stays_is_named() -> Outcome {
    for_each_design(|place, cgroup| {
        let mut workload = Workload::start(place, "vfork_stuck")?;
        cgroup.enter(workload.pid)?;
        let tree = processes::tree(workload.pid);
        let [_, parent, child] = tree[..] else { return Err(format!("odd tree {tree:?}")) };
        let words = ["vfork(2)", &parent.to_string(), &child.to_string()];
        refused(&mut workload, place, &cgroup, &["--timeout", "1"], &words)?;
        workload.ask()?;
        cgroup.freeze()?;
        refused(&mut workload, place, &cgroup, &["--timeout", "1"], &words)?;
        if !cgroup.is_frozen() {
            return Err("the cgroup is not left frozen".to_owned());
        }
        cgroup.thaw()?;
        workload.ask()?;
        end(workload, cgroup)
    })
}

/// A paused container is checkpointed as it stands and stays paused; once checkpointed for good, it is restored running.
#[test]
fn a_paused_container_stays_paused() -> Outcome {
    let place = Place::new()?;
    let (bundle, talk) = Bundle::of_workload(&place, "spinning")?;
    let container = Container::run(&place, &bundle)?;
    talk.await_ready()?;
    let images = place.folder("images")?.to_string_lossy().into_owned();
    let start = Instant::now();
    container.verb("checkpoint", &["--leave-running", "--image-path", &images])?;
    let unpaused = start.elapsed();
    talk.ask()?;
    container.verb("pause", &[])?;
    let before = counters(&place)?;
    for _ in 0..2 {
        let start = Instant::now();
        container.verb("checkpoint", &["--leave-running", "--image-path", &images])?;
        if start.elapsed() > unpaused * 3 + Duration::from_millis(500) {
            return Err(format!("paused, the checkpoint took {:?}; otherwise {unpaused:?}", start.elapsed()));
        }
        container.is("paused")?;
    }
    if counters(&place)? != before {
        return Err("the paused container has run".to_owned());
    }
    container.verb("resume", &[])?;
    talk.ask()?;
    container.verb("pause", &[])?;
    let before = counters(&place)?;
    container.checkpoint(&["--image-path", &images])?;
    if counters(&place)? != before {
        return Err("the paused container has run before it was ended".to_owned());
    }
    container.restore(&["--image-path", &images])?;
    talk.ask()?;
    container.end()
}

/// A command that was started in the container from outside would be lost: it is named, and the container runs on.
#[test]
fn a_command_started_from_outside_is_refused() -> Outcome {
    let place = Place::new()?;
    let (bundle, talk) = Bundle::of_workload(&place, "spinning")?;
    let container = Container::run(&place, &bundle)?;
    talk.await_ready()?;
    let mut command = container.command("exec");
    command.arg(&container.id).args(["sleep", "1000"]).stdin(std::process::Stdio::null());
    let mut session = command.spawn().map_err(|error| format!("exec: {error}"))?;
    processes::wait_for("the command inside", || {
        container.exec(&["ps"]).is_ok_and(|listing| listing.contains("sleep 1000"))
    })?;
    ferry_test_bundles::container::refusal(
        container.command("checkpoint").arg("--leave-running").arg(&container.id),
        &["(sleep)", "started in the container from outside"],
    )?;
    container.is("running")?;
    talk.ask()?;
    container.exec(&["sh", "-c", "kill $(ps -o pid,args | awk '$2 == \"sleep\" {print $1}')"])?;
    session.wait().map_err(|error| format!("exec: {error}"))?;
    container.checkpoint(&[])?;
    container.restore(&[])?;
    talk.ask()?;
    container.end()
}

/// How often the fork bomb is dumped: `FERRY_FORK_BOMB_DUMPS`, ten times unless told otherwise.
const DUMPS: usize = 10;

/// Processes that make processes, hundreds a second, up to the limit of their container: dumped again and again while they
/// run on, and restored from the last dump, without one failure.
#[test]
fn a_fork_bomb_is_dumped_again_and_again() -> Outcome {
    let dumps = std::env::var("FERRY_FORK_BOMB_DUMPS").ok().and_then(|text| text.parse().ok()).unwrap_or(DUMPS);
    let place = Place::new()?;
    let (mut bundle, talk) = Bundle::of_workload(&place, "fork_bomb")?;
    bundle.config["linux"]["resources"]["pids"] = serde_json::json!({"limit": 48});
    let container = Container::run(&place, &bundle)?;
    talk.await_ready()?;
    let births = || -> Outcome<u64> {
        let words = counters(&place)?;
        Ok(words.chunks_exact(8).take(4).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default())).sum())
    };
    let images =
        |number: usize| Ok::<_, String>(place.folder(&format!("images-{number}"))?.to_string_lossy().into_owned());
    let (start, first) = (Instant::now(), births()?);
    for number in 1..=dumps {
        container
            .verb("checkpoint", &["--leave-running", "--image-path", &images(number)?])
            .map_err(|error| format!("dump {number}: {error}"))?;
        if number > 1 {
            let _ = std::fs::remove_dir_all(images(number - 1)?);
        }
    }
    let rate = (births()? - first) as f64 / start.elapsed().as_secs_f64();
    let _ = std::io::Write::write_all(
        &mut std::io::stderr(),
        format!("{dumps} dumps, {rate:.0} births a second between them\n").as_bytes(),
    );
    talk.ask()?;
    let tree = processes::tree(container.pid()?);
    container.verb("delete", &["--force"])?;
    processes::await_end(&tree)?;
    container.restore(&["--image-path", &images(dumps)?])?;
    talk.ask()?;
    container.end()
}
