//! CRIU's RPC: `criu swrk FD`, which a client starts for itself, and `criu service`, which serves whoever connects.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `message` | the messages |
//! | `connection` | the socket: framing, limits |
//! | `peer` | who the client is, its descriptors, what it may ask for |
//! | `request` | the options of a request, as words of the command line |
//! | `session` | requests and their answers, and the process's status |
//! | `notify` | telling the client of events |
//! | `service` | listening, one process a client |
//!
//! Invariant: `swrk` never writes to its standard descriptors. runc hands them to the container that is restored.

mod connection;
mod message;
mod notify;
mod peer;
mod request;
mod service;
mod session;

use std::process::ExitCode;

use ferry_engine::sys::descriptor;

use super::options::Options;
use crate::failure::{Failure, Outcome};
use connection::Connection;
use session::Session;

pub use service::service;

/// Serves the one client at the other end of the socket that has the given number.
pub fn swrk(options: &Options) -> Outcome {
    let number = options.rest.first().and_then(|number| number.to_str()?.parse().ok());
    let number = number.ok_or_else(|| Failure::new("swrk needs the number of the descriptor of its socket"))?;
    let socket = descriptor::take(number)
        .map_err(|errno| Failure::new(format!("swrk {number}: descriptor {number} cannot be used: {errno}")))?;
    Ok(serve(Connection::new(socket), true))
}

/// Serves one client. From here on nothing is printed.
fn serve(connection: Connection, starter: bool) -> ExitCode {
    std::panic::set_hook(Box::new(|panic| tracing::error!("ferry has a fault: {panic}")));
    match Session::begin(connection, starter) {
        Ok(session) => session.serve(),
        Err(failure) => {
            tracing::error!("{failure}");
            ExitCode::FAILURE
        }
    }
}
