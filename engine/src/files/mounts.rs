//! The mounts of the tree's mount namespace, as far as files need them (proc_pid_mountinfo(5)).

use std::collections::HashMap;
use std::io;

use crate::sys::HostPid;

/// What is known of one mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Type of the file system.
    pub file_system: String,
}

/// Mounts by id.
#[derive(Clone, Debug, Default)]
pub struct Mounts {
    by_id: HashMap<i32, Mount>,
}

impl Mounts {
    /// Reads the mounts that the process sees.
    ///
    /// # Errors
    /// Those of reading: the process may be gone.
    pub fn read(pid: HostPid) -> io::Result<Self> {
        let text = std::fs::read(format!("/proc/{pid}/mountinfo"))?;
        Ok(Self::parse(&String::from_utf8_lossy(&text)))
    }

    fn parse(text: &str) -> Self {
        let mount = |line: &str| {
            let (head, tail) = line.split_once(" - ")?;
            let id = head.split(' ').next()?.parse().ok()?;
            Some((id, Mount { file_system: tail.split(' ').next()?.to_owned() }))
        };
        Self { by_id: text.lines().filter_map(mount).collect() }
    }

    /// The mount `id`, if the namespace has it.
    pub fn get(&self, id: i32) -> Option<&Mount> {
        self.by_id.get(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn optional_fields_do_not_move_the_type() {
        let mounts = Mounts::parse(
            "22 1 0:20 / / rw,relatime shared:1 master:2 - ext4 /dev/a rw\n23 22 0:21 / /proc rw - proc proc rw\n",
        );
        assert_eq!(mounts.get(22).map(|mount| mount.file_system.as_str()), Some("ext4"));
        assert_eq!(mounts.get(23).map(|mount| mount.file_system.as_str()), Some("proc"));
        assert_eq!(mounts.get(24), None);
    }
}
