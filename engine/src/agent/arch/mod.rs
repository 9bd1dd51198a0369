//! What depends on the processor: the runner's code, the registers of an injected call, the signal frame.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("ferry-engine knows x86_64 only, so far");
