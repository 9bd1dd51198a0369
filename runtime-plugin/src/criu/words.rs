//! Command lines as getopt_long(3) takes them, which is what CRIU's callers write, in the one form that clap takes.
//!
//! `-dv4` is `-d --verbosity=4`; `-Dimages` and `--images-dir images` are `--images-dir=images`; a long option may be cut short
//! where that leaves no doubt; `--no-X` takes back every `--X` before it; what is no option comes last.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{Arg, ArgAction, Command};

/// What an option takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    /// A value, but only in the same word.
    Maybe,
    Value,
}

fn takes(arg: &Arg) -> Takes {
    let least = arg.get_num_args().map_or(1, |range| range.min_values());
    match arg.get_action() {
        ArgAction::Set | ArgAction::Append if least == 0 => Takes::Maybe,
        ArgAction::Set | ArgAction::Append => Takes::Value,
        _ => Takes::Nothing,
    }
}

/// The words of `command` in canonical form. What is wrong is left for clap to tell.
pub fn canonical(command: &Command, words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut words = words.into_iter();
    let mut options: Vec<OsString> = Vec::new();
    let mut others: Vec<OsString> = vec!["--".into()];
    while let Some(word) = words.next() {
        let bytes = word.as_bytes();
        if bytes == b"--" {
            others.extend(words);
            break;
        } else if let Some(long) = bytes.strip_prefix(b"--") {
            add_long(command, long, &mut words, &mut options);
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            add_short(command, &bytes[1..], &mut words, &mut options);
        } else {
            others.push(word);
        }
    }
    options.append(&mut others);
    options
}

fn add_long(command: &Command, word: &[u8], rest: &mut impl Iterator<Item = OsString>, out: &mut Vec<OsString>) {
    let (name, value) = match word.iter().position(|byte| *byte == b'=') {
        Some(at) => (&word[..at], Some(&word[at + 1..])),
        None => (word, None),
    };
    let name = String::from_utf8_lossy(name);
    let negated = name.strip_prefix("no-").filter(|_| value.is_none() && find(command, &name).is_none());
    if let Some(flag) = negated.and_then(|name| find(command, name)).filter(|flag| takes(flag) == Takes::Nothing) {
        let taken_back = long_of(flag);
        out.retain(|word| *word != taken_back);
        return;
    }
    let Some(arg) = find(command, &name) else {
        // Unknown: clap finds the best words for that.
        out.push(OsString::from_vec([b"--", word].concat()));
        return;
    };
    let value = match takes(arg) {
        Takes::Value => value.map(|value| OsStr::from_bytes(value).to_owned()).or_else(|| rest.next()),
        _ => value.map(|value| OsStr::from_bytes(value).to_owned()),
    };
    out.push(joined(arg, value));
}

fn add_short(command: &Command, letters: &[u8], rest: &mut impl Iterator<Item = OsString>, out: &mut Vec<OsString>) {
    for (place, letter) in letters.iter().enumerate() {
        let Some(arg) = command.get_arguments().find(|arg| arg.get_short() == Some(char::from(*letter))) else {
            out.push(OsString::from_vec([b"-", &letters[place..]].concat()));
            return;
        };
        let after = &letters[place + 1..];
        let attached = (!after.is_empty()).then(|| OsStr::from_bytes(after).to_owned());
        match takes(arg) {
            Takes::Nothing => out.push(joined(arg, None)),
            Takes::Maybe if *letter == b'v' && after.iter().all(|byte| *byte == b'v') => out.push(joined(arg, None)),
            Takes::Maybe => return out.push(joined(arg, attached)),
            Takes::Value => return out.push(joined(arg, attached.or_else(|| rest.next()))),
        }
    }
}

/// The option of that name, or the only one that begins with it.
fn find<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    let long = |arg: &&Arg| arg.get_long().is_some_and(|long| long == name);
    command.get_arguments().find(long).or_else(|| {
        let mut alike = command.get_arguments().filter(|arg| arg.get_long().is_some_and(|long| long.starts_with(name)));
        alike.next().filter(|_| alike.next().is_none() && !name.is_empty())
    })
}

fn long_of(arg: &Arg) -> OsString {
    format!("--{}", arg.get_long().unwrap_or_default()).into()
}

fn joined(arg: &Arg, value: Option<OsString>) -> OsString {
    let mut word = long_of(arg);
    if let Some(value) = value {
        word.push("=");
        word.push(value);
    }
    word
}

#[cfg(test)]
mod tests {
    use super::super::options::Options;
    use super::*;
    use clap::CommandFactory;

    fn words(line: &str) -> String {
        let words = canonical(&Options::command(), line.split(' ').map(Into::into));
        words.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn as_getopt_takes_them() {
        assert_eq!(words("restore -dv4 -Dimages"), "--restore-detached --verbosity=4 --images-dir=images -- restore");
        assert_eq!(words("-t 7 dump --images-dir -v4"), "--tree=7 --images-dir=-v4 -- dump");
        assert_eq!(words("-vvd dump"), "--verbosity=vd -- dump");
        assert_eq!(words("-vv -x -x12,13"), "--verbosity --verbosity --ext-unix-sk --ext-unix-sk=12,13 --");
        assert_eq!(words("-j --no-shell-job --shell-j"), "--shell-job --");
        assert_eq!(words("--no-default-config check"), "--no-default-config -- check");
        assert_eq!(words("restore --exec-cmd -- sh -c -v4"), "--exec-cmd -- restore sh -c -v4");
        assert_eq!(words("--tls-ca x --nonsense=1 -q"), "--tls-ca --nonsense=1 -q -- x");
    }
}
