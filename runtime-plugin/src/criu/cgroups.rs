//! `--manage-cgroups` and its companions.

use ferry_cgroup::Mode;
use ferry_engine::cgroups::CgroupOptions;

use super::options::Options;
use crate::failure::Failure;

/// What a dump or restore does with cgroups. Without a word it manages them softly, as CRIU does.
///
/// # Errors
/// A mode or a root that is none.
pub fn options(options: &Options) -> Result<CgroupOptions, Failure> {
    let mode = options.manage_cgroups.as_deref().unwrap_or_default().parse::<Mode>()?;
    let roots = options.cgroup_root.iter().map(|root| parse_root(root)).collect::<Result<_, _>>()?;
    Ok(CgroupOptions {
        mode,
        roots,
        controllers: options.cgroup_dump_controller.clone(),
        properties: super::cgroup_props::chosen(options)?,
        yard: options.cgroup_yard.clone(),
        confined: false,
    })
}

/// `[CONTROLLER:]/PATH`.
fn parse_root(text: &str) -> Result<(Option<String>, String), Failure> {
    let (controller, path) = match text.split_once(':') {
        Some((controller, path)) => (Some(controller.to_owned()), path),
        None => (None, text),
    };
    if !path.starts_with('/') || path.split('/').any(|name| name == "..") {
        return Err(Failure::new(format!("--cgroup-root {text}: [CONTROLLER:]/PATH is wanted, without \"..\"")));
    }
    Ok((controller, path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_roots() {
        let parse = |line: &str| super::options(&Options::parse(line.split(' ').map(Into::into)).unwrap());
        let options = parse("dump --cgroup-root /a --cgroup-root pids:/b --cgroup-dump-controller pids").unwrap();
        assert_eq!(options.roots, [(None, "/a".into()), (Some("pids".into()), "/b".into())]);
        assert_eq!((options.mode, options.controllers), (Mode::Soft, vec!["pids".to_owned()]));
        assert_eq!(parse("dump --manage-cgroups=ignore").unwrap().mode, Mode::Ignore);
        assert_eq!(parse("dump --manage-cgroups").unwrap().mode, Mode::Soft);
        let wrong = ["--manage-cgroups=hard", "--cgroup-root a", "--cgroup-root pids:/a/../b"];
        assert!(wrong.iter().all(|line| parse(line).is_err()));
    }
}
