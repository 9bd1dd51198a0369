//! Containers that runc owns: ferry checkpoints them in place and restores them as its own.

use ferry_test_bundles::{Bundle, Container, Outcome, Place, processes, programs};

/// `runc run -d`, `ferry checkpoint`, `ferry restore`, `ferry exec`; runc does not know the container any more.
#[test]
fn runc_container_becomes_ferrys() -> Outcome {
    let (place, runc) = (Place::new()?, programs::installed("runc")?);
    let (bundle, talk) = Bundle::of_workload(&place, "prefork")?;
    let of_runc = Container::run_with(&place, &bundle, runc)?;
    talk.await_ready()?;
    talk.ask()?;
    let tree = processes::tree(of_runc.pid()?);
    let of_ferry = of_runc.seen_by(programs::ferry()?);
    of_ferry.verb("checkpoint", &[])?;
    processes::await_end(&tree).map_err(|error| format!("after the checkpoint: {error}"))?;
    if let Ok(state) = of_runc.state() {
        return Err(format!("runc still knows the container: {state}"));
    }
    of_ferry.restore(&[])?;
    talk.ask().map_err(|error| format!("after the restore: {error}"))?;
    let inside = of_ferry.exec(&["sh", "-c", "echo from inside $(cat /proc/1/comm)"])?;
    if inside.trim() != "from inside workload" {
        return Err(format!("exec printed {inside:?}"));
    }
    // Once more, as ferry's own container.
    of_ferry.checkpoint(&[])?;
    of_ferry.restore(&[])?;
    talk.ask().map_err(|error| format!("after the second restore: {error}"))?;
    drop(of_runc);
    of_ferry.end()
}

/// A runc container that ferry checkpoints while it runs on stays runc's.
#[test]
fn runc_container_runs_on() -> Outcome {
    let (place, runc) = (Place::new()?, programs::installed("runc")?);
    let bundle = Bundle::new(&place, &["sleep", "100000"])?;
    let of_runc = Container::run_with(&place, &bundle, runc)?;
    let pid = of_runc.pid()?;
    of_runc.seen_by(programs::ferry()?).verb("checkpoint", &["--leave-running"])?;
    of_runc.is("running")?;
    if of_runc.pid()? != pid {
        return Err("runc's container is another one".to_owned());
    }
    let inside = of_runc.exec(&["echo", "still runc's"])?;
    if inside.trim() != "still runc's" {
        return Err(format!("runc exec printed {inside:?}"));
    }
    of_runc.end()
}
