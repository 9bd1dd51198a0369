//! Lints of the source that compilers do not know: size of files, headers, logic that stands twice.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The longest that a source file may be.
const LONGEST: usize = 800;
/// So many equal lines in a row, in two places, are one piece of logic written twice.
const RUN: usize = 12;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every Rust file of the repository, with its lines.
fn sources() -> Vec<(PathBuf, Vec<String>)> {
    let mut open: Vec<PathBuf> =
        ["runtime-plugin", "engine", "cgroup", "hooks", "test-bundles"].map(|room| repository().join(room)).into();
    let mut all = Vec::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(std::fs::read_dir(&path).expect("a readable folder").flatten().map(|entry| entry.path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).expect("a readable file");
            all.push((path, text.lines().map(str::to_owned).collect()));
        }
    }
    assert!(all.len() > 20, "the sources were not found");
    all.sort();
    all
}

#[test]
fn no_file_is_longer_than_800_lines() {
    let long: Vec<_> = sources()
        .into_iter()
        .filter(|(_, lines)| lines.len() > LONGEST)
        .map(|(path, lines)| (path, lines.len()))
        .collect();
    assert!(long.is_empty(), "too long: {long:?}");
}

#[test]
fn every_file_says_what_it_owns() {
    let bare: Vec<_> = sources()
        .into_iter()
        .filter(|(_, lines)| !lines.iter().any(|line| line.starts_with("//!")))
        .map(|(path, _)| path)
        .collect();
    assert!(bare.is_empty(), "no //! header: {bare:?}");
}

#[test]
fn no_logic_stands_twice() {
    // Blank lines, comments, imports and lone brackets say nothing about logic.
    let telling = |line: &str| {
        line.len() > 5 && !line.starts_with("//") && !line.starts_with("use ") && !line.starts_with("pub use ")
    };
    let mut seen: HashMap<Vec<String>, (PathBuf, usize)> = HashMap::new();
    let mut twice = Vec::new();
    for (path, lines) in sources() {
        let lines: Vec<(usize, String)> = lines
            .iter()
            .enumerate()
            .map(|(at, line)| (at + 1, line.trim().to_owned()))
            .filter(|(_, line)| telling(line))
            .collect();
        let mut skip = 0;
        for (start, window) in lines.windows(RUN).enumerate() {
            if start < skip {
                continue;
            }
            let words: Vec<String> = window.iter().map(|(_, line)| line.clone()).collect();
            match seen.get(&words) {
                Some((other, line)) if *other != path || window[0].0 > line + RUN => {
                    twice.push(format!("{}:{} as {}:{line}", path.display(), window[0].0, other.display()));
                    skip = start + RUN;
                }
                Some(_) => {}
                None => {
                    seen.insert(words, (path.clone(), window[0].0));
                }
            }
        }
    }
    assert!(twice.is_empty(), "the same {RUN} lines twice:\n{}", twice.join("\n"));
}
