//! Configuration files: options, one a line, without their dashes.
//!
//! `#` begins a comment. A value follows after white space; in double quotes it may hold white space, and `\"` is a quote
//! in it. Default files are read unless `--config` or `--no-default-config` is on the command line; the file that `CRIU_CONFIG_FILE`
//! names is read always. A file that is not there says nothing, except the one of `--config`.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// The file of the whole system.
const SYSTEM: &str = "/etc/criu/default.conf";
/// The file of a user, below the home folder.
const USER: &str = ".criu/default.conf";

/// The words of all configuration files that stand before a command line (or a remote request, which has none).
///
/// # Errors
/// A file that cannot be read or understood.
pub fn defaults(line: &[OsString]) -> Result<Vec<OsString>, Failure> {
    let asked = Asked::on(line);
    let mut files: Vec<PathBuf> = Vec::new();
    if !asked.no_defaults {
        files.push(SYSTEM.into());
        files.extend(std::env::var_os("HOME").map(|home| Path::new(&home).join(USER)));
    }
    files.extend(std::env::var_os("CRIU_CONFIG_FILE").map(PathBuf::from));
    let mut words = Vec::new();
    for file in files {
        words.extend(read(&file)?.unwrap_or_default());
    }
    if let Some(file) = asked.file {
        let missing = || Failure::new(format!("--config {}: there is no such file", file.display()));
        words.extend(read(&file)?.ok_or_else(missing)?);
    }
    Ok(words)
}

/// What a command line says of configuration files, which must be known before it can be parsed.
#[derive(Default)]
struct Asked {
    no_defaults: bool,
    file: Option<PathBuf>,
}

impl Asked {
    fn on(line: &[OsString]) -> Self {
        let mut asked = Self::default();
        let mut words = line.iter().take_while(|word| *word != "--");
        while let Some(word) = words.next() {
            let file = match word.as_bytes().strip_prefix(b"--config=") {
                Some(file) => Some(OsStr::from_bytes(file)),
                None if word == "--config" => words.next().map(OsString::as_os_str),
                None => None,
            };
            asked.no_defaults |= file.is_some() || word == "--no-default-config";
            asked.file = file.map(PathBuf::from).or(asked.file);
        }
        asked
    }
}

/// The words of one configuration file; none when there is no such file.
///
/// # Errors
/// It cannot be read, or a line is none of an option.
pub fn read(path: &Path) -> Result<Option<Vec<OsString>>, Failure> {
    let content = match std::fs::read(path) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            let what = format!("cannot read the configuration file {}", path.display());
            return Err(Failure::from(error).context(what));
        }
    };
    let mut words = Vec::new();
    for (line, number) in content.split(|byte| *byte == b'\n').zip(1..) {
        let told = |problem| Failure::new(format!("configuration file {}, line {number}: {problem}", path.display()));
        words.extend(statement(line).map_err(told)?);
    }
    Ok(Some(words))
}

/// The option of a line as one word; none for an empty line.
fn statement(line: &[u8]) -> Result<Option<OsString>, &'static str> {
    let line = line.trim_ascii();
    let end = line.iter().position(|byte| byte.is_ascii_whitespace() || *byte == b'#').unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    if name.is_empty() {
        return Ok(None);
    }
    let mut word = [b"--", name].concat();
    let rest = rest.trim_ascii_start();
    let (value, rest) = match rest.first() {
        None | Some(b'#') => return Ok(Some(OsString::from_vec(word))),
        Some(b'"') => quoted(&rest[1..])?,
        Some(_) => {
            let end = rest.iter().position(|byte| byte.is_ascii_whitespace() || *byte == b'#').unwrap_or(rest.len());
            (unescaped(&rest[..end]), &rest[end..])
        }
    };
    if !matches!(rest.trim_ascii_start().first(), None | Some(b'#')) {
        return Err("there is more than an option and its value: put a value with spaces into double quotes");
    }
    word.push(b'=');
    word.extend(value);
    Ok(Some(OsString::from_vec(word)))
}

/// The text up to the closing quote, and what follows it.
fn quoted(text: &[u8]) -> Result<(Vec<u8>, &[u8]), &'static str> {
    let closes = |at: &usize| text[*at] == b'"' && (*at == 0 || text[*at - 1] != b'\\');
    let end = (0..text.len()).find(closes).ok_or("a double quote is not closed")?;
    Ok((unescaped(&text[..end]), &text[end + 1..]))
}

/// `\"` as a quote; every other backslash is itself.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let escapes = |at: usize| text[at] == b'\\' && text.get(at + 1) == Some(&b'"');
    (0..text.len()).filter(|at| !escapes(*at)).map(|at| text[at]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(line: &str) -> Result<Option<String>, &'static str> {
        Ok(statement(line.as_bytes())?.map(|word| word.into_string().unwrap()))
    }

    #[test]
    fn lines_are_options() {
        for (line, expected) in [
            ("", None),
            ("   # note", None),
            ("tcp-close", Some("--tcp-close")),
            ("\tno-restore-sibling   # another", Some("--no-restore-sibling")),
            ("verbosity 4", Some("--verbosity=4")),
            ("log-file  \t x.log#note", Some("--log-file=x.log")),
            (r#"work-dir "/home/me/my \"work\" directory" # note"#, Some(r#"--work-dir=/home/me/my "work" directory"#)),
            (r#"lsm-profile """#, Some("--lsm-profile=")),
            (r"external a\b", Some(r"--external=a\b")),
        ] {
            assert_eq!(word(line), Ok(expected.map(Into::into)), "{line}");
        }
        for bad in [r#"work-dir "x"#, "work-dir a b", r#"work-dir "a" b"#, r#"work-dir ""#] {
            assert!(word(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_is_named_or_not() {
        let asked = |line: &str| Asked::on(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert_eq!(asked("dump --config a").file.as_deref(), Some(Path::new("a")));
        assert!(asked("dump --config=b").no_defaults && asked("--no-default-config").no_defaults);
        assert!(!asked("dump -- --no-default-config").no_defaults);
    }

    #[test]
    fn a_missing_file_says_nothing_and_a_wrong_line_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.conf");
        assert!(read(&file).unwrap().is_none());
        std::fs::write(&file, "tcp-close\nlog-file a b\n").unwrap();
        assert!(read(&file).unwrap_err().to_string().contains("line 2"));
    }
}
