//! What lies outside a tree, as CRIU's command line names it: `mnt[WHERE]:KEY` at a dump and `mnt[KEY]:PATH` at a restore,
//! `net[INODE]:KEY` and `pid[INODE]:KEY`.

use std::path::{Path, PathBuf};

use super::kind::NamespaceKind;
use super::{FindMounts, NamespaceOptions, RestoreNamespaceOptions};

impl NamespaceOptions {
    /// Takes an external mount or namespace; tells whether it is one of these at all.
    ///
    /// # Errors
    /// A sentence, when it is one and is wrong.
    pub fn add_external(&mut self, text: &str) -> Result<bool, String> {
        let Some((kind, object, key)) = parse(text) else { return Ok(false) };
        match kind {
            "mnt" => {
                if object.is_empty() && key.chars().all(|flag| "ms".contains(flag)) {
                    let before = self.found_mounts.unwrap_or_default();
                    let (masters, sharing) = (key.contains('m'), key.contains('s'));
                    self.found_mounts =
                        Some(FindMounts { masters: before.masters || masters, sharing: before.sharing || sharing });
                    return Ok(true);
                }
                if !object.starts_with('/') || key.is_empty() {
                    return Err(format!("--external {text}: write mnt[/MOUNT/POINT]:KEY, or mnt[]:FLAGS with m and s"));
                }
                self.external_mounts.insert(PathBuf::from(object), key.to_owned());
            }
            "net" | "pid" => {
                let kind = if kind == "net" { NamespaceKind::Net } else { NamespaceKind::Pid };
                let inode = object.parse().map_err(|_| format!("--external {text}: {object:?} is no inode number"))?;
                self.external_namespaces.insert((kind, inode), key.to_owned());
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl RestoreNamespaceOptions {
    /// Takes what an external mount is; tells whether it is one at all.
    ///
    /// # Errors
    /// A sentence, when it is one and is wrong.
    pub fn add_external(&mut self, text: &str) -> Result<bool, String> {
        match parse(text) {
            Some(("mnt", "", _)) => {
                self.found_mounts = true;
                Ok(true)
            }
            Some(("mnt", key, path)) if !key.is_empty() && !path.is_empty() => {
                // CRIU looks for it from the root, wherever it was started.
                self.external_mounts.insert(key.to_owned(), Path::new("/").join(path));
                Ok(true)
            }
            Some(("mnt", ..)) => Err(format!("--external {text}: write mnt[KEY]:PATH, or mnt[]")),
            _ => Ok(false),
        }
    }
}

/// Splits `KIND[OBJECT]:KEY`.
fn parse(text: &str) -> Option<(&str, &str, &str)> {
    let (kind, rest) = text.split_once('[')?;
    match rest.split_once("]:") {
        Some((object, key)) => Some((kind, object, key)),
        None => Some((kind, rest.strip_suffix(']')?, "")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_external_is_told_apart() {
        let mut options = NamespaceOptions::default();
        let taken: Vec<_> = ["mnt[/a]:b", "net[12]:n", "pid[3]:p", "file[1:2]", "dev[8/1]:x", "nonsense"]
            .map(|text| options.add_external(text))
            .into();
        assert_eq!(taken, [Ok(true), Ok(true), Ok(true), Ok(false), Ok(false), Ok(false)]);
        assert_eq!(options.external_mounts, [("/a".into(), "b".into())].into());
        assert_eq!(options.external_namespaces[&(NamespaceKind::Net, 12)], "n");
        assert!(["mnt[]:x", "mnt[a]:b", "mnt[/a]", "net[x]:n"].iter().all(|text| options.add_external(text).is_err()));

        assert_eq!((options.add_external("mnt[]"), options.add_external("mnt[]:m")), (Ok(true), Ok(true)));
        assert_eq!(options.found_mounts, Some(FindMounts { masters: true, sharing: false }));

        let mut options = RestoreNamespaceOptions::default();
        assert_eq!((options.add_external("mnt[b]:/x"), options.add_external("file[1:2]")), (Ok(true), Ok(false)));
        assert_eq!(options.external_mounts, [("b".into(), "/x".into())].into());
        assert!(options.add_external("mnt[b]").is_err());
        assert_eq!(options.add_external("mnt[c]:y/z"), Ok(true));
        assert_eq!(options.external_mounts["c"], Path::new("/y/z"));
    }
}
