//! Threads: names, masks, stacks, thread-local storage, robust lists, restartable sequences (pthreads(7), rseq(2)).

use crate::room::{Check, Room};
use crate::sys::{Fault, Verdict, await_syscall, ensure, errno, pattern, pause, raw, same, status_field, sys, zeroed};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// What is particular to a thread.
#[derive(Debug, PartialEq)]
struct Particulars {
    id: i64,
    name: String,
    mask: u64,
    stack: (usize, usize, i32),
    stack_bytes: Vec<u8>,
}

fn particulars(on_stack: &[u8]) -> Result<Particulars, Fault> {
    let id = raw!(SYS_gettid)?;
    let mut mask = 0u64;
    raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, std::ptr::null::<u64>(), &mut mask, 8)?;
    let mut stack = zeroed::<libc::stack_t>();
    sys!(sigaltstack(std::ptr::null(), &mut stack))?;
    let name = crate::sys::text(format!("/proc/self/task/{id}/comm"))?;
    Ok(Particulars {
        id,
        name,
        mask,
        stack: (stack.ss_sp as usize, stack.ss_size, stack.ss_flags),
        stack_bytes: on_stack.to_vec(),
    })
}

/// How a thread waits while the dump happens.
#[derive(Clone, Copy, Debug)]
enum Wait {
    Pipe,
    Poll,
    Eventfd,
    Epoll,
}

/// A thread with particulars of its own, blocked in one system call; a byte or a count through `wake` makes it look at itself.
struct Waiting {
    id: i32,
    wait: Wait,
    wake: i32,
    verdicts: Receiver<Verdict>,
}

/// The system call that a thread waiting so is in.
fn number(wait: Wait) -> libc::c_long {
    match wait {
        Wait::Pipe | Wait::Eventfd => libc::SYS_read,
        Wait::Poll => libc::SYS_poll,
        Wait::Epoll => libc::SYS_epoll_wait,
    }
}

/// Waits as told until `descriptor` is readable, then takes what is there. Interruptions are the business of `restart.rs`.
fn wait_on(wait: Wait, descriptor: i32) -> Verdict {
    let mut poll = libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: 0 };
    let set = match wait {
        Wait::Epoll => {
            let set = sys!(epoll_create1(0))? as i32;
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 5 };
            sys!(epoll_ctl(set, libc::EPOLL_CTL_ADD, descriptor, &mut event))?;
            set
        }
        _ => -1,
    };
    let mut event = zeroed::<libc::epoll_event>();
    loop {
        let answer = match wait {
            Wait::Poll => raw!(SYS_poll, &mut poll, 1, -1),
            Wait::Epoll => raw!(SYS_epoll_wait, set, &mut event, 1, -1),
            _ => Ok(0),
        };
        if answer.is_ok() || errno() != libc::EINTR {
            answer?;
            break;
        }
    }
    if set >= 0 {
        sys!(close(set))?;
    }
    let mut count = 0u64;
    sys!(read(descriptor, (&raw mut count).cast(), 8))?;
    Ok(())
}

fn start(number: u64, wait: Wait) -> Result<Waiting, Fault> {
    let mut ends = [0i32; 2];
    match wait {
        Wait::Eventfd | Wait::Epoll => ends = [sys!(eventfd(0, 0))? as i32; 2],
        _ => {
            sys!(pipe(ends.as_mut_ptr()))?;
        }
    }
    let (tell, verdicts): (Sender<Verdict>, _) = channel();
    let (introduce, id) = channel();
    let body = move || -> Verdict {
        let on_stack: [u8; 8192] = pattern(number, 8192).try_into().map_err(|_| "odd pattern")?;
        let on_stack = std::hint::black_box(on_stack);
        let mask = 1u64 << (33 + number) | 1 << (libc::SIGUSR1 - 1);
        raw!(SYS_rt_sigprocmask, libc::SIG_SETMASK, &mask, std::ptr::null::<u64>(), 8)?;
        let alternate = Box::leak(vec![0u8; 16384].into_boxed_slice());
        let stack = libc::stack_t {
            ss_sp: alternate.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: 8192 + 1024 * (number as usize % 4),
        };
        sys!(sigaltstack(&stack, std::ptr::null_mut()))?;
        let name = std::ffi::CString::new(format!("thread-{number}")).unwrap_or_default();
        sys!(prctl(libc::PR_SET_NAME, name.as_ptr()))?;
        let before = particulars(&on_stack)?;
        let _ = introduce.send(before.id as i32);
        loop {
            wait_on(wait, ends[0])?;
            let verdict = particulars(&on_stack).and_then(|now| {
                same!("thread", now, before);
                Ok(())
            });
            let _ = tell.send(verdict);
        }
    };
    std::thread::spawn(body);
    let id = id.recv().map_err(|_| "the thread ended early")?;
    let waiting = Waiting { id, wait, wake: ends[1], verdicts };
    await_syscall(waiting.id, self::number(wait))?;
    Ok(waiting)
}

/// Sixteen threads with names, masks, alternate stacks and stack content of their own, blocked in different calls.
pub fn threads(_: &Room) -> Result<Check, Fault> {
    let kinds = [Wait::Pipe, Wait::Poll, Wait::Eventfd, Wait::Epoll];
    let all: Vec<Waiting> =
        (0..16).map(|number| start(number, kinds[number as usize % 4])).collect::<Result<_, _>>()?;
    Ok(Box::new(move || {
        for thread in &all {
            let one = 1u64;
            sys!(write(thread.wake, (&raw const one).cast(), 8))?;
            let answer = thread.verdicts.recv_timeout(std::time::Duration::from_secs(20));
            answer.map_err(|_| format!("the thread in {:?} does not wake", thread.wait))??;
            await_syscall(thread.id, number(thread.wait))?;
        }
        Ok(())
    }))
}

const ARCH_SET_GS: i32 = 0x1001;
const ARCH_GET_GS: i32 = 0x1004;

thread_local! {
    static LOCAL: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Thread-local storage (the fs base) and the gs base of several threads.
pub fn thread_tls(_: &Room) -> Result<Check, Fault> {
    let turn = Arc::new(AtomicU32::new(0));
    let faults = Arc::new(Mutex::new(Vec::new()));
    let answered = Arc::new(AtomicU32::new(0));
    for number in 1..=4u64 {
        let (turn, faults, answered) = (turn.clone(), faults.clone(), answered.clone());
        std::thread::spawn(move || {
            LOCAL.set(number * 1_000_003);
            let base = number << 33 | 0x1230;
            let _ = raw!(SYS_arch_prctl, ARCH_SET_GS, base);
            for round in 1.. {
                while turn.load(Ordering::SeqCst) < round {
                    pause();
                }
                let mut gs = 0u64;
                let _ = raw!(SYS_arch_prctl, ARCH_GET_GS, &mut gs);
                if LOCAL.get() != number * 1_000_003 || gs != base {
                    faults
                        .lock()
                        .map(|mut all| all.push(format!("thread {number}: local {}, gs {gs:#x}", LOCAL.get())))
                        .ok();
                }
                answered.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    Ok(Box::new(move || {
        answered.store(0, Ordering::SeqCst);
        turn.fetch_add(1, Ordering::SeqCst);
        crate::sys::wait_for("four threads", || answered.load(Ordering::SeqCst) == 4)?;
        let faults = std::mem::take(&mut *faults.lock().map_err(|error| error.to_string())?);
        ensure!(faults.is_empty(), "{}", faults.join("; "));
        Ok(())
    }))
}

/// A thread whose end is awaited through the kernel's `clear_child_tid` (set_tid_address(2)), as pthread_join does.
pub fn thread_exit(_: &Room) -> Result<Check, Fault> {
    fn start() -> (JoinHandle<u64>, Sender<u64>) {
        let (say, hear) = channel();
        (std::thread::spawn(move || hear.recv().unwrap_or(0) + 1), say)
    }
    let mut running = start();
    Ok(Box::new(move || {
        let (thread, say) = std::mem::replace(&mut running, start());
        say.send(41).map_err(|_| "the thread has gone")?;
        same!("the thread's result", thread.join().map_err(|_| "the thread panicked")?, 42);
        Ok(())
    }))
}

/// The list that the kernel walks when a thread ends while it holds a lock (get_robust_list(2)): its place, and that
/// it works: a robust lock whose owner dies is marked.
pub fn robust_list(room: &Room) -> Result<Check, Fault> {
    fn head() -> Result<(usize, usize), Fault> {
        let (mut head, mut length) = (0usize, 0usize);
        raw!(SYS_get_robust_list, 0, &mut head, &mut length)?;
        Ok((head, length))
    }
    let before = head()?;
    ensure!(before.0 != 0, "the C library registers no robust list");
    let page = crate::memory::map(4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS)?;
    let lock = page as *mut libc::pthread_mutex_t;
    let mut attributes = zeroed::<libc::pthread_mutexattr_t>();
    sys!(pthread_mutexattr_init(&mut attributes))?;
    sys!(pthread_mutexattr_setpshared(&mut attributes, libc::PTHREAD_PROCESS_SHARED))?;
    sys!(pthread_mutexattr_setrobust(&mut attributes, libc::PTHREAD_MUTEX_ROBUST))?;
    sys!(pthread_mutex_init(lock, &attributes))?;
    let start = {
        let room = room.clone();
        let count = AtomicI32::new(0);
        move || {
            let name = format!("owner{}", count.fetch_add(1, Ordering::SeqCst));
            room.child(&name, |_| {
                ensure!(sys!(pthread_mutex_lock(lock))? == 0, "cannot take the robust lock");
                Ok(Box::new(|| Ok(())) as Check)
            })
        }
    };
    let mut owner = None;
    Ok(Box::new(move || {
        same!("robust list", head()?, before);
        if let Some(last) = owner.take() {
            let last: crate::room::Child = last;
            sys!(kill(last.pid, libc::SIGKILL))?;
            sys!(waitpid(last.pid, std::ptr::null_mut(), 0))?;
            same!("answer of the lock whose owner died", sys!(pthread_mutex_lock(lock))?, i64::from(libc::EOWNERDEAD));
            sys!(pthread_mutex_consistent(lock))?;
            sys!(pthread_mutex_unlock(lock))?;
        }
        owner = Some(start()?);
        Ok(())
    }))
}

unsafe extern "C" {
    static __rseq_offset: isize;
    static __rseq_size: u32;
}

/// Restartable sequences, which the C library registers for each thread: the kernel still writes the CPU's number.
pub fn rseq_registered(_: &Room) -> Result<Check, Fault> {
    let thread: u64;
    // SAFETY: reads the fs base's self-pointer, which the x86-64 ABI puts at offset 0.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) thread) };
    // SAFETY: the C library sets both before main and never again.
    let (offset, size) = unsafe { (__rseq_offset, __rseq_size) };
    ensure!(size > 0, "the C library registers no restartable sequences");
    let area = (thread as isize + offset) as usize;
    let seen = AtomicU64::new(0);
    Ok(Box::new(move || {
        // A second registration of the same area with the same signature is answered EBUSY if the first one stands.
        let again = raw!(SYS_rseq, area, 32, 0, 0x5305_3053u32);
        ensure!(again.is_err() && errno() == libc::EBUSY, "rseq is not registered any more: {again:?}");
        let allowed = status_field("self", "Cpus_allowed_list")?;
        let mut all = zeroed::<libc::cpu_set_t>();
        sys!(sched_getaffinity(0, size_of_val(&all), &mut all))?;
        for cpu in 0..64usize {
            // SAFETY: cpu is below CPU_SETSIZE.
            if !unsafe { libc::CPU_ISSET(cpu, &all) } {
                continue;
            }
            let mut one = zeroed::<libc::cpu_set_t>();
            // SAFETY: as above.
            unsafe { libc::CPU_SET(cpu, &mut one) };
            sys!(sched_setaffinity(0, size_of_val(&one), &one))?;
            // SAFETY: the C library's rseq area of this thread: cpu_id_start, cpu_id; the kernel writes it.
            let cpu_id = unsafe { std::ptr::read_volatile((area + 4) as *const u32) };
            sys!(sched_setaffinity(0, size_of_val(&all), &all))?;
            same!("rseq's cpu_id", cpu_id as usize, cpu);
            seen.fetch_add(1, Ordering::SeqCst);
        }
        ensure!(seen.load(Ordering::SeqCst) > 0, "no CPU of {allowed} was tried");
        Ok(())
    }))
}
