//! The lifecycle of containers, as root, on real bundles: what the commands print, their exit statuses and sentences,
//! and that they leave nothing behind.

#![cfg(feature = "oci")]
#![allow(missing_docs, reason = "a test binary has no users")]
#![allow(clippy::print_stdout, reason = "a skipped test says so")]

mod bundle;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use bundle::{Fixture, wait_until};
use serde_json::Value;

#[test]
fn create_start_state_kill_delete() {
    let fixture = Fixture::new("cycle", &["/bin/sleep", "1000"]);
    let pid_file = fixture.directory().join("pid");
    fixture.detached(&["create", "--pid-file", pid_file.to_str().unwrap(), &fixture.id]);
    let created = fixture.state();
    assert_eq!(created["status"], "created");
    assert_eq!(created["bundle"], fixture.bundle().to_str().unwrap());
    assert_eq!(created["rootfs"], fixture.bundle().join("rootfs").to_str().unwrap());
    assert_eq!(created["annotations"]["org.example.kind"], "test");
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), created["pid"].to_string());
    assert_eq!(fixture.command_of(&created), "ferry", "the program must wait for its start");

    fixture.succeeds(&["start", &fixture.id]);
    wait_until("the program runs", || fixture.command_of(&fixture.state()) == "sleep");
    assert_eq!(fixture.state()["status"], "running");
    assert!(fixture.fails(&["start", &fixture.id], 1).contains("already running"));
    assert!(fixture.fails(&["create", &fixture.id], 1).contains("exists already"));
    assert!(fixture.fails(&["delete", &fixture.id], 1).contains("not stopped: running"));

    fixture.succeeds(&["kill", &fixture.id, "KILL"]);
    wait_until("the program has ended", || fixture.state()["status"] == "stopped");
    assert_eq!(fixture.state()["pid"], 0);
    assert!(fixture.fails(&["kill", &fixture.id], 1).contains("is not running"));
    fixture.succeeds(&["kill", "--all", &fixture.id]);
    assert!(fixture.fails(&["start", &fixture.id], 1).contains("has stopped"));
    assert!(fixture.fails(&["exec", &fixture.id, "/bin/true"], 255).contains("stopped container"));
    fixture.succeeds(&["delete", &fixture.id]);
    assert!(fixture.fails(&["delete", &fixture.id], 1).contains("does not exist"));
    fixture.succeeds(&["delete", "--force", &fixture.id]);
}

#[test]
fn signals_by_name_and_number() {
    let script = "trap 'echo usr1 >> /tmp/seen' USR1; trap 'echo rt >> /tmp/seen' 40; trap 'exit 5' TERM; \
                  echo ready >> /tmp/seen; while :; do sleep 0.05; done";
    let fixture = Fixture::new("signals", &["/bin/sh", "-c", script]);
    fixture.run_detached();
    let seen = || fixture.exec(&["/bin/cat", "/tmp/seen"]);
    wait_until("the traps are set", || seen().contains("ready"));
    for (name, trace) in [("USR1", "usr1"), ("40", "rt")] {
        fixture.succeeds(&["kill", &fixture.id, name]);
        wait_until(name, || seen().contains(trace));
        assert_eq!(fixture.state()["status"], "running");
    }
    assert!(fixture.fails(&["kill", &fixture.id, "NOTHING"], 1).contains("no signal named NOTHING"));
    fixture.succeeds(&["kill", &fixture.id, "0"]);
    fixture.succeeds(&["kill", &fixture.id]);
    wait_until("TERM is the default", || fixture.state()["status"] == "stopped");
}

#[test]
fn foreground_passes_output_and_exit_status_on() {
    let fixture = Fixture::new("foreground", &["/bin/sh", "-c", "echo out; echo err >&2; exit 42"]);
    let output = fixture.ferry(&["run", &fixture.id]).output().unwrap();
    assert_eq!(output.status.code(), Some(42));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "err\n");
    assert!(fixture.listed().is_empty(), "a container run in the foreground is deleted at its end");

    let killed = Fixture::new("killed", &["/bin/sh", "-c", "kill -9 -1; kill -9 $$; sleep 0.1; /bin/sleep 9"]);
    let mut child = killed.ferry(&["run", &killed.id]).stdin(Stdio::null()).spawn().unwrap();
    wait_until("it runs", || !killed.listed().is_empty() && killed.state()["status"] == "running");
    killed.succeeds(&["kill", &killed.id, "9"]);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 9));
    killed.succeeds(&["delete", "--force", &killed.id]);
}

#[test]
fn foreground_passes_signals_on() {
    let fixture = Fixture::new("forward", &["/bin/sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done"]);
    let mut child = fixture.ferry(&["run", "--keep", &fixture.id]).stdin(Stdio::null()).spawn().unwrap();
    wait_until("it runs", || !fixture.listed().is_empty() && fixture.state()["status"] == "running");
    wait_until("it is a shell", || fixture.command_of(&fixture.state()) == "sh");
    // The trap is set within moments of the exec; a signal before it would be ignored by a pid 1.
    let pid = i32::try_from(child.id()).unwrap();
    wait_until("the signal arrives", || {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        child.try_wait().unwrap().is_some()
    });
    assert_eq!(child.wait().unwrap().code(), Some(3));
    assert_eq!(fixture.state()["status"], "stopped", "--keep keeps it");
    fixture.succeeds(&["delete", &fixture.id]);
}

#[test]
fn exec_joins_the_container() {
    let fixture = Fixture::new("exec", &["/bin/sleep", "1000"]);
    fixture.run_detached();
    assert_eq!(fixture.exec(&["/bin/sh", "-c", "echo $$-$(hostname)"]).split('-').nth(1), Some("inside\n"));
    let same = fixture.exec(&["/bin/sh", "-c", "for n in mnt pid net ipc uts; do readlink /proc/self/ns/$n; done"]);
    assert_eq!(same, fixture.exec(&["/bin/sh", "-c", "for n in mnt pid net ipc uts; do readlink /proc/1/ns/$n; done"]));
    let output = fixture
        .ferry(&["exec", "--cwd", "/tmp", "--user", "7:8", "-e", "A=b c", &fixture.id, "/bin/sh", "-c"])
        .arg("echo $(pwd) $(id -u) $(id -g) \"$A\"")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "/tmp 7 8 b c\n");
    assert_eq!(fixture.ferry(&["exec", &fixture.id, "/bin/sh", "-c", "exit 17"]).status().unwrap().code(), Some(17));
    assert!(fixture.fails(&["exec", &fixture.id, "/bin/nothing"], 255).contains("/bin/nothing"));

    let process = fixture.directory().join("process.json");
    let text = r#"{"args":["/bin/sh","-c","echo from $WHERE"],"env":["PATH=/bin","WHERE=file"],"cwd":"/","user":{"uid":0,"gid":0}}"#;
    fs::write(&process, text).unwrap();
    let output = fixture.succeeds(&["exec", "--process", process.to_str().unwrap(), &fixture.id]);
    assert_eq!(output, "from file\n");

    let pid_file = fixture.directory().join("exec.pid");
    fixture.detached(&["exec", "-d", "--pid-file", pid_file.to_str().unwrap(), &fixture.id, "/bin/sleep", "999"]);
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    let pids: Vec<i32> = serde_json::from_str(&fixture.succeeds(&["ps", "-f", "json", &fixture.id])).unwrap();
    assert!(pids.len() == 2 && pids.contains(&pid));
    let leftovers: Vec<_> = fs::read_dir(fixture.root().join(&fixture.id))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().contains("exec"))
        .collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
    fixture.succeeds(&["delete", "--force", &fixture.id]);
}

#[test]
fn list_and_ps_tell_of_the_container() {
    let fixture = Fixture::new("list", &["/bin/sleep", "1000"]);
    assert_eq!(fixture.succeeds(&["list", "--format", "json"]), "null\n");
    fixture.run_detached();
    let state = fixture.state();
    let table = fixture.succeeds(&["list"]);
    let mut lines = table.lines();
    let words = |line: &str| line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(lines.next().unwrap()), ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    let row = words(lines.next().unwrap());
    assert_eq!(row[..3], [fixture.id.clone(), state["pid"].to_string(), "running".to_owned()]);
    assert_eq!(row[5], "root");
    assert_eq!(fixture.succeeds(&["list", "-q"]), format!("{}\n", fixture.id));
    let json: Value = serde_json::from_str(&fixture.succeeds(&["list", "-f", "json"])).unwrap();
    assert_eq!(json[0]["pid"], state["pid"]);

    let table = fixture.succeeds(&["ps", &fixture.id]);
    let row = words(table.lines().nth(1).unwrap());
    assert_eq!((row[0].as_str(), row[1].as_str()), ("root", state["pid"].to_string().as_str()));
    assert!(table.contains("/bin/sleep 1000"));
    fixture.succeeds(&["delete", "-f", &fixture.id]);
}

#[test]
fn pause_and_resume() {
    let fixture = Fixture::new("pause", &["/bin/sh", "-c", "while :; do echo x >> /tmp/count; sleep 0.01; done"]);
    fixture.run_detached();
    let count = || fs::metadata(fixture.bundle().join("rootfs/tmp/count")).map(|file| file.len()).unwrap_or(0);
    wait_until("it counts", || count() > 0);
    fixture.succeeds(&["pause", &fixture.id]);
    assert_eq!(fixture.state()["status"], "paused");
    let frozen = count();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(count(), frozen);
    assert!(fixture.fails(&["pause", &fixture.id], 1).contains("it is paused"));
    assert!(fixture.fails(&["exec", &fixture.id, "/bin/true"], 255).contains("--ignore-paused"));
    fixture.succeeds(&["resume", &fixture.id]);
    assert_eq!(fixture.state()["status"], "running");
    wait_until("it counts again", || count() > frozen);
    assert!(fixture.fails(&["resume", &fixture.id], 1).contains("it is running"));

    fixture.succeeds(&["pause", &fixture.id]);
    fixture.succeeds(&["kill", &fixture.id, "SIGKILL"]);
    wait_until("a paused container can be killed", || fixture.state()["status"] == "stopped");
    fixture.succeeds(&["delete", &fixture.id]);
}

#[test]
fn a_paused_container_can_be_deleted_by_force() {
    let fixture = Fixture::new("force", &["/bin/sleep", "1000"]);
    fixture.run_detached();
    fixture.succeeds(&["pause", &fixture.id]);
    assert!(fixture.fails(&["delete", &fixture.id], 1).contains("not stopped: paused"));
    fixture.succeeds(&["delete", "--force", &fixture.id]);
}

#[test]
fn update_changes_limits_and_events_tell_them() {
    let fixture = Fixture::new("limits", &["/bin/sleep", "1000"]);
    fixture.run_detached();
    fixture.succeeds(&["update", "--memory", "64m", "--pids-limit", "33", &fixture.id]);
    let event: Value = serde_json::from_str(&fixture.succeeds(&["events", "--stats", &fixture.id])).unwrap();
    assert_eq!((&event["type"], &event["id"]), (&Value::from("stats"), &Value::from(fixture.id.as_str())));
    assert_eq!(event["data"]["memory"]["usage"]["limit"], 64 << 20);
    assert_eq!(event["data"]["pids"]["limit"], 33);
    assert!(event["data"]["cpu"]["usage"]["total"].as_u64().unwrap() > 0);

    let limits = fixture.directory().join("limits.json");
    fs::write(&limits, r#"{"pids":{"limit":44}}"#).unwrap();
    fixture.succeeds(&["update", "-r", limits.to_str().unwrap(), &fixture.id]);
    let event: Value = serde_json::from_str(&fixture.succeeds(&["events", "--stats", &fixture.id])).unwrap();
    assert_eq!(event["data"]["pids"]["limit"], 44);
    assert_eq!(event["data"]["memory"]["usage"]["limit"], 64 << 20, "what is not given stays");

    let stream = fixture.ferry(&["events", "-interval=50ms", &fixture.id]).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    fixture.succeeds(&["delete", "-f", &fixture.id]);
    let output = stream.wait_with_output().unwrap();
    assert!(output.status.success(), "the stream ends with the container");
    let lines: Vec<Value> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() >= 2 && lines.iter().all(|line| line["type"] == "stats"));
}

#[test]
fn limits_of_the_bundle_hold_and_its_cgroup_path_is_used() {
    let mut fixture = Fixture::new("cgroup", &["/bin/sleep", "1000"]);
    let path = format!("/{}-parent/{}", fixture.id, fixture.id);
    fixture.change(|config| {
        config["linux"]["cgroupsPath"] = Value::from(path.as_str());
        config["linux"]["resources"]["pids"] = serde_json::json!({"limit": 21});
    });
    fixture.run_detached();
    let of_init = fs::read_to_string(format!("/proc/{}/cgroup", fixture.state()["pid"])).unwrap();
    assert!(of_init.lines().any(|line| line.ends_with(&path)), "{of_init}");
    let event: Value = serde_json::from_str(&fixture.succeeds(&["events", "--stats", &fixture.id])).unwrap();
    assert_eq!(event["data"]["pids"]["limit"], 21);
    let other = format!("{}-2", fixture.id);
    assert!(fixture.fails(&["create", &other], 1).contains("is in use by process"));
    assert!(fixture.fails(&["state", &other], 1).contains("does not exist"));
    fixture.succeeds(&["delete", "-f", &fixture.id]);
    // The fixture asserts that the parent, which was made with it, is gone too.
}

#[test]
fn hooks_run_with_the_state_and_poststop_runs_last() {
    let mut fixture = Fixture::new("hooks", &["/bin/sleep", "1000"]);
    let seen = fixture.directory().join("seen");
    fixture.change(|config| {
        for stage in ["prestart", "createRuntime", "poststart", "poststop"] {
            let script = format!("(echo {stage}; cat; echo) >> {}", seen.display());
            config["hooks"][stage] = serde_json::json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
        }
    });
    fixture.run_detached();
    fixture.succeeds(&["delete", "--force", &fixture.id]);
    let text = fs::read_to_string(&seen).unwrap();
    let stages: Vec<&str> = text.lines().filter(|line| !line.starts_with('{') && !line.is_empty()).collect();
    assert_eq!(stages, ["prestart", "createRuntime", "poststart", "poststop"]);
    let states: Vec<Value> =
        text.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(states.iter().all(|state| state["id"] == fixture.id.as_str()));
    assert!(states.iter().all(|state| state["bundle"] == fixture.bundle().to_str().unwrap()));
    assert_eq!(states[2]["status"], "running");
    assert_eq!(states[3]["status"], "stopped");
}

#[test]
fn a_container_that_cannot_start_leaves_nothing() {
    let mut fixture = Fixture::new("broken", &["/bin/nothing"]);
    let told = fixture.fails(&["run", &fixture.id], 1);
    assert!(told.contains("exec: \"/bin/nothing\": stat /bin/nothing: no such file or directory"), "{told}");
    assert!(fixture.listed().is_empty());
    fixture.change(|config| {
        config["hooks"]["createRuntime"] = serde_json::json!([{"path": "/bin/false"}]);
        config["process"]["args"] = serde_json::json!(["/bin/sleep", "1000"]);
    });
    assert!(fixture.fails(&["create", &fixture.id], 1).contains("hook"));
    assert!(fixture.listed().is_empty());
}

#[test]
fn bad_input_gets_one_sentence() {
    let fixture = Fixture::new("errors", &["/bin/sleep", "1000"]);
    for (args, sentence) in [
        (&["run", "-b", "/no/such/bundle", "x"][..], "/no/such/bundle is no bundle"),
        (&["state", "x"], "container x does not exist"),
        (&["kill", "x"], "container x does not exist"),
        (&["create", "../x"], "letters, digits"),
        (&["run"], "missing argument"),
        (&["create", "--console-socket", "/s", "x"], "cannot use console socket"),
        (&["run", "--preserve-fds", "50", "x"], "is not open"),
        (&["restore", "--lsm-mount-context"], "flag needs an argument"),
        (&["restore", "x"], "there is no checkpoint at"),
        (&["checkpoint", "x"], "container x does not exist"),
        (&["checkpoint", "--status-fd", "1", "x"], "--status-fd of checkpoint is not supported yet"),
    ] {
        let told = fixture.fails(args, 1);
        assert!(told.contains(sentence), "{args:?}: {told}");
        assert!(told.starts_with("ferry: ") && told.trim_end().lines().count() == 1, "{args:?}: {told}");
    }
    assert!(fixture.ferry(&["checkpoint", "--help"]).output().unwrap().status.success());
}

#[test]
fn the_last_line_of_the_log_tells_the_failure() {
    let fixture = Fixture::new("logs", &["/bin/nothing"]);
    let log = fixture.directory().join("log.json");
    let log_path = log.to_str().unwrap();
    let told = fixture.fails(&["--log", log_path, "--log-format", "json", "run", &fixture.id], 1);
    let text = fs::read_to_string(&log).unwrap();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "error");
    assert_eq!(format!("ferry: {}", last["msg"].as_str().unwrap()), told.trim_end());
    assert!(last["time"].as_str().unwrap().ends_with('Z'));

    fs::remove_file(&log).unwrap();
    fixture.fails(&["-log", log_path, "state", "x"], 1);
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.lines().last().unwrap().contains("level=error msg=\"container x does not exist"), "{text}");
}

#[test]
fn created_and_stopped_containers_have_nothing_to_checkpoint() {
    let fixture = Fixture::new("refused", &["/bin/sleep", "1000"]);
    fixture.detached(&["create", &fixture.id]);
    assert!(fixture.fails(&["checkpoint", &fixture.id], 1).contains("it is created"));
    assert!(fixture.fails(&["restore", "--archive", "/dev/null", &fixture.id], 1).contains("exists already"));
    fixture.succeeds(&["kill", &fixture.id, "9"]);
    wait_until("it has ended", || fixture.state()["status"] == "stopped");
    assert!(fixture.fails(&["checkpoint", &fixture.id], 1).contains("it is stopped"));
    fixture.succeeds(&["delete", &fixture.id]);
}

#[test]
fn containers_of_runc_are_found_through_their_state() {
    if Command::new("runc").arg("--version").output().is_err() {
        println!("SKIPPED: runc is not installed");
        return;
    }
    let fixture = Fixture::new("runc", &["/bin/sleep", "1000"]);
    let runc_root = fixture.directory().join("runc");
    let runc = |args: &[&str]| {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&runc_root).args(args).current_dir(fixture.bundle());
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(status.unwrap().success(), "runc {args:?}");
    };
    let told = |args: &[&str]| {
        let output = fixture.ferry(&[]).arg("--root").arg(&runc_root).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    runc(&["create", &fixture.id]);
    assert!(told(&["checkpoint", &fixture.id]).contains("it is created"));
    runc(&["start", &fixture.id]);
    assert!(told(&["kill", &fixture.id]).contains("belongs to runc"));
    assert!(told(&["delete", "--force", &fixture.id]).contains("belongs to runc"));
    runc(&["kill", &fixture.id, "KILL"]);
    wait_until("it has ended", || told(&["checkpoint", &fixture.id]).contains("it is stopped"));
    runc(&["delete", &fixture.id]);
    assert!(told(&["checkpoint", &fixture.id]).contains("does not exist"));
}

#[test]
fn the_seccomp_filter_holds_for_exec_too() {
    let mut fixture = Fixture::new("seccomp", &["/bin/sleep", "1000"]);
    fixture.change(|config| {
        config["linux"]["seccomp"] = serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
        });
    });
    fixture.run_detached();
    let output = fixture.ferry(&["exec", &fixture.id, "/bin/busybox", "mkdir", "/tmp/x"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("Operation not supported"));
    let filters =
        |pid: &str| fixture.exec(&["/bin/busybox", "grep", "Seccomp_filters", &format!("/proc/{pid}/status")]);
    assert_eq!(filters("1"), filters("self"));
    fixture.succeeds(&["delete", "--force", &fixture.id]);
}

#[test]
fn descriptors_are_passed_on_only_when_asked() {
    let fixture = Fixture::new("fds", &["/bin/sh", "-c", "ls -l /proc/self/fd > /tmp/fds; cat <&3; exit 0"]);
    let content = fixture.directory().join("content");
    fs::write(&content, "through descriptor 3").unwrap();
    let ferry = env!("CARGO_BIN_EXE_ferry");
    let run = |flag: &str| {
        let script = format!(
            "exec 3<{} 7</etc/passwd; exec {ferry} --root {} run {flag} -b {} {}",
            content.display(),
            fixture.root().display(),
            fixture.bundle().display(),
            fixture.id
        );
        Command::new("/bin/sh").args(["-c", &script]).output().unwrap()
    };
    assert_eq!(String::from_utf8_lossy(&run("--preserve-fds 1").stdout), "through descriptor 3");
    let fds = fs::read_to_string(fixture.bundle().join("rootfs/tmp/fds")).unwrap();
    assert!(!fds.contains("passwd"), "{fds}");
    assert!(run("").stdout.is_empty());
}

#[test]
fn spec_writes_a_config_once() {
    let directory = tempfile::tempdir().unwrap();
    let fixture = Fixture::new("spec", &["/bin/true"]);
    let path = directory.path().to_str().unwrap();
    fixture.succeeds(&["spec", "--bundle", path]);
    let config: Value = serde_json::from_slice(&fs::read(Path::new(path).join("config.json")).unwrap()).unwrap();
    assert_eq!(config["process"]["args"][0], "sh");
    assert!(fixture.fails(&["spec", "--bundle", path], 1).contains("exists"));
    let features: Value = serde_json::from_str(&fixture.succeeds(&["features"])).unwrap();
    assert_eq!(features["annotations"]["org.opencontainers.runc.checkpoint.enabled"], "true");
}
