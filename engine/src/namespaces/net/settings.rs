//! The settings of a network namespace under `/proc/sys/net`, which shows the namespace of the thread that opens it.
//!
//! Images hold them as lists whose order is the format's; a setting that a kernel lacks has no value.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::images::net::{NetnsEntry, SysctlEntry, SysctlType};

/// `net/ipv4/conf/LINK/…`, in the format's order.
const IPV4: &[&str] = &[
    "accept_local",
    "accept_redirects",
    "accept_source_route",
    "arp_accept",
    "arp_announce",
    "arp_filter",
    "arp_ignore",
    "arp_notify",
    "bootp_relay",
    "disable_policy",
    "disable_xfrm",
    "force_igmp_version",
    "forwarding",
    "igmpv2_unsolicited_report_interval",
    "igmpv3_unsolicited_report_interval",
    "log_martians",
    "medium_id",
    "promote_secondaries",
    "proxy_arp",
    "proxy_arp_pvlan",
    "route_localnet",
    "rp_filter",
    "secure_redirects",
    "send_redirects",
    "shared_media",
    "src_valid_mark",
    "tag",
    "ignore_routes_with_linkdown",
    "drop_gratuitous_arp",
    "drop_unicast_in_l2_multicast",
];

/// `net/ipv6/conf/LINK/…`, in the format's order.
const IPV6: &[&str] = &[
    "accept_dad",
    "accept_ra",
    "accept_ra_defrtr",
    "accept_ra_from_local",
    "accept_ra_min_hop_limit",
    "accept_ra_mtu",
    "accept_ra_pinfo",
    "accept_ra_rt_info_max_plen",
    "accept_ra_rtr_pref",
    "accept_redirects",
    "accept_source_route",
    "autoconf",
    "dad_transmits",
    "disable_ipv6",
    "drop_unicast_in_l2_multicast",
    "drop_unsolicited_na",
    "force_mld_version",
    "force_tllao",
    "forwarding",
    "hop_limit",
    "ignore_routes_with_linkdown",
    "keep_addr_on_down",
    "max_addresses",
    "max_desync_factor",
    "mldv1_unsolicited_report_interval",
    "mldv2_unsolicited_report_interval",
    "mtu",
    "ndisc_notify",
    "optimistic_dad",
    "proxy_ndp",
    "regen_max_retry",
    "router_probe_interval",
    "router_solicitation_delay",
    "router_solicitation_interval",
    "router_solicitations",
    STABLE_SECRET,
    "suppress_frag_ndisc",
    "temp_prefered_lft",
    "temp_valid_lft",
    "use_oif_addrs_only",
    "use_optimistic",
    "use_tempaddr",
];

/// Reading it fails until it is set.
const STABLE_SECRET: &str = "stable_secret";
const UNIX: &[&str] = &["max_dgram_qlen"];
const IPV4_OTHER: &[&str] = &["ping_group_range"];
/// No value is longer, as text.
const LONGEST: usize = 256;

/// The settings of one link, or of `all` or `default`.
pub(super) fn link(family: Family, link: &str) -> io::Result<Vec<SysctlEntry>> {
    read_all(&format!("net/{}/conf/{link}", family.name()), family.settings())
}

/// Sets those of one link that differ.
pub(super) fn restore_link(family: Family, link: &str, entries: &[SysctlEntry]) -> io::Result<()> {
    write_all(&format!("net/{}/conf/{link}", family.name()), family.settings(), entries)
}

/// Which internet protocol.
#[derive(Clone, Copy, Debug)]
pub(super) enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        }
    }

    fn settings(self) -> &'static [&'static str] {
        match self {
            Self::Ipv4 => IPV4,
            Self::Ipv6 => IPV6,
        }
    }
}

/// What does not belong to a link.
pub(super) fn collect() -> io::Result<NetnsEntry> {
    Ok(NetnsEntry {
        def_conf4: link(Family::Ipv4, "default")?,
        all_conf4: link(Family::Ipv4, "all")?,
        def_conf6: link(Family::Ipv6, "default")?,
        all_conf6: link(Family::Ipv6, "all")?,
        unix_conf: read_all("net/unix", UNIX)?,
        ipv4_sysctl: read_all("net/ipv4", IPV4_OTHER)?,
        ..NetnsEntry::default()
    })
}

/// Sets what does not belong to a link. Done before links are: `all` and `default` pass on to them.
pub(super) fn restore(entry: &NetnsEntry) -> io::Result<()> {
    restore_link(Family::Ipv4, "all", &entry.all_conf4)?;
    restore_link(Family::Ipv4, "default", &entry.def_conf4)?;
    restore_link(Family::Ipv6, "all", &entry.all_conf6)?;
    restore_link(Family::Ipv6, "default", &entry.def_conf6)?;
    write_all("net/unix", UNIX, &entry.unix_conf)?;
    write_all("net/ipv4", IPV4_OTHER, &entry.ipv4_sysctl)
}

/// A folder of settings, of which there are hundreds: each costs three system calls, and looking up one name.
struct Folder {
    name: String,
    open: Option<OwnedFd>,
}

impl Folder {
    /// One that this kernel lacks has no settings.
    fn open(name: String) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat(CWD, format!("/proc/sys/{name}"), flags, Mode::empty()) {
            Ok(open) => Ok(Self { name, open: Some(open) }),
            Err(Errno::NOENT) => Ok(Self { name, open: None }),
            Err(error) => Err(error.into()),
        }
    }

    fn get(&self, setting: &str) -> io::Result<Option<String>> {
        let Some(open) = &self.open else { return Ok(None) };
        let mut text = [0; LONGEST];
        let read = openat(open, setting, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::io::read(file, &mut text));
        match read {
            Ok(length) => Ok(Some(String::from_utf8_lossy(&text[..length]).trim_end().to_owned())),
            Err(Errno::NOENT) => Ok(None),
            Err(_) if setting == STABLE_SECRET => Ok(None),
            Err(error) => Err(self.failed("read", setting, error)),
        }
    }

    fn set(&self, setting: &str, value: &str) -> io::Result<()> {
        let Some(open) = &self.open else { return Ok(()) };
        let written = openat(open, setting, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::io::write(file, value.as_bytes()));
        match written {
            // What this kernel lacks cannot matter to it.
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failed(&format!("set to {value}"), setting, error)),
        }
    }

    fn failed(&self, what: &str, setting: &str, error: Errno) -> io::Error {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("cannot {what}: {}/{setting}: {error}", self.name))
    }
}

fn read_all(folder: &str, names: &[&str]) -> io::Result<Vec<SysctlEntry>> {
    let folder = Folder::open(folder.to_owned())?;
    let entry = |name: &&str| {
        let text = folder.get(name)?;
        Ok(if *name == STABLE_SECRET || IPV4_OTHER.contains(name) {
            SysctlEntry { r#type: SysctlType::CtlStr.into(), iarg: None, sarg: text }
        } else {
            SysctlEntry { r#type: SysctlType::Ctl32.into(), iarg: text.and_then(|text| text.parse().ok()), sarg: None }
        })
    };
    names.iter().map(entry).collect()
}

fn write_all(folder: &str, names: &[&str], entries: &[SysctlEntry]) -> io::Result<()> {
    let folder = Folder::open(folder.to_owned())?;
    // Later versions of the format only ever append settings.
    for (name, entry) in names.iter().zip(entries) {
        let wanted = entry.iarg.map(|number| number.to_string()).or_else(|| entry.sarg.clone());
        let Some(wanted) = wanted.filter(|wanted| !wanted.is_empty() && wanted.len() < LONGEST) else { continue };
        let current = folder.get(name)?.unwrap_or_default();
        if !current.split_ascii_whitespace().eq(wanted.split_ascii_whitespace()) {
            folder.set(name, &wanted)?;
        }
    }
    Ok(())
}
