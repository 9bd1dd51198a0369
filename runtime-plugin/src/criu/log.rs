//! The log of a `criu` command, as CRIU's readers expect it.
//!
//! A line is the time since the command started, then `Error`, `Warn ` or neither, then what happened. runc, Podman and
//! containerd show people the lines that hold the word `Error`.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use tracing::dispatcher::{self, DefaultGuard, Dispatch};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::CRIU_VERSION;

/// Lines with the time since the command started, as `(SS.uuuuuu)`.
struct CriuLine(Instant);

impl<S, N> FormatEvent<S, N> for CriuLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let elapsed = self.0.elapsed();
        write!(out, "({:02}.{:06}) ", elapsed.as_secs(), elapsed.subsec_micros())?;
        match *event.metadata().level() {
            Level::ERROR => out.write_str("Error (ferry): ")?,
            Level::WARN => out.write_str("Warn  (ferry): ")?,
            _ => {}
        }
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            write!(out, "{}", span.name())?;
            let fields = span.extensions();
            if let Some(fields) =
                fields.get::<tracing_subscriber::fmt::FormattedFields<N>>().filter(|all| !all.is_empty())
            {
                write!(out, "{{{fields}}}")?;
            }
            out.write_str(": ")?;
        }
        context.field_format().format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}

/// Sends events to the file at `file` (made anew), or to standard error. `level` is CRIU's, 0 to 4.
///
/// # Errors
/// The file cannot be created.
pub fn install(file: Option<&Path>, level: u32) -> io::Result<()> {
    install_to(file.map(File::create).transpose()?, level);
    Ok(())
}

/// Sends events to `file`, or to standard error. `level` is CRIU's, 0 to 4.
pub fn install_to(file: Option<File>, level: u32) {
    // A second installation would be a second command in one process, which there is not.
    let _ = dispatcher::set_global_default(log(file, level));
    begin();
}

/// The same, for as long as the guard lives, and for this thread only: one request of several.
pub fn install_for_now(file: Option<File>, level: u32) -> DefaultGuard {
    let guard = dispatcher::set_default(&log(file, level));
    begin();
    guard
}

fn log(file: Option<File>, level: u32) -> Dispatch {
    let filter = match level {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let format =
        tracing_subscriber::fmt().with_max_level(filter).with_ansi(false).event_format(CriuLine(Instant::now()));
    match file {
        Some(file) => format.with_writer(Mutex::new(file)).finish().into(),
        None => format.with_writer(io::stderr).finish().into(),
    }
}

/// The first line, by which a log tells whose it is.
fn begin() {
    tracing::debug!("Version: {CRIU_VERSION} (ferry {})", env!("CARGO_PKG_VERSION"));
}
