//! The socket to a client: one message a packet (`SOCK_SEQPACKET`, unix(7)).
//!
//! A request longer than [`LONGEST_REQUEST`] is refused before it is read. Descriptors that a client attaches are not
//! received, so the kernel closes them. Answers stay below what the shortest reader among the clients takes, 1024 bytes: the
//! sentence in them is cut, and the log has it whole.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;
use rustix::net::{self, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::message::{Answer, Request};

/// Longest request that is read, in bytes. runc's longest have some hundred external mounts.
const LONGEST_REQUEST: usize = 1 << 20;

/// Longest sentence in an answer, in bytes.
const LONGEST_SENTENCE: usize = 700;

/// Why no request came.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the sentences say it")]
pub enum ReceiveError {
    #[error("the client closed the connection")]
    Closed,
    #[error("the request has {length} bytes, and more than {LONGEST_REQUEST} are not read")]
    TooLong { length: usize },
    #[error("the request is no message of CRIU's RPC: {0}")]
    Damaged(#[from] prost::DecodeError),
    #[error("cannot read the request: {0}")]
    Read(#[from] io::Error),
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
}

impl Connection {
    /// Takes the socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Waits for a request.
    ///
    /// # Errors
    /// [`ReceiveError`].
    pub fn receive(&self) -> Result<Request, ReceiveError> {
        let length = retry(|| {
            let (_, length) = net::recv(&self.socket, &mut [0u8; 1][..], RecvFlags::PEEK | RecvFlags::TRUNC)?;
            Ok(length)
        })?;
        if length == 0 {
            return Err(ReceiveError::Closed);
        }
        if length > LONGEST_REQUEST {
            // Off the queue, so that the next one can be read.
            retry(|| net::recv(&self.socket, &mut [0u8; 1][..], RecvFlags::empty()).map(drop))?;
            return Err(ReceiveError::TooLong { length });
        }
        let mut bytes = vec![0; length];
        let (read, _) = retry(|| net::recv(&self.socket, &mut bytes[..], RecvFlags::empty()))?;
        bytes.truncate(read);
        Ok(Request::decode(&bytes[..])?)
    }

    /// Sends an answer.
    ///
    /// # Errors
    /// The client is gone, or does not read.
    pub fn send(&self, answer: &Answer) -> io::Result<()> {
        self.send_with(answer, None)
    }

    /// Sends an answer with a descriptor (`SCM_RIGHTS`).
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_with(&self, answer: &Answer, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = answer.encode_to_vec();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        // A client that is gone is an error here and no signal.
        retry(|| net::sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).map(drop))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

/// `sentence` as one line that fits into an answer.
pub fn sentence_for_answer(sentence: &str) -> String {
    let mut line = sentence.lines().collect::<Vec<_>>().join("; ");
    if line.len() > LONGEST_SENTENCE {
        let end = (0..=LONGEST_SENTENCE).rev().find(|end| line.is_char_boundary(*end)).unwrap_or(0);
        line.truncate(end);
        line.push('…');
    }
    line
}
