//! A page server as the client of one names it: `--page-server --address --port`, `--ps-socket`, and runc's `--page-server ADDRESS:PORT`.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ferry_engine::dump::DumpOptions;
use ferry_engine::images::{FolderSink, Sink};
use ferry_engine::remote::connection::Connection;
use ferry_engine::remote::sink::PageServerSink;
use ferry_engine::sys::descriptor;

use super::options::Options;
use crate::failure::Failure;

/// Where a page server is.
#[derive(Debug)]
pub enum Server {
    /// At this host and port.
    At(String, u16),
    /// At the other end of this socket.
    Connected(OwnedFd),
}

impl Server {
    /// What options say. A descriptor among them is taken.
    ///
    /// # Errors
    /// When they do not say enough.
    pub fn of(options: &Options) -> Result<Self, Failure> {
        if let Some(number) = options.ps_socket {
            return socket(number).map(Self::Connected);
        }
        match (&options.address, options.port) {
            (Some(address), Some(port)) if port > 0 => Ok(Self::At(address.clone(), port)),
            _ => Err(Failure::new("--page-server needs --address and --port of the server, or --ps-socket")),
        }
    }

    /// What runc calls it: the address, in brackets if it has colons, and the port.
    ///
    /// # Errors
    /// When it is not so.
    #[cfg_attr(not(feature = "oci"), allow(dead_code, reason = "runc's option"))]
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let parts = text.rsplit_once(':').and_then(|(address, port)| {
            let bare = address.strip_prefix('[').and_then(|address| address.strip_suffix(']'));
            let address = bare.or((!address.contains(':')).then_some(address))?;
            Some((address, port.parse::<u16>().ok()?))
        });
        match parts {
            Some((address, port)) if !address.is_empty() && port > 0 => Ok(Self::At(address.to_owned(), port)),
            _ => Err(Failure::new(format!("--page-server {text}: give ADDRESS:PORT, as in 10.0.0.2:9876"))),
        }
    }
}

/// The socket that `--ps-socket` names.
///
/// # Errors
/// It is not open.
pub fn socket(number: i32) -> Result<OwnedFd, Failure> {
    descriptor::take(number).map_err(|errno| Failure::from(errno).context(format!("--ps-socket {number}")))
}

/// Has the pages of a dump into `local` sent to `server`, if there is one. Pages that are left to earlier images are agreed on with it.
///
/// # Errors
/// It cannot be reached.
pub fn send_to(server: Option<Server>, local: FolderSink, options: &mut DumpOptions) -> Result<Box<dyn Sink>, Failure> {
    let (connection, inherited) = match server {
        None => return Ok(Box::new(local)),
        Some(Server::Connected(socket)) => {
            (Connection::over(socket, "the other end of --ps-socket".to_owned(), options.cancel.clone()), true)
        }
        Some(Server::At(host, port)) => {
            let connection = Connection::open(&host, port, options.cancel.clone()).map_err(|error| {
                Failure::from(error).context(format!(
                    "cannot connect to the page server at {host} port {port}: start one there with criu page-server"
                ))
            })?;
            (connection, false)
        }
    };
    tracing::info!("pages go to the page server at {}", connection.peer());
    let mut sink = PageServerSink::new(local, connection, inherited);
    if let Some(parent) = options.parent.as_mut().and_then(Arc::get_mut) {
        sink.agree_on(parent)?;
    }
    Ok(Box::new(sink))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_named_as_runc_does_it() {
        for (text, address, port) in
            [("10.0.0.2:9876", "10.0.0.2", 9876), ("[fe80::1]:1", "fe80::1", 1), ("h:2", "h", 2)]
        {
            let Ok(Server::At(found, number)) = Server::parse(text) else { panic!("{text}") };
            assert_eq!((found.as_str(), number), (address, port));
        }
        for bad in ["", "h", ":1", "h:", "h:0", "h:65536", "fe80::1:1", "h:x"] {
            assert!(Server::parse(bad).is_err(), "{bad}");
        }
    }
}
