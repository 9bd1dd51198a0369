//! The workloads: small programs that set up one kernel object each and check themselves from inside.
//!
//! `workload NAME DIR` runs one; `workload --list` prints their names with what each is about, one a line, and after a
//! tab the reason why this machine cannot run it, if there is one. The protocol is in `room.rs`. One file per group of kernel objects.

#![allow(unsafe_code)] // raw system calls make exactly the kernel objects under test; see sys.rs

mod credentials;
mod descriptors;
mod devices;
mod epoll;
mod filesystem;
mod fork_memory;
mod freezing;
mod household;
mod lazy;
mod locks;
mod mappings;
mod memory;
mod pipes;
mod refused;
mod registers;
mod restart;
mod rewritten;
mod room;
mod seccomp;
mod service;
mod signals;
mod sockets;
mod survivor;
mod sys;
mod task;
mod terminals;
mod threads;
mod timers;
mod tree;

use room::{Check, Room};
use std::path::Path;
use sys::Fault;

/// One workload.
struct Workload {
    name: &'static str,
    /// Makes the object under test and returns the check of it.
    setup: fn(&Room) -> Result<Check, Fault>,
    /// Why this machine cannot run it, if it cannot.
    missing: fn() -> Option<String>,
}

/// A table row for each named function.
macro_rules! workloads {
    ($module:ident: $($name:ident),+ $(,)?) => {
        &[$($crate::Workload { name: stringify!($name), setup: $module::$name, missing: || None }),+]
    };
}

/// Every group of workloads.
fn groups() -> Vec<&'static [Workload]> {
    vec![
        workloads!(tree: sessions, zombies, orphans, dead_group_leader, deep_tree, prefork, stopped_child),
        workloads!(tree: stopped_child_pending),
        workloads!(threads: threads, thread_tls, thread_exit, robust_list, rseq_registered),
        registers::WORKLOADS,
        workloads!(restart: restart_nanosleep, restart_clock_nanosleep, restart_clock_nanosleep_absolute, restart_poll),
        workloads!(restart: restart_ppoll, restart_select, restart_futex, restart_futex_timeout, restart_epoll_wait),
        workloads!(restart: restart_read, restart_sigsuspend, restart_sigtimedwait, restart_wait4),
        workloads!(signals: signal_actions, signal_mask, signals_pending, signals_pending_thread, signal_stack_in_use),
        workloads!(timers: itimer_real, itimer_virtual, itimer_prof, timers_posix, timer_overrun, timers_firing, clocks),
        workloads!(credentials: user_ids, capabilities, securebits, no_new_privs, keep_capabilities),
        credentials::WORKLOADS,
        workloads!(task: resource_limits, nice, sched_batch, sched_idle, sched_fifo, affinity, personality, names),
        workloads!(task: umask, working_directory, deleted_working_directory, root_directory, executable, proc_files),
        workloads!(task: oom_score, dumpable, parent_death_signal, timer_slack, child_subreaper, io_priority),
        workloads!(seccomp: seccomp_strict, seccomp_filter, seccomp_two_filters, seccomp_threads),
        workloads!(memory: anonymous_private, anonymous_shared, heap, stack_deep, stack_growsdown, holes, zero_pages),
        workloads!(memory: protections, protected_data, many_mappings, large_memory, madvise_flags, locked, vdso_calls),
        workloads!(memory: page_content_mix),
        memory::WORKLOADS,
        workloads!(mappings: file_private, file_shared, file_deleted_mapping, file_past_end, device_zero_mapping),
        workloads!(fork_memory: copy_on_write, copy_on_write_unmapped, shared_between_relatives, dont_fork),
        workloads!(rewritten: rewritten_pages, rewritten_discarded, rewritten_mapped_anew, rewritten_moved),
        workloads!(rewritten: rewritten_by_kernel, rewritten_files, rewritten_by_relatives, rewritten_protected),
        workloads!(rewritten: rewritten_huge, rewritten_grown, rewritten_shared),
        workloads!(lazy: lazy_forks, lazy_moves, lazy_discards, lazy_executes, lazy_threads, lazy_wiped),
        workloads!(filesystem: regular_files, append_file, shared_offset, directory, deleted_file, deleted_linked_file),
        workloads!(filesystem: path_descriptor, file_replaced, unix_permissions),
        workloads!(descriptors: sparse_numbers, close_on_exec, duplicates, many_files, shared_table),
        workloads!(pipes: pipe_content, pipe_packets, pipe_size, pipe_between_processes, pipe_half_closed, fifo),
        workloads!(epoll: eventfd, eventfd_shared, epoll_set, epoll_nested, epoll_modes, signalfd, timerfd),
        workloads!(sockets: tcp_listener, tcp6_listener, unix_listener, unix_abstract_listener, unix_listener_options),
        workloads!(sockets: unix_connected, unix_datagram, udp, udp_shut, socket_options, udp_waiting, multicast, unix_listener_replaced),
        workloads!(devices: devices),
        workloads!(terminals: terminal, terminal_settings, terminal_input, terminal_session, terminal_controlling),
        workloads!(terminals: terminal_hung_up, terminal_modes, terminal_outside),
        workloads!(locks: futex_between_processes),
        workloads!(household: household),
        workloads!(service: service),
        workloads!(freezing: spinning),
        workloads!(survivor: survivor, churn),
        refused::WORKLOADS,
    ]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let all = || groups().into_iter().flatten();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "--list"] => {
            let lines: Vec<String> = all()
                .map(|workload| match (workload.missing)() {
                    None => format!("{}\n", workload.name),
                    Some(reason) => format!("{}\t{reason}\n", workload.name),
                })
                .collect();
            let _ = std::io::Write::write_all(&mut std::io::stdout(), lines.concat().as_bytes());
        }
        [_, name, dir] => {
            match all().chain(freezing::FOR_FREEZING).chain(survivor::FOR_FAULTS).find(|workload| workload.name == name)
            {
                Some(workload) => {
                    // What the test's own parents left open is nobody's object under test (make's job server is a pipe).
                    let _ = sys::raw!(SYS_close_range, 3, u32::MAX, 0);
                    // A session of its own, so that the whole of it can be checkpointed. In a container it has one already.
                    let _ = sys::sys!(setsid());
                    let room = Room::new(Path::new(dir));
                    room.serve((workload.setup)(&room));
                }
                None => std::process::exit(2),
            }
        }
        _ => std::process::exit(2),
    }
}
