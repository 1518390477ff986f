//! The `firebrick` binary: its verbs, and nothing but glue.
//!
//! With `--json`, stdout carries JSON only. Exit codes: 0 done, 1 failed, 2 usage, 101 a bug, 130 interrupted.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod models;
mod specialize;
mod ui;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;
use firebrick_tensor::memory;

use crate::args::Cli;
use crate::models::Occupied;
use crate::ui::{Terminal, complain, interrupted};

/// Keeps freed activations for the next step; the system's allocator returns them and pays page faults to get them back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let terminal = Terminal::new(&cli.global);
    if let Err(e) = ui::on_interrupt() {
        complain(&format!("warning: Ctrl-C will not stop cleanly: {e}"));
    }
    ui::keep_panics();
    memory::keep_freed(cli.verb.repeats());
    // Also unwinds what is under way, so that nothing half written stays.
    let Ok(result) = catch_unwind(AssertUnwindSafe(|| commands::run(&cli, &terminal))) else {
        terminal.finish();
        complain(&format!("internal error, please report it:\n{}", ui::panics()));
        return ExitCode::from(101);
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupted() => {
            terminal.finish();
            let how = if cli.verb.resumes() { "; run the same command with --resume to go on" } else { "" };
            complain(&format!("interrupted{how}"));
            ExitCode::from(130)
        }
        Err(e) => {
            terminal.finish();
            let (text, occupied) = (ui::chain(&e), models::is_occupied(&e));
            // The libraries know no flags.
            let hint = if occupied == Some(Occupied::Ours) { "; say --overwrite to replace it" } else { "" };
            complain(&format!("error: {text}{hint}"));
            ExitCode::from(if occupied.is_some() || e.is::<args::Usage>() { 2 } else { 1 })
        }
    }
}
