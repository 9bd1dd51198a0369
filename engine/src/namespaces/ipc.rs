//! IPC namespaces (ipc_namespaces(7), sysvipc(7), mq_overview(7)): the limits; objects are refused by name for now.
//!
//! `/proc/sys` and `/proc/sysvipc` show the namespace of the thread that opens them.

use std::fs;
use std::io;

use rustix::fs::{Dir, Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::sysctl::Folder;
use crate::images::ipc::IpcVarEntry;

/// The limits and the names of all objects in the calling thread's namespace.
#[derive(Debug)]
pub(super) struct Ipc {
    pub limits: IpcVarEntry,
    pub objects: Vec<String>,
}

pub(super) fn collect() -> io::Result<Ipc> {
    Ok(Ipc { limits: limits()?, objects: objects()? })
}

fn limits() -> io::Result<IpcVarEntry> {
    let (kernel, mqueue) = (Folder::open("kernel")?, Folder::open("fs/mqueue")?);
    // -1 where no id was asked for (`CONFIG_CHECKPOINT_RESTORE`).
    let next_id = |name: &str| -> io::Result<Option<u32>> {
        Ok(kernel.number::<i32>(name)?.and_then(|id| u32::try_from(id).ok()).filter(|id| *id > 0))
    };
    let number = |folder: &Folder, name: &str| -> io::Result<u32> { Ok(folder.number(name)?.unwrap_or_default()) };
    let semaphores = kernel.get("sem")?.unwrap_or_default();
    Ok(IpcVarEntry {
        sem_ctls: semaphores.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect(),
        msg_ctlmax: number(&kernel, "msgmax")?,
        msg_ctlmnb: number(&kernel, "msgmnb")?,
        msg_ctlmni: number(&kernel, "msgmni")?,
        auto_msgmni: number(&kernel, "auto_msgmni")?,
        shm_ctlmax: kernel.number("shmmax")?.unwrap_or_default(),
        shm_ctlall: kernel.number("shmall")?.unwrap_or_default(),
        shm_ctlmni: number(&kernel, "shmmni")?,
        shm_rmid_forced: number(&kernel, "shm_rmid_forced")?,
        mq_queues_max: number(&mqueue, "queues_max")?,
        mq_msg_max: number(&mqueue, "msg_max")?,
        mq_msgsize_max: number(&mqueue, "msgsize_max")?,
        mq_msg_default: mqueue.number("msg_default")?,
        mq_msgsize_default: mqueue.number("msgsize_default")?,
        msg_next_id: next_id("msg_next_id")?,
        sem_next_id: next_id("sem_next_id")?,
        shm_next_id: next_id("shm_next_id")?,
    })
}

fn objects() -> io::Result<Vec<String>> {
    let mut objects = Vec::new();
    for (file, what) in [("shm", "shared memory segment"), ("sem", "semaphore set"), ("msg", "message queue")] {
        let text = match fs::read_to_string(format!("/proc/sysvipc/{file}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            result => result?,
        };
        // Key and id are the first two columns, below a line of titles.
        for line in text.lines().skip(1) {
            let mut fields = line.split_ascii_whitespace();
            let (key, id) = (fields.next().unwrap_or("?"), fields.next().unwrap_or("?"));
            objects.push(format!("System V {what} {id} (key {key})"));
        }
    }
    objects.extend(queues()?.into_iter().map(|name| format!("POSIX message queue /{name}")));
    Ok(objects)
}

/// The POSIX message queues, listed in a mount that nobody else sees.
fn queues() -> io::Result<Vec<String>> {
    let context = match fsopen("mqueue", FsOpenFlags::FSOPEN_CLOEXEC) {
        // A kernel without POSIX message queues.
        Err(rustix::io::Errno::NODEV) => return Ok(Vec::new()),
        result => result?,
    };
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    // The mount's descriptor itself is one of O_PATH.
    let folder = openat(&mount, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::read_from(&folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Gives the calling thread's namespace the limits, where they differ.
pub(super) fn restore(limits: &IpcVarEntry) -> io::Result<()> {
    let (kernel, mqueue) = (Folder::open("kernel")?, Folder::open("fs/mqueue")?);
    let semaphores = limits.sem_ctls.iter().map(u32::to_string).collect::<Vec<_>>().join("\t");
    let numbers = [
        (&kernel, "msgmax", Some(limits.msg_ctlmax.into())),
        (&kernel, "msgmnb", Some(limits.msg_ctlmnb.into())),
        (&kernel, "msgmni", Some(limits.msg_ctlmni.into())),
        (&kernel, "shmmax", Some(limits.shm_ctlmax)),
        (&kernel, "shmall", Some(limits.shm_ctlall)),
        (&kernel, "shmmni", Some(limits.shm_ctlmni.into())),
        (&kernel, "shm_rmid_forced", Some(limits.shm_rmid_forced.into())),
        (&mqueue, "queues_max", Some(limits.mq_queues_max.into())),
        (&mqueue, "msg_max", Some(limits.mq_msg_max.into())),
        (&mqueue, "msgsize_max", Some(limits.mq_msgsize_max.into())),
        (&mqueue, "msg_default", limits.mq_msg_default.map(u64::from)),
        (&mqueue, "msgsize_default", limits.mq_msgsize_default.map(u64::from)),
        (&kernel, "msg_next_id", limits.msg_next_id.map(u64::from)),
        (&kernel, "sem_next_id", limits.sem_next_id.map(u64::from)),
        (&kernel, "shm_next_id", limits.shm_next_id.map(u64::from)),
    ];
    kernel.set_changed("sem", &semaphores)?;
    for (folder, name, value) in numbers {
        if let Some(value) = value {
            folder.set_changed(name, &value.to_string())?;
        }
    }
    Ok(())
}
