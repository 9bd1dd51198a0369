//! Pages over a connection, between two machines or two programs of one: what CRIU calls a page server.
//!
//! - [`protocol`]: what is said, byte for byte;
//! - [`connection`]: connecting, accepting, and waiting no longer than is good;
//! - [`sink`]: a dump that sends its pages away;
//! - [`server`]: who takes them, and [`store`]: how they become images.

pub mod connection;
pub mod protocol;
pub mod server;
pub mod sink;
pub mod store;
