//! Who makes whom: the order of clones after which every task has its parent, session and process group.
//!
//! A session passes from maker to child and is left only by becoming the leader of a new one, whose number is the leader's
//! own pid (setsid(2)). So a child is made while its parent is in the child's session: after the parent's own
//! setsid(2) or before it. Where the parent never was in that session, the child was adopted once, and is made by
//! somebody in it: by a brother (`CLONE_PARENT`), or by a grandparent through a task in between that ends at once. Where
//! nobody of the session is left, a helper with the number of its dead leader makes the session and ends when all are
//! made. The same holds for groups, except that one can join any group of one's session (setpgid(2)).
//!
//! This is computed from numbers alone.

use std::collections::{BTreeMap, HashMap};

/// What is known of a process. Numbers are those of the root's pid namespace; 0 is a session or group from outside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its pid.
    pub pid: i32,
    /// Its parent's place in the list; none for the root.
    pub parent: Option<usize>,
    /// Its session.
    pub session: i32,
    /// Its process group.
    pub group: i32,
}

/// How a task is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// By ferry: the root.
    Ferry,
    /// As its child.
    Parent(usize),
    /// As its brother.
    Sibling(usize),
    /// As the child of a child that ends at once, so that it is adopted by its parent.
    Grandparent(usize),
}

impl Maker {
    /// The task that makes the clone.
    pub fn task(self) -> Option<usize> {
        match self {
            Self::Ferry => None,
            Self::Parent(task) | Self::Sibling(task) | Self::Grandparent(task) => Some(task),
        }
    }
}

/// How one task comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Birth {
    /// Its place in the list of members; past its end, the helpers follow.
    pub task: usize,
    /// Who makes it.
    pub maker: Maker,
    /// Whether it is made before its maker leads a session.
    pub early: bool,
}

/// A task that only lends its number to a session or group, and ends before the tree runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Helper {
    /// The number.
    pub pid: i32,
    /// Whose child it is.
    pub parent: usize,
    /// Whether it leads a session; else only a group.
    pub leads_session: bool,
}

/// The whole order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TreePlan {
    /// Helpers; their places in lists are behind the members.
    pub helpers: Vec<Helper>,
    /// Every member and helper once. The makers of each wave are in the wave before.
    pub waves: Vec<Vec<Birth>>,
    /// Tasks that become leaders of a group of their own without leading a session.
    pub group_leaders: Vec<usize>,
    /// The numbers of their groups.
    pub groups_led: Vec<i32>,
    /// Tasks that join a group then.
    pub joins: Vec<(usize, i32)>,
}

/// Plans the tree of `members`, whose first is the root and whose parents come before their children.
///
/// # Errors
/// A sentence, when no order exists.
pub fn plan(members: &[Member]) -> Result<TreePlan, String> {
    let places: HashMap<i32, usize> = members.iter().enumerate().map(|(place, member)| (member.pid, place)).collect();
    if places.len() != members.len() {
        return Err("two processes have one pid: the images are damaged".into());
    }
    let mut plan = TreePlan::default();
    let mut makers = plan.sessions(members, &places);
    plan.groups(members, &places);
    let session_helpers = makers.len() - members.len();
    for helper in &plan.helpers[session_helpers..] {
        makers.push((Maker::Parent(helper.parent), false));
    }
    plan.order(members, &makers)?;
    Ok(plan)
}

/// The session in which each member has to be made; none if any will do.
fn birth_sessions(members: &[Member]) -> Vec<Option<i32>> {
    let mut wanted: Vec<Option<i32>> =
        members.iter().map(|member| if member.session == member.pid { None } else { Some(member.session) }).collect();
    // Children come after their parents, so that in reverse each parent sees what its children need.
    for (place, member) in members.iter().enumerate().rev() {
        // What the root is born into is ferry's session, whatever its children need.
        let Some(parent) = member.parent.filter(|parent| *parent != 0) else { continue };
        let leads = members[parent].session == members[parent].pid;
        let Some(session) = wanted[place].filter(|session| *session != members[parent].session) else { continue };
        if leads && wanted[parent].is_none() && !led_from_below(members, session, parent) {
            wanted[parent] = Some(session);
        }
    }
    wanted
}

/// Whether the leader of `session` descends from `ancestor`, which then never was in that session.
fn led_from_below(members: &[Member], session: i32, ancestor: usize) -> bool {
    let mut task = members.iter().position(|member| member.pid == session);
    while let Some(place) = task {
        if place == ancestor {
            return true;
        }
        task = members[place].parent;
    }
    false
}

impl TreePlan {
    /// Whether a task of the tree leads this group, without leading a session.
    pub fn leads_group(&self, group: i32) -> bool {
        self.groups_led.contains(&group)
    }

    fn sessions(&mut self, members: &[Member], places: &HashMap<i32, usize>) -> Vec<(Maker, bool)> {
        let wanted = birth_sessions(members);
        let mut makers: Vec<(Maker, bool)> = Vec::with_capacity(members.len());
        let mut dead_leaders: BTreeMap<i32, usize> = BTreeMap::new();
        for (place, member) in members.iter().enumerate() {
            let Some(parent) = member.parent else {
                makers.push((Maker::Ferry, false));
                continue;
            };
            let parents = &members[parent];
            let maker = match wanted[place] {
                None => (Maker::Parent(parent), false),
                Some(session) if session == parents.session => (Maker::Parent(parent), false),
                // 0 is the session that ferry is in.
                born if parents.session == parents.pid && born == wanted[parent].or((parent == 0).then_some(0)) => {
                    (Maker::Parent(parent), true)
                }
                Some(session) => {
                    let alive = places.get(&session).copied().or_else(|| {
                        let lives_in_it =
                            |(other, member): &(usize, &Member)| *other < place && member.session == session;
                        members.iter().enumerate().find(lives_in_it).map(|(other, _)| other)
                    });
                    match alive {
                        Some(brother) if members[brother].parent == Some(parent) => (Maker::Sibling(brother), false),
                        Some(other) => (Maker::Grandparent(other), false),
                        None => {
                            let helpers = &mut self.helpers;
                            let helper = *dead_leaders.entry(session).or_insert_with(|| {
                                helpers.push(Helper { pid: session, parent, leads_session: true });
                                members.len() + helpers.len() - 1
                            });
                            if self.helpers[helper - members.len()].parent == parent {
                                (Maker::Sibling(helper), false)
                            } else {
                                (Maker::Grandparent(helper), false)
                            }
                        }
                    }
                }
            };
            makers.push(maker);
        }
        let helpers = self.helpers.iter().map(|helper| (Maker::Parent(helper.parent), false));
        makers.extend(helpers.collect::<Vec<_>>());
        makers
    }

    fn groups(&mut self, members: &[Member], places: &HashMap<i32, usize>) {
        let outside = members.first().map_or(0, |root| if root.group == root.pid { 0 } else { root.group });
        for (place, member) in members.iter().enumerate() {
            if member.session == member.pid {
                continue; // setsid(2) has made the group
            }
            if member.group == member.pid {
                self.group_leaders.push(place);
                self.groups_led.push(member.group);
                continue;
            }
            let led =
                places.contains_key(&member.group) || self.helpers.iter().any(|helper| helper.pid == member.group);
            if !led {
                if member.group == outside || member.group == 0 {
                    continue;
                }
                self.helpers.push(Helper { pid: member.group, parent: place, leads_session: false });
            }
            self.joins.push((place, member.group));
        }
    }

    fn order(&mut self, members: &[Member], makers: &[(Maker, bool)]) -> Result<(), String> {
        let mut made = vec![false; makers.len()];
        let mut left = makers.len();
        while left > 0 {
            let ready: Vec<usize> = (0..makers.len())
                .filter(|task| !made[*task] && makers[*task].0.task().is_none_or(|maker| made[maker]))
                .collect();
            left -= ready.len();
            if ready.is_empty() {
                let stuck: Vec<String> = (0..members.len())
                    .filter(|task| !made[*task])
                    .map(|task| format!("{} (session {})", members[task].pid, members[task].session))
                    .collect();
                return Err(format!("no order of clones gives these tasks their sessions: {}", stuck.join(", ")));
            }
            let birth = |task: &usize| Birth { task: *task, maker: makers[*task].0, early: makers[*task].1 };
            self.waves.push(ready.iter().map(birth).collect());
            ready.into_iter().for_each(|task| made[task] = true);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(pid: i32, parent: Option<usize>, session: i32, group: i32) -> Member {
        Member { pid, parent, session, group }
    }

    fn maker(plan: &TreePlan, task: usize) -> (Maker, bool) {
        let birth = plan.waves.iter().flatten().find(|birth| birth.task == task).expect("each task is made");
        (birth.maker, birth.early)
    }

    #[test]
    fn a_plain_tree_is_made_from_the_top() {
        let plan = plan(&[
            member(10, None, 10, 10),
            member(11, Some(0), 10, 10),
            member(12, Some(0), 12, 12),
            member(13, Some(2), 12, 13),
            member(14, Some(2), 12, 13),
        ])
        .unwrap();
        let waves: Vec<Vec<usize>> =
            plan.waves.iter().map(|wave| wave.iter().map(|birth| birth.task).collect()).collect();
        assert_eq!(waves, [vec![0], vec![1, 2], vec![3, 4]]);
        let children = plan.waves[1..].iter().flatten();
        assert!(children.into_iter().all(|birth| !birth.early && matches!(birth.maker, Maker::Parent(_))));
        assert_eq!((plan.group_leaders.as_slice(), plan.joins.as_slice()), (&[3][..], &[(1, 10), (4, 13)][..]));
        assert!(plan.helpers.is_empty());
    }

    #[test]
    fn a_child_older_than_its_parents_session_is_made_before_it() {
        // 11 forked 12, then made its own session; 13 came after.
        let plan = plan(&[
            member(10, None, 10, 10),
            member(11, Some(0), 11, 11),
            member(12, Some(1), 10, 10),
            member(13, Some(1), 11, 11),
        ])
        .unwrap();
        assert_eq!(maker(&plan, 2), (Maker::Parent(1), true));
        assert_eq!(maker(&plan, 3), (Maker::Parent(1), false));
    }

    #[test]
    fn the_need_for_an_old_session_reaches_all_ancestors() {
        let plan = plan(&[
            member(10, None, 10, 10),
            member(11, Some(0), 11, 11),
            member(12, Some(1), 12, 12),
            member(13, Some(2), 10, 10),
        ])
        .unwrap();
        assert_eq!(maker(&plan, 1), (Maker::Parent(0), false));
        assert_eq!(maker(&plan, 2), (Maker::Parent(1), true));
        assert_eq!(maker(&plan, 3), (Maker::Parent(2), true));
    }

    #[test]
    fn an_adopted_daemon_is_made_by_a_helper_in_the_place_of_its_dead_leader() {
        let plan = plan(&[member(1, None, 1, 1), member(7, Some(0), 6, 6), member(8, Some(0), 6, 6)]).unwrap();
        assert_eq!(plan.helpers, [Helper { pid: 6, parent: 0, leads_session: true }]);
        assert_eq!(maker(&plan, 3), (Maker::Parent(0), false));
        assert_eq!(maker(&plan, 1), (Maker::Sibling(3), false));
        assert_eq!(maker(&plan, 2), (Maker::Sibling(1), false), "its brother is in the session by then");
        assert_eq!(plan.joins, [(1, 6), (2, 6)]);
    }

    #[test]
    fn an_adopted_task_of_a_living_session_is_made_by_it() {
        let plan = plan(&[
            member(1, None, 1, 1),
            member(5, Some(0), 5, 5),
            member(9, Some(0), 5, 5),
            member(6, Some(1), 6, 6),
            member(7, Some(0), 6, 6),
        ])
        .unwrap();
        assert_eq!(maker(&plan, 2), (Maker::Sibling(1), false));
        assert_eq!(maker(&plan, 4), (Maker::Grandparent(3), false));
    }

    #[test]
    fn a_group_whose_leader_died_gets_a_helper() {
        let plan = plan(&[member(10, None, 10, 10), member(12, Some(0), 10, 11), member(13, Some(0), 10, 11)]).unwrap();
        assert_eq!(plan.helpers, [Helper { pid: 11, parent: 1, leads_session: false }]);
        assert_eq!(maker(&plan, 3), (Maker::Parent(1), false));
        assert_eq!(plan.joins, [(1, 11), (2, 11)]);
    }

    #[test]
    fn a_job_of_a_shell_stays_in_the_outer_session_and_group() {
        let plan = plan(&[member(10, None, 5, 5), member(11, Some(0), 5, 5), member(12, Some(0), 5, 12)]).unwrap();
        assert!(plan.helpers.is_empty());
        assert_eq!((plan.group_leaders.as_slice(), plan.joins.as_slice()), (&[2][..], &[][..]));
    }

    #[test]
    fn impossible_trees_are_refused() {
        assert!(plan(&[member(10, None, 10, 10), member(10, Some(0), 10, 10)]).is_err());
        // Each could only be made by the other.
        let knot = [
            member(1, None, 1, 1),
            member(2, Some(0), 2, 2),
            member(3, Some(1), 5, 5),
            member(4, Some(0), 4, 4),
            member(5, Some(2), 5, 5),
        ];
        assert!(plan(&knot).unwrap_err().contains("3 (session 5)"));
    }
}
