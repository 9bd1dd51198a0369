//! Hostile archives: whatever is done to a checkpoint, a restore is refused or right, never a crash and never a write
//! outside the container.

use ferry_test_bundles::container::refusal;
use ferry_test_bundles::{Bundle, Container, Outcome, Place};
use std::path::{Path, PathBuf};

const BLOCK: usize = 512;

/// A container that was checkpointed into an archive, and the archive's bytes.
struct Saved<'place> {
    place: &'place Place,
    container: Container<'place>,
    archive: Vec<u8>,
}

/// A member of an archive: where its header starts, its name and size.
#[derive(Clone, Debug)]
struct Member {
    header: usize,
    name: String,
    size: usize,
}

impl<'place> Saved<'place> {
    fn new(place: &'place Place) -> Outcome<Self> {
        let mut bundle = Bundle::new(place, &["sh", "-c", "echo content > /tmp/kept; while :; do sleep 1000; done"])?;
        bundle.writable();
        let container = Container::run(place, &bundle)?;
        ferry_test_bundles::processes::wait_for("the script", || bundle.root("tmp/kept").exists())?;
        container.checkpoint(&["--archive", &place.path("good.tar").to_string_lossy()])?;
        let archive = std::fs::read(place.path("good.tar")).map_err(|error| format!("good.tar: {error}"))?;
        Ok(Self { place, container, archive })
    }

    /// The archive's members, as its headers tell (tar(5), ustar).
    fn members(&self) -> Vec<Member> {
        let mut all = Vec::new();
        let mut header = 0;
        while let Some(block) = self.archive.get(header..header + BLOCK) {
            let text = |range: std::ops::Range<usize>| {
                let bytes: Vec<u8> = block[range].iter().copied().take_while(|byte| *byte != 0).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            };
            if block[0] == 0 {
                break;
            }
            let size = usize::from_str_radix(text(124..136).trim(), 8).unwrap_or(0);
            all.push(Member { header, name: text(0..100), size });
            header += BLOCK + size.div_ceil(BLOCK) * BLOCK;
        }
        all
    }

    fn write(&self, bytes: &[u8]) -> Outcome<PathBuf> {
        let path = self.place.path("bad.tar");
        std::fs::write(&path, bytes).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(path)
    }

    /// Fails unless the archive is refused with one sentence, and nothing has come of it.
    fn refused(&self, what: &str, bytes: &[u8], words: &[&str]) -> Outcome {
        let path = self.write(bytes)?;
        let mut command = self.container.command("restore");
        command
            .args(["--detach", "--archive"])
            .arg(path)
            .arg("--bundle")
            .arg(&self.container.bundle)
            .arg(&self.container.id);
        refusal(&mut command, words).map_err(|error| format!("{what}: {error}"))?;
        if self.container.state().is_ok() {
            return Err(format!("{what}: the container is registered"));
        }
        self.place.nothing_left().map_err(|error| format!("{what}: {error}"))
    }

    /// Restores the untouched archive: what was refused before has done no harm.
    fn restores(self) -> Outcome {
        self.container.restore(&["--archive", &self.place.path("good.tar").to_string_lossy()])?;
        let kept = self.container.exec(&["cat", "/tmp/kept"])?;
        if kept.trim() != "content" {
            return Err(format!("the restored container's file holds {kept:?}"));
        }
        self.container.end()
    }
}

/// A member's header and content, with a name and type that the `tar` crate would not write.
fn member(name: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0u8; BLOCK];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..124].copy_from_slice(b"0000000\x000000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].copy_from_slice(b"        ");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut bytes = header.to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(BLOCK + content.len().div_ceil(BLOCK) * BLOCK, 0);
    bytes
}

#[test]
fn truncated_archives() -> Outcome {
    let place = Place::new()?;
    let saved = Saved::new(&place)?;
    let (length, members) = (saved.archive.len(), saved.members());
    let mut ends = vec![0, 1, BLOCK - 1, BLOCK, length / 3, length / 2, length - length / 10];
    // In the middle of each member and right before it.
    ends.extend(members.iter().flat_map(|member| [member.header, member.header + BLOCK + member.size / 2]));
    for end in ends {
        saved.refused(&format!("cut at {end} of {length}"), &saved.archive[..end], &[])?;
    }
    saved.restores()
}

#[test]
fn a_flipped_bit_in_each_image() -> Outcome {
    let place = Place::new()?;
    let saved = Saved::new(&place)?;
    let images: Vec<Member> = saved
        .members()
        .into_iter()
        .filter(|member| member.name.starts_with("checkpoint/") && member.size > 0)
        .collect();
    if images.len() < 5 {
        return Err(format!("the archive holds {} images", images.len()));
    }
    for image in &images {
        for at in [0, image.size / 2, image.size - 1] {
            let mut bytes = saved.archive.clone();
            bytes[image.header + BLOCK + at] ^= 1 << (at % 8);
            saved.refused(&format!("{} with byte {at} changed", image.name), &bytes, &[])?;
        }
    }
    saved.restores()
}

#[test]
fn flipped_bits_in_headers() -> Outcome {
    let place = Place::new()?;
    let saved = Saved::new(&place)?;
    for member in saved.members().iter().filter(|member| member.name.starts_with("checkpoint/")).take(6) {
        // In the name, in the size, in the sum.
        for at in [2, 130, 150] {
            let mut bytes = saved.archive.clone();
            bytes[member.header + at] ^= 2;
            saved.refused(&format!("header of {} with byte {at} changed", member.name), &bytes, &[])?;
        }
    }
    saved.restores()
}

/// Members that lead out of the archive: they are refused, and what they lead to is not touched.
#[test]
fn members_that_lead_elsewhere() -> Outcome {
    let place = Place::new()?;
    let saved = Saved::new(&place)?;
    let victim = place.path("victim");
    std::fs::write(&victim, "untouched").map_err(|error| error.to_string())?;
    let target = victim.to_string_lossy().into_owned();
    let up = format!("../{}/victim", place.name());
    let evil: Vec<(&str, Vec<u8>)> = vec![
        ("a name with ..", member(&format!("checkpoint/../../{up}"), b'0', "", b"evil")),
        ("a name that starts with ..", member(&up, b'0', "", b"evil")),
        ("an absolute name", member(&target, b'0', "", b"evil")),
        ("an absolute symlink", member("checkpoint/link", b'2', &target, b"")),
        ("a symlink with ..", member("checkpoint/link", b'2', "../../victim", b"")),
        ("a hard link", member("checkpoint/link", b'1', &target, b"")),
        ("a device", member("checkpoint/device", b'4', "", b"")),
        ("a fifo", member("checkpoint/fifo", b'6', "", b"")),
        (
            "a file through a symlink",
            [
                member("checkpoint/out", b'2', &place.path("").to_string_lossy(), b""),
                member("checkpoint/out/victim", b'0', "", b"evil"),
            ]
            .concat(),
        ),
    ];
    for (what, bytes) in evil {
        let archive = [&bytes[..], &saved.archive].concat();
        saved.refused(what, &archive, &[])?;
        let now = std::fs::read_to_string(&victim).map_err(|error| error.to_string())?;
        if now != "untouched" {
            return Err(format!("{what}: a file outside was written"));
        }
    }
    saved.restores()
}

#[test]
fn an_archive_that_is_none() -> Outcome {
    let place = Place::new()?;
    let saved = Saved::new(&place)?;
    saved.refused("text", b"this is no archive, but it is longer than a header\n".repeat(40).as_slice(), &[])?;
    saved.refused("zeros", &[0; 20 * BLOCK], &[])?;
    let folder = Path::new("/").to_path_buf();
    let mut command = saved.container.command("restore");
    command
        .args(["--detach", "--archive"])
        .arg(folder)
        .arg("--bundle")
        .arg(&saved.container.bundle)
        .arg(&saved.container.id);
    refusal(&mut command, &[])?;
    saved.restores()
}
