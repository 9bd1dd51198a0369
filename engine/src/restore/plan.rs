//! Everything that can be decided, and everything that can stand in the way, before the first task is made.

use std::collections::HashMap;
use std::ops::Range;

use nix::errno::Errno;

use super::birth::{self, Member, TreePlan};
use super::checkpoint::{Checkpoint, TaskImages};
use super::error::{Obstacle, RestoreError};
use super::numbers::Numbers;
use crate::memory::layout::free_range;
use crate::memory::vdso::{PARKING, Vdso};
use crate::sys::{NsPid, PAGE_SIZE};

/// A process leader's slot: thousands of calls and their data.
pub const LEADER_SLOT: usize = 256 << 10;
/// Another thread's slot.
pub const THREAD_SLOT: usize = 32 << 10;
/// Tasks in between that make an adopted one; they share what is left of the area.
const SPARE_SLOTS: usize = 1;
/// Where the search for the area begins: above what programs of fixed addresses use.
const AREA_FROM: u64 = 0x1000_0000;

/// What was decided.
pub struct Plan {
    /// Who makes whom.
    pub tree: TreePlan,
    /// The memory that ferry shares with all tasks.
    pub area: Range<u64>,
    /// Behind it, room for a vdso on the move.
    pub parking: Range<u64>,
    /// The kernel's vdso.
    pub vdso: Vdso,
    /// Where each task has it; none for a task that had none.
    pub vdso_at: Vec<Option<u64>>,
}

/// What the plan depends on besides the images.
pub struct Circumstances {
    /// The root stays in the session (and group) of ferry.
    pub shell_job: bool,
    /// The root starts a pid namespace, in which all pids are free.
    pub pid_namespace: bool,
}

impl Plan {
    /// Plans the restore of `checkpoint`.
    ///
    /// # Errors
    /// [`RestoreError::Obstacles`] with all of them, or what keeps ferry from finding them.
    pub fn new(checkpoint: &Checkpoint, circumstances: &Circumstances) -> Result<Self, RestoreError> {
        let vdso = Vdso::collect().map_err(|problem| RestoreError::Caller { what: "vdso", problem })?;
        let mut obstacles = Vec::new();
        let obstacle = |task: &TaskImages, problem: String, pid_taken: bool| Obstacle {
            pid: task.pid,
            comm: task.comm.clone(),
            problem,
            pid_taken,
        };
        let mut object = |task: &TaskImages, problem: String| obstacles.push(obstacle(task, problem, false));
        let root = &checkpoint.tasks[0];
        if root.session != root.pid.0 && root.session != 0 && !circumstances.shell_job {
            let problem = format!(
                "it is the root and not the leader of its session, {}: restore it as a shell job (--shell-job)",
                root.session
            );
            object(root, problem);
        }
        if root.is_zombie() {
            object(root, "it is the root and has exited: there is nothing to restore".into());
        }
        let mut vdso_at = Vec::with_capacity(checkpoint.tasks.len());
        let mut spaces: HashMap<u32, NsPid> = HashMap::new();
        for task in &checkpoint.tasks {
            let place = task.memory.as_ref().map_or(Ok(None), |memory| {
                let saved = memory.layout.vdso.as_ref().and_then(|code| {
                    let run = memory.pages.set.within(code.clone()).next().filter(|run| run.range == *code)?;
                    let length = code.end - code.start;
                    memory.pages.pages.bytes().get(run.offset as usize..(run.offset + length) as usize)
                });
                vdso.place(&memory.layout, saved)
            });
            vdso_at.push(place.unwrap_or_else(|problem| {
                object(task, problem);
                None
            }));
            if task.memory.is_some()
                && task.ids.vm_id != 0
                && let Some(other) = spaces.insert(task.ids.vm_id, task.pid)
            {
                object(task, format!("it shares its memory with pid {other} (vfork), which cannot be restored yet"));
            }
        }
        let members = members(&checkpoint.tasks, circumstances.shell_job);
        let tree = birth::plan(&members)
            .map_err(|problem| RestoreError::Inconsistent { name: crate::images::Kind::Pstree.name(), problem })?;
        if !circumstances.pid_namespace {
            let numbers = Numbers::new()?;
            for task in &checkpoint.tasks {
                for tid in std::iter::once(task.pid).chain(task.threads.iter().map(|thread| thread.tid)) {
                    if let Some(problem) = numbers.problem(tid) {
                        obstacles.push(obstacle(task, problem, true));
                    }
                }
            }
            for helper in &tree.helpers {
                if let Some(problem) = numbers.problem(NsPid(helper.pid)) {
                    obstacles.push(obstacle(&checkpoint.tasks[helper.parent], problem, true));
                }
            }
        }
        if !obstacles.is_empty() {
            return Err(RestoreError::Obstacles(obstacles));
        }
        let leaders = checkpoint.tasks.len() + tree.helpers.len() + SPARE_SLOTS;
        let threads: usize = checkpoint.tasks.iter().map(|task| task.threads.len()).sum();
        let length = (PAGE_SIZE as usize + leaders * LEADER_SLOT + threads * THREAD_SLOT) as u64;
        let layouts = checkpoint.tasks.iter().filter_map(|task| task.memory.as_ref()).map(|memory| &memory.layout);
        let used = layouts.flat_map(|layout| layout.ranges().chain(layout.guards.iter().cloned()));
        let own = own_ranges().map_err(|errno| RestoreError::Own { step: "read its own mappings", errno })?;
        let all = free_range(used.chain(own), AREA_FROM, length + PARKING)
            .ok_or(RestoreError::Own { step: "find an address that is free in all tasks", errno: Errno::ENOMEM })?;
        let parking = all.start + length..all.end;
        Ok(Self { tree, area: all.start..parking.start, parking, vdso, vdso_at })
    }

    /// The area and the parking behind it, which are unmapped together.
    pub fn scaffold(&self) -> Range<u64> {
        self.area.start..self.parking.end
    }
}

/// The tasks as numbers. With `shell_job`, what the root has from its shell is 0: what ferry has from its own.
fn members(tasks: &[TaskImages], shell_job: bool) -> Vec<Member> {
    let root = &tasks[0];
    let outer_session = (shell_job && root.session != root.pid.0).then_some(root.session);
    let outer_group = (outer_session.is_some() && root.group != root.pid.0).then_some(root.group);
    let inner = |number: i32, outer: Option<i32>| if Some(number) == outer { 0 } else { number };
    tasks
        .iter()
        .map(|task| Member {
            pid: task.pid.0,
            parent: task.parent,
            session: inner(task.session, outer_session),
            group: inner(task.group, outer_group),
        })
        .collect()
}

fn own_ranges() -> nix::Result<Vec<Range<u64>>> {
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(|_| Errno::EIO)?;
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    Ok(maps.lines().filter_map(range).filter(|range| range.end <= crate::memory::layout::ADDRESS_END).collect())
}
