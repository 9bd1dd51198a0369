//! getsockopt(2), for the options that `rustix` and `nix` do not read.
#![allow(unsafe_code)]

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use super::check;

/// Returns the current filter's instructions (Linux 3.8); the length is counted in instructions.
const SO_GET_FILTER: i32 = 26;

/// Reads up to `len` bytes of an option; returns as many as the kernel wrote.
pub fn bytes(fd: BorrowedFd<'_>, level: i32, name: i32, len: usize) -> nix::Result<Vec<u8>> {
    let mut value = vec![0u8; len];
    let mut written = len as libc::socklen_t;
    // SAFETY: the kernel writes at most `written` bytes, which is how long the buffer is, and says how many.
    check(i64::from(unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut written)
    }))?;
    value.truncate(written as usize);
    Ok(value)
}

/// Reads an option that is a number.
pub fn number(fd: BorrowedFd<'_>, level: i32, name: i32) -> nix::Result<i32> {
    let value = bytes(fd, level, name, 4)?;
    Ok(i32::from_ne_bytes(value.try_into().map_err(|_| Errno::EINVAL)?))
}

/// The instructions of a classic packet filter, each of 8 bytes; `EACCES` for a program of another kind.
pub fn filter(fd: BorrowedFd<'_>) -> nix::Result<Vec<[u8; 8]>> {
    /// `BPF_MAXINSNS`.
    const MOST: usize = 4096;
    let mut count: libc::socklen_t = 0;
    // SAFETY: with a length of 0 the kernel writes nothing but the length.
    check(i64::from(unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, SO_GET_FILTER, std::ptr::null_mut(), &raw mut count)
    }))?;
    if count == 0 {
        return Ok(Vec::new());
    }
    let mut instructions = vec![[0u8; 8]; MOST];
    count = MOST as libc::socklen_t;
    // SAFETY: the kernel writes at most `count` instructions of 8 bytes, which is how many the buffer holds.
    check(i64::from(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_GET_FILTER,
            instructions.as_mut_ptr().cast(),
            &raw mut count,
        )
    }))?;
    instructions.truncate(count as usize);
    Ok(instructions)
}

/// The inode of the network namespace that a socket belongs to (`SIOCGSKNS`, Linux 4.9).
pub fn network_namespace(fd: BorrowedFd<'_>) -> nix::Result<u64> {
    const SIOCGSKNS: u64 = 0x894c;
    // SAFETY: takes no argument; the result is a new descriptor, which is owned from here on.
    let namespace = unsafe {
        use std::os::fd::{FromRawFd, OwnedFd};
        OwnedFd::from_raw_fd(check(i64::from(libc::ioctl(fd.as_raw_fd(), SIOCGSKNS as _)))? as i32)
    };
    let stat = rustix::fs::fstat(&namespace).map_err(|error| Errno::from_raw(error.raw_os_error()))?;
    Ok(stat.st_ino)
}

/// Whether a socket is a member of a multicast group on an interface (`MCAST_MSFILTER`, RFC 3678).
pub fn is_member(fd: BorrowedFd<'_>, interface: u32, group: IpAddr) -> bool {
    const MCAST_MSFILTER: i32 = 48;
    /// `struct group_filter` without sources: interface, group, mode, number of sources.
    const GROUP: usize = 8;
    const LEN: usize = GROUP + size_of::<libc::sockaddr_storage>() + 8;
    let mut filter = [0u8; LEN];
    filter[..4].copy_from_slice(&interface.to_ne_bytes());
    let (level, family) = match group {
        IpAddr::V4(address) => {
            filter[GROUP + 4..GROUP + 8].copy_from_slice(&address.octets());
            (libc::SOL_IP, libc::AF_INET)
        }
        IpAddr::V6(address) => {
            filter[GROUP + 8..GROUP + 24].copy_from_slice(&address.octets());
            (libc::SOL_IPV6, libc::AF_INET6)
        }
    };
    filter[GROUP..GROUP + 2].copy_from_slice(&(family as u16).to_ne_bytes());
    let mut len = LEN as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `len` bytes, which is how long the array is.
    let answer =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, MCAST_MSFILTER, filter.as_mut_ptr().cast(), &raw mut len) };
    check(i64::from(answer)).is_ok()
}

/// Sets where `MSG_PEEK` reads next; -1 for the start, always (`SO_PEEK_OFF`, Linux 3.4).
pub fn set_peek_offset(fd: BorrowedFd<'_>, offset: i32) -> nix::Result<()> {
    // SAFETY: the option is a number of four bytes, which is what is passed.
    check(i64::from(unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, (&raw const offset).cast(), 4)
    }))
    .map(drop)
}

/// The socket's own address (getsockname(2)) or its peer's (getpeername(2)), as the kernel writes it.
pub fn address(fd: BorrowedFd<'_>, peer: bool) -> nix::Result<Vec<u8>> {
    let mut bytes = vec![0u8; size_of::<libc::sockaddr_storage>()];
    let mut len = bytes.len() as libc::socklen_t;
    let call = if peer { libc::getpeername } else { libc::getsockname };
    // SAFETY: the kernel writes at most `len` bytes, which is how long the buffer is, and says how many it had.
    check(i64::from(unsafe { call(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut len) }))?;
    bytes.truncate(len as usize);
    Ok(bytes)
}
