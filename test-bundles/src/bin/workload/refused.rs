//! Kernel objects that Ferry does not save yet, and says so before it freezes anything.
//!
//! Each checks itself too, so that the day it is supported only the table of expectations changes.

use crate::Workload;
use crate::room::{Check, Room};
use crate::sockets::ping;
use crate::sys::{Fault, c_path, ensure, errno, raw, same, sys, zeroed};
use std::net::{TcpListener, TcpStream};

fn tcp_connected(_: &Room) -> Result<Check, Fault> {
    let text = |error: std::io::Error| error.to_string();
    let listener = TcpListener::bind("127.0.0.1:0").map_err(text)?;
    let client = TcpStream::connect(listener.local_addr().map_err(text)?).map_err(text)?;
    let (server, _) = listener.accept().map_err(text)?;
    Ok(Box::new(move || {
        let _ = &listener;
        ping(&client, &server)?;
        ping(&server, &client)
    }))
}

fn inotify(room: &Room) -> Result<Check, Fault> {
    let watch = sys!(inotify_init1(libc::IN_NONBLOCK))? as i32;
    let dir = room.path("watched");
    std::fs::create_dir(&dir).map_err(|error| error.to_string())?;
    sys!(inotify_add_watch(watch, c_path(&dir).as_ptr(), libc::IN_CREATE))?;
    let mut count = 0;
    Ok(Box::new(move || {
        count += 1;
        std::fs::write(dir.join(count.to_string()), "").map_err(|error| error.to_string())?;
        let mut bytes = [0u8; 400];
        ensure!(sys!(read(watch, bytes.as_mut_ptr().cast(), 400))? > 0, "no event");
        Ok(())
    }))
}

fn memfd(_: &Room) -> Result<Check, Fault> {
    let descriptor = sys!(memfd_create(c"scratch".as_ptr(), libc::MFD_ALLOW_SEALING))? as i32;
    sys!(write(descriptor, b"content".as_ptr().cast(), 7))?;
    sys!(fcntl(descriptor, libc::F_ADD_SEALS, libc::F_SEAL_GROW))?;
    Ok(Box::new(move || {
        let mut bytes = [0u8; 20];
        same!("length", sys!(pread(descriptor, bytes.as_mut_ptr().cast(), 20, 0))?, 7);
        same!("seals", sys!(fcntl(descriptor, libc::F_GET_SEALS))?, i64::from(libc::F_SEAL_GROW));
        Ok(())
    }))
}

fn pidfd(_: &Room) -> Result<Check, Fault> {
    let child = crate::room::fork(|| {
        loop {
            crate::sys::pause();
        }
    })?;
    let descriptor = raw!(SYS_pidfd_open, child, 0)? as i32;
    Ok(Box::new(move || raw!(SYS_pidfd_send_signal, descriptor, 0, 0, 0).map(|_| ())))
}

fn io_uring(_: &Room) -> Result<Check, Fault> {
    let mut parameters = [0u8; 120];
    let descriptor = raw!(SYS_io_uring_setup, 8, parameters.as_mut_ptr())? as i32;
    Ok(Box::new(move || raw!(SYS_io_uring_enter, descriptor, 0, 0, 0, 0, 0).map(|_| ())))
}

fn netlink(_: &Room) -> Result<Check, Fault> {
    let socket = sys!(socket(libc::AF_NETLINK, libc::SOCK_RAW, 0))? as i32;
    let mut address = zeroed::<libc::sockaddr_nl>();
    address.nl_family = libc::AF_NETLINK as u16;
    sys!(bind(socket, (&raw const address).cast(), size_of_val(&address) as u32))?;
    Ok(Box::new(move || sys!(fcntl(socket, libc::F_GETFL)).map(|_| ())))
}

fn file_lock(room: &Room) -> Result<Check, Fault> {
    let path = room.path("locked");
    let descriptor = crate::filesystem::open(&path, libc::O_RDWR | libc::O_CREAT)?;
    sys!(flock(descriptor, libc::LOCK_EX))?;
    Ok(Box::new(move || {
        let other = crate::filesystem::open(&path, libc::O_RDWR)?;
        let answer = sys!(flock(other, libc::LOCK_EX | libc::LOCK_NB));
        ensure!(answer.is_err() && errno() == libc::EWOULDBLOCK, "the lock is not held any more");
        sys!(close(other)).map(|_| ())
    }))
}

fn userfaultfd(_: &Room) -> Result<Check, Fault> {
    let descriptor = raw!(SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | 1)? as i32;
    Ok(Box::new(move || sys!(fcntl(descriptor, libc::F_GETFL)).map(|_| ())))
}

fn system_v_memory(_: &Room) -> Result<Check, Fault> {
    let id = sys!(shmget(libc::IPC_PRIVATE, 8192, libc::IPC_CREAT | 0o600))? as i32;
    let address = raw!(SYS_shmat, id, 0, 0)? as usize;
    // Marked for removal at once: it lives as long as it is attached, and nothing is left when the workload ends.
    sys!(shmctl(id, libc::IPC_RMID, std::ptr::null_mut()))?;
    crate::memory::fill(address, b"segment");
    Ok(Box::new(move || crate::memory::holds("the segment", address, b"segment")))
}

fn mdwe(_: &Room) -> Result<Check, Fault> {
    const PR_SET_MDWE: i32 = 65;
    const PR_GET_MDWE: i32 = 66;
    sys!(prctl(PR_SET_MDWE, 1, 0, 0, 0))?;
    Ok(Box::new(|| {
        same!("PR_GET_MDWE", sys!(prctl(PR_GET_MDWE, 0, 0, 0, 0))?, 1);
        Ok(())
    }))
}

/// A process that lives on in another thread than its first.
fn leader_exited(room: &Room) -> Result<Check, Fault> {
    let room = room.clone();
    let is_zombie = || crate::sys::text("/proc/self/stat").is_ok_and(|stat| stat.contains(") Z "));
    std::thread::spawn(move || {
        room.serve(Ok(Box::new(move || crate::sys::wait_for("the first thread to be a zombie", is_zombie))))
    });
    raw!(SYS_exit, 0)?;
    Err("the first thread goes on after its end".to_owned())
}

/// Three kinds at once, one of them in a child.
fn several_unsupported(room: &Room) -> Result<Check, Fault> {
    let child = room.child("child", inotify)?;
    let (mut file, mut process) = (memfd(room)?, pidfd(room)?);
    Ok(Box::new(move || {
        child.ask()?;
        file()?;
        process()
    }))
}

/// A row of the table.
const fn row(name: &'static str, setup: fn(&Room) -> Result<Check, Fault>) -> Workload {
    Workload { name, setup, missing: || None }
}

/// The workloads of this file.
pub const WORKLOADS: &[Workload] = &[
    row("tcp_connected", tcp_connected),
    row("inotify", inotify),
    row("memfd", memfd),
    row("pidfd", pidfd),
    row("io_uring", io_uring),
    row("netlink", netlink),
    row("file_lock", file_lock),
    row("userfaultfd", userfaultfd),
    row("system_v_memory", system_v_memory),
    row("mdwe", mdwe),
    row("leader_exited", leader_exited),
    row("several_unsupported", several_unsupported),
];
