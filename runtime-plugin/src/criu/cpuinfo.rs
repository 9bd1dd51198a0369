//! `criu cpuinfo dump|check`, and `--cpu-cap`.

use std::process::ExitCode;

use ferry_engine::cpuinfo::{self, Compared};
use ferry_engine::images::cpuinfo::CpuinfoEntry;
use ferry_engine::images::{ImageSet, Kind, decode_one, encode};

use super::options::Options;
use super::{images_dir, write_new};
use crate::failure::{Failure, Outcome};

/// Runs `criu cpuinfo`.
///
/// # Errors
/// The image cannot be written or read, or the processors differ.
pub fn run(options: &Options) -> Outcome {
    let path = images_dir(options).join(Kind::Cpuinfo.name());
    let cannot = |what: &str| {
        let what = format!("cannot {what} {}", path.display());
        |error: std::io::Error| Failure::from(error).context(what)
    };
    match options.rest.first().and_then(|word| word.to_str()) {
        Some("dump") if options.rest.len() == 1 => {
            write_new(&path, &encode(Kind::Cpuinfo, &[cpuinfo::collect()?])).map_err(cannot("write"))?;
        }
        Some("check") if options.rest.len() == 1 => {
            let bytes = std::fs::read(&path).map_err(cannot("read"))?;
            let image: CpuinfoEntry = decode_one(&Kind::Cpuinfo.name(), Kind::Cpuinfo, &bytes)?;
            // Clients tell by the number that it is the processor.
            cpuinfo::compare(&image, &cpuinfo::collect()?, compared(options)?)
                .map_err(|error| Failure::from(error).with_errno(libc::ENOTSUP))?;
        }
        _ => return Err(Failure::new("cpuinfo wants dump or check")),
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a dump saves what the processor is: when `--cpu-cap` is given and is not `none`.
///
/// # Errors
/// A word that names nothing.
pub fn is_wanted(options: &Options) -> Result<bool, Failure> {
    Ok(options.cpu_cap.is_some() && compared(options)? != Compared::NONE)
}

/// Compares this processor with that of the images, where `--cpu-cap` asks for it.
///
/// # Errors
/// They differ, or the images do not tell.
pub fn check(options: &Options, images: &ImageSet) -> Result<(), Failure> {
    if !is_wanted(options)? {
        return Ok(());
    }
    let missing = || Failure::new("--cpu-cap: the images do not tell of the processor: dump with --cpu-cap too");
    let image: CpuinfoEntry = images.entry(Kind::Cpuinfo, &Kind::Cpuinfo.name())?.ok_or_else(missing)?;
    Ok(cpuinfo::compare(&image, &cpuinfo::collect()?, compared(options)?)?)
}

/// What `--cpu-cap` says, from what is usual.
fn compared(options: &Options) -> Result<Compared, Failure> {
    let mut compared = Compared::USUAL;
    for word in options.cpu_cap.as_deref().unwrap_or_default().split(',').filter(|word| !word.is_empty()) {
        let name = word.trim_start_matches('^');
        let wanted = (word.len() - name.len()) % 2 == 0;
        match name {
            "fpu" => compared.registers = wanted,
            "ins" => compared.instructions = wanted,
            "cpu" => compared.exactly = wanted,
            "all" | "none" => compared = if wanted == (name == "all") { Compared::ALL } else { Compared::NONE },
            _ => {
                return Err(Failure::new(format!(
                    "--cpu-cap {word}: cpu, fpu, ins, all or none is wanted, with ^ for not"
                )));
            }
        }
    }
    Ok(compared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_add_to_what_is_usual() {
        let compared = |line: &str| super::compared(&Options::parse(line.split(' ').map(Into::into)).unwrap());
        assert_eq!(compared("dump").unwrap(), Compared::USUAL);
        assert_eq!(compared("dump --cpu-cap").unwrap(), Compared::ALL);
        assert_eq!(compared("dump --cpu-cap=none").unwrap(), Compared::NONE);
        assert_eq!(compared("dump --cpu-cap=^none").unwrap(), Compared::ALL);
        assert_eq!(compared("dump --cpu-cap=cpu,^ins").unwrap(), Compared { instructions: false, ..Compared::ALL });
        assert!(compared("dump --cpu-cap=x").is_err());
    }
}
