//! UTS namespaces (uts_namespaces(7)): host and domain name.

use std::io;
use std::os::unix::ffi::OsStrExt;

use nix::sys::utsname::uname;

use crate::images::ns::UtsnsEntry;

/// Longest name (`__NEW_UTS_LEN`).
const LONGEST: usize = 64;

/// The names that the calling thread sees.
pub(super) fn collect() -> io::Result<UtsnsEntry> {
    let names = uname()?;
    Ok(UtsnsEntry {
        nodename: names.nodename().as_bytes().to_vec(),
        domainname: names.domainname().as_bytes().to_vec(),
    })
}

/// Sets the names of the calling thread's namespace.
pub(super) fn restore(names: &UtsnsEntry) -> io::Result<()> {
    if names.nodename.len() > LONGEST || names.domainname.len() > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a host or domain name is too long: damaged image"));
    }
    rustix::system::sethostname(&names.nodename)?;
    rustix::system::setdomainname(&names.domainname)?;
    Ok(())
}
