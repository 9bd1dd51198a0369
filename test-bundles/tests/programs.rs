//! Real programs in bundles: each is checkpointed and restored twice, then examined from inside and by its clients.

use ferry_test_bundles::{Bundle, Container, Outcome, Place, processes, programs};
use std::path::Path;
use std::process::{Command, Stdio};

/// Checkpoints and restores a container twice, with an examination before and after each.
fn twice(container: &Container, options: &[&str], mut examine: impl FnMut() -> Outcome) -> Outcome {
    examine().map_err(|error| format!("before the checkpoint: {error}"))?;
    for round in ["first", "second"] {
        container.checkpoint(options).map_err(|error| format!("{round} checkpoint: {error}"))?;
        container.restore(options).map_err(|error| format!("{round} restore: {error}"))?;
        examine().map_err(|error| format!("after the {round} restore: {error}"))?;
    }
    Ok(())
}

/// Waits until a command inside succeeds and prints something that contains `expected`.
fn await_inside(container: &Container, words: &[&str], expected: &str) -> Outcome {
    let mut last = String::new();
    let answered = processes::wait_for(&words.join(" "), || match container.exec(words) {
        Ok(printed) => {
            last = printed;
            last.contains(expected)
        }
        Err(error) => {
            last = error;
            false
        }
    });
    answered.map_err(|error| format!("{error}: {last}"))
}

/// Redis with a hundred thousand keys and no client at the moment of the dump: clients come again and read every key.
#[test]
fn redis_with_100_000_keys() -> Outcome {
    const KEYS: usize = 100_000;
    let place = Place::new()?;
    let (server, client) = (programs::installed("redis-server")?, programs::installed("redis-cli")?);
    let server_inside = server.to_string_lossy().into_owned();
    let client_inside = client.to_string_lossy().into_owned();
    let arguments =
        [&*server_inside, "--save", "", "--appendonly", "no", "--unixsocket", "/tmp/redis.sock", "--dir", "/tmp"];
    let mut bundle = Bundle::new(&place, &arguments)?;
    bundle.writable();
    bundle.add_program(&server)?;
    bundle.add_program(&client)?;
    let commands: String = (0..KEYS).map(|key| format!("SET key:{key} value-{key}\n")).collect();
    bundle.put("tmp/fill", &commands)?;
    let questions: String = (0..KEYS).map(|key| format!("GET key:{key}\n")).collect();
    bundle.put("tmp/ask", &questions)?;
    let container = Container::run(&place, &bundle)?;
    await_inside(&container, &[&client_inside, "ping"], "PONG")?;
    let through = |file: &str| container.exec(&["sh", "-c", &format!("{client_inside} < /tmp/{file}")]);
    let set = through("fill")?;
    if set.lines().filter(|line| *line == "OK").count() != KEYS {
        return Err("redis did not take every key".to_owned());
    }
    twice(&container, &[], || {
        for way in [&["-h", "127.0.0.1"][..], &["-s", "/tmp/redis.sock"]] {
            let words: Vec<&str> = [&[&*client_inside][..], way, &["dbsize"]].concat();
            let size = container.exec(&words)?;
            if size.trim() != KEYS.to_string() {
                return Err(format!("redis has {size} keys by {way:?}"));
            }
        }
        let answers = through("ask")?;
        let wrong = answers.lines().zip(0..KEYS).find(|(answer, key)| *answer != format!("value-{key}"));
        match wrong {
            Some((answer, key)) => Err(format!("key {key} is {answer}")),
            None if answers.lines().count() == KEYS => Ok(()),
            None => Err(format!("{} keys were answered", answers.lines().count())),
        }
    })?;
    container.end()
}

/// An idle nginx with two workers: it serves its page before and after.
#[test]
fn idle_nginx() -> Outcome {
    let place = Place::new()?;
    let server = programs::installed("nginx")?;
    let inside = server.to_string_lossy().into_owned();
    let mut bundle = Bundle::new(&place, &[&inside, "-c", "/etc/nginx.conf"])?;
    bundle.writable().privileged();
    bundle.add_program(&server)?;
    bundle.put("etc/passwd", "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
    bundle.put("etc/group", "root:x:0:\nnogroup:x:65534:\n")?;
    bundle.put("srv/index.html", "the page of before\n")?;
    bundle.put(
        "etc/nginx.conf",
        "daemon off; worker_processes 2; user nobody nogroup; pid /tmp/nginx.pid; error_log /tmp/error.log;\n\
         events { worker_connections 64; }\n\
         http { access_log /tmp/access.log; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p;\n\
           fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;\n\
           server { listen 127.0.0.1:80; root /srv; } }\n",
    )?;
    place.folder("bundle/rootfs/var/log/nginx")?;
    place.folder("bundle/rootfs/var/lib/nginx")?;
    let container = Container::run(&place, &bundle)?;
    let fetch = ["wget", "-q", "-O", "-", "http://127.0.0.1/"];
    await_inside(&container, &fetch, "the page of before")?;
    twice(&container, &[], || {
        // Several fetches, so that both workers have to answer.
        (0..8).try_for_each(|_| await_inside(&container, &fetch, "the page of before"))?;
        let workers = container.exec(&["ps"])?.lines().filter(|line| line.contains("nginx: worker")).count();
        if workers == 2 { Ok(()) } else { Err(format!("{workers} workers")) }
    })?;
    container.end()
}

/// What the python program does: threads that count, a timer, an open transaction, and a reader of questions.
const PYTHON: &str = r#"
import signal, sqlite3, threading, time, os
counts = [0] * 4
fired = [0]
def count(number):
    while True:
        counts[number] += 1
        time.sleep(0.01)
def fire(signum, frame):
    fired[0] += 1
signal.signal(signal.SIGALRM, fire)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
for number in range(4):
    threading.Thread(target=count, args=(number,), daemon=True, name=f"counter-{number}").start()
store = sqlite3.connect("/work/store.db", isolation_level=None, check_same_thread=False)
store.execute("create table kept (key integer primary key, value text)")
store.execute("insert into kept values (1, 'committed')")
store.execute("begin immediate")
store.executemany("insert into kept values (?, ?)", [(n, "open " * 50) for n in range(2, 500)])
condition = threading.Condition()
pool = {number: object() for number in range(1000)}
ids = {number: id(value) for number, value in pool.items()}
def examine():
    before, ticks = list(counts), fired[0]
    deadline = time.monotonic() + 20
    while any(now <= was + 2 for now, was in zip(counts, before)) or fired[0] <= ticks + 2:
        if time.monotonic() > deadline:
            return f"threads {before} -> {counts}, timer {ticks} -> {fired[0]}"
        time.sleep(0.01)
    if not store.in_transaction:
        return "the transaction is not open any more"
    rows = store.execute("select count(*) from kept").fetchone()[0]
    if rows != 499:
        return f"{rows} rows in the transaction"
    other = sqlite3.connect("/work/store.db", timeout=0.1)
    seen = other.execute("select count(*) from kept").fetchone()[0]
    other.close()
    if seen != 1:
        return f"another connection sees {seen} rows of an open transaction"
    if any(id(value) != ids[number] for number, value in pool.items()):
        return "objects have moved"
    return "ok"
open("/work/ready", "w").write(str(os.getpid()))
while True:
    if os.path.exists("/work/check"):
        try:
            verdict = examine()
        except Exception as error:
            verdict = f"bad: {error!r}"
        open("/work/verdict", "w").write(verdict)
        os.remove("/work/check")
    if os.path.exists("/work/commit"):
        store.execute("commit")
        os.remove("/work/commit")
    time.sleep(0.01)
"#;

/// Python with threads, an interval timer and an open sqlite transaction, on the host's own files bound into the container. The
/// transaction can be committed after the second restore.
#[test]
fn python_with_threads_timer_and_transaction() -> Outcome {
    let place = Place::new()?;
    let work = place.folder("work")?;
    let python = programs::installed("python3")?;
    let mut bundle = Bundle::new(&place, &[&python.to_string_lossy(), "-c", PYTHON])?;
    for (link, target) in [("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        std::os::unix::fs::symlink(target, bundle.root(link)).map_err(|error| format!("{link}: {error}"))?;
    }
    place.folder("bundle/rootfs/usr")?;
    bundle.bind(Path::new("/usr"), "/usr", &["ro"]).bind(&work, "/work", &["rw"]);
    let container = Container::run(&place, &bundle)?;
    let talk = ferry_test_bundles::workload::Talk::new(work.clone());
    talk.await_ready()?;
    // sqlite holds locks on its file.
    twice(&container, &["--file-locks"], || talk.ask())?;
    std::fs::write(work.join("commit"), "").map_err(|error| error.to_string())?;
    processes::wait_for("the commit", || !work.join("commit").exists())?;
    let rows =
        "import sqlite3; print(sqlite3.connect('/work/store.db').execute('select count(*) from kept').fetchone()[0])";
    let committed = container.exec(&["/usr/bin/python3", "-c", rows])?;
    if committed.trim() != "499" {
        return Err(format!("{} rows are committed", committed.trim()));
    }
    container.end()
}

/// A server with twenty pre-forked children that share its listening socket: each answers with its pid, the same as before.
#[test]
fn prefork_server_with_20_children() -> Outcome {
    const SERVER: &str = r#"
import os, socket, signal, time
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("127.0.0.1", 8000))
server.listen(64)
table = bytearray(os.urandom(1 << 20))
children = []
for number in range(20):
    pid = os.fork()
    if pid == 0:
        served = 0
        while True:
            connection, _ = server.accept()
            served += 1
            connection.sendall(f"{os.getpid()} {number} {sum(table)} {os.getppid()}\n".encode())
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(64):
                pass
            connection.close()
            time.sleep(0.05)
    children.append(pid)
open("/work/pids", "w").write(" ".join(map(str, children)) + f" {sum(table)}")
os.rename("/work/pids", "/work/ready")
while True:
    os.wait()
"#;
    let place = Place::new()?;
    let work = place.folder("work")?;
    let python = programs::installed("python3")?;
    let mut bundle = Bundle::new(&place, &[&python.to_string_lossy(), "-c", SERVER])?;
    for (link, target) in [("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        std::os::unix::fs::symlink(target, bundle.root(link)).map_err(|error| format!("{link}: {error}"))?;
    }
    place.folder("bundle/rootfs/usr")?;
    bundle.bind(Path::new("/usr"), "/usr", &["ro"]).bind(&work, "/work", &["rw"]);
    let container = Container::run(&place, &bundle)?;
    let ready = work.join("ready");
    processes::wait_for("the server", || ready.exists())?;
    let told = std::fs::read_to_string(&ready).map_err(|error| error.to_string())?;
    let (children, sum) = told.rsplit_once(' ').ok_or("odd list of children")?;
    let children: Vec<&str> = children.split(' ').collect();
    twice(&container, &[], || {
        let mut answered = std::collections::BTreeSet::new();
        for _ in 0..20 {
            // Many at once: a child that has answered pauses, so that the others get their turn.
            let ask = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do nc 127.0.0.1 8000 </dev/null & done; wait";
            for line in container.exec(&["sh", "-c", ask])?.lines() {
                let words: Vec<&str> = line.split(' ').collect();
                let [pid, number, content, parent] = words[..] else { return Err(format!("odd answer {line:?}")) };
                let expected = number.parse::<usize>().ok().and_then(|number| children.get(number).copied());
                if expected != Some(pid) || content != sum || parent != "1" {
                    return Err(format!("odd answer {line:?}, children {children:?}, sum {sum}"));
                }
                answered.insert(pid.to_owned());
            }
            if answered.len() == 20 {
                return Ok(());
            }
        }
        Err(format!("only {} children answer", answered.len()))
    })?;
    container.end()
}

/// The programs that these tests need are installed; `make test` sees to it.
#[test]
fn programs_are_installed() -> Outcome {
    for name in ["busybox", "redis-server", "redis-cli", "nginx", "python3"] {
        programs::installed(name)?;
    }
    let sqlite = Command::new("python3").args(["-c", "import sqlite3"]).stderr(Stdio::null()).status();
    match sqlite {
        Ok(status) if status.success() => Ok(()),
        _ => Err("python3 has no sqlite3".to_owned()),
    }
}
