//! The log file of a `criu` command: lines of seconds since the start, as CRIU's readers expect them.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

/// Time since the command started, as `(SS.uuuuuu)`.
struct SinceStart(Instant);

impl FormatTime for SinceStart {
    fn format_time(&self, out: &mut Writer<'_>) -> fmt::Result {
        let elapsed = self.0.elapsed();
        write!(out, "({:02}.{:06})", elapsed.as_secs(), elapsed.subsec_micros())
    }
}

/// Sends events to `file` (made anew), or to standard error. `level` is CRIU's, 0 to 4.
///
/// # Errors
/// The file cannot be created.
pub fn install(file: Option<&Path>, level: u32) -> io::Result<()> {
    let filter = match level {
        0 => LevelFilter::OFF,
        1 => LevelFilter::from_level(Level::ERROR),
        2 => LevelFilter::from_level(Level::WARN),
        3 => LevelFilter::from_level(Level::INFO),
        _ => LevelFilter::from_level(Level::DEBUG),
    };
    let format = tracing_subscriber::fmt()
        .with_max_level(filter)
        .with_ansi(false)
        .with_target(false)
        .with_timer(SinceStart(Instant::now()));
    // A second installation would be a second command in one process, which there is not.
    let _ = match file {
        Some(path) => {
            let file = File::create(path)?;
            tracing::subscriber::set_global_default(format.with_writer(Mutex::new(file)).finish())
        }
        None => tracing::subscriber::set_global_default(format.with_writer(io::stderr).finish()),
    };
    Ok(())
}
