//! A netlink client that lists and creates objects of the calling thread's network namespace (netlink(7), rtnetlink(7)).
//!
//! A message is a header of 16 bytes (length, type, flags, sequence, port), a body, and attributes (length, type, value),
//! everything aligned to 4 bytes and in the machine's byte order.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::{NETFILTER, SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with,
};

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// Make the object if there is none.
pub const NLM_F_CREATE: u16 = 0x400;
/// The list changed while it was read.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// How often a list that changes is read again.
const ATTEMPTS: usize = 8;

/// One message: its type, and what follows the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub kind: u16,
    /// Flags of the header.
    pub flags: u16,
    /// Body and attributes.
    pub payload: Vec<u8>,
}

impl Message {
    /// The whole message, as it goes over a socket.
    pub fn to_bytes(&self, sequence: u32) -> Vec<u8> {
        let mut bytes = ((HEADER + self.payload.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(&self.payload);
        bytes.resize(align(bytes.len()), 0);
        bytes
    }

    /// The messages that `bytes` consist of; none if their lengths do not add up.
    pub fn parse_all(mut bytes: &[u8]) -> Option<Vec<Self>> {
        let mut messages = Vec::new();
        while !bytes.is_empty() {
            let length = word(bytes, 0)? as usize;
            let payload = bytes.get(HEADER..length)?.to_vec();
            messages.push(Self { kind: half(bytes, 4)?, flags: half(bytes, 6)?, payload });
            bytes = bytes.get(align(length)..).unwrap_or_default();
        }
        Some(messages)
    }

    /// The value of an attribute; attributes begin after a body of `body` bytes.
    pub fn attribute(&self, body: usize, kind: u16) -> Option<&[u8]> {
        let mut bytes = self.payload.get(align(body)..)?;
        while bytes.len() >= 4 {
            let length = usize::from(half(bytes, 0)?);
            let value = bytes.get(4..length)?;
            // The two highest bits are flags.
            if half(bytes, 2)? & 0x3fff == kind {
                return Some(value);
            }
            bytes = bytes.get(align(length)..).unwrap_or_default();
        }
        None
    }

    /// The 32-bit word at `offset` of the payload.
    pub fn word(&self, offset: usize) -> Option<u32> {
        word(&self.payload, offset)
    }
}

fn align(length: usize) -> usize {
    (length + 3) & !3
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(offset..offset + 2)?.try_into().ok()?))
}

/// A netlink socket in the namespace of the thread that opened it.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// One for links, addresses, routes and rules.
    pub fn route() -> io::Result<Self> {
        Self::open(None)
    }

    /// One for netfilter.
    pub fn netfilter() -> io::Result<Self> {
        Self::open(Some(NETFILTER))
    }

    /// One for sockets (sock_diag(7)).
    pub fn diagnostics() -> io::Result<Self> {
        Self::open(Some(SOCK_DIAG))
    }

    fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// All objects of a kind: the answers to the dump request `kind` with `body`.
    ///
    /// # Errors
    /// The kernel's answer, or those of the socket.
    pub fn dump(&mut self, kind: u16, body: &[u8]) -> io::Result<Vec<Message>> {
        for _ in 0..ATTEMPTS {
            self.send(&Message { kind, flags: NLM_F_REQUEST | NLM_F_DUMP, payload: body.to_vec() })?;
            let mut list = Vec::new();
            while !self.receive(&mut list)? {}
            let whole = list.iter().all(|message| message.flags & NLM_F_DUMP_INTR == 0);
            if whole {
                return Ok(list);
            }
        }
        Err(io::Error::other("the kernel's list changes faster than it can be read"))
    }

    /// Has the kernel carry out a request, and waits for its answer.
    ///
    /// # Errors
    /// The kernel's answer, or those of the socket.
    pub fn request(&mut self, kind: u16, flags: u16, payload: &[u8]) -> io::Result<()> {
        self.send(&Message { kind, flags: NLM_F_REQUEST | NLM_F_ACK | flags, payload: payload.to_vec() })?;
        while !self.receive(&mut Vec::new())? {}
        Ok(())
    }

    fn send(&mut self, message: &Message) -> io::Result<()> {
        self.sequence += 1;
        let bytes = message.to_bytes(self.sequence);
        sendto(&self.socket, &bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        Ok(())
    }

    /// Appends the next messages to `list`; tells whether the answer ends with them.
    fn receive(&mut self, list: &mut Vec<Message>) -> io::Result<bool> {
        let mut buffer = vec![0; 64 << 10];
        let (_, length) = recv(&self.socket, &mut buffer[..], RecvFlags::TRUNC)?;
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "a netlink answer is not as netlink(7) says");
        for message in buffer.get(..length).and_then(Message::parse_all).ok_or_else(malformed)? {
            match message.kind {
                NLMSG_DONE => return Ok(true),
                NLMSG_ERROR => match message.word(0).ok_or_else(malformed)? as i32 {
                    0 => return Ok(true),
                    error => return Err(io::Error::from_raw_os_error(-error)),
                },
                _ => list.push(message),
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_back_as_written() {
        let payload = [1, 2, 3, 4, 9, 0, 3, 0x80, b'l', b'o', b'o', b'p', 0, 0, 0, 0, 6, 0, 7, 0, 5, 5, 0, 0].to_vec();
        let message = Message { kind: 20, flags: 2, payload };
        let bytes = [message.to_bytes(1), message.to_bytes(2)].concat();
        assert_eq!(Message::parse_all(&bytes), Some(vec![message.clone(), message.clone()]));
        assert_eq!(message.attribute(4, 3), Some(&b"loop\0"[..]));
        assert_eq!((message.attribute(4, 7), message.attribute(4, 8)), (Some(&[5, 5][..]), None));
    }

    #[test]
    fn false_lengths_end_the_parsing() {
        let bytes = Message { kind: 1, flags: 0, payload: vec![0; 8] }.to_bytes(0);
        for (length, valid) in [(0u32, false), (15, false), (16, false), (24, true), (25, false), (u32::MAX, false)] {
            let mut bytes = bytes.clone();
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            // 16 leaves eight bytes that are no message.
            assert_eq!(Message::parse_all(&bytes).is_some(), valid, "{length}");
        }
        let message = Message { kind: 1, flags: 0, payload: vec![200, 0, 1, 0, 0, 0] };
        assert_eq!(message.attribute(0, 1), None);
    }

    #[test]
    fn lists_the_loopback() {
        let links = Netlink::route().and_then(|mut socket| socket.dump(18, &[0; 16])).expect("links");
        assert!(links.iter().any(|link| link.attribute(16, 3) == Some(b"lo\0")));
    }

    #[test]
    fn the_kernels_refusal_is_an_error() {
        let mut socket = Netlink::route().expect("a socket");
        assert!(socket.request(20, 0, &[0; 8]).is_err());
    }
}
