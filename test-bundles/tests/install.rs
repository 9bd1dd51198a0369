//! `make install` into an empty folder: both names of the program, their man pages and completions.

use ferry_test_bundles::{Outcome, Place, programs};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Installs below `folder`, with the program that the tests are run with instead of a new release build.
fn install(folder: &Path) -> Outcome {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut make = Command::new("make");
    make.arg("--directory").arg(repository).args(["install", "CARGO=true", "PREFIX=/usr"]);
    make.arg(format!("DESTDIR={}", folder.display())).arg(format!("FERRY={}", programs::ferry()?.display()));
    programs::succeed(&mut make).map(|_| ())
}

/// Every line of `--help` below `Commands:` begins with a command.
fn commands(program: &Path) -> Outcome<Vec<String>> {
    let help = programs::succeed(Command::new(program).arg("--help"))?;
    let below = help.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    let names = below.take_while(|line| line.starts_with("  ")).filter_map(|line| line.split_whitespace().next());
    Ok(names.filter(|name| *name != "help").map(str::to_owned).collect())
}

#[test]
fn both_names_their_pages_and_completions_are_installed() -> Outcome {
    let place = Place::new()?;
    let root = place.folder("root")?;
    install(&root)?;
    install(&root).map_err(|error| format!("over an installation: {error}"))?;
    let (ferry, criu) = (root.join("usr/bin/ferry"), root.join("usr/bin/criu"));
    let version = programs::succeed(Command::new(&ferry).arg("--version"))?;
    if !version.starts_with("ferry version ") {
        return Err(format!("ferry --version prints {version:?}"));
    }
    let version = programs::succeed(Command::new(&criu).arg("--version"))?;
    if !version.starts_with("Version: 4.") {
        return Err(format!("criu --version prints {version:?}"));
    }
    // The link leads to the same program wherever the folder is moved to.
    let link = std::fs::read_link(&criu).map_err(|error| format!("criu: {error}"))?;
    let mode = std::fs::metadata(&ferry).map_err(|error| format!("ferry: {error}"))?.permissions().mode();
    if link != Path::new("ferry") || mode & 0o777 != 0o755 {
        return Err(format!("criu leads to {}, ferry has mode {mode:o}", link.display()));
    }
    let commands = commands(&ferry)?;
    for known in ["checkpoint", "restore", "run"] {
        if !commands.iter().any(|name| name == known) {
            return Err(format!("--help does not list {known}: {commands:?}"));
        }
    }
    let read = |name: &str| {
        std::fs::read_to_string(root.join("usr/share").join(name)).map_err(|error| format!("{name}: {error}"))
    };
    let mut pages = vec!["ferry".to_owned(), "criu".to_owned()];
    pages.extend(commands.iter().map(|name| format!("ferry-{name}")));
    for page in &pages {
        let text = read(&format!("man/man8/{page}.8"))?;
        if !text.contains(&format!(".TH {page} 8")) {
            return Err(format!("{page}.8 is no page of section 8: {text:.200}"));
        }
    }
    if !read("man/man8/ferry-checkpoint.8")?.contains("leave\\-running") {
        return Err("the page of checkpoint does not tell of --leave-running".to_owned());
    }
    for (name, word) in [("ferry", "--leave-running"), ("criu", "--shell-job")] {
        for script in [format!("bash-completion/completions/{name}"), format!("zsh/site-functions/_{name}")] {
            if !read(&script)?.contains(word) {
                return Err(format!("{script} does not know {word}"));
            }
        }
        if !read(&format!("fish/vendor_completions.d/{name}.fish"))?.contains(word.trim_start_matches('-')) {
            return Err(format!("{name}.fish does not know {word}"));
        }
        let bash = root.join("usr/share/bash-completion/completions").join(name);
        programs::succeed(Command::new("bash").arg("-n").arg(bash))?;
    }
    place.nothing_left()
}
