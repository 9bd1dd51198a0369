//! Pages that go to a page server: the dump's other images and the server's are one set again when they are in one folder.

use ferry_test_bundles::rpc::{Message, Worker, kind};
use ferry_test_bundles::victim::Victim;
use ferry_test_bundles::{Engine, Outcome, Place, Workload, processes, programs};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A page server that takes one dump. Ended when dropped.
struct Server {
    process: Child,
    folder: PathBuf,
    port: u16,
}

impl Server {
    /// Starts one at a port that it finds itself.
    fn start(place: &Place, name: &str, options: &[&str]) -> Outcome<Self> {
        let folder = place.folder(name)?;
        let mut command = Engine::ferry()?.command(place, "page-server", &folder, "server.log");
        command.args(["--address", "127.0.0.1"]).args(options).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn().map_err(|error| format!("{}: {error}", programs::shown(&command)))?;
        let stdout = process.stdout.take().ok_or("no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).map_err(|error| error.to_string())?;
        let port = line.trim().strip_prefix("Listening at 127.0.0.1:").and_then(|port| port.parse().ok());
        let port = port.ok_or_else(|| format!("the server said {line:?}: {}", log(&folder)))?;
        Ok(Self { process, folder, port })
    }

    fn options(&self) -> [String; 5] {
        at(self.port)
    }

    fn connect(&self) -> Outcome<TcpStream> {
        TcpStream::connect(("127.0.0.1", self.port)).map_err(|error| format!("port {}: {error}", self.port))
    }

    /// Waits for its end, which is to be with this status.
    fn ended(&mut self, status: i32) -> Outcome {
        let ended = self.process.wait().map_err(|error| error.to_string())?;
        if ended.code() == Some(status) {
            return Ok(());
        }
        Err(format!("the server ended with {ended}: {}", log(&self.folder)))
    }

    /// What it has written, its log aside.
    fn files(&self) -> Vec<String> {
        files(&self.folder)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn at(port: u16) -> [String; 5] {
    ["--page-server".into(), "--address".into(), "127.0.0.1".into(), "--port".into(), port.to_string()]
}

fn words(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

fn log(folder: &Path) -> String {
    fs::read_to_string(folder.join("server.log")).unwrap_or_default()
}

fn files(folder: &Path) -> Vec<String> {
    let all = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = all.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| !name.ends_with(".log"));
    names.sort();
    names
}

/// Copies what a server wrote to the other images.
fn unite(from: &Path, into: &Path) -> Outcome {
    for name in files(from).iter().filter(|name| name.ends_with(".img")) {
        fs::copy(from.join(name), into.join(name)).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

fn bytes_of_pages(folder: &Path) -> u64 {
    let names = files(folder).into_iter().filter(|name| name.starts_with("pages-"));
    names.filter_map(|name| Some(fs::metadata(folder.join(name)).ok()?.len())).sum()
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, wanted: T) -> Outcome {
    if found == wanted { Ok(()) } else { Err(format!("{what}: {found:?}, not {wanted:?}")) }
}

fn fails_with(what: &str, outcome: Outcome, word: &str) -> Outcome {
    match outcome {
        Err(error) if error.contains(word) => Ok(()),
        other => Err(format!("{what} should tell {word:?}: {other:?}")),
    }
}

/// Private and shared memory, of one process and of several.
#[test]
fn the_united_folder_is_restored() -> Outcome {
    let engine = Engine::ferry()?;
    for name in ["page_content_mix", "anonymous_shared", "shared_between_relatives", "household"] {
        let place = Place::new()?;
        let one = || -> Outcome {
            let mut workload = Workload::start(&place, name)?;
            let mut server = Server::start(&place, "server", &[])?;
            let (images, tree) = (workload.images()?, processes::tree(workload.pid));
            engine.dump(&place, workload.pid, &images, &words(&server.options()))?;
            server.ended(0)?;
            processes::await_end(&tree)?;
            let strays: Vec<String> = files(&images).into_iter().filter(|name| name.contains("page")).collect();
            expect("images of pages here", strays, Vec::new())?;
            expect("what the server has is images", server.files().iter().all(|name| name.ends_with(".img")), true)?;
            fails_with("a restore of half of it", engine.restore(&place, &images, &[]), "copy the images")?;
            processes::wait_for("nothing to be restored", || {
                processes::reap();
                processes::below().is_empty()
            })?;
            unite(&server.folder, &images)?;
            engine.restore(&place, &images, &[])?;
            workload.ask()?;
            workload.end()
        };
        one().map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

/// Damage to what the server wrote is found by what `ferry.json` tells of it.
#[test]
fn what_comes_back_is_verified() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut workload = Workload::start(&place, "page_content_mix")?;
    let mut server = Server::start(&place, "server", &[])?;
    let (images, tree) = (workload.images()?, processes::tree(workload.pid));
    engine.dump(&place, workload.pid, &images, &words(&server.options()))?;
    server.ended(0)?;
    processes::await_end(&tree)?;
    unite(&server.folder, &images)?;
    let pages = images.join("pages-65537.img");
    let whole = fs::read(&pages).map_err(|error| error.to_string())?;
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (damaged, word) in [(&flipped[..], "damaged"), (&whole[..whole.len() - 4096], "were dumped")] {
        fs::write(&pages, damaged).map_err(|error| error.to_string())?;
        fails_with("a restore of damaged pages", engine.restore(&place, &images, &[]), word)?;
        place.nothing_left()?;
    }
    fs::write(&pages, whole).map_err(|error| error.to_string())?;
    engine.restore(&place, &images, &[])?;
    workload.ask()?;
    workload.end()
}

/// A dump of a tree that runs on, over a socket that both were given; the server in the background, by its pid file.
#[test]
fn in_the_background_and_over_a_given_socket() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut workload = Workload::start(&place, "anonymous_shared")?;
    let (ours, theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
    let (folder, pid_file) = (place.folder("server")?, place.path("server.pid"));
    let mut command = engine.command(&place, "page-server", &folder, "server.log");
    command.args(["--daemon", "--ps-socket", "0", "--status-fd", "2", "--pidfile"]).arg(&pid_file);
    let output = command.stdin(OwnedFd::from(theirs)).output().map_err(|error| error.to_string())?;
    expect("status and answer", (output.status.code(), output.stderr), (Some(0), vec![0]))?;
    drop(command);
    let pid: i32 = fs::read_to_string(&pid_file)
        .ok()
        .and_then(|pid| pid.trim().parse().ok())
        .ok_or("the pid file holds no number")?;
    let images = workload.images()?;
    let mut dump = engine.command(&place, "dump", &images, "dump.log");
    dump.args(["-t", &workload.pid.to_string(), "--leave-running", "--page-server", "--ps-socket", "0"]);
    let dumped = dump.stdin(OwnedFd::from(ours)).output().map_err(|error| error.to_string())?;
    expect(&programs::said(&dumped), dumped.status.code(), Some(0))?;
    drop(dump);
    workload.ask()?;
    processes::wait_for("the server to end", || {
        processes::reap();
        processes::is_gone(pid)
    })?;
    processes::end_all_below();
    unite(&folder, &images)?;
    engine.restore(&place, &images, &[])?;
    workload.ask()?;
    workload.end()
}

/// Pages that nobody has written to since a pre-dump are left to what its server has.
#[test]
fn a_chain_is_made_of_what_two_servers_have() -> Outcome {
    for (name, mostly_written) in [("page_content_mix", false), ("rewritten_pages", true)] {
        chain(name, mostly_written).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

fn chain(name: &str, mostly_written: bool) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut workload = Workload::start(&place, name)?;
    let mut first = Server::start(&place, "server-1", &[])?;
    let (before, images) = (workload.images()?, workload.images()?);
    engine.pre_dump(&place, workload.pid, &before, &words(&first.options()))?;
    first.ended(0)?;
    workload.ask()?;
    let tree = processes::tree(workload.pid);
    let mut second = Server::start(&place, "server-2", &["--prev-images-dir", "../server-1"])?;
    let options = [&second.options()[..], &["--prev-images-dir".to_owned(), "../images-1".to_owned()]].concat();
    engine.dump(&place, workload.pid, &images, &words(&options))?;
    second.ended(0)?;
    processes::await_end(&tree)?;
    let sizes = (bytes_of_pages(&first.folder), bytes_of_pages(&second.folder));
    if sizes.1 == 0 || (!mostly_written && sizes.1 * 2 > sizes.0) {
        return Err(format!("the servers were sent {} and then {} bytes", sizes.0, sizes.1));
    }
    unite(&first.folder, &before)?;
    unite(&second.folder, &images)?;
    engine.restore(&place, &images, &[])?;
    workload.ask()?;
    workload.end()
}

/// A server without the earlier images is sent everything.
#[test]
fn a_server_without_a_parent_gets_all() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut workload = Workload::start(&place, "rewritten_pages")?;
    workload.pre_dump(&engine)?;
    let (images, tree) = (workload.images()?, processes::tree(workload.pid));
    let mut server = Server::start(&place, "server", &[])?;
    let options = [&server.options()[..], &["--prev-images-dir".to_owned(), "../images-1".to_owned()]].concat();
    engine.dump(&place, workload.pid, &images, &words(&options))?;
    server.ended(0)?;
    processes::await_end(&tree)?;
    unite(&server.folder, &images)?;
    engine.restore(&place, &images, &[])?;
    workload.ask()?;
    workload.end()
}

/// Nobody listens, the server goes away in the middle, or it never answers: the dump says so and the tree runs on.
#[test]
fn a_broken_connection_harms_nothing() -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    let mut victim = Victim::start(&place, "survivor")?;
    for (case, word) in [("nobody", "cannot connect"), ("gone", "broke off"), ("silent", "longer than")] {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
        let port = listener.local_addr().map_err(|error| error.to_string())?.port();
        let server = match case {
            "nobody" => {
                drop(listener);
                None
            }
            _ => Some(std::thread::spawn(move || {
                let (mut dump, _) = listener.accept().expect("the dump connects");
                let mut begun = vec![0; 100_000];
                dump.read_exact(&mut begun).expect("pages");
                (case == "silent").then_some(dump)
            })),
        };
        let images = victim.images()?;
        let options = [&at(port)[..], &["--timeout".to_owned(), "2".to_owned()]].concat();
        let start = Instant::now();
        let failed = engine.dump(&place, victim.workload.pid, &images, &words(&options));
        fails_with(case, failed, word)?;
        let took = start.elapsed();
        // Without the limit a silent server is waited for half a minute; a machine that has other work may take some seconds.
        if took > Duration::from_secs(25) {
            let told = fs::read_to_string(images.join("dump.log")).unwrap_or_default();
            return Err(format!("{case}: the dump took {took:?}: {told}"));
        }
        drop(server.map(std::thread::JoinHandle::join));
        expect("images that are left", files(&images), Vec::new())?;
        victim.alone().map_err(|error| format!("{case}: {error}"))?;
        victim.unharmed().map_err(|error| format!("{case}: {error}"))?;
    }
    victim.round_trip(&engine)?;
    victim.end()
}

/// What is no dump is refused, whatever it sends, and nothing of it is left; so it is when the server is killed.
#[test]
fn garbage_leaves_nothing() -> Outcome {
    let place = Place::new()?;
    let open = header(3, 0, 0, 7 << 8 | 1);
    let torn = [open.clone(), header(6 | 4 << 16, 8, 0x1000, 7 << 8 | 1), vec![7; 9000]].concat();
    for (number, (sent, word)) in [
        (b"GET / HTTP/1.1\r\nHost: nobody.example\r\n\r\n".to_vec(), "is no dump"),
        (header(6 | 4 << 16, u64::MAX, 0x1000, 7 << 8 | 1), "cannot be"),
        (header(6 | 4 << 16, 1, 0x1000, 7 << 8 | 1), "before it is opened"),
        (torn.clone(), "broke off"),
        (Vec::new(), "before it had sent all"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut server = Server::start(&place, &format!("server-{number}"), &[])?;
        let mut stream = server.connect()?;
        stream.write_all(&sent).map_err(|error| error.to_string())?;
        let _ = stream.shutdown(std::net::Shutdown::Write);
        server.ended(1)?;
        expect(word, log(&server.folder).contains(word), true)?;
        expect("what is left", server.files(), Vec::new())?;
    }
    let mut server = Server::start(&place, "server-killed", &[])?;
    let mut stream = server.connect()?;
    stream.write_all(&torn).map_err(|error| error.to_string())?;
    processes::wait_for("pages to arrive", || server.files().len() == 2)?;
    expect("names of what is not complete", server.files().iter().all(|name| name.starts_with('.')), true)?;
    server.process.kill().map_err(|error| error.to_string())?;
    processes::wait_for("what is not complete to be removed", || server.files().is_empty())?;
    drop(server);
    place.nothing_left()
}

/// The first 32 bytes of what a dump sends: command and flags, a gap, pages, address, whose.
fn header(command: u32, pages: u64, address: u64, whose: u64) -> Vec<u8> {
    let numbers = [pages, address, whose].map(u64::to_le_bytes).concat();
    [&command.to_le_bytes()[..], &[0xee; 4], &numbers].concat()
}

/// By RPC: a server that goes on after the connection, and one whose end is waited for on the same.
#[test]
fn by_remote_requests() -> Outcome {
    let place = Place::new()?;
    for (kind_of_server, child) in [(kind::PAGE_SERVER, false), (kind::PAGE_SERVER_CHLD, true)] {
        let workload = Workload::start(&place, "anonymous_shared")?;
        let there = place.folder(&format!("server-{child}"))?;
        let images = place.folder(&format!("images-{child}"))?;
        let (there_open, here_open) = (open(&there)?, open(&images)?);
        let options = |folder: &File, log: &str| {
            Message::default().number(1, folder.as_raw_fd().unsigned_abs().into()).number(9, 4).text(10, log)
        };
        let worker = Worker::start()?;
        let request = Message::request(kind_of_server).number(4, child.into());
        let (mut told, ready) = UnixStream::pair().map_err(|error| error.to_string())?;
        let asked = options(&there_open, "server.log").number(49, ready.as_raw_fd().unsigned_abs().into());
        let answer = worker.connection().ask(&request.message(2, &asked))?;
        drop(ready);
        let mut zero = Vec::new();
        told.read_to_end(&mut zero).map_err(|error| error.to_string())?;
        expect("what status_fd is told", zero, vec![0])?;
        expect(&answer.reason(), answer.verdict(), (Some(kind::PAGE_SERVER), true))?;
        let told = answer.get_message(6).ok_or("no ps")?;
        let (port, pid) = (told.get_number(2).ok_or("no port")?, told.get_number(3).ok_or("no pid")?);
        expect("the pid is one", Path::new(&format!("/proc/{pid}")).exists(), true)?;
        let ps = Message::default().text(1, "127.0.0.1").number(2, port);
        let asked = options(&here_open, "dump.log").number(2, workload.pid.unsigned_abs().into()).message(11, &ps);
        let tree = processes::tree(workload.pid);
        let (answer, _, status) = Worker::ask(&Message::request(kind::DUMP).message(2, &asked), |_| true)?;
        expect(&answer.reason(), (answer.verdict(), status), ((Some(kind::DUMP), true), Some(0)))?;
        if child {
            let waited = worker.connection().ask(&Message::request(kind::WAIT_PID).number(6, pid))?;
            expect(&waited.reason(), (waited.verdict().1, waited.get_number(11)), (true, Some(0)))?;
        }
        expect("status", worker.end()?, Some(0))?;
        processes::await_end(&[tree, vec![pid as i32]].concat())?;
        unite(&there, &images)?;
        Engine::ferry()?.restore(&place, &images, &[])?;
        workload.ask()?;
        workload.end()?;
    }
    Ok(())
}

fn open(folder: &Path) -> Outcome<File> {
    File::open(folder).map_err(|error| format!("{}: {error}", folder.display()))
}

/// What does not go together is said before anything is done.
#[test]
fn options_that_do_not_go_together() -> Outcome {
    let place = Place::new()?;
    let images = place.folder("images")?;
    for (verb, options, word) in [
        ("dump", &["--page-server"][..], "needs --address and --port"),
        ("dump", &["--page-server", "--address", "127.0.0.1"], "needs --address and --port"),
        ("restore", &["--page-server", "--address", "127.0.0.1", "--port", "9"], "for dump and pre-dump only"),
        ("page-server", &["--prev-images-dir", "../nowhere"], "previous images"),
        ("page-server", &["--address", "192.0.2.1"], "cannot listen"),
        ("page-server", &["--tls"], "--tls"),
        ("page-server", &["--ps-socket", "987"], "--ps-socket 987"),
    ] {
        let mut command: Command = Engine::ferry()?.command(&place, verb, &images, "log");
        command.args(options).args((verb == "dump").then_some("-t4194305"));
        let output = programs::run(&mut command)?;
        let said = programs::said(&output);
        if output.status.success() || !said.contains(word) {
            return Err(format!("{verb} {options:?} should tell {word:?}: {said}"));
        }
    }
    place.nothing_left()
}
