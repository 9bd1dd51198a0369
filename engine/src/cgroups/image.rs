//! `cgroup.img` and the plain structs of `ferry-cgroup`, one as the other.

use ferry_cgroup::CgroupTree;
use ferry_cgroup::tree::{Directory, HierarchyTree, Member, Permissions, Property, TaskSet};

use crate::images::cgroup::{
    CgControllerEntry, CgMemberEntry, CgSetEntry, CgroupDirEntry, CgroupEntry, CgroupPerms, CgroupPropEntry,
};

/// The image of a tree.
pub fn entry(tree: &CgroupTree) -> CgroupEntry {
    let member = |member: &Member| CgMemberEntry {
        name: member.hierarchy.clone(),
        path: member.path.clone().into_bytes(),
        cgns_prefix: (member.namespace_prefix > 0).then_some(member.namespace_prefix as u32),
    };
    let set = |set: &TaskSet| CgSetEntry { id: set.id, ctls: set.members.iter().map(member).collect() };
    let hierarchy = |saved: &HierarchyTree| CgControllerEntry {
        cnames: saved.controllers.clone(),
        dirs: saved.heads.iter().map(directory_entry).collect(),
        is_threaded: Some(saved.threaded),
    };
    CgroupEntry {
        sets: tree.sets.iter().map(set).collect(),
        controllers: tree.hierarchies.iter().map(hierarchy).collect(),
    }
}

fn directory_entry(directory: &Directory) -> CgroupDirEntry {
    let property = |property: &Property| CgroupPropEntry {
        name: property.name.clone(),
        value: property.value.clone(),
        perms: property.permissions.map(permissions_entry),
    };
    CgroupDirEntry {
        dir_name: directory.name.clone().into_bytes(),
        children: directory.children.iter().map(directory_entry).collect(),
        properties: directory.properties.iter().map(property).collect(),
        dir_perms: directory.permissions.map(permissions_entry),
    }
}

fn permissions_entry(permissions: Permissions) -> CgroupPerms {
    let Permissions { mode, uid, gid } = permissions;
    CgroupPerms { mode, uid, gid }
}

/// The tree of an image. Its paths and properties are judged later, by who makes them.
///
/// # Errors
/// A sentence: a path is no text.
pub fn tree(image: &CgroupEntry) -> Result<CgroupTree, String> {
    let member = |member: &CgMemberEntry| {
        Ok(Member {
            hierarchy: member.name.clone(),
            path: text(&member.path)?,
            namespace_prefix: member.cgns_prefix.unwrap_or(0) as usize,
        })
    };
    let set = |set: &CgSetEntry| {
        let members = set.ctls.iter().map(member).collect::<Result<_, String>>()?;
        Ok(TaskSet { id: set.id, members })
    };
    let hierarchy = |saved: &CgControllerEntry| {
        let heads = saved.dirs.iter().map(directory).collect::<Result<_, String>>()?;
        // Before CRIU 4.0 the image did not tell.
        Ok(HierarchyTree { controllers: saved.cnames.clone(), heads, threaded: saved.is_threaded.unwrap_or(true) })
    };
    Ok(CgroupTree {
        sets: image.sets.iter().map(set).collect::<Result<_, String>>()?,
        hierarchies: image.controllers.iter().map(hierarchy).collect::<Result<_, String>>()?,
    })
}

fn directory(entry: &CgroupDirEntry) -> Result<Directory, String> {
    let permissions = |entry: &CgroupPerms| Permissions { mode: entry.mode, uid: entry.uid, gid: entry.gid };
    let property = |entry: &CgroupPropEntry| Property {
        name: entry.name.clone(),
        value: entry.value.clone(),
        permissions: entry.perms.as_ref().map(permissions),
    };
    Ok(Directory {
        name: text(&entry.dir_name)?,
        permissions: entry.dir_perms.as_ref().map(permissions),
        properties: entry.properties.iter().map(property).collect(),
        children: entry.children.iter().map(directory).collect::<Result<_, String>>()?,
    })
}

fn text(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec())
        .map_err(|_| format!("{:?} is no path of a cgroup", String::from_utf8_lossy(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_comes_back() {
        let permissions = Some(Permissions { mode: 0o100644, uid: 1, gid: 2 });
        let property = Property { name: "pids.max".into(), value: "7".into(), permissions };
        let child = Directory { name: "b".into(), permissions: None, properties: Vec::new(), children: Vec::new() };
        let head = Directory { name: "a".into(), permissions, properties: vec![property], children: vec![child] };
        let member = |namespace_prefix| Member { hierarchy: "pids".into(), path: "/a/b".into(), namespace_prefix };
        let known = CgroupTree {
            sets: vec![TaskSet { id: 2, members: vec![member(0)] }, TaskSet { id: 3, members: vec![member(2)] }],
            hierarchies: vec![HierarchyTree { controllers: vec!["pids".into()], heads: vec![head], threaded: true }],
        };
        assert_eq!(tree(&entry(&known)).unwrap(), known);
        let mut broken = entry(&known);
        broken.controllers[0].dirs[0].dir_name = vec![0xff];
        assert!(tree(&broken).is_err());
    }
}
