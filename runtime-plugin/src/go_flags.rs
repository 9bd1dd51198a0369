//! Go-style flags on clap's command line.
//!
//! The callers of an OCI runtime were written for Go's flag parser, which takes `-no-subreaper` for
//! `--no-subreaper`, `--detach=true` for a switch, a value that begins with a dash (`--status-fd -1`) and an
//! empty value as if the flag were absent. `normalise` rewrites all of these into what clap accepts, with the
//! command's own definition as the source of names.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{Arg, ArgAction, Command};

/// Rewrites `args` (with the program's name first) for `command`.
///
/// What is not a flag of the command is passed on unchanged, so that clap can name it in its error.
pub fn normalise(args: Vec<OsString>, command: &Command) -> Vec<OsString> {
    let mut current = command;
    let mut input = args.into_iter();
    let mut output: Vec<OsString> = input.next().into_iter().collect();
    while let Some(arg) = input.next() {
        if arg == "--" {
            output.push(arg);
            break;
        }
        if let Some((name, value)) = split_flag(&arg) {
            let Some(flag) = find_flag(current, name) else {
                output.push(arg);
                continue;
            };
            let spelled = spelling(flag);
            if !takes_value(flag) {
                if value != Some(OsStr::new("false")) {
                    output.push(spelled);
                }
                continue;
            }
            match value.map(OsStr::to_os_string).or_else(|| input.next()) {
                Some(value) if value.is_empty() => {}
                Some(value) => output.push(join(spelled, &value)),
                None => output.push(spelled),
            }
            continue;
        }
        if let Some(sub) = current.find_subcommand(&arg) {
            current = sub;
            output.push(arg);
            continue;
        }
        output.push(arg);
        if current.get_positionals().any(Arg::is_trailing_var_arg_set) {
            break;
        }
    }
    output.extend(input);
    output
}

/// `-name`, `--name`, `-name=value`, `--name=value`.
fn split_flag(arg: &OsStr) -> Option<(&str, Option<&OsStr>)> {
    let bytes = arg.as_bytes();
    let body = bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-")).filter(|body| !body.is_empty())?;
    let (name, value) = match body.iter().position(|&byte| byte == b'=') {
        Some(at) => (&body[..at], Some(OsStr::from_bytes(&body[at + 1..]))),
        None => (body, None),
    };
    std::str::from_utf8(name).ok().map(|name| (name, value))
}

fn find_flag<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().filter(|arg| !arg.is_positional()).find(|arg| {
        let mut letters = name.chars();
        let is_letter =
            matches!((letters.next(), letters.next()), (Some(letter), None) if arg.get_short() == Some(letter));
        is_letter
            || arg.get_long() == Some(name)
            || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
    })
}

fn takes_value(flag: &Arg) -> bool {
    matches!(flag.get_action(), ArgAction::Set | ArgAction::Append)
}

fn spelling(flag: &Arg) -> OsString {
    match (flag.get_long(), flag.get_short()) {
        (Some(long), _) => format!("--{long}").into(),
        (None, Some(short)) => format!("-{short}").into(),
        (None, None) => OsString::new(),
    }
}

fn join(flag: OsString, value: &OsStr) -> OsString {
    let mut bytes = flag.into_vec();
    bytes.push(b'=');
    bytes.extend_from_slice(value.as_bytes());
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        Command::new("ferry")
            .arg(Arg::new("log").long("log"))
            .arg(Arg::new("debug").long("debug").action(ArgAction::SetTrue))
            .subcommand(
                Command::new("restore")
                    .arg(Arg::new("no-subreaper").long("no-subreaper").action(ArgAction::SetTrue))
                    .arg(Arg::new("bundle").long("bundle").short('b'))
                    .arg(Arg::new("status-fd").long("status-fd"))
                    .arg(Arg::new("id")),
            )
            .subcommand(
                Command::new("exec")
                    .arg(Arg::new("detach").long("detach").short('d').action(ArgAction::SetTrue))
                    .arg(Arg::new("id"))
                    .arg(Arg::new("args").num_args(0..).trailing_var_arg(true).allow_hyphen_values(true)),
            )
    }

    fn normalised(line: &str) -> String {
        let args = std::iter::once("ferry").chain(line.split(' ')).map(|word| word.replace("''", "").into()).collect();
        let words: Vec<String> =
            normalise(args, &command()).into_iter().skip(1).map(|word| word.into_string().unwrap()).collect();
        words.join(" ")
    }

    #[test]
    fn single_dash_names_are_long_flags() {
        assert_eq!(
            normalised("-debug restore -no-subreaper -bundle /b c1"),
            "--debug restore --no-subreaper --bundle=/b c1"
        );
    }

    #[test]
    fn switches_take_go_booleans() {
        assert_eq!(normalised("--debug=true restore --no-subreaper=false c1"), "--debug restore c1");
    }

    #[test]
    fn values_may_begin_with_a_dash_or_be_empty() {
        assert_eq!(normalised("--log '' restore --status-fd -1 c1"), "restore --status-fd=-1 c1");
    }

    #[test]
    fn a_missing_value_is_left_for_the_parser_to_report() {
        assert_eq!(normalised("restore --bundle"), "restore --bundle");
    }

    #[test]
    fn the_arguments_of_exec_are_not_touched() {
        assert_eq!(normalised("exec -d c1 ls -l -d --detach=false"), "exec --detach c1 ls -l -d --detach=false");
    }

    #[test]
    fn unknown_flags_pass_unchanged() {
        assert_eq!(normalised("restore -nonsense c1"), "restore -nonsense c1");
    }
}
