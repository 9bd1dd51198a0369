//! Where messages go: one sentence on standard error for people, a log file for managers.
//!
//! containerd, CRI-O and Podman pass `--log FILE --log-format json` and report the last line whose level is
//! `error` to their users. Both formats are the ones of logrus, which runc writes: JSON objects with
//! `level`, `msg` and `time`, or `time="…" level=… msg="…"`.

use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;

/// Whether `install` was given a file: then `fail` writes there too.
static LOGS_TO_FILE: AtomicBool = AtomicBool::new(false);

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "oci", derive(clap::ValueEnum))]
pub enum LogFormat {
    /// `time="…" level=… msg="…"`
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Sends `tracing` events to `file` (appended), or to standard error when there is none.
///
/// Warnings and errors are written, everything with `debug`. Without a file, only ferry's own warnings
/// reach the terminal: the libraries below report through returned errors, which `fail` prints once.
///
/// # Errors
/// The log file cannot be opened for appending.
pub fn install(file: Option<&Path>, format: LogFormat, debug: bool) -> io::Result<()> {
    let line = LogrusLine { format };
    match file {
        Some(path) => {
            // Children of the container builder inherit the descriptor, so lines are appended atomically.
            let log = OpenOptions::new().create(true).append(true).open(path)?;
            LOGS_TO_FILE.store(true, Ordering::Relaxed);
            let levels = if debug {
                Targets::new().with_default(LevelFilter::DEBUG)
            } else {
                // libcgroups warns of every controller that the kernel lacks, on every command.
                Targets::new().with_default(LevelFilter::WARN).with_target("libcgroups", LevelFilter::ERROR)
            };
            let layer = tracing_subscriber::fmt::layer().event_format(line).with_ansi(false).with_writer(log);
            let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(levels).with(layer));
        }
        None => {
            let levels = if debug {
                Targets::new().with_default(LevelFilter::DEBUG)
            } else {
                Targets::new().with_target("ferry", LevelFilter::WARN)
            };
            let layer = tracing_subscriber::fmt::layer().event_format(line).with_ansi(false).with_writer(io::stderr);
            let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(levels).with(layer));
        }
    }
    Ok(())
}

/// Tells the user why the command failed: on standard error, and as the last line of the log file.
#[cfg(feature = "oci")]
pub fn fail(message: &str) {
    if LOGS_TO_FILE.load(Ordering::Relaxed) {
        tracing::error!("{message}");
    }
    say(message);
}

/// Prints one sentence on standard error.
#[allow(clippy::print_stderr, reason = "this is the one place that speaks to people")]
pub fn say(message: &str) {
    eprintln!("ferry: {message}");
}

/// Formats events as logrus does.
struct LogrusLine {
    format: LogFormat,
}

impl<S, N> FormatEvent<S, N> for LogrusLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut message = Message::default();
        event.record(&mut message);
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        match self.format {
            LogFormat::Json => {
                write!(out, "{{\"level\":\"{level}\",\"msg\":")?;
                write_quoted(&mut out, &message.text())?;
                writeln!(out, ",\"time\":\"{time}\"}}")
            }
            LogFormat::Text => {
                write!(out, "time=\"{time}\" level={level} msg=")?;
                write_quoted(&mut out, &message.text())?;
                writeln!(out)
            }
        }
    }
}

/// Writes `text` as a JSON string (RFC 8259 §7), which is also how logrus quotes in its text format.
fn write_quoted(out: &mut impl fmt::Write, text: &str) -> fmt::Result {
    out.write_char('"')?;
    for character in text.chars() {
        match character {
            '"' => out.write_str("\\\"")?,
            '\\' => out.write_str("\\\\")?,
            '\n' => out.write_str("\\n")?,
            '\t' => out.write_str("\\t")?,
            control if u32::from(control) < 0x20 => write!(out, "\\u{:04x}", u32::from(control))?,
            plain => out.write_char(plain)?,
        }
    }
    out.write_char('"')
}

/// The message of one event, with its other fields appended as `name=value`.
#[derive(Default)]
struct Message {
    message: String,
    fields: String,
}

impl Message {
    fn text(&self) -> String {
        match (self.message.is_empty(), self.fields.is_empty()) {
            (_, true) => self.message.clone(),
            (true, false) => self.fields.clone(),
            (false, false) => format!("{} ({})", self.message, self.fields),
        }
    }
}

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            let separator = if self.fields.is_empty() { "" } else { ", " };
            let _ = write!(self.fields, "{separator}{}={value:?}", field.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::write_quoted;

    #[test]
    fn quotes_what_json_requires() {
        let mut out = String::new();
        write_quoted(&mut out, "a \"b\"\\\n\u{1}é").unwrap();
        assert_eq!(out, "\"a \\\"b\\\"\\\\\\n\\u0001é\"");
    }
}
