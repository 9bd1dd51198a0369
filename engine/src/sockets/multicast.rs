//! Multicast memberships (ip(7), `IP_ADD_MEMBERSHIP`; ipv6(7)).
//!
//! The kernel does not list a socket's memberships. It lists the groups of each interface, for all sockets together
//! (`/proc/PID/net/igmp`, `igmp6`), and tells whether a socket is a member of a given one (`MCAST_MSFILTER`, RFC 3678).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;

use crate::sys::{HostPid, sockopt};

/// A group on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Number of the interface.
    interface: u32,
    address: IpAddr,
}

/// The groups of a network namespace that somebody has joined, but for those that every interface is in.
///
/// # Errors
/// Those of reading the files.
pub fn groups(pid: HostPid) -> std::io::Result<Vec<Group>> {
    let mut groups = parse_v4(&std::fs::read_to_string(format!("/proc/{pid}/net/igmp"))?);
    // Without IPv6 there is no such file.
    groups.extend(parse_v6(&std::fs::read_to_string(format!("/proc/{pid}/net/igmp6")).unwrap_or_default()));
    Ok(groups)
}

fn parse_v4(text: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut interface = 0;
    for line in text.lines().skip(1) {
        let word = line.split_ascii_whitespace().next();
        if line.starts_with('\t') {
            let Some(address) = word.and_then(|word| u32::from_str_radix(word, 16).ok()) else { continue };
            let address = Ipv4Addr::from(address.to_ne_bytes());
            if address != Ipv4Addr::new(224, 0, 0, 1) {
                groups.push(Group { interface, address: address.into() });
            }
        } else {
            interface = word.and_then(|word| word.parse().ok()).unwrap_or(0);
        }
    }
    groups
}

fn parse_v6(text: &str) -> Vec<Group> {
    let parse = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let interface = words.next()?.parse().ok()?;
        let address = Ipv6Addr::from(u128::from_str_radix(words.nth(1)?, 16).ok()?);
        // All nodes, of the interface and of the link, and the groups that addresses are sought through.
        let segments = address.segments();
        let own = [[0xff01, 0, 0, 0, 0, 0, 0, 1], [0xff02, 0, 0, 0, 0, 0, 0, 1]].contains(&segments)
            || (segments[0] == 0xff02 && segments[5] == 1 && segments[6] >> 8 == 0xff);
        (!own).then_some(Group { interface, address: address.into() })
    };
    text.lines().filter_map(parse).collect()
}

/// The first of `groups` that a socket of this family is in.
pub fn membership(fd: BorrowedFd<'_>, family: i32, groups: &[Group]) -> Option<IpAddr> {
    let of_family = |group: &&Group| group.address.is_ipv4() == (family == libc::AF_INET);
    let is_member = |group: &&Group| sockopt::is_member(fd, group.interface, group.address);
    groups.iter().filter(of_family).find(is_member).map(|group| group.address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    #[test]
    fn a_socket_is_known_to_be_a_member() {
        let own = HostPid(std::process::id() as i32);
        let group = Ipv4Addr::new(239, 12, 34, 56);
        let member = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
        let other = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
        member.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST).expect("joins");
        let groups = groups(own).expect("lists");
        assert_eq!(membership(member.as_fd(), libc::AF_INET, &groups), Some(group.into()));
        assert_eq!(membership(other.as_fd(), libc::AF_INET, &groups), None);
    }

    #[test]
    fn groups_that_every_interface_is_in_are_left_out() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n2\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
        assert_eq!(parse_v4(text), [Group { interface: 2, address: Ipv4Addr::new(224, 0, 0, 251).into() }]);
        let text = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n2    eth0            ff0200000000000000000001ff000001     1 00000004 0\n2    eth0            ff0200000000000000000000000000fb     1 00000004 0\n";
        let mdns: Ipv6Addr = "ff02::fb".parse().expect("an address");
        assert_eq!(parse_v6(text), [Group { interface: 2, address: mdns.into() }]);
    }
}
