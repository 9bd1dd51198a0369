//! aarch64 registers within [`super::core::CoreEntry`].

/// All machine state of an aarch64 thread.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ThreadInfoAarch64 {
    #[prost(uint64, required, tag = "1")]
    pub clear_tid_addr: u64,
    #[prost(uint64, required, tag = "2")]
    pub tls: u64,
    #[prost(message, required, tag = "3")]
    pub gpregs: UserAarch64RegsEntry,
    #[prost(message, required, tag = "4")]
    pub fpsimd: UserAarch64FpsimdContextEntry,
    #[prost(message, optional, tag = "5")]
    pub pac_keys: Option<PacKeys>,
}

/// General registers; `regs` is x0–x30.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UserAarch64RegsEntry {
    #[prost(uint64, repeated, packed = "false", tag = "1")]
    pub regs: Vec<u64>,
    #[prost(uint64, required, tag = "2")]
    pub sp: u64,
    #[prost(uint64, required, tag = "3")]
    pub pc: u64,
    #[prost(uint64, required, tag = "4")]
    pub pstate: u64,
}

/// Vector registers; `vregs` is 64 words, each register as high then low half, as CRIU orders them.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UserAarch64FpsimdContextEntry {
    #[prost(uint64, repeated, packed = "false", tag = "1")]
    pub vregs: Vec<u64>,
    #[prost(uint32, required, tag = "2")]
    pub fpsr: u32,
    #[prost(uint32, required, tag = "3")]
    pub fpcr: u32,
}

/// Pointer authentication keys.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PacKeys {
    #[prost(message, optional, tag = "6")]
    pub pac_address_keys: Option<PacAddressKeys>,
    #[prost(message, optional, tag = "7")]
    pub pac_generic_keys: Option<PacGenericKeys>,
}

/// Keys for addresses, and which are enabled.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PacAddressKeys {
    #[prost(uint64, required, tag = "1")]
    pub apiakey_lo: u64,
    #[prost(uint64, required, tag = "2")]
    pub apiakey_hi: u64,
    #[prost(uint64, required, tag = "3")]
    pub apibkey_lo: u64,
    #[prost(uint64, required, tag = "4")]
    pub apibkey_hi: u64,
    #[prost(uint64, required, tag = "5")]
    pub apdakey_lo: u64,
    #[prost(uint64, required, tag = "6")]
    pub apdakey_hi: u64,
    #[prost(uint64, required, tag = "7")]
    pub apdbkey_lo: u64,
    #[prost(uint64, required, tag = "8")]
    pub apdbkey_hi: u64,
    #[prost(uint64, required, tag = "9")]
    pub pac_enabled_key: u64,
}

/// The generic key.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PacGenericKeys {
    #[prost(uint64, required, tag = "1")]
    pub apgakey_lo: u64,
    #[prost(uint64, required, tag = "2")]
    pub apgakey_hi: u64,
}
