//! `--display-stats`: what `stats-dump` and `stats-restore` hold, for people.

use ferry_engine::images::stats::StatsEntry;
use ferry_engine::images::{Kind, decode_one};

use crate::failure::Failure;

/// Prints a statistics image.
///
/// # Errors
/// It is none.
#[allow(clippy::print_stdout, reason = "what was asked for belongs on standard output")]
pub fn print(kind: Kind, image: &[u8]) -> Result<(), Failure> {
    let stats: StatsEntry = decode_one(&kind.name(), kind, image)?;
    lines(&stats).iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn lines(stats: &StatsEntry) -> Vec<String> {
    let time = |what: &str, micros: u32| format!("{what} time: {micros} us");
    let pages = |what: &str, count: u64| format!("{what}: {count} ({count:#x})");
    let mut lines = Vec::new();
    if let Some(dump) = &stats.dump {
        lines.extend([
            "Displaying dump stats:".to_owned(),
            time("Freezing", dump.freezing_time),
            time("Frozen", dump.frozen_time),
            time("Memory dump", dump.memdump_time),
            time("Memory write", dump.memwrite_time),
            pages("Memory pages scanned", dump.pages_scanned),
            pages("Memory pages skipped from parent", dump.pages_skipped_parent),
            pages("Memory pages written", dump.pages_written),
            pages("Lazy memory pages", dump.pages_lazy),
        ]);
    }
    if let Some(restore) = &stats.restore {
        lines.extend([
            "Displaying restore stats:".to_owned(),
            pages("Pages compared", restore.pages_compared),
            pages("Pages skipped COW", restore.pages_skipped_cow),
            pages("Pages restored", restore.pages_restored.unwrap_or_default()),
            time("Restore", restore.restore_time),
            time("Forking", restore.forking_time),
        ]);
    }
    lines
}
