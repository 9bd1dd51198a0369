//! `criu restore`.

use std::process::ExitCode;

use super::Failure;
use super::options::Options;

pub fn run(_options: &Options) -> Result<ExitCode, Failure> {
    Err(Failure::new("ferry does not support the command restore yet"))
}
