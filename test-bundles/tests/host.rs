//! Each workload on the host: by itself, dumped and restored twice, dumped while it runs on.
//!
//! One trial per workload and way, named `way::workload`. A workload whose condition this machine does not meet is
//! listed as ignored, which counts as not passed; the reason is in its kind, which the list shows.

use ferry_test_bundles::{Engine, Outcome, Place, Workload, expectations, processes, workload};
use libtest_mimic::{Arguments, Trial};

/// The workload can tell right from wrong without any dump.
fn undisturbed(name: &str) -> Outcome {
    let place = Place::new()?;
    let workload = Workload::start(&place, name)?;
    workload.ask()?;
    workload.ask().map_err(|error| format!("the second time: {error}"))?;
    workload.end()
}

/// Dump, restore, dump, restore.
fn twice(name: &str) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, name)?;
    workload.round_trip(&engine).map_err(|error| format!("first round: {error}"))?;
    workload.round_trip(&engine).map_err(|error| format!("second round: {error}"))?;
    workload.end()
}

/// A dump that leaves the tree running, and a whole round after it.
fn running_on(name: &str) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, name)?;
    workload.dump_running(&engine)?;
    workload.round_trip(&engine)?;
    workload.end()
}

/// The dump is refused in words that name the object, and nothing has happened to the workload.
fn refused(name: &str, word: &str) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, name)?;
    let (images, tree) = (workload.images()?, processes::tree(workload.pid));
    let error = match engine.dump(&place, workload.pid, &images, &[]) {
        Ok(()) => return Err("the dump succeeded; if it is right, expectations.rs has a row too many".to_owned()),
        Err(error) => error,
    };
    if !engine.is_foreign() {
        for needed in [word.to_owned(), workload.pid.to_string()] {
            if !error.to_lowercase().contains(&needed) {
                return Err(format!("the refusal does not say {needed}: {error}"));
            }
        }
        if images.join("inventory.img").exists() || images.join("ferry.json").exists() {
            return Err("a refused dump left images".to_owned());
        }
    }
    let now = processes::tree(workload.pid);
    if now != tree {
        return Err(format!("the tree is {now:?} after the refusal, was {tree:?}"));
    }
    workload.ask().map_err(|error| format!("after the refusal: {error}"))?;
    workload.end()
}

/// Every row of the table of expectations names a workload.
fn expectations_name_workloads() -> Outcome {
    let names: Vec<String> = workload::list()?.into_iter().map(|listed| listed.name).collect();
    match expectations::REFUSED.iter().find(|(name, _)| !names.iter().any(|known| known == name)) {
        None => Ok(()),
        Some((name, _)) => Err(format!("expectations.rs names {name}, which is no workload")),
    }
}

/// The table of supported kernel objects names every workload, so that it cannot forget one.
fn support_page_names_workloads() -> Outcome {
    let page = include_str!("../../docs/support.md");
    let missing: Vec<String> = workload::list()?
        .into_iter()
        .map(|listed| listed.name)
        .filter(|name| !page.contains(&format!("`{name}`")))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("docs/support.md does not name {}", missing.join(", "))) }
}

fn trial(way: &str, listed: &workload::Listed, run: impl FnOnce(&str) -> Outcome + Send + 'static) -> Trial {
    let name = listed.name.clone();
    let trial = Trial::test(format!("{way}::{name}"), move || run(&name).map_err(Into::into));
    match &listed.missing {
        None => trial,
        Some(reason) => trial.with_kind(format!("skipped: {reason}")).with_ignored_flag(true),
    }
}

fn main() {
    let mut arguments = Arguments::from_args();
    // A test adopts and reaps orphans: one at a time in a process.
    arguments.test_threads = Some(1);
    let all = workload::list().unwrap_or_else(|error| {
        let _ = std::io::Write::write_all(&mut std::io::stderr(), error.as_bytes());
        std::process::exit(101)
    });
    let mut trials = vec![
        Trial::test("table::expectations_name_workloads", || expectations_name_workloads().map_err(Into::into)),
        Trial::test("table::support_page_names_workloads", || support_page_names_workloads().map_err(Into::into)),
    ];
    for listed in &all {
        trials.push(trial("undisturbed", listed, undisturbed));
        match expectations::refusal(&listed.name) {
            Some(word) => trials.push(trial("refused", listed, move |name| refused(name, word))),
            None => {
                trials.push(trial("twice", listed, twice));
                trials.push(trial("running_on", listed, running_on));
            }
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}
