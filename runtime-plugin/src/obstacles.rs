//! What would keep a dump from succeeding, told without a dump: `ferry checkpoint --check`, `ferry criu check --pid`.

use std::fmt::Write;

use ferry_engine::dump::DumpOptions;
use ferry_engine::error::Refusal;
use ferry_engine::preflight;
use ferry_engine::sys::HostPid;

use crate::failure::{Failure, sentence_of};

/// One thing in the way.
#[derive(Debug)]
pub enum Obstacle {
    /// What this host lacks.
    Host(String),
    /// What a process has that cannot be saved.
    Process(Refusal),
}

/// Looks at the running tree below `pid`, and changes nothing.
///
/// # Errors
/// When the tree cannot be looked at.
pub fn find(pid: i32, options: &DumpOptions) -> Result<Vec<Obstacle>, Failure> {
    let mut found = Vec::new();
    if let Err(lack) = preflight::check_host() {
        found.push(Obstacle::Host(sentence_of(&lack)));
    }
    found.extend(preflight::check(HostPid(pid), options)?.into_iter().map(Obstacle::Process));
    Ok(found)
}

/// A report for people on `what` (`container c1`, `process 7`); the last line has its newline.
pub fn report(what: &str, found: &[Obstacle]) -> String {
    let mut text = match found.len() {
        0 => return format!("{what} can be checkpointed: nothing was found that would keep it from that\n"),
        1 => format!("{what} cannot be checkpointed now:\n"),
        number => format!("{what} cannot be checkpointed now, for {number} reasons:\n"),
    };
    for obstacle in found {
        let (sentence, remedy) = match obstacle {
            Obstacle::Host(sentence) => (format!("this host: {sentence}"), ""),
            Obstacle::Process(Refusal { pid, comm, object, problem, remedy }) => {
                (format!("pid {pid} ({comm}): {object}: {problem}"), remedy.as_str())
            }
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "  - {sentence}");
        if !remedy.is_empty() {
            let _ = writeln!(text, "    what to do: {remedy}");
        }
    }
    text
}

/// The obstacles for programs. `pid` is the process's in its own namespace, null for the host's lacks.
#[cfg(feature = "oci")]
pub fn json(found: &[Obstacle]) -> serde_json::Value {
    let one = |obstacle: &Obstacle| match obstacle {
        Obstacle::Host(sentence) => {
            serde_json::json!({"pid": null, "command": null, "object": "host", "problem": sentence, "remedy": ""})
        }
        Obstacle::Process(Refusal { pid, comm, object, problem, remedy }) => {
            serde_json::json!({"pid": pid.0, "command": comm, "object": object, "problem": problem, "remedy": remedy})
        }
    };
    found.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_engine::sys::NsPid;

    #[test]
    fn each_obstacle_comes_with_its_remedy() {
        let refusal = |remedy: &str| {
            let (comm, object, problem) = ("sh".to_owned(), "fd 3, /x".to_owned(), "it is odd".to_owned());
            Obstacle::Process(Refusal { pid: NsPid(7), comm, object, problem, remedy: remedy.to_owned() })
        };
        let text = report("container c1", &[refusal("close it"), refusal(""), Obstacle::Host("too old".into())]);
        assert_eq!(
            text,
            "container c1 cannot be checkpointed now, for 3 reasons:\n  - pid 7 (sh): fd 3, /x: it is odd\n    \
             what to do: close it\n  - pid 7 (sh): fd 3, /x: it is odd\n  - this host: too old\n"
        );
        assert!(report("process 7", &[]).starts_with("process 7 can be checkpointed"));
    }
}
