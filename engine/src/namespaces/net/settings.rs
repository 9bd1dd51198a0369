//! The settings of a network namespace under `/proc/sys/net`, which shows the namespace of the thread that opens it.
//!
//! Images hold them as lists whose order is the format's; a setting that a kernel lacks has no value.

use std::io;

use crate::images::net::{NetnsEntry, SysctlEntry, SysctlType};
use crate::namespaces::sysctl::{Folder, LONGEST};

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
    FORWARDING,
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
    FORWARDING,
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

const FORWARDING: &str = "forwarding";
const STABLE_SECRET: &str = "stable_secret";
const UNIX: &[&str] = &["max_dgram_qlen"];
const IPV4_OTHER: &[&str] = &["ping_group_range"];

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

fn read_all(folder: &str, names: &[&str]) -> io::Result<Vec<SysctlEntry>> {
    let folder = Folder::open(folder)?;
    let entry = |name: &&str| {
        Ok(match *name {
            // Reading it fails until it is set.
            STABLE_SECRET => text_entry(folder.get(name).unwrap_or_default()),
            name if IPV4_OTHER.contains(&name) => text_entry(folder.get(name)?),
            name => SysctlEntry { r#type: SysctlType::Ctl32.into(), iarg: folder.number(name)?, sarg: None },
        })
    };
    names.iter().map(entry).collect()
}

fn text_entry(text: Option<String>) -> SysctlEntry {
    SysctlEntry { r#type: SysctlType::CtlStr.into(), iarg: None, sarg: text }
}

fn write_all(folder: &str, names: &[&str], entries: &[SysctlEntry]) -> io::Result<()> {
    let folder = Folder::open(folder)?;
    // Later versions of the format only ever append settings.
    let mut settings: Vec<(&str, &SysctlEntry)> = names.iter().copied().zip(entries).collect();
    // Whether packets are forwarded changes what other settings are, and so comes first.
    settings.sort_by_key(|(name, _)| *name != FORWARDING);
    for (name, entry) in settings {
        let wanted = entry.iarg.map(|number| number.to_string()).or_else(|| entry.sarg.clone());
        if let Some(wanted) = wanted.filter(|wanted| !wanted.is_empty() && wanted.len() < LONGEST) {
            folder.set_changed(name, &wanted)?;
        }
    }
    Ok(())
}
