//! What lies outside the tree, as the command line names it: `--external`, `--ext-mount-map`, `--inherit-fd`, `--join-ns` and
//! their companions.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use ferry_engine::dump::DumpOptions;
use ferry_engine::namespaces::{FindMounts, NamespaceKind, NamespaceOptions};
use ferry_engine::restore::RestoreOptions;
use ferry_engine::sys::{HostPid, nsfs, pidfd};

use super::options::Options;
use crate::failure::Failure;

/// What cannot be done with objects outside, by the words they are named with, and what can be done instead.
const UNSUPPORTED: [(&str, &str, &str); 4] = [
    ("dev[", "mount block devices", "mount it on the host and name the mount: mnt[/POINT]:KEY"),
    ("veth[", NO_DEVICES, OTHER_NETWORK),
    ("macvlan[", NO_DEVICES, OTHER_NETWORK),
    (
        "unix[",
        "save sockets whose peer is outside",
        "have the program or its peer close the connection before the dump",
    ),
];
const NO_DEVICES: &str = "make network devices";
const OTHER_NETWORK: &str = "give the tree a network namespace of the host (net[INODE]:KEY), or an empty one (--empty-ns net) and make them in it";

/// Names to a dump what is outside.
///
/// # Errors
/// A word that is none of the forms.
pub fn for_dump(options: &Options, dump: &mut DumpOptions) -> Result<(), Failure> {
    for external in externals(options)? {
        refuse_unsupported(&external)?;
        if !dump.namespaces.add_external(&external).map_err(Failure::new)? {
            dump.files.external.insert(external);
        }
    }
    for inode in options.ext_unix_sk.iter().flat_map(|list| list.split(',')).filter(|inode| !inode.is_empty()) {
        let inode: u32 = inode
            .parse()
            .map_err(|_| Failure::new(format!("--ext-unix-sk {inode}: the number of a socket's inode is wanted")))?;
        dump.files.external.insert(format!("socket[{inode}]"));
    }
    dump.namespaces.skipped_mounts = options.skip_mnt.clone();
    dump.files.skipped_mounts = options.skip_mnt.clone();
    let NamespaceOptions { found_mounts, .. } = &mut dump.namespaces;
    if let Some(FindMounts { masters, sharing }) = found_mounts {
        *masters |= options.enable_external_masters;
        *sharing |= options.enable_external_sharing;
    }
    Ok(())
}

/// Gives to a restore what is outside.
///
/// # Errors
/// A word that is none of the forms, or something that cannot be opened.
pub fn for_restore(options: &Options, restore: &mut RestoreOptions<'_>) -> Result<(), Failure> {
    for external in externals(options)? {
        refuse_unsupported(&external)?;
        let taken = restore.namespaces.add_external(&external).map_err(Failure::new)?;
        if !taken {
            tracing::debug!(
                "--external {external} says nothing to a restore: what is restored from it is given by --inherit-fd"
            );
        }
    }
    for spec in &options.inherit_fd {
        let (key, descriptor) = inherited(spec)?;
        // A namespace is not an open file of the tree, but what a namespace of it becomes.
        if nsfs::clone_flag(&descriptor).is_some() {
            restore.namespaces.external_namespaces.insert(key, descriptor);
        } else {
            restore.inherited.insert(key, descriptor);
        }
    }
    for spec in &options.join_ns {
        let (kind, namespace) = joined(spec)?;
        if kind == NamespaceKind::Net && restore.namespaces.empty_net {
            return Err(Failure::new("--join-ns net and --empty-ns net exclude each other"));
        }
        restore.namespaces.join.push((kind, namespace));
    }
    Ok(())
}

/// Everything outside, in the words of `--external`, whatever option names it.
fn externals(options: &Options) -> Result<Vec<String>, Failure> {
    let pair = |pair: &String| match pair.split_once('=') {
        Some((inside, outside)) => Ok(format!("veth[{inside}]:{outside}")),
        None => Err(Failure::new(format!("--veth-pair {pair}: IN=OUT is wanted"))),
    };
    let pairs = options.veth_pair.iter().map(pair).collect::<Result<Vec<_>, _>>()?;
    Ok(options.external.iter().cloned().chain(mount_map(options)?).chain(pairs).collect())
}

/// `--ext-mount-map KEY:VALUE` and `auto`, as `--external` says it.
fn mount_map(options: &Options) -> Result<Vec<String>, Failure> {
    let external = |map: &String| match map.split_once(':') {
        Some((left, right)) => Ok(format!("mnt[{left}]:{right}")),
        None if map == "auto" => Ok("mnt[]".to_owned()),
        None => Err(Failure::new(format!("--ext-mount-map {map}: KEY:VALUE or auto is wanted"))),
    };
    options.ext_mount_map.iter().map(external).collect()
}

fn refuse_unsupported(external: &str) -> Result<(), Failure> {
    match UNSUPPORTED.iter().find(|(kind, ..)| external.starts_with(kind)) {
        None => Ok(()),
        Some((_, what, remedy)) => {
            Err(Failure::new(format!("--external {external}: ferry does not {what} yet; {remedy}")))
        }
    }
}

/// `fd[N]:KEY`, as a descriptor of its own.
fn inherited(spec: &str) -> Result<(String, OwnedFd), Failure> {
    let bad = || Failure::new(format!("--inherit-fd {spec}: fd[NUMBER]:KEY is wanted"));
    let (number, key) = spec.strip_prefix("fd[").and_then(|rest| rest.split_once("]:")).ok_or_else(bad)?;
    let number = number.parse().map_err(|_| bad())?;
    let this = pidfd::open(HostPid(std::process::id() as i32))?;
    let descriptor = pidfd::get_fd(this.as_fd(), number)
        .map_err(|error| Failure::new(format!("--inherit-fd {spec}: descriptor {number}: {error}")))?;
    Ok((key.to_owned(), descriptor))
}

/// `KIND:PID` or `KIND:FILE`.
fn joined(spec: &str) -> Result<(NamespaceKind, OwnedFd), Failure> {
    let bad = |problem: &str| Failure::new(format!("--join-ns {spec}: {problem}"));
    let (name, place) = spec.split_once(':').ok_or_else(|| bad("KIND:PID or KIND:FILE is wanted"))?;
    let kind = match name {
        "net" => NamespaceKind::Net,
        "uts" => NamespaceKind::Uts,
        "ipc" => NamespaceKind::Ipc,
        "time" => NamespaceKind::Time,
        "user" => return Err(bad("ferry does not join user namespaces yet")),
        "pid" => {
            return Err(bad("name it as external at the dump, --external pid[INODE]:KEY, and give it by --inherit-fd"));
        }
        _ => return Err(bad("only ipc, net, time and uts namespaces can be joined")),
    };
    let path = if place.bytes().all(|byte| byte.is_ascii_digit()) && !place.is_empty() {
        format!("/proc/{place}/ns/{name}")
    } else {
        place.to_owned()
    };
    let file = File::open(&path).map_err(|error| bad(&format!("cannot open {path}: {error}")))?;
    let namespace = OwnedFd::from(file);
    // A wrong file is told apart here, rather than by a task that is half made.
    if nsfs::clone_flag(&namespace) != Some(kind.clone_flag()) {
        return Err(bad(&format!("{path} is no {name} namespace")));
    }
    Ok((kind, namespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Options {
        Options::parse(words.iter().map(Into::into)).unwrap()
    }

    #[test]
    fn descriptors_and_mounts_are_taken_by_key() {
        let (key, descriptor) = inherited("fd[0]:pipe:[7]").unwrap();
        assert_eq!(key, "pipe:[7]");
        assert_eq!(nsfs::clone_flag(&descriptor), None);
        assert!(inherited("fd[x]:k").is_err() && inherited("7:k").is_err());
        let options = parse(&["restore", "--external", "mnt[a]:/b", "--external", "mnt[]", "-M", "c:/d:e"]);
        let mut restore = RestoreOptions::default();
        for_restore(&options, &mut restore).unwrap();
        assert_eq!(restore.namespaces.external_mounts, [("a".into(), "/b".into()), ("c".into(), "/d:e".into())].into());
        assert!(restore.namespaces.found_mounts);
    }

    #[test]
    fn a_dump_finds_mounts_when_it_is_told() {
        let found = |words: &[&str]| {
            let mut dump = DumpOptions::default();
            for_dump(&parse(words), &mut dump).unwrap();
            dump.namespaces.found_mounts
        };
        assert_eq!(found(&["dump", "--enable-external-masters"]), None);
        assert_eq!(found(&["dump", "-M", "auto"]), Some(FindMounts::default()));
        let both = Some(FindMounts { masters: true, sharing: true });
        assert_eq!(found(&["dump", "--external", "mnt[]:s", "--enable-external-masters"]), both);
        let mut dump = DumpOptions::default();
        for_dump(&parse(&["dump", "-x", "--ext-unix-sk=12,13"]), &mut dump).expect("numbers");
        assert_eq!(dump.files.external, ["socket[12]".to_owned(), "socket[13]".to_owned()].into());
        assert!(for_dump(&parse(&["dump", "--ext-unix-sk=a"]), &mut DumpOptions::default()).is_err());
        for external in ["dev[8/1]:x", "unix[12]", "veth[a]:b", "macvlan[a]:b"] {
            assert!(for_dump(&parse(&["dump", "--external", external]), &mut DumpOptions::default()).is_err());
        }
    }

    #[test]
    fn namespaces_are_joined_by_pid_or_path() {
        let own = std::process::id();
        assert_eq!(joined(&format!("net:{own}")).unwrap().0, NamespaceKind::Net);
        assert_eq!(joined("uts:/proc/self/ns/uts").unwrap().0, NamespaceKind::Uts);
        for wrong in ["net", "net:", "uts:/proc/self/ns/net", "net:/dev/null", "mnt:1", "user:1", "ipc:/nonesuch"] {
            assert!(joined(wrong).is_err(), "{wrong}");
        }
    }
}
