//! `firebrick man`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Command, CommandFactory};
use clap_mangen::Man as Page;
use serde_json::json;

use crate::args::{Cli, Global};
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Man {
    /// The folder to write to, such as ~/.local/share/man/man1.
    #[arg(value_name = "OUT")]
    out: PathBuf,
}

impl Man {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        let mut firebrick = Cli::command().disable_help_subcommand(true);
        firebrick.build();
        let pages: Vec<Command> =
            std::iter::once(firebrick.clone()).chain(firebrick.get_subcommands().cloned()).collect();
        let name = |page: &Command| page.get_display_name().unwrap_or(page.get_name()).to_owned();
        let files: Vec<PathBuf> = pages.iter().map(|page| self.out.join(name(page) + ".1")).collect();
        for file in &files {
            models::check_output(file, None, global)?;
        }
        std::fs::create_dir_all(&self.out).with_context(|| self.out.display().to_string())?;
        for (page, file) in pages.into_iter().zip(&files) {
            write(page, file)?;
        }
        let output = json!({"out": self.out, "pages": files.len()});
        terminal.result(&output, || format!("wrote {} pages to {}", files.len(), self.out.display()))
    }
}

fn write(page: Command, file: &Path) -> Result<()> {
    let mut text = Vec::new();
    Page::new(page).render(&mut text)?;
    firebrick_core::write_atomic(file, &text).with_context(|| file.display().to_string())
}
