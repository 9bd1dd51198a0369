//! Pages that come after the tree runs: what programs do meanwhile, and what becomes of them when no pages come any more.
//!
//! Pages come through a slow connection, a relay of the test between `lazy-pages` and its page server, so that most of them are missing
//! when a workload is asked.

use ferry_test_bundles::container::refusal;
use ferry_test_bundles::processes::{self, wait_for};
use ferry_test_bundles::{Bundle, Container, Engine, Outcome, Place, Workload, programs};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// What a program may do while pages are missing, each with the right outcome.
const WORKLOADS: &[&str] = &[
    "lazy_forks",
    "lazy_moves",
    "lazy_discards",
    "lazy_executes",
    "lazy_threads",
    "lazy_wiped",
    "rewritten_discarded",
    "rewritten_mapped_anew",
    "rewritten_moved",
    "rewritten_by_kernel",
    "rewritten_by_relatives",
    "rewritten_grown",
];

/// Trees and memory of all kinds. Not those that look at how the kernel keeps memory: it comes in ordinary pages, and mappings without
/// pages yet may become one.
const OTHERS: &[&str] = &[
    "anonymous_private",
    "anonymous_shared",
    "heap",
    "stack_deep",
    "stack_growsdown",
    "holes",
    "zero_pages",
    "protections",
    "many_mappings",
    "madvise_flags",
    "locked",
    "page_content_mix",
    "large_memory",
    "file_private",
    "copy_on_write_unmapped",
    "shared_between_relatives",
    "dont_fork",
    "sessions",
    "zombies",
    "prefork",
    "household",
    "threads",
    "thread_tls",
    "robust_list",
    "rseq_registered",
    "signal_stack_in_use",
    "restart_nanosleep",
    "seccomp_filter",
    "user_ids",
];

fn all(names: &[&str], one: impl Fn(&str) -> Outcome) -> Outcome {
    let failed: Vec<String> = names.iter().filter_map(|name| Some(format!("{name}: {}", one(name).err()?))).collect();
    if failed.is_empty() { Ok(()) } else { Err(failed.join("\n")) }
}

fn text<E: ToString>(error: E) -> String {
    error.to_string()
}

/// `lazy-pages`, on its way.
struct Daemon(Child);

impl Daemon {
    /// Starts it and waits until a restore can find it.
    fn start(place: &Place, images: &Path, options: &[&str]) -> Outcome<Self> {
        let mut command = Engine::ferry()?.command(place, "lazy-pages", images, "lazy-pages.log");
        command.args(options).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(text)?;
        wait_for("the daemon's socket", || images.join("lazy-pages.socket").exists())?;
        Ok(Self(child))
    }

    /// Waits for its end.
    fn end(mut self, images: &Path) -> Outcome {
        let status = self.0.wait().map_err(text)?;
        let log = std::fs::read_to_string(images.join("lazy-pages.log")).unwrap_or_default();
        if status.success() { Ok(()) } else { Err(format!("lazy-pages ended with {status}: {log}")) }
    }
}

/// A connection between a page server and whoever fetches from it, of the test's pace.
struct Relay {
    port: u16,
    /// Bytes of pages that went through.
    passed: Arc<AtomicU64>,
    /// Ends the connection.
    cut: Arc<AtomicBool>,
}

impl Relay {
    /// Waits so long before each request is passed on.
    fn start(server: u16, wait: Duration) -> Outcome<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(text)?;
        let relay =
            Self { port: listener.local_addr().map_err(text)?.port(), passed: Arc::default(), cut: Arc::default() };
        let (passed, cut) = (relay.passed.clone(), relay.cut.clone());
        std::thread::spawn(move || {
            let Ok((near, _)) = listener.accept() else { return };
            let Ok(far) = TcpStream::connect(("127.0.0.1", server)) else { return };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let (Ok(mut answers), Ok(mut asker)) = (far.try_clone(), near.try_clone()) else { return };
            let (near_end, far_end) = (near.try_clone(), far.try_clone());
            let watched = cut.clone();
            std::thread::spawn(move || {
                let mut bytes = vec![0; 1 << 16];
                while let Ok(count @ 1..) = answers.read(&mut bytes) {
                    passed.fetch_add(count as u64, Ordering::SeqCst);
                    if asker.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                }
                let _ = asker.shutdown(Shutdown::Both);
            });
            std::thread::spawn(move || {
                while !watched.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                for end in [near_end, far_end].into_iter().flatten() {
                    let _ = end.shutdown(Shutdown::Both);
                }
            });
            let (mut near, mut far, mut bytes) = (near, far, [0; 32]);
            while near.read_exact(&mut bytes).is_ok() {
                std::thread::sleep(wait);
                if far.write_all(&bytes).is_err() {
                    break;
                }
            }
            let _ = far.shutdown(Shutdown::Write);
        });
        Ok(relay)
    }

    fn options(&self) -> Vec<String> {
        ["--page-server", "--address", "127.0.0.1", "--port"]
            .map(str::to_owned)
            .into_iter()
            .chain([self.port.to_string()])
            .collect()
    }
}

/// A port that nobody listens at.
fn free_port() -> Outcome<u16> {
    Ok(TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).map_err(text)?.port())
}

/// Dumps a workload, and restores it with a daemon that has the images.
fn restored_lazily(name: &str) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, name)?;
    for round in 1..=2 {
        let told = |error| format!("round {round}: {error}");
        let (images, tree) = (workload.images()?, processes::tree(workload.pid));
        engine.dump(&place, workload.pid, &images, &[]).map_err(told)?;
        processes::await_end(&tree)?;
        let daemon = Daemon::start(&place, &images, &[])?;
        engine.restore(&place, &images, &["--lazy-pages"]).map_err(told)?;
        workload.ask().map_err(told)?;
        daemon.end(&images).map_err(told)?;
        workload.ask().map_err(told)?;
    }
    workload.end()
}

/// A workload that is restored while its pages come slowly.
struct Slow<'place> {
    workload: Workload<'place>,
    images: std::path::PathBuf,
    daemon: Daemon,
    server: Child,
    relay: Relay,
}

impl<'place> Slow<'place> {
    fn start(place: &'place Place, name: &str, wait: Duration) -> Outcome<Self> {
        let engine = Engine::under_test()?;
        let mut workload = Workload::start(place, name)?;
        let (images, tree) = (workload.images()?, processes::tree(workload.pid));
        engine.dump(place, workload.pid, &images, &[])?;
        processes::await_end(&tree)?;
        let port = free_port()?;
        let mut command = Engine::ferry()?.command(place, "page-server", &images, "page-server.log");
        command.args(["--lazy-pages", "--address", "127.0.0.1", "--port", &port.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let server = command.spawn().map_err(text)?;
        wait_for("the page server to listen", || listens(port))?;
        let relay = Relay::start(port, wait)?;
        let options = relay.options();
        let daemon = Daemon::start(place, &images, &options.iter().map(String::as_str).collect::<Vec<_>>())?;
        engine.restore(place, &images, &["--lazy-pages"])?;
        Ok(Self { workload, images, daemon, server, relay })
    }
}

/// Whether anybody listens at a port, asked without connecting: a page server takes one peer.
fn listens(port: u16) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let place = format!(":{port:04X} 00000000:0000 0A");
    sockets.lines().any(|line| line.contains(&place))
}

fn asked_while_pages_come(name: &str) -> Outcome {
    let place = Place::new()?;
    let Slow { workload, images, daemon, mut server, relay } = Slow::start(&place, name, Duration::from_millis(3))?;
    let before = relay.passed.load(Ordering::SeqCst);
    workload.ask()?;
    let after = relay.passed.load(Ordering::SeqCst);
    if name.starts_with("lazy_") && after < before + (1 << 20) {
        return Err(format!("only {} bytes were missing when it was asked", after - before));
    }
    daemon.end(&images)?;
    let status = server.wait().map_err(text)?;
    if !status.success() {
        return Err(format!("the page server ended with {status}"));
    }
    workload.ask()?;
    workload.end()
}

#[test]
fn programs_are_right_while_pages_are_missing() -> Outcome {
    all(WORKLOADS, asked_while_pages_come)
}

#[test]
fn trees_of_all_kinds_are_restored_lazily() -> Outcome {
    all(OTHERS, restored_lazily)
}

/// The daemon is killed, or its page server is gone, while pages are missing: no process goes on with zeros in their place.
#[test]
fn a_tree_whose_pages_cannot_come_is_ended() -> Outcome {
    for ending in ["daemon", "connection"] {
        let place = Place::new()?;
        let slow = Slow::start(&place, "household", Duration::from_millis(50))?;
        let tree = processes::tree(slow.workload.pid);
        let Slow { workload, daemon, server: _, relay, images } = slow;
        let mut daemon = daemon.0;
        if ending == "daemon" {
            daemon.kill().map_err(text)?;
            daemon.wait().map_err(text)?;
        } else {
            relay.cut.store(true, Ordering::SeqCst);
            if daemon.wait().map_err(text)?.success() {
                return Err("the daemon does not mind that its page server is gone".into());
            }
            let log = std::fs::read_to_string(images.join("lazy-pages.log")).map_err(text)?;
            if !log.contains("cannot be heard any more") {
                return Err(format!("the daemon says: {log}"));
            }
        }
        processes::await_end(&tree).map_err(|error| format!("{ending}: {error}"))?;
        relay.cut.store(true, Ordering::SeqCst);
        workload.end()?;
    }
    Ok(())
}

/// Without a daemon, and when the restore fails, nothing is left.
#[test]
fn a_restore_without_a_daemon_fails() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "anonymous_private")?;
    let (images, tree) = (workload.images()?, processes::tree(workload.pid));
    engine.dump(&place, workload.pid, &images, &[])?;
    processes::await_end(&tree)?;
    let error = engine.restore(&place, &images, &["--lazy-pages"]).err().ok_or("it was restored without a daemon")?;
    if !error.contains("start lazy-pages") {
        return Err(error);
    }
    let mut daemon = Daemon::start(&place, &images, &[])?;
    let fault = ["--lazy-pages", "--fault", "restore-before-registers=error"];
    engine.restore(&place, &images, &fault).err().ok_or("it was restored in spite of a fault")?;
    if daemon.0.wait().map_err(text)?.success() {
        return Err("the daemon does not mind that the restore failed".into());
    }
    place.nothing_left()?;
    // All is as before: it can be restored.
    let daemon = Daemon::start(&place, &images, &[])?;
    engine.restore(&place, &images, &["--lazy-pages"])?;
    workload.ask()?;
    daemon.end(&images)?;
    workload.end()
}

/// A dump that gives its pages to whoever fetches them, on its way; everybody can connect.
fn dump_lazily(place: &Place, pid: i32, images: &Path, port: u16, options: &[&str]) -> Outcome<Child> {
    let mut command = Engine::under_test()?.command(place, "dump", images, "dump.log");
    let (mut ready, status) = std::io::pipe().map_err(text)?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&status);
    rustix::io::fcntl_setfd(&status, rustix::io::FdFlags::empty()).map_err(text)?;
    command.args(["-t", &pid.to_string(), "--lazy-pages", "--address", "127.0.0.1", "--port", &port.to_string()]);
    command.args(["--status-fd", &number.to_string()]).args(options);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let dump = command.spawn().map_err(text)?;
    drop(status);
    let mut byte = [1];
    let told = ready.read(&mut byte).map_err(text)?;
    if (told, byte) != (1, [0]) {
        let log = std::fs::read_to_string(images.join("dump.log")).unwrap_or_default();
        return Err(format!("the dump does not get ready: {log}"));
    }
    Ok(dump)
}

/// From a stopped tree to another pid namespace, through a connection; the first tree ends when all has been fetched.
#[test]
fn a_tree_moves_with_its_pages_behind() -> Outcome {
    for name in ["lazy_forks", "lazy_threads", "rewritten_by_relatives", "deep_tree"] {
        let place = Place::new()?;
        let mut workload = Workload::start(&place, name)?;
        let images = workload.images()?;
        let tree = processes::tree(workload.pid);
        let port = free_port()?;
        let mut dump = dump_lazily(&place, workload.pid, &images, port, &[])?;
        let sizes = std::fs::read_dir(&images).map_err(text)?.flatten().filter_map(|file| file.metadata().ok());
        let size: u64 = sizes.map(|file| file.len()).sum();
        if size > 3 << 20 {
            return Err(format!("{name}: the images have {size} bytes"));
        }
        let relay = Relay::start(port, Duration::from_millis(2))?;
        let options = relay.options();
        let daemon = Daemon::start(&place, &images, &options.iter().map(String::as_str).collect::<Vec<_>>())?;
        // The pids are taken here: another pid namespace.
        let engine = Engine::under_test()?.command(&place, "restore", &images, "restore.log");
        let mut restore = Command::new("unshare");
        restore.args([
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            "sh",
            "-c",
            "\"$@\" && exec sleep 1000",
            "sh",
        ]);
        restore.arg(engine.get_program()).args(engine.get_args()).args(["-d", "--lazy-pages"]);
        restore.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut namespace = restore.spawn().map_err(text)?;
        workload.ask().map_err(|error| {
            let log = std::fs::read_to_string(images.join("restore.log")).unwrap_or_default();
            format!("{name}: {error}\n{log}")
        })?;
        daemon.end(&images)?;
        let status = dump.wait().map_err(text)?;
        if !status.success() {
            return Err(format!("{name}: the dump ended with {status}"));
        }
        processes::await_end(&tree)?;
        workload.ask()?;
        namespace.kill().map_err(text)?;
        namespace.wait().map_err(text)?;
        workload.end()?;
    }
    Ok(())
}

/// The peer goes without having fetched all, or says what is not to be understood: the tree runs on, and can be dumped.
#[test]
fn a_tree_runs_on_when_nobody_fetches_its_pages() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "household")?;
    for nonsense in [&b""[..], &[0; 16], &[0xff; 32], &[7; 64]] {
        let images = workload.images()?;
        let port = free_port()?;
        let dump = dump_lazily(&place, workload.pid, &images, port, &[])?;
        let mut peer = TcpStream::connect(("127.0.0.1", port)).map_err(text)?;
        peer.write_all(nonsense).map_err(text)?;
        drop(peer);
        let output = dump.wait_with_output().map_err(text)?;
        let log = std::fs::read_to_string(images.join("dump.log")).map_err(text)?;
        if output.status.success() || !log.contains("the processes run on as before") {
            return Err(format!("after {nonsense:?} the dump ended with {}: {log}", output.status));
        }
        workload.ask()?;
    }
    // Nobody comes at all, and the dump is given up.
    let images = workload.images()?;
    let mut dump = dump_lazily(&place, workload.pid, &images, free_port()?, &[])?;
    let pid = rustix::process::Pid::from_raw(dump.id() as i32).ok_or("no pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).map_err(text)?;
    if dump.wait().map_err(text)?.success() {
        return Err("a dump that was given up says that all is well".into());
    }
    workload.ask()?;
    workload.round_trip(&engine)?;
    workload.end()
}

/// A container moves to another of the same bundle, with runc's flags: the first one is there until the second has all its memory.
#[test]
fn a_container_moves_with_its_pages_behind() -> Outcome {
    let place = Place::new()?;
    let (bundle, talk) = Bundle::of_workload(&place, "lazy_forks")?;
    let container = Container::run(&place, &bundle)?;
    talk.await_ready()?;
    let (images, port, first) = (place.folder("images")?, free_port()?, container.pid()?);
    let folder = images.to_string_lossy().into_owned();
    let mut command = container.command("checkpoint");
    let (mut ready, status) = std::io::pipe().map_err(text)?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&status);
    rustix::io::fcntl_setfd(&status, rustix::io::FdFlags::empty()).map_err(text)?;
    command.args(["--lazy-pages", "--page-server", &format!("127.0.0.1:{port}"), "--status-fd", &number.to_string()]);
    command.args(["--image-path", &folder, &container.id]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut checkpoint = command.spawn().map_err(text)?;
    drop(status);
    let mut byte = [1];
    if (ready.read(&mut byte).map_err(text)?, byte) != (1, [0]) {
        return Err("the checkpoint does not get ready".into());
    }
    let relay = Relay::start(port, Duration::from_millis(2))?;
    let options = relay.options();
    let daemon = Daemon::start(&place, &images, &options.iter().map(String::as_str).collect::<Vec<_>>())?;
    // Another name, another cgroup, the same root.
    let id = format!("{}-moved", container.id);
    let mut other = Bundle { path: place.folder("moved")?, config: bundle.config.clone() };
    other.config["root"]["path"] = bundle.path.join("rootfs").to_string_lossy().into_owned().into();
    other.config["linux"]["cgroupsPath"] = format!("/{id}").into();
    other.write()?;
    let mut restore = container.command("restore");
    restore.args(["--lazy-pages", "--detach", "--image-path", &folder, "--bundle"]).arg(&other.path).arg(&id);
    restore.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if !restore.status().map_err(text)?.success() {
        return Err(std::fs::read_to_string(place.path("runtime.log")).unwrap_or_default());
    }
    talk.ask()?;
    daemon.end(&images)?;
    let status = checkpoint.wait().map_err(text)?;
    if !status.success() {
        return Err(format!("the checkpoint ended with {status}"));
    }
    processes::await_end(&[first])?;
    refusal(container.command("state").arg(&container.id), &["does not exist"])?;
    talk.ask()?;
    programs::succeed(container.command("delete").args(["--force", &id]))?;
    drop(container);
    place.nothing_left()
}

/// On top of earlier images: what is in those comes at once, the rest later.
#[test]
fn an_incremental_dump_is_restored_lazily() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::under_test()?);
    let mut workload = Workload::start(&place, "rewritten_pages")?;
    workload.pre_dump(&engine)?;
    let (images, tree) = (workload.images()?, processes::tree(workload.pid));
    engine.dump(&place, workload.pid, &images, &["--track-mem", "--prev-images-dir", "../images-1"])?;
    processes::await_end(&tree)?;
    let daemon = Daemon::start(&place, &images, &[])?;
    engine.restore(&place, &images, &["--lazy-pages"])?;
    workload.ask()?;
    daemon.end(&images)?;
    workload.ask()?;
    workload.end()
}

/// The features that clients ask for.
#[test]
fn the_features_are_told() -> Outcome {
    for feature in ["uffd", "uffd-noncoop"] {
        programs::succeed(Command::new(programs::ferry()?).args(["criu", "check", "--feature", feature]))?;
    }
    Ok(())
}
