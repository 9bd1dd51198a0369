//! `ferry spec`: the starting point of a new bundle, with the content that `runc spec` writes.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use libcontainer::oci_spec::runtime::{
    LinuxIdMappingBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, MountBuilder, Spec,
};

use crate::failure::{Failure, Outcome};

/// The version of the runtime specification that new bundles name.
pub const OCI_VERSION: &str = "1.2.0";

const TEMPLATE: &str = include_str!("spec.json");

/// Flags of `spec`.
#[derive(Debug, Args)]
pub struct SpecArgs {
    /// Directory of the bundle; the current one by default.
    #[arg(long, short, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// Write a config for a container in a user namespace of the caller.
    #[arg(long)]
    pub rootless: bool,
}

/// Writes `config.json`, never over an existing one.
pub fn run(args: &SpecArgs) -> Outcome {
    let path = args.bundle.clone().unwrap_or_default().join("config.json");
    let text = if args.rootless { rootless()? } else { TEMPLATE.to_owned() };
    let mut file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(|error| {
        if error.kind() == ErrorKind::AlreadyExists {
            Failure::new(format!("file {} exists; remove it first", path.display()))
        } else {
            Failure::from(error).context(format_args!("cannot create {}", path.display()))
        }
    })?;
    file.write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// The template changed as an unprivileged user needs it: own user namespace, no network namespace, no
/// cgroup limits, `/sys` bound from the host.
fn rootless() -> Result<String, Failure> {
    let mut spec: Spec = serde_json::from_str(TEMPLATE)?;
    let to_caller = |host: u32| LinuxIdMappingBuilder::default().container_id(0u32).host_id(host).size(1u32).build();
    if let Some(linux) = spec.linux_mut() {
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        namespaces
            .retain(|namespace| !matches!(namespace.typ(), LinuxNamespaceType::Network | LinuxNamespaceType::User));
        namespaces.push(LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::User).build()?);
        linux.set_namespaces(Some(namespaces));
        linux.set_uid_mappings(Some(vec![to_caller(rustix::process::geteuid().as_raw())?]));
        linux.set_gid_mappings(Some(vec![to_caller(rustix::process::getegid().as_raw())?]));
        linux.set_resources(None);
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        if mount.destination().as_os_str() == "/sys" {
            *mount = MountBuilder::default()
                .destination("/sys")
                .typ("none")
                .source("/sys")
                .options(["rbind", "nosuid", "noexec", "nodev", "ro"].map(String::from).to_vec())
                .build()?;
        } else if let Some(options) = mount.options_mut() {
            // The ids that these name are not mapped.
            options.retain(|option| !option.starts_with("gid=") && !option.starts_with("uid="));
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(serde_json::to_string_pretty(&spec)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_a_valid_spec_of_the_version_named() {
        let spec: Spec = serde_json::from_str(TEMPLATE).unwrap();
        assert_eq!(spec.version(), OCI_VERSION);
        assert_eq!(spec.process().as_ref().unwrap().terminal(), Some(true));
    }

    #[test]
    fn rootless_adds_a_user_namespace() {
        let spec: Spec = serde_json::from_str(&rootless().unwrap()).unwrap();
        let kinds: Vec<_> =
            spec.linux().as_ref().unwrap().namespaces().clone().unwrap().iter().map(|one| one.typ()).collect();
        assert!(kinds.contains(&LinuxNamespaceType::User) && !kinds.contains(&LinuxNamespaceType::Network));
    }
}
