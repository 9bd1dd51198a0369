//! Man pages and shell completions of both command lines, made from their definitions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Command, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::criu;
use crate::failure::{Failure, Outcome};

/// Flags of `generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// What to write.
    #[arg(value_enum)]
    what: What,
    /// Where to: the folder of the pages, or the one that holds a folder for each shell. Made if it is not there.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// What can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// A page for each command, of section 8.
    Man,
    /// Completions for bash, fish and zsh, at the paths below `share/` where these look for them.
    Completions,
}

/// Writes them, `ferry` being the definition of the runtime's command line.
pub fn run(args: &GenerateArgs, ferry: Command) -> Outcome {
    for command in [ferry, criu::definition()] {
        match args.what {
            What::Man => pages(command, &args.folder)?,
            What::Completions => completions(command, &args.folder)?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A page for the command, and one for each of its own.
fn pages(command: Command, folder: &Path) -> Result<(), Failure> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let all = std::iter::once(&command).chain(command.get_subcommands().filter(|command| !command.is_hide_set()));
    for command in all {
        let page =
            Man::new(command.clone()).section("8").source(concat!("ferry ", env!("CARGO_PKG_VERSION"))).manual("Ferry");
        let mut text = Vec::new();
        page.render(&mut text)?;
        write(&folder.join(page.get_filename()), &text)?;
    }
    Ok(())
}

fn completions(mut command: Command, folder: &Path) -> Result<(), Failure> {
    let name = command.get_name().to_owned();
    let places = [
        (Shell::Bash, format!("bash-completion/completions/{name}")),
        (Shell::Fish, format!("fish/vendor_completions.d/{name}.fish")),
        (Shell::Zsh, format!("zsh/site-functions/_{name}")),
    ];
    for (shell, place) in places {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut command, &name, &mut script);
        write(&folder.join(place), &script)?;
    }
    Ok(())
}

fn write(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let written = fs::create_dir_all(parent).and_then(|()| fs::write(path, content));
    written.map_err(|error| Failure::from(error).context(format!("cannot write {}", path.display())))
}
