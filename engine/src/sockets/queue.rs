//! Packets that wait in a socket's receive queue (`sk-queues.img`).
//!
//! `MSG_PEEK` with `SO_PEEK_OFF` (socket(7), Linux 3.4) reads them one after the other and leaves them there. What was shut or closed
//! after it was written can still be read. A packet is put back by sending it from the other end.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::files::Problem;
use crate::files::session::{Done, Session, Temporary};
use crate::images::sockets::SkPacketEntry;
use crate::sys::sockopt;

/// No packet is larger than a send buffer may be; this one is never reached unless an administrator raised the limits.
const LARGEST: usize = 8 << 20;
/// Most packets of one queue.
const MOST: usize = 1 << 16;

/// A waiting packet; of a stream, any part of it.
pub type Packet = (SkPacketEntry, Vec<u8>);

/// Copies the receive queue of socket `id`.
pub fn collect_queue(id: u32, fd: BorrowedFd<'_>, stream: bool, waiting: u32) -> Result<Vec<Packet>, Problem> {
    let failed = |error: &dyn std::fmt::Display| Problem::unreadable("its receive queue", error);
    sockopt::set_peek_offset(fd, 0).map_err(|errno| failed(&errno))?;
    let packets = peek_all(id, fd, stream, waiting);
    sockopt::set_peek_offset(fd, -1).map_err(|errno| failed(&errno))?;
    packets
}

fn peek_all(id: u32, fd: BorrowedFd<'_>, stream: bool, waiting: u32) -> Result<Vec<Packet>, Problem> {
    let mut packets = Vec::new();
    // The length is that of the first packet for datagrams, so the rest may be longer.
    let mut buffer = vec![0; (waiting as usize).clamp(256 << 10, LARGEST)];
    while packets.len() < MOST {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC | RecvFlags::TRUNC;
        let received = match recvmsg(fd, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags) {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN) => break,
            Err(error) => return Err(Problem::unreadable("its receive queue", error)),
        };
        // Descriptors that come with a packet are duplicates, closed as they are dropped.
        if control.drain().any(|message| matches!(message, RecvAncillaryMessage::ScmRights(_))) {
            return Err(Problem::new(
                "descriptors wait in its receive queue (SCM_RIGHTS), which cannot be saved yet",
                "try again when the program has received them",
            ));
        }
        if received.bytes == 0 && stream {
            break;
        }
        let Some(bytes) = buffer.get(..received.bytes) else {
            return Err(Problem::new(
                format!("a packet of {} bytes waits in it", received.bytes),
                "have the program read it",
            ));
        };
        packets.push((SkPacketEntry { id_for: id, length: bytes.len() as u32, scm: Vec::new() }, bytes.to_vec()));
    }
    Ok(packets)
}

/// Puts packets back into the queue of the socket that `other_end` is connected to.
pub fn restore_queue(session: &mut Session<'_>, other_end: Temporary, stream: bool, packets: &[Vec<u8>]) -> Done {
    for packet in packets {
        if stream { session.write(other_end, packet)? } else { session.send(other_end, packet)? }
    }
    Ok(())
}
