//! OCI bundles, workload programs and the end-to-end tests of Ferry.
//!
//! The library is the harness that the tests of this package share. A test makes a [`Place`], a folder of its own;
//! starts a program in it, on the host ([`Workload`]) or in a bundle ([`Bundle`], [`Container`]); has it checkpointed and
//! restored; and at its end asks the place whether anything is left. Whatever way a test ends, only processes that it has
//! started itself are ended, by their pids.
//!
//! The harness expects one process per test, as nextest runs them: a test adopts and reaps orphans.

pub mod bundle;
pub mod capabilities;
pub mod cgroup;
pub mod client;
pub mod container;
pub mod containerd;
pub mod engine;
pub mod expectations;
pub mod image;
pub mod place;
pub mod podman;
pub mod processes;
pub mod programs;
pub mod rpc;
pub mod service;
pub mod surroundings;
pub mod terminal;
pub mod torture;
pub mod victim;
pub mod workload;

pub use bundle::Bundle;
pub use container::Container;
pub use engine::Engine;
pub use place::Place;
pub use surroundings::Surroundings;
pub use workload::Workload;

/// What a test, or a step of one, ends with: a sentence for people on failure.
pub type Outcome<T = ()> = Result<T, String>;
