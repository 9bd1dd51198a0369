//! The options of `SOL_SOCKET` (socket(7)).
//!
//! The kernel doubles buffer sizes when they are set and tells the doubled value; `SO_BUF_LOCK` (Linux 5.14) says
//! whether they were set at all.

use std::os::fd::BorrowedFd;

use crate::files::Problem;
use crate::files::session::{Done, Session, Temporary};
use crate::images::sockets::SkOptsEntry;
use crate::sys::sockopt;

const SOL_SOCKET: i32 = libc::SOL_SOCKET;
/// Numbers that libc lacks.
const SO_BUF_LOCK: i32 = 72;

/// Options that are on or off: name, and where images have them.
type Switch = (i32, fn(&mut SkOptsEntry) -> &mut Option<bool>);
const SWITCHES: [Switch; 5] = [
    (libc::SO_DONTROUTE, |opts| &mut opts.so_dontroute),
    (libc::SO_NO_CHECK, |opts| &mut opts.so_no_check),
    (libc::SO_BROADCAST, |opts| &mut opts.so_broadcast),
    (libc::SO_KEEPALIVE, |opts| &mut opts.so_keepalive),
    (libc::SO_REUSEPORT, |opts| &mut opts.so_reuseport),
];
/// The same, of local sockets only.
const LOCAL_SWITCHES: [Switch; 2] =
    [(libc::SO_PASSCRED, |opts| &mut opts.so_passcred), (libc::SO_PASSSEC, |opts| &mut opts.so_passsec)];

/// Reads the options.
pub fn collect_options(fd: BorrowedFd<'_>, family: i32) -> Result<SkOptsEntry, Problem> {
    collect(fd, family).map_err(|errno| match errno {
        nix::errno::Errno::EACCES => Problem::new(
            "an eBPF program is attached to the socket, which cannot be saved",
            "have the program detach it",
        ),
        errno => Problem::unreadable("its options", errno),
    })
}

fn collect(fd: BorrowedFd<'_>, family: i32) -> nix::Result<SkOptsEntry> {
    let number = |name| sockopt::number(fd, SOL_SOCKET, name);
    let time = |name| -> nix::Result<(u64, u64)> {
        let bytes = sockopt::bytes(fd, SOL_SOCKET, name, 16)?;
        let word =
            |at: usize| bytes.get(at..at + 8).map_or(0, |word| u64::from_ne_bytes(word.try_into().unwrap_or_default()));
        Ok((word(0), word(8)))
    };
    let ((so_snd_tmo_sec, so_snd_tmo_usec), (so_rcv_tmo_sec, so_rcv_tmo_usec)) =
        (time(libc::SO_SNDTIMEO)?, time(libc::SO_RCVTIMEO)?);
    let linger = sockopt::bytes(fd, SOL_SOCKET, libc::SO_LINGER, 8)?;
    let linger: Vec<u32> =
        linger.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap_or_default())).collect();
    let device = sockopt::bytes(fd, SOL_SOCKET, libc::SO_BINDTODEVICE, libc::IFNAMSIZ)?;
    let device = String::from_utf8_lossy(device.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
    let mark = number(libc::SO_MARK)? as u32;
    let mut opts = SkOptsEntry {
        so_sndbuf: number(libc::SO_SNDBUF)? as u32,
        so_rcvbuf: number(libc::SO_RCVBUF)? as u32,
        so_snd_tmo_sec,
        so_snd_tmo_usec,
        so_rcv_tmo_sec,
        so_rcv_tmo_usec,
        reuseaddr: Some(number(libc::SO_REUSEADDR)? != 0),
        so_priority: Some(number(libc::SO_PRIORITY)? as u32),
        so_rcvlowat: Some(number(libc::SO_RCVLOWAT)? as u32),
        so_mark: (mark != 0).then_some(mark),
        so_oobinline: Some(u32::from(number(libc::SO_OOBINLINE)? != 0)),
        so_linger: linger.first().filter(|on| **on != 0).and_then(|_| linger.get(1).copied()),
        so_buf_lock: number(SO_BUF_LOCK).ok().map(|lock| lock as u32),
        so_bound_dev: (!device.is_empty()).then_some(device),
        so_filter: sockopt::filter(fd)?.into_iter().map(encode_instruction).collect(),
        ..SkOptsEntry::default()
    };
    let local = if family == libc::AF_UNIX { &LOCAL_SWITCHES[..] } else { &[] };
    for (name, field) in SWITCHES.iter().chain(local) {
        *field(&mut opts) = Some(number(*name)? != 0);
    }
    Ok(opts)
}

/// `struct sock_filter` as images have it.
fn encode_instruction(bytes: [u8; 8]) -> u64 {
    let [code0, code1, jump_true, jump_false, rest @ ..] = bytes;
    u64::from(u16::from_ne_bytes([code0, code1])) << 48
        | u64::from(jump_true) << 40
        | u64::from(jump_false) << 32
        | u64::from(u32::from_ne_bytes(rest))
}

fn decode_instruction(word: u64) -> [u8; 8] {
    let [code0, code1] = ((word >> 48) as u16).to_ne_bytes();
    let [k0, k1, k2, k3] = (word as u32).to_ne_bytes();
    [code0, code1, (word >> 40) as u8, (word >> 32) as u8, k0, k1, k2, k3]
}

/// Sets an option that is a number.
pub fn set_number(session: &mut Session<'_>, socket: Temporary, level: i32, name: i32, value: u32) -> Done {
    set_bytes(session, socket, level, name, &value.to_ne_bytes())
}

/// Sets any option.
pub fn set_bytes(session: &mut Session<'_>, socket: Temporary, level: i32, name: i32, value: &[u8]) -> Done {
    let before = [socket.number().into(), level as u64, name as u64];
    session.must_around("set an option of it", libc::SYS_setsockopt, &before, value, &[value.len() as u64])
}

/// Makes the send buffer large enough for whatever is to be queued before its options are restored.
pub fn widen_send_buffer(session: &mut Session<'_>, socket: Temporary) -> Done {
    set_number(session, socket, SOL_SOCKET, libc::SO_SNDBUFFORCE, i32::MAX as u32 / 2)
}

/// Sets the options, but for `SO_REUSEADDR`, which binding needs in its own way.
pub fn restore_options(session: &mut Session<'_>, socket: Temporary, opts: &SkOptsEntry) -> Done {
    let mut number = |name, value| set_number(session, socket, SOL_SOCKET, name, value);
    number(libc::SO_SNDBUFFORCE, opts.so_sndbuf / 2)?;
    number(libc::SO_RCVBUFFORCE, opts.so_rcvbuf / 2)?;
    for (name, value) in [
        (SO_BUF_LOCK, opts.so_buf_lock),
        (libc::SO_PRIORITY, opts.so_priority.filter(|priority| *priority != 0)),
        (libc::SO_RCVLOWAT, opts.so_rcvlowat.filter(|low| *low != 1)),
        (libc::SO_MARK, opts.so_mark),
        (libc::SO_OOBINLINE, opts.so_oobinline.filter(|on| *on != 0)),
    ] {
        if let Some(value) = value {
            number(name, value)?;
        }
    }
    let mut copy = opts.clone();
    for (name, field) in SWITCHES.iter().chain(&LOCAL_SWITCHES) {
        if *field(&mut copy) == Some(true) {
            number(*name, 1)?;
        }
    }
    if let Some(seconds) = opts.so_linger {
        set_bytes(session, socket, SOL_SOCKET, libc::SO_LINGER, &[1u32.to_ne_bytes(), seconds.to_ne_bytes()].concat())?;
    }
    for (name, seconds, microseconds) in [
        (libc::SO_SNDTIMEO, opts.so_snd_tmo_sec, opts.so_snd_tmo_usec),
        (libc::SO_RCVTIMEO, opts.so_rcv_tmo_sec, opts.so_rcv_tmo_usec),
    ] {
        if (seconds, microseconds) != (0, 0) {
            set_bytes(session, socket, SOL_SOCKET, name, &[seconds, microseconds].map(u64::to_ne_bytes).concat())?;
        }
    }
    if let Some(device) = &opts.so_bound_dev {
        set_bytes(session, socket, SOL_SOCKET, libc::SO_BINDTODEVICE, device.as_bytes())?;
    }
    if !opts.so_filter.is_empty() {
        let instructions: Vec<u8> = opts.so_filter.iter().flat_map(|word| decode_instruction(*word)).collect();
        let program = session.data(&instructions)?;
        let words = [opts.so_filter.len() as u64, program.0].map(u64::to_ne_bytes).concat();
        set_bytes(session, socket, SOL_SOCKET, libc::SO_ATTACH_FILTER, &words)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_instructions_survive() {
        let instruction = [0x15, 0x02, 3, 4, 5, 6, 7, 8];
        assert_eq!(encode_instruction(instruction) >> 32, 0x0215_0304);
        assert_eq!(decode_instruction(encode_instruction(instruction)), instruction);
    }
}
