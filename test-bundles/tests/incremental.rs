//! Pre-dumps, and dumps on top of earlier images.

use ferry_test_bundles::victim::Victim;
use ferry_test_bundles::{Engine, Outcome, Place, Workload, processes, programs};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// Workloads that change their memory between a pre-dump and the next, each in a way of its own.
const REWRITTEN: &[&str] = &[
    "rewritten_pages",
    "rewritten_discarded",
    "rewritten_mapped_anew",
    "rewritten_moved",
    "rewritten_by_kernel",
    "rewritten_files",
    "rewritten_by_relatives",
    "rewritten_protected",
    "rewritten_huge",
    "rewritten_grown",
    "rewritten_shared",
];

/// Others, of all kinds of memory, and a tree of many processes.
const OTHERS: &[&str] = &[
    "anonymous_shared",
    "page_content_mix",
    "zero_pages",
    "protected_data",
    "many_mappings",
    "file_private",
    "copy_on_write",
    "copy_on_write_unmapped",
    "dont_fork",
    "transparent_huge_pages",
    "threads",
    "household",
];

fn all(names: &[&str], one: impl Fn(&str) -> Outcome) -> Outcome {
    let failed: Vec<String> = names.iter().filter_map(|name| Some(format!("{name}: {}", one(name).err()?))).collect();
    if failed.is_empty() { Ok(()) } else { Err(failed.join("\n")) }
}

/// Two pre-dumps with changes after each, a dump, a restore; so many times.
fn rounds(number: u32, name: &str) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, name)?;
    for round in 1..=number {
        let told = |error| format!("round {round}: {error}");
        workload.pre_dump(&engine).map_err(told)?;
        workload.pre_dump(&engine).map_err(told)?;
        workload.incremental_round_trip(&engine, &engine).map_err(told)?;
    }
    workload.end()
}

fn pre_dumped_twice(name: &str) -> Outcome {
    rounds(1, name)
}

/// A chain goes on across a restore.
#[test]
fn what_was_restored_is_pre_dumped_again() -> Outcome {
    rounds(3, "rewritten_discarded")
}

#[test]
fn what_changes_after_a_pre_dump_is_not_taken_from_it() -> Outcome {
    all(REWRITTEN, pre_dumped_twice)
}

#[test]
fn trees_of_all_kinds_are_pre_dumped() -> Outcome {
    all(OTHERS, pre_dumped_twice)
}

/// Dumps that leave the tree running, each on top of the one before; every one of them is a checkpoint.
#[test]
fn snapshots_are_each_restored() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "anonymous_private")?;
    let mut folders = Vec::new();
    for number in 1..=3 {
        let images = workload.images()?;
        let previous = format!("../images-{}", number - 1);
        let mut options = vec!["--leave-running", "--track-mem"];
        if number > 1 {
            options.extend(["--prev-images-dir", &previous]);
        }
        engine.dump(&place, workload.pid, &images, &options)?;
        workload.ask()?;
        folders.push(images);
    }
    let sizes: Vec<u64> = folders.iter().map(|folder| pages(folder)).collect();
    if sizes[1] * 2 > sizes[0] {
        return Err(format!("the second dump wrote {} bytes of pages, the first {}", sizes[1], sizes[0]));
    }
    for folder in folders.iter().rev() {
        processes::end_all_below();
        engine.restore(&place, folder, &[]).map_err(|error| format!("{}: {error}", folder.display()))?;
        workload.ask().map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    workload.end()
}

fn pages(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let pages = files.filter(|file| file.file_name().to_string_lossy().starts_with("pages-"));
    pages.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
}

/// Pages that nobody has written to are not even read, as long as the keeper lives; without it they are compared.
#[test]
fn the_kernel_tells_what_was_written_and_nothing_depends_on_it() -> Outcome {
    let engine = Engine::ferry()?;
    for keep in [true, false] {
        let place = Place::new()?;
        let mut workload = Workload::start(&place, "rewritten_pages")?;
        workload.pre_dump(&engine)?;
        let keepers: Vec<i32> =
            processes::below().into_iter().filter(|pid| processes::name(*pid) == "ferry-keeper").collect();
        let &[keeper] = keepers.as_slice() else { return Err(format!("{} keepers", keepers.len())) };
        let files = fs::read_dir(format!("/proc/{keeper}/fd")).into_iter().flatten().count();
        if files != 3 {
            return Err(format!("the keeper holds {files} descriptors, not a userfaultfd, a process and its record"));
        }
        let own = fs::read_dir(format!("/proc/{}/fd", workload.pid)).into_iter().flatten().count();
        if own != 3 {
            return Err(format!("the workload has {own} descriptors"));
        }
        if !keep {
            processes::kill(keeper)?;
        }
        workload.incremental_round_trip(&engine, &engine)?;
        let log = fs::read_to_string(place.path("images-2/dump.log")).map_err(|error| error.to_string())?;
        if log.contains("writes were tracked") != keep {
            return Err(format!("keeper {keep}: {log}"));
        }
        workload.end()?;
    }
    Ok(())
}

/// A dump without parent images of a tree that a keeper watches over.
#[test]
fn a_tracked_tree_is_dumped_by_itself() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut workload = Workload::start(&place, "rewritten_huge")?;
    workload.pre_dump(&engine)?;
    workload.dump_running(&engine)?;
    workload.round_trip(&engine)?;
    workload.end()
}

/// Images that the keeper does not know are compared, whatever else it vouches for.
#[test]
fn a_keeper_vouches_for_its_own_images_only() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut workload = Workload::start(&place, "rewritten_pages")?;
    workload.pre_dump(&engine)?;
    // A second one that does not build on the first; the page is written in between.
    engine.pre_dump(&place, workload.pid, &place.folder("other")?, &[])?;
    workload.incremental_round_trip(&engine, &engine)?;
    workload.end()
}

/// A program that another took the place of since the pre-dump.
#[test]
fn a_process_that_executed_another_program_is_saved_whole() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start_late(&place, "anonymous_private", &engine)?;
    workload.incremental_round_trip(&engine, &engine)?;
    workload.end()
}

/// Chains of another program have no manifests.
#[test]
fn sets_without_a_manifest_are_followed_too() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut workload = Workload::start(&place, "page_content_mix")?;
    workload.pre_dump(&engine)?;
    workload.pre_dump(&engine)?;
    workload.incremental_round_trip(&engine, &engine)?;
    processes::end_all_below();
    for number in 1..=3 {
        let manifest = place.path(&format!("images-{number}/ferry.json"));
        fs::remove_file(&manifest).map_err(|error| format!("{}: {error}", manifest.display()))?;
    }
    engine.restore(&place, &place.path("images-3"), &[])?;
    workload.ask()?;
    workload.end()
}

/// Parents that are not the dump's, or lead elsewhere: the restore says so and leaves nothing.
#[test]
fn parents_that_are_not_the_dumps_are_refused() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut workload = Workload::start(&place, "anonymous_private")?;
    workload.pre_dump(&engine)?;
    let (first, images) = (place.folder("images-1")?, place.folder("images-2")?);
    match engine.restore(&place, &first, &[]) {
        Err(error) if error.contains("memory only") => {}
        other => return Err(format!("the restore of a pre-dump: {other:?}")),
    }
    workload.incremental_round_trip(&engine, &engine)?;
    processes::end_all_below();
    let link = images.join("parent");
    let elsewhere = place.folder("elsewhere/images-1")?;
    for file in fs::read_dir(&first).into_iter().flatten().flatten() {
        fs::copy(file.path(), elsewhere.join(file.file_name())).map_err(|error| error.to_string())?;
    }
    let cases: [(&str, Option<&Path>); 5] = [
        ("missing", None),
        ("beside", Some(&elsewhere)),
        ("beside", Some(Path::new("../../../../../../../../../../etc"))),
        ("No such file", Some(Path::new("../nowhere"))),
        ("not those that they were made with", Some(Path::new("../images-2"))),
    ];
    for (word, target) in cases {
        let _ = fs::remove_file(&link);
        target.map_or(Ok(()), |target| symlink(target, &link)).map_err(|error| error.to_string())?;
        match engine.restore(&place, &images, &[]) {
            Err(error) if error.contains(word) || error.contains("come back") => {}
            other => return Err(format!("{target:?}: the restore should say {word}: {other:?}")),
        }
        place.nothing_left()?;
    }
    let _ = fs::remove_file(&link);
    symlink("../images-1", &link).map_err(|error| error.to_string())?;
    let pages = first.join("pages-1.img");
    let mut bytes = fs::read(&pages).map_err(|error| error.to_string())?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&pages, bytes).map_err(|error| error.to_string())?;
    match engine.restore(&place, &images, &[]) {
        Err(error) if error.contains("damaged") => place.nothing_left(),
        other => Err(format!("a flipped bit in the parent's pages: {other:?}")),
    }
}

/// Points of a dump that a pre-dump does not come to, or at which its images are complete.
const NOT_MET: [&str; 6] = ["recheck", "enter", "batch", "answers", "records", "after-finish"];

/// Wherever a pre-dump fails or is killed, the tree is unharmed: nobody tracks its writes, no descriptor is left in it.
#[test]
fn a_pre_dump_that_fails_harms_nothing() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut victim = Victim::start(&place, "survivor")?;
    let listed = programs::succeed(Command::new(programs::ferry()?).args(["criu", "--list-faults"]))?;
    let met = |point: &&str| point.starts_with("dump-") && !NOT_MET.iter().any(|other| point.ends_with(other));
    for (number, point) in listed.lines().filter(met).enumerate() {
        let action = if number % 3 == 0 { "error" } else { "kill" };
        let at = |error: String| format!("{point}={action}: {error}");
        let images = victim.images()?;
        let fault = format!("{point}={action}");
        if engine.pre_dump(&place, victim.workload.pid, &images, &["--fault", &fault]).is_ok() {
            return Err(at("the pre-dump succeeded: was the point not met?".to_owned()));
        }
        victim.alone().map_err(at)?;
        victim.unharmed().map_err(at)?;
    }
    victim.round_trip(&engine)?;
    victim.end()
}
