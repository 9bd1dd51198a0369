//! Which workloads the engine refuses for now, and in which words: the one table that changes as support grows.
//!
//! A refusal is one of the whole: before anything is frozen, with the pid and the object. Every workload that is not
//! listed must survive.

/// A workload that must be refused, with a word that the refusal has to contain.
pub const REFUSED: &[(&str, &str)] = &[
    ("tcp_connected", "tcp"),
    ("deleted_linked_file", "hard link"),
    ("pipe_packets", "packet mode"),
    ("terminal_outside", "its master side"),
    ("udp_waiting", "datagram"),
    ("multicast", "multicast group"),
    ("inotify", "inotify"),
    ("memfd", "memfd"),
    ("pidfd", "pidfd"),
    ("io_uring", "io_uring"),
    ("netlink", "netlink"),
    ("file_lock", "lock"),
    ("userfaultfd", "userfaultfd"),
    ("system_v_memory", "system v"),
    ("mdwe", "pr_set_mdwe"),
    ("leader_exited", "main thread"),
    ("several_unsupported", "inotify"),
];

/// The word that the refusal of this workload must contain, if it must be refused.
pub fn refusal(name: &str) -> Option<&'static str> {
    REFUSED.iter().find(|(refused, _)| *refused == name).map(|(_, word)| *word)
}
