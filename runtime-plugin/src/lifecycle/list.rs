//! `ferry list`: all containers.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use super::state::Report;
use super::{TableFormat, print};
use crate::cli::Global;
use crate::failure::{Outcome, sentence_of};
use crate::logs;
use crate::state::Container;

/// Flags of `list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// How to print them.
    #[arg(long, short, value_name = "FORMAT", value_enum, default_value = "table")]
    pub format: TableFormat,
    /// Print names only.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Prints all containers, by name. One whose state is damaged is told of, and left out.
pub fn run(global: &Global, args: &ListArgs) -> Outcome {
    let mut reports = Vec::new();
    for container in Container::list(&global.root)? {
        match container {
            Ok(container) => {
                let owner = owner_of(&container.directory);
                reports.push(Report::of(container, owner));
            }
            Err(error) => logs::say(&sentence_of(&error)),
        }
    }
    let text = if args.quiet {
        reports.iter().map(|report| format!("{}\n", report.id)).collect()
    } else {
        match args.format {
            TableFormat::Json if reports.is_empty() => "null\n".to_owned(),
            TableFormat::Json => serde_json::to_string(&reports)? + "\n",
            TableFormat::Table => table(&reports),
        }
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Columns at least twelve wide and three apart, as runc lays them out.
fn table(reports: &[Report]) -> String {
    let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let rows = reports.iter().map(|report| {
        [
            report.id.clone(),
            report.pid.to_string(),
            report.status.clone(),
            report.bundle.display().to_string(),
            report.created.clone(),
            report.owner.clone(),
        ]
    });
    let rows: Vec<[String; 6]> = std::iter::once(header).chain(rows).collect();
    let widths: [usize; 6] =
        std::array::from_fn(|column| rows.iter().map(|row| (row[column].len() + 3).max(12)).max().unwrap_or(12));
    let line = |row: &[String; 6]| {
        let cells: String = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// The name of the user that a directory belongs to, or `#UID`.
fn owner_of(directory: &Path) -> String {
    let Ok(uid) = fs::metadata(directory).map(|metadata| metadata.uid()) else { return String::new() };
    super::ps::user_name(uid).unwrap_or_else(|| format!("#{uid}"))
}
