//! hooks.d: files that add hooks to the containers that match their conditions.
//!
//! The format is oci-hooks(5), schema 1.0.0, as Podman, Buildah and CRI-O use it: every `*.json` of the directories; of two
//! files with the same name the one in the later directory counts; the files apply in the order of their lower-case
//! names; all conditions of `when` must match, of which there must be one. The older schema 0.1.0 is refused by its
//! version. Conditions are searched for anywhere in the text, as there, unless they have anchors.
//!
//! Those programs evaluate hooks.d when they make a container and write the result to its `config.json`. So this is for
//! a bundle that nobody has done that for; doing it again would run hooks twice.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use regex::Regex;
use serde::Deserialize;

use crate::hook::{Hook, Hooks, Stage};

/// The directories that Podman and CRI-O read, the later ones counting more.
pub const USUAL_DIRECTORIES: [&str; 2] = ["/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d"];

/// What the conditions look at.
#[derive(Debug, Clone, Default)]
pub struct Container {
    /// `process.args[0]`, `None` when the bundle has no process.
    pub command: Option<String>,
    /// The container's annotations.
    pub annotations: BTreeMap<String, String>,
    /// Whether the user asked for bind mounts of host directories, beyond those every container gets.
    pub has_bind_mounts: bool,
}

/// The hooks of a set of directories.
#[derive(Debug, Clone, Default)]
pub struct HookDirectories {
    /// By lower-case file name, then file name.
    files: BTreeMap<(String, String), HookFile>,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the hook file {} cannot be used", .file.display())]
pub struct HookFileError {
    /// The file, or the directory.
    pub file: PathBuf,
    /// Why not.
    #[source]
    pub source: HookFileFailure,
}

/// Why a hook file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HookFileFailure {
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// It is not JSON of the schema.
    #[error("it is not a hook definition of schema 1.0.0")]
    Json(#[source] serde_json::Error),
    /// Its version is another.
    #[error("its version is {0:?}; only 1.0.0 is known")]
    Version(String),
    /// `when` has no condition.
    #[error("it has no condition: `when` must have at least one")]
    NoCondition,
    /// The hook's program is not there.
    #[error("its hook {} does not exist or is not an absolute path", .0.display())]
    NoProgram(PathBuf),
    /// A condition is no regular expression.
    #[error("the condition {pattern:?} is not a regular expression")]
    Pattern {
        /// The condition.
        pattern: String,
        /// What is wrong with it.
        #[source]
        source: regex::Error,
    },
}

#[derive(Debug, Clone)]
struct HookFile {
    hook: Hook,
    stages: Vec<Stage>,
    when: Conditions,
}

#[derive(Debug, Clone)]
struct Conditions {
    always: Option<bool>,
    annotations: Vec<(Regex, Regex)>,
    commands: Vec<Regex>,
    has_bind_mounts: Option<bool>,
}

#[derive(Deserialize)]
struct Json {
    hook: Hook,
    when: JsonWhen,
    stages: Vec<Stage>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct JsonWhen {
    always: Option<bool>,
    annotations: BTreeMap<String, String>,
    commands: Vec<String>,
    has_bind_mounts: Option<bool>,
}

/// Read first, so that a file of another schema is refused for its version and not for its shape.
#[derive(Deserialize)]
struct JsonVersion {
    #[serde(default)]
    version: String,
}

impl HookDirectories {
    /// Reads the directories, of which later ones mask the files of earlier ones. A directory that is missing counts as empty.
    ///
    /// # Errors
    /// The first file that cannot be used: half of the hooks would be no safe state.
    pub fn read(directories: &[impl AsRef<Path>]) -> Result<HookDirectories, HookFileError> {
        let mut paths = BTreeMap::new();
        for directory in directories.iter().map(AsRef::as_ref) {
            let fail = |source| HookFileError { file: directory.to_owned(), source: HookFileFailure::Read(source) };
            let entries = match fs::read_dir(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.map_err(fail)?,
            };
            for entry in entries {
                let path = entry.map_err(fail)?.path();
                let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                if name.ends_with(".json") {
                    paths.insert((name.to_lowercase(), name), path);
                }
            }
        }
        let files = paths
            .into_iter()
            .map(|(name, file)| match HookFile::read(&file) {
                Ok(hook) => Ok((name, hook)),
                Err(source) => Err(HookFileError { file, source }),
            })
            .collect::<Result<_, _>>()?;
        Ok(HookDirectories { files })
    }

    /// Adds the hooks that match the container, behind those that `hooks` has.
    pub fn add_matching(&self, container: &Container, hooks: &mut Hooks) {
        for file in self.files.values().filter(|file| file.when.match_all(container)) {
            for stage in &file.stages {
                hooks.push(*stage, file.hook.clone());
            }
        }
    }
}

impl HookFile {
    fn read(path: &Path) -> Result<HookFile, HookFileFailure> {
        let text = fs::read(path).map_err(HookFileFailure::Read)?;
        let JsonVersion { version } = serde_json::from_slice(&text).map_err(HookFileFailure::Json)?;
        if version != "1.0.0" {
            return Err(HookFileFailure::Version(version));
        }
        let Json { hook, when, stages } = serde_json::from_slice(&text).map_err(HookFileFailure::Json)?;
        if !hook.path.is_absolute() || !hook.path.exists() {
            return Err(HookFileFailure::NoProgram(hook.path));
        }
        Ok(HookFile { hook, stages, when: Conditions::new(&when)? })
    }
}

impl Conditions {
    fn new(when: &JsonWhen) -> Result<Conditions, HookFileFailure> {
        let none = when.annotations.is_empty() && when.commands.is_empty();
        if none && when.always.is_none() && when.has_bind_mounts.is_none() {
            return Err(HookFileFailure::NoCondition);
        }
        Ok(Conditions {
            always: when.always,
            annotations: when
                .annotations
                .iter()
                .map(|(key, value)| Ok((compile(key)?, compile(value)?)))
                .collect::<Result<_, _>>()?,
            commands: when.commands.iter().map(|pattern| compile(pattern)).collect::<Result<_, _>>()?,
            has_bind_mounts: when.has_bind_mounts,
        })
    }

    fn match_all(&self, container: &Container) -> bool {
        let annotated = |(key, value): &(Regex, Regex)| {
            container.annotations.iter().any(|(name, text)| key.is_match(name) && value.is_match(text))
        };
        let commanded = || {
            container
                .command
                .as_ref()
                .is_some_and(|command| self.commands.iter().any(|pattern| pattern.is_match(command)))
        };
        self.always.unwrap_or(true)
            && self.has_bind_mounts.is_none_or(|wanted| wanted && container.has_bind_mounts)
            && self.annotations.iter().all(annotated)
            && (self.commands.is_empty() || commanded())
    }
}

fn compile(pattern: &str) -> Result<Regex, HookFileFailure> {
    Regex::new(pattern).map_err(|source| HookFileFailure::Pattern { pattern: pattern.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(command: &str, annotations: &[(&str, &str)], has_bind_mounts: bool) -> Container {
        let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Container { command: Some(command.to_owned()), annotations, has_bind_mounts }
    }

    fn matches(when: serde_json::Value, container: &Container) -> bool {
        let when: JsonWhen = serde_json::from_value(when).unwrap();
        Conditions::new(&when).unwrap().match_all(container)
    }

    #[test]
    fn every_condition_must_match() {
        use serde_json::json;
        let systemd = container("/usr/lib/systemd", &[("com.example.department", "fluid-dynamics")], true);
        assert!(matches(json!({"always": true}), &systemd));
        assert!(!matches(json!({"always": false}), &systemd));
        assert!(!matches(json!({"always": false, "commands": ["systemd"]}), &systemd));
        assert!(matches(json!({"commands": ["/init$", "/systemd$"]}), &systemd));
        assert!(!matches(json!({"commands": ["^systemd"]}), &systemd));
        assert!(matches(json!({"annotations": {"^com\\.example\\.department$": ".*dynamics$"}}), &systemd));
        assert!(!matches(json!({"annotations": {"^com\\.example\\.department$": "^dynamics$"}}), &systemd));
        assert!(!matches(json!({"annotations": {"department": "dynamics", "missing": "."}}), &systemd));
        assert!(!matches(json!({"commands": ["systemd"], "annotations": {"nothing": "y"}}), &systemd));
        assert!(matches(json!({"hasBindMounts": true}), &systemd));
        assert!(!matches(json!({"hasBindMounts": true}), &container("x", &[], false)));
        assert!(
            !matches(json!({"hasBindMounts": false}), &container("x", &[], false)),
            "false never matches, as in Podman"
        );
        assert!(
            !matches(json!({"commands": ["."]}), &Container::default()),
            "a container without a process has no command"
        );
    }

    fn put(directory: &Path, name: &str, json: &str) {
        fs::write(directory.join(name), json).unwrap();
    }

    fn always(args: &str, stages: &str) -> String {
        format!(
            r#"{{"version": "1.0.0", "hook": {{"path": "/bin/true", "args": ["{args}"]}}, "when": {{"always": true}}, "stages": [{stages}]}}"#
        )
    }

    fn names(hooks: &[Hook]) -> Vec<&str> {
        hooks.iter().map(|hook| hook.args[0].as_str()).collect()
    }

    #[test]
    fn later_directories_mask_and_lower_case_names_order() {
        let (usual, local) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        put(usual.path(), "02-b.json", &always("b", r#""prestart", "poststop""#));
        put(usual.path(), "01-UPPER.json", &always("upper", r#""prestart""#));
        put(usual.path(), "01-my.json", &always("masked", r#""prestart""#));
        put(local.path(), "01-my.json", &always("my", r#""prestart", "createRuntime""#));
        put(local.path(), "README", "no hook");
        let missing = local.path().join("missing");
        let directories = HookDirectories::read(&[usual.path(), &missing, local.path()]).unwrap();
        let mut hooks = Hooks::default();
        hooks
            .push(Stage::Prestart, Hook { path: "/x".into(), args: vec!["bundle".into()], env: vec![], timeout: None });
        directories.add_matching(&Container::default(), &mut hooks);
        assert_eq!(names(&hooks.prestart), ["bundle", "my", "upper", "b"]);
        assert_eq!(names(&hooks.create_runtime), ["my"]);
        assert_eq!(names(&hooks.poststop), ["b"]);
    }

    #[test]
    fn bad_files_are_refused_by_name_and_reason() {
        let cases = [
            ("{", "schema 1.0.0"),
            (r#"{"hook": "/bin/true", "cmds": ["x"], "stages": ["prestart"]}"#, "its version is \"\""),
            (r#"{"version": "2.0.0"}"#, "its version is \"2.0.0\""),
            (r#"{"version": "1.0.0", "hook": {"path": "/bin/true"}, "when": {}, "stages": []}"#, "at least one"),
            (
                r#"{"version": "1.0.0", "hook": {"path": "/no/such"}, "when": {"always": true}, "stages": []}"#,
                "/no/such",
            ),
            (
                r#"{"version": "1.0.0", "hook": {"path": "/bin/true"}, "when": {"commands": ["("]}, "stages": []}"#,
                "\"(\"",
            ),
            (
                r#"{"version": "1.0.0", "hook": {"path": "/bin/true"}, "when": {"always": true}, "stages": ["prestrat"]}"#,
                "schema",
            ),
        ];
        for (json, expected) in cases {
            let directory = tempfile::tempdir().unwrap();
            put(directory.path(), "bad.json", json);
            let error = HookDirectories::read(&[directory.path()]).unwrap_err();
            assert!(error.to_string().contains("bad.json"), "{error}");
            assert!(error.source.to_string().contains(expected), "{json}: {}", error.source);
        }
    }
}
