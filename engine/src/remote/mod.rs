//! Pages over a connection, between two machines or two programs of one: what CRIU calls a page server.
//!
//! - [`protocol`]: what is said, byte for byte.

pub mod protocol;
