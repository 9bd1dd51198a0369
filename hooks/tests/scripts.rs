//! Hooks and action scripts with real scripts.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ferry_hooks::hook::HookFailure;
use ferry_hooks::notify::{DUMP_ORDER, RESTORE_ORDER, Silent};
use ferry_hooks::program::ProgramError;
use ferry_hooks::{ActionScripts, Event, Hook, Hooks, Notifier, Stage, State, Status};

/// Writes an executable script. Another process does it: a descriptor that is open for writing here could be
/// inherited by a child of a test that runs beside, and the script then could not be executed (ETXTBSY).
fn script(directory: &Path, name: &str, body: &str) -> PathBuf {
    let path = directory.join(name);
    let mut writer = Command::new("sh")
        .args(["-c", "cat > \"$1\" && chmod +x \"$1\"", "sh"])
        .arg(&path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    write!(writer.stdin.take().unwrap(), "#!/bin/sh\n{body}\n").unwrap();
    assert!(writer.wait().unwrap().success());
    path
}

fn hook(path: &Path) -> Hook {
    Hook { path: path.to_owned(), args: Vec::new(), env: Vec::new(), timeout: None }
}

fn state(bundle: &Path) -> State {
    State {
        oci_version: "1.2.0".into(),
        id: "c1".into(),
        status: Status::Creating,
        pid: Some(4711),
        bundle: bundle.to_owned(),
        annotations: BTreeMap::from([("key".to_owned(), "value".to_owned())]),
    }
}

#[test]
fn a_hook_gets_state_arguments_environment_and_directory() {
    let bundle = tempfile::tempdir().unwrap();
    let path = script(
        bundle.path(),
        "hook",
        "cat > state.json; echo \"$0 $1 $A\" > said; env >> said; readlink /proc/$$/cwd > cwd",
    );
    let mut hook = hook(&path);
    hook.args = vec!["my-name".into(), "first".into()];
    hook.env = vec!["A=b=c".into(), "PATH=/usr/bin:/bin".into()];
    hook.run(Stage::Prestart, &state(bundle.path())).unwrap();

    let got: State = serde_json::from_slice(&fs::read(bundle.path().join("state.json")).unwrap()).unwrap();
    assert_eq!(got, state(bundle.path()));
    let said = fs::read_to_string(bundle.path().join("said")).unwrap();
    assert!(said.lines().next().unwrap().ends_with(" first b=c"), "{said}");
    assert!(!said.contains("CARGO"), "its environment is only its own: {said}");
    let cwd = fs::read_to_string(bundle.path().join("cwd")).unwrap();
    assert_eq!(Path::new(cwd.trim()), bundle.path().canonicalize().unwrap());
}

#[test]
fn a_restore_runs_prestart_then_create_runtime_and_nothing_else() {
    let bundle = tempfile::tempdir().unwrap();
    let mut hooks = Hooks::default();
    for stage in [
        Stage::Poststop,
        Stage::Poststart,
        Stage::StartContainer,
        Stage::CreateContainer,
        Stage::CreateRuntime,
        Stage::Prestart,
    ] {
        for number in [1, 2] {
            let name = format!("{stage}-{number}");
            hooks.push(stage, hook(&script(bundle.path(), &name, &format!("echo {name} >> order"))));
        }
    }
    hooks.run_for_restore(&state(bundle.path())).unwrap();
    let order = || fs::read_to_string(bundle.path().join("order")).unwrap();
    assert_eq!(order(), "prestart-1\nprestart-2\ncreateRuntime-1\ncreateRuntime-2\n");
    fs::remove_file(bundle.path().join("order")).unwrap();
    assert!(hooks.run_after_stop(&state(bundle.path())).is_empty());
    assert_eq!(order(), "poststop-1\npoststop-2\n");
}

#[test]
fn a_failing_hook_ends_a_restore_and_tells_what_it_said() {
    let bundle = tempfile::tempdir().unwrap();
    let mut hooks = Hooks::default();
    hooks.push(Stage::Prestart, hook(&script(bundle.path(), "fails", "echo no network here >&2; exit 3")));
    hooks.push(Stage::CreateRuntime, hook(&script(bundle.path(), "next", "touch ran")));
    let error = hooks.run_for_restore(&state(bundle.path())).unwrap_err();
    assert_eq!(error.stage, Stage::Prestart);
    assert!(error.to_string().contains("fails of container c1"), "{error}");
    assert_eq!(error.source.to_string(), "it ended with status 3: no network here");
    assert!(!bundle.path().join("ran").exists());
}

#[test]
fn failing_poststop_hooks_are_reported_and_the_rest_runs() {
    let bundle = tempfile::tempdir().unwrap();
    let mut hooks = Hooks::default();
    hooks.push(Stage::Poststop, hook(&script(bundle.path(), "fails", "exit 1")));
    hooks.push(Stage::Poststop, hook(&script(bundle.path(), "next", "touch ran")));
    let warnings = hooks.run_after_stop(&state(bundle.path()));
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].path.ends_with("fails"));
    assert!(bundle.path().join("ran").exists());
}

#[test]
fn a_hook_is_killed_at_its_timeout() {
    let bundle = tempfile::tempdir().unwrap();
    let mut slow = hook(&script(bundle.path(), "slow", "exec sleep 600"));
    slow.timeout = Some(Duration::from_secs(1));
    let started = Instant::now();
    let error = slow.run(Stage::CreateRuntime, &state(bundle.path())).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(30));
    assert!(matches!(error.source, HookFailure::Program(ProgramError::TimedOut { .. })), "{error:?}");
}

#[test]
fn bad_hooks_are_refused() {
    let bundle = tempfile::tempdir().unwrap();
    let fails = |hook: Hook| hook.run(Stage::Prestart, &state(bundle.path())).unwrap_err().source;
    assert!(matches!(fails(hook(Path::new("bin/true"))), HookFailure::RelativePath));
    assert!(matches!(fails(hook(Path::new("/no/such"))), HookFailure::Program(ProgramError::Start(_))));
    let mut bad = hook(Path::new("/bin/true"));
    bad.env = vec!["GOOD=1".into(), "BAD".into()];
    assert!(matches!(fails(bad), HookFailure::Environment(entry) if entry == "BAD"));
}

#[test]
fn action_scripts_run_last_given_first_with_their_variables() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let body = |name: &str| {
        format!("echo {name} $CRTOOLS_SCRIPT_ACTION $CRTOOLS_IMAGE_DIR ${{CRTOOLS_INIT_PID-none}} >> {}", log.display())
    };
    let scripts = ActionScripts {
        scripts: vec![script(directory.path(), "a", &body("a")), script(directory.path(), "b", &body("b"))],
        image_directory: Some("/images".into()),
        timeout: None,
    };
    scripts.notify(Event::PreDump, None).unwrap();
    scripts.notify(Event::PostRestore, Some(42)).unwrap();
    scripts.notify(Event::QueryExtFiles, Some(42)).unwrap();
    scripts.notify(Event::OrphanPtsMaster, Some(42)).unwrap();
    assert_eq!(
        fs::read_to_string(log).unwrap(),
        "b pre-dump /images none\na pre-dump /images none\nb post-restore /images 42\na post-restore /images 42\n"
    );
}

#[test]
fn a_failing_action_script_fails_the_event_after_all_ran() {
    let directory = tempfile::tempdir().unwrap();
    let ran = directory.path().join("ran");
    let scripts = ActionScripts {
        scripts: vec![
            script(directory.path(), "first", &format!("touch {}", ran.display())),
            script(directory.path(), "veto", "echo not today >&2; exit 9"),
        ],
        ..ActionScripts::default()
    };
    let error = scripts.notify(Event::PreResume, Some(1)).unwrap_err();
    assert_eq!(error.event, Event::PreResume);
    let message = error.source.to_string();
    assert!(message.contains("veto") && message.contains("status 9: not today"), "{message}");
    assert!(ran.exists());
}

#[test]
fn several_listeners_are_told_until_one_fails() {
    struct Recorder(std::rc::Rc<std::cell::RefCell<Vec<Event>>>);
    impl Notifier for Recorder {
        fn notify(&self, event: Event, _: Option<i32>) -> Result<(), ferry_hooks::NotifyError> {
            self.0.borrow_mut().push(event);
            Ok(())
        }
    }
    let heard = std::rc::Rc::default();
    let missing = ActionScripts { scripts: vec!["/no/such/script".into()], ..ActionScripts::default() };
    let recorder = || Box::new(Recorder(std::rc::Rc::clone(&heard)));
    let all: Vec<Box<dyn Notifier>> = vec![Box::new(Silent), recorder(), Box::new(missing), recorder()];
    all.notify(Event::PreDump, None).unwrap_err();
    assert_eq!(*heard.borrow(), [Event::PreDump]);
}

#[test]
fn the_orders_have_no_event_twice() {
    for order in [&DUMP_ORDER[..], &RESTORE_ORDER[..]] {
        let names: std::collections::BTreeSet<&str> = order.iter().map(|event| event.as_str()).collect();
        assert_eq!(names.len(), order.len());
    }
}
