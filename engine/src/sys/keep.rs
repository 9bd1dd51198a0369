//! A process that does nothing but hold descriptors open, and ends with the processes that they are about.
//!
//! It is nobody's child here, in a session of its own, has no descriptor but those it keeps, and the kernel takes it first when memory
//! is short. Ending it closes what it keeps, and does no other harm.
//!
//! Between fork(2) and its end it makes only system calls: this process may have other threads, whose locks it would find held
//! (signal-safety(7)). Its memory is a copy of this process's, shared as long as nobody writes to it.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::unistd::{ForkResult, fork};

/// The name of the process.
pub const NAME: &str = "ferry-keeper";

/// The numbers that descriptors will have in the process that keeps them, in the order given.
pub fn numbers(kept: &[BorrowedFd<'_>]) -> Vec<RawFd> {
    let mut sorted: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
    sorted.sort_unstable();
    let place = |fd: &BorrowedFd<'_>| sorted.partition_point(|other| *other < fd.as_raw_fd()) as RawFd;
    kept.iter().map(place).collect()
}

/// Starts the process, which keeps `kept` open until all of `tasks`, process descriptors among them, have ended.
///
/// # Errors
/// Those of fork(2).
pub fn start(kept: &[BorrowedFd<'_>], tasks: &[BorrowedFd<'_>]) -> nix::Result<()> {
    let numbers = numbers(kept);
    let number_of = |task: &BorrowedFd<'_>| {
        let place = kept.iter().position(|fd| fd.as_raw_fd() == task.as_raw_fd());
        place.map(|place| libc::pollfd { fd: numbers[place], events: libc::POLLIN, revents: 0 })
    };
    let mut waits: Vec<libc::pollfd> = tasks.iter().filter_map(number_of).collect();
    let mut sorted: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
    sorted.sort_unstable();
    // SAFETY: the child makes only system calls, in `become_keeper`, and does not return.
    match unsafe { fork() }? {
        ForkResult::Child => become_keeper(&sorted, &mut waits),
        ForkResult::Parent { child } => {
            // It ends at once. Where children are reaped elsewhere there is nothing to wait for.
            let _ = nix::sys::wait::waitpid(child, None);
            Ok(())
        }
    }
}

/// The child: becomes the keeper in all but its parent, forks once more and ends, so that the grandchild belongs to nobody here. When it has
/// ended, the keeper has its name and its descriptors.
fn become_keeper(sorted: &[RawFd], waits: &mut [libc::pollfd]) -> ! {
    // SAFETY: system calls with numbers and with strings that end in a zero; no descriptor that is closed or replaced is used again,
    // and what was sorted is moved downwards only, over numbers that were moved before or are not kept.
    unsafe {
        libc::setsid();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1, libc::SIGALRM] {
            libc::signal(signal, libc::SIG_DFL);
        }
        libc::alarm(0);
        let none: u64 = 0;
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, 0, 8);
        libc::prctl(libc::PR_SET_NAME, c"ferry-keeper".as_ptr());
        libc::chdir(c"/".as_ptr());
        let score = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if score >= 0 {
            libc::write(score, c"1000".as_ptr().cast(), 4);
            libc::close(score);
        }
        for (number, fd) in (0..).zip(sorted) {
            libc::dup2(*fd, number);
        }
        libc::syscall(libc::SYS_close_range, sorted.len() as libc::c_uint, libc::c_uint::MAX, 0);
        if libc::fork() != 0 {
            libc::_exit(0);
        }
        let mut left = waits.len();
        while left > 0 {
            libc::poll(waits.as_mut_ptr(), waits.len() as libc::nfds_t, -1);
            for wait in waits.iter_mut().filter(|wait| wait.fd >= 0 && wait.revents != 0) {
                wait.fd = -1;
                left -= 1;
            }
        }
        libc::_exit(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{HostPid, pidfd};
    use std::os::fd::AsFd;
    use std::time::Duration;

    #[test]
    fn a_keeper_holds_what_it_was_given_and_ends_with_the_task() {
        let mut task = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let of_task = pidfd::open(HostPid(task.id() as i32)).unwrap();
        let (mut read, write) = std::io::pipe().unwrap();
        let kept = [write.as_fd(), of_task.as_fd()];
        assert_eq!(
            {
                let mut all = numbers(&kept);
                all.sort_unstable();
                all
            },
            [0, 1]
        );
        start(&kept, &[of_task.as_fd()]).unwrap();
        drop(write);
        let mut poll = [rustix::event::PollFd::new(&read, rustix::event::PollFlags::IN)];
        let wait = rustix::event::Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
        assert_eq!(rustix::event::poll(&mut poll, Some(&wait)), Ok(0), "somebody holds the other end");
        task.kill().unwrap();
        pidfd::wait_gone(of_task.as_fd(), Duration::from_secs(10)).unwrap();
        assert_eq!(std::io::Read::read(&mut read, &mut [0]).unwrap(), 0, "the keeper has ended");
        task.wait().unwrap();
    }
}
