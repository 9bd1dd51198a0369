//! A client of CRIU's RPC: `ferry criu swrk` and `ferry criu service`, over their sockets.
//!
//! It encodes and decodes by itself, field by field with the numbers of CRIU's protocol, so that the program under test
//! is not tested with its own idea of the messages.

use crate::processes::wait_for;
use crate::{Outcome, Place, programs};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Request types.
#[allow(missing_docs, reason = "the protocol's names")]
pub mod kind {
    pub const EMPTY: u64 = 0;
    pub const DUMP: u64 = 1;
    pub const RESTORE: u64 = 2;
    pub const CHECK: u64 = 3;
    pub const PRE_DUMP: u64 = 4;
    pub const PAGE_SERVER: u64 = 5;
    pub const NOTIFY: u64 = 6;
    pub const CPUINFO_DUMP: u64 = 7;
    pub const CPUINFO_CHECK: u64 = 8;
    pub const FEATURE_CHECK: u64 = 9;
    pub const VERSION: u64 = 10;
    pub const WAIT_PID: u64 = 11;
    pub const PAGE_SERVER_CHLD: u64 = 12;
    pub const SINGLE_PRE_DUMP: u64 = 13;
}

/// The value of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
}

/// A message: fields with their numbers, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message(Vec<(u64, Value)>);

impl Message {
    /// A request.
    pub fn request(kind: u64) -> Self {
        Self::default().number(1, kind)
    }

    /// Adds a number, a truth value, or -1 as `u64::MAX`.
    pub fn number(mut self, field: u64, value: u64) -> Self {
        self.0.push((field, Value::Number(value)));
        self
    }

    /// Adds a string.
    pub fn text(mut self, field: u64, value: &str) -> Self {
        self.0.push((field, Value::Bytes(value.as_bytes().to_vec())));
        self
    }

    /// Adds a message.
    pub fn message(mut self, field: u64, value: &Self) -> Self {
        self.0.push((field, Value::Bytes(value.encode())));
        self
    }

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (field, value) in &self.0 {
            match value {
                Value::Number(number) => {
                    put_number(&mut bytes, field << 3);
                    put_number(&mut bytes, *number);
                }
                Value::Bytes(content) => {
                    put_number(&mut bytes, field << 3 | 2);
                    put_number(&mut bytes, content.len() as u64);
                    bytes.extend_from_slice(content);
                }
            }
        }
        bytes
    }

    fn decode(mut bytes: &[u8]) -> Option<Self> {
        let mut message = Self::default();
        while !bytes.is_empty() {
            let tag = take_number(&mut bytes)?;
            let value = match tag & 7 {
                0 => Value::Number(take_number(&mut bytes)?),
                2 => {
                    let length = usize::try_from(take_number(&mut bytes)?).ok()?;
                    let (content, rest) = bytes.split_at_checked(length)?;
                    bytes = rest;
                    Value::Bytes(content.to_vec())
                }
                _ => return None,
            };
            message.0.push((tag >> 3, value));
        }
        Some(message)
    }

    fn get(&self, field: u64) -> Option<&Value> {
        self.0.iter().find(|(found, _)| *found == field).map(|(_, value)| value)
    }

    /// A number in it.
    pub fn get_number(&self, field: u64) -> Option<u64> {
        self.get(field).and_then(|value| if let Value::Number(number) = value { Some(*number) } else { None })
    }

    /// A string in it.
    pub fn get_text(&self, field: u64) -> Option<String> {
        let Value::Bytes(bytes) = self.get(field)? else { return None };
        String::from_utf8(bytes.clone()).ok()
    }

    /// A message in it.
    pub fn get_message(&self, field: u64) -> Option<Self> {
        let Value::Bytes(bytes) = self.get(field)? else { return None };
        Self::decode(bytes)
    }

    /// Its type and whether it tells success: fields of every answer.
    pub fn verdict(&self) -> (Option<u64>, bool) {
        (self.get_number(1), self.get_number(2) == Some(1))
    }

    /// The sentence of a failure.
    pub fn reason(&self) -> String {
        self.get_text(9).unwrap_or_default()
    }

    /// The error number of a failure.
    pub fn errno(&self) -> Option<i32> {
        self.get_number(7).map(|number| number as i32)
    }
}

fn put_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for place in 0..10 {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(first & 0x7f) << (7 * place);
        if first & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// A connection.
pub struct Connection(OwnedFd);

impl Connection {
    /// To a service; with the identity of the calling thread.
    pub fn to(path: &Path) -> Outcome<Self> {
        let failed = |error: rustix::io::Errno| format!("cannot connect to {}: {error}", path.display());
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let socket = socket.map_err(failed)?;
        net::connect(&socket, &SocketAddrUnix::new(path).map_err(failed)?).map_err(failed)?;
        Ok(Self(socket))
    }

    /// Sends a packet.
    pub fn send_bytes(&self, bytes: &[u8]) -> Outcome {
        net::send(&self.0, bytes, SendFlags::NOSIGNAL).map(drop).map_err(|error| format!("cannot send: {error}"))
    }

    /// Sends a message.
    pub fn send(&self, message: &Message) -> Outcome {
        self.send_bytes(&message.encode())
    }

    /// Lets packets be as long as they like.
    pub fn widen(&self) -> Outcome {
        let set = nix::sys::socket::setsockopt(&self.0, nix::sys::socket::sockopt::SndBufForce, &(4 << 20));
        set.map_err(|error| format!("cannot widen the socket: {error}"))
    }

    /// The next message; none when the other side has closed.
    pub fn receive(&self) -> Outcome<Option<Message>> {
        // What the shortest reader among CRIU's clients takes.
        let mut bytes = [0; 1024];
        let (length, real) = net::recv(&self.0, &mut bytes[..], RecvFlags::TRUNC).map_err(|error| error.to_string())?;
        if real > length {
            return Err(format!("an answer of {real} bytes, longer than clients read"));
        }
        if length == 0 {
            return Ok(None);
        }
        Message::decode(&bytes[..length]).map(Some).ok_or_else(|| "an answer that is no message".to_owned())
    }

    /// Sends a request; the answer to it, and the names of the events before it, each of which `acknowledge` lets pass or not.
    pub fn ask_telling(
        &self,
        request: &Message,
        mut acknowledge: impl FnMut(&str) -> bool,
    ) -> Outcome<(Message, Vec<String>)> {
        self.send(request)?;
        let mut events = Vec::new();
        loop {
            let answer = self.receive()?.ok_or_else(|| format!("closed without an answer, after {events:?}"))?;
            let Some(event) = answer.get_message(5).filter(|_| answer.get_number(1) == Some(kind::NOTIFY)) else {
                return Ok((answer, events));
            };
            let name = event.get_text(1).unwrap_or_default();
            let passes = acknowledge(&name);
            let pid = event.get_number(2).map(|pid| format!(" {pid}")).unwrap_or_default();
            events.push(format!("{name}{pid}"));
            self.send(&Message::request(kind::NOTIFY).number(3, passes.into()))?;
        }
    }

    /// Sends a request that is answered at once.
    pub fn ask(&self, request: &Message) -> Outcome<Message> {
        Ok(self.ask_telling(request, |_| true)?.0)
    }
}

/// `ferry criu swrk` of this process.
pub struct Worker {
    /// Its connection. Taken away to close it.
    pub connection: Option<Connection>,
    child: Child,
}

impl Worker {
    /// Starts it.
    pub fn start() -> Outcome<Self> {
        let (ours, theirs) = net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| format!("cannot make a pair of sockets: {error}"))?;
        let mut command = Command::new(programs::ferry()?);
        command.args(["criu", "swrk", "0"]).stdin(theirs).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|error| format!("cannot start criu swrk: {error}"))?;
        Ok(Self { connection: Some(Connection(ours)), child })
    }

    /// Its connection.
    pub fn connection(&self) -> &Connection {
        self.connection.as_ref().expect("taken away only at the end")
    }

    /// Closes the connection, and waits for its end: the status. It may not have printed anything.
    pub fn end(mut self) -> Outcome<Option<i32>> {
        self.connection = None;
        let output = self.child.wait_with_output().map_err(|error| error.to_string())?;
        let printed = programs::said(&output);
        if printed.is_empty() { Ok(output.status.code()) } else { Err(format!("criu swrk printed: {printed}")) }
    }

    /// One request to a process of its own: the answer, the events and the status.
    pub fn ask(
        request: &Message,
        acknowledge: impl FnMut(&str) -> bool,
    ) -> Outcome<(Message, Vec<String>, Option<i32>)> {
        let worker = Self::start()?;
        let (answer, events) = worker.connection().ask_telling(request, acknowledge)?;
        Ok((answer, events, worker.end()?))
    }
}

/// `ferry criu service`, ended when dropped.
pub struct Service {
    child: Child,
    /// Its socket.
    pub path: PathBuf,
}

impl Service {
    /// Starts it, and waits until it listens.
    pub fn start(place: &Place) -> Outcome<Self> {
        let path = place.path("service.socket");
        let mut command = Command::new(programs::ferry()?);
        command.arg0("criu").args(["service", "-v4", "-o", "service.log", "-W"]).arg(place.path(""));
        command.args(["--address", "service.socket", "--pidfile", "service.pid"]);
        let child =
            command.stdin(Stdio::null()).spawn().map_err(|error| format!("cannot start criu service: {error}"))?;
        let service = Self { child, path };
        let written = place.path("service.pid");
        wait_for("the service to listen", || std::fs::read(&written).is_ok_and(|pid| !pid.is_empty()))?;
        Ok(service)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
