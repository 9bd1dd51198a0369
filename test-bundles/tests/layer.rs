//! Containers whose root is an overlay: what they have changed of it goes with the checkpoint.

use ferry_test_bundles::container::refusal;
use ferry_test_bundles::{Bundle, Container, Outcome, Place, processes, programs};
use rustix::fs::{XattrFlags, lgetxattr, lsetxattr};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// What goes wrong with a file, in words.
fn told(path: &Path) -> impl Fn(std::io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

/// Overlays of one lower layer, each with an upper layer of its own; gone with this.
struct Overlays<'place> {
    place: &'place Place,
    lower: PathBuf,
    mounts: Vec<PathBuf>,
}

impl<'place> Overlays<'place> {
    /// Makes the root file system of a bundle the lower layer, and an overlay of it the root file system.
    fn of(place: &'place Place, bundle: &Bundle) -> Outcome<Self> {
        let (root, lower) = (bundle.path.join("rootfs"), place.path("lower"));
        fs::rename(&root, &lower).map_err(told(&root))?;
        for folder in ["old/deep", "kept", "gone/deeper"] {
            fs::create_dir_all(lower.join(folder)).map_err(told(&lower))?;
        }
        for file in ["old/deep/file", "old/other", "kept/changed", "kept/deleted", "kept/untouched", "gone/deeper/file"]
        {
            fs::write(lower.join(file), format!("lower {file}\n")).map_err(told(&lower))?;
        }
        // An upper layer wants a file system with attributes and whiteouts, which that of the tests need not be.
        let uppers = place.folder("uppers")?;
        mount("tmpfs", &uppers, "tmpfs", MountFlags::empty(), None).map_err(|error| format!("a tmpfs: {error}"))?;
        let mut overlays = Self { place, lower, mounts: vec![uppers] };
        overlays.mount(&root)?;
        Ok(overlays)
    }

    /// Mounts a new overlay.
    fn mount(&mut self, point: &Path) -> Outcome {
        let number = self.mounts.len();
        let upper = self.upper(number);
        let work = self.place.path(&format!("uppers/work{number}"));
        for folder in [&upper, &work, point] {
            fs::create_dir_all(folder).map_err(told(folder))?;
        }
        let options =
            format!("lowerdir={},upperdir={},workdir={}", self.lower.display(), upper.display(), work.display());
        let options = CString::new(options).map_err(|error| error.to_string())?;
        mount("overlay", point, "overlay", MountFlags::empty(), Some(options.as_c_str()))
            .map_err(|error| format!("an overlay on {}: {error}", point.display()))?;
        self.mounts.push(point.to_owned());
        Ok(())
    }

    fn upper(&self, number: usize) -> PathBuf {
        self.place.path(&format!("uppers/upper{number}"))
    }

    /// A further bundle with the config of `bundle`, and an overlay as its root that nothing has changed.
    fn further(&mut self, bundle: &Bundle, name: &str) -> Outcome<PathBuf> {
        let path = self.place.folder(name)?;
        self.mount(&path.join("rootfs"))?;
        fs::copy(bundle.path.join("config.json"), path.join("config.json")).map_err(told(&path))?;
        Ok(path)
    }

    /// Unmounts all, which what is left of a container would prevent.
    fn end(mut self) -> Outcome {
        for point in std::mem::take(&mut self.mounts).iter().rev() {
            unmount(point, UnmountFlags::empty()).map_err(|error| format!("{}: {error}", point.display()))?;
        }
        Ok(())
    }
}

impl Drop for Overlays<'_> {
    fn drop(&mut self) {
        for point in self.mounts.iter().rev() {
            let _ = unmount(point, UnmountFlags::DETACH);
        }
    }
}

/// Everything in a folder that a program could see: kind, mode, owner, time, length and content or target, by path.
fn listing(root: &Path) -> Outcome<BTreeMap<PathBuf, String>> {
    let mut all = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(path) = open.pop() {
        let meta = fs::symlink_metadata(&path).map_err(told(&path))?;
        let what = if meta.is_dir() {
            for entry in fs::read_dir(&path).map_err(told(&path))? {
                open.push(entry.map_err(told(&path))?.path());
            }
            "folder".to_owned()
        } else if meta.is_symlink() {
            fs::read_link(&path).map_err(told(&path))?.display().to_string()
        } else if meta.is_file() && meta.len() < 1 << 20 {
            String::from_utf8_lossy(&fs::read(&path).map_err(told(&path))?).into_owned()
        } else {
            format!("{} bytes, device {}", meta.len(), meta.rdev())
        };
        let inside = path.strip_prefix(root).unwrap_or(&path).to_owned();
        let time = (meta.mtime(), meta.mtime_nsec());
        all.insert(inside, format!("{:o} {}:{} {time:?} {what}", meta.mode(), meta.uid(), meta.gid()));
    }
    Ok(all)
}

/// Fails unless both are the same.
fn same(what: &str, one: &BTreeMap<PathBuf, String>, other: &BTreeMap<PathBuf, String>) -> Outcome {
    let differ = |from: &BTreeMap<PathBuf, String>, to: &BTreeMap<PathBuf, String>| -> Vec<String> {
        let lines = from.iter().filter(|(path, line)| to.get(*path) != Some(line));
        lines.map(|(path, line)| format!("{}: {line:.100}", path.display())).collect()
    };
    let (only_one, only_other) = (differ(one, other), differ(other, one));
    if only_one.is_empty() && only_other.is_empty() {
        return Ok(());
    }
    Err(format!("{what}: {only_one:#?} became {only_other:#?}"))
}

/// What the program inside does to its root: changes, deletes, replaces a folder, makes a new one and renames it; then it keeps
/// a changed file open and appends to it for ever.
const CHANGES: &str = "b=/bin/busybox; echo changed >> /kept/changed; rm /kept/deleted; rm -r /gone; \
    rm -r /old; $b mkdir -p /old/new; echo new > /old/new/file; $b mkdir /made; echo made > /made/file; $b mv /made /moved; \
    $b ln -s ../moved/file /kept/link; $b ln /moved/file /kept/second; $b mkfifo /kept/fifo; $b chmod 2750 /kept; \
    i=0; exec 3>>/kept/log; touch /work/ready; while :; do i=$((i+1)); echo $i >&3; echo $i > /work/now; sleep 0.05; done";

/// A container that has done so, and what a program cannot do with a shell.
fn changed<'place>(place: &'place Place) -> Outcome<(Bundle, Overlays<'place>, Container<'place>)> {
    let work = place.folder("work")?;
    let mut bundle = Bundle::new(place, &["sh", "-c", CHANGES])?;
    bundle.writable().bind(&work, "/work", &["rw"]);
    let overlays = Overlays::of(place, &bundle)?;
    let container = Container::run(place, &bundle)?;
    processes::wait_for("the changes", || work.join("ready").exists())?;
    let root = |name: &str| bundle.root(name);
    lsetxattr(root("moved/file"), "user.ferry", b"kept", XattrFlags::empty())
        .map_err(|error| format!("xattr: {error}"))?;
    std::os::unix::fs::chown(root("kept/second"), Some(12), Some(3_000_000)).map_err(told(&root("kept/second")))?;
    fs::set_permissions(root("moved/file"), fs::Permissions::from_mode(0o4755)).map_err(told(&root("moved/file")))?;
    let sparse = fs::File::create(root("kept/sparse")).map_err(told(&root("kept/sparse")))?;
    for offset in [0, 40 << 20, 80 << 20] {
        sparse.write_all_at(b"data", offset).map_err(told(&root("kept/sparse")))?;
    }
    let long = format!("kept/{}", "long".repeat(60));
    fs::write(root(&long), "long").map_err(told(&root(&long)))?;
    Ok((bundle, overlays, container))
}

/// Fails unless the program inside goes on counting, in the file that it has open too.
fn counts(container: &Container, work: &Path) -> Outcome {
    let now =
        || -> u64 { fs::read_to_string(work.join("now")).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0) };
    let before = now();
    processes::wait_for("the program inside to go on", || now() > before + 2)?;
    let odd = container.exec(&[
        "sh",
        "-c",
        "i=0; while read n; do i=$((i+1)); [ $i = $n ] || echo $i $n; done < /kept/log",
    ])?;
    if odd.is_empty() { Ok(()) } else { Err(format!("the file that the program has open has other lines: {odd}")) }
}

/// A container of an overlay goes on in another bundle, whose overlay has the same lower layer and nothing else.
#[test]
fn changes_go_with_the_checkpoint() -> Outcome {
    let place = Place::new()?;
    let work = place.path("work");
    let (bundle, mut overlays, mut container) = changed(&place)?;
    counts(&container, &work)?;
    let archive = place.path("archive.tar").to_string_lossy().into_owned();
    container.checkpoint(&["--archive", &archive])?;
    let before = listing(&bundle.path.join("rootfs"))?;

    let other = overlays.further(&bundle, "other")?;
    let root = other.join("rootfs");
    container.bundle = other.clone();
    container.restore(&["--archive", &archive])?;
    counts(&container, &work)?;
    let inside = "cat /kept/changed /old/new/file /kept/link; ls /old /kept /moved; ls /gone /kept/deleted 2>&1; true";
    let seen = container.exec(&["sh", "-c", inside])?;
    let expected = ["lower kept/changed\nchanged\nnew\nmade\n", "/old:\nnew\n", "/gone: No such", "deleted: No such"];
    if let Some(missing) = expected.iter().find(|text| !seen.contains(*text)) {
        return Err(format!("{missing:?} is missing in what the container shows: {seen}"));
    }
    container.checkpoint(&["--archive", &archive])?;
    let mut after = listing(&root)?;
    let mut before = before;
    // The program has gone on with this one.
    for all in [&mut before, &mut after] {
        all.remove(Path::new("kept/log"));
    }
    same("the root file system", &before, &after)?;
    let meta = |name: &str| fs::symlink_metadata(root.join(name)).map_err(told(&root));
    if meta("moved/file")?.ino() != meta("kept/second")?.ino() || meta("moved/file")?.nlink() != 2 {
        return Err("a file with two names has become two".to_owned());
    }
    let mut value = [0; 8];
    match lgetxattr(root.join("moved/file"), "user.ferry", &mut value) {
        Ok(4) if value.starts_with(b"kept") => {}
        other => return Err(format!("the extended attribute is {other:?}")),
    }
    let sparse = meta("kept/sparse")?;
    if sparse.len() != (80 << 20) + 4 || sparse.blocks() > 2048 || !meta("kept/fifo")?.file_type().is_fifo() {
        return Err(format!("the sparse file has {} bytes in {} blocks", sparse.len(), sparse.blocks()));
    }
    drop(container);
    overlays.end()?;
    place.nothing_left()
}

/// Restored where it was, nothing of the root is written again; and changes made since are taken back.
#[test]
fn what_is_there_is_left_alone() -> Outcome {
    let place = Place::new()?;
    let (bundle, overlays, container) = changed(&place)?;
    let inode =
        |name: &str| fs::symlink_metadata(bundle.root(name)).map(|meta| meta.ino()).map_err(told(&bundle.root(name)));
    for _ in 0..2 {
        container.checkpoint(&[])?;
        let before = inode("kept/changed")?;
        let all = listing(&bundle.path.join("rootfs"))?;
        fs::write(bundle.root("old/new/file"), "since").map_err(told(&bundle.path))?;
        fs::remove_file(bundle.root("moved/file")).map_err(told(&bundle.path))?;
        container.restore(&[])?;
        counts(&container, &place.path("work"))?;
        if inode("kept/changed")? != before {
            return Err("a file that was as it should was replaced".to_owned());
        }
        let mut now = listing(&bundle.path.join("rootfs"))?;
        now.insert("kept/log".into(), all[Path::new("kept/log")].clone());
        same("the root file system", &all, &now)?;
    }
    container.end_with(overlays)
}

trait End<'place> {
    fn end_with(self, overlays: Overlays<'place>) -> Outcome;
}

impl<'place> End<'place> for Container<'place> {
    /// Ends the container, then its mounts, after which nothing is left.
    fn end_with(self, overlays: Overlays<'place>) -> Outcome {
        let place = overlays.place;
        drop(self);
        overlays.end()?;
        place.nothing_left()
    }
}

/// A restore that fails after the changes were made takes them back; a damaged archive changes nothing; both options leave the
/// root alone.
#[test]
fn a_failed_restore_leaves_the_root_as_it_was() -> Outcome {
    let place = Place::new()?;
    let (bundle, mut overlays, mut container) = changed(&place)?;
    let archive = place.path("archive.tar");
    let shown = archive.to_string_lossy().into_owned();
    container.checkpoint(&["--archive", &shown])?;
    let other = overlays.further(&bundle, "other")?;
    let root = other.join("rootfs");
    container.bundle = other;
    // Mount points that a runtime makes are made once, so that they do not show.
    let before = listing(&root)?;
    let restore = |container: &Container, words: &[&str], expected: &[&str]| {
        let mut command = container.command("restore");
        command
            .args(["--detach", "--archive", &shown, "--bundle"])
            .arg(&container.bundle)
            .args(words)
            .arg(&container.id);
        refusal(&mut command, expected)
    };
    for point in ["restore-after-first-task", "restore-after-registers"] {
        restore(&container, &["--fault", &format!("{point}=error")], &["fault"])?;
        same(point, &before, &listing(&root)?)?;
    }
    let mut killed = container.command("restore");
    killed.args(["--detach", "--fault", "restore-before-go=kill", "--archive", &shown, "--bundle"]);
    // No pipes: whoever takes away what is left would hold them until the tasks are reaped, which is ours to do.
    killed.arg(&container.bundle).arg(&container.id).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    killed.status().map_err(|error| format!("restore: {error}"))?;
    processes::wait_for("the janitor to end", || {
        processes::reap();
        processes::below().is_empty()
    })?;
    same("a killed restore", &before, &listing(&root)?)?;
    // One letter of a changed file, which only the archive of changes has.
    let mut bytes = fs::read(&archive).map_err(told(&archive))?;
    let at =
        bytes.windows(13).position(|part| part == b"kept/changed\n").ok_or("the archive has not the changed file")?;
    bytes[at] ^= 1;
    fs::write(&archive, &bytes).map_err(told(&archive))?;
    restore(&container, &[], &["rootfs-diff.tar", "damaged"])?;
    same("a damaged archive", &before, &listing(&root)?)?;
    bytes[at] ^= 1;
    fs::write(&archive, &bytes).map_err(told(&archive))?;
    // Without the changes, the file that the program has open is not there.
    restore(&container, &["--ignore-rootfs"], &["/kept/log"])?;
    same("--ignore-rootfs", &before, &listing(&root)?)?;
    container.restore(&["--archive", &shown])?;
    counts(&container, &place.path("work"))?;
    container.checkpoint(&["--archive", &shown, "--ignore-rootfs"])?;
    let members = programs::succeed(std::process::Command::new("tar").args(["-tf", &shown]))?;
    if members.contains("rootfs-diff.tar") || members.contains("deleted.files") {
        return Err(format!("--ignore-rootfs leaves the changes in: {members}"));
    }
    container.end_with(overlays)
}

/// A container that runs on has the changes of the instant of its checkpoint in the archive, and keeps them.
#[test]
fn running_on_changes_nothing() -> Outcome {
    let place = Place::new()?;
    let (bundle, overlays, container) = changed(&place)?;
    let before = listing(&bundle.path.join("rootfs"))?;
    container.verb("checkpoint", &["--leave-running", "--compress", "zstd"])?;
    counts(&container, &place.path("work"))?;
    let mut now = listing(&bundle.path.join("rootfs"))?;
    now.insert("kept/log".into(), before[Path::new("kept/log")].clone());
    same("the root file system", &before, &now)?;
    container.end_with(overlays)
}
