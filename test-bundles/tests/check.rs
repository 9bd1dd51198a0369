//! What would keep a dump from succeeding, asked without a dump: `ferry criu check --pid`, `ferry checkpoint --check`.

use ferry_test_bundles::workload;
use ferry_test_bundles::{Bundle, Container, Outcome, Place, Workload, expectations, processes, programs};
use std::process::{Command, Output};

/// A workload that this machine runs and ferry refuses, with a word of the refusal.
fn refused() -> Outcome<(&'static str, &'static str)> {
    let runs: Vec<String> =
        workload::list()?.into_iter().filter(|listed| listed.missing.is_none()).map(|listed| listed.name).collect();
    let found = expectations::REFUSED.iter().find(|(name, _)| runs.iter().any(|known| known == name));
    found.copied().ok_or_else(|| "no workload is refused any more: this test needs one".to_owned())
}

/// Fails unless a command ended with this status and printed all of these words.
fn says(output: &Output, status: i32, words: &[&str]) -> Outcome {
    let text = programs::said(output);
    if output.status.code() != Some(status) {
        return Err(format!("{} instead of exit status {status}: {text}", output.status));
    }
    match words.iter().find(|word| !text.to_lowercase().contains(**word)) {
        None => Ok(()),
        Some(word) => Err(format!("it does not say {word:?}: {text}")),
    }
}

/// The report on a process tree of the host names what would be refused and the remedy, and the tree is not touched.
#[test]
fn a_process_tree_is_checked() -> Outcome {
    let check =
        |pid: i32| programs::run(Command::new(programs::ferry()?).args(["criu", "check", "--pid", &pid.to_string()]));
    let place = Place::new()?;
    let good = Workload::start(&place, "prefork")?;
    says(&check(good.pid)?, 0, &["can be checkpointed"])?;
    good.ask()?;
    good.end()?;
    let place = Place::new()?;
    let (name, word) = refused()?;
    let bad = Workload::start(&place, name)?;
    let tree = processes::tree(bad.pid);
    says(&check(bad.pid)?, 1, &["cannot be checkpointed now", word, &format!("pid {}", bad.pid), "what to do:"])?;
    if processes::tree(bad.pid) != tree {
        return Err("the check has changed the tree".to_owned());
    }
    bad.ask()?;
    let gone = bad.pid;
    bad.end()?;
    says(&check(gone)?, 1, &["there is no process"])
}

/// A running container: nothing in the way, then a process that was started in it from outside.
#[test]
fn a_container_is_checked() -> Outcome {
    let place = Place::new()?;
    let (bundle, talk) = Bundle::of_workload(&place, "prefork")?;
    let container = Container::run(&place, &bundle)?;
    talk.await_ready()?;
    says(&container.try_verb("checkpoint", &["--check"])?, 0, &["can be checkpointed"])?;
    let json = |status: i32| -> Outcome<serde_json::Value> {
        let output = container.try_verb("checkpoint", &["--check", "--format", "json"])?;
        says(&output, status, &[])?;
        serde_json::from_slice(&output.stdout).map_err(|error| format!("no JSON: {error}"))
    };
    let told = json(0)?;
    if told["can_checkpoint"] != true || told["id"] != *container.id || told["obstacles"] != serde_json::json!([]) {
        return Err(format!("odd report {told}"));
    }
    let mut command = container.command("exec");
    let mut session = command
        .arg(&container.id)
        .args(["sleep", "1000"])
        .stdin(std::process::Stdio::null())
        .spawn()
        .map_err(|error| format!("exec: {error}"))?;
    processes::wait_for("the command inside", || {
        container.exec(&["ps"]).is_ok_and(|listing| listing.contains("sleep 1000"))
    })?;
    let told = json(1)?;
    let obstacle = &told["obstacles"][0];
    let pid = obstacle["pid"].as_i64().ok_or_else(|| format!("odd report {told}"))?;
    if told["can_checkpoint"] != false || obstacle["command"] != "sleep" || obstacle["remedy"] == "" {
        return Err(format!("odd report {told}"));
    }
    container.exec(&["kill", &pid.to_string()])?;
    session.wait().map_err(|error| format!("exec: {error}"))?;
    if json(0)?["can_checkpoint"] != true || has_checkpoint(&bundle) {
        return Err("the container is not as it was before".to_owned());
    }
    talk.ask()?;
    container.is("running")?;
    container.end()
}

/// Whether anything of a checkpoint is in the bundle.
fn has_checkpoint(bundle: &Bundle) -> bool {
    bundle.path.join("checkpoint.tar").exists()
}
