//! Network namespaces (network_namespaces(7)): the loopback link with its addresses and routes, and settings.
//!
//! Other links, packet filters and routing rules are refused by name for now, unless the namespace is to be given to the
//! restore from outside, or to be left empty for others to fill.

pub(crate) mod netlink;
mod settings;

use std::io;
use std::os::fd::BorrowedFd;

use netlink::{Message, NLM_F_CREATE, Netlink};
use settings::Family;

use super::kind::NamespaceKind;
use crate::images::net::{NdType, NetDeviceEntry, NetnsEntry};

/// Begins an image of addresses.
const ADDRESS_MAGIC: u32 = 0x4736_1222;
/// Begins an image of routes.
const ROUTE_MAGIC: u32 = 0x4531_1224;
/// Begins an image of routing rules.
const RULE_MAGIC: u32 = 0x7170_6986;

// rtnetlink(7): types of messages, sizes of their bodies, attributes.
const RTM_SETLINK: u16 = 19;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_GETRULE: u16 = 34;
const LINK_BODY: usize = 16;
const ROUTE_BODY: usize = 12;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const RTA_TABLE: u16 = 15;
const RT_TABLE_MAIN: u32 = 254;
const RTM_F_CLONED: u32 = 0x200;
const RTPROT_KERNEL: u8 = 2;
// nfnetlink: subsystem 10 is nftables, its request 1 lists tables.
const NFT_MSG_GETTABLE: u16 = 10 << 8 | 1;
const NFTA_TABLE_NAME: u16 = 1;

/// Links that the kernel puts into every new namespace by itself, down.
const FALLBACK_LINKS: &[&str] =
    &["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"];

/// What the calling thread's network namespace holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Net {
    pub settings: NetnsEntry,
    pub links: Vec<NetDeviceEntry>,
    /// As `ip … save` writes them: a magic word and netlink messages.
    pub addresses: Vec<u8>,
    pub routes: Vec<u8>,
    pub routes6: Vec<u8>,
    pub rules: Vec<u8>,
    /// What cannot be saved: object and problem.
    pub problems: Vec<(String, String)>,
}

/// Looks at the calling thread's namespace, which images call `number`; its settings are left to [`collect_settings`].
pub(super) fn collect(number: u32) -> io::Result<Net> {
    let mut socket = Netlink::route()?;
    let mut net = Net::default();
    for link in socket.dump(RTM_GETLINK, &[0; LINK_BODY])? {
        let name = link.attribute(LINK_BODY, IFLA_IFNAME).unwrap_or_default();
        let name = String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(name)).into_owned();
        let flags = link.word(8).unwrap_or_default();
        if flags & libc::IFF_LOOPBACK as u32 != 0 {
            net.links.push(loopback(&link, name, flags, number));
        } else if !FALLBACK_LINKS.contains(&name.as_str()) || flags & libc::IFF_UP as u32 != 0 {
            net.problems.push((format!("network link {name}"), "only the loopback link can be saved yet".into()));
        }
    }
    let addresses = socket.dump(RTM_GETADDR, &[0; 8])?;
    net.addresses = save(ADDRESS_MAGIC, &addresses);
    net.routes = save(ROUTE_MAGIC, &routes(&mut socket, libc::AF_INET)?);
    net.routes6 = save(ROUTE_MAGIC, &routes(&mut socket, libc::AF_INET6)?);
    let rules = socket.dump(RTM_GETRULE, &family_body(libc::AF_INET))?;
    net.rules = save(RULE_MAGIC, &rules);
    // Priorities are attribute 6, absent for the first; every namespace is born with these three (ip-rule(8)).
    let priorities = rules
        .iter()
        .map(|rule| rule.attribute(12, 6).map_or(Some(0), |bytes| bytes.try_into().ok().map(u32::from_ne_bytes)));
    if !priorities.eq([Some(0), Some(32766), Some(32767)]) {
        net.problems.push(("routing rules".into(), "they are not the kernel's own three".into()));
    }
    net.problems.extend(packet_filters()?);
    Ok(net)
}

fn family_body(family: i32) -> Vec<u8> {
    let mut body = vec![0; ROUTE_BODY];
    body[0] = family as u8;
    body
}

fn loopback(link: &Message, name: String, flags: u32, number: u32) -> NetDeviceEntry {
    let index = link.word(4).unwrap_or_default();
    let mtu = link.attribute(LINK_BODY, IFLA_MTU).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
    NetDeviceEntry {
        r#type: NdType::Loopback.into(),
        ifindex: index,
        mtu: mtu.unwrap_or_default(),
        flags,
        name,
        peer_ifindex: Some(index),
        peer_nsid: Some(number),
        ..NetDeviceEntry::default()
    }
}

/// The settings of the calling thread's namespace and of `links`, which take the longest and stand in nobody's way.
pub(super) fn collect_settings(links: &mut [NetDeviceEntry]) -> io::Result<NetnsEntry> {
    for link in links {
        link.conf4 = settings::link(Family::Ipv4, &link.name)?;
        link.conf6 = settings::link(Family::Ipv6, &link.name)?;
    }
    settings::collect()
}

/// Routes that somebody set in the main table; the kernel makes the others from addresses.
fn routes(socket: &mut Netlink, family: i32) -> io::Result<Vec<Message>> {
    let all = socket.dump(RTM_GETROUTE, &family_body(family))?;
    let kept = all.into_iter().filter(|route| {
        let table =
            route.attribute(ROUTE_BODY, RTA_TABLE).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
        route.payload.first() == Some(&(family as u8))
            && table == Some(RT_TABLE_MAIN)
            && route.word(8).unwrap_or_default() & RTM_F_CLONED == 0
    });
    Ok(kept.collect())
}

fn save(magic: u32, messages: &[Message]) -> Vec<u8> {
    let mut bytes = magic.to_ne_bytes().to_vec();
    for message in messages {
        bytes.extend(message.to_bytes(0));
    }
    bytes
}

/// Tables of packet filters, by name.
fn packet_filters() -> io::Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let problem = "packet filters cannot be saved yet".to_owned();
    for (file, what) in [("ip_tables_names", "iptables"), ("ip6_tables_names", "ip6tables")] {
        let names = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        found.extend(names.lines().map(|name| (format!("{what} table {name}"), problem.clone())));
    }
    // nfgenmsg: family 0 (all), version 0, resource 0. A kernel without nftables has no such subsystem, or no socket.
    let tables = Netlink::netfilter().and_then(|mut socket| socket.dump(NFT_MSG_GETTABLE, &[0; 4]));
    for table in tables.unwrap_or_default() {
        let name = table.attribute(4, NFTA_TABLE_NAME).unwrap_or_default();
        let name = String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(name)).into_owned();
        found.push((format!("nftables table {name}"), problem.clone()));
    }
    Ok(found)
}

/// Gives the calling thread's namespace, which is new, what `net` holds.
pub(super) fn restore(net: &Net) -> io::Result<()> {
    settings::restore(&net.settings)?;
    let mut socket = Netlink::route()?;
    for link in &net.links {
        restore_loopback(&mut socket, link)?;
    }
    for (image, magic, kind, what) in [
        (&net.addresses, ADDRESS_MAGIC, RTM_NEWADDR, "address"),
        (&net.routes, ROUTE_MAGIC, RTM_NEWROUTE, "route"),
        (&net.routes6, ROUTE_MAGIC, RTM_NEWROUTE, "route"),
    ] {
        for message in load(image, magic, kind, what)? {
            match socket.request(kind, NLM_F_CREATE, &message.payload) {
                // The kernel has made it already, as it did the first time.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                Err(error) => {
                    return Err(io::Error::new(error.kind(), format!("cannot restore a network {what}: {error}")));
                }
                Ok(()) => {}
            }
        }
    }
    Ok(())
}

/// The messages of an image that are to be sent again; those that the kernel makes by itself are left out.
fn load(image: &[u8], magic: u32, kind: u16, what: &str) -> io::Result<Vec<Message>> {
    if image.is_empty() {
        return Ok(Vec::new());
    }
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, format!("the image of each network {what} is damaged"));
    let rest = image.strip_prefix(&magic.to_ne_bytes()).ok_or_else(damaged)?;
    let messages = Message::parse_all(rest).ok_or_else(damaged)?;
    let by_kernel = |message: &Message| {
        message.kind == RTM_NEWROUTE && message.payload.get(5).is_some_and(|by| *by == RTPROT_KERNEL)
    };
    Ok(messages.into_iter().filter(|message| message.kind == kind && !by_kernel(message)).collect())
}

/// The body of a request that raises a link, or takes it down.
fn link_request(index: u32, up: bool) -> Vec<u8> {
    // struct ifinfomsg: family, padding, type, index, flags, which flags to change.
    let mut body = vec![0; LINK_BODY];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&(if up { libc::IFF_UP as u32 } else { 0 }).to_ne_bytes());
    body[12..16].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
    body
}

/// Raises the loopback link of the network namespace of the task behind `pidfd`. In a new namespace it is down.
///
/// # Errors
/// Those of setns(2) and of rtnetlink(7).
pub fn raise_loopback(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    /// The number that it has in every namespace.
    const LOOPBACK: u32 = 1;
    let raise = || Netlink::route()?.request(RTM_SETLINK, 0, &link_request(LOOPBACK, true)).map(drop);
    super::enter::visit(pidfd, &[NamespaceKind::Net], raise)?
}

fn restore_loopback(socket: &mut Netlink, link: &NetDeviceEntry) -> io::Result<()> {
    let mut body = link_request(link.ifindex, link.flags & libc::IFF_UP as u32 != 0);
    body.extend(8u16.to_ne_bytes());
    body.extend(IFLA_MTU.to_ne_bytes());
    body.extend(link.mtu.to_ne_bytes());
    let failed = |error: io::Error| io::Error::new(error.kind(), format!("cannot set up the loopback link: {error}"));
    socket.request(RTM_SETLINK, 0, &body).map_err(failed)?;
    settings::restore_link(Family::Ipv4, &link.name, &link.conf4)?;
    settings::restore_link(Family::Ipv6, &link.name, &link.conf6)
}

/// Whether packet filters, as `nft list ruleset` writes them, are only those by which CRIU locks a network while it dumps: it
/// saves them with the rest, and takes them away when it has restored.
pub(super) fn is_only_lock(rules: &str) -> bool {
    let known = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        matches!(
            words[..],
            [] | ["}"]
                | ["table", "ip" | "ip6", "filter", "{"]
                | ["chain", "CRIU" | "INPUT" | "OUTPUT", "{"]
                | ["type", "filter", "hook", "input" | "output", "priority", .., "policy", "accept;"]
                | ["meta", "mark", "0x0000c114", "counter", .., "accept"]
                | ["counter", "packets", _, "bytes", _, "drop"]
                | ["counter", "packets", _, "bytes", _, "jump", "CRIU"]
        )
    };
    rules.lines().all(known)
}

/// Why a restore cannot make the links that the images hold, if so.
pub(super) fn obstacles(net: &Net) -> Vec<(String, String)> {
    let other =
        |link: &&NetDeviceEntry| link.r#type != i32::from(NdType::Loopback) || link.name != "lo" || link.ifindex != 1;
    let mut found: Vec<(String, String)> = net
        .links
        .iter()
        .filter(other)
        .map(|link| (format!("network link {}", link.name), "only the loopback link can be restored yet".to_owned()))
        .collect();
    let images = [
        (&net.addresses, ADDRESS_MAGIC, RTM_NEWADDR, "address"),
        (&net.routes, ROUTE_MAGIC, RTM_NEWROUTE, "route"),
        (&net.routes6, ROUTE_MAGIC, RTM_NEWROUTE, "route"),
    ];
    for (image, magic, kind, what) in images {
        if let Err(error) = load(image, magic, kind, what) {
            found.push((format!("network {what}"), error.to_string()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_addresses_are_found_before_anything_is_made() {
        let net = Net { addresses: vec![1, 2, 3], ..Net::default() };
        assert_eq!(obstacles(&net).len(), 1);
        let mut addresses = ADDRESS_MAGIC.to_ne_bytes().to_vec();
        assert_eq!(obstacles(&Net { addresses: addresses.clone(), ..Net::default() }), []);
        addresses.extend([200, 0, 0, 0, 20, 0]);
        assert_eq!(obstacles(&Net { addresses, ..Net::default() }).len(), 1);
    }

    #[test]
    fn the_lock_of_criu_is_no_packet_filter() {
        let lock = "table ip filter {\n\tchain CRIU {\n\t\tmeta mark 0x0000c114 counter packets 0 bytes 0 accept\n\t\tcounter \
                    packets 3 bytes 5 drop\n\t}\n\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy \
                    accept;\n\t\tcounter packets 0 bytes 0 jump CRIU\n\t}\n}\n";
        assert!(is_only_lock(lock) && is_only_lock(""));
        assert!(!is_only_lock(&lock.replace("jump CRIU", "accept")));
        assert!(!is_only_lock("table ip nat {\n}\n"));
    }

    #[test]
    fn other_links_than_the_loopback_are_obstacles() {
        let link = NetDeviceEntry { r#type: NdType::Veth.into(), name: "eth0".into(), ..NetDeviceEntry::default() };
        let found = obstacles(&Net { links: vec![link], ..Net::default() });
        assert_eq!(found.len(), 1);
        assert!(found[0].0.contains("eth0"), "{found:?}");
    }
}
