//! CRIU's RPC, as runc, crun and Podman's libraries speak it: `criu swrk` and `criu service`.

use ferry_test_bundles::rpc::{Connection, Message, Service, Worker, kind};
use ferry_test_bundles::{Outcome, Place, Workload, processes};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

/// A folder that this process has open, for requests to name.
struct Folder {
    file: File,
    path: std::path::PathBuf,
}

impl Folder {
    fn open(path: &Path) -> Outcome<Self> {
        let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Options that every dump and restore has.
    fn options(&self, log: &str) -> Message {
        let number = self.file.as_raw_fd().unsigned_abs();
        Message::default().number(1, number.into()).number(9, 4).text(10, log)
    }

    fn last_error(&self, log: &str) -> String {
        let text = std::fs::read_to_string(self.path.join(log)).unwrap_or_default();
        text.lines().rfind(|line| line.contains("Error")).unwrap_or_default().to_owned()
    }
}

/// A request to dump a tree, with events.
fn dump(folder: &Folder, pid: i32, leave_running: bool) -> Message {
    let options = folder.options("dump.log").number(2, pid.unsigned_abs().into());
    Message::request(kind::DUMP).message(2, &options.number(12, 1).number(3, leave_running.into()))
}

/// A request to restore a tree as a child of this process, with events.
fn restore(folder: &Folder) -> Message {
    Message::request(kind::RESTORE).message(2, &folder.options("restore.log").number(12, 1).number(26, 1))
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, wanted: T) -> Outcome {
    if found == wanted { Ok(()) } else { Err(format!("{what}: {found:?}, not {wanted:?}")) }
}

/// The answer tells failure, of this type, with this in its sentence.
fn expect_failure(answer: &Message, kind: u64, words: &str) -> Outcome {
    expect(&format!("type and success ({})", answer.reason()), answer.verdict(), (Some(kind), false))?;
    if answer.reason().contains(words) { Ok(()) } else { Err(format!("not about {words:?}: {}", answer.reason())) }
}

/// The version makes clients take 4.2.0 for what it is; the connection stays open as long as it is asked to.
#[test]
fn version_and_features() -> Outcome {
    let worker = Worker::start()?;
    let version = worker.connection().ask(&Message::request(kind::VERSION).number(4, 1))?;
    expect("verdict", version.verdict(), (Some(kind::VERSION), true))?;
    let numbers = version.get_message(10).ok_or("no version")?;
    expect("version", [1, 2, 4].map(|field| numbers.get_number(field)), [Some(4), Some(2), Some(0)])?;
    expect("gitid", numbers.get_text(3), None)?;
    let asked = Message::default().number(1, 1).number(3, 1);
    let features = worker.connection().ask(&Message::request(kind::FEATURE_CHECK).number(4, 1).message(5, &asked))?;
    expect("verdict", features.verdict(), (Some(kind::FEATURE_CHECK), true))?;
    let found = features.get_message(8).ok_or("no features")?;
    // What was not asked for is answered with no.
    expect("lazy_pages", found.get_number(2), Some(0))?;
    let worker_of_lazy = Worker::start()?;
    let asked = Message::default().number(2, 1);
    let features = worker_of_lazy.connection().ask(&Message::request(kind::FEATURE_CHECK).message(5, &asked))?;
    expect("lazy_pages", features.get_message(8).and_then(|found| found.get_number(2)), Some(1))?;
    drop(worker_of_lazy);
    expect("pidfd_store", found.get_number(3), Some(1))?;
    expect("mem_track", found.get_number(1), Some(1))?;
    expect("status", worker.end()?, Some(0))?;
    let (checked, _, status) = Worker::ask(&Message::request(kind::CHECK), |_| true)?;
    expect("check", (checked.verdict(), status), ((Some(kind::CHECK), true), Some(0)))
}

/// What the engine cannot do is refused by name, and what cannot stay open is closed without an answer.
#[test]
fn what_is_missing_is_named() -> Outcome {
    for (request, answer, status, words) in [
        (kind::SINGLE_PRE_DUMP, kind::SINGLE_PRE_DUMP, 255, "names no images folder"),
        (kind::PRE_DUMP, kind::PRE_DUMP, 255, "names no images folder"),
        (kind::PAGE_SERVER, kind::PAGE_SERVER, 0, "names no images folder"),
        (kind::WAIT_PID, kind::WAIT_PID, 0, "no such child"),
    ] {
        let (told, _, ended) = Worker::ask(&Message::request(request), |_| true)?;
        expect_failure(&told, answer, words)?;
        expect(&format!("status after {words}"), ended, Some(status))?;
    }
    let worker = Worker::start()?;
    worker.connection().send(&Message::request(kind::DUMP).number(4, 1))?;
    expect("answer to a dump that is to keep open", worker.connection().receive()?, None)?;
    expect("status", worker.end()?, Some(255))
}

/// A check that is asked to log does, and says that all is well.
#[test]
fn a_check_has_a_log() -> Outcome {
    let place = Place::new()?;
    let folder = Folder::open(&place.folder("images")?)?;
    let request = Message::request(kind::CHECK).message(2, &folder.options("check.log"));
    let (answer, _, _) = Worker::ask(&request, |_| true)?;
    expect(&answer.reason(), answer.verdict(), (Some(kind::CHECK), true))?;
    let log = std::fs::read_to_string(folder.path.join("check.log")).map_err(|error| error.to_string())?;
    expect("the log tells whose it is", log.contains("Version: 4.2 (ferry "), true)?;
    expect("the log tells the result", log.contains("Looks good."), true)
}

/// What the processor can do is written and compared on one connection. Each request has the log that it asks for.
#[test]
fn the_processor_is_compared() -> Outcome {
    let place = Place::new()?;
    let folder = Folder::open(&place.folder("images")?)?;
    let worker = Worker::start()?;
    let ask = |kind, log| {
        worker.connection().ask(&Message::request(kind).number(4, 1).message(2, &folder.options(log).number(20, 7)))
    };
    let early = ask(kind::CPUINFO_CHECK, "early.log")?;
    expect_failure(&early, kind::CPUINFO_CHECK, "cpuinfo.img")?;
    expect("the first log has the reason", folder.last_error("early.log").contains("cpuinfo.img"), true)?;
    for (kind, log) in [(kind::CPUINFO_DUMP, "dump.log"), (kind::CPUINFO_CHECK, "check.log")] {
        let answer = ask(kind, log)?;
        expect(&answer.reason(), answer.verdict(), (Some(kind), true))?;
        let begun = std::fs::read_to_string(folder.path.join(log)).unwrap_or_default();
        expect(&format!("{log} has begun"), begun.contains("Version: "), true)?;
    }
    expect("status", worker.end()?, Some(0))
}

/// A request that is wrong, whatever it is, is answered, and leaves the process that it is about alone.
#[test]
fn hostile_requests_are_answered() -> Outcome {
    let place = Place::new()?;
    let mut workload = Workload::start(&place, "threads")?;
    let folder = Folder::open(&workload.images()?)?;
    let pid = workload.pid.unsigned_abs().into();
    let nobody = Message::default().number(1, u64::MAX).number(2, pid);
    let closed = Message::default().number(1, 987_654).number(2, pid);
    let file = File::open("/dev/null").map_err(|error| error.to_string())?;
    let no_folder = Message::default().number(1, file.as_raw_fd().unsigned_abs().into()).number(2, pid);
    let valid = || folder.options("dump.log").number(2, pid).number(3, 1);
    let many = (0..20_000).fold(valid(), |all, _| all.message(23, &Message::default()));
    for (what, options, words) in [
        ("no folder", nobody, "names no images folder"),
        ("a descriptor that is not open", closed, "descriptor 987654"),
        ("a descriptor that is no folder", no_folder, "is no folder"),
        ("a log elsewhere", valid().text(10, "../x"), "No subdirs are allowed in log_file name"),
        ("an unknown mode of cgroups", valid().number(34, 99), "manage_cgroups_mode 99"),
        ("an unknown namespace to leave empty", valid().number(38, 1), "empty_ns 0x1"),
        ("an unknown lock", valid().number(64, 9), "network_lock 9"),
        ("an option in a value", valid().text(37, "x --leave-stopped --shell-job"), "x --leave-stopped"),
        ("thousands of mounts without names", many, "ext_mnt"),
        ("no such process", folder.options("dump.log").number(2, 0x7fff_fff0), "no process"),
        ("a process before all", folder.options("dump.log").number(2, (-7i64).cast_unsigned()), ""),
    ] {
        let (answer, _, status) = Worker::ask(&Message::request(kind::DUMP).message(2, &options), |_| true)
            .map_err(|error| format!("{what}: {error}"))?;
        match expect_failure(&answer, kind::DUMP, words) {
            // An external object that nothing in the tree is does no harm.
            Err(_) if answer.verdict().1 && what == "an option in a value" => {}
            outcome => outcome.map_err(|error| format!("{what}: {error}"))?,
        }
        expect("an error number", answer.verdict().1 || answer.errno() != Some(0), true)?;
        expect(what, status.is_some_and(|status| status <= 1), true)?;
    }
    for bytes in
        [&b"\xff\xff\xff\xff\xff"[..], &[0x12, 0x7f, 1], &[0x08], &[0; 64], &[0x12, 0xff, 0xff, 0xff, 0xff, 0x0f]]
    {
        let worker = Worker::start()?;
        worker.connection().send_bytes(bytes)?;
        let answer = worker.connection().receive()?.ok_or("no answer")?;
        expect("verdict", answer.verdict(), (Some(kind::EMPTY), false))?;
        expect("status", worker.end()?, Some(255))?;
    }
    let worker = Worker::start()?;
    worker.connection().widen()?;
    worker.connection().send_bytes(&vec![0x42; (1 << 20) + 1])?;
    expect_failure(&worker.connection().receive()?.ok_or("no answer")?, kind::EMPTY, "more than 1048576 are not read")?;
    drop(worker);
    let (answer, _, _) = Worker::ask(&Message::request(kind::NOTIFY).number(3, 1), |_| true)?;
    expect_failure(&answer, kind::EMPTY, "type 6")?;
    let (answer, _, _) = Worker::ask(&Message::request(77), |_| true)?;
    expect_failure(&answer, kind::EMPTY, "type 77")?;
    workload.ask()?;
    workload.end()
}

/// Events come in CRIU's order, the restored root is a child of the client, and statistics and log are where they belong.
#[test]
fn a_round_trip_with_events() -> Outcome {
    let place = Place::new()?;
    let mut workload = Workload::start(&place, "sessions")?;
    let folder = Folder::open(&workload.images()?)?;
    let tree = processes::tree(workload.pid);
    let (answer, events, status) = Worker::ask(&dump(&folder, workload.pid, false), |_| true)?;
    expect(&answer.reason(), answer.verdict(), (Some(kind::DUMP), true))?;
    expect("restored", answer.get_message(3).and_then(|dump| dump.get_number(1)), Some(0))?;
    expect("status", status, Some(0))?;
    let events: Vec<&str> = events.iter().map(String::as_str).collect();
    expect("events of a dump", events, vec!["pre-dump", "query-ext-files", "post-dump"])?;
    processes::await_end(&tree)?;
    let (answer, events, status) = Worker::ask(&restore(&folder), |_| true)?;
    expect(&answer.reason(), answer.verdict(), (Some(kind::RESTORE), true))?;
    expect("status", status, Some(0))?;
    let pid = workload.pid;
    expect("pid", answer.get_message(4).and_then(|restore| restore.get_number(1)), Some(pid.unsigned_abs().into()))?;
    let wanted = ["pre-restore", &format!("post-restore {pid}"), "pre-resume", "post-resume"];
    expect("events of a restore", events, wanted.map(str::to_owned).to_vec())?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|error| error.to_string())?;
    let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
    expect("parent", parent, Some(std::process::id()))?;
    for name in ["dump.log", "restore.log", "stats-dump", "stats-restore"] {
        expect(name, std::fs::metadata(folder.path.join(name)).is_ok_and(|file| file.len() > 0), true)?;
    }
    workload.ask()?;
    workload.end()
}

/// Pre-dumps one after the other and the dump on top of them, on one connection; and a pre-dump by itself, as Go programs ask.
#[test]
fn pre_dumps_come_before_a_dump() -> Outcome {
    let place = Place::new()?;
    let mut workload = Workload::start(&place, "rewritten_pages")?;
    let folders = [1, 2, 3].map(|_| workload.images().and_then(|path| Folder::open(&path)));
    let [first, second, third] = folders;
    let (first, second, third) = (first?, second?, third?);
    let pid = workload.pid.unsigned_abs().into();
    let pre_dump = |folder: &Folder| folder.options("pre-dump.log").number(2, pid).number(15, 1);
    let request = Message::request(kind::SINGLE_PRE_DUMP).message(2, &pre_dump(&first));
    let (answer, events, status) = Worker::ask(&request, |_| true)?;
    expect(&answer.reason(), answer.verdict(), (Some(kind::SINGLE_PRE_DUMP), true))?;
    expect("events", events, Vec::new())?;
    expect("status", status, Some(0))?;
    workload.ask()?;
    let tree = processes::tree(workload.pid);
    let worker = Worker::start()?;
    let request = Message::request(kind::PRE_DUMP).message(2, &pre_dump(&second).text(14, "../images-1"));
    for _ in 0..2 {
        let answer = worker.connection().ask(&request)?;
        expect(&answer.reason(), answer.verdict(), (Some(kind::PRE_DUMP), true))?;
        workload.ask()?;
    }
    let options = third.options("dump.log").number(2, pid).number(15, 1).text(14, "../images-2");
    let answer = worker.connection().ask(&Message::request(kind::DUMP).message(2, &options))?;
    expect(&answer.reason(), answer.verdict(), (Some(kind::DUMP), true))?;
    expect("status", worker.end()?, Some(0))?;
    processes::await_end(&tree)?;
    let (answer, ..) = Worker::ask(&restore(&third), |_| true)?;
    expect(&answer.reason(), answer.verdict(), (Some(kind::RESTORE), true))?;
    workload.ask()?;
    workload.end()
}

/// A client that lets an event fail, or goes away at one, ends the dump there, and the tree runs on.
#[test]
fn a_failing_event_aborts_a_dump() -> Outcome {
    let place = Place::new()?;
    let mut workload = Workload::start(&place, "sessions")?;
    let folder = Folder::open(&workload.images()?)?;
    let tree = processes::tree(workload.pid);
    for event in ["pre-dump", "query-ext-files", "post-dump"] {
        let request = dump(&folder, workload.pid, false);
        let (answer, events, status) = Worker::ask(&request, |name| name != event)?;
        expect_failure(&answer, kind::DUMP, event)?;
        expect("the last event", events.last().map(String::as_str), Some(event))?;
        expect("status", status, Some(1))?;
        let told = folder.last_error("dump.log");
        expect(&format!("the log names the event: {told}"), told.contains(event), true)?;
        expect("the tree", processes::tree(workload.pid), tree.clone())?;
        workload.ask().map_err(|error| format!("after {event} failed: {error}"))?;

        let worker = Worker::start()?;
        worker.connection().send(&request)?;
        while worker.connection().receive()?.and_then(|told| told.get_message(5)?.get_text(1)).as_deref() != Some(event)
        {
            worker.connection().send(&Message::request(kind::NOTIFY).number(3, 1))?;
        }
        expect("status when the client is gone", worker.end()?, Some(1))?;
        expect("the tree", processes::tree(workload.pid), tree.clone())?;
        workload.ask().map_err(|error| format!("after the client left at {event}: {error}"))?;
    }
    workload.end()
}

/// A client that lets an event of a restore fail gets nothing, and can try again.
#[test]
fn a_failing_event_undoes_a_restore() -> Outcome {
    let place = Place::new()?;
    let mut workload = Workload::start(&place, "sessions")?;
    let folder = Folder::open(&workload.images()?)?;
    let tree = processes::tree(workload.pid);
    let (answer, ..) = Worker::ask(&dump(&folder, workload.pid, false), |_| true)?;
    expect(&answer.reason(), answer.verdict(), (Some(kind::DUMP), true))?;
    processes::await_end(&tree)?;
    for event in ["pre-restore", "post-restore"] {
        let (answer, _, status) = Worker::ask(&restore(&folder), |name| name != event)?;
        expect_failure(&answer, kind::RESTORE, event)?;
        expect("status", status, Some(1))?;
        processes::await_end(&tree).map_err(|error| format!("after {event} failed: {error}"))?;
    }
    let (answer, ..) = Worker::ask(&restore(&folder), |_| true)?;
    expect(&answer.reason(), answer.verdict(), (Some(kind::RESTORE), true))?;
    // The pids are taken now.
    let (answer, ..) = Worker::ask(&restore(&folder), |_| true)?;
    expect_failure(&answer, kind::RESTORE, "in use")?;
    expect("error number", answer.errno(), Some(libc::EEXIST))?;
    workload.ask()?;
    workload.end()
}

/// What a runtime sets for every container is no reason to refuse one that has no need of it.
#[test]
fn permissions_without_need_are_taken() -> Outcome {
    let place = Place::new()?;
    let mut workload = Workload::start(&place, "threads")?;
    let folder = Folder::open(&workload.images()?)?;
    let mut options = folder.options("dump.log").number(2, workload.pid.unsigned_abs().into()).number(3, 1);
    // ext_unix_sk, tcp_established, file_locks, auto_dedup, link_remap, tcp_skip_in_flight, orphan_pts_master, tcp_close
    for field in [4, 5, 8, 16, 18, 46, 50, 52] {
        options = options.number(field, 1);
    }
    // evasive_devices, shell_job, track_mem, lazy_pages: sent as false
    for field in [6, 7, 15, 48] {
        options = options.number(field, 0);
    }
    let options = options.number(24, 1).number(34, 6).number(38, 0x4000_0000).text(51, "/no/such/runc.conf");
    let (answer, _, status) = Worker::ask(&Message::request(kind::DUMP).message(2, &options), |_| true)?;
    expect(&answer.reason(), (answer.verdict(), status), ((Some(kind::DUMP), true), Some(0)))?;
    let config = place.path("request.conf");
    std::fs::write(&config, "stream\nlog-file other.log\n").map_err(|error| error.to_string())?;
    let options = options.text(51, &config.to_string_lossy());
    let (answer, ..) = Worker::ask(&Message::request(kind::DUMP).message(2, &options), |_| true)?;
    expect_failure(&answer, kind::DUMP, "--stream")?;
    expect("the log", folder.last_error("other.log").contains("--stream"), true)?;
    workload.ask()?;
    workload.end()
}

/// The client of a dump with lazy pages hears when they can be fetched. It is whoever fetches them that says when the tree may be ended.
#[test]
fn a_lazy_dump_tells_when_pages_can_be_fetched() -> Outcome {
    // The header of the page server's last command, and one that is none.
    let (mut close, nonsense) = ([0; 32], [0xee; 32]);
    close[..2].copy_from_slice(&[0x23, 0x10]);
    let place = Place::new()?;
    let mut workload = Workload::start(&place, "threads")?;
    for (header, fetched) in [(nonsense, false), (close, true)] {
        let folder = Folder::open(&workload.images()?)?;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
        let port = listener.local_addr().map_err(|error| error.to_string())?.port();
        drop(listener);
        let server = Message::default().text(1, "127.0.0.1").number(2, port.into());
        let options = folder.options("dump.log").number(2, workload.pid.unsigned_abs().into()).number(12, 1);
        let request = Message::request(kind::DUMP).message(2, &options.number(48, 1).message(11, &server));
        let mut peer = None;
        let (answer, told, status) = Worker::ask(&request, |event| {
            if event == "status-ready" {
                let connected = std::net::TcpStream::connect(("127.0.0.1", port));
                let written = connected.and_then(|mut peer| {
                    std::io::Write::write_all(&mut peer, &header)?;
                    Ok(peer)
                });
                peer = written.ok();
            }
            true
        })?;
        expect(
            "the events",
            told,
            ["pre-dump", "query-ext-files", "post-dump", "status-ready"].map(str::to_owned).to_vec(),
        )?;
        expect("it could be connected to", peer.is_some(), true)?;
        if fetched {
            expect(&answer.reason(), (answer.verdict(), status), ((Some(kind::DUMP), true), Some(0)))?;
        } else {
            expect_failure(&answer, kind::DUMP, "the processes run on as before")?;
            workload.ask()?;
        }
    }
    workload.end()
}

/// A service does for root what root could do itself; for others only what concerns their own processes alone.
#[test]
fn a_service_asks_who_its_clients_are() -> Outcome {
    let place = Place::new()?;
    let mut workload = Workload::start(&place, "threads")?;
    let folder = Folder::open(&workload.images()?)?;
    let service = Service::start(&place)?;
    let root = || Connection::to(&service.path);
    let dump = |leave| dump(&folder, workload.pid, leave);

    let (version, _) = as_nobody(&service.path, &Message::request(kind::VERSION))?;
    expect("version for anybody", version.verdict(), (Some(kind::VERSION), true))?;
    let (answer, events) = as_nobody(&service.path, &dump(true))?;
    expect("verdict", answer.verdict(), (Some(kind::DUMP), false))?;
    expect(&answer.reason(), (answer.errno(), events.is_empty()), (Some(libc::EPERM), true))?;
    let (answer, _) = as_nobody(&service.path, &Message::request(kind::RESTORE).message(2, &folder.options("r.log")))?;
    expect(&answer.reason(), (answer.verdict().1, answer.errno()), (false, Some(libc::EPERM)))?;
    expect("images of what was refused", folder.path.join("inventory.img").exists(), false)?;
    workload.ask()?;

    let (answer, events) = root()?.ask_telling(&dump(true), |_| true)?;
    expect(&answer.reason(), answer.verdict(), (Some(kind::DUMP), true))?;
    expect("events", events.len(), 3)?;
    workload.ask()?;
    let (answer, _) = root()?.ask_telling(&restore(&folder), |_| true)?;
    expect_failure(&answer, kind::RESTORE, "rst_sibling")?;
    // A client that is gone, or says nonsense, does not concern the next.
    root()?.send_bytes(b"\xff\xff\xff")?;
    drop(root()?);
    let version = root()?.ask(&Message::request(kind::VERSION))?;
    expect("version", version.verdict(), (Some(kind::VERSION), true))?;
    drop(service);
    workload.end()
}

/// Asks as a user who owns nothing of the test.
fn as_nobody(service: &Path, request: &Message) -> Outcome<(Message, Vec<String>)> {
    let ask = || {
        let nobody = rustix::thread::Uid::from_raw(65534);
        // Of this thread alone, as the kernel has it.
        rustix::thread::set_thread_res_uid(None, nobody, None).map_err(|error| error.to_string())?;
        Connection::to(service)?.ask_telling(request, |_| true)
    };
    std::thread::scope(|scope| scope.spawn(ask).join().map_err(|_| "the thread panicked".to_owned())?)
}
