//! `apparmor.img`: AppArmor policy loaded inside the container.

/// The one entry of `apparmor.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ApparmorEntry {
    #[prost(message, repeated, tag = "1")]
    pub namespaces: Vec<AaNamespace>,
}

/// A policy namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AaNamespace {
    #[prost(string, required, tag = "1")]
    pub name: String,
    #[prost(message, repeated, tag = "2")]
    pub policies: Vec<AaPolicy>,
    #[prost(message, repeated, tag = "3")]
    pub namespaces: Vec<AaNamespace>,
}

/// A policy in binary form.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AaPolicy {
    #[prost(string, required, tag = "1")]
    pub name: String,
    #[prost(bytes = "vec", required, tag = "2")]
    pub blob: Vec<u8>,
}
