//! Dumps that are killed at random instants, one after the other, and a victim that must not notice.
//!
//! Each dump is killed (SIGKILL) at an instant drawn uniformly from the time that a dump takes, measured before. Every second dump would end
//! the victim: then either the images are complete and the whole tree is gone, and it is restored from them; or nothing of the images is left and
//! the tree runs on.
//!
//! The victim keeps every processor busy. Linux 6.18 then lets a task that could run wait for seconds now and then (measured: of 60 dumps
//! of 0.05 s, ten took 0.5 to 12 s, in which ferry's process waited for a processor while one was idle), and most instants would fall into
//! that. So this test and the dumps that it kills have a real-time priority, where that is allowed; the victim has not.
#![allow(unsafe_code)] // sched_setscheduler(2) between fork and exec

use crate::victim::Victim;
use crate::{Engine, Outcome, Place, processes};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whom {
    /// The process that was started: ferry, as everybody knows it.
    Known,
    /// The process that it has started to do the work, if there is one yet.
    Worker,
    /// Both at once, in either order.
    Both,
    /// These and the one that would put right what they leave. Not every victim survives that: it is for counting.
    All,
}

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How many dumps.
    pub dumps: u32,
    /// The instants are drawn from this.
    pub seed: u64,
    /// Who is killed.
    pub whom: Whom,
}

impl Plan {
    /// `FERRY_TORTURE` dumps (20 when unset), with `FERRY_TORTURE_SEED`, of `FERRY_TORTURE_WHOM`.
    ///
    /// # Errors
    /// When one of them is not understood.
    pub fn of_environment() -> Outcome<Self> {
        let given = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let number = |name: &str, usual: u64| {
            given(name).map_or(Ok(usual), |value| value.parse().map_err(|_| format!("{name}={value} is no number")))
        };
        let clock = std::time::UNIX_EPOCH.elapsed().map_or(1, |now| now.as_nanos() as u64);
        let whom = match given("FERRY_TORTURE_WHOM").as_deref() {
            None | Some("known") => Whom::Known,
            Some("worker") => Whom::Worker,
            Some("both") => Whom::Both,
            Some("all") => Whom::All,
            Some(other) => return Err(format!("FERRY_TORTURE_WHOM={other}: known, worker, both or all is wanted")),
        };
        Ok(Self { dumps: number("FERRY_TORTURE", 20)? as u32, seed: number("FERRY_TORTURE_SEED", clock)?, whom })
    }
}

/// How many of the last dumps that were not killed tell how long one takes, …
const MEASURED: usize = 9;
/// … and after how many that were killed there is one more of them: the machine may become busier.
const EVERY: u32 = 20;
/// Instants are drawn up to this many times their median.
const BEYOND: f64 = 1.2;

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    /// Killed before they were complete.
    killed: u32,
    /// Complete before the kill.
    complete: u32,
    /// Of these, the victims that were restored from their images.
    restored: u32,
    harmed: u32,
    /// How many phases of a dump were done when it was killed, and of how many dumps. One more than there are phases.
    phases: [u32; 9],
}

/// Fails unless no victim was harmed. Prints number, seed and what came of it.
pub fn torture(plan: &Plan) -> Outcome {
    let (place, engine) = (Place::new()?, Engine::ferry()?);
    if let Err(error) = come_first(libc::SCHED_RESET_ON_FORK) {
        say(&format!("no real-time priority, so that dumps may wait for a processor for long: {error}"));
    }
    let mut victim = Victim::start(&place, "survivor")?;
    let mut lengths = Vec::new();
    for _ in 0..MEASURED {
        lengths.push(length_of_a_dump(&place, &engine, &mut victim)?);
    }
    let mut random = plan.seed | 1;
    let (mut tally, mut first) = (Tally::default(), None);
    say(&format!("{} dumps of some {:?}, seed {}", plan.dumps, median(&lengths), plan.seed));
    for number in 0..plan.dumps {
        if number % EVERY == EVERY - 1 {
            lengths.remove(0);
            lengths.push(length_of_a_dump(&place, &engine, &mut victim)?);
        }
        let after = median(&lengths).mul_f64(fraction(&mut random) * BEYOND);
        if let Err(error) = one(&place, &engine, &mut victim, plan.whom, number, after, &mut tally) {
            tally.harmed += 1;
            let said = std::fs::read_to_string(place.path("said")).unwrap_or_default();
            let threads = processes::describe_threads(&processes::tree(victim.workload.pid));
            let error =
                format!("dump {number}, killed after {after:?}: {error}; ferry said {said:?}; threads:\n{threads}");
            say(&error);
            first.get_or_insert(error);
            processes::end_all_below();
            victim = Victim::start(&place, "survivor")?;
        }
    }
    let Tally { killed, complete, restored, harmed, phases } = tally;
    say(&format!("by the number of phases that were done when they were killed: {phases:?}"));
    say(&format!(
        "{} dumps, seed {}: {killed} killed on their way, {complete} complete before, {restored} restored, {harmed} victims harmed",
        plan.dumps, plan.seed
    ));
    victim.end()?;
    first.map_or(Ok(()), |first| Err(format!("{harmed} victims harmed, the first by {first}")))
}

fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "torture: {text}");
}

/// Gives this thread a real-time priority (sched(7)).
fn come_first(flags: i32) -> std::io::Result<()> {
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: the structure is read only.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | flags, &raw const lowest) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn median(lengths: &[Duration]) -> Duration {
    let mut sorted = lengths.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

/// Of one that is not killed.
fn length_of_a_dump(place: &Place, engine: &Engine, victim: &mut Victim<'_>) -> Outcome<Duration> {
    let images = victim.images()?;
    let start = Instant::now();
    let mut ferry = start_dump(place, engine, victim.workload.pid, &images, true)?;
    let status = ferry.wait().map_err(|error| error.to_string())?;
    let length = start.elapsed();
    if !status.success() {
        return Err(format!("a dump that is not killed fails: {status}"));
    }
    let _ = std::fs::remove_dir_all(images);
    Ok(length)
}

/// How many phases the last dump's log says are done.
fn phases_done(place: &Place) -> usize {
    let log = std::fs::read_to_string(place.path("dump.log")).unwrap_or_default();
    log.lines().filter(|line| line.contains("phase done")).count()
}

fn one(
    place: &Place,
    engine: &Engine,
    victim: &mut Victim<'_>,
    whom: Whom,
    number: u32,
    after: Duration,
    tally: &mut Tally,
) -> Outcome {
    let leave_running = number.is_multiple_of(2);
    let (images, tree) = (victim.images()?, processes::tree(victim.workload.pid));
    // Of the dump before.
    let _ = std::fs::remove_file(place.path("dump.log"));
    let start = Instant::now();
    let mut ferry = start_dump(place, engine, victim.workload.pid, &images, leave_running)?;
    while start.elapsed() < after {
        let left = after.saturating_sub(start.elapsed());
        if left > Duration::from_micros(200) {
            std::thread::sleep(left - Duration::from_micros(100));
        }
    }
    let known = ferry.id() as i32;
    let worker = || processes::tree(known).get(1).copied();
    let mut targets = match whom {
        Whom::Known => vec![known],
        Whom::Worker => worker().into_iter().collect(),
        Whom::Both => worker().into_iter().chain([known]).collect(),
        Whom::All => processes::tree(known),
    };
    if number % 4 >= 2 {
        targets.reverse();
    }
    for target in targets.into_iter().filter_map(Pid::from_raw) {
        // It may have ended by itself.
        let _ = kill_process(target, Signal::KILL);
    }
    let phases = phases_done(place);
    ferry.wait().map_err(|error| error.to_string())?;
    victim.others_gone(&tree)?;
    let complete = images.join("ferry.json").exists();
    if !complete {
        let left: Vec<_> = std::fs::read_dir(&images).into_iter().flatten().flatten().collect();
        if !left.is_empty() {
            return Err(format!("{} files of an unfinished set are left", left.len()));
        }
    }
    if complete && !leave_running {
        processes::await_end(&tree).map_err(|error| format!("the images are complete, but {error}"))?;
        engine.restore(place, &images, &[])?;
        victim.restored()?;
        tally.restored += 1;
    } else {
        victim.unharmed()?;
    }
    *(if complete { &mut tally.complete } else { &mut tally.killed }) += 1;
    tally.phases[phases.min(tally.phases.len() - 1)] += 1;
    std::fs::remove_dir_all(&images).map_err(|error| error.to_string())
}

fn start_dump(place: &Place, engine: &Engine, pid: i32, images: &Path, leave_running: bool) -> Outcome<Child> {
    let log = place.path("dump.log");
    let mut command = engine.command(place, "dump", images, &log.to_string_lossy());
    command.args(["-t", &pid.to_string()]);
    if leave_running {
        command.arg("--leave-running");
    }
    let said = std::fs::File::create(place.path("said")).map_err(|error| error.to_string())?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
    // SAFETY: the child makes one system call, and does not allocate.
    unsafe {
        command.pre_exec(|| {
            // Where it is refused, as was said before, the dump may take long.
            let _ = come_first(0);
            Ok(())
        })
    };
    command.spawn().map_err(|error| error.to_string())
}

/// The next number from 0 to 1 (xorshift64*).
pub fn fraction(state: &mut u64) -> f64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
}
