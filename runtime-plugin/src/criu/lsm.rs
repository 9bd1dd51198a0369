//! `--lsm-profile`: the label of a security module that the restored tree is to have.
//!
//! Ferry sets no labels, so only the one that says there is none can be had. On a host without the module the reason is the one that
//! CRIU has, too.

use std::path::Path;

use crate::failure::Failure;

/// Modules whose labels can be asked for: in the option's words, by name, and what is there when the kernel has it switched on.
const MODULES: [(&str, &str, &str); 2] =
    [("apparmor", "AppArmor", "/sys/kernel/security/apparmor"), ("selinux", "SELinux", "/sys/fs/selinux/enforce")];

/// Fails unless there is no label, or it is `none`.
pub fn check(profile: Option<&str>) -> Result<(), Failure> {
    let Some(profile) = profile else { return Ok(()) };
    let told = |problem: &str| Failure::new(format!("--lsm-profile {profile}: {problem}"));
    let Some((module, _)) = profile.split_once(':') else { return Err(told("TYPE:NAME is wanted")) };
    if module == "none" {
        return Ok(());
    }
    let Some((_, name, place)) = MODULES.iter().find(|(word, ..)| *word == module) else {
        return Err(told("the types are apparmor, selinux and none"));
    };
    Err(match Path::new(place).exists() {
        true => told(&format!("ferry does not set labels of {name} yet; restore without it")),
        false => told(&format!("this host's kernel has no {name}, or not switched on; restore without it")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_no_label_can_be_had() {
        assert!(check(None).is_ok() && check(Some("none:")).is_ok());
        for wrong in ["none", "apparmor:x", "selinux:a:b:c", "smack:x"] {
            assert!(check(Some(wrong)).unwrap_err().to_string().contains(wrong), "{wrong}");
        }
    }
}
