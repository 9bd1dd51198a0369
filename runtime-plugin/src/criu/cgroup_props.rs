//! `--cgroup-props` and `--cgroup-props-file`: control files to save and restore, in criu(8)'s words:
//!
//! ```text
//! "CONTROLLER":
//!  - "strategy": "merge"
//!  - "properties": ["FILE", "FILE"]
//! ```
//!
//! `merge` adds them to those that are known, `replace` puts them in their place. White space is of no importance.

use ferry_cgroup::ChosenProperties;

use super::options::Options;
use crate::failure::Failure;

/// What the options choose, the text before the file.
///
/// # Errors
/// The file cannot be read, or a text is none of the form.
pub fn chosen(options: &Options) -> Result<Vec<ChosenProperties>, Failure> {
    let mut chosen = Vec::new();
    if let Some(text) = &options.cgroup_props {
        chosen.extend(parse(text).map_err(|problem| Failure::new(format!("--cgroup-props: {problem}")))?);
    }
    if let Some(file) = &options.cgroup_props_file {
        let told = |problem: String| Failure::new(format!("--cgroup-props-file {}: {problem}", file.display()));
        let text = std::fs::read_to_string(file).map_err(|error| told(error.to_string()))?;
        chosen.extend(parse(&text).map_err(told)?);
    }
    Ok(chosen)
}

fn parse(text: &str) -> Result<Vec<ChosenProperties>, String> {
    let mut rest = Rest(text);
    let mut chosen = Vec::new();
    while !rest.is_empty() {
        let controller = rest.word("a controller")?;
        rest.sign(':')?;
        rest.key("strategy")?;
        let replace = match rest.word("a strategy")? {
            "merge" => false,
            "replace" => true,
            other => return Err(format!("the strategy {other:?} is neither \"merge\" nor \"replace\"")),
        };
        rest.key("properties")?;
        rest.sign('[')?;
        let mut names = vec![rest.file()?];
        while rest.sign(',').is_ok() {
            names.push(rest.file()?);
        }
        rest.sign(']')?;
        chosen.push(ChosenProperties { controller: controller.to_owned(), replace, names });
    }
    Ok(chosen)
}

/// What has not been read yet.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    fn is_empty(&mut self) -> bool {
        self.0 = self.0.trim_start();
        self.0.is_empty()
    }

    fn sign(&mut self, sign: char) -> Result<(), String> {
        self.0 = self.0.trim_start();
        self.0 = self.0.strip_prefix(sign).ok_or_else(|| self.wanted(&format!("{sign:?}")))?;
        Ok(())
    }

    /// A word in double quotes.
    fn word(&mut self, what: &str) -> Result<&'a str, String> {
        self.0 = self.0.trim_start();
        let word = self.0.strip_prefix('"').and_then(|rest| rest.split_once('"'));
        let (word, rest) = word
            .filter(|(word, _)| !word.is_empty())
            .ok_or_else(|| self.wanted(&format!("{what} in double quotes")))?;
        self.0 = rest;
        Ok(word)
    }

    /// `- "KEY":`
    fn key(&mut self, key: &str) -> Result<(), String> {
        self.sign('-')?;
        match self.word(key)? {
            word if word == key => self.sign(':'),
            word => Err(format!("{word:?} stands where {key:?} is wanted")),
        }
    }

    fn file(&mut self) -> Result<String, String> {
        match self.word("the name of a control file")? {
            name if name.contains('/') || name == "." || name == ".." => Err(format!("{name:?} is no name of a file")),
            name => Ok(name.to_owned()),
        }
    }

    fn wanted(&self, what: &str) -> String {
        let at: String = self.0.chars().take(20).collect();
        if at.is_empty() { format!("{what} is wanted at the end") } else { format!("{what} is wanted at {at:?}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manuals_form_is_read() {
        let text = "\"c1\":\n - \"strategy\": \"merge\"\n - \"properties\": [\"a\", \"b\"]\n\"c2\":\n - \"strategy\": \"replace\"\n \
                    - \"properties\": [\"c\"]\n";
        let all = |controller: &str, replace, names: &[&str]| ChosenProperties {
            controller: controller.into(),
            replace,
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        assert_eq!(parse(text), Ok(vec![all("c1", false, &["a", "b"]), all("c2", true, &["c"])]));
        assert_eq!(parse(" \n"), Ok(Vec::new()));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (text, word) in [
            ("c1:", "a controller in double quotes is wanted at \"c1:\""),
            ("\"c\":", "'-' is wanted at the end"),
            ("\"c\":\n - \"properties\": [\"a\"]", "\"strategy\" is wanted"),
            ("\"c\":\n - \"strategy\": \"add\"", "neither"),
            ("\"c\":\n - \"strategy\": \"merge\"\n - \"properties\": []", "control file in double quotes"),
            ("\"c\":\n - \"strategy\": \"merge\"\n - \"properties\": [\"../x\"]", "no name of a file"),
        ] {
            let told = parse(text).unwrap_err();
            assert!(told.contains(word), "{told}");
        }
    }
}
