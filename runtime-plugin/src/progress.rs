//! A bar on the terminal for checkpoints and restores that take long.
//!
//! Nothing is printed unless standard error is a terminal, and nothing of what lasts less than half a second. The bar is one
//! line, drawn again in place, and is gone before anything else is printed.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ferry_engine::progress::Progress;
use rustix::termios::{isatty, tcgetwinsize};

use crate::checkpoint::size;

/// How long to stay silent.
const SILENT: Duration = Duration::from_millis(500);
/// How often to draw.
const PERIOD: Duration = Duration::from_millis(100);
/// Columns of a terminal that does not tell.
const COLUMNS: usize = 80;
/// Longest bar proper.
const LONGEST: usize = 40;

/// A bar; gone from the terminal when it is dropped.
pub struct Bar {
    line: Option<Arc<Mutex<Line>>>,
}

struct Line {
    what: &'static str,
    began: Instant,
    drawn: Option<Instant>,
}

impl Bar {
    /// A bar of what is done, if there is a terminal to draw it on.
    pub fn new(what: &'static str) -> Self {
        let line = || Arc::new(Mutex::new(Line { what, began: Instant::now(), drawn: None }));
        Self { line: isatty(std::io::stderr()).then(line) }
    }

    /// What the engine is to tell.
    pub fn progress(&self) -> Progress {
        let Some(line) = self.line.clone() else { return Progress::default() };
        Progress::new(move |done, total| {
            // Whoever draws now draws for all.
            if let Ok(mut line) = line.try_lock() {
                line.tell(done, total);
            }
        })
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        let Some(line) = &self.line else { return };
        let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
        if line.drawn.take().is_some() {
            print("\r\x1b[K");
        }
        // What is told from now on is not drawn.
        line.began = Instant::now() + Duration::from_secs(1 << 30);
    }
}

impl Line {
    fn tell(&mut self, done: u64, total: u64) {
        let now = Instant::now();
        let due = match self.drawn {
            None => now.saturating_duration_since(self.began) >= SILENT,
            Some(drawn) => now.duration_since(drawn) >= PERIOD,
        };
        if due && total > 0 {
            self.drawn = Some(now);
            let columns = tcgetwinsize(std::io::stderr()).map_or(COLUMNS, |window| usize::from(window.ws_col));
            print(&format!("\r{}\x1b[K", text(self.what, done.min(total), total, columns)));
        }
    }
}

/// The line, shorter than `columns`.
fn text(what: &str, done: u64, total: u64, columns: usize) -> String {
    let told = format!("{what}: {} of {} of memory, {} %", size(done), size(total), done.saturating_mul(100) / total);
    let room = columns.saturating_sub(told.len() + " []".len() + 1).min(LONGEST);
    if room < 4 {
        return told.chars().take(columns.saturating_sub(1)).collect();
    }
    let filled = (u128::from(done) * room as u128 / u128::from(total)) as usize;
    format!("{told} [{}{}]", "#".repeat(filled), "-".repeat(room - filled))
}

/// A terminal that has gone away is nobody's loss.
fn print(text: &str) {
    let mut terminal = std::io::stderr();
    let _ = terminal.write_all(text.as_bytes()).and_then(|()| terminal.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_fits() {
        let half = text("checkpoint", 1 << 30, 2 << 30, 80);
        assert!(half.starts_with("checkpoint: 1.0 GiB of 2.0 GiB of memory, 50 % [###"), "{half}");
        assert_eq!(half.matches('#').count(), half.matches('-').count());
        for columns in [0, 1, 10, 52, 53, 60, 80, 500] {
            assert!(text("restore", 3, 7 << 30, columns).len() < columns.max(1), "{columns}");
        }
        assert!(text("restore", 7, 7, 80).ends_with("#]"));
    }
}
