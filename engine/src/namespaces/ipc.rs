//! IPC namespaces (ipc_namespaces(7), sysvipc(7), mq_overview(7)): the limits; objects are refused by name for now.
//!
//! `/proc/sys` and `/proc/sysvipc` show the namespace of the thread that opens them.

use std::fmt::Display;
use std::fs;
use std::io;

use rustix::fs::{Dir, Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

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

fn read<T: std::str::FromStr + Default>(name: &str) -> io::Result<T> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, format!("/proc/sys/{name} is no number"));
    match fs::read_to_string(format!("/proc/sys/{name}")) {
        Ok(text) => text.trim().parse().map_err(|_| malformed()),
        // What this kernel lacks nobody has changed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(error),
    }
}

fn limits() -> io::Result<IpcVarEntry> {
    let semaphores = fs::read_to_string("/proc/sys/kernel/sem")?;
    // -1 where no id was asked for (`CONFIG_CHECKPOINT_RESTORE`).
    let next_id =
        |name: &str| -> io::Result<Option<u32>> { Ok(u32::try_from(read::<i32>(name)?).ok().filter(|id| *id > 0)) };
    Ok(IpcVarEntry {
        sem_ctls: semaphores.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect(),
        msg_ctlmax: read("kernel/msgmax")?,
        msg_ctlmnb: read("kernel/msgmnb")?,
        msg_ctlmni: read("kernel/msgmni")?,
        auto_msgmni: read("kernel/auto_msgmni")?,
        shm_ctlmax: read("kernel/shmmax")?,
        shm_ctlall: read("kernel/shmall")?,
        shm_ctlmni: read("kernel/shmmni")?,
        shm_rmid_forced: read("kernel/shm_rmid_forced")?,
        mq_queues_max: read("fs/mqueue/queues_max")?,
        mq_msg_max: read("fs/mqueue/msg_max")?,
        mq_msgsize_max: read("fs/mqueue/msgsize_max")?,
        mq_msg_default: Some(read("fs/mqueue/msg_default")?),
        mq_msgsize_default: Some(read("fs/mqueue/msgsize_default")?),
        msg_next_id: next_id("kernel/msg_next_id")?,
        sem_next_id: next_id("kernel/sem_next_id")?,
        shm_next_id: next_id("kernel/shm_next_id")?,
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
    let current = self::limits()?;
    let join = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join("\t");
    write_changed("kernel/sem", join(&current.sem_ctls), join(&limits.sem_ctls))?;
    write_changed("kernel/msgmax", current.msg_ctlmax, limits.msg_ctlmax)?;
    write_changed("kernel/msgmnb", current.msg_ctlmnb, limits.msg_ctlmnb)?;
    write_changed("kernel/msgmni", current.msg_ctlmni, limits.msg_ctlmni)?;
    write_changed("kernel/shmmax", current.shm_ctlmax, limits.shm_ctlmax)?;
    write_changed("kernel/shmall", current.shm_ctlall, limits.shm_ctlall)?;
    write_changed("kernel/shmmni", current.shm_ctlmni, limits.shm_ctlmni)?;
    write_changed("kernel/shm_rmid_forced", current.shm_rmid_forced, limits.shm_rmid_forced)?;
    write_changed("fs/mqueue/queues_max", current.mq_queues_max, limits.mq_queues_max)?;
    write_changed("fs/mqueue/msg_max", current.mq_msg_max, limits.mq_msg_max)?;
    write_changed("fs/mqueue/msgsize_max", current.mq_msgsize_max, limits.mq_msgsize_max)?;
    let optional = [
        ("fs/mqueue/msg_default", current.mq_msg_default, limits.mq_msg_default),
        ("fs/mqueue/msgsize_default", current.mq_msgsize_default, limits.mq_msgsize_default),
        ("kernel/msg_next_id", current.msg_next_id, limits.msg_next_id),
        ("kernel/sem_next_id", current.sem_next_id, limits.sem_next_id),
        ("kernel/shm_next_id", current.shm_next_id, limits.shm_next_id),
    ];
    for (name, current, wanted) in optional {
        if let Some(wanted) = wanted {
            write_changed(name, current.unwrap_or(u32::MAX), wanted)?;
        }
    }
    Ok(())
}

fn write_changed<T: PartialEq + Display>(name: &str, current: T, wanted: T) -> io::Result<()> {
    if current == wanted {
        return Ok(());
    }
    fs::write(format!("/proc/sys/{name}"), wanted.to_string())
        .map_err(|error| io::Error::new(error.kind(), format!("cannot set {name} to {wanted}: {error}")))
}
