//! Terminals whose master side is outside what is saved: a container's console, and the job of a shell.

use ferry_test_bundles::terminal::{ConsoleSocket, Terminal};
use ferry_test_bundles::{Bundle, Container, Engine, Outcome, Place, Workload, processes, programs};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// A shell in a container with a console, run by this runtime, is checkpointed and restored twice, each time to another console
/// socket. It goes on with its variables, its terminal's settings and size, and ^C ends the job in the foreground.
fn console(runtime: PathBuf, options: &[&str]) -> Outcome {
    let place = Place::new()?;
    let mut bundle = Bundle::new(&place, &["sh"])?;
    bundle.config["process"]["terminal"] = true.into();
    for name in ["tty", "stty", "readlink"] {
        std::os::unix::fs::symlink("busybox", bundle.root("bin").join(name))
            .map_err(|error| format!("{name}: {error}"))?;
    }
    let socket = ConsoleSocket::new(place.path("console-0"))?;
    let option = ["--console-socket", &*socket.path().to_string_lossy()];
    let container = Container::run_options(&place, &bundle, runtime, &option)?;
    let mut terminal = socket.take()?;
    terminal.set_size((33, 99))?;
    terminal.enter("value=41; stty -echo\n")?;
    let images = place.folder("images")?;
    let images = images.to_string_lossy();
    let images = [&["--image-path", &*images], options].concat();
    for round in 1..=2 {
        let told = |error: String| format!("round {round}: {error}");
        // The prompt tells that the shell waits; what has been printed by then is not the container's any more.
        terminal.enter("value=$((value+1)); echo value=$value; tty\n")?;
        terminal.expect(&format!("value={}", 41 + 2 * round - 1)).map_err(told)?;
        terminal.expect("# ").map_err(told)?;
        container.checkpoint(&images).map_err(told)?;
        let socket = ConsoleSocket::new(place.path(&format!("console-{round}")))?;
        let option = ["--console-socket", &*socket.path().to_string_lossy()];
        container.restore(&[&images[..], &option].concat()).map_err(told)?;
        terminal = socket.take()?;
        if terminal.size()? != (33, 99) {
            return Err(format!("round {round}: the size is {:?} now", terminal.size()?));
        }
        terminal.enter("value=$((value+1)); echo value=$value; echo on > /dev/tty; readlink /proc/self/fd/0\n")?;
        terminal.expect(&format!("value={}", 41 + 2 * round)).map_err(told)?;
        terminal.expect("on").map_err(told)?;
        terminal.expect("/dev/").map_err(told)?;
        terminal.enter("sleep 1000; echo status=$?\n")?;
        let shell = container.pid()?;
        let job_runs = || processes::tree(shell).iter().any(|pid| *pid != shell && is_in_foreground(*pid));
        processes::wait_for("the job in the foreground", job_runs).map_err(told)?;
        terminal.enter("\x03")?;
        processes::wait_for("the job to end", || processes::tree(shell).len() == 1).map_err(told)?;
    }
    container.end()
}

/// Whether a process runs its own program, in the foreground of its terminal (proc_pid_stat(5)).
fn is_in_foreground(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((name, rest)) = stat.rsplit_once(") ") else { return false };
    let fields: Vec<&str> = rest.split(' ').collect();
    name.ends_with("(sleep") && fields.get(2).is_some() && fields.get(2) == fields.get(5)
}

#[test]
fn a_console_comes_back_to_a_new_socket() -> Outcome {
    console(programs::runtime()?, &[])
}

/// The same with runc, whose `criu` is ferry: the master goes to it by the notification for terminals without one.
#[test]
fn a_console_of_runc_comes_back_to_a_new_socket() -> Outcome {
    console(programs::installed("runc")?, &["--shell-job"])
}

/// A terminal that is named as external is given back by the key.
#[test]
fn an_external_terminal_is_given_back() -> Outcome {
    let place = Place::new()?;
    let mut workload = Workload::start(&place, "terminal_outside")?;
    let device = |path: PathBuf| {
        use std::os::unix::fs::MetadataExt;
        let stat = std::fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok::<_, String>(format!("tty[{:x}:{:x}]", stat.rdev(), stat.dev()))
    };
    // The slave is the workload's last descriptor.
    let key = device(format!("/proc/{}/fd/4", workload.pid).into())?;
    let (images, tree, engine) = (workload.images()?, processes::tree(workload.pid), Engine::ferry()?);
    engine.dump(&place, workload.pid, &images, &["--external", &key])?;
    processes::await_end(&tree)?;
    let name = place.path("name");
    let mut shell = Terminal::with_shell()?;
    shell.enter(&format!("tty > {0}.new; mv {0}.new {0}\n", name.display()))?;
    processes::wait_for("the terminal's name", || name.exists())?;
    let slave = std::fs::read_to_string(&name).map_err(|error| error.to_string())?;
    let slave = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(slave.trim());
    let slave = slave.map_err(|error| format!("the slave: {error}"))?;
    let mut command = engine.command(&place, "restore", &images, "restore.log");
    command.args(["-d", "--inherit-fd", &format!("fd[0]:{key}")]).stdin(slave);
    let status = command.status().map_err(|error| error.to_string())?;
    if !status.success() {
        return Err(std::fs::read_to_string(images.join("restore.log")).unwrap_or_default());
    }
    workload.ask()?;
    drop(shell);
    workload.end()
}

/// A tree that leads a session of its own, on a terminal whose master is outside, gets the terminal of whoever restores it as a shell
/// job, which another session has.
#[test]
fn the_leader_of_a_session_takes_the_callers_terminal() -> Outcome {
    let place = Place::new()?;
    place.own_terminals()?;
    let (pid_file, images) = (place.path("pid"), place.folder("images")?);
    let mut first = Terminal::with_shell()?;
    let close = "for fd in /proc/$$/fd/*; do fd=${fd##*/}; [ $fd -gt 2 ] && eval \"exec $fd>&-\"; done";
    let pid = pid_file.display();
    let serve = format!("{close}; echo $$ > {pid}.new; mv {pid}.new {pid}; while read line; do echo \"[$line]\"; done");
    first.enter(&format!("exec bash -c '{serve}'\n"))?;
    processes::wait_for("the program's pid", || pid_file.exists())?;
    let pid = std::fs::read_to_string(&pid_file).map_err(|error| error.to_string())?;
    let pid: i32 = pid.trim().parse().map_err(|_| format!("odd pid {pid}"))?;
    let engine = Engine::ferry()?;
    engine.dump(&place, pid, &images, &["--shell-job"])?;
    processes::await_end(&[pid])?;
    let mut second = Terminal::with_shell()?;
    let ferry = programs::ferry()?;
    second.enter(&format!("exec {} criu restore --shell-job -D {} -o r.log\n", ferry.display(), images.display()))?;
    second.enter("two\n")?;
    second
        .expect("[two]")
        .map_err(|error| format!("{error}\n{}", std::fs::read_to_string(images.join("r.log")).unwrap_or_default()))?;
    drop((first, second));
    processes::end_all_below();
    place.nothing_left()
}

/// A job of an interactive shell is dumped, and restored as the job of another shell in another terminal.
#[test]
fn a_shell_job_moves_to_another_terminal() -> Outcome {
    let place = Place::new()?;
    place.own_terminals()?;
    let pid_file = place.path("pid");
    let images = place.folder("images")?;
    let mut first = Terminal::with_shell()?;
    // What the test's own parents left open is not the job's (make's job server is a pipe).
    let close = "for fd in /proc/$$/fd/*; do fd=${fd##*/}; [ $fd -gt 2 ] && eval \"exec $fd>&-\"; done";
    let serve = "while read line; do echo \"[$line]\"; done";
    let pid = pid_file.display();
    first.enter(&format!("bash -c '{close}; echo $$ > {pid}.new; mv {pid}.new {pid}; {serve}'\n"))?;
    processes::wait_for("the job's pid", || pid_file.exists())?;
    let pid = std::fs::read_to_string(&pid_file).map_err(|error| error.to_string())?;
    let pid: i32 = pid.trim().parse().map_err(|_| format!("odd pid {pid}"))?;
    first.enter("one\n")?;
    first.expect("[one]")?;
    let engine = Engine::ferry()?;
    engine.dump(&place, pid, &images, &["--shell-job"])?;
    let mut second = Terminal::with_shell()?;
    let ferry = programs::ferry()?;
    second.enter(&format!("{} criu restore --shell-job -D {} -o r.log\n", ferry.display(), images.display()))?;
    second.enter("two\n")?;
    second
        .expect("[two]")
        .map_err(|error| format!("{error}\n{}", std::fs::read_to_string(images.join("r.log")).unwrap_or_default()))?;
    // The job alone is interrupted, and the shell goes on.
    second.enter("\x03")?;
    second.expect("$ ")?;
    second.enter("echo shell=$((6*7))\n")?;
    second.expect("shell=42")?;
    drop((first, second));
    processes::end_all_below();
    place.nothing_left()
}
